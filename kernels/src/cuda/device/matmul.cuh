// What both matmul kernels share: their argument, the groups of a lane's rows, and how sums of several blocks become one.
//
// out [m, rows] = x [m, columns] * W^T with W = (code - zero) * scale. Within a group products of integers and half
// precision numbers are summed by the tensor cores in f32; at the end of a group the sums are multiplied by its scale and
// added to the totals, in f32. Nothing is rounded to half precision but the result.

// Argument of both kernels, passed by value; the same struct stands in Rust (geometry.rs) and in the C header.
struct AttarMatmul {
  const u8* codes;      // blocks [rows / 32][chunks] of 256 * BITS bytes (codes.cuh)
  const void* scales;   // [groups][padded rows]
  const void* zeros;    // [groups][padded rows], u8, or u16 with 8 bits; null: all in the middle
  const u16* x;         // [m][x_stride], 16-byte aligned rows; columns in the order of places, padding zero
  u16* out;             // [m][out_stride]
  float* partial;       // workspace, when splits > 1
  u32* arrived;         // one zero per tile, when splits > 1; zero again afterwards
  int m, rows;          // rows: of the weight, without padding
  int chunks;           // 64 columns each
  int group_halves;     // 32 columns each: 1 or even; groups begin at chunks unless it is 1
  int scale_kind;       // 0 f16, 1 bf16, 2 f32
  int splits;           // blocks that share the columns of a tile
  long long x_stride, out_stride;  // elements
};

const int HALF = 32;         // columns of half a chunk
const int CHUNK = 64;        // columns of a chunk
const int BLOCK_ROWS = 32;   // rows of a block of codes

// Scales of four rows, of the type that `kind` numbers, as they lie in memory. No branch decides into which register a load
// goes: nothing waits for it before it is used.
__device__ __forceinline__ void load_scales(int kind, const u8* from, u32 (&raw)[4]) {
  const uint2 low = *reinterpret_cast<const uint2*>(from);
  uint2 high;
  high.x = high.y = 0;
  if (kind == 2) high = *reinterpret_cast<const uint2*>(from + 8);
  raw[0] = low.x;
  raw[1] = low.y;
  raw[2] = high.x;
  raw[3] = high.y;
}

__device__ __forceinline__ void four_scales(int kind, const u32 (&raw)[4], float (&scale)[4]) {
  if (kind == 2) {
#pragma unroll
    for (int i = 0; i < 4; i++) scale[i] = __uint_as_float(raw[i]);
  } else if (kind == 0) {
    scale[0] = float_of_f16((u16)raw[0]);
    scale[1] = float_of_f16((u16)(raw[0] >> 16));
    scale[2] = float_of_f16((u16)raw[1]);
    scale[3] = float_of_f16((u16)(raw[1] >> 16));
  } else {
    scale[0] = __uint_as_float(raw[0] << 16);
    scale[1] = __uint_as_float(raw[0] & 0xffff0000u);
    scale[2] = __uint_as_float(raw[1] << 16);
    scale[3] = __uint_as_float(raw[1] & 0xffff0000u);
  }
}

// What four rows subtract, from their zero points.
template <int BITS, class T>
__device__ __forceinline__ void registers_offsets(const u32 (&zeros)[2], Offsets<BITS, T> (&offsets)[2]) {
  if (BITS == 8) {
    offsets[0].set(zeros[0] & 0xffffu, zeros[0] >> 16);
    offsets[1].set(zeros[1] & 0xffffu, zeros[1] >> 16);
  } else {
    offsets[0].set(zeros[0] & 0xffu, zeros[0] >> 8 & 0xffu);
    offsets[1].set(zeros[0] >> 16 & 0xffu, zeros[0] >> 24);
  }
}

// Scales and zero points of the lane's four rows while it walks over half chunks.
template <int BITS, class T>
struct Groups {
  float scale[4];
  Offsets<BITS, T> offsets[2];
  u32 next_zeros[2];
  int group, left;  // left: half chunks of this group, counted down
  long long row, stride;

  // at: first half chunk.
  __device__ __forceinline__ void begin(const AttarMatmul& p, int block, int lane, int at) {
    stride = (long long)((p.rows + BLOCK_ROWS - 1) / BLOCK_ROWS) * BLOCK_ROWS;
    row = (long long)block * BLOCK_ROWS + (lane >> 2) * 4;
    group = at / p.group_halves;
    left = p.group_halves - at % p.group_halves;
    if (p.zeros) {
      load_zeros(p, group);
    } else {
      const u32 middle = 1u << (BITS - 1);
      next_zeros[0] = BITS == 8 ? middle * 0x10001u : middle * 0x01010101u;
      next_zeros[1] = next_zeros[0];
    }
    enter(p);
  }

  __device__ __forceinline__ void load_zeros(const AttarMatmul& p, int g) {
    const long long at = g * stride + row;
    if (BITS == 8) {
      const uint2 v = *reinterpret_cast<const uint2*>(static_cast<const u16*>(p.zeros) + at);
      next_zeros[0] = v.x;
      next_zeros[1] = v.y;
    } else {
      next_zeros[0] = *reinterpret_cast<const u32*>(static_cast<const u8*>(p.zeros) + at);
    }
  }

  // Zero points loaded before are taken; those of the group after this one and the scales of this one are asked for.
  __device__ __forceinline__ void enter(const AttarMatmul& p) {
    registers_offsets<BITS, T>(next_zeros, offsets);
    if (p.zeros && (group + 1) * p.group_halves < p.chunks * 2) load_zeros(p, group + 1);
    const long long at = group * stride + row;
    u32 raw[4];
    load_scales(p.scale_kind, static_cast<const u8*>(p.scales) + at * (p.scale_kind == 2 ? 4 : 2), raw);
    four_scales(p.scale_kind, raw, scale);
  }
};

// Adds the sums of a group, times its scale, and clears them. Tile r, register 2i + e: row 4g + 2r + i.
template <int NT>
__device__ __forceinline__ void fold(float (&total)[2][NT][4], float (&part)[2][NT][4], const float (&scale)[4]) {
#pragma unroll
  for (int r = 0; r < 2; r++)
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        total[r][n][i] += part[r][n][i] * scale[2 * r + (i >> 1)];
        part[r][n][i] = 0.0f;
      }
}

// Of the blocks that share a tile true in all threads of the last one: then the partial sums of all are there to be read.
__device__ __forceinline__ bool last_to_arrive(u32* arrived, int splits, u32* flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const u32 before = atomicAdd(arrived, 1u);
    *flag = before + 1 == (u32)splits;
    if (*flag) *arrived = 0;
  }
  __syncthreads();
  __threadfence();
  return *flag;
}
