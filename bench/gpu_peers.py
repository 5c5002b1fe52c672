"""Prints the bars of `attar gpu --json` and measures what Python has of peers on the same GPU in the same way: graph replay,
weights rotated through more than four times the second-level cache.

    gpu_peers.py BARS.json PEERS.json     measures and prints
    gpu_peers.py --libraries              paths of cuBLAS libraries among Python's packages
"""

import ctypes
import json
import os
import pathlib
import sys


def libraries():
    for place in sys.path:
        for folder in ["nvidia/cublas/lib", "nvidia/cu13/lib", "nvidia/cu12/lib"]:
            for name in ["libcublas.so.*", "libcublasLt.so.*"]:
                yield from pathlib.Path(place, folder).glob(name)


def graph_seconds(torch, calls, repeats=15):
    """Median seconds of one call."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    rounds = max(1, 32 // len(calls))
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    times = []
    for repeat in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if repeat >= 2:
            times.append(start.elapsed_time(end) * 1e-3)
    return sorted(times)[len(times) // 2] / (rounds * len(calls))


def copies(l2, size):
    return max(2, min(64, 4 * l2 // size + 2))


def tinygemm(torch, l2, rows, columns, m):
    """PyTorch's int4 product, groups of 128, bf16."""
    x = torch.randn(m, columns, dtype=torch.bfloat16, device="cuda")
    scales = torch.full((columns // 128, rows, 2), 0.01, dtype=torch.bfloat16, device="cuda")
    weights = []
    for _ in range(copies(l2, rows * columns // 2)):
        codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device="cuda")
        weights.append(torch.ops.aten._convert_weight_to_int4pack(codes, 8))
    product = torch.ops.aten._weight_int4pack_mm
    return graph_seconds(torch, [lambda w=w: product(x, w, 128, scales) for w in weights])


def marlin(torch, l2, rows, columns, m):
    """IST-DASLab's kernel, symmetric, groups of 128, f16: through the library that gpu.sh names, else their module."""
    library = os.environ.get("ATTAR_MARLIN")
    if library:
        product = ctypes.CDLL(library).marlin_mul
    else:
        import marlin

    x = torch.randn(m, columns, dtype=torch.float16, device="cuda")
    out = torch.empty(m, rows, dtype=torch.float16, device="cuda")
    scales = torch.full((columns // 128, rows), 0.01, dtype=torch.float16, device="cuda")
    locks = torch.zeros(rows // 128 * 16, dtype=torch.int, device="cuda")
    weights = [
        torch.randint(-(2**31), 2**31 - 1, (columns // 16, rows * 2), dtype=torch.int, device="cuda")
        for _ in range(copies(l2, rows * columns // 2))
    ]
    if not library:
        return graph_seconds(torch, [lambda w=w: marlin.mul(x, w, out, scales, locks, -1, -1, -1) for w in weights])
    address = lambda tensor: ctypes.c_void_p(tensor.data_ptr())

    def call(w):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        operands = [address(tensor) for tensor in (x, w, out, scales)]
        status = product(*operands, m, rows, columns, address(locks), 128, stream)
        if status:
            raise RuntimeError(f"marlin_mul: {status}")

    return graph_seconds(torch, [lambda w=w: call(w) for w in weights])


def cublas(torch, l2, rows, columns, m):
    x = torch.randn(m, columns, dtype=torch.bfloat16, device="cuda")
    out = torch.empty(m, rows, dtype=torch.bfloat16, device="cuda")
    weights = [
        torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda") for _ in range(copies(l2, rows * columns * 2))
    ]
    return graph_seconds(torch, [lambda w=w: torch.mm(x, w.t(), out=out) for w in weights])


def main():
    if sys.argv[1] == "--libraries":
        print(*libraries())
        return
    bars = json.loads(pathlib.Path(sys.argv[1]).read_text())
    l2 = bars["gpu"]["l2_bytes"]
    ours = {(t["rows"], t["columns"], t["m"]): t["seconds"] for t in bars["timings"] if t["bits"] == 4}
    peers, missing = [], [bars["missing"]] if bars["missing"] else []
    wanted = [("tinygemm", tinygemm, [1, 16, 64]), ("marlin", marlin, [1, 16, 64])]
    if bars["missing"]:
        wanted.append(("cublas bf16 (torch)", cublas, [16, 64, 4096]))
    try:
        import torch

        torch.cuda.init()
    except Exception as why:  # absent, or without CUDA
        torch = None
        missing += [f"{name}: torch: {why}" for name, _, _ in wanted]
    for name, run, tokens in wanted if torch else []:
        try:
            for rows, columns, m in sorted(ours):
                if m not in tokens or (rows % 256 or columns % 128):
                    continue
                seconds = run(torch, l2, rows, columns, m)
                peers.append({"peer": name, "rows": rows, "columns": columns, "m": m, "seconds": seconds})
        except Exception as why:
            missing.append(f"{name}: {why}")
    pathlib.Path(sys.argv[2]).write_text(json.dumps({"peers": peers, "missing": missing}, indent=1))

    gpu = bars["gpu"]
    print(f"{gpu['name']}, driver of CUDA {gpu['driver']}, kernels for {gpu['image']}")
    print(f"copy bandwidth {bars['copy_bytes_per_second'] / 1e9:.0f} GB/s (read and written)")
    print(f"{'product':<28} {'measured':>10} {'':<5} {'ratio':>7} {'wanted':>7}  of")
    number = lambda value: "-" if value is None else f"{value:.2f}"
    for bar in bars["bars"]:
        met = "" if bar["ratio"] is None or bar["wanted"] is None else ("" if bar["ratio"] >= bar["wanted"] else "  MISSED")
        print(f"{bar['what']:<28} {number(bar['measured']):>10} {bar['unit']:<5} {number(bar['ratio']):>7} "
              f"{number(bar['wanted']):>7}  {bar['against']}{met}")
    for peer in peers:
        mine = ours[(peer["rows"], peer["columns"], peer["m"])]
        ratio = peer["seconds"] / mine
        met = "" if ratio >= 1 else "  MISSED"
        print(f"{'m=%d w4 %dx%d' % (peer['m'], peer['rows'], peer['columns']):<28} {mine * 1e6:>10.2f} {'us':<5} "
              f"{ratio:>7.2f} {1:>7.2f}  {peer['peer']} ({peer['seconds'] * 1e6:.2f} us){met}")
    for t in bars["few_tokens"]:
        print(f"{'m=%d w4 %dx%d' % (t['m'], t['rows'], t['columns']):<28} {t['seconds'] * 1e6:>10.2f} us  {t['kernel']}")
    for what in missing:
        print(f"missing: {what}")


main()
