#!/usr/bin/env python3
"""What a work directory saves: wall and CPU time of a first run, of one with other bits, and of an unchanged one.
usage: reuse.py ATTAR CHECKPOINT IDS.jsonl OUT_DIR [--samples N] [--context N] [--threads N]
Prints a table and writes OUT_DIR/reuse.json. The bytes of the second run are compared with those of a cold one."""
import argparse, hashlib, json, os, resource, shutil, subprocess, time

p = argparse.ArgumentParser()
p.add_argument("attar"), p.add_argument("checkpoint"), p.add_argument("ids"), p.add_argument("out")
p.add_argument("--samples", type=int, default=64), p.add_argument("--context", type=int, default=512)
p.add_argument("--threads", type=int, default=1)
a = p.parse_args()
shutil.rmtree(a.out, ignore_errors=True)
os.makedirs(a.out)

def recipe(upstream, bits):
    path = f"{a.out}/{upstream}-{bits}.toml"
    open(path, "w").write(f'[[step]]\npass = "gptq"\nupstream = "{upstream}"\nscheme = {{ bits = {bits} }}\n[[emit]]\nlayout = "gptq"\n')
    return path

def run(name, upstream, bits, scratch):
    out = f"{a.out}/{name}"
    command = [a.attar, "--threads", str(a.threads), "compress", a.checkpoint, "--recipe", recipe(upstream, bits), "--ids", a.ids,
               "--samples", str(a.samples), "--context", str(a.context), "--out", out] + (["--scratch", f"{a.out}/{scratch}"] if scratch else [])
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.time() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    report = json.load(open(f"{out}/report.json"))
    digest = hashlib.sha256(open(f"{out}/model.safetensors", "rb").read()).hexdigest()
    shutil.rmtree(out)
    return {"run": name, "wall_s": round(wall, 2), "cpu_s": round(cpu, 2), "reused": report["reused"], "sha256": digest[:16],
            "peak_mb": round(report["measured_peak_bytes"] / 1e6, 1)}

rows = []
for upstream in ["original", "compressed"]:
    first = run(f"{upstream}, 4 bits, first run", upstream, 4, upstream)
    again = run(f"{upstream}, 4 bits, unchanged", upstream, 4, upstream)
    other = run(f"{upstream}, 3 bits, after 4", upstream, 3, upstream)
    cold = run(f"{upstream}, 3 bits, cold", upstream, 3, None)
    assert again["sha256"] == first["sha256"] and cold["sha256"] == other["sha256"], "other bytes"
    for row, base in [(first, first), (again, first), (other, cold), (cold, cold)]:
        row["share_of_wall"] = round(row["wall_s"] / base["wall_s"], 3)
        row["share_of_cpu"] = round(row["cpu_s"] / base["cpu_s"], 3)
        rows.append(row)
    size = sum(os.path.getsize(os.path.join(d, f)) for d, _, fs in os.walk(f"{a.out}/{upstream}") for f in fs)
    print(f"{upstream}: work directory {size / 1e6:.1f} MB")
    shutil.rmtree(f"{a.out}/{upstream}")
print("| run | wall s | CPU s | share of wall | share of CPU | results reused |\n|---|---|---|---|---|---|")
for r in rows:
    print(f"| {r['run']} | {r['wall_s']} | {r['cpu_s']} | {r['share_of_wall']} | {r['share_of_cpu']} | {r['reused'][0]} of {r['reused'][1]} |")
json.dump({"command": " ".join(os.sys.argv), "rows": rows}, open(f"{a.out}/reuse.json", "w"), indent=1)
