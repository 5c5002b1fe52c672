#!/usr/bin/env python3
"""w8a8.py --attar BINARY --peer-python PYTHON --model DIR --ids FILE.jsonl --text FILE [--context 256] [--max-windows N] [--work DIR] [--results DIR]

Perplexity of W8A8 (8 bits per row, int8 activations per token) with and without smoothing: Attar's and llm-compressor's with the same
calibration ids, every artifact judged twice: by transformers with compressed-tensors (f32; it rounds activations itself) and by `attar eval`,
which multiplies with its W8A8 kernel and reads both tools' files. Windows of --context tokens that do not overlap, every position but the last of a
window predicting, no special token. Run it with an interpreter that has transformers and compressed-tensors; PYTHON has llm-compressor.
Exit 1 when preset w8a8 is more than 1 % above the original, or the two judges differ by more than 0.5 % on any artifact.
"""
import argparse, datetime, json, math, shutil, subprocess, sys, tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent; sys.path.insert(0, str(HERE.parent / "tests" / "interop"))
import torch
from clients import load, logits, token_ids

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--attar", required=True); p.add_argument("--peer-python", required=True); p.add_argument("--model", required=True); p.add_argument("--ids", required=True); p.add_argument("--text", required=True)
p.add_argument("--context", type=int, default=256); p.add_argument("--max-windows", type=int); p.add_argument("--threads", type=int, default=1); p.add_argument("--work"); p.add_argument("--results"); a = p.parse_args()
torch.set_num_threads(a.threads)
SCHEME = 'scheme = { bits = 8, group_size = -1, activations = "int8" }'
SMOOTH = '[[step]]\npass = "smoothquant"\n'
# What runs: our recipe (None: the preset), or llm-compressor's flags.
RUNS = [("attar", "rtn, no smoothing", f'[[step]]\npass = "rtn"\n{SCHEME}\n'), ("attar", "preset w8a8", None)]
RUNS += [("attar", f"smoothquant {a_} {f}, {q}", f'{SMOOTH}alpha = {a_}\nfolds = "{f}"\n[[step]]\npass = "{q}"\n{SCHEME}\n')
         for a_, f, q in [("0.5", "norms", "rtn"), ("0.5", "all", "rtn"), ("0.8", "norms", "rtn"), ("0.5", "norms", "gptq"), ("0.5", "all", "gptq")]]
RUNS += [("attar", "gptq, no smoothing", f'[[step]]\npass = "gptq"\n{SCHEME}\n')]
RUNS += [("llm-compressor", "rtn, no smoothing", []), ("llm-compressor", "smoothquant 0.5, rtn", ["--smooth", 0.5]), ("llm-compressor", "smoothquant 0.8, rtn", ["--smooth", 0.8])]
work = Path(a.work or tempfile.mkdtemp(prefix="attar-w8a8-")); work.mkdir(parents=True, exist_ok=True)
samples = sum(1 for line in open(a.ids) if line.strip())
ids = token_ids(a.model, a.text); n = min(len(ids) // a.context, a.max_windows or len(ids))
windows = [ids[i * a.context : (i + 1) * a.context] for i in range(n)]

def run(command, log):
    r = subprocess.run([str(c) for c in command], capture_output=True, text=True); log.write_text(r.stdout + r.stderr)
    if r.returncode: sys.exit(f"exit {r.returncode}: {' '.join(map(str, command))}; see {log}")
    return r.stdout

def client(directory):
    model, nll, first = load(str(directory)), [], None
    for w in windows:
        y = logits(model, w); first = y if first is None else first
        nll.append(-torch.log_softmax(y[:-1], -1).gather(1, torch.tensor(w[1:])[:, None])[:, 0].double())
    return math.exp(torch.cat(nll).mean().item()), first

def ours(directory, tag, *extra):
    dump = work / f"{tag}.safetensors"; limit = ["--max-windows", a.max_windows] if a.max_windows else []
    report = json.loads(run([a.attar, "eval", directory, "--text", a.text, "--context", a.context, *limit, "--reference", a.model, "--dump-logits", dump, "--json", *extra], work / f"{tag}.log"))
    from safetensors.torch import load_file
    return report, load_file(dump)["logits"]

original = client(a.model)[0]; rows = []; print(json.dumps(dict(original=original)), flush=True)
for at, (tool, name, how) in enumerate(RUNS):
    out = work / f"{at}-{tool}"; tag = out.name
    if not out.exists():
        if tool == "attar":
            recipe = ["--preset", "w8a8"]
            if how is not None: (work / f"{tag}.toml").write_text(how); recipe = ["--recipe", work / f"{tag}.toml"]
            run([a.attar, "compress", a.model, *recipe, "--ids", a.ids, "--samples", samples, "--context", a.context, "--layout", "compressed-tensors-int", "--out", out], work / f"{tag}.compress.log")
        else:
            run([a.peer_python, HERE / "peer_llmc.py", a.model, a.ids, out, "--algorithm", "rtn", "--bits", 8, "--group", 0, "--activations", "int8", *how, "--samples", samples, "--context", a.context, "--threads", a.threads], work / f"{tag}.compress.log")
    if not (out / "tokenizer.json").exists(): shutil.copy(Path(a.model) / "tokenizer.json", out)
    theirs, first = client(out); report, dump = ours(out, tag); floats, _ = ours(out, tag + "-f32", "--activations", "f32")
    rows.append(dict(tool=tool, recipe=name, client=theirs, attar=report["perplexity"], kl=report["kl_mean"], weights_only=floats["perplexity"], activations=report["activations"], kernels=report["kernels"],
                     logits=((dump.double() - first.double()).norm() / first.double().norm()).item())); print(json.dumps(rows[-1]), flush=True)

preset = next(r for r in rows if r["recipe"] == "preset w8a8")
checks = [("preset w8a8 within 1 % of the original", preset["client"] / original - 1, 0.01), ("both judges agree within 0.5 %, worst artifact", max(abs(r["attar"] / r["client"] - 1) for r in rows), 0.005)]
name = Path(a.model).name; ok = all(c[1] <= c[2] for c in checks)
md = [f"# W8A8 on {name}, {datetime.date.today()}", "", f"8 bits per row, symmetric, int8 activations with one scale per token. {samples} calibration windows of {a.context} tokens, the same ids for both tools; {n} windows of {a.context} of {Path(a.text).name}. "
      f"Original: perplexity {original:.4f} (transformers, f32). `transformers` rounds activations through compressed-tensors (step = max/127.5), `attar eval` multiplies with the W8A8 kernel (max/127, as vLLM); logits: relative difference of the two on the first window. "
      "`weights only` is `attar eval --activations f32`. KL of `attar eval` against the original, nats.", "", "| tool | recipe | transformers | over the original | attar eval | weights only | KL | logits |", "|---|---|---|---|---|---|---|---|"]
md += [f"| {r['tool']} | {r['recipe']} | {r['client']:.4f} | {100 * (r['client'] / original - 1):+.3f} % | {r['attar']:.4f} | {r['weights_only']:.4f} | {r['kl']:.6f} | {r['logits']:.1e} |" for r in rows]
md += ["", "| claim | measured | bound | |", "|---|---|---|---|"] + [f"| {c[0]} | {100 * c[1]:.3f} % | {100 * c[2]:.1f} % | {'holds' if c[1] <= c[2] else 'FAILS'} |" for c in checks]
folder = Path(a.results or HERE / "results"); folder.mkdir(parents=True, exist_ok=True)
(folder / f"{name}.md").write_text("\n".join(md) + "\n"); (folder / f"{name}.json").write_text(json.dumps(dict(original=original, rows=rows, checks=checks), indent=1) + "\n")
print("\n".join(md)); sys.exit(0 if ok else 1)
