// More tokens: codes and activations go through shared memory in a pipeline of asynchronous copies.
//
// A block of WR x WT warps multiplies 32 * WR rows by 8 * NT * WT tokens; each warp 32 rows by 8 * NT tokens. A stage of the
// pipeline is one chunk of 64 columns: WR blocks of codes as they lie in memory, and 128 bytes of each token, whose unit u of
// 16 bytes stands at place u ^ (token & 7), so that a read of one unit of eight tokens meets no bank twice.
// Registers of a thread: 16 * NT sums (totals and those of the group), 16 of decoded weights, 2 * BITS of codes.
//
// With splits the columns are shared by several blocks; whoever comes last adds their sums in the order of the splits.
//
// grid (ceil(rows / (32 * WR)), splits, ceil(m / (8 * NT * WT))), 32 * WR * WT threads, shared STAGES * (256 * BITS * WR +
// 1024 * NT * WT) + 16 bytes, partial [tiles][splits][8 * NT][threads] with tile = blockIdx.z * gridDim.x + blockIdx.x.

const int STAGES = 4;

template <int BITS, int WR, int TOKENS, int THREADS>
__device__ __forceinline__ void copy_chunk(const AttarMatmul& p, u8* stage, int chunk, int first_token) {
  const int UNITS = 16 * BITS;  // of a block of codes
  const int blocks = (p.rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
  for (int u = threadIdx.x; u < WR * UNITS; u += THREADS) {
    const int block = blockIdx.x * WR + u / UNITS;
    const bool valid = block < blocks;
    const u8* from = p.codes + (valid ? ((long long)block * p.chunks + chunk) * (256 * BITS) + u % UNITS * 16 : 0);
    copy_async(stage + u * 16, from, valid);
  }
  u8* x = stage + WR * 256 * BITS;
  for (int u = threadIdx.x; u < TOKENS * 8; u += THREADS) {
    const int token = u >> 3, unit = (u & 7) ^ (token & 7);
    const bool valid = first_token + token < p.m;
    const u16* from = p.x + (valid ? (first_token + token) * p.x_stride + (long long)chunk * CHUNK + (u & 7) * 8 : 0);
    copy_async(x + token * 128 + unit * 16, from, valid);
  }
}

template <int BITS, class T, int NT, int WR, int WT>
__device__ __forceinline__ void gemm(const AttarMatmul& p) {
  ATTAR_SHARED(shared);
  const int THREADS = 32 * WR * WT, TOKENS = 8 * NT * WT, STAGE = WR * 256 * BITS + TOKENS * 128;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int warp_row = warp % WR, warp_token = warp / WR * 8 * NT;
  const int first_token = blockIdx.z * TOKENS;
  const int first = (int)((long long)p.chunks * blockIdx.y / p.splits), end = (int)((long long)p.chunks * (blockIdx.y + 1) / p.splits);
  const int block = blockIdx.x * WR + warp_row;
  const bool inside = block * BLOCK_ROWS < p.rows;
  float total[2][NT][4], part[2][NT][4];
#pragma unroll
  for (int r = 0; r < 2; r++)
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) total[r][n][i] = part[r][n][i] = 0.0f;

#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
    if (first + s < end) copy_chunk<BITS, WR, TOKENS, THREADS>(p, shared + s * STAGE, first + s, first_token);
    copies_commit();
  }
  Groups<BITS, T> groups;
  groups.begin(p, inside ? block : 0, lane, 2 * first);
  int stage = 0;
  for (int chunk = first; chunk < end; chunk++) {
    copies_wait<STAGES - 2>();
    // Everyone's copies of this chunk are there, and everyone is done with the chunk whose place is filled next.
    __syncthreads();
    const int next = stage == 0 ? STAGES - 1 : stage - 1;
    if (chunk + STAGES - 1 < end)
      copy_chunk<BITS, WR, TOKENS, THREADS>(p, shared + next * STAGE, chunk + STAGES - 1, first_token);
    copies_commit();
    const u8* codes = shared + stage * STAGE + warp_row * 256 * BITS;
    const u8* x = shared + stage * STAGE + WR * 256 * BITS + (warp_token + (lane & 7)) * 128;
    stage = stage == STAGES - 1 ? 0 : stage + 1;
    u32 w[2 * BITS];
    shared_codes<BITS>(codes, lane, w);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      u32 a[2][2][4];
#pragma unroll
      for (int s = 0; s < 2; s++)
#pragma unroll
        for (int r = 0; r < 2; r++) Codes<BITS, T>::decode(w, r, h, s, groups.offsets[r], a[s][r]);
#pragma unroll
      for (int n = 0; n < NT; n++) {
        u32 b[4];
        load_matrices(b, x + n * 1024 + (((h * 4 + (lane >> 3)) ^ (lane & 7)) << 4));
        T::mma(part[0][n], a[0][0], b[0], b[1]);
        T::mma(part[1][n], a[0][1], b[0], b[1]);
        T::mma(part[0][n], a[1][0], b[2], b[3]);
        T::mma(part[1][n], a[1][1], b[2], b[3]);
      }
      if (--groups.left == 0) {
        fold<NT>(total, part, groups.scale);
        groups.group++;
        groups.left = p.group_halves;
        if (h == 0 || chunk + 1 < end) groups.enter(p);
      }
    }
  }
  fold<NT>(total, part, groups.scale);

  if (p.splits > 1) {
    const int tile = blockIdx.z * gridDim.x + blockIdx.x;
    float* partial = p.partial + (long long)tile * p.splits * (8 * NT * THREADS) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < 8 * NT; i++) partial[(blockIdx.y * 8 * NT + i) * THREADS] = total[i / (4 * NT)][i / 4 % NT][i & 3];
    if (!last_to_arrive(p.arrived + tile, p.splits, reinterpret_cast<u32*>(shared + STAGES * STAGE))) return;
#pragma unroll
    for (int i = 0; i < 8 * NT; i++) total[i / (4 * NT)][i / 4 % NT][i & 3] = 0.0f;
    for (int s = 0; s < p.splits; s++)
#pragma unroll
      for (int i = 0; i < 8 * NT; i++)
        total[i / (4 * NT)][i / 4 % NT][i & 3] += load_shared_sum(partial + (s * 8 * NT + i) * THREADS);
  }
  const int row = block * BLOCK_ROWS + 4 * g;
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int token = first_token + warp_token + 8 * n + 2 * t + e;
      if (token >= p.m) continue;
      u16* out = p.out + token * p.out_stride + row;
      const u16 v0 = T::of_float(total[0][n][e]), v1 = T::of_float(total[0][n][2 + e]);
      const u16 v2 = T::of_float(total[1][n][e]), v3 = T::of_float(total[1][n][2 + e]);
      if (row + 3 < p.rows && (p.out_stride & 3) == 0) {
        uint2 v;
        v.x = v0 | (u32)v1 << 16;
        v.y = v2 | (u32)v3 << 16;
        *reinterpret_cast<uint2*>(out) = v;
      } else {
        if (row < p.rows) out[0] = v0;
        if (row + 1 < p.rows) out[1] = v1;
        if (row + 2 < p.rows) out[2] = v2;
        if (row + 3 < p.rows) out[3] = v3;
      }
    }
}
