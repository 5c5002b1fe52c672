// From an artifact's own bytes to the packed form, on the device. A layout (its repack.cuh) says where a code, a zero point and
// a scale stand; the packing is the same for all. Once per weight: clear rather than fast.

struct AttarRepack {
  const u32* codes;
  const u32* zeros;   // unused when out_zeros is null
  const void* scales;
  const int* order;   // [chunks * 64], column of each place or -1; null: place = column
  u8* out_codes;      // [padded rows / 32][chunks][256 * BITS]
  void* out_scales;   // [padded groups][padded rows]
  void* out_zeros;    // [padded groups][padded rows], u8, u16 with 8 bits; null when symmetric
  int rows, columns, groups;
  int chunks, group_halves;
  int scale_bytes;    // 2 or 4
  int zero_offset;    // added to stored zero points: 1 for GPTQ version 1
  int unused;
};

// Code `at` of a dense stream of BITS bits, whose words are `stride` words apart.
template <int BITS>
__device__ __forceinline__ u32 stream_code(const u32* words, long long stride, int at) {
  const int bit = at * BITS, word = bit >> 5, shift = bit & 31;
  u32 v = words[word * stride] >> shift;
  if (shift + BITS > 32) v |= words[(word + 1) * stride] << (32 - shift);
  return v & ((1u << BITS) - 1);
}

// grid (ceil(blocks of rows * chunks / 8)), 256 threads: a warp per block and chunk, a lane makes its own words.
template <int BITS, class Layout>
__device__ __forceinline__ void repack_codes(const AttarRepack& p) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const long long item = (long long)blockIdx.x * 8 + (threadIdx.x >> 5);
  const int block = (int)(item / p.chunks), chunk = (int)(item % p.chunks);
  if (block * 32 >= p.rows) return;
  u32 w[2 * BITS];
  for (int i = 0; i < 2 * BITS; i++) w[i] = 0;
  for (int n = 0; n < 64; n++) {
    const int r = n & 1, h = n >> 1 & 1, s = n >> 2 & 1, j = n >> 3 & 1, e = n >> 4 & 1, i = n >> 5;
    const int row = block * 32 + 4 * g + 2 * r + i, place = chunk * 64 + 32 * h + 16 * s + 8 * j + 2 * t + e;
    const int column = p.order ? p.order[place] : place;
    if (row >= p.rows || column < 0 || column >= p.columns) continue;
    const u32 code = Layout::template code<BITS>(p, row, column);
    const int a = i + 2 * j;
    if (BITS == 4) {
      w[r * 4 + h * 2 + s] |= code << (4 * a + 16 * e);
    } else if (BITS == 8) {
      w[(r * 4 + h * 2 + s) * 2 + j] |= code << (16 * i + 8 * e);
    } else {
      w[r * 2 + h] |= (code & 3) << (8 * s + 2 * a + 16 * e);
      if (BITS == 3) w[2 * BITS - 2 + r] |= (code >> 2) << (8 * h + 4 * s + a + 16 * e);
    }
  }
  u8* out = p.out_codes + item * (256 * BITS);
  for (int q = 0; q < BITS / 2; q++)
    reinterpret_cast<uint4*>(out + 512 * q)[lane] = make_uint4(w[4 * q], w[4 * q + 1], w[4 * q + 2], w[4 * q + 3]);
  if (BITS == 3) {
    reinterpret_cast<u32*>(out + 512)[2 * lane] = w[2 * BITS - 2];
    reinterpret_cast<u32*>(out + 512)[2 * lane + 1] = w[2 * BITS - 1];
  }
}

// grid (ceil(padded groups * padded rows / 256)), 256 threads: one scale and zero point each.
template <int BITS, class Layout>
__device__ __forceinline__ void repack_groups(const AttarRepack& p) {
  const int padded = (p.rows + 31) / 32 * 32;
  const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
  const int group = (int)(at / padded), row = (int)(at % padded);
  if (group >= p.chunks * 2 / p.group_halves) return;
  const bool valid = group < p.groups && row < p.rows;
  const long long from = valid ? Layout::scale_at(p, row, group) : 0;
  if (p.scale_bytes == 4)
    static_cast<u32*>(p.out_scales)[at] = valid ? static_cast<const u32*>(p.scales)[from] : 0;
  else
    static_cast<u16*>(p.out_scales)[at] = valid ? static_cast<const u16*>(p.scales)[from] : (u16)0;
  if (p.out_zeros) {
    const u32 zero = valid ? Layout::template zero<BITS>(p, row, group) + p.zero_offset : 0;
    if (BITS == 8)
      static_cast<u16*>(p.out_zeros)[at] = (u16)zero;
    else
      static_cast<u8*>(p.out_zeros)[at] = (u8)zero;
  }
}

// Columns sorted by group, each group padded: order[group * group_halves * 32 + i] is the i-th column of the group.
// grid (ceil(chunks * 64 / 256)), 256 threads.
struct AttarOrder {
  const int* g_idx;  // [columns]
  int* order;        // [chunks * 64]
  int columns, chunks, group_halves, unused;
};

__device__ __forceinline__ void order_columns(const AttarOrder& p) {
  const int place = blockIdx.x * 256 + threadIdx.x;
  if (place >= p.chunks * 64) return;
  const int group = place / (p.group_halves * 32);
  int left = place % (p.group_halves * 32), found = -1;
  for (int column = 0; column < p.columns; column++) {
    if (p.g_idx[column] != group) continue;
    if (left == 0) {
      found = column;
      break;
    }
    left--;
  }
  p.order[place] = found;
}
