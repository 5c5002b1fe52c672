#!/usr/bin/env python3
"""One training step by our code and by candle, in turn: forward, backward and AdamW of a 4.95 M-parameter Llama on 8
windows of 256 tokens (bench/candle). Prints a table and writes it.

    cargo build --release --manifest-path bench/candle/Cargo.toml
    bench/train_step.py bench/candle/target/release/attar-candle OUT.md [--rounds 3] [--steps 6]
"""
import argparse
import json
import os
import subprocess
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("binary")
parser.add_argument("out")
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--steps", type=int, default=6)
args = parser.parse_args()

cpu = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
found = {}
for threads in (1, 2):
    for _ in range(args.rounds):
        for who in ("ours", "candle"):
            env = {**os.environ, "RAYON_NUM_THREADS": str(threads)}
            line = subprocess.run([args.binary, who, str(args.steps)], env=env, check=True, capture_output=True, text=True)
            found.setdefault((threads, who), []).append(json.loads(line.stdout))

lines = [
    "# A training step: ours and candle's",
    "",
    f"Forward, backward and AdamW of a Llama with 4,951,296 parameters (hidden 256, 6 blocks, 4/2 heads of 64, MLP 704, "
    f"vocabulary 2048, tied) on 8 windows of 256 tokens, f32, all tapes kept. {args.rounds} processes of {args.steps} "
    f"steps each, in turn; the fastest step of each process, the resident peak of the process. {cpu}, `bench/train_step.py`.",
    "",
    "| threads | ours, ms | candle, ms | ratio of the best | ours, MiB | candle, MiB |",
    "|---|---|---|---|---|---|",
]
for threads in (1, 2):
    ours, candle = found[threads, "ours"], found[threads, "candle"]
    times = lambda runs: sorted(run["step_ms"] for run in runs)
    peak = lambda runs: max(run["peak_mib"] for run in runs)
    show = lambda runs: ", ".join(f"{time:.0f}" for time in times(runs))
    lines.append(
        f"| {threads} | {show(ours)} | {show(candle)} | {times(candle)[0] / times(ours)[0]:.2f} "
        f"| {peak(ours):.0f} | {peak(candle):.0f} |"
    )
    assert ours[0]["losses"] == ours[-1]["losses"], "the same bits each time"
losses = {who: found[1, who][0]["losses"] for who in ("ours", "candle")}
same = found[1, "ours"][0]["losses"] == found[2, "ours"][0]["losses"]
lines += ["", f"Losses of the steps: ours {losses['ours']}, candle {losses['candle']}; ours on two threads "
          + ("the same." if same else "DIFFER.")]
Path(args.out).write_text("\n".join(lines) + "\n")
print("\n".join(lines))
