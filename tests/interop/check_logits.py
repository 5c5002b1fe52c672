#!/usr/bin/env python3
"""check_logits.py ARTIFACT DUMP.safetensors (--text FILE | --ids FILE.jsonl) [--dtype float32|bfloat16] [--native] [--bound B]

Compares the logits of the first window with what `attar eval --dump-logits` wrote: the relative error is
||attar - client|| / ||client||, 2-norms over all logits. Exit 1 above the bound (default 1e-3, bfloat16 3e-2).
"""
import argparse, json, sys
from safetensors.torch import load_file
from clients import load, logits, token_ids


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("artifact"); p.add_argument("dump"); p.add_argument("--text"); p.add_argument("--ids")
    p.add_argument("--dtype", default="float32"); p.add_argument("--native", action="store_true"); p.add_argument("--bound", type=float)
    a = p.parse_args(argv)
    ours = load_file(a.dump)["logits"]
    window = token_ids(a.artifact, a.text, a.ids)[: len(ours)]
    theirs = logits(load(a.artifact, a.dtype, a.native), window)
    if ours.shape != theirs.shape:
        print(json.dumps(dict(check="logits", artifact=a.artifact, error=f"shapes differ: attar {list(ours.shape)}, client {list(theirs.shape)}", passed=False))); return False
    error = ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()
    bound = a.bound or (1e-3 if a.dtype == "float32" else 3e-2)
    client = "dequantize.py" if a.native else f"transformers {a.dtype}"
    ok = error <= bound  # a NaN is not
    print(json.dumps(dict(check="logits", artifact=a.artifact, client=client, relative_error=error, bound=bound, passed=ok)))
    return ok


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
