#!/usr/bin/env python3
"""Memory budgets: predicted and measured resident peak, wall and CPU time of one compression at each budget.
usage: budget.py ATTAR CHECKPOINT IDS.jsonl OUT_DIR --preset gptq-w4 --budgets 1GiB,2GiB,4GiB,none
                 [--samples 16] [--context 512] [--threads 2]
The peak is read from the operating system (the largest resident size of the child) and from the report (VmHWM)."""
import argparse, hashlib, json, os, re, shutil, subprocess, time

p = argparse.ArgumentParser()
p.add_argument("attar"), p.add_argument("checkpoint"), p.add_argument("ids"), p.add_argument("out")
p.add_argument("--preset", default="gptq-w4"), p.add_argument("--budgets", default="1GiB,2GiB,4GiB,none")
p.add_argument("--samples", type=int, default=16), p.add_argument("--context", type=int, default=512)
p.add_argument("--threads", type=int, default=2)
a = p.parse_args()
os.makedirs(a.out, exist_ok=True)
cpu = next(l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name"))
rows, digests = [], set()
for budget in a.budgets.split(","):
    out = f"{a.out}/{budget}"
    shutil.rmtree(out, ignore_errors=True)
    command = [a.attar, "--threads", str(a.threads), "compress", a.checkpoint, "--preset", a.preset, "--out", out]
    if not a.preset.startswith("rtn"):
        command += ["--ids", a.ids, "--samples", str(a.samples), "--context", str(a.context)]
    if budget != "none":
        command += ["--memory", budget]
    start = time.time()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    error = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.time() - start
    if status != 0:
        rows.append({"budget": budget, "error": error.strip().replace("\n", " ")[:400]})
        print(rows[-1], flush=True)
        continue
    report = json.load(open(f"{out}/report.json"))
    digest = hashlib.sha256()
    for name in sorted(f for f in os.listdir(out) if re.search("safetensors$", f)):
        digest.update(open(f"{out}/{name}", "rb").read())
    digests.add(digest.hexdigest())
    t = report["timings"]
    rows.append({"budget": budget, "wall_s": round(wall, 1), "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
                 "predicted_mb": round(report["predicted_peak_bytes"] / 1e6, 1), "vmhwm_mb": round(report["measured_peak_bytes"] / 1e6, 1),
                 "maxrss_mb": round(usage.ru_maxrss * 1024 / 1e6, 1), "sha256": digest.hexdigest()[:16],
                 "time": {k: round(v, 1) for k, v in t.items()}})
    print(rows[-1], flush=True)
    shutil.rmtree(out)
print(f"\n{cpu}, {a.threads} threads, {a.preset}, {a.samples} x {a.context} tokens, {time.strftime('%Y-%m-%d')}; one hash: {len(digests) == 1}\n")
print("| budget | wall s | CPU s | predicted MB | measured MB (VmHWM) | where the time went |\n|---|---|---|---|---|---|")
for r in rows:
    if "error" in r:
        print(f"| {r['budget']} | refused | | | | {r['error']} |")
    else:
        print(f"| {r['budget']} | {r['wall_s']} | {r['cpu_s']} | {r['predicted_mb']} | {r['vmhwm_mb']} | " + ", ".join(f"{k} {v}" for k, v in r["time"].items() if v and k != "total") + " |")
json.dump({"cpu": cpu, "command": " ".join(os.sys.argv), "rows": rows}, open(f"{a.out}/budget.json", "w"), indent=1)
