// The only inline PTX of Attar. Every wrapper has a twin of the same name in ../simt/simt.hpp, which runs the same
// kernels on the CPU; a wrapper without a twin does not link there. No header of CUDA is needed: NVRTC takes this text
// alone. All pointers of 16-byte accesses are 16-byte aligned.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef ATTAR_SIMT

// Dynamic shared memory, 16-byte aligned.
#define ATTAR_SHARED(name) extern __shared__ __align__(16) u8 name[]

// (a & b) | c in one instruction.
__device__ __forceinline__ u32 and_or(u32 a, u32 b, u32 c) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Bytes of a (0..3) and b (4..7), chosen by the nibbles of selector, lowest first.
__device__ __forceinline__ u32 permute_bytes(u32 a, u32 b, u32 selector) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

// Two fused multiply-adds in half precision: a * b + c, rounded once.
__device__ __forceinline__ u32 fma_f16x2(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

__device__ __forceinline__ u32 fma_bf16x2(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

__device__ __forceinline__ float float_of_f16(u16 a) {
  float d;
  asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(a));
  return d;
}

__device__ __forceinline__ u16 f16_of_float(float a) {
  u16 d;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(d) : "f"(a));
  return d;
}

__device__ __forceinline__ u16 bf16_of_float(float a) {
  u16 d;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(d) : "f"(a));
  return d;
}

// low in the low half.
__device__ __forceinline__ u32 bf16x2_of_floats(float low, float high) {
  u32 d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

// c[16, 8] += a[16, 16] * b[16, 8] over a warp, f32 sums. Lane 4g + t holds, two to a register,
//   a0: row g,     columns 2t, 2t + 1       a1: row g + 8, the same columns
//   a2: row g,     columns 2t + 8, 2t + 9   a3: row g + 8, the same columns
//   b0: rows 2t, 2t + 1 of column g         b1: rows 2t + 8, 2t + 9 of column g
//   c0, c1: row g, columns 2t, 2t + 1       c2, c3: row g + 8, the same columns
// (PTX ISA, mma.m16n8k16, .f16 and .bf16.)
__device__ __forceinline__ void mma_f16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Read-only data that is read once: it shall not displace activations from the first-level cache.
__device__ __forceinline__ uint4 load_once(const uint4* p) {
  uint4 d;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w) : "l"(p));
  return d;
}

__device__ __forceinline__ uint2 load_once(const uint2* p) {
  uint2 d;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(d.x), "=r"(d.y) : "l"(p));
  return d;
}

// A sum that another block wrote: read past the first-level cache, which may be stale.
__device__ __forceinline__ float load_shared_sum(const float* p) {
  float d;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(d) : "l"(p) : "memory");
  return d;
}

// Four matrices of 8 rows of 16 bytes. Lane 8i + k says where row k of matrix i stands in shared memory; lane 4g + t gets, of
// row g of matrix i, bytes 4t .. 4t + 3: the right operands of two steps of mma when rows are tokens and bytes columns.
__device__ __forceinline__ void load_matrices(u32 (&d)[4], const void* row) {
  asm volatile("{ .reg .u64 t; .reg .u32 a; cvta.to.shared.u64 t, %4; cvt.u32.u64 a, t;"
               "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [a]; }"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "l"(row)
               : "memory");
}

// Starts a copy of 16 bytes from global to shared memory, of zeros when not valid (then nothing is read).
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
  u32 to;
  asm("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }" : "=r"(to) : "l"(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid ? 16 : 0) : "memory");
}

// Ends a group of copies of this thread.
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the N newest groups of this thread are under way.
template <int N>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#endif
