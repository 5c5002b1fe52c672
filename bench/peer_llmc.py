#!/usr/bin/env python3
"""peer_llmc.py MODEL IDS.jsonl OUT --algorithm rtn|gptq|awq|sparsegpt|wanda [--pattern 50|2:4] [--samples N] [--context N] [--threads N]
             [--bits 4] [--group 128] [--activations int8] [--smooth ALPHA]

llm-compressor on a CPU, for comparisons in one run: by default W4 group 128, symmetric (AWQ asymmetric, 20 grid points, duo scaling), loaded as
f32, head and embeddings untouched. --group 0 is one scale per row; --activations int8 adds bytes with a scale per token
(W8A8), --smooth its SmoothQuantModifier before. Runs in llm-compressor's own environment; prints one JSON line with its phases in seconds.
"""
import argparse, json, os, sys, time
start = time.time()
p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("model"); p.add_argument("ids"); p.add_argument("out"); p.add_argument("--algorithm", required=True, choices=["rtn", "gptq", "awq", "sparsegpt", "wanda"]); p.add_argument("--pattern", default="50", choices=["50", "2:4"])
p.add_argument("--samples", type=int, default=64); p.add_argument("--context", type=int, default=512); p.add_argument("--threads", type=int, default=1)
p.add_argument("--bits", type=int, default=4); p.add_argument("--group", type=int, default=128)
p.add_argument("--activations", choices=["int8"]); p.add_argument("--smooth", type=float)
a = p.parse_args()
os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS=str(a.threads), MKL_NUM_THREADS=str(a.threads))
import torch
torch.set_num_threads(a.threads)
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM
if not torch.cuda.is_available():  # AWQModifier of 0.14 calls pin_memory() unconditionally, which needs a driver
    torch.Tensor.pin_memory = lambda self, *_, **__: self
phases = {"import": time.time() - start}; mark = time.time()
def done(name):
    global mark
    phases[name] = time.time() - mark; mark = time.time()

model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32); done("load")
weights = QuantizationArgs(num_bits=a.bits, type="int", symmetric=a.algorithm != "awq", **(dict(strategy="group", group_size=a.group) if a.group else dict(strategy="channel")))
tokens = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True, observer=None) if a.activations else None
common = dict(config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights, input_activations=tokens)}, ignore=["lm_head"])
if a.algorithm == "gptq": recipe = [GPTQModifier(**common)]
elif a.algorithm == "rtn": recipe = [QuantizationModifier(**common)]
elif a.algorithm in ("sparsegpt", "wanda"):
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    kind = SparseGPTModifier if a.algorithm == "sparsegpt" else WandaPruningModifier
    recipe = [kind(sparsity=0.5, mask_structure="2:4" if a.pattern == "2:4" else "0:0", targets=["Linear"], ignore=["re:.*lm_head"])]
else:
    from llmcompressor.modifiers.transform.awq import AWQModifier
    recipe = [AWQModifier(duo_scaling=True), QuantizationModifier(**common)]
if a.smooth is not None:
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    recipe.insert(0, SmoothQuantModifier(smoothing_strength=a.smooth))
data = {}
if a.algorithm != "rtn" or a.smooth is not None:
    rows = [json.loads(line)["input_ids"][: a.context] for line in open(a.ids) if line.strip()][: a.samples]
    data = dict(dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(r) for r in rows]}), max_seq_length=a.context, num_calibration_samples=len(rows))
oneshot(model=model, recipe=recipe, **data); done("oneshot")
model.save_pretrained(a.out, save_compressed=a.algorithm not in ("sparsegpt", "wanda")); done("save")
print("PHASES " + json.dumps({k: round(v, 2) for k, v in phases.items()}), flush=True)
