#!/usr/bin/env python3
"""peer_autoround.py MODEL IDS.jsonl OUT [--bits 2] [--group 64] [--iterations 200] [--batch 8] [--threads N]

auto-round on a CPU, for comparisons in one run: symmetric, loaded as f32, head and embedding untouched, its own defaults but for what
is said here; GPTQ's layout, which lies in a folder below OUT. Runs in auto-round's own environment; prints one JSON line with its phases
in seconds.
"""
import argparse, json, os, time
start = time.time()
p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("model"); p.add_argument("ids"); p.add_argument("out"); p.add_argument("--bits", type=int, default=2); p.add_argument("--group", type=int, default=64)
p.add_argument("--iterations", type=int, default=200); p.add_argument("--batch", type=int, default=8); p.add_argument("--threads", type=int, default=1); a = p.parse_args()
os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS=str(a.threads), MKL_NUM_THREADS=str(a.threads))
import torch
torch.set_num_threads(a.threads)
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer
imported = time.time()
model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32); tokenizer = AutoTokenizer.from_pretrained(a.model)
rows = [json.loads(line)["input_ids"] for line in open(a.ids) if line.strip()]; ids = torch.tensor(rows)
data = torch.utils.data.DataLoader([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids], batch_size=1, shuffle=False)
loaded = time.time()
AutoRound(model, tokenizer, bits=a.bits, group_size=a.group, sym=True, iters=a.iterations, nsamples=len(ids), seqlen=ids.shape[1], dataset=data, batch_size=a.batch,
          device_map="cpu", enable_torch_compile=False).quantize_and_save(a.out, format="auto_gptq")
print(json.dumps(dict(tool="auto-round", iterations=a.iterations, seconds_import=imported - start, seconds_load=loaded - imported, seconds_work=time.time() - loaded)))
