// Up to eight tokens on compute capability 9.0: the weights stream through shared memory once, in bulk, at the speed of memory.
//
// A block of 8 warps multiplies 32 rows by up to 8 tokens, then the rows that follow gridDim.x blocks of 32 behind them, and
// so on. Each warp takes the same contiguous range of columns of all of them, in stages of 256, and has a pipeline of its own
// that does not end with the rows: places for DEPTH stages, each with a barrier at which the copies of a stage arrive: codes
// as they lie in memory, and 512 bytes of each token. Scales and zero points are loaded one stage ahead. Sums become part of
// the totals, times the scale, after each of FOLDS equal parts of a stage: 2 when groups have a multiple of 128 columns, else
// 8 (then scales are not loaded ahead). When all warps are done with 32 rows, one of them, each in turn, adds their totals in
// the order of the warps: the bits do not depend on time. No other warp waits for that, unless it is two turns ahead.
//
// The first copies start before anything else is worked out: 16 warps of a multiprocessor share its instructions.
//
// grid (x <= ceil(rows / 32), 1, ceil(m / 8)), 256 threads, shared 32 + 8 * StreamPlace::bytes(min(m, 8)).

#ifdef ATTAR_HOPPER

template <int BITS>
struct StreamPlace {
  static const int DEPTH = BITS <= 3 ? 3 : 2, X = 1024 * BITS, TOKEN = 528;
  static __device__ __forceinline__ int stage(int tokens) { return X + tokens * TOKEN; }
  // Of a warp: barriers, totals of two blocks of rows in turn, stages.
  static __device__ __forceinline__ int bytes(int tokens) { return 32 + 256 * tokens + DEPTH * stage(tokens); }
};

template <int BITS, class T, int FOLDS>
__device__ __forceinline__ void stream(const AttarMatmul& p) {
  typedef StreamPlace<BITS> S;
  ATTAR_SHARED(shared);
  const int WARPS = 8;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int all = (p.chunks + 3) / 4, blocks = (p.rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
  const int first = (u32)(all * warp) / WARPS, count = (int)((u32)(all * (warp + 1)) / WARPS) - first;  // stages of the warp
  const int first_token = blockIdx.z * 8, tokens = p.m - first_token < 8 ? p.m - first_token : 8, room = p.m < 8 ? p.m : 8;
  const int stage_bytes = S::stage(room);
  // Barriers of the block: totals of even and odd turns complete, 8 bytes each, then the same added.
  const u32 turn_barriers = shared_address(shared);
  u8* mine = shared + 32 + warp * S::bytes(room);
  float* sums = reinterpret_cast<float*>(mine + 32);
  u8* stages = mine + 32 + 256 * room;
  const u32 barriers = shared_address(mine), places = shared_address(stages);

  // The next stage to be fetched; none when next_block is behind the last.
  const u16* x = p.x + first_token * p.x_stride + (long long)first * (4 * CHUNK);
  const u8* next_codes = p.codes + ((long long)blockIdx.x * p.chunks + 4 * first) * (256 * BITS);
  const long long to_next_rows = ((long long)gridDim.x * p.chunks - 4 * count) * (256 * BITS);
  int next = 0, next_block = count > 0 ? blockIdx.x : blocks;
  const int last_chunks = p.chunks - 4 * (first + count - 1) < 4 ? p.chunks - 4 * (first + count - 1) : 4;
  const auto fetch = [&](u32 to, u32 barrier) {
    if (elected()) {
      const int chunks = next == count - 1 ? last_chunks : 4;
      barrier_announce(barrier, chunks * (256 * BITS + 128 * tokens));
      copy_bulk(to, next_codes, chunks * 256 * BITS, barrier);
      copy_bulk(to + S::X, x + next * (4 * CHUNK), chunks * 128, barrier);
      for (int token = 1; token < tokens; token++)
        copy_bulk(to + S::X + token * S::TOKEN, x + token * p.x_stride + next * (4 * CHUNK), chunks * 128, barrier);
    }
    next_codes += 1024 * BITS;
    if (++next == count) {
      next = 0;
      next_block += gridDim.x;
      next_codes += to_next_rows;
    }
  };
  if (lane == 0) {
    for (int s = 0; s < S::DEPTH; s++) barrier_begin(barriers + 8 * s, 1);
    if (warp == 0) {
      for (int s = 0; s < 4; s++) barrier_begin(turn_barriers + 8 * s, s < 2 ? WARPS : 1);
    }
    barriers_ready();
  }
  __syncwarp();
#pragma unroll 1
  for (int n = 0; n < S::DEPTH; n++)
    if (next_block < blocks) fetch(places + n * stage_bytes, barriers + 8 * n);

  // Scales and zero points of the lane's rows of the next part that is loaded, and how many parts of its group are left.
  // A single group may have any size: there is none behind it.
  const int some = p.group_halves * FOLDS / 8, parts = some > 0 ? some : 1, left0 = parts - first * FOLDS % parts, last_group = (2 * p.chunks - 1) / p.group_halves;
  const int scale_size = p.scale_kind == 2 ? 4 : 2;
  const long long padded = (long long)blocks * BLOCK_ROWS, row0 = blockIdx.x * BLOCK_ROWS + 4 * g;
  int group = first * FOLDS / parts, left = left0, loaded = 0;
  long long row = row0;
  struct Constants {
    u32 scale[4], zero[2];
  };
  const auto load = [&](Constants& c) {
    // Parts behind the last column have the scales of the last group; their sums are zero.
    const long long at = (group < last_group ? group : last_group) * padded + row;
    load_scales(p.scale_kind, static_cast<const u8*>(p.scales) + at * scale_size, c.scale);
    if (p.zeros) {
      const u8* zeros = static_cast<const u8*>(p.zeros) + at * (BITS == 8 ? 2 : 1);
      c.zero[0] = *reinterpret_cast<const u32*>(zeros);
      if (BITS == 8) c.zero[1] = *reinterpret_cast<const u32*>(zeros + 4);
    }
    if (--left == 0) {
      left = parts;
      group++;
    }
    if (++loaded == count * FOLDS) {
      loaded = 0;
      left = left0;
      group = first * FOLDS / parts;
      row += gridDim.x * BLOCK_ROWS;
      // Nothing is multiplied with what is loaded behind the last rows.
      if (row >= padded) row = row0;
    }
  };

  // Lanes without a token take the last one's: what comes of it is written nowhere.
  const int token = (lane & 7) < tokens ? lane & 7 : tokens - 1;
  const u32 lane_x = places + S::X + token * S::TOKEN + (lane >> 3) * 16;
  Offsets<BITS, T> offsets[2];
  const u32 middle = BITS == 8 ? 0x00800080u : (1u << (BITS - 1)) * 0x01010101u, middles[2] = {middle, middle};
  registers_offsets<BITS, T>(middles, offsets);
  Constants ahead[FOLDS == 2 ? 2 : 1];
  if (FOLDS == 2 && count > 0) {
    load(ahead[0]);
    load(ahead[1]);
  }
  __syncthreads();  // the block's barriers have begun
  int at = 0, slot = 0, parity = 0;  // at: bytes from place to place
  for (int turn = 0, block = blockIdx.x; block < blocks; turn++, block += gridDim.x) {
    float total[2][4];
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
      for (int i = 0; i < 4; i++) total[r][i] = 0.0f;
    for (int n = 0; n < count; n++) {
      Constants now[FOLDS == 2 ? 2 : 1];
      if (FOLDS == 2) {
        now[0] = ahead[0];
        now[1] = ahead[1];
        load(ahead[0]);
        load(ahead[1]);
      }
      barrier_wait(barriers + 8 * slot, parity);
      const u8* stage = stages + at;
      const int here = n == count - 1 ? last_chunks : 4;
      float part[2][4];
#pragma unroll
      for (int c = 0; c < 4; c++) {
        if (c > 0 && c >= here) break;
        u32 w[2 * BITS];
        shared_codes<BITS>(stage + c * (256 * BITS), lane, w);
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int q = 2 * c + h;
          Constants& mine_now = now[FOLDS == 2 ? q / 4 : 0];
          if (q % (8 / FOLDS) == 0) {
            if (FOLDS > 2) load(mine_now);
            if (p.zeros) registers_offsets<BITS, T>(mine_now.zero, offsets);
#pragma unroll
            for (int r = 0; r < 2; r++)
#pragma unroll
              for (int i = 0; i < 4; i++) part[r][i] = 0.0f;
          }
          u32 b[4];
          load_matrices(b, lane_x + at + q * 64);
#pragma unroll
          for (int s = 0; s < 2; s++) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
              u32 a[4];
              Codes<BITS, T>::decode(w, r, h, s, offsets[r], a);
              T::mma(part[r], a, b[2 * s], b[2 * s + 1]);
            }
          }
          if ((q + 1) % (8 / FOLDS) == 0 || (h == 1 && c + 1 == here)) {
            float scale[4];
            four_scales(p.scale_kind, mine_now.scale, scale);
#pragma unroll
            for (int r = 0; r < 2; r++)
#pragma unroll
              for (int i = 0; i < 4; i++) total[r][i] += part[r][i] * scale[2 * r + (i >> 1)];
          }
        }
      }
      // Parts of the stage that hold no columns.
      if (FOLDS > 2 && here < 4)
        for (int q = 2 * here; q < 8; q++) load(now[0]);
      __syncwarp();
      if (next_block < blocks) fetch(places + at, barriers + 8 * slot);
      at += stage_bytes;
      if (++slot == S::DEPTH) {
        at = slot = 0;
        parity ^= 1;
      }
    }
    const u32 complete = turn_barriers + 8 * (turn & 1), added = complete + 16, phase = turn >> 1 & 1;
    const int side = (turn & 1) * 32 * room;  // [token][row]; the other half belongs to the rows before, which may not be added yet
    if (turn > 1) barrier_wait(added, phase ^ 1);
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (2 * t + (i & 1) < tokens) sums[side + (2 * t + (i & 1)) * 32 + 4 * g + 2 * r + (i >> 1)] = total[r][i];
    __syncwarp();
    if (lane == 0) barrier_arrive(complete);
    if (warp == turn % WARPS) {
      barrier_wait(complete, phase);
      const int out_row = block * 32 + lane;
#pragma unroll 1
      for (int out_token = 0; out_token < tokens; out_token++) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++)
          sum += reinterpret_cast<const float*>(shared + 64 + w * S::bytes(room))[side + out_token * 32 + lane];
        if (out_row < p.rows) p.out[(first_token + out_token) * p.out_stride + out_row] = T::of_float(sum);
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(added);
    }
  }
}

#endif
