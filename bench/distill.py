#!/usr/bin/env python3
"""distill.py make|more|judge|all --attar BINARY --llmc PYTHON --autoround PYTHON --model DIR --ids FILE.jsonl --text FILE --work DIR
             [--context 256] [--threads 2] [--max-windows N] [--results DIR]

W2 g64, symmetric, of Attar and of its peers with the same calibration ids, and what Attar trains back behind pruning. `make` runs every tool
once, with its wall time (on an idle machine, or the times mean nothing); `more` other settings of ours, untimed; `judge` measures perplexity, mean KL divergence (original || compressed,
nats) and top-1 agreement by one judge that belongs to none of them: weights in transformers, f32 (packed ones through tests/interop's
dequantizer), on windows of --context tokens that do not overlap, every position but the last of a window predicting, no special token. Run it with
the interpreter of the interop environment. Exit 1 when a claim of the table fails.
"""
import argparse, datetime, json, math, resource, subprocess, sys, time
from pathlib import Path

HERE = Path(__file__).resolve().parent; sys.path.insert(0, str(HERE.parent / "tests" / "interop"))
p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("what", choices=["make", "more", "judge", "all"])
for name in ("attar", "llmc", "autoround", "model", "ids", "text", "work"): p.add_argument(f"--{name}", required=True)
p.add_argument("--context", type=int, default=256); p.add_argument("--threads", type=int, default=2); p.add_argument("--max-windows", type=int); p.add_argument("--results"); a = p.parse_args()
work = Path(a.work); work.mkdir(parents=True, exist_ok=True); samples = sum(1 for line in open(a.ids) if line.strip()); times = work / "times.json"

step = lambda name, *more: "\n".join(["[[step]]", f'pass = "{name}"', *more]) + "\n"
W2 = "scheme = { bits = 2, group_size = 64 }"
OURS = [("gptq", step("gptq", W2)), ("autoround", step("autoround", W2))]
MORE = [("autoround, 256 iterations", step("autoround", W2, "iterations = 256")), ("autoround, from nearest", step("autoround", W2, 'start = "nearest"')),
        ("autoround, no logits", step("autoround", W2, "logits = false")), ("autoround, codes alone", step("autoround", W2, "scale_rate = 0.0", "norm_rate = 0.0")),
        ("gptq, then reconstruct (scales, norms)", step("gptq", W2) + step("reconstruct")),
        ("sparsegpt 2:4", step("sparsegpt", 'pattern = "2:4"')), ("sparsegpt 2:4, then reconstruct", step("sparsegpt", 'pattern = "2:4"') + step("reconstruct")),
        ("wanda 2:4", step("wanda", 'pattern = "2:4"')), ("wanda 2:4, then reconstruct", step("wanda", 'pattern = "2:4"') + step("reconstruct")),
        ("wanda 2:4, then norms", step("wanda", 'pattern = "2:4"') + step("reconstruct", 'learn = "vectors"'))]
PEERS = [("llm-compressor", "gptq", [a.llmc, HERE / "peer_llmc.py", a.model, a.ids, "OUT", "--algorithm", "gptq", "--bits", 2, "--group", 64, "--samples", samples, "--context", a.context, "--threads", a.threads]),
         ("auto-round", "200 iterations", [a.autoround, HERE / "peer_autoround.py", a.model, a.ids, "OUT", "--threads", a.threads])]
tag = lambda tool, what: "".join(c if c.isalnum() else "-" for c in f"{tool}-{what}")

def ours(what, recipe, found):
    name = tag("attar", what); (work / f"{name}.toml").write_text(recipe); dense = [] if "scheme" in recipe else ["--layout", "dense"]
    found[name] = run([a.attar, "compress", a.model, "--recipe", work / f"{name}.toml", *dense, "--ids", a.ids, "--samples", samples, "--context", a.context, "--threads", a.threads, "--out", work / name], name)
    found[name]["peak_mb"] = json.loads((work / name / "report.json").read_text())["measured_peak_bytes"] / 1e6; print(name, found[name], flush=True)

def run(command, name):
    log = work / f"{name}.log"; cpu = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]); start, before = time.time(), cpu()
    with open(log, "w") as f: rc = subprocess.run([str(c) for c in command], stdout=f, stderr=subprocess.STDOUT).returncode
    if rc: sys.exit(f"exit {rc}: {' '.join(map(str, command))}; see {log}")
    return dict(wall=time.time() - start, cpu=cpu() - before, tail=log.read_text().strip().splitlines()[-1:])

def make():
    found = json.loads(times.read_text()) if times.exists() else {}
    for tool, what, command in PEERS:
        name = tag(tool, what)
        if name in found: continue
        found[name] = run([work / name if c == "OUT" else c for c in command], name); print(name, found[name], flush=True); times.write_text(json.dumps(found, indent=1) + "\n")
    for what, recipe in OURS: ours(what, recipe, found)
    times.write_text(json.dumps(found, indent=1) + "\n")

def judge():
    import torch
    from clients import load, logits, token_ids
    torch.set_num_threads(a.threads); ids = token_ids(a.model, a.text); n = min(len(ids) // a.context, a.max_windows or len(ids)); windows = [ids[i * a.context : (i + 1) * a.context] for i in range(n)]
    found, kept, rows = json.loads(times.read_text()), [], []
    def add(tool, what, directory, native):
        model, kl, nll, same = load(directory, native=native), [], [], []
        for w, r in zip(windows, kept or [None] * n):
            q = torch.log_softmax(logits(model, w)[:-1], -1)
            if tool == "original": kept.append(q)
            r = q if r is None else r
            kl.append((r.exp() * (r - q)).sum(-1).double()); nll.append(-q.gather(1, torch.tensor(w[1:])[:, None])[:, 0].double()); same.append((r.argmax(-1) == q.argmax(-1)).double())
        per = torch.stack([k.mean() for k in kl]); kl, nll, same = map(torch.cat, (kl, nll, same)); own = found.get(tag(tool, what), {})
        rows.append(dict(tool=tool, what=what, perplexity=math.exp(nll.mean().item()), kl_mean=kl.mean().item(), kl_se=(per.std() / math.sqrt(n)).item(), top1_agreement=same.mean().item(), tokens=len(nll), seconds=own.get("wall"), cpu_seconds=own.get("cpu"), peak_mb=own.get("peak_mb")))
        print(json.dumps(rows[-1]), flush=True)
    add("original", "", a.model, False)
    for tool, what, _ in PEERS:
        d = work / tag(tool, what); add(tool, what, d if (d / "config.json").exists() else next(d.iterdir()), True)
    for what, recipe in OURS + [m for m in MORE if (work / tag("attar", m[0]) / "report.json").exists()]: add("attar", what, work / tag("attar", what), "scheme" in recipe)
    by = {(r["tool"], r["what"]): r for r in rows}; checks = []
    def claim(text, x, y): checks.append((text, x, y, x <= y))
    ours, peer, gptq = by["attar", "autoround"], by["auto-round", "200 iterations"], min(by["attar", "gptq"]["kl_mean"], by["llm-compressor", "gptq"]["kl_mean"])
    claim("autoround: KL at most 0.85 of the better GPTQ's", ours["kl_mean"], 0.85 * gptq); claim("autoround: perplexity at or below auto-round's", ours["perplexity"], peer["perplexity"]); claim("autoround: KL at or below auto-round's", ours["kl_mean"], peer["kl_mean"])
    claim("autoround: seconds at most a quarter of auto-round's", ours["seconds"], peer["seconds"] / 4); claim("autoround: CPU seconds at most a quarter of auto-round's", ours["cpu_seconds"], peer["cpu_seconds"] / 4)
    for what in ("sparsegpt 2:4", "wanda 2:4"):
        if ("attar", f"{what}, then reconstruct") in by: claim(f"{what}: reconstruct lowers KL", by["attar", f"{what}, then reconstruct"]["kl_mean"], by["attar", what]["kl_mean"])
    if ("attar", "gptq, then reconstruct (scales, norms)") in by: claim("gptq: trained scales lower KL", by["attar", "gptq, then reconstruct (scales, norms)"]["kl_mean"], by["attar", "gptq"]["kl_mean"])
    name = Path(a.model).name; show = lambda v, f: "-" if v is None else format(v, f)
    md = [f"# Learned rounding and reconstruction on {name}, {datetime.date.today()}", "", f"{samples} calibration windows of {a.context} tokens, the same ids for all tools, {a.threads} threads; judged on {n} windows of {a.context} ({rows[0]['tokens']} predictions) of {Path(a.text).name} in transformers, f32. KL in nats, "
          "standard error over windows. W2 g64 symmetric unless said; head and embedding untouched. Seconds: wall time of the whole command, imports, reading, writing and (Attar) verifying included.", "", "| what | tool | perplexity | KL (se) | top-1 agreement | seconds | CPU seconds | peak MB |", "|---|---|---|---|---|---|---|---|"]
    md += [f"| {r['what'] or 'original'} | {r['tool'] if r['what'] else '-'} | {r['perplexity']:.2f} | {r['kl_mean']:.4f} ({r['kl_se']:.4f}) | {r['top1_agreement']:.3f} | {show(r['seconds'], '.1f')} | {show(r['cpu_seconds'], '.1f')} | {show(r['peak_mb'], '.0f')} |" for r in rows]
    md += ["", "| claim | Attar | against | |", "|---|---|---|---|"] + [f"| {c[0]} | {c[1]:.4f} | {c[2]:.4f} | {'holds' if c[3] else 'FAILS'} |" for c in checks]
    folder = Path(a.results or HERE / "results"); folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text("\n".join(md) + "\n"); (folder / f"{name}.json").write_text(json.dumps(dict(rows=rows, checks=checks), indent=1) + "\n")
    print("\n".join(md)); sys.exit(0 if all(c[3] for c in checks) else 1)

if a.what in ("make", "all"): make()
if a.what in ("more", "all"):
    for what, recipe in MORE: ours(what, recipe, {})
if a.what in ("judge", "all"): judge()
