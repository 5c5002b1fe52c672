#!/usr/bin/env python3
"""Writes the tiny checkpoints of this folder and the logits transformers computes for them.

    python make_families.py [CASE ...]

Every case is a directory: config.json, *.safetensors (seeded random weights) and golden.safetensors with
`input_ids` i64 [tokens] and `logits` f32 [tokens, vocab] (eager attention, f32, one thread). For each
case the script also proves that the feature under test matters: the logits with the feature switched
off ("control") differ by more than 1 %. PROVENANCE.md is rewritten with versions and those numbers.
"""
import copy, json, os, platform, shutil, sys, tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
import safetensors, torch, transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

HERE = Path(__file__).resolve().parent
REPO = HERE.parent.parent.parent
TOKENS, VOCAB = 72, 64
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SMALL = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=False,
             bos_token_id=1, eos_token_id=2)
WIDE = dict(SMALL, head_dim=16)  # eight rotary frequencies, so that all bands of a scaled RoPE are hit

def rope(**kw): return dict(rope_parameters=kw)

# name: (config class, arguments, arguments of the control or None, classic keys in config.json?, storage)
CASES = {
    "llama-default": (LlamaConfig, dict(SMALL, **rope(rope_type="default", rope_theta=10000.0)),
                      dict(SMALL, **rope(rope_type="default", rope_theta=500.0)), False, "f32"),
    "llama-linear": (LlamaConfig, dict(WIDE, **rope(rope_type="linear", rope_theta=10000.0, factor=4.0)),
                     dict(WIDE, **rope(rope_type="default", rope_theta=10000.0)), True, "f32"),
    "llama-llama3": (LlamaConfig, dict(WIDE, **rope(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0,
                                                    high_freq_factor=4.0, original_max_position_embeddings=64)),
                     dict(WIDE, **rope(rope_type="default", rope_theta=10000.0)), True, "f32"),
    "llama-llama3-v5": (LlamaConfig, dict(WIDE, **rope(rope_type="llama3", rope_theta=500000.0, factor=4.0, low_freq_factor=1.0,
                                                       high_freq_factor=8.0, original_max_position_embeddings=256)),
                        dict(WIDE, **rope(rope_type="default", rope_theta=500000.0)), False, "f32"),
    "llama-yarn": (LlamaConfig, dict(WIDE, **rope(rope_type="yarn", rope_theta=10000.0, factor=4.0,
                                                  original_max_position_embeddings=32)),
                   dict(WIDE, **rope(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32,
                                     attention_factor=1.0)), False, "f32"),
    "llama-yarn-mscale": (LlamaConfig, dict(WIDE, **rope(rope_type="yarn", rope_theta=10000.0, factor=8.0, beta_fast=4.0, beta_slow=0.5,
                                                         mscale=1.5, mscale_all_dim=0.7, original_max_position_embeddings=64,
                                                         truncate=False)),
                          dict(WIDE, **rope(rope_type="yarn", rope_theta=10000.0, factor=8.0, original_max_position_embeddings=64)),
                          False, "f32"),
    "qwen2-yarn-attention-factor": (Qwen2Config, dict(WIDE, **rope(rope_type="yarn", rope_theta=1000000.0, factor=2.0,
                                                                   attention_factor=1.3, original_max_position_embeddings=64)),
                                    dict(WIDE, **rope(rope_type="yarn", rope_theta=1000000.0, factor=2.0,
                                                      original_max_position_embeddings=64)), True, "f32"),
    "llama-tied": (LlamaConfig, dict(SMALL, tie_word_embeddings=True, **rope(rope_type="default", rope_theta=10000.0)), None, True, "f32"),
    "llama-bias": (LlamaConfig, dict(SMALL, attention_bias=True, mlp_bias=True, **rope(rope_type="default", rope_theta=10000.0)),
                   "no-bias", False, "f32"),
    "llama-sharded-bf16": (LlamaConfig, dict(SMALL, num_hidden_layers=3, **rope(rope_type="default", rope_theta=10000.0)),
                           None, False, "bf16"),
    "mistral-sliding": (MistralConfig, dict(SMALL, sliding_window=11, **rope(rope_type="default", rope_theta=10000.0)),
                        dict(SMALL, sliding_window=12, **rope(rope_type="default", rope_theta=10000.0)), True, "f32"),
    "qwen2-bias": (Qwen2Config, dict(SMALL, use_sliding_window=False, sliding_window=16, max_window_layers=1,
                                     **rope(rope_type="default", rope_theta=1000000.0)), "no-bias", True, "f32"),
    "qwen2-sliding": (Qwen2Config, dict(SMALL, num_hidden_layers=3, use_sliding_window=True, sliding_window=9, max_window_layers=1,
                                        **rope(rope_type="default", rope_theta=10000.0)),
                      dict(SMALL, num_hidden_layers=3, use_sliding_window=True, sliding_window=9, max_window_layers=0,
                           **rope(rope_type="default", rope_theta=10000.0)), False, "f32"),
    # the same facts, but layer_types is absent from the file and must be derived from max_window_layers
    "qwen2-sliding-derived": (Qwen2Config, dict(SMALL, use_sliding_window=True, sliding_window=9, max_window_layers=1,
                                                **rope(rope_type="default", rope_theta=10000.0)),
                              dict(SMALL, use_sliding_window=False, **rope(rope_type="default", rope_theta=10000.0)), True, "f32"),
    "qwen3": (Qwen3Config, dict(SMALL, head_dim=24, num_key_value_heads=1, **rope(rope_type="default", rope_theta=10000.0)),
              "unit-qk-norm", False, "f32"),
}

def fill(model, seed):
    """Random weights: matrices N(0, 0.16), norms 1 + N(0, 0.3), biases N(0, 0.3), in the order of the parameter names."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            r = torch.randn(p.shape, generator=g, dtype=torch.float32)
            if name.endswith("bias"): p.copy_(r * 0.3)
            elif "norm" in name: p.copy_(1 + r * 0.3)
            elif "embed_tokens" in name: p.copy_(r * 0.6)
            else: p.copy_(r * 0.16)

def build(cls, args, state=None, seed=None, dtype=torch.float32):
    c = cls(**copy.deepcopy(args)); c._attn_implementation = "eager"
    m = AutoModelForCausalLM.from_config(c, attn_implementation="eager").to(dtype).eval()
    if seed is not None: fill(m, seed)
    if state is not None:
        own = m.state_dict(); m.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)
    return m

def logits(m, ids):
    with torch.no_grad(): return m(input_ids=ids[None]).logits[0]

def rel(a, b): return ((a.double() - b.double()).norm() / b.double().norm()).item()

def classic_config(path, args):
    """config.json in the words of transformers 4: rope_theta and rope_scaling at the top level, torch_dtype, no layer_types."""
    c = json.loads(path.read_text()); r = c.pop("rope_parameters"); c["rope_theta"] = r.pop("rope_theta")
    if r.get("rope_type") == "default": c["rope_scaling"] = None
    elif r["rope_type"] == "linear": r["type"] = r.pop("rope_type"); c["rope_scaling"] = r     # the oldest spelling
    else: c["rope_scaling"] = r
    # checkpoints of Qwen2 keep a window that is switched off; transformers 5 would write null
    if "sliding_window" in args: c["sliding_window"] = args["sliding_window"]
    c.pop("layer_types", None); c["torch_dtype"] = c.pop("dtype"); c["transformers_version"] = "4.46.0"
    path.write_text(json.dumps(c, indent=2, sort_keys=True) + "\n")

def load_logits(d, ids):
    m = AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32, attn_implementation="eager").eval()
    return logits(m, ids)

rows = []
wanted = sys.argv[1:] or list(CASES)
for i, (name, (cls, args, control, classic, storage)) in enumerate(CASES.items()):
    if name not in wanted: continue
    seed = 1000 + i; out = HERE / name
    if out.exists(): shutil.rmtree(out)
    model = build(cls, args, seed=seed)
    ids = torch.randint(0, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(seed + 500))
    if storage == "bf16":
        with torch.no_grad():  # .to(bfloat16) on the model itself would round its rotary frequencies too
            for p in model.parameters(): p.copy_(p.to(torch.bfloat16))
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out, max_shard_size="25KB")
        assert len(list(out.glob("model-*.safetensors"))) >= 2 and (out / "model.safetensors.index.json").exists()
    else: model.save_pretrained(out)
    (out / "generation_config.json").unlink(missing_ok=True)
    got = load_logits(out, ids)
    assert rel(got, logits(model, ids)) < 1e-6, name
    if classic:
        classic_config(out / "config.json", args)
        assert torch.equal(load_logits(out, ids), got), f"{name}: the classic keys load differently"
    f64 = rel(got, logits(build(cls, args, state={k: v.double() for k, v in model.state_dict().items()}, dtype=torch.float64), ids))
    if control is None: off = None
    else:
        state = dict(model.state_dict()); cargs = args
        if control == "no-bias": state = {k: (torch.zeros_like(v) if k.endswith("bias") else v) for k, v in state.items()}
        elif control == "unit-qk-norm": state = {k: (torch.ones_like(v) if "q_norm" in k or "k_norm" in k else v) for k, v in state.items()}
        else: cargs = control
        off = rel(logits(build(cls, cargs, state=state), ids), got); assert off > 1e-2, (name, off)
    save_file({"input_ids": ids, "logits": got.contiguous()}, out / "golden.safetensors")
    rows.append((name, "transformers 4 keys" if classic else "transformers 5 keys", storage, seed, off, f64, sum(f.stat().st_size for f in out.iterdir())))
    print(rows[-1], flush=True)

# The trained demo model: only golden logits, the checkpoint lies in tests/data.
demo = REPO / "tests/data/tinystories-656k"
if not sys.argv[1:] and demo.exists():
    from tokenizers import Tokenizer
    text = (REPO / "tests/data/tinystories_val.txt").read_text(encoding="utf-8")[:600]
    ids = torch.tensor(Tokenizer.from_file(str(demo / "tokenizer.json")).encode(text, add_special_tokens=False).ids)
    out = HERE / "tinystories-656k"; out.mkdir(exist_ok=True)
    lg = load_logits(demo, ids[:16])
    save_file({"input_ids": ids[:16].clone(), "logits": lg.contiguous()}, out / "golden.safetensors")
    (out / "tokens.json").write_text(json.dumps({"text": text, "input_ids": ids.tolist()}) + "\n")

if not sys.argv[1:]:
    lines = ["# Where these files come from", "",
             f"Written by `make_families.py` with Python {platform.python_version()}, torch {torch.__version__}, "
             f"transformers {transformers.__version__}, safetensors {safetensors.__version__}; CPU, f32, one thread, eager attention.", "",
             f"`golden.safetensors`: `input_ids` i64 [{TOKENS}] and `logits` f32 [{TOKENS}, {VOCAB}]. A sliding window of W lets position i see j with i - j < W.",
             "`off`: relative distance of the logits when the feature under test is switched off (for `mistral-sliding`: the window is one longer; "
             "`llama-yarn`: attention factor 1; `qwen2-sliding`: every layer slides), so that a reader who ignores it cannot pass at 1e-4.",
             "`f64`: distance to the same model in f64, the rounding noise of the golden logits themselves.", "",
             "| case | config.json | storage | seed | off | f64 | bytes |", "|---|---|---|---|---|---|---|"]
    for n, k, s, sd, off, f64, size in rows: lines.append(f"| {n} | {k} | {s} | {sd} | {'' if off is None else f'{off:.3f}'} | {f64:.1e} | {size} |")
    lines += ["", "`tinystories-656k`: the first 16 tokens of `tests/data/tinystories_val.txt` and their logits [16, 2048] on the demo checkpoint; "
              "`tokens.json`: the first 600 characters and their ids, no special token added."]
    (HERE / "PROVENANCE.md").write_text("\n".join(lines) + "\n")
