#!/usr/bin/env python3
"""structured.py --attar BINARY --model DIR --calib FILE --text FILE [--context 256] [--samples 128] [--work DIR] [--results DIR] [--peer-python PYTHON] [--only PART]

Structured pruning and rotations on one trained model: every row is one recipe, compressed and measured by `attar eval` on the
held-out text (perplexity, KL divergence original || compressed in nats). With --peer-python (the interpreter of the interop
environment) stock transformers loads every dense artifact and its logits of the first window are compared with Attar's:
relative error ||attar - client|| / ||client||; exit 1 above 1e-3.
"""
import argparse, datetime, json, os, platform, subprocess, sys, tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--attar", required=True); p.add_argument("--model", required=True); p.add_argument("--calib", required=True); p.add_argument("--text", required=True)
p.add_argument("--context", type=int, default=256); p.add_argument("--samples", type=int, default=128)
p.add_argument("--work"); p.add_argument("--results"); p.add_argument("--peer-python"); p.add_argument("--only", action="append", help="rows whose name holds it; the others stay as they are in --results"); a = p.parse_args()
work = Path(a.work or tempfile.mkdtemp(prefix="attar-structured-")); work.mkdir(parents=True, exist_ok=True)
model = Path(a.model); config = json.loads((model / "config.json").read_text())
hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
kv = config.get("num_key_value_heads", heads); dim = config.get("head_dim") or hidden // heads; ffn = config["intermediate_size"]

def block_weights(hidden, ffn, heads, kv): return 3 * hidden * ffn + 2 * hidden * heads * dim + 2 * hidden * kv * dim
WHOLE = layers * block_weights(hidden, ffn, heads, kv)

def step(name, **options): return f'[[step]]\npass = "{name}"\n' + "".join(f"{k} = {json.dumps(v)}\n" for k, v in options.items())
def scheme(bits, group): return f"scheme = {{ bits = {bits}, group_size = {group} }}\n"
fraction = 0.25; groups = 1 - 1 / kv if kv > 1 else 0
RECIPES = [
    ("depth, 1 block, influence", step("prune_depth", blocks=1)),
    ("depth, 1 block, loss", step("prune_depth", blocks=1, by="loss")),
    *[(f"ffn 0.25, {i}, {'update' if u else 'no update'}", step("prune_ffn", ratio=fraction, importance=i, update=u)) for i in ("output", "activation", "magnitude", "taylor", "taylor_elements") for u in (True, False)],
    *[(f"kv groups {groups:.2f}, {i}, {'update' if u else 'no update'}", step("prune_kv_groups", ratio=groups, importance=i, update=u)) for i in ("output", "activation", "magnitude", "taylor", "taylor_elements") for u in (True, False)],
    *[(f"query heads 0.5, {i}, {'update' if u else 'no update'}", step("prune_heads", ratio=0.5, importance=i, update=u)) for i in ("output", "activation", "magnitude", "taylor", "taylor_elements") for u in (True, False)],
    *[(f"hidden 0.125, {i}", step("prune_hidden", ratio=0.125, importance=i, multiple_of=16)) for i in ("activation", "taylor")],
    ("hidden 0.25, activation", step("prune_hidden", ratio=0.25, multiple_of=16)),
    *[(f"{kind}, hidden {ratio}", step("rotate", kind=kind, values=False) + step("prune_hidden", ratio=ratio, multiple_of=16)) for kind, ratio in (("pca", 0.125), ("pca", 0.25), ("hadamard", 0.25))],
    ("rotate", step("rotate")),
    ("gptq w3 g128", step("gptq") + scheme(3, 128)),
    ("rotate, gptq w3 g128", step("rotate") + step("gptq") + scheme(3, 128)),
    ("gptq w3 per channel", step("gptq") + scheme(3, -1)),
    ("rotate, gptq w3 per channel", step("rotate") + step("gptq") + scheme(3, -1)),
    ("gptq w4 per channel", step("gptq") + scheme(4, -1)),
    ("rotate, gptq w4 per channel", step("rotate") + step("gptq") + scheme(4, -1)),
    ("rtn w3 per channel", step("rtn") + scheme(3, -1)),
    ("rotate, rtn w3 per channel", step("rotate") + step("rtn") + scheme(3, -1)),
    ("ffn 0.25, gptq w4 g64", step("prune_ffn", ratio=fraction) + step("gptq") + scheme(4, 64)),
]

def run(*command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode: sys.exit(f"exit {done.returncode}: {' '.join(map(str, command))}\n{done.stderr}")
    return done.stdout

measure = ["--text", a.text, "--context", a.context, "--json"]
base = json.loads(run(a.attar, "eval", a.model, *measure)); rows, worst = [], 0.0
print(f"original: perplexity {base['perplexity']:.3f}", flush=True)
for number, (name, recipe) in enumerate(RECIPES):
    if a.only and not any(part in name for part in a.only): continue
    file, out = work / f"{number}.toml", work / f"{number}"; file.write_text(recipe)
    if out.exists(): run("rm", "-r", out)
    run(a.attar, "compress", a.model, "--recipe", file, "--text", a.calib, "--context", a.context, "--samples", a.samples, "--out", out)
    dump = work / f"{number}.safetensors"
    found = json.loads(run(a.attar, "eval", out, *measure, "--reference", a.model, "--dump-logits", dump))
    report, made = json.loads((out / "report.json").read_text()), json.loads((out / "config.json").read_text())
    left = made["num_hidden_layers"] * block_weights(made["hidden_size"], made["intermediate_size"], made["num_attention_heads"], made.get("num_key_value_heads", heads))
    errors = [e["output_error"] for e in report.get("model", []) if e.get("output_error") is not None]
    row = dict(recipe=name, removed=1 - left / WHOLE, perplexity=found["perplexity"], kl_mean=found["kl_mean"], top1_agreement=found["top1_agreement"], bytes=found["file_bytes"],
               output_error=sum(errors) / len(errors) if errors else None, seconds=report["timings"]["total"])
    if a.peer_python and not made.get("quantization_config"):
        check = subprocess.run([a.peer_python, HERE.parent / "tests/interop/check_logits.py", out, dump, "--text", a.text], capture_output=True, text=True)
        line = [l for l in check.stdout.splitlines() if l.startswith("{")]
        if not line: sys.exit(f"{name}: the client failed\n{check.stderr}")
        row["transformers"] = json.loads(line[-1])["relative_error"]; worst = max(worst, row["transformers"])
    rows.append(row); print(json.dumps(row), flush=True)

if a.only and a.results:
    kept = Path(a.results) / f"structured-{model.name}.json"
    known = {r["recipe"]: r for r in json.loads(kept.read_text())["rows"]} if kept.exists() else {}
    known.update({r["recipe"]: r for r in rows})
    rows = [known[name] for name, _ in RECIPES if name in known]
cpu = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), platform.processor())
def cell(v, f): return "-" if v is None else format(v, f)
table = ["| recipe | block parameters removed | perplexity | KL, nats | top-1 | mean output error | bytes | transformers, logits |", "|---|---|---|---|---|---|---|---|",
         f"| original | 0 | {base['perplexity']:.3f} | 0 | 1 | - | {base['file_bytes']} | - |"]
for r in rows:
    table.append(f"| {r['recipe']} | {100 * r['removed']:.2f} % | {r['perplexity']:.3f} | {r['kl_mean']:.4f} | {r['top1_agreement']:.4f} | {cell(r['output_error'], '.4f')} | {r['bytes']} | {cell(r.get('transformers'), '.1e')} |")
text = f"""# Structured pruning and rotations, {model.name}

{datetime.date.today()}, {cpu}. Calibration: {a.samples} windows of {a.context} of {Path(a.calib).name}; measured on {Path(a.text).name}, context {a.context}.
`python3 bench/structured.py --attar BINARY --model DIR --calib {Path(a.calib).name} --text {Path(a.text).name} --context {a.context} --samples {a.samples} --peer-python PYTHON`

""" + "\n".join(table) + "\n"
print(text)
if a.results:
    folder = Path(a.results); folder.mkdir(parents=True, exist_ok=True)
    (folder / f"structured-{model.name}.md").write_text(text); (folder / f"structured-{model.name}.json").write_text(json.dumps(dict(original=base, rows=rows), indent=1) + "\n")
sys.exit(1 if worst > 1e-3 else 0)
