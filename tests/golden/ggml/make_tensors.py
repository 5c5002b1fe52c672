#!/usr/bin/env python3
"""ggml's own quantizers and dequantizers on seeded weights: tensors.safetensors of this folder.

usage: make_tensors.py PATH/libggml-base.so

`x` are weights [8, 512], f32. For each type TYPE:
  TYPE.blocks   u8 [8, bytes]   what ggml_quantize_chunk makes of x without an importance matrix
  TYPE.weight   f32 [8, 512]    what ggml dequantizes it to
  TYPE.noise    u8 [4, bytes]   random bytes, halves made finite
  TYPE.noise_weight f32 [4, 512]
`types` is a table i64 [n, 3] of every type number with its block size and bytes.
"""
import ctypes, sys
import numpy as np
from safetensors.numpy import save_file

ggml = ctypes.CDLL(sys.argv[1])
TYPES = {"q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q2_k": 10, "q3_k": 11, "q4_k": 12, "q5_k": 13,
         "q6_k": 14, "iq4_nl": 20, "iq4_xs": 23}
# Bytes of a block at which a half stands.
HALVES = {"q4_0": [0], "q4_1": [0, 2], "q5_0": [0], "q5_1": [0, 2], "q8_0": [0], "q2_k": [80, 82], "q3_k": [108],
          "q4_k": [0, 2], "q5_k": [0, 2], "q6_k": [208], "iq4_nl": [0], "iq4_xs": [0]}
ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64,
                                     ctypes.c_int64, ctypes.c_void_p]
ggml.ggml_type_size.restype = ctypes.c_size_t
ggml.ggml_blck_size.restype = ctypes.c_int64
ggml.ggml_row_size.restype = ctypes.c_size_t
ggml.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]

def dequantize(name, blocks, columns):
    f = getattr(ggml, "dequantize_row_" + name.replace("_k", "_K"))
    f.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    f.restype = None
    out = np.zeros((blocks.shape[0], columns), np.float32)
    for row in range(blocks.shape[0]):
        source = np.ascontiguousarray(blocks[row])
        f(source.ctypes.data, out[row].ctypes.data, columns)
    return out

rng = np.random.default_rng(5)
rows, columns = 8, 512
x = (rng.standard_normal((rows, columns)) * 0.02).astype(np.float32)
x[1] = np.float16(x[1])                    # ties as checkpoints have them
x[2] = rng.standard_t(3, columns) * 0.05   # outliers
x[3, 32:96] = 0.0                          # blocks of zeros
x[3, 256:] = 0.0
x[4] = np.abs(x[4]) + 0.01                 # all above zero
x[5] *= 1e-4                               # scales that are subnormal as halves
x[6] = np.round(x[6] * 200) / 200          # few values
x[7, ::7] = -0.0
tensors = {"x": x}
for name, number in TYPES.items():
    width = ggml.ggml_row_size(number, columns)
    blocks = np.zeros((rows, width), np.uint8)
    ggml.ggml_quantize_chunk(number, x.ctypes.data, blocks.ctypes.data, 0, rows, columns, None)
    tensors[name + ".blocks"] = blocks
    tensors[name + ".weight"] = dequantize(name, blocks, columns)
    noise = rng.integers(0, 256, (4, width), dtype=np.uint8)
    size = ggml.ggml_type_size(number)
    for at in HALVES[name]:
        halves = (rng.standard_normal((4, width // size)) * 0.1).astype(np.float16)
        noise.reshape(4, -1, size)[:, :, at:at + 2] = halves.view(np.uint8).reshape(4, -1, 2)
    tensors[name + ".noise"] = noise
    tensors[name + ".noise_weight"] = dequantize(name, noise, columns)
ggml.ggml_type_name.restype = ctypes.c_char_p
table = [[n, ggml.ggml_blck_size(n), ggml.ggml_type_size(n)] for n in range(43) if ggml.ggml_type_size(n) > 0]
tensors["types"] = np.array(table, np.int64)
save_file(tensors, "tensors.safetensors")
for row in table:
    print(*row, ggml.ggml_type_name(row[0]).decode())
