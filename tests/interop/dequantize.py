"""An independent reader of packed checkpoints: compressed-tensors `pack-quantized` and `int-quantized`, GPTQ (v1, v2, g_idx) and AutoAWQ GEMM.

Shares no code with Attar nor with the runtimes. Everything is expanded to dense f32 weights, in numpy:

    weight[o, i] = (code[o, i] - zero[o, group(i)]) * scale[o, group(i)]

The inputs of `int-quantized` linears are rounded while the model runs (`round_inputs`): signed bytes, one step of max/127 per token.
"""
import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

AWQ_NIBBLE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)  # where column 8c + k lies in word c; nibble 0 is the lowest
SUFFIXES = (".qweight", ".qzeros", ".scales", ".g_idx", ".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx")


def tensors(directory):
    """Every tensor of every shard: integers as they are, floats as f32, all numpy."""
    out = {}
    for path in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(path, "pt") as f:
            for name in f.keys():
                t = f.get_tensor(name)
                out[name] = (t.float() if t.is_floating_point() else t).numpy()
    return out


def stream(words, bits, count):
    """Rows of int32 words as rows of `count` codes: one dense stream of bits, least significant first."""
    octets = np.ascontiguousarray(words).astype("<i4").view(np.uint8)
    flags = np.unpackbits(octets, axis=1, bitorder="little")[:, : count * bits]
    return flags.reshape(len(words), count, bits).astype(np.int64) @ (1 << np.arange(bits))


def awq_nibbles(words):
    """[rows, columns / 8] int32 to [rows, columns] codes."""
    shifts = 4 * np.array(AWQ_NIBBLE_OF_COLUMN)
    return ((words.astype(np.int64)[:, :, None] >> shifts) & 15).reshape(len(words), -1)


def expand(codes, zeros, scales, group):
    return ((codes - zeros[:, group]).astype(np.float32) * scales[:, group]).astype(np.float32)


def even_groups(columns, groups):
    return np.arange(columns) // (columns // groups)


def compressed_tensors(t, base, bits):
    rows, columns = (int(x) for x in t[base + ".weight_shape"])
    scales = t[base + ".weight_scale"]
    codes = stream(t[base + ".weight_packed"], bits, columns)
    packed_zeros = t.get(base + ".weight_zero_point")
    half = 1 << (bits - 1)  # both codes and zeros are stored with this offset
    zeros = np.full(scales.shape, half) if packed_zeros is None else stream(packed_zeros.T, bits, rows).T
    group = t[base + ".weight_g_idx"] if base + ".weight_g_idx" in t else even_groups(columns, scales.shape[1])
    return expand(codes, zeros, scales, group)


def gptq(t, base, bits, v1):
    scales = t[base + ".scales"].T
    rows, words = scales.shape[0], t[base + ".qzeros"]
    columns = t[base + ".qweight"].shape[0] * 32 // bits
    codes = stream(t[base + ".qweight"].T, bits, columns)
    if v1 and bits in (2, 4, 8):  # the writers subtract one from each field of the WORD, so that a zero of 0 borrows from its neighbour
        one = sum(1 << s for s in range(0, 32, bits))
        words = ((words.astype(np.int64) + one) & 0xFFFFFFFF).astype(np.uint32).view(np.int32)
    zeros = stream(words, bits, rows).T
    if v1 and bits == 3:
        zeros = (zeros + 1) & 7
    group = t[base + ".g_idx"] if base + ".g_idx" in t else even_groups(columns, scales.shape[1])
    return expand(codes, zeros, scales, group)


def awq(t, base):
    scales = t[base + ".scales"].T
    codes = awq_nibbles(t[base + ".qweight"]).T
    return expand(codes, awq_nibbles(t[base + ".qzeros"]).T, scales, even_groups(codes.shape[1], scales.shape[1]))


def weights_for(name, config):
    """The `weights` arguments of the compressed-tensors group that holds module `name` (one group, or targets by name)."""
    groups = list(config["config_groups"].values())
    if len(groups) > 1:
        import re
        for g in groups:
            for target in g["targets"]:
                if name == target or (target.startswith("re:") and re.match(target[3:], name)):
                    return g["weights"]
    return groups[0]["weights"]


def int_quantized(t):
    """Names of the linears that are stored as signed bytes."""
    return [n[: -len(".weight")] for n, v in t.items() if n.endswith(".weight") and v.dtype == np.int8]


def round_inputs(model, directory):
    """Makes each `int-quantized` linear of a torch model round its input as vLLM's kernels do: step = max/127 of the token, ties to even."""
    def pre(_, inputs):
        step = inputs[0].abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        return ((inputs[0] / step).round() * step,)
    for name in int_quantized(tensors(directory)):
        model.get_submodule(name).register_forward_pre_hook(pre)


def dense_state(directory):
    """(config without quantization, {name: f32 tensor}, method) of an artifact directory."""
    config = json.loads((Path(directory) / "config.json").read_text())
    q = config.pop("quantization_config")
    method, t, out = q["quant_method"], tensors(directory), {}
    byte_linears = set(int_quantized(t))
    for name, value in t.items():
        base = name.rsplit(".", 1)[0]
        if name.endswith(".weight") and base in byte_linears:
            out[name] = value.astype(np.float32) * t[base + ".weight_scale"]
            continue
        if name.endswith(".weight_packed"):
            out[base + ".weight"] = compressed_tensors(t, base, weights_for(base, q)["num_bits"])
        elif name.endswith(".qweight") and method == "awq":
            out[base + ".weight"] = awq(t, base)
        elif name.endswith(".qweight"):
            out[base + ".weight"] = gptq(t, base, q["bits"], q.get("checkpoint_format", "gptq") == "gptq")
        elif not name.endswith(SUFFIXES):
            out[name] = value
    return config, {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in out.items()}, method
