#!/usr/bin/env python3
"""Seeds of fuzz/corpus/gguf: small whole files, and files that lie. No argument; writes beside this script."""
import struct
from pathlib import Path

out = Path(__file__).parent / "corpus/gguf"
out.mkdir(parents=True, exist_ok=True)

def text(value):
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data

def value(kind, data):
    formats = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
    if kind == 8:
        return text(data)
    if kind == 9:
        inner, items = data
        return struct.pack("<IQ", inner, len(items)) + b"".join(value(inner, item) for item in items)
    return struct.pack("<" + formats[kind], data)

def file(keys, tensors, data=b"", version=3, counts=None):
    counts = counts or (len(tensors), len(keys))
    out = b"GGUF" + struct.pack("<IQQ", version, *counts)
    for key, kind, item in keys:
        out += text(key) + struct.pack("<I", kind) + value(kind, item)
    for name, dims, ty, offset in tensors:
        out += text(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", ty, offset)
    out += b"\0" * (-len(out) % 32)
    return out + data

def model(arch, extra=(), tokenizer="gpt2"):
    keys = [("general.architecture", 8, arch)] + [(f"{arch}.{name}", kind, number) for name, kind, number in [
        ("block_count", 4, 1), ("context_length", 4, 16), ("embedding_length", 4, 8), ("feed_forward_length", 4, 8),
        ("attention.head_count", 4, 2), ("attention.head_count_kv", 4, 1), ("attention.layer_norm_rms_epsilon", 6, 1e-5),
        ("rope.freq_base", 6, 10000.0)]] + list(extra)
    tokens = ["<unk>", "a", "b", "ab", "<0x41>", "<s>"]
    keys += [("tokenizer.ggml.model", 8, tokenizer), ("tokenizer.ggml.pre", 8, "gpt-2"), ("tokenizer.ggml.tokens", 9, (8, tokens)),
             ("tokenizer.ggml.token_type", 9, (5, [2, 1, 1, 1, 6, 3])), ("tokenizer.ggml.scores", 9, (6, [0.0, -1.0, -2.0, 0.0, 0.0, 0.0])),
             ("tokenizer.ggml.merges", 9, (8, ["a b"])), ("tokenizer.ggml.bos_token_id", 4, 5)]
    shapes = [("token_embd.weight", (8, 6)), ("output_norm.weight", (8,)), ("blk.0.attn_norm.weight", (8,)),
              ("blk.0.ffn_norm.weight", (8,)), ("blk.0.attn_q.weight", (8, 8)), ("blk.0.attn_k.weight", (8, 4)),
              ("blk.0.attn_v.weight", (8, 4)), ("blk.0.attn_output.weight", (8, 8)), ("blk.0.ffn_gate.weight", (8, 8)),
              ("blk.0.ffn_up.weight", (8, 8)), ("blk.0.ffn_down.weight", (8, 8))]
    tensors, offset = [], 0
    for name, dims in shapes:
        tensors.append((name, dims, 1, offset))
        size = 2
        for dim in dims:
            size *= dim
        offset += -(-size // 32) * 32
    return file(keys, tensors, b"\x3c" * offset)

seeds = {
    "llama": model("llama"), "qwen2": model("qwen2"), "qwen3": model("qwen3"), "spm": model("llama", tokenizer="llama"),
    "yarn": model("llama", [("llama.rope.scaling.type", 8, "yarn"), ("llama.rope.scaling.factor", 6, 4.0)]),
    "linear": model("qwen2", [("qwen2.rope.scaling.type", 8, "linear"), ("qwen2.rope.scaling.factor", 6, 0.0)]),
    "window": model("llama", [("llama.attention.sliding_window", 4, 4)]),
    "empty": file([], []), "v2": file([("a", 4, 1)], [], version=2),
    "kinds": file([(f"k{kind}", kind, "x" if kind == 8 else 1) for kind in (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12)], []),
    "nested": file([("a", 9, (9, [(8, ["x", "y"]), (9, [(4, [1, 2])])]))], []),
    "blocks": file([], [("a.weight", (256, 2), 12, 0), ("b.weight", (32,), 8, 288)], b"\1" * 352),
    "unknown": file([], [("a.weight", (7,), 99, 0), ("b.weight", (8,), 0, 64)], b"\1" * 96),
    "counts": file([], [], counts=(2**64 - 1, 2**64 - 1)), "many": file([], [], b"\0" * 256, counts=(8, 16)),
    "list": b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("a") + struct.pack("<IIQ", 9, 8, 2**40),
    "overflow": file([], [("a", (2**33, 2**33), 0, 0)]), "overlap": file([], [("a", (16,), 0, 0), ("b", (16,), 0, 32)], b"\0" * 128),
    "misaligned": file([], [("a", (4,), 0, 8)], b"\0" * 64), "alignment": file([("general.alignment", 4, 3)], []),
    "cut": model("llama")[:-200], "v1": b"GGUF" + struct.pack("<I", 1), "big": b"GGUF" + struct.pack(">I", 3),
}
for name, data in seeds.items():
    (out / name).write_bytes(data)
