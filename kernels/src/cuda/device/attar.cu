// The kernels. Names: attar_<what>_w<bits>_<type of activations>_<most tokens of a tile>.
#include "ptx.cuh"
#include "codes.cuh"
#include "matmul.cuh"
#include "decode.cuh"
#include "arrange.cuh"

#ifndef ATTAR_SIMT
#define ATTAR_KERNEL(name, Argument, threads, blocks) \
  extern "C" __global__ void __launch_bounds__(threads, blocks) name(const Argument p)
#endif

#define ATTAR_DECODE(bits, type, Type)                                                                            \
  ATTAR_KERNEL(attar_decode_w##bits##_##type##_8, AttarMatmul, 256, 2) { decode<bits, Type, 1>(p); }               \
  ATTAR_KERNEL(attar_decode_w##bits##_##type##_16, AttarMatmul, 256, 2) { decode<bits, Type, 2>(p); }

#define ATTAR_TYPES(what, bits) what(bits, f16, F16) what(bits, bf16, Bf16)
#define ATTAR_ALL(what) ATTAR_TYPES(what, 2) ATTAR_TYPES(what, 3) ATTAR_TYPES(what, 4) ATTAR_TYPES(what, 8)

ATTAR_ALL(ATTAR_DECODE)
ATTAR_KERNEL(attar_arrange, AttarArrange, 256, 1) { arrange(p); }
