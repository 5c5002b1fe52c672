#!/usr/bin/env python3
"""A checkpoint with the shapes of Llama-2-7B and random weights (seeded), for runs at scale.
usage: make_7b.py OUT [blocks=4]      needs numpy; writes bf16 shards of about 2 GB and random calibration ids."""
import json, os, sys
import numpy as np

out, blocks = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 4
hidden, inner, vocab, heads = 4096, 11008, 32000, 32
os.makedirs(out, exist_ok=True)
rng = np.random.default_rng(7)
tensors = [("model.embed_tokens.weight", (vocab, hidden)), ("lm_head.weight", (vocab, hidden)), ("model.norm.weight", (hidden,))]
for b in range(blocks):
    p = f"model.layers.{b}."
    tensors += [(p + f"self_attn.{n}_proj.weight", (hidden, hidden)) for n in "qkvo"]
    tensors += [(p + "mlp.gate_proj.weight", (inner, hidden)), (p + "mlp.up_proj.weight", (inner, hidden)), (p + "mlp.down_proj.weight", (hidden, inner))]
    tensors += [(p + "input_layernorm.weight", (hidden,)), (p + "post_attention_layernorm.weight", (hidden,))]

def bf16(shape):
    if len(shape) == 1:
        return np.full(shape, 0x3F80, dtype=np.uint16)
    # Heavy tails: a normal times a per-column scale.
    scale = np.exp(rng.standard_normal(shape[1], dtype=np.float32) * 0.3) / np.float32(np.sqrt(shape[1]))
    w = rng.standard_normal(shape, dtype=np.float32) * scale
    assert w.dtype == np.float32
    bits = w.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

shards, size = [[]], 0
for name, shape in tensors:
    n = 2 * int(np.prod(shape))
    if size + n > 2_000_000_000:
        shards.append([]); size = 0
    shards[-1].append((name, shape)); size += n
index = {}
for i, shard in enumerate(shards):
    file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shard:
        n = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + n]}
        at += n
        index[name] = file
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    with open(os.path.join(out, file), "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shard:
            f.write(bf16(shape).tobytes())
json.dump({"metadata": {}, "weight_map": index}, open(os.path.join(out, "model.safetensors.index.json"), "w"))
json.dump({
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
    "num_hidden_layers": blocks, "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": vocab,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}, open(os.path.join(out, "config.json"), "w"), indent=1)
with open(os.path.join(out, "calibration_ids.jsonl"), "w") as f:
    for row in rng.integers(3, vocab, size=(16, 512)):
        f.write(json.dumps({"input_ids": row.tolist()}) + "\n")
print(out, f"{sum(2 * int(np.prod(s)) for _, s in tensors) / 1e9:.2f} GB")
