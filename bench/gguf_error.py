#!/usr/bin/env python3
"""gguf_error.py --exact MODEL-f32.gguf [--imatrix FILE.gguf] A.gguf B.gguf

Squared error of two quantized GGUF files of one model against the same file in plain numbers, by type and in all, as the gguf package
dequantizes them; weighed by the importance matrix (mean square of each input channel) where one is given and knows the tensor. Exit 1 when
A's total is above B's, or the types of a tensor differ.
"""
import argparse, sys
from collections import defaultdict
import numpy as np
from gguf import GGUFReader, quants

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--exact", required=True); p.add_argument("--imatrix"); p.add_argument("a"); p.add_argument("b"); args = p.parse_args()
read = lambda path: {t.name: t for t in GGUFReader(path).tensors}
exact, a, b = read(args.exact), read(args.a), read(args.b)
given = read(args.imatrix) if args.imatrix else {}
importance = {n.removesuffix(".in_sum2"): t.data.reshape(-1) / given[n.replace(".in_sum2", ".counts")].data.reshape(-1)[0] for n, t in given.items() if n.endswith(".in_sum2")}
if set(a) != set(b): sys.exit(f"different tensors: {sorted(set(a) ^ set(b))}")
sums = defaultdict(lambda: np.zeros(6)); plain = ("F32", "F16", "BF16")
for name in sorted(a):
    x, y = a[name], b[name]
    if x.tensor_type != y.tensor_type and not {x.tensor_type.name, y.tensor_type.name} <= set(plain): sys.exit(f"{name}: {x.tensor_type.name} and {y.tensor_type.name}")
    if x.tensor_type.name in plain: continue
    w = quants.dequantize(exact[name].data, exact[name].tensor_type).astype(np.float64); h = importance.get(name, 1.0)
    e = [((quants.dequantize(t.data, t.tensor_type) - w) ** 2) for t in (x, y)]
    s = sums[x.tensor_type.name]; s += [1, w.size, (e[0] * h).sum(), (e[1] * h).sum(), e[0].sum(), e[1].sum()]
print(f"{'type':6} {'tensors':>7} {'weights':>10} {'A':>12} {'B':>12} {'A / B':>8} {'plain A / B':>11}")
total = sum(sums.values())
for name, s in [*sorted(sums.items()), ("all", total)]:
    print(f"{name:6} {int(s[0]):7} {int(s[1]):10} {s[2]:12.5g} {s[3]:12.5g} {s[2] / s[3]:8.4f} {s[4] / s[5]:11.4f}")
sys.exit(int(total[2] > total[3]))
