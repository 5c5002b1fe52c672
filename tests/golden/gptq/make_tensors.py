#!/usr/bin/env python3
"""Bit-exact oracles for the GPTQ layout.   python make_tensors.py   (GPTQModel's environment)

Small random linears packed by GPTQModel's TorchLinear (`pack_original`) and dequantized by its `dequantize_weight`.
tensors.safetensors holds, for each case, `<case>.qweight`, `.qzeros`, `.scales` (f16), `.g_idx`, and as oracles
`<case>.codes` u8 [out, in], `<case>.zeros` u8 [out, groups] (the true zero points) and `<case>.weight` f32 [out, in].
`checkpoint_format` gptq (v1) stores zero - 1, gptq_v2 the zero itself. desc_act cases have an unsorted g_idx.
The `_wrap` case (v1) has true zeros 0, stored as -1 modulo 2^bits: what GPTQModel writes, and what old readers read as 2^bits.
"""
import json, os
from pathlib import Path
os.environ.setdefault("CUDA_VISIBLE_DEVICES", ""); os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "8")
import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization import FORMAT, GPTQConfig
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
CASES = {  # bits, group, symmetric, desc_act, format, lowest zero
    "w4_g32_sym_v1": (4, 32, True, False, "gptq", 8), "w4_g32_asym_v1": (4, 32, False, False, "gptq", 1), "w4_g32_asym_v2": (4, 32, False, False, "gptq_v2", 0),
    "w4_g32_sym_desc_v1": (4, 32, True, True, "gptq", 8), "w4_g32_asym_desc_v2": (4, 32, False, True, "gptq_v2", 0),
    "w2_g32_sym_v1": (2, 32, True, False, "gptq", 2), "w2_g32_asym_v2": (2, 32, False, False, "gptq_v2", 0),
    "w3_g32_sym_v1": (3, 32, True, False, "gptq", 4), "w3_g32_asym_v2": (3, 32, False, False, "gptq_v2", 0), "w3_g32_asym_desc_v1": (3, 32, False, True, "gptq", 1),
    "w8_g32_sym_v1": (8, 32, True, False, "gptq", 128), "w8_channel_asym_v2": (8, -1, False, False, "gptq_v2", 0),
    "w4_g32_asym_v1_wrap": (4, 32, False, False, "gptq", 0),
}
out, meta, gen = {}, {}, torch.Generator().manual_seed(11)
for name, (bits, group, sym, desc, fmt, low) in CASES.items():
    o, i = 32, 96; g = group if group > 0 else i; n = i // g; top = 1 << bits
    codes = torch.randint(0, top, (o, i), generator=gen)
    zeros = torch.full((o, n), low) if sym else torch.randint(low, top, (o, n), generator=gen)
    if name.endswith("wrap"): zeros[::3] = 0
    scales = (torch.rand(o, n, generator=gen) * 0.02 + 0.003).half().float()
    idx = torch.arange(i) // g
    if desc: idx = idx[torch.randperm(i, generator=gen)]
    dense = (codes - zeros[:, idx]).float() * scales[:, idx]
    lin = torch.nn.Linear(i, o, bias=False); lin.weight.data = dense.clone()
    q = TorchLinear(bits=bits, group_size=group, sym=sym, desc_act=desc, in_features=i, out_features=o, bias=False, format=FORMAT.GPTQ_V2)
    q.pack_original(lin, scales.clone(), zeros.clone().float(), idx.to(torch.int32)); q.post_init(); q.eval()
    back = q.dequantize_weight().T.float()
    assert (back - dense).abs().max() < 2e-3, (name, (back - dense).abs().max())   # f16 product
    if fmt == "gptq": convert_gptq_v2_to_v1_format_module(q, GPTQConfig(bits=bits, group_size=group))
    out |= {f"{name}.{k}": getattr(q, k).clone().contiguous() for k in ("qweight", "qzeros", "scales", "g_idx")}
    out |= {f"{name}.codes": codes.to(torch.uint8), f"{name}.zeros": zeros.to(torch.uint8), f"{name}.weight": dense}
    meta[name] = dict(bits=bits, group_size=group, symmetric=sym, desc_act=desc, checkpoint_format=fmt, out_features=o, in_features=i)
save_file(out, HERE / "tensors.safetensors"); (HERE / "cases.json").write_text(json.dumps(meta, indent=1) + "\n")
