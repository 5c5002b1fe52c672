#!/usr/bin/env python3
"""accuracy.py --attar BINARY --peer-python PYTHON --model DIR --ids FILE.jsonl --text FILE [--context 256] [--max-windows N] [--results DIR]

Perplexity, mean KL divergence (original || compressed, nats) and top-1 agreement of Attar's presets and of llm-compressor with the
same scheme and the same calibration ids, all judged by one judge that belongs to neither: the dense weights of tests/interop's
dequantizer run in transformers, f32, on windows of --context tokens that do not overlap, every position but the last of a window
predicting, no special token. Run it with the interpreter of the interop environment; PYTHON has llm-compressor.
The presets run with no further flag but the group. --peer DIR reuses (and fills) a folder of llm-compressor artifacts.
Exit 1 when Attar's gptq or awq is above llm-compressor's perplexity or KL divergence anywhere, or gptq not below rtn.
"""
import argparse, datetime, json, math, os, subprocess, sys, tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent; sys.path.insert(0, str(HERE.parent / "tests" / "interop"))
import torch
from clients import load, logits, token_ids

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--attar", required=True); p.add_argument("--peer-python", required=True); p.add_argument("--model", required=True); p.add_argument("--ids", required=True); p.add_argument("--text", required=True)
p.add_argument("--context", type=int, default=256); p.add_argument("--max-windows", type=int); p.add_argument("--threads", type=int, default=1)
p.add_argument("--peer"); p.add_argument("--work"); p.add_argument("--results"); a = p.parse_args()
torch.set_num_threads(a.threads)
SCHEMES = [("rtn", 4, 128), ("rtn", 3, 128), ("gptq", 4, 128), ("gptq", 3, 128), ("gptq", 2, 64), ("awq", 4, 128), ("awq", 3, 128)]
work = Path(a.work or tempfile.mkdtemp(prefix="attar-accuracy-")); peer = Path(a.peer or work / "llm-compressor"); peer.mkdir(parents=True, exist_ok=True); work.mkdir(parents=True, exist_ok=True)
samples = sum(1 for line in open(a.ids) if line.strip())
ids = token_ids(a.model, a.text); n = min(len(ids) // a.context, a.max_windows or len(ids))
windows = [ids[i * a.context : (i + 1) * a.context] for i in range(n)]

def run(command, log):
    with open(log, "w") as f: rc = subprocess.run([str(c) for c in command], stdout=f, stderr=subprocess.STDOUT).returncode
    if rc: sys.exit(f"exit {rc}: {' '.join(map(str, command))}; see {log}")

def judge(directory, reference, native=True):
    model = load(directory, native=native); kl, nll, same = [], [], []
    for w, r in zip(windows, reference or [None] * n):
        q = torch.log_softmax(logits(model, w)[:-1], -1)
        if reference is None: kept.append(q)
        r = q if r is None else r
        kl.append((r.exp() * (r - q)).sum(-1).double()); nll.append(-q.gather(1, torch.tensor(w[1:])[:, None])[:, 0].double()); same.append((r.argmax(-1) == q.argmax(-1)).double())
    per = torch.stack([k.mean() for k in kl]); kl, nll, same = map(torch.cat, (kl, nll, same))
    return dict(perplexity=math.exp(nll.mean().item()), kl_mean=kl.mean().item(), kl_se=(per.std() / math.sqrt(n)).item(), top1_agreement=same.mean().item(), tokens=len(nll))

kept = []; rows = [dict(tool="original", scheme="", **judge(a.model, None, native=False))]; reference = kept; print(json.dumps(rows[0]), flush=True)
for method, bits, group in SCHEMES:
    scheme = f"{method} w{bits} g{group} {'asym' if method == 'awq' else 'sym'}"; tag = f"{method}-w{bits}g{group}"
    theirs, ours = peer / tag, work / f"attar-{tag}"
    if not theirs.exists():
        run([a.peer_python, HERE / "peer_llmc.py", a.model, a.ids, theirs, "--algorithm", method, "--bits", bits, "--group", group, "--samples", samples, "--context", a.context, "--threads", a.threads], work / f"peer-{tag}.log")
    calib = [] if method == "rtn" else ["--ids", a.ids, "--samples", samples, "--context", a.context]
    run([a.attar, "compress", a.model, "--preset", f"{method}-w{bits}", *(["--group", group] if group != 128 else []), *calib, "--out", ours], work / f"attar-{tag}.log")
    for tool, d in (("llm-compressor", theirs), ("attar", ours)):
        rows.append(dict(tool=tool, scheme=scheme, **judge(d, reference))); print(json.dumps(rows[-1]), flush=True)

checks = []; by = {(r["tool"], r["scheme"]): r for r in rows}
for (tool, scheme), r in by.items():
    if tool == "attar" and not scheme.startswith("rtn"):
        for m in ("perplexity", "kl_mean"): checks.append((f"{scheme}: {m} at or below llm-compressor", r[m], by["llm-compressor", scheme][m], r[m] <= by["llm-compressor", scheme][m]))
for b in (4, 3):
    g, r = by["attar", f"gptq w{b} g128 sym"], by["attar", f"rtn w{b} g128 sym"]; checks.append((f"w{b}: gptq below rtn in KL", g["kl_mean"], r["kl_mean"], g["kl_mean"] < r["kl_mean"]))
name = Path(a.model).name; ok = all(c[3] for c in checks)
md = [f"# Accuracy on {name}, {datetime.date.today()}", "", f"{samples} calibration windows of {a.context} tokens, the same ids for both tools; judged on {n} windows of {a.context} ({rows[0]['tokens']} predictions) of {Path(a.text).name} "
      "by tests/interop's dequantizer in transformers, f32. KL in nats, standard error over windows.", "", "| scheme | tool | perplexity | KL (se) | top-1 agreement |", "|---|---|---|---|---|"]
md += [f"| {r['scheme'] or '-'} | {r['tool']} | {r['perplexity']:.2f} | {r['kl_mean']:.4f} ({r['kl_se']:.4f}) | {r['top1_agreement']:.3f} |" for r in rows]
md += ["", "| claim | Attar | against | |", "|---|---|---|---|"] + [f"| {c[0]} | {c[1]:.4f} | {c[2]:.4f} | {'holds' if c[3] else 'FAILS'} |" for c in checks]
folder = Path(a.results or HERE / "results"); folder.mkdir(parents=True, exist_ok=True)
(folder / f"accuracy-{name}.md").write_text("\n".join(md) + "\n"); (folder / f"accuracy-{name}.json").write_text(json.dumps(dict(rows=rows, checks=checks), indent=1) + "\n")
print("\n".join(md)); sys.exit(0 if ok else 1)
