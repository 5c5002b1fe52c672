#!/usr/bin/env python3
"""check_ppl.py ARTIFACT REPORT.json --text FILE [--context 256] [--max-windows N] [--dtype D] [--native] [--bound 0.005]

Perplexity of the artifact in the client against `perplexity` of a JSON object printed by `attar eval --json`: windows of
--context tokens that do not overlap, every position but a window's first scored, no special token. Exit 1 above the bound.
"""
import argparse, json, math, sys
import torch
from clients import load, logits, token_ids


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("artifact"); p.add_argument("report"); p.add_argument("--text"); p.add_argument("--ids"); p.add_argument("--context", type=int, default=256)
    p.add_argument("--max-windows", type=int); p.add_argument("--dtype", default="float32"); p.add_argument("--native", action="store_true"); p.add_argument("--bound", type=float, default=0.005)
    a = p.parse_args(argv)
    model, ids = load(a.artifact, a.dtype, a.native), token_ids(a.artifact, a.text, a.ids)
    n = min(len(ids) // a.context, a.max_windows or len(ids))
    total = count = 0
    for w in range(n):
        window = ids[w * a.context : (w + 1) * a.context]
        nll = torch.nn.functional.cross_entropy(logits(model, window)[:-1], torch.tensor(window[1:]), reduction="none").double()
        total += nll.sum().item(); count += len(nll)
    ppl = math.exp(total / count); report = json.load(open(a.report)); ours = report["perplexity"]
    error = abs(ours / ppl - 1); ok = error <= a.bound and report["tokens"] in (count, n * a.context)
    print(json.dumps(dict(check="perplexity", artifact=a.artifact, client="dequantize.py" if a.native else f"transformers {a.dtype}", attar=ours, client_perplexity=ppl,
                          tokens=count, attar_tokens=report["tokens"], difference=error, bound=a.bound, passed=ok)))
    return ok


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
