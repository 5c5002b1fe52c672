#!/usr/bin/env python3
"""gguf_accuracy.py --attar BINARY --llama BIN_DIR --f32 MODEL.gguf --model DIR --calib FILE --text FILE [--context 256] [--types ...]

Mean KL divergence (original || quantized, nats), perplexity and top-1 agreement of Attar's GGUF files against those of llama-quantize with
llama-imatrix, from the same calibration text, the same type for every tensor (checked). Both files are read by the `gguf` package, dequantized
by it, and run in transformers, f32, on windows of --context tokens of the whole text that do not overlap; every position but the last
predicts. Differences are paired by window: mean and 95 % interval (bootstrap over windows, 10000 draws, seeded).
BIN_DIR has llama-imatrix and llama-quantize; MODEL.gguf is the model in F32 as convert_hf_to_gguf.py writes it.
Exit 1 when a type of --must is not at least 10 % lower with an interval below zero.
"""
import argparse, datetime, json, math, os, subprocess, sys, tempfile
from pathlib import Path
import numpy as np, torch
from gguf import GGUFReader, quants
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name in ("attar", "llama", "f32", "model", "calib", "text"): p.add_argument(f"--{name}", required=True)
p.add_argument("--context", type=int, default=256); p.add_argument("--samples", type=int, default=1000000); p.add_argument("--types", default="Q2_K,Q3_K_M,Q4_K_M,IQ4_XS"); p.add_argument("--methods", default="rtn,imatrix,gptq")
p.add_argument("--max-windows", type=int); p.add_argument("--threads", type=int, default=1); p.add_argument("--work"); p.add_argument("--results"); a = p.parse_args()
torch.set_num_threads(a.threads); torch.set_grad_enabled(False)
work = Path(a.work or tempfile.mkdtemp(prefix="attar-gguf-")); work.mkdir(parents=True, exist_ok=True)

def run(command, log):
    with open(work / log, "w") as f: rc = subprocess.run([str(c) for c in command], stdout=f, stderr=subprocess.STDOUT).returncode
    if rc: sys.exit(f"exit {rc}: {' '.join(map(str, command))}; see {work / log}")

NAMES = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
config = AutoConfig.from_pretrained(a.model); tokenizer = AutoTokenizer.from_pretrained(a.model)

def load(path):
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32).eval()
    if path is None: return model, {}
    state, types = {}, {}
    for t in GGUFReader(path).tensors:
        w = torch.from_numpy(np.array(quants.dequantize(t.data, t.tensor_type), dtype=np.float32)).reshape([int(n) for n in reversed(t.shape)]); parts = t.name.split(".")
        if parts[0] == "blk":
            kind = parts[2]; name = f"model.layers.{parts[1]}.{NAMES[kind]}.weight"
            if kind in ("attn_q", "attn_k"):
                heads = config.num_attention_heads if kind == "attn_q" else config.num_key_value_heads
                w = w.reshape(heads, w.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(w.shape)
        else: name = {"token_embd": "model.embed_tokens.weight", "output": "lm_head.weight", "output_norm": "model.norm.weight"}[parts[0]]
        state[name] = w; types[t.name] = t.tensor_type.name
    missing, extra = model.load_state_dict(state, strict=False)
    if extra or set(missing) - {"lm_head.weight"}: sys.exit(f"{path}: missing {missing}, unknown {extra}")
    model.tie_weights() if "lm_head.weight" not in state else None
    return model, types

ids = tokenizer(open(a.text, encoding="utf-8").read(), add_special_tokens=False)["input_ids"]
n = min(len(ids) // a.context, a.max_windows or len(ids)); windows = torch.tensor(ids[: n * a.context]).reshape(n, a.context)
original = load(None)[0]; BATCH = 8

def judge(path):
    model, types = load(path); kl, nll, same, base = [], [], [], []
    for i in range(0, n, BATCH):
        w = windows[i : i + BATCH]; q = torch.log_softmax(model(w).logits[:, :-1], -1); r = torch.log_softmax(original(w).logits[:, :-1], -1); t = w[:, 1:, None]
        kl.append((r.exp() * (r - q)).sum(-1).double().mean(1)); nll.append(-q.gather(2, t)[..., 0].double().mean(1)); base.append(-r.gather(2, t)[..., 0].double().mean(1)); same.append((r.argmax(-1) == q.argmax(-1)).double().mean(1))
    kl, nll, same, base = map(torch.cat, (kl, nll, same, base))
    return dict(kl=kl.numpy(), kl_mean=kl.mean().item(), perplexity=math.exp(nll.mean().item()), top1=same.mean().item(), original=math.exp(base.mean().item()), bytes=os.path.getsize(path)), types

if not (work / "imatrix.gguf").exists():
    run([Path(a.llama) / "llama-imatrix", "-m", a.f32, "-f", a.calib, "-o", work / "imatrix.gguf", "-c", a.context, "-b", a.context, "-ub", a.context, "-t", 1, "-ngl", 0], "imatrix.log")
rows, rng = [], np.random.default_rng(0)
for name in a.types.split(","):
    theirs = work / f"{name}.gguf"
    if not theirs.exists(): run([Path(a.llama) / "llama-quantize", "--imatrix", work / "imatrix.gguf", a.f32, theirs, name, 1], f"{name}.log")
    peer, types = judge(theirs); rows.append(dict(type=name, tool="llama-quantize, imatrix", **{k: v for k, v in peer.items() if k != "kl"})); print(json.dumps(rows[-1]), flush=True)
    for method in a.methods.split(","):
        ours = work / f"attar-{method}-{name}"
        if not ours.exists():
            calib = [] if method == "rtn" else ["--text", a.calib, "--samples", a.samples, "--context", a.context]
            run([a.attar, "compress", a.model, "--preset", f"{method}-{name.lower()}", *calib, "--out", ours], f"attar-{method}-{name}.log")
        own, own_types = judge(next(ours.glob("*.gguf")))
        if method != "rtn" and own_types != types: sys.exit(f"{name} {method}: types differ: {sorted(set(types.items()) ^ set(own_types.items()))}")
        d = own["kl"] - peer["kl"]; draws = d[rng.integers(0, n, (10000, n))].mean(1); low, high = np.quantile(draws, [0.025, 0.975])
        rows.append(dict(type=name, tool=f"attar {method}", **{k: v for k, v in own.items() if k != "kl"}, ratio=own["kl_mean"] / peer["kl_mean"], difference=float(d.mean()), low=float(low), high=float(high))); print(json.dumps(rows[-1]), flush=True)

ok = all(r["ratio"] <= 0.9 and r["high"] < 0 for r in rows if r["tool"] == "attar gptq")
md = [f"# GGUF on {Path(a.model).name}, {datetime.date.today()}", "", f"Calibrated on {Path(a.calib).name}; judged on {n} windows of {a.context} tokens ({n * (a.context - 1)} predictions) of {Path(a.text).name} in transformers, f32, from what the gguf package "
      f"dequantizes. The original's perplexity is {rows[0]['original']:.4f}. KL in nats; the difference from llama-quantize is paired by window, 95 % bootstrap interval. Both tools store every tensor in the same type.", "",
      "| type | tool | bytes | perplexity | top-1 | KL | KL / peer's | difference [95 %] |", "|---|---|---|---|---|---|---|---|"]
for r in rows:
    tail = f"{r['ratio']:.3f} | {r['difference']:.5f} [{r['low']:.5f}, {r['high']:.5f}]" if "ratio" in r else "1 | -"
    md.append(f"| {r['type']} | {r['tool']} | {r['bytes']} | {r['perplexity']:.4f} | {100 * r['top1']:.2f} % | {r['kl_mean']:.5f} | {tail} |")
md += ["", f"gptq at least 10 % below llama-quantize with its importance matrix, intervals below zero: {'holds for every type' if ok else 'FAILS'}."]
folder = Path(a.results or Path(__file__).resolve().parent / "results"); folder.mkdir(parents=True, exist_ok=True); name = Path(a.model).name
(folder / f"gguf-{name}.md").write_text("\n".join(md) + "\n"); (folder / f"gguf-{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
print("\n".join(md)); sys.exit(0 if ok else 1)
