#!/usr/bin/env python3
"""side_by_side.py --attar BINARY --peer-python PYTHON --model DIR --ids FILE.jsonl [--what gptq,awq,rtn] [--threads 1] [--cores 0] [--results DIR]

Attar and llm-compressor on the same model, the same token ids, the same cores and thread count, one after the other: wall time, CPU
time, peak resident memory (mapped files included), the f32 GEMM ceiling of the machine in the same run, and the floor that the ceiling
sets for GPTQ. Writes <results>/<date>-<cpu>/side_by_side.json and .md (bench/results by default). Needs only the standard library
here; PYTHON is the interpreter of an environment with llm-compressor (versions are recorded).

gptq  both with all samples.
awq   Attar with all samples; llm-compressor with 2 and 4, extrapolated linearly (its time is linear in samples; 64 take about 46 minutes).
rtn   Attar only, page cache warmed, `--repeat` times: MB of checkpoint per CPU second; llm-compressor once, for reference.
--attar-only NAME.json reuses the peer's rows of an earlier run on the same machine.
"""
import argparse, datetime, json, os, platform, re, shutil, subprocess, sys, tempfile, threading, time
from pathlib import Path

HERE = Path(__file__).resolve().parent

def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--attar", required=True); p.add_argument("--peer-python"); p.add_argument("--model", required=True); p.add_argument("--ids", required=True)
    p.add_argument("--what", default="gptq,awq,rtn"); p.add_argument("--samples", type=int, default=64); p.add_argument("--context", type=int, default=512)
    p.add_argument("--threads", type=int, default=1); p.add_argument("--cores", default="0"); p.add_argument("--repeat", type=int, default=3)
    p.add_argument("--results", default=str(HERE / "results")); p.add_argument("--attar-only", metavar="EARLIER.json")
    p.add_argument("--work", help="folder for artifacts and logs (default: a temporary one)"); p.add_argument("--timeout", type=float, default=1800)
    return p.parse_args()

def measure(command, a, log):
    """Runs a command on the given cores; wall and CPU seconds, and the peak resident memory that the kernel recorded for it."""
    env = dict(os.environ, **{k: str(a.threads) for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")}, CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
    cores = {int(c) for c in a.cores.split(",")}
    t = time.monotonic()
    with open(log, "wb") as f:
        child = subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT, env=env, preexec_fn=lambda: os.sched_setaffinity(0, cores))
        killer = threading.Timer(a.timeout, child.kill); killer.start()
        _, status, use = os.wait4(child.pid, 0); killer.cancel()
    child.returncode = os.waitstatus_to_exitcode(status)
    return dict(wall_s=round(time.monotonic() - t, 2), cpu_s=round(use.ru_utime + use.ru_stime, 2), peak_mb=round(use.ru_maxrss * 1024 / 1e6, 1), exit=child.returncode)

def folder_bytes(d): return sum(f.stat().st_size for f in Path(d).rglob("*.safetensors"))

def tail_json(log):
    """The last JSON object a tool printed, or the line after PHASES."""
    text = Path(log).read_text(errors="replace")
    m = re.findall(r"^PHASES (\{.*\})$", text, re.M)
    if m: return json.loads(m[-1])
    for start in [i for i in range(len(text)) if text.startswith("{", i) and (i == 0 or text[i - 1] == "\n")]:
        try: return json.JSONDecoder().raw_decode(text[start:])[0]
        except ValueError: pass
    return None

def work(model, tokens, context):
    """FLOPs that GPTQ cannot avoid: one forward through the block linears, causal attention, one symmetric update per distinct input."""
    c = json.loads((Path(model) / "config.json").read_text())
    h, i, layers, heads = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"], c["num_attention_heads"]
    kv, d = c.get("num_key_value_heads", heads), c.get("head_dim") or h // heads
    linear = layers * (h * d * (2 * heads + 2 * kv) + 3 * h * i)
    return dict(forward=2 * linear * tokens, attention=layers * tokens * 2 * heads * d * (context + 1), hessian=layers * tokens * (2 * h * h + (heads * d) ** 2 + i * i))

def largest_tensor(model):
    best = 0
    for f in Path(model).glob("*.safetensors"):
        with open(f, "rb") as s: head = json.loads(s.read(int.from_bytes(s.read(8), "little")))
        best = max([best] + [v["data_offsets"][1] - v["data_offsets"][0] for k, v in head.items() if k != "__metadata__"])
    return best

def cpu_name():
    for line in open("/proc/cpuinfo"):
        if line.startswith("model name"): return line.split(":", 1)[1].strip()
    return platform.processor()

def main():
    a = arguments(); what = a.what.split(","); scratch = Path(a.work or tempfile.mkdtemp(prefix="attar-bench-")); scratch.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(Path(a.attar_only).read_text()) if a.attar_only else None
    if not earlier and not a.peer_python: sys.exit("--peer-python or --attar-only is needed")
    out = dict(date=datetime.date.today().isoformat(), cpu=cpu_name(), cores=a.cores, threads=a.threads, samples=a.samples, context=a.context, load_before=os.getloadavg(),
               attar=subprocess.run([a.attar, "--version"], capture_output=True, text=True).stdout.strip(), model_bytes=folder_bytes(a.model), largest_tensor=largest_tensor(a.model), rows=[])
    tokens = a.samples * a.context; out["flops"] = work(a.model, tokens, a.context)

    def attar(tag, preset, *extra):
        d = scratch / tag; shutil.rmtree(d, ignore_errors=True); log = scratch / f"{tag}.log"
        calib = [] if preset.startswith("rtn") else ["--ids", a.ids, "--samples", str(a.samples), "--context", str(a.context)]
        r = measure([a.attar, "compress", a.model, "--preset", preset, *calib, "--threads", str(a.threads), "--json", "--out", str(d), *extra], a, log)
        report = tail_json(log); r.update(tool="attar", algorithm=preset.split("-")[0], samples=0 if preset.startswith("rtn") else a.samples, artifact_mb=round(folder_bytes(d) / 1e6, 1) if d.exists() else None,
                                          phases=report["artifacts"][0]["report"]["timings"] if isinstance(report, dict) and report.get("artifacts") else None)
        out["rows"].append(r); print(json.dumps(r), flush=True); return r

    def peer(algorithm, samples):
        if earlier:
            r = next(x for x in earlier["rows"] if (x["tool"], x["algorithm"], x["samples"]) == ("llm-compressor", algorithm, samples)); r["reused"] = True
        else:
            d = scratch / f"peer-{algorithm}-{samples}"; shutil.rmtree(d, ignore_errors=True); log = scratch / f"peer-{algorithm}-{samples}.log"
            r = measure([a.peer_python, str(HERE / "peer_llmc.py"), a.model, a.ids, str(d), "--algorithm", algorithm, "--samples", str(samples), "--context", str(a.context), "--threads", str(a.threads)], a, log)
            r.update(tool="llm-compressor", algorithm=algorithm, samples=samples, phases=tail_json(log), artifact_mb=round(folder_bytes(d) / 1e6, 1) if d.exists() else None)
        out["rows"].append(r); print(json.dumps(r), flush=True); return r

    def ceiling():
        if not a.peer_python: return None
        r = subprocess.run(["taskset", "-c", a.cores, a.peer_python, str(HERE / "gemm_ceiling.py"), str(a.threads)], capture_output=True, text=True)
        c = json.loads(r.stdout.strip().splitlines()[-1]); print(json.dumps(dict(gemm_gflops=c)), flush=True); return c

    rates = [ceiling()]; checks = []
    def bound(name, value, limit, at_most=True):
        checks.append(dict(name=name, value=round(value, 3), limit=round(limit, 3), passed=bool(value <= limit if at_most else value >= limit)))
    if "gptq" in what:
        ours, theirs = attar("attar-gptq", "gptq-w4"), peer("gptq", a.samples)
        bound("gptq: wall, share of llm-compressor", ours["wall_s"] / theirs["wall_s"], 0.5); bound("gptq: peak memory, share of llm-compressor", ours["peak_mb"] / theirs["peak_mb"], 0.25)
        rates.append(ceiling())
    if "awq" in what:
        ours = attar("attar-awq", "awq-w4"); two, four = peer("awq", 2), peer("awq", 4)
        full = two["wall_s"] + (four["wall_s"] - two["wall_s"]) / 2 * (a.samples - 2)
        out["rows"].append(dict(tool="llm-compressor", algorithm="awq", samples=a.samples, wall_s=round(full, 1), extrapolated=True)); bound("awq: wall, share of llm-compressor (extrapolated)", ours["wall_s"] / full, 0.2)
    if "rtn" in what:
        for f in Path(a.model).glob("*.safetensors"): f.read_bytes()
        runs = [attar("attar-rtn", "rtn-w4") for _ in range(a.repeat)]; peer("rtn", 0)
        best = min(r["cpu_s"] for r in runs)
        bound("rtn: MB of checkpoint per CPU second", out["model_bytes"] / 1e6 / best, 300, at_most=False)
        bound("rtn: peak MB", max(r["peak_mb"] for r in runs), 2 * out["largest_tensor"] / 1e6 + 200)
    rates = [r for r in rates if r]; out["gemm_gflops"] = rates
    if rates and "gptq" in what:
        rate = max(max(r["numpy"], r["torch"]) for r in rates); floor = sum(out["flops"].values()) / 1e9 / rate
        out["floor_s"] = round(floor, 1); ours = next(r for r in out["rows"] if r["tool"] == "attar" and r["algorithm"] == "gptq"); bound("gptq: wall over the floor", ours["wall_s"] / floor, 1.5)
        out["cpu_over_floor"] = round(ours["cpu_s"] / a.threads / floor, 3)
    out.update(checks=checks, load_after=os.getloadavg())
    if a.peer_python:
        v = "import importlib.metadata as m, json; print(json.dumps({k: m.version(k) for k in ('llmcompressor', 'compressed-tensors', 'torch', 'transformers', 'numpy')}))"
        out["versions"] = json.loads(subprocess.run([a.peer_python, "-c", v], capture_output=True, text=True).stdout or "{}")
    slug = re.sub(r"[^a-z0-9]+", "-", out["cpu"].lower()).strip("-")[:40]; folder = Path(a.results) / f"{out['date']}-{slug}"; folder.mkdir(parents=True, exist_ok=True)
    (folder / "side_by_side.json").write_text(json.dumps(out, indent=1) + "\n")
    md = [f"# Attar beside llm-compressor, {out['date']}", "", f"{out['cpu']}, cores {a.cores}, {a.threads} thread(s); {a.samples} x {a.context} calibration tokens; checkpoint {out['model_bytes'] / 1e6:.0f} MB. "
          f"Load average before {out['load_before'][0]:.2f}, after {out['load_after'][0]:.2f}. {out['attar']}; {out.get('versions', 'peer rows reused')}.", "",
          "| tool | algorithm | samples | wall s | CPU s | peak MB | artifact MB | phases (s) |", "|---|---|---|---|---|---|---|---|"]
    for r in out["rows"]:
        ph = ", ".join(f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in (r.get("phases") or {}).items()) + (" extrapolated" if r.get("extrapolated") else "")
        md.append(f"| {r['tool']} | {r['algorithm']} | {r['samples']} | {r['wall_s']} | {r.get('cpu_s', '')} | {r.get('peak_mb', '')} | {r.get('artifact_mb') or ''} | {ph} |")
    f = out["flops"]; md += ["", f"Necessary work for GPTQ: forward {f['forward'] / 1e12:.2f} + attention {f['attention'] / 1e12:.2f} + Hessians {f['hessian'] / 1e12:.2f} TFLOP; "
                             f"GEMM ceiling (GFLOP/s, f32): {rates}; floor {out.get('floor_s', 'not measured')} s (CPU time over the floor: {out.get('cpu_over_floor', '')}).", "", "| bound | measured | limit | |", "|---|---|---|---|"]
    md += [f"| {c['name']} | {c['value']} | {c['limit']} | {'met' if c['passed'] else 'MISSED'} |" for c in checks]
    (folder / "side_by_side.md").write_text("\n".join(md) + "\n"); print("\n".join(md)); print(f"written: {folder}")
    return 0 if all(c["passed"] for c in checks) and all(r.get("exit", 0) == 0 for r in out["rows"]) else 1

if __name__ == "__main__": sys.exit(main())
