"""multiply_cuda.py ARTIFACT LINEAR: y = x W^T with x[i] = (i % 7 - 3) / 4 in f16 on a GPU, from the artifact's own files and cubins through
CuPy; prints y, a number a line. Repacks on the device, multiplies one token. Needs numpy and cupy."""
import json, sys
from pathlib import Path
import cupy as cp, numpy as np

def main(artifact, name):
    folder = Path(artifact); table = json.loads((folder / "kernels/kernels.json").read_text())["tensors"][name]
    kernel = next(k for k in table["kernels"] if k["kernel"] == "cuda-f16"); p, reads, repack = kernel["packed"], kernel["reads"], kernel["repack"]
    major, minor = divmod(int(cp.cuda.Device().compute_capability), 10)
    cubins = {f.stem.rsplit("_", 1)[1].rstrip("a"): f for f in (folder / "kernels").glob("attar_sm_*.cubin")}
    fitting = [n for n in cubins if int(n) // 10 == major and int(n) % 10 <= minor]
    module = cp.RawModule(path=str(cubins[max(fitting, key=int)] if fitting else folder / "kernels/attar.ptx"))

    def launch(l, fields, values):
        argument = np.array([tuple(values)], dtype=np.dtype(fields))[0]
        function = module.get_function(l["symbol"]); function.max_dynamic_shared_size_bytes = max(l["shared"], 0)
        function(tuple(l["grid"]), (l["threads"],), (argument,), shared_mem=l["shared"])

    def part(suffix):
        for q in table["parts"]:
            if q["suffix"] == suffix:
                return cp.asarray(np.fromfile(folder / q["file"], dtype=np.uint8, count=q["bytes"], offset=q["offset"]))
        return None

    def pointer(a): return 0 if a is None else a.data.ptr
    rows, columns = table["out_features"], table["in_features"]
    empty = lambda n: cp.zeros(n, dtype=cp.uint8) if n else None
    codes, scales, zeros = empty(p["codes_bytes"]), empty(p["scales_bytes"]), empty(p["zeros_bytes"])
    order = empty(4 * p["places"]) if p["ordered"] else None
    if order is not None:
        g_idx = part(reads["g_idx"]); size = table["group_size"] if table["group_size"] > 0 else columns
        if g_idx is None: g_idx = cp.arange(columns, dtype=cp.int32) // size
        launch(repack["order"], [("p", "<u8", 2), ("i", "<i4", 4)], [(pointer(g_idx), pointer(order)), (columns, p["chunks"], p["group_halves"], 0)])
    values = [[pointer(part(reads[k])) for k in ("codes", "zeros", "scales")] + [pointer(order), pointer(codes), pointer(scales), pointer(zeros)],
              (rows, columns, p["groups"], p["chunks"], p["group_halves"], p["scale_bytes"], p["zero_offset"], 0)]
    for step in ("codes", "groups"): launch(repack[step], [("p", "<u8", 7), ("i", "<i4", 8)], values)
    x = cp.asarray([((i % 7) - 3) / 4 for i in range(columns)], dtype=cp.float16)
    if order is not None: x = cp.where(order.view(cp.int32) >= 0, x[cp.maximum(order.view(cp.int32), 0)], 0).astype(cp.float16)
    one = kernel["matmul"][0]; y = cp.empty(rows, dtype=cp.float16); partial, arrived = empty(one["partial_bytes"]), empty(4 * one["counters"])
    launch(one["launch"], [("p", "<u8", 7), ("i", "<i4", 6), ("s", "<i8", 2)],
           [[pointer(a) for a in (codes, scales, zeros, x, y, partial, arrived)], (1, rows, p["chunks"], p["group_halves"], p["scale_kind"], one["splits"]), (p["places"], rows)])
    print("\n".join(f"{float(v):.9g}" for v in y.get()))

if __name__ == "__main__": main(*sys.argv[1:])
