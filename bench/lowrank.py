#!/usr/bin/env python3
"""lowrank.py --attar BINARY --model DIR --calib FILE --text FILE [--context 256] [--samples 128] [--max-windows N] [--work DIR] [--results DIR] [--peer-python PYTHON]

Low rank on one trained model: factored linears at 20 % and 40 % of the linear parameters removed, factors quantized, and corrections of
3-bit codes beside plain schemes of about the same bytes. Every row is one recipe, compressed and measured by `attar eval` on the held-out
text (perplexity, KL divergence original || compressed in nats). With --peer-python (an interpreter that has tests/interop's requirements
and peft) transformers loads every artifact (factored ones through modeling_attar.py, corrections through PEFT) and its logits of the first
window are compared with Attar's: relative error ||attar - client|| / ||client||, at most 1e-3. Exit 1 when a claim of the table fails.
"""
import argparse, datetime, json, platform, re, shutil, subprocess, sys, tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--attar", required=True); p.add_argument("--model", required=True); p.add_argument("--calib", required=True); p.add_argument("--text", required=True)
p.add_argument("--context", type=int, default=256); p.add_argument("--samples", type=int, default=128); p.add_argument("--max-windows", type=int)
p.add_argument("--work"); p.add_argument("--results"); p.add_argument("--peer-python"); p.add_argument("--only", help="regular expression: rows to make; no claim is judged"); a = p.parse_args()
work = Path(a.work or tempfile.mkdtemp(prefix="attar-lowrank-")); work.mkdir(parents=True, exist_ok=True); model = Path(a.model)

def step(name, **options): return f'[[step]]\npass = "{name}"\n' + "".join(f"{k} = {json.dumps(v)}\n" for k, v in options.items())
def gptq(bits, group, name="gptq"): return step(name) + f"scheme = {{ bits = {bits}, group_size = {group} }}\n"
dense = '[[emit]]\nlayout = "dense"\n'; W3 = gptq(3, 128)
RECIPES = []
for ratio in (0.2, 0.4):
    name = lambda text: f"{text}, {ratio:.0%} removed"
    RECIPES += [
        (name("svd"), step("svd", ratio=ratio) + dense),
        (name("asvd"), step("asvd", ratio=ratio) + dense),
        (name("fwsvd"), step("fwsvd", ratio=ratio) + dense),
        (name("fwsvd of outputs"), step("fwsvd", ratio=ratio, of="outputs") + dense),
        (name("fwsvd of both"), step("fwsvd", ratio=ratio, of="both") + dense),
        (name("fwsvd of both, one budget"), step("fwsvd", ratio=ratio, of="both", share="model") + dense),
        (name("fwsvd, one budget"), step("fwsvd", ratio=ratio, share="model") + dense),
        (name("svd_llm"), step("svd_llm", ratio=ratio) + dense),
        (name("svd_llm, compressed upstream"), step("svd_llm", ratio=ratio, upstream="compressed") + dense),
        (name("svd_llm, svd_update"), step("svd_llm", ratio=ratio) + step("svd_update") + dense),
        (name("svd, svd_update"), step("svd", ratio=ratio) + step("svd_update") + dense),
        (name("svd, one budget"), step("svd", ratio=ratio, share="model") + dense),
        (name("asvd, one budget"), step("asvd", ratio=ratio, share="model") + dense),
        (name("svd_llm, one budget"), step("svd_llm", ratio=ratio, share="model") + dense),
        (name("svd_llm, one budget, randomized"), step("svd_llm", ratio=ratio, share="model", solver="randomized") + dense),
    ]
RECIPES += [
    ("svd_llm one budget 20 %, gptq w4 g16 on the factors", step("svd_llm", ratio=0.2, share="model", multiple_of=16) + gptq(4, 16)),
    ("svd_llm one budget 20 %, rtn w4 g16 on the factors", step("svd_llm", ratio=0.2, share="model", multiple_of=16) + gptq(4, 16, "rtn")),
    ("svd_llm one budget 20 %, gptq w8 g16 on the factors", step("svd_llm", ratio=0.2, share="model", multiple_of=16) + gptq(8, 16)),
    *[(f"gptq w{b} g{g}", gptq(b, g)) for b, g in ((3, 128), (3, 64), (3, 32), (3, 16), (4, 128), (4, 32))],
    *[(f"gptq w3 g128, eora rank {r}", W3 + step("eora", rank=r)) for r in (2, 4, 8, 16)],
    ("gptq w3 g128, eora rank 8, randomized", W3 + step("eora", rank=8, solver="randomized")),
    ("gptq w3 g128, lorc rank 8", W3 + step("lorc", rank=8)),
    ("rtn w3 g128", gptq(3, 128, "rtn")),
    ("rtn w3 g128, eora rank 8", gptq(3, 128, "rtn") + step("eora", rank=8)),
    ("rtn w3 g128, lorc rank 8", gptq(3, 128, "rtn") + step("lorc", rank=8)),
    ("awq, gptq w3 g128, eora rank 8", step("awq") + W3 + step("eora", rank=8)),
]

def run(*command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode: sys.exit(f"exit {done.returncode}: {' '.join(map(str, command))}\n{done.stderr}")
    return done.stdout

measure = ["--text", a.text, "--context", a.context, "--json"] + (["--max-windows", a.max_windows] if a.max_windows else [])
base = json.loads(run(a.attar, "eval", a.model, *measure)); rows, checks = [], []
print(f"original: perplexity {base['perplexity']:.3f}", flush=True)
for number, (name, recipe) in enumerate(RECIPES):
    if a.only and not re.search(a.only, name): continue
    file, out, dump = work / f"{number}.toml", work / f"{number}", work / f"{number}.safetensors"; file.write_text(recipe)
    if out.exists(): shutil.rmtree(out)
    run(a.attar, "compress", a.model, "--recipe", file, "--text", a.calib, "--context", a.context, "--samples", a.samples, "--out", out)
    run(a.attar, "verify", out, "--source", a.model)
    found = json.loads(run(a.attar, "eval", out, *measure, "--reference", a.model, "--dump-logits", dump)); report = json.loads((out / "report.json").read_text())
    row = dict(recipe=name, perplexity=found["perplexity"], kl_mean=found["kl_mean"], top1_agreement=found["top1_agreement"], bytes=found["file_bytes"], bits_per_weight=report["bits_per_weight"],
               seconds=report["timings"]["total"])
    if a.peer_python:
        checks.append((len(rows), f"check_logits {out} {dump} --text {a.text}"))
    rows.append(row); print(json.dumps(row), flush=True)
if checks:  # importing torch costs most of the time: one process
    done = subprocess.run([a.peer_python, HERE.parent / "tests/interop/check_all.py"], input="\n".join(c for _, c in checks), capture_output=True, text=True)
    lines = [json.loads(l) for l in done.stdout.splitlines() if l.startswith('{"check"')]
    if len(lines) != len(checks): sys.exit(f"the client failed\n{done.stderr}")
    for (at, _), line in zip(checks, lines): rows[at]["client"] = line.get("relative_error", float("nan"))

by = {r["recipe"]: r for r in rows}; claims = []
def claim(text, x, y): claims.append((text, x, y, x <= y))
if not a.only:
    for ratio in ("20%", "40%"):
        ppl = lambda name: by[f"{name}, {ratio} removed"]["perplexity"]
        claim(f"asvd below svd, {ratio} removed: perplexity", ppl("asvd"), ppl("svd")); claim(f"svd_llm below asvd, {ratio} removed: perplexity", ppl("svd_llm"), ppl("asvd"))
        claim(f"fwsvd below svd, {ratio} removed: perplexity", ppl("fwsvd"), ppl("svd"))
        claim(f"one budget below a ratio for each, {ratio} removed: perplexity", ppl("svd_llm, one budget"), ppl("svd_llm"))
    kl = lambda name: by[name]["kl_mean"]
    claim("eora rank 16 at least 15 % below w3 alone: KL", kl("gptq w3 g128, eora rank 16"), 0.85 * kl("gptq w3 g128"))
    claim("eora below lorc at rank 8, gptq: KL", kl("gptq w3 g128, eora rank 8"), kl("gptq w3 g128, lorc rank 8")); claim("eora below lorc at rank 8, rtn: KL", kl("rtn w3 g128, eora rank 8"), kl("rtn w3 g128, lorc rank 8"))
    claim("gptq below rtn on factors: KL", kl("svd_llm one budget 20 %, gptq w4 g16 on the factors"), kl("svd_llm one budget 20 %, rtn w4 g16 on the factors"))
if a.peer_python: claim("relative error of the client's logits", max(r["client"] for r in rows), 1e-3)
cpu = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), platform.processor())
table = ["| recipe | bits per weight | bytes | perplexity | KL, nats | top-1 | client's logits |", "|---|---|---|---|---|---|---|", f"| original | - | {base['file_bytes']} | {base['perplexity']:.3f} | 0 | 1 | - |"]
for r in rows:
    table.append(f"| {r['recipe']} | {r['bits_per_weight']:.3f} | {r['bytes']} | {r['perplexity']:.3f} | {r['kl_mean']:.4f} | {r['top1_agreement']:.4f} | {format(r['client'], '.1e') if 'client' in r else '-'} |")
text = f"""# Low rank, {model.name}

{datetime.date.today()}, {cpu}. Calibration: {a.samples} windows of {a.context} of {Path(a.calib).name}; measured on {base['tokens'] if 'tokens' in base else 'all'} tokens of {Path(a.text).name}, context {a.context}.
`python3 bench/lowrank.py --attar BINARY --model DIR --calib {Path(a.calib).name} --text {Path(a.text).name} --context {a.context} --samples {a.samples}{f' --max-windows {a.max_windows}' if a.max_windows else ''} --peer-python PYTHON`

""" + "\n".join(table) + "\n\n| claim | value | at most | |\n|---|---|---|---|\n" + "".join(f"| {c[0]} | {c[1]:.4g} | {c[2]:.4g} | {'holds' if c[3] else 'FAILS'} |\n" for c in claims)
print(text)
if a.results:
    folder = Path(a.results); folder.mkdir(parents=True, exist_ok=True)
    (folder / f"lowrank-{model.name}.md").write_text(text); (folder / f"lowrank-{model.name}.json").write_text(json.dumps(dict(original=base, rows=rows, claims=claims), indent=1) + "\n")
sys.exit(0 if all(c[3] for c in claims) else 1)
