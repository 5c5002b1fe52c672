// The kernels. Names: attar_<what>_w<bits>_<type of activations>_<most tokens of a tile>, attar_repack_<layout>_w<bits>_<what>.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define ATTAR_HOPPER
#endif
#include "ptx.cuh"
#include "hopper_ptx.cuh"
#include "codes.cuh"
#include "matmul.cuh"
#include "decode.cuh"
#include "gemm.cuh"
#include "hopper.cuh"
#include "stream.cuh"
#include "arrange.cuh"
#include "repack.cuh"
#include "../../layout/gptq/repack.cuh"
#include "../../layout/awq/repack.cuh"
#include "../../layout/ct_packed/repack.cuh"

#ifndef ATTAR_SIMT
#define ATTAR_KERNEL(name, Argument, threads, blocks) \
  extern "C" __global__ void __launch_bounds__(threads, blocks) name(const Argument p)
#endif

#ifdef ATTAR_HOPPER
#define ATTAR_TILES(bits, type, Type, n)                                                                                   \
  ATTAR_KERNEL(attar_hopper_w##bits##_##type##_##n, AttarMatmul, n <= 16 ? 512 : 384, 1) { hopper<bits, Type, n, 1>(p); }      \
  ATTAR_KERNEL(attar_hopper_w##bits##_##type##_##n##_fine, AttarMatmul, n <= 16 ? 512 : 384, 1) { hopper<bits, Type, n, 4>(p); }
#define ATTAR_STREAM(bits, type, Type)                                                                                     \
  ATTAR_KERNEL(attar_stream_w##bits##_##type##_8, AttarMatmul, 256, 2) { stream<bits, Type, 2>(p); }                   \
  ATTAR_KERNEL(attar_stream_w##bits##_##type##_8_fine, AttarMatmul, 256, 2) { stream<bits, Type, 8>(p); }
#else
#define ATTAR_TILES(bits, type, Type, n)
#define ATTAR_STREAM(bits, type, Type)
#endif

#define ATTAR_MATMUL(bits, type, Type)                                                                                \
  ATTAR_KERNEL(attar_decode_w##bits##_##type##_8, AttarMatmul, 256, 2) { decode<bits, Type, 1>(p); }              \
  ATTAR_KERNEL(attar_decode_w##bits##_##type##_16, AttarMatmul, 256, bits == 8 ? 1 : 2) { decode<bits, Type, 2>(p); }  \
  ATTAR_KERNEL(attar_gemm_w##bits##_##type##_32, AttarMatmul, 256, 1) { gemm<bits, Type, 4, 8, 1>(p); }            \
  ATTAR_KERNEL(attar_gemm_w##bits##_##type##_64, AttarMatmul, 256, 1) { gemm<bits, Type, 8, 8, 1>(p); }            \
  ATTAR_KERNEL(attar_gemm_w##bits##_##type##_128, AttarMatmul, 256, 1) { gemm<bits, Type, 8, 4, 2>(p); }           \
  ATTAR_STREAM(bits, type, Type)                                                                                     \
  ATTAR_TILES(bits, type, Type, 8)                                                                                   \
  ATTAR_TILES(bits, type, Type, 16)                                                                                  \
  ATTAR_TILES(bits, type, Type, 32)                                                                                  \
  ATTAR_TILES(bits, type, Type, 64)                                                                                  \
  ATTAR_TILES(bits, type, Type, 128)

#define ATTAR_REPACK(layout, bits, Layout)                                                                        \
  ATTAR_KERNEL(attar_repack_##layout##_w##bits##_codes, AttarRepack, 256, 1) { repack_codes<bits, Layout>(p); }    \
  ATTAR_KERNEL(attar_repack_##layout##_w##bits##_groups, AttarRepack, 256, 1) { repack_groups<bits, Layout>(p); }

// A specialised build defines ATTAR_ONLY and says which kernels it wants.
#ifndef ATTAR_ONLY
#define ATTAR_BITS(bits)            \
  ATTAR_MATMUL(bits, f16, F16)      \
  ATTAR_MATMUL(bits, bf16, Bf16)    \
  ATTAR_REPACK(gptq, bits, Gptq)    \
  ATTAR_REPACK(ct, bits, CtPacked)
ATTAR_BITS(2)
ATTAR_BITS(3)
ATTAR_BITS(4)
ATTAR_BITS(8)
ATTAR_REPACK(awq, 4, Awq)
#else
ATTAR_ONLY
#endif
ATTAR_KERNEL(attar_arrange, AttarArrange, 256, 1) { arrange(p); }
ATTAR_KERNEL(attar_order, AttarOrder, 256, 1) { order_columns(p); }
ATTAR_KERNEL(attar_copy, AttarCopy, 256, 4) { copy_bytes(p); }
