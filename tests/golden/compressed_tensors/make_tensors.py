#!/usr/bin/env python3
"""Bit-exact oracles for compressed-tensors `pack-quantized`.   python make_tensors.py

Small random linears, packed and unpacked by compressed-tensors' own code. tensors.safetensors holds, for each case,
`<case>.weight_packed`, `.weight_scale`, `.weight_shape`, `.weight_zero_point` (packed, asymmetric only), and as oracles
`<case>.codes` u8 [out, in] (unsigned, 0 .. 2^bits), `<case>.zeros` u8 [out, groups] (unsigned) and `<case>.weight` f32, the
dequantized weight. cases.json describes them. Scales are f32 unless the case ends in `_bf16` or `_f16`; there `.weight` is
what compressed-tensors computes, which rounds the product to that type.
"""
import json
from pathlib import Path
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor as C, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
CASES = {  # bits, group (None: channel), symmetric, out, in, scale dtype
    "w4_g128_sym": (4, 128, True, 12, 256, torch.float32),
    "w4_g32_asym": (4, 32, False, 20, 64, torch.float32),      # 20 rows: the packed zero points end inside a word
    "w3_g64_sym": (3, 64, True, 12, 128, torch.float32),
    "w3_g32_asym": (3, 32, False, 20, 96, torch.float32),
    "w3_channel_sym": (3, None, True, 6, 40, torch.float32),   # 40 columns: the dense stream ends inside a word
    "w2_g64_sym": (2, 64, True, 12, 128, torch.float32),
    "w2_g32_asym": (2, 32, False, 20, 64, torch.float32),
    "w8_channel_sym": (8, None, True, 12, 64, torch.float32),
    "w8_g32_asym": (8, 32, False, 10, 64, torch.float32),
    "w4_channel_asym": (4, None, False, 9, 36, torch.float32),
    "w4_g64_sym_bf16": (4, 64, True, 8, 128, torch.bfloat16),
    "w4_g64_asym_f16": (4, 64, False, 8, 128, torch.float16),
}
out, meta, gen = {}, {}, torch.Generator().manual_seed(7)
for name, (bits, group, sym, o, i, dtype) in CASES.items():
    g = group or i; n = i // g; half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (o, i), generator=gen)                      # every code occurs, both ends included
    zeros = torch.zeros(o, n, dtype=torch.int64) if sym else torch.randint(-half, half, (o, n), generator=gen)
    scale = (torch.rand(o, n, generator=gen) * 0.02 + 0.003).to(dtype)
    dense = (codes - zeros.repeat_interleave(g, 1)).float() * scale.float().repeat_interleave(g, 1)
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=sym, strategy="group" if group else "channel", group_size=group)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    packed = C.compress({"weight": dense, "weight_scale": scale, "weight_zero_point": zeros.to(torch.int8)}, scheme)
    assert torch.equal(unpack_from_int32(packed["weight_packed"], bits, torch.Size((o, i))), codes.to(torch.int8)), name
    back = C.decompress(dict(packed), scheme)["weight"]
    assert torch.allclose(back.float(), dense, rtol=1e-2 if dtype != torch.float32 else 1e-6), name
    out |= {f"{name}.{k}": v.contiguous() for k, v in packed.items()}
    out[f"{name}.codes"] = (codes + half).to(torch.uint8); out[f"{name}.zeros"] = (zeros + half).to(torch.uint8); out[f"{name}.weight"] = back.float()
    meta[name] = dict(bits=bits, group_size=group or -1, symmetric=sym, out_features=o, in_features=i, scale_dtype=str(dtype).removeprefix("torch."))
# weight_g_idx: compressed-tensors 0.19 no longer writes or applies it (actorder "group" was removed); older releases stored
# int32 [in_features], group of each column. This case follows that convention and is dequantized by the plain formula.
bits, g, o, i = 4, 32, 8, 64; half = 8
codes = torch.randint(0, 16, (o, i), generator=gen); scale = torch.rand(o, i // g, generator=gen) * 0.02 + 0.003
idx = torch.randperm(i, generator=gen) // g
packed = C.compress({"weight": (codes - half).float(), "weight_scale": torch.ones(o, 1), "weight_zero_point": torch.zeros(o, 1, dtype=torch.int8)},
                    QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="channel")))
n = "w4_g32_sym_g_idx"
out |= {f"{n}.weight_packed": packed["weight_packed"].contiguous(), f"{n}.weight_shape": packed["weight_shape"], f"{n}.weight_scale": scale,
        f"{n}.weight_g_idx": idx.to(torch.int32), f"{n}.codes": codes.to(torch.uint8), f"{n}.zeros": torch.full((o, i // g), half, dtype=torch.uint8),
        f"{n}.weight": (codes - half).float() * scale[:, idx]}
meta[n] = dict(bits=4, group_size=g, symmetric=True, out_features=o, in_features=i, scale_dtype="float32", g_idx=True)
save_file(out, HERE / "tensors.safetensors"); (HERE / "cases.json").write_text(json.dumps(meta, indent=1) + "\n")
