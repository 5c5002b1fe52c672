"""multiply.py ARTIFACT LINEAR [int8]: y = x W^T with x[i] = (i % 7 - 3) / 4, from the artifact's own files through ctypes; prints y, a
number a line. Standard library only."""
import ctypes as c, json, sys
from pathlib import Path

class Spec(c.Structure):
    _fields_ = [("layout", c.c_char_p), ("bits", c.c_uint32), ("group_size", c.c_int32), ("symmetric", c.c_uint32),
                ("out_features", c.c_uint64), ("in_features", c.c_uint64)]

class Part(c.Structure):
    _fields_ = [("suffix", c.c_char_p), ("dtype", c.c_char_p), ("shape", c.POINTER(c.c_uint64)), ("rank", c.c_size_t),
                ("data", c.c_char_p), ("bytes", c.c_size_t)]

def main(artifact, name, activations="f32"):
    folder = Path(artifact); table = json.loads((folder / "kernels/kernels.json").read_text())
    lib = c.CDLL(str(next((folder / "kernels").glob("*attar_kernels.so*"), None) or next((folder / "kernels").glob("*attar_kernels.d*"))))
    lib.attar_last_error.restype = c.c_char_p
    lib.attar_linear_prepare.argtypes = [c.POINTER(Spec), c.POINTER(Part), c.c_size_t, c.c_int, c.POINTER(c.c_void_p)]
    lib.attar_linear_matmul.argtypes = [c.c_void_p, c.POINTER(c.c_float), c.c_size_t, c.POINTER(c.c_float)]
    lib.attar_linear_free.argtypes = [c.c_void_p]
    def done(status):
        if status: sys.exit(f"{name}: {lib.attar_last_error().decode()}")
    if lib.attar_abi_version() != table["abi"]: sys.exit("the library is not of this kernels.json")
    linear = table["tensors"][name]; parts = []
    for p in linear["parts"]:
        with open(folder / p["file"], "rb") as f: f.seek(p["offset"]); data = f.read(p["bytes"])
        parts.append(Part(p["suffix"].encode(), p["dtype"].encode(), (c.c_uint64 * len(p["shape"]))(*p["shape"]), len(p["shape"]), data, len(data)))
    rows, columns = linear["out_features"], linear["in_features"]
    spec = Spec(linear["layout"].encode(), linear["bits"], linear["group_size"], linear["symmetric"], rows, columns)
    handle = c.c_void_p()
    done(lib.attar_linear_prepare(spec, (Part * len(parts))(*parts), len(parts), activations == "int8", c.byref(handle)))
    x = (c.c_float * columns)(*[(i % 7 - 3) / 4 for i in range(columns)]); y = (c.c_float * rows)()
    done(lib.attar_linear_matmul(handle, x, 1, y))
    lib.attar_linear_free(handle)
    print("\n".join(f"{v:.9g}" for v in y))

if __name__ == "__main__": main(*sys.argv[1:])
