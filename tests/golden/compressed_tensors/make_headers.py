#!/usr/bin/env python3
"""Golden headers of llm-compressor artifacts.   python make_headers.py CHECKPOINT [CASE...]

CHECKPOINT is the demo model (2 layers, hidden 128), loaded as bfloat16. Round to nearest, so that no calibration is needed.
Writes <case>.json: every tensor's name, dtype and shape, and the `quantization_config` of config.json.
"""
import os, sys, tempfile
from pathlib import Path
os.environ.setdefault("HF_HUB_OFFLINE", "1"); os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
HERE = Path(__file__).resolve().parent; sys.path.insert(0, str(HERE.parent))
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from headers import write_case
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

# Bits, group, symmetric; W8A8 quantizes activations too and is stored as int-quantized.
CASES = {"w4_g128_sym": (4, 128, True), "w4_g32_asym": (4, 32, False), "w3_g64_sym": (3, 64, True), "w8_channel_sym": (8, None, True),
         "w2_g64_sym": (2, 64, True), "w3_g128_asym": (3, 128, False), "w8_channel_sym_int8": (8, None, True)}
only = sys.argv[2:]
for name, (bits, group, sym) in CASES.items():
    if only and name not in only:
        continue
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=sym, strategy="group" if group else "channel", group_size=group)
    tokens = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True, observer=None) if name.endswith("_int8") else None
    oneshot(model=model, recipe=[QuantizationModifier(config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights, input_activations=tokens)}, ignore=["lm_head"])])
    with tempfile.TemporaryDirectory() as out:
        model.save_pretrained(out, save_compressed=True)
        AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(out)
        write_case(HERE / f"{name}.json", out, tool="llm-compressor QuantizationModifier")
