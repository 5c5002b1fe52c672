#!/usr/bin/env python3
"""Bit-exact oracles for the AutoAWQ GEMM layout (4 bits).   python make_tensors.py   (GPTQModel's environment)

Packed by GPTQModel's AwqGEMMLinear (AutoAWQ's layout, whose own package is retired) and dequantized by its `dequantize_gemm`.
tensors.safetensors: `<case>.qweight` i32 [in, out/8], `.qzeros` i32 [groups, out/8], `.scales` f16 [groups, out], and as oracles
`<case>.codes` u8 [out, in], `<case>.zeros` u8 [out, groups], `<case>.weight` f32 [out, in].
"""
import json, os
from pathlib import Path
os.environ.setdefault("CUDA_VISIBLE_DEVICES", ""); os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "8")
import torch
from gptqmodel.nn_modules.qlinear.gemm_awq import AwqGEMMLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
out, meta, gen = {}, {}, torch.Generator().manual_seed(13)
for name, (group, sym) in {"w4_g32_asym": (32, False), "w4_g32_sym": (32, True), "w4_channel_asym": (-1, False)}.items():
    o, i = 32, 96; g = group if group > 0 else i; n = i // g
    codes = torch.randint(0, 16, (o, i), generator=gen)
    zeros = torch.full((o, n), 8) if sym else torch.randint(0, 16, (o, n), generator=gen)
    scales = (torch.rand(o, n, generator=gen) * 0.02 + 0.003).half().float(); idx = torch.arange(i) // g
    dense = (codes - zeros[:, idx]).float() * scales[:, idx]
    lin = torch.nn.Linear(i, o, bias=False); lin.weight.data = dense.clone()
    q = AwqGEMMLinear.__new__(AwqGEMMLinear); torch.nn.Module.__init__(q); q.bits, q.group_size, q.in_features, q.out_features = 4, g, i, o
    q.pack(lin, scales.half().float(), zeros.float())
    back = dequantize_gemm(q.qweight, q.qzeros, q.scales.float(), 4, g).T
    assert torch.equal(back, dense), name
    out |= {f"{name}.{k}": getattr(q, k).clone().contiguous() for k in ("qweight", "qzeros", "scales")}
    out |= {f"{name}.codes": codes.to(torch.uint8), f"{name}.zeros": zeros.to(torch.uint8), f"{name}.weight": dense}
    meta[name] = dict(bits=4, group_size=group, symmetric=sym, out_features=o, in_features=i)
save_file(out, HERE / "tensors.safetensors"); (HERE / "cases.json").write_text(json.dumps(meta, indent=1) + "\n")
