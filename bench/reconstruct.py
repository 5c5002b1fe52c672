#!/usr/bin/env python3
"""reconstruct.py --attar BINARY --model DIR --calib FILE --text FILE [--context 256] [--samples 128] [--work DIR] [--results DIR] [--note TEXT]

Block reconstruction with its defaults behind pruning (and behind codes, where only scales and norms learn): every recipe is made and measured
without and with the step `reconstruct`, by `attar eval` on held-out text (perplexity, KL divergence original || compressed in nats).
`recovered` is the part of the KL divergence that goes away. Calibration text alone is read. Exit 1 when a step makes a row worse.
"""
import argparse, datetime, json, subprocess, sys, tempfile
from pathlib import Path

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name in ("attar", "model", "calib", "text"): p.add_argument("--" + name, required=True)
p.add_argument("--context", type=int, default=256); p.add_argument("--samples", type=int, default=128)
p.add_argument("--work"); p.add_argument("--results"); p.add_argument("--note", default=""); a = p.parse_args()
work = Path(a.work or tempfile.mkdtemp(prefix="attar-reconstruct-")); work.mkdir(parents=True, exist_ok=True)

def step(name, **options): return f'[[step]]\npass = "{name}"\n' + "".join(f"{k} = {v}\n" for k, v in options.items())
dense = '[[emit]]\nlayout = "dense"\n'
RECIPES = [
    ("magnitude 50 %", step("magnitude", sparsity=0.5), dense),
    ("wanda 50 %", step("wanda", sparsity=0.5), dense),
    ("sparsegpt 50 %", step("sparsegpt", sparsity=0.5), dense),
    ("wanda 2:4", step("wanda", pattern='"2:4"'), dense),
    ("sparsegpt 2:4", step("sparsegpt", pattern='"2:4"'), dense),
    ("sparsegpt 70 %", step("sparsegpt", sparsity=0.7), dense),
    ("gptq w3 g128", step("gptq", scheme="{ bits = 3, group_size = 128 }"), ""),
    ("gptq w2 g64", step("gptq", scheme="{ bits = 2, group_size = 64 }"), ""),
]

def run(*command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode: sys.exit(f"exit {done.returncode}: {' '.join(map(str, command))}\n{done.stderr}")
    return done.stdout

def made(slug, recipe):
    file, out = work / f"{slug}.toml", work / slug; file.write_text(recipe)
    run(a.attar, "compress", a.model, "--recipe", file, "--text", a.calib, "--context", a.context, "--samples", a.samples, "--out", out)
    found = json.loads(run(a.attar, "eval", out, "--text", a.text, "--context", a.context, "--reference", a.model, "--json"))
    return found, json.loads((out / "report.json").read_text())["timings"]["total"]

base = json.loads(run(a.attar, "eval", a.model, "--text", a.text, "--context", a.context, "--json")); rows, bad = [], 0
for number, (name, recipe, emit) in enumerate(RECIPES):
    (before, _), (after, seconds) = made(f"{number}", recipe + emit), made(f"{number}-learned", recipe + step("reconstruct") + emit)
    bad += after["kl_mean"] > before["kl_mean"]
    rows.append(f"| {name} | {before['perplexity']:.3f} | {after['perplexity']:.3f} | {before['kl_mean']:.4f} | {after['kl_mean']:.4f} | {1 - after['kl_mean'] / before['kl_mean']:.1%} | {seconds:.1f} |")
    print(rows[-1], flush=True)
cpu = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")); model = Path(a.model).name
text = f"""# Reconstruction behind pruning and codes, {model}

{datetime.date.today()}, {cpu}. `reconstruct` with its defaults; calibration: {a.samples} windows of {a.context} of {Path(a.calib).name}; measured on {Path(a.text).name}, context {a.context}; the
original has perplexity {base['perplexity']:.3f}. `bench/reconstruct.py`. {a.note}

| recipe | perplexity | with reconstruct | KL, nats | with reconstruct | recovered | whole run, s |
|---|---|---|---|---|---|---|
""" + "\n".join(rows) + "\n"
if a.results:
    folder = Path(a.results); folder.mkdir(parents=True, exist_ok=True); (folder / f"reconstruct-{model}.md").write_text(text)
sys.exit(1 if bad else 0)
