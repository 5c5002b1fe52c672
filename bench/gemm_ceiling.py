#!/usr/bin/env python3
"""gemm_ceiling.py [THREADS]: best f32 GEMM rate of numpy and torch at 2048^3, in GFLOP/s; one JSON line. Needs numpy and torch."""
import json, os, sys, time
threads = int(sys.argv[1]) if len(sys.argv) > 1 else 1
os.environ.update(OMP_NUM_THREADS=str(threads), OPENBLAS_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
import numpy as np, torch
torch.set_num_threads(threads)
N = 2048
def best(f, repeats=8):
    f(); times = []
    for _ in range(repeats):
        t = time.perf_counter(); f(); times.append(time.perf_counter() - t)
    return 2 * N**3 / min(times) / 1e9
a, b = (np.random.default_rng(s).standard_normal((N, N), dtype=np.float32) for s in (1, 2)); c = np.empty_like(a)
x, y, z = torch.from_numpy(a), torch.from_numpy(b), torch.empty(N, N)
print(json.dumps(dict(numpy=round(best(lambda: np.matmul(a, b, out=c)), 1), torch=round(best(lambda: torch.mm(x, y, out=z)), 1), threads=threads)))
