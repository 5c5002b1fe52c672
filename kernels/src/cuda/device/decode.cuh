// Few tokens: the weights stream from memory to registers once, at the speed of memory.
//
// A block of 8 warps multiplies 32 rows by up to 8 * NT tokens. Each warp takes a contiguous range of chunks, holds the codes
// of the next DEPTH chunks in registers (DEPTH * 256 * BITS bytes under way per warp) and the activations of the next one,
// which come from the first-level cache. The warps' sums are added in the order of the warps, then, with splits, in the
// order of the splits by whichever block comes last: the bits do not depend on time.
//
// grid (ceil(rows / 32), splits, ceil(m / (8 * NT))), 256 threads, shared 8192 * NT + 16 bytes,
// partial [tiles][splits][256 * NT] with tile = blockIdx.z * gridDim.x + blockIdx.x.

const int DECODE_WARPS = 8;

template <int BITS, int NT>
struct Depth {
  static const int VALUE = BITS == 8 || (NT > 1 && BITS > 2) ? 2 : 4;
};

template <int NT>
__device__ __forceinline__ void load_x(const AttarMatmul& p, int token, int chunk, int t, u32 (&x)[NT][8]) {
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const bool valid = token + 8 * n < p.m;
    const u32* from = reinterpret_cast<const u32*>(p.x + (valid ? (token + 8 * n) * p.x_stride + (long long)chunk * CHUNK : 0)) + t;
#pragma unroll
    for (int i = 0; i < 8; i++) x[n][i] = valid ? from[4 * i] : 0;
  }
}

template <int BITS, class T, int NT>
__device__ __forceinline__ void decode(const AttarMatmul& p) {
  ATTAR_SHARED(shared);
  const int DEPTH = Depth<BITS, NT>::VALUE, BYTES = 256 * BITS;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int ranges = p.splits * DECODE_WARPS, range = blockIdx.y * DECODE_WARPS + warp;
  const int first = (int)((long long)p.chunks * range / ranges), end = (int)((long long)p.chunks * (range + 1) / ranges);
  const int first_token = blockIdx.z * 8 * NT;
  float total[2][NT][4], part[2][NT][4];
#pragma unroll
  for (int r = 0; r < 2; r++)
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) total[r][n][i] = part[r][n][i] = 0.0f;

  if (first < end) {
    const u8* codes = p.codes + ((long long)blockIdx.x * p.chunks + first) * BYTES;
    u32 w[DEPTH][2 * BITS], x[2][NT][8];
#pragma unroll
    for (int d = 0; d < DEPTH; d++)
      if (first + d < end) load_codes<BITS>(codes + d * BYTES, lane, w[d]);
    load_x<NT>(p, first_token + g, first, t, x[0]);
    Groups<BITS, T> groups;
    groups.begin(p, blockIdx.x, lane, 2 * first);
    for (int at = first; at < end; at += DEPTH) {
#pragma unroll
      for (int d = 0; d < DEPTH; d++) {
        const int chunk = at + d;
        if (chunk >= end) break;
        if (chunk + 1 < end) load_x<NT>(p, first_token + g, chunk + 1, t, x[(d + 1) & 1]);
#pragma unroll
        for (int h = 0; h < 2; h++) {
#pragma unroll
          for (int s = 0; s < 2; s++) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
              u32 a[4];
              Codes<BITS, T>::decode(w[d], r, h, s, groups.offsets[r], a);
#pragma unroll
              for (int n = 0; n < NT; n++) T::mma(part[r][n], a, x[d & 1][n][4 * h + 2 * s], x[d & 1][n][4 * h + 2 * s + 1]);
            }
          }
          if (--groups.left == 0) {
            fold<NT>(total, part, groups.scale);
            groups.group++;
            groups.left = p.group_halves;
            if (h == 0 || chunk + 1 < end) groups.enter(p);
          }
        }
        if (chunk + DEPTH < end) load_codes<BITS>(codes + (long long)(chunk - first + DEPTH) * BYTES, lane, w[d]);
      }
    }
    // Nothing when the range ended with a group: the sums are zero then.
    fold<NT>(total, part, groups.scale);
  }

  // [warp][token][row]
  float* sums = reinterpret_cast<float*>(shared);
  u32* flag = reinterpret_cast<u32*>(shared + 8192 * NT);
#pragma unroll
  for (int r = 0; r < 2; r++)
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        sums[warp * 256 * NT + (8 * n + 2 * t + (i & 1)) * 32 + 4 * g + 2 * r + (i >> 1)] = total[r][n][i];
  __syncthreads();
  float sum[NT];
#pragma unroll
  for (int n = 0; n < NT; n++) {
    sum[n] = 0.0f;
    for (int w = 0; w < DECODE_WARPS; w++) sum[n] += sums[w * 256 * NT + n * 256 + threadIdx.x];
  }
  if (p.splits > 1) {
    const int tile = blockIdx.z * gridDim.x + blockIdx.x;
    float* partial = p.partial + (long long)tile * p.splits * (256 * NT);
#pragma unroll
    for (int n = 0; n < NT; n++) partial[blockIdx.y * 256 * NT + n * 256 + threadIdx.x] = sum[n];
    if (!last_to_arrive(p.arrived + tile, p.splits, flag)) return;
#pragma unroll
    for (int n = 0; n < NT; n++) {
      sum[n] = 0.0f;
      for (int s = 0; s < p.splits; s++) sum[n] += load_shared_sum(partial + s * 256 * NT + n * 256 + threadIdx.x);
    }
  }
  const int row = blockIdx.x * 32 + (threadIdx.x & 31);
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const int token = first_token + 8 * n + (threadIdx.x >> 5);
    if (row < p.rows && token < p.m) p.out[token * p.out_stride + row] = T::of_float(sum[n]);
  }
}
