#!/usr/bin/env python3
"""pruning.py --attar BINARY --peer-python PYTHON --model DIR --ids FILE.jsonl --text FILE [--context 256] [--max-windows N] [--results DIR]

Perplexity, mean KL divergence (original || pruned, nats) and top-1 agreement of Attar's pruning passes and of llm-compressor's, 50 % and
2:4, with the same calibration ids, all judged by one judge that belongs to neither: the weights in transformers, f32 (quantized ones through
tests/interop's dequantizer), on windows of --context tokens that do not overlap, every position but the last of a window predicting, no special
token. Also: joint SparseGPT + GPTQ W4 g128 in one step against SparseGPT and then GPTQ in one recipe, and OWL's ratios. Run it with the
interpreter of the interop environment; PYTHON has llm-compressor. --peer DIR reuses (and fills) a folder of llm-compressor artifacts.
Exit 1 when a claim of the table fails.
"""
import argparse, datetime, json, math, subprocess, sys, tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent; sys.path.insert(0, str(HERE.parent / "tests" / "interop"))
import torch
from clients import load, logits, token_ids

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--attar", required=True); p.add_argument("--peer-python", required=True); p.add_argument("--model", required=True); p.add_argument("--ids", required=True); p.add_argument("--text", required=True)
p.add_argument("--context", type=int, default=256); p.add_argument("--max-windows", type=int); p.add_argument("--threads", type=int, default=1)
p.add_argument("--peer"); p.add_argument("--work"); p.add_argument("--results"); a = p.parse_args()
torch.set_num_threads(a.threads)
work = Path(a.work or tempfile.mkdtemp(prefix="attar-pruning-")); peer = Path(a.peer or work / "llm-compressor"); peer.mkdir(parents=True, exist_ok=True); work.mkdir(parents=True, exist_ok=True)
samples = sum(1 for line in open(a.ids) if line.strip())
ids = token_ids(a.model, a.text); n = min(len(ids) // a.context, a.max_windows or len(ids))
windows = [ids[i * a.context : (i + 1) * a.context] for i in range(n)]

def run(command, log):
    with open(log, "w") as f: rc = subprocess.run([str(c) for c in command], stdout=f, stderr=subprocess.STDOUT).returncode
    if rc: sys.exit(f"exit {rc}: {' '.join(map(str, command))}; see {log}")

def judge(directory, reference, native=False):
    model = load(directory, native=native); kl, nll, same = [], [], []
    for w, r in zip(windows, reference or [None] * n):
        q = torch.log_softmax(logits(model, w)[:-1], -1)
        if reference is None: kept.append(q)
        r = q if r is None else r
        kl.append((r.exp() * (r - q)).sum(-1).double()); nll.append(-q.gather(1, torch.tensor(w[1:])[:, None])[:, 0].double()); same.append((r.argmax(-1) == q.argmax(-1)).double())
    per = torch.stack([k.mean() for k in kl]); kl, nll, same = map(torch.cat, (kl, nll, same))
    return dict(perplexity=math.exp(nll.mean().item()), kl_mean=kl.mean().item(), kl_se=(per.std() / math.sqrt(n)).item(), top1_agreement=same.mean().item(), tokens=len(nll))

kept, rows = [], []
def add(tool, what, directory, native=False):
    rows.append(dict(tool=tool, what=what, **judge(directory, kept or None, native))); print(json.dumps(rows[-1]), flush=True)

def ours(what, recipe, native=False):
    tag = "".join(c if c.isalnum() else "-" for c in what); (work / f"{tag}.toml").write_text(recipe)
    run([a.attar, "compress", a.model, "--recipe", work / f"{tag}.toml", "--ids", a.ids, "--samples", samples, "--context", a.context, "--out", work / tag], work / f"{tag}.log")
    add("attar", what, work / tag, native)

step = lambda name, *more: "\n".join(["[[step]]", f'pass = "{name}"', *more]) + "\n"
W4 = "scheme = { bits = 4, group_size = 128 }"
add("original", "", a.model)
for shape, option in (("50 %", "sparsity = 0.5"), ("2:4", 'pattern = "2:4"')):
    for name in ("wanda", "sparsegpt"):
        theirs = peer / f"{name}-{shape.replace(' %', '').replace(':', '')}"
        if not theirs.exists():
            run([a.peer_python, HERE / "peer_llmc.py", a.model, a.ids, theirs, "--algorithm", name, "--pattern", shape.replace(" %", ""), "--samples", samples, "--context", a.context, "--threads", a.threads], work / f"peer-{theirs.name}.log")
        add("llm-compressor", f"{name} {shape}", theirs)
    ours(f"magnitude {shape}", step("magnitude", option))
    ours(f"wanda {shape}", step("wanda", option))
    ours(f"wanda {shape}, original upstream", step("wanda", option, 'upstream = "original"'))
    ours(f"sparsegpt {shape}", step("sparsegpt", option))
    ours(f"sparsegpt {shape}, sweep alone", step("sparsegpt", option, "refine = 0"))
    ours(f"sparsegpt {shape}, no exchange", step("sparsegpt", option, "exchange = false"))
    ours(f"sparsegpt {shape}, then gptq w4 g128", step("sparsegpt", option) + step("gptq", W4), native=True)
    ours(f"sparsegpt {shape} and w4 g128 in one step", step("sparsegpt", option, W4), native=True)
ours("wanda 50 %, owl, original upstream", step("wanda", "sparsity = 0.5", 'ratios = "owl"', 'upstream = "original"'))
ours("sparsegpt 50 %, owl", step("sparsegpt", "sparsity = 0.5", 'ratios = "owl"'))

by = {(r["tool"], r["what"]): r for r in rows}; checks = []
def claim(text, tool, what, against_tool, against, metrics=("perplexity", "kl_mean"), strict=False):
    for m in metrics:
        x, y = by[tool, what][m], by[against_tool, against][m]; checks.append((f"{text}: {m}", x, y, x < y if strict else x <= y))
for shape in ("50 %", "2:4"):
    for name in ("wanda", "sparsegpt"): claim(f"{name} {shape} at or below llm-compressor", "attar", f"{name} {shape}", "llm-compressor", f"{name} {shape}")
    claim(f"{shape}: one step below two", "attar", f"sparsegpt {shape} and w4 g128 in one step", "attar", f"sparsegpt {shape}, then gptq w4 g128", strict=True)
claim("2:4: sparsegpt below wanda", "attar", "sparsegpt 2:4", "attar", "wanda 2:4", strict=True)
claim("2:4: wanda below magnitude", "attar", "wanda 2:4", "attar", "magnitude 2:4", strict=True)
name = Path(a.model).name; ok = all(c[3] for c in checks)
md = [f"# Pruning {name}, {datetime.date.today()}", "", f"{samples} calibration windows of {a.context} tokens, the same ids for both tools; judged on {n} windows of {a.context} ({rows[0]['tokens']} predictions) of {Path(a.text).name} "
      "in transformers, f32. KL in nats, standard error over windows. Head and embedding untouched.", "", "| what | tool | perplexity | KL (se) | top-1 agreement |", "|---|---|---|---|---|"]
md += [f"| {r['what'] or 'original'} | {r['tool'] if r['what'] else '-'} | {r['perplexity']:.2f} | {r['kl_mean']:.4f} ({r['kl_se']:.4f}) | {r['top1_agreement']:.3f} |" for r in rows]
md += ["", "| claim | Attar | against | |", "|---|---|---|---|"] + [f"| {c[0]} | {c[1]:.4f} | {c[2]:.4f} | {'holds' if c[3] else 'FAILS'} |" for c in checks]
folder = Path(a.results or HERE / "results"); folder.mkdir(parents=True, exist_ok=True)
(folder / f"{name}.md").write_text("\n".join(md) + "\n"); (folder / f"{name}.json").write_text(json.dumps(dict(rows=rows, checks=checks), indent=1) + "\n")
print("\n".join(md)); sys.exit(0 if ok else 1)
