// Many tokens on compute capability 9.0: decoded weights in registers, activations in shared memory.
//
// A block has three warpgroups, four up to 16 tokens, of which all but the last multiply: with up to 64 tokens the same 128 rows,
// stages in turn, whose sums they add at the end; with 128 tokens each has 128 rows of its own. A warp decodes blocks of 32 rows.
// The four warps of the last group fetch stages of 128 columns, in turn: codes, scales and zero points in bulk as they lie in memory; activations 16
// bytes at a time, unit u of a token and chunk at place u ^ (token & 7), tokens at multiples of 1024 bytes by eights (which is
// what the tensor cores call K-major with a swizzle of 128 bytes). When its copies have landed, a stage's barrier knows.
//
// Sums become part of the totals, times the scale, at the end of each of FOLDS equal parts of a stage; FOLDS is 1 when groups have
// a multiple of 128 columns, else 4.
//
// Up to 32 tokens every warp multiplies for itself, by mma.sync: N / 4 for each step of 16 columns, two tiles of 16 rows by N / 8
// eights of tokens, which no sum ties to each other. A tensor core takes a product every 6 to 8 cycles, 2 N of them for a warp and
// stage: 96 to 128 cycles with 8 tokens, 192 to 256 with 16, 384 to 512 with 32, where memory takes about 480 for a stage of 4
// bits. (wgmma with weights in registers takes 40 cycles more than its share of the rate, 16 times for a stage.) A warp issues
// 255 to 290, 290 to 320 and 340 to 375 instructions for a stage of 4 bits, its share of fetching about 55. Estimates; not timed.
//
// From 64 tokens on by wgmma. A unit of work is a tile of 16 rows of each warp, of 64 rows of a warpgroup, times a part of a
// stage. With 64 tokens a unit is decoded while the tensor cores work on the one before. With 128 the registers hold one set
// of sums; every step of 16 columns is decoded while the one before it is multiplied.
//
// With splits a cluster of blocks shares the columns: each leaves its sums in its own shared memory, and a block adds those of
// all, in their order, for its share of the tokens.
//
// grid (ceil(rows / ROWS), splits, ceil(m / N)) with ROWS 128, or 256 for 128 tokens, clusters of (1, splits, 1), 384 or 512
// threads, shared 1024 + stages * (stage + 16).

#ifdef ATTAR_HOPPER

// Bytes of a stage, and how many stages a block of this kernel has.
template <int BITS, int N, int FOLDS>
struct Stage {
  static const int ROWS = N <= 64 ? 128 : 256, BLOCKS = ROWS / BLOCK_ROWS;
  // Warpgroups that share the columns of the same rows; warps that multiply.
  static const int SHARERS = N <= 16 ? 3 : N <= 64 ? 2 : 1, WARPS = SHARERS * BLOCKS, THREADS = 32 * (WARPS + 4);
  static const int CODES = N * 256, SCALES = CODES + 512 * BITS * BLOCKS, ZEROS = SCALES + FOLDS * 4 * ROWS;
  static const int BYTES = (ZEROS + FOLDS * 2 * ROWS + 1023) / 1024 * 1024;
  static const int MOST = N <= 32 ? 12 : 8, FIT = 225 * 1024 / (BYTES + 16), COUNT = FIT < MOST ? FIT : MOST;
};

// A warp that fetches every fourth stage of a block.
template <int BITS, int N, int FOLDS>
struct Fetcher {
  typedef Stage<BITS, N, FOLDS> S;
  const AttarMatmul& p;
  const u16* x;             // this lane's unit of its first token
  const u8 *codes, *scales, *zeros;
  long long code_stride, x_stride;
  u32 scale_bytes, zero_bytes, scale_stride, zero_stride;
  int lane, chunk, tokens, blocks, group, left;  // tokens: from the lane's first one on; left: halves of the group

  // chunk: first of the first stage.
  __device__ __forceinline__ Fetcher(const AttarMatmul& p, int chunk, int first_token, int lane) : p(p), lane(lane), chunk(chunk) {
    const int all = (p.rows + BLOCK_ROWS - 1) / BLOCK_ROWS, first = blockIdx.x * S::BLOCKS;
    blocks = all - first < S::BLOCKS ? all - first : S::BLOCKS;
    code_stride = (long long)p.chunks * (256 * BITS);
    codes = p.codes + first * code_stride + (long long)chunk * (256 * BITS);
    const int size = p.scale_kind == 2 ? 4 : 2, zero_size = BITS == 8 ? 2 : 1;
    scale_bytes = blocks * BLOCK_ROWS * size;
    zero_bytes = p.zeros ? blocks * BLOCK_ROWS * zero_size : 0;
    scale_stride = all * BLOCK_ROWS * size;
    zero_stride = all * BLOCK_ROWS * zero_size;
    scales = static_cast<const u8*>(p.scales) + first * BLOCK_ROWS * size;
    zeros = static_cast<const u8*>(p.zeros) + first * BLOCK_ROWS * zero_size;
    group = 2 * chunk / p.group_halves;
    left = p.group_halves - 2 * chunk % p.group_halves;
    // Half a warp for each token: two chunks of 8 units.
    const int odd = lane >> 4;
    tokens = p.m - first_token - odd;
    x = p.x + (first_token + odd) * p.x_stride + (long long)chunk * CHUNK + (lane & 15) * 8;
    x_stride = 2 * p.x_stride;
  }

  // A stage to this place, which is free; then to the next but three.
  __device__ __forceinline__ void stage(u8* to, u32 full) {
    const u32 place = shared_address(to);
    const int chunks = p.chunks - chunk < 2 ? 1 : 2;
    if (elected()) {
      barrier_expect(full, blocks * chunks * 256 * BITS + FOLDS * (scale_bytes + zero_bytes));
#pragma unroll 4
      for (int b = 0; b < blocks; b++) copy_bulk(place + S::CODES + b * (512 * BITS), codes + b * code_stride, chunks * 256 * BITS, full);
    }
    int fold_group = group, fold_left = left;
    const int last = (2 * p.chunks - 1) / p.group_halves;
#pragma unroll
    for (int fold = 0; fold < FOLDS; fold++) {
      const int at = fold_group < last ? fold_group : last;
      if (elected()) {
        copy_bulk(place + S::SCALES + fold * (4 * S::ROWS), scales + (long long)at * scale_stride, scale_bytes, full);
        if (zero_bytes) copy_bulk(place + S::ZEROS + fold * (2 * S::ROWS), zeros + (long long)at * zero_stride, zero_bytes, full);
      }
      if (--fold_left == 0) {
        fold_left = p.group_halves;
        fold_group++;
      }
    }
    const int half = lane >> 3 & 1, odd = lane >> 4;
    const u16* from = x;
    u8* row = to + half * (N * 128) + odd * 128;
    int valid = half < chunks ? tokens : 0;
#pragma unroll 1
    for (int i = 0; i < N / 8; i++) {
#pragma unroll
      for (int k = 0; k < 4; k++) {
        copy_async(row + k * 256 + (((lane & 7) ^ (2 * k + odd)) << 4), valid > 0 ? from : p.x, valid > 0);
        from += x_stride;
        valid -= 2;
      }
      row += 1024;
    }
    barrier_arrive_with_copies(full);
    chunk += 8;
    codes += 8 * 256 * BITS;
    x += 8 * CHUNK;
    left -= 16;
    while (left <= 0) {
      left += p.group_halves;
      group++;
    }
  }
};

// Where operand B of step (chunk, h, s) stands: K-major, swizzle of 128 bytes, 1024 bytes from eight tokens to the next.
__device__ __forceinline__ u64 operand_b(u32 tokens) {
  return (u64)1 << 62 | (u64)64 << 32 | (u64)1 << 16 | (u64)(tokens >> 4 & 0x3fff);
}

template <int BITS, class T, int N, int FOLDS>
struct HopperTile {
  const AttarMatmul& p;
  const int lane, warp;  // warp: block of rows within the tile
  float total[2][N / 8][4];
  Offsets<BITS, T> offset[2];  // of weights without zero points
  typedef Stage<BITS, N, FOLDS> S;

  __device__ __forceinline__ HopperTile(const AttarMatmul& p, int lane, int warp) : p(p), lane(lane), warp(warp) {
    const u32 middle = BITS == 8 ? 0x00800080u : (1u << (BITS - 1)) * 0x01010101u, middles[2] = {middle, middle};
    registers_offsets<BITS, T>(middles, offset);
  }

  __device__ __forceinline__ void offsets(const u8* stage, int r, int fold, Offsets<BITS, T>& o) const {
    const u8* zeros = stage + S::ZEROS + fold * (2 * S::ROWS);
    const int row = warp * 32 + (lane >> 2) * 4 + 2 * r;
    u32 pair = 1u << (BITS - 1) | 1u << (BITS + 15);
    if (p.zeros) {
      if (BITS == 8) {
        pair = *reinterpret_cast<const u32*>(zeros + 2 * row);
      } else {
        const u32 v = *reinterpret_cast<const u16*>(zeros + row);
        pair = (v & 0xffu) | (v & 0xff00u) << 8;
      }
    }
    o.set(pair & 0xffffu, pair >> 16);
  }

  // Sums of tile r times its scale.
  __device__ __forceinline__ void add(const u8* stage, int r, int fold, float (&part)[N / 8][4]) {
    const u8* scales = stage + S::SCALES + fold * (4 * S::ROWS);
    const int row = warp * 32 + (lane >> 2) * 4 + 2 * r;
    float scale[2];
    if (p.scale_kind == 2) {
      const uint2 v = *reinterpret_cast<const uint2*>(scales + 4 * row);
      scale[0] = __uint_as_float(v.x);
      scale[1] = __uint_as_float(v.y);
    } else {
      const u32 v = *reinterpret_cast<const u32*>(scales + 2 * row);
      scale[0] = p.scale_kind == 0 ? float_of_f16((u16)v) : __uint_as_float(v << 16);
      scale[1] = p.scale_kind == 0 ? float_of_f16((u16)(v >> 16)) : __uint_as_float(v & 0xffff0000u);
    }
#pragma unroll
    for (int n = 0; n < N / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        products_done(part[n][i]);
        total[r][n][i] += part[n][i] * scale[i >> 1];
      }
  }

  // Up to 32 tokens: by warps. A step has its 16 columns in two units of a chunk, 2s and 2s + 1 with s = step & 3.
  __device__ __forceinline__ void warps(const u8* stage) {
    const int STEPS = 8 / FOLDS, LOADS = N == 32 ? 2 : 1;  // load_matrices of a step; with 8 tokens one is for two steps
    // Matrices of a load: with 8 tokens units 2s .. 2s + 3, else units 2s, 2s + 1 of eight tokens, then of the next eight.
    const int k = lane & 7, i = lane >> 3, unit = N == 8 ? i : i & 1, eight = N == 8 ? 0 : i >> 1;
    const u32 x = shared_address(stage) + eight * 1024 + k * 128 + ((unit ^ k) << 4);
    const u8* codes = stage + S::CODES + warp * (512 * BITS);
    u32 w[2][2 * BITS], b[8][LOADS][4], raw[FOLDS][4];
#pragma unroll
    for (int chunk = 0; chunk < 2; chunk++) {
      shared_codes<BITS>(codes + chunk * (256 * BITS), lane, w[chunk]);
#pragma unroll
      for (int s = 0; s < 4; s += N == 8 ? 2 : 1)
#pragma unroll
        for (int load = 0; load < LOADS; load++) load_matrices(b[4 * chunk + s][load], (x ^ (s << 5)) + chunk * (N * 128) + load * 2048);
    }
    float part[2][N / 8][4];
#pragma unroll
    for (int step = 0; step < 8; step++) {
      if (step % STEPS == 0) {
        const int fold = step / STEPS, row = warp * 32 + (lane >> 2) * 4;
        load_scales(p.scale_kind, stage + S::SCALES + fold * (4 * S::ROWS) + row * (p.scale_kind == 2 ? 4 : 2), raw[fold]);
        if (p.zeros) {
          const u32* zeros = reinterpret_cast<const u32*>(stage + S::ZEROS + fold * (2 * S::ROWS) + row * (BITS == 8 ? 2 : 1));
          const u32 four[2] = {zeros[0], BITS == 8 ? zeros[1] : 0};
          registers_offsets<BITS, T>(four, offset);
        }
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
          for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) part[r][n][e] = 0.0f;
      }
#pragma unroll
      for (int r = 0; r < 2; r++) {
        u32 a[4];
        Codes<BITS, T>::decode(w[step >> 2], r, step >> 1 & 1, step & 1, offset[r], a);
#pragma unroll
        for (int n = 0; n < N / 8; n++) {
          const u32(&right)[4] = b[N == 8 ? step & ~1 : step][n >> 1];
          const int first = N == 8 ? 2 * (step & 1) : 2 * (n & 1);
          T::mma(part[r][n], a, right[first], right[first + 1]);
        }
      }
      if ((step + 1) % STEPS == 0) {
        float scale[4];
        four_scales(p.scale_kind, raw[step / STEPS], scale);
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
          for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) total[r][n][e] += part[r][n][e] * scale[2 * r + (e >> 1)];
      }
    }
  }

  // 64 tokens: a unit is decoded while the one before it is multiplied.
  __device__ __forceinline__ void units(const u8* stage, u64 b) {
    const int STEPS = 8 / FOLDS;
    float part[2][N / 8][4];
    u32 a[2][STEPS][4];
#pragma unroll
    for (int unit = 0; unit < 2 * FOLDS; unit++) {
      const int r = unit / FOLDS, fold = unit % FOLDS;
      Offsets<BITS, T> o;
      offsets(stage, r, fold, o);
      const u8* codes = stage + S::CODES + warp * (512 * BITS);
      u32 w[2 * BITS];
#pragma unroll
      for (int k = 0; k < STEPS; k++) {
        const int step = fold * STEPS + k;
        if (k == 0 || step == 4) tile_codes<BITS>(codes + (step >> 2) * (256 * BITS), lane, r, w);
        Codes<BITS, T>::decode(w, r, step >> 1 & 1, step & 1, o, a[unit & 1][k]);
      }
      products_fence();
#pragma unroll
      for (int k = 0; k < STEPS; k++) {
        const int step = fold * STEPS + k;
        T::products(part[unit & 1], a[unit & 1][k], b + (step >> 2) * (N * 8) + (step & 3) * 2, k > 0);
      }
      products_commit();
      if (unit > 0) {
        products_wait<1>();
        add(stage, (unit - 1) / FOLDS, (unit - 1) % FOLDS, part[(unit - 1) & 1]);
      }
    }
    products_wait<0>();
    add(stage, 1, FOLDS - 1, part[1]);
  }

  // Many tokens: step by step.
  __device__ __forceinline__ void steps(const u8* stage, u64 b) {
    const int STEPS = 8 / FOLDS;
    float part[N / 8][4];
    u32 a[2][4], w[2 * BITS];
    Offsets<BITS, T> o;
    const u8* codes = stage + S::CODES + warp * (512 * BITS);
    offsets(stage, 0, 0, o);
    tile_codes<BITS>(codes, lane, 0, w);
    Codes<BITS, T>::decode(w, 0, 0, 0, o, a[0]);
#pragma unroll
    for (int q = 0; q < 16; q++) {
      const int r = q / 8, step = q % 8, k = step % STEPS;
      products_fence();
      T::products(part, a[q & 1], b + (step >> 2) * (N * 8) + (step & 3) * 2, k > 0);
      products_commit();
      if (q < 15) {
        const int next = (q + 1) % 8, next_r = (q + 1) / 8;
        if (next % STEPS == 0) offsets(stage, next_r, next / STEPS, o);
        if (next % 4 == 0) tile_codes<BITS>(codes + (next >> 2) * (256 * BITS), lane, next_r, w);
        products_wait<1>();
        Codes<BITS, T>::decode(w, next_r, next >> 1 & 1, next & 1, o, a[(q + 1) & 1]);
      }
      if (k == STEPS - 1) {
        products_wait<0>();
        add(stage, r, step / STEPS, part);
      }
    }
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
      for (int n = 0; n < N / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) total[r][n][i] = 0.0f;
  }

  // Four rows of one of the lane's N / 4 tokens.
  __device__ __forceinline__ float4 four(int u) const {
    const int n = u >> 1, e = u & 1;
    return make_float4(total[0][n][e], total[0][n][2 + e], total[1][n][e], total[1][n][2 + e]);
  }

  __device__ __forceinline__ void store(int first_token, int u, const float4& v) const {
    const int n = u >> 1, e = u & 1, row = (blockIdx.x * S::BLOCKS + warp) * BLOCK_ROWS + (lane >> 2) * 4;
    const int token = first_token + 8 * n + 2 * (lane & 3) + e;
    if (token >= p.m) return;
    u16* out = p.out + token * p.out_stride + row;
    const u16 v0 = T::of_float(v.x), v1 = T::of_float(v.y), v2 = T::of_float(v.z), v3 = T::of_float(v.w);
    if (row + 3 < p.rows && (p.out_stride & 3) == 0) {
      uint2 four;
      four.x = v0 | (u32)v1 << 16;
      four.y = v2 | (u32)v3 << 16;
      *reinterpret_cast<uint2*>(out) = four;
    } else {
      if (row < p.rows) out[0] = v0;
      if (row + 1 < p.rows) out[1] = v1;
      if (row + 2 < p.rows) out[2] = v2;
      if (row + 3 < p.rows) out[3] = v3;
    }
  }
};

template <int BITS, class T, int N, int FOLDS>
__device__ __forceinline__ void hopper(const AttarMatmul& p) {
  typedef Stage<BITS, N, FOLDS> S;
  const int SHARERS = S::SHARERS;
  ATTAR_SHARED(unaligned);
  u8* shared = unaligned + ((0u - shared_address(unaligned)) & 1023u);
  const u32 full = shared_address(shared + S::COUNT * S::BYTES), empty = full + 8 * S::COUNT;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int first_token = blockIdx.z * N;
  // The first stage of a block.
  const auto first_of = [&](u32 split) { return (int)((p.chunks + 1) / 2 * split / (u32)p.splits); };
  if (warp >= S::WARPS) {
    fewer_registers<56>();
    const int first = first_of(blockIdx.y), count = first_of(blockIdx.y + 1) - first;
    int n = warp - S::WARPS;
    if (lane == 0) {
      for (int s = n; s < S::COUNT; s += 4) {
        barrier_begin(full + 8 * s, 32);
        barrier_begin(empty + 8 * s, S::BLOCKS);
      }
      barriers_ready();
    }
    __syncwarp();
    Fetcher<BITS, N, FOLDS> fetcher(p, 2 * (first + n), first_token, lane);
    // First what there is room for, to barriers that this warp began: nobody waits for the others before.
#pragma unroll 1
    for (int pass = 0; pass < 2; pass++) {
      const int end = pass == 0 && count > S::COUNT ? S::COUNT : count;
#pragma unroll 1
      for (; n < end; n += 4) {
        const int slot = (u32)n % S::COUNT;
        if (n >= S::COUNT) barrier_wait(empty + 8 * slot, ((u32)n / S::COUNT - 1) & 1);
        fetcher.stage(shared + slot * S::BYTES, full + 8 * slot);
      }
      if (pass == 0) __syncthreads();
    }
    // Blocks of a cluster wait for each other with all their threads.
    if (p.splits > 1) {
      cluster_barrier();
      cluster_barrier();
    }
    return;
  }
  // A block of 3 or 4 warpgroups was given 168 or 128 registers a thread: 56 + 2 * 224 = 3 * 168, 56 + 3 * 152 = 4 * 128. More would
  // never be granted.
  more_registers<S::THREADS == 384 ? 224 : 152>();
  __syncthreads();
  const int count = first_of(blockIdx.y + 1) - first_of(blockIdx.y);
  HopperTile<BITS, T, N, FOLDS> tile(p, lane, warp % S::BLOCKS);
  tile.clear();
  const int sharer = SHARERS == 1 ? 0 : warp / S::BLOCKS;
  for (int n = sharer; n < count; n += SHARERS) {
    const int slot = (u32)n % S::COUNT;
    const u8* stage = shared + slot * S::BYTES;
    barrier_wait(full + 8 * slot, (u32)n / S::COUNT & 1);
    if (N > 32) copies_to_tensor_cores();
    if constexpr (N <= 32)
      tile.warps(stage);
    else if constexpr (N == 64)
      tile.units(stage, operand_b(shared_address(stage)));
    else
      tile.steps(stage, operand_b(shared_address(stage)));
    __syncwarp();
    if (lane == 0) barrier_arrive(empty + 8 * slot);
  }
  if (SHARERS == 1 && p.splits == 1) {
#pragma unroll
    for (int u = 0; u < N / 4; u++) tile.store(first_token, u, tile.four(u));
    return;
  }
  // [sharer][N / 4][thread][4]: four rows of a token. Nothing is on its way into the stages any more: all were waited for.
  const int THREADS = 32 * S::BLOCKS;
  consumers_barrier<32 * S::WARPS>();
  float4* mine = reinterpret_cast<float4*>(shared) + threadIdx.x % THREADS;
#pragma unroll
  for (int u = 0; u < N / 4; u++) mine[(sharer * (N / 4) + u) * THREADS] = tile.four(u);
  if (SHARERS == 1 || p.splits > 1)
    cluster_barrier();
  else
    consumers_barrier<32 * S::WARPS>();
#pragma unroll 1
  for (int u = blockIdx.y * SHARERS + sharer; u < N / 4; u += p.splits * SHARERS) {
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll(N <= 64 ? 4 : 1)
    for (int s = 0; s < p.splits * SHARERS; s++) {
      const float4* from = mine + (s % SHARERS * (N / 4) + u) * THREADS;
      const float4 more = SHARERS == 1 || p.splits > 1 ? load_of_block(from, s / SHARERS) : *from;
      sum.x += more.x;
      sum.y += more.y;
      sum.z += more.z;
      sum.w += more.w;
    }
    tile.store(first_token, u, sum);
  }
  if (SHARERS == 1 || p.splits > 1) cluster_barrier();
}

#endif
