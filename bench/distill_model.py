#!/usr/bin/env python3
"""Structured cuts of one trained model, and what distillation on the logits of the original gives back: every cut is made
and measured alone and with a `distill` step behind it, by `attar eval` on held-out text (perplexity, KL divergence from the
original in nats). `recovered` is the part of the perplexity lost by the cut that comes back.

    bench/distill_model.py --attar BINARY --model DIR --calib FILE --text FILE --out OUT.md [--train FILE] [--epochs N] [--only NAME]
                     [--context 256] [--work DIR] [--note TEXT]

With --train the cut is made with --calib and the training sees that text instead (a recipe of its own on the cut
checkpoint, with the original as its teacher). Times are wall times of the training with whatever else the machine did; the
rate in tokens per second is the run's own.
"""
import argparse
import datetime
import json
import subprocess
import tempfile
import time
from pathlib import Path

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name in ("attar", "model", "calib", "text", "out"):
    p.add_argument("--" + name, required=True)
p.add_argument("--train")
p.add_argument("--train-samples", type=int, default=25000)
p.add_argument("--options", default="")
p.add_argument("--epochs", type=int, default=6)
p.add_argument("--only")
p.add_argument("--context", type=int, default=256)
p.add_argument("--work")
p.add_argument("--note", default="")
a = p.parse_args()
work = Path(a.work or tempfile.mkdtemp(prefix="attar-distill-model-"))
work.mkdir(parents=True, exist_ok=True)

CUTS = [
    ("depth, 1 block", '[[step]]\npass = "prune_depth"\nblocks = 1\n'),
    ("hidden 0.125", '[[step]]\npass = "prune_hidden"\nratio = 0.125\n'),
    ("ffn 0.5", '[[step]]\npass = "prune_ffn"\nratio = 0.5\n'),
]


def attar(*args):
    run = subprocess.run([a.attar, *map(str, args)], capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"attar {' '.join(map(str, args))}\n{run.stderr}")
    return run


def evaluate(path):
    args = ["eval", path, "--text", a.text, "--context", a.context, "--reference", a.model, "--json"]
    return json.loads(attar(*args).stdout)


def compress(model, recipe, text, samples, out):
    """Seconds of the training, and what it says of itself."""
    if not (out / "report.json").exists():
        (work / "recipe.toml").write_text(recipe)
        args = ["compress", model, "--recipe", work / "recipe.toml", "--text", text, "--context", a.context, "--samples", samples]
        attar(*args, "--out", out, "--progress", "json")
    report = json.loads((out / "report.json").read_text())
    trainings = [entry["training"] for entry in report["model"] if entry.get("training")]
    spans = [s for s in report["timeline"] if "distill" in s["what"] and s["phase"] == "solve"]
    return sum(s["end"] - s["start"] for s in spans), (trainings or [None])[-1]


distill = f'[[step]]\npass = "distill"\nepochs = {a.epochs}\n{a.options}\n'
original = evaluate(a.model)
base = original["perplexity"]
rows = []
for name, cut in CUTS:
    if a.only and a.only != name:
        continue
    slug = name.replace(",", "").replace(" ", "-")
    alone = work / f"{slug}-cut"
    compress(a.model, cut, a.calib, 128, alone)
    before = evaluate(alone)
    learned = work / f"{slug}-distilled"
    if a.train:
        own = distill + f'teacher = "{Path(a.model).resolve()}"\n'
        seconds, training = compress(alone, own, a.train, a.train_samples, learned)
    else:
        seconds, training = compress(a.model, cut + distill, a.calib, 1000, learned)
    after = evaluate(learned)
    lost, left = before["perplexity"] - base, after["perplexity"] - base
    rows.append(
        f"| {name} | {before['perplexity']:.3f} | {after['perplexity']:.3f} | {100 * (1 - left / lost):.1f} % "
        f"| {before['kl_mean']:.4f} | {after['kl_mean']:.4f} | {training['steps']} | {training['tokens']} | {seconds:.0f} "
        f"| {training['tokens'] / max(seconds, 1e-9):.0f} |"
    )
    print(rows[-1], flush=True)

cpu = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
text = Path(a.train or a.calib).name
lines = [
    f"# Distillation of cut models, {Path(a.model).name}, on {text}",
    "",
    f"{datetime.date.today()}, {cpu}. Cuts with 128 windows of {a.context} of {Path(a.calib).name}, training on all windows of {text}; "
    f"measured on {Path(a.text).name}, context {a.context}; the original has perplexity {base:.3f}. `bench/distill_model.py`, "
    f"{a.epochs} epochs{', ' + a.options.replace(chr(10), ', ') if a.options else ''}. {a.note}",
    "",
    "| cut | perplexity | distilled | recovered | KL, nats | distilled | steps | tokens | training, s | tokens/s |",
    "|---|---|---|---|---|---|---|---|---|---|",
    *rows,
]
Path(a.out).write_text("\n".join(lines) + "\n")
