#!/usr/bin/env python3
"""Golden headers of GPTQModel artifacts, GPTQ and AWQ.   python make_headers.py CHECKPOINT CALIBRATION.npy

CHECKPOINT is the demo model saved again by transformers as bfloat16 (GPTQModel cannot read a tied model that stores only
lm_head.weight); CALIBRATION an int array [windows, tokens], of which 8 (AWQ: 4) windows are used.
"""
import os, sys, tempfile
from pathlib import Path
os.environ.setdefault("CUDA_VISIBLE_DEVICES", ""); os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "8")
HERE = Path(__file__).resolve().parent; sys.path.insert(0, str(HERE.parent))
import numpy as np, torch
from gptqmodel import GPTQModel
from gptqmodel.quantization.config import AWQConfig, GPTQConfig
from headers import write_case

CASES = {
    "gptq/w4_g128_sym": GPTQConfig(bits=4, group_size=128, sym=True, desc_act=False, act_group_aware=False, device="cpu"),
    "gptq/w4_g128_asym": GPTQConfig(bits=4, group_size=128, sym=False, desc_act=False, act_group_aware=False, device="cpu"),
    "gptq/w4_g64_desc": GPTQConfig(bits=4, group_size=64, sym=True, desc_act=True, act_group_aware=False, device="cpu"),
    "gptq/w3_g64_sym": GPTQConfig(bits=3, group_size=64, sym=True, desc_act=False, act_group_aware=False, device="cpu"),
    "gptq/w4_g128_sym_v2": GPTQConfig(bits=4, group_size=128, sym=True, desc_act=False, act_group_aware=False, format="gptq_v2", device="cpu"),
    "awq/w4_g128_asym": AWQConfig(bits=4, group_size=128, sym=False, device="cpu"),
}
ids = np.load(sys.argv[2])
for name, config in CASES.items():
    model = GPTQModel.load(sys.argv[1], config, dtype=torch.bfloat16)
    model.quantize([{"input_ids": r.tolist(), "attention_mask": [1] * len(r)} for r in ids[: 4 if name.startswith("awq") else 8]], batch_size=1)
    with tempfile.TemporaryDirectory() as out:
        model.save(out); write_case(HERE.parent / f"{name}.json", out, tool="GPTQModel 7.7.0")
