#!/usr/bin/env python3
"""block_search.py --ggml libggml-base.so --rate target/release/examples/block_rate --model DIR [--tensors N] [--types q4_k,...]

Squared error and seconds (one thread) of Attar's search for ggml's block types against ggml's own quantizer on linears of a
checkpoint: without importance (error unweighted) and with the same importance h for both (error weighted by h, seeded and long-tailed).
Ratios are of sums over tensors, Attar's to ggml's. Exit 1 when Attar's weighted error is above ggml's for a type.
"""
import argparse, ctypes, json, subprocess, tempfile, time
from pathlib import Path
import numpy as np
from safetensors import safe_open

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--ggml", required=True); p.add_argument("--rate", required=True); p.add_argument("--model", required=True)
p.add_argument("--tensors", type=int, default=7); p.add_argument("--types", default="q4_0,q4_1,q5_0,q5_1,q2_k,q3_k,q4_k,q5_k,q6_k,iq4_nl,iq4_xs"); a = p.parse_args()
TYPES = {"q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q2_k": 10, "q3_k": 11, "q4_k": 12, "q5_k": 13, "q6_k": 14, "iq4_nl": 20, "iq4_xs": 23}
g = ctypes.CDLL(a.ggml); g.ggml_quantize_chunk.restype = ctypes.c_size_t
g.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
g.ggml_row_size.restype = ctypes.c_size_t; g.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]

def ggml(name, x, h):
    rows, columns = x.shape; out = np.zeros(rows * g.ggml_row_size(TYPES[name], columns), np.uint8); y = np.zeros_like(x)
    begun = time.perf_counter(); g.ggml_quantize_chunk(TYPES[name], x.ctypes.data, out.ctypes.data, 0, rows, columns, None if h is None else h.ctypes.data); seconds = time.perf_counter() - begun
    f = getattr(g, "dequantize_row_" + name.replace("_k", "_K")); f.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]; f.restype = None
    f(out.ctypes.data, y.ctypes.data, x.size)
    e = (y.astype(np.float64) - x) ** 2
    return seconds, float((e * (1 if h is None else h)).sum()), float(e.sum())

with safe_open(Path(a.model) / "model.safetensors", "pt") as f:
    names = [n for n in sorted(f.keys()) if "proj" in n][: a.tensors]; xs = {n: np.ascontiguousarray(f.get_tensor(n).float().numpy()) for n in names}
bad = False
print(f"{'type':7} {'weighted':9} {'ggml s':>8} {'attar s':>8} {'speed':>6} {'error ratio':>11} {'plain ratio':>11}")
with tempfile.TemporaryDirectory() as tmp:
    t = Path(tmp)
    for name in a.types.split(","):
        for weighted in (False, True):
            total = np.zeros(6)
            for i, x in enumerate(xs.values()):
                h = np.random.default_rng(i).lognormal(0, 1, x.shape[1]).astype(np.float32) if weighted else None
                if x.shape[1] % 256 and name.endswith(("_k", "xs")): continue
                x.tofile(t / "w"); h is not None and h.tofile(t / "h")
                r = json.loads(subprocess.check_output([a.rate, name, str(x.shape[0]), str(x.shape[1]), t / "w"] + ([t / "h"] if weighted else [])))
                total += [*ggml(name, x, h), r["seconds"], r["weighted"], r["plain"]]
            bad |= total[4] > total[1]
            print(f"{name:7} {str(weighted):9} {total[0]:8.3f} {total[3]:8.3f} {total[0] / total[3]:6.1f} {total[4] / total[1]:11.4f} {total[5] / total[2]:11.4f}", flush=True)
raise SystemExit(bad)
