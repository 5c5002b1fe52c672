// From packed codes to operands of the tensor cores: code - zero as a half-precision number, exactly.
//
// A block of 32 rows and 64 columns is what one warp multiplies per step. Lane 4g + t holds the codes of rows 4g .. 4g + 3
// and of columns 32h + 16s + 8j + 2t + e (h, s, j, e: 0 or 1): 64 codes, 2 * BITS words. Row 4g + 2r + i is row g + 8i of tile
// r of 16 rows; the 16 columns of step (h, s) stand in the order in which both mma.sync and wgmma want them. A register
// a[i + 2j] of step (r, h, s) is the pair e = 0, 1.
//
//   4 bits  word r*4 + h*2 + s:  nibbles, low to high      a0.0 a1.0 a2.0 a3.0 a0.1 a1.1 a2.1 a3.1
//   8 bits  word (r*4 + h*2 + s)*2 + j:  bytes             a[2j].0 a[2j].1 a[2j+1].0 a[2j+1].1
//   2 bits  word r*2 + h:  bit pairs                       as the nibbles, step 0 in bits 0..7 and 16..23, step 1 above each
//   3 bits  words 0..3: the two low bits as 2 bits; word 4 + r: the high bits, bit 8h + 4s + a of each half word
//
// Words lie in planes of 16 bytes per lane: words 4p .. 4p + 3 of lane l at byte 512p + 16l of the block; the last two
// words of 3 bits at byte 512 + 8l. A block has 256 * BITS bytes.
//
// A code c becomes the number 1024 + c (f16) or 128 + c (bf16) by setting its bits into the mantissa of that power of two;
// one fused multiply-add takes 1024 + zero off again. All of these are integers that the type holds exactly. In f16 the
// second nibble of a byte stays where it is: 1024 + 16c, times 1/16, less 64 + zero. With 8 bits bf16 goes through f32.

struct F16 {
  static __device__ __forceinline__ float to_float(u16 a) { return float_of_f16(a); }
  static __device__ __forceinline__ u16 of_float(float a) { return f16_of_float(a); }
  static __device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_f16(c, a, b0, b1); }
#ifdef ATTAR_HOPPER
  template <int N>
  static __device__ __forceinline__ void products(float (&c)[N][4], const u32 (&a)[4], u64 b, int add) { wgmma_f16(c, a, b, add); }
#endif
  // a + b, a pair each.
  static __device__ __forceinline__ u32 add(u32 a, u32 b) { return fma_f16x2(a, 0x3c003c00u, b); }
  static const u32 MAGIC = 0x64006400u;  // 1024
  static const u32 MINUS = 0xe400u;      // -1024
};

struct Bf16 {
  static __device__ __forceinline__ float to_float(u16 a) { return __uint_as_float((u32)a << 16); }
  static __device__ __forceinline__ u16 of_float(float a) { return bf16_of_float(a); }
  static __device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_bf16(c, a, b0, b1); }
#ifdef ATTAR_HOPPER
  template <int N>
  static __device__ __forceinline__ void products(float (&c)[N][4], const u32 (&a)[4], u64 b, int add) { wgmma_bf16(c, a, b, add); }
#endif
  static __device__ __forceinline__ u32 add(u32 a, u32 b) { return fma_bf16x2(a, 0x3f803f80u, b); }
  static const u32 MAGIC = 0x43004300u;  // 128
  static const u32 MINUS = 0xc300u;      // -128
};

// What a lane subtracts: one constant for each of the two rows of a tile.
template <int BITS, class T>
struct Offsets {
  u32 row[2];
  __device__ __forceinline__ void set(u32 zero0, u32 zero1) {
    row[0] = (T::MINUS + zero0) * 0x10001u;
    row[1] = (T::MINUS + zero1) * 0x10001u;
  }
};
template <>
struct Offsets<4, F16> {
  u32 row[2];
  __device__ __forceinline__ void set(u32 zero0, u32 zero1) {
    row[0] = (0xe400u + zero0) * 0x10001u;       // -(1024 + zero)
    row[1] = (0xd400u + 16 * zero1) * 0x10001u;  // -(64 + zero)
  }
};
template <>
struct Offsets<8, Bf16> {
  float row[2];
  __device__ __forceinline__ void set(u32 zero0, u32 zero1) {
    row[0] = __uint_as_float(0xcb000000u + zero0);  // -(2^23 + zero)
    row[1] = __uint_as_float(0xcb000000u + zero1);
  }
};

template <int BITS, class T>
struct Codes;

template <>
struct Codes<4, F16> {
  static __device__ __forceinline__ void decode(const u32 (&w)[8], int r, int h, int s, const Offsets<4, F16>& o, u32 (&a)[4]) {
    const u32 low = w[r * 4 + h * 2 + s], high = low >> 8;
    a[0] = F16::add(and_or(low, 0x000f000fu, F16::MAGIC), o.row[0]);
    a[1] = fma_f16x2(and_or(low, 0x00f000f0u, F16::MAGIC), 0x2c002c00u, o.row[1]);
    a[2] = F16::add(and_or(high, 0x000f000fu, F16::MAGIC), o.row[0]);
    a[3] = fma_f16x2(and_or(high, 0x00f000f0u, F16::MAGIC), 0x2c002c00u, o.row[1]);
  }
};

template <>
struct Codes<4, Bf16> {
  static __device__ __forceinline__ void decode(const u32 (&w)[8], int r, int h, int s, const Offsets<4, Bf16>& o, u32 (&a)[4]) {
    const u32 word = w[r * 4 + h * 2 + s];
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = Bf16::add(and_or(word >> (4 * i), 0x000f000fu, Bf16::MAGIC), o.row[i & 1]);
  }
};

template <>
struct Codes<8, F16> {
  static __device__ __forceinline__ void decode(const u32 (&w)[16], int r, int h, int s, const Offsets<8, F16>& o, u32 (&a)[4]) {
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const u32 word = w[(r * 4 + h * 2 + s) * 2 + j];
      a[2 * j] = F16::add(permute_bytes(word, F16::MAGIC >> 8, 0x4140u), o.row[0]);
      a[2 * j + 1] = F16::add(permute_bytes(word, F16::MAGIC >> 8, 0x4342u), o.row[1]);
    }
  }
};

template <>
struct Codes<8, Bf16> {
  // The number 2^23 + byte in f32.
  static __device__ __forceinline__ float big(u32 word, u32 selector) {
    return __uint_as_float(permute_bytes(word, 0x4b000000u, selector));
  }
  static __device__ __forceinline__ void decode(const u32 (&w)[16], int r, int h, int s, const Offsets<8, Bf16>& o, u32 (&a)[4]) {
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const u32 word = w[(r * 4 + h * 2 + s) * 2 + j];
      a[2 * j] = bf16x2_of_floats(big(word, 0x7440u) + o.row[0], big(word, 0x7441u) + o.row[0]);
      a[2 * j + 1] = bf16x2_of_floats(big(word, 0x7442u) + o.row[1], big(word, 0x7443u) + o.row[1]);
    }
  }
};

template <class T>
struct Codes<2, T> {
  static __device__ __forceinline__ void decode(const u32 (&w)[4], int r, int h, int s, const Offsets<2, T>& o, u32 (&a)[4]) {
    const u32 word = w[r * 2 + h];
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = T::add(and_or(word >> (8 * s + 2 * i), 0x00030003u, T::MAGIC), o.row[i & 1]);
  }
};

template <class T>
struct Codes<3, T> {
  static __device__ __forceinline__ void decode(const u32 (&w)[6], int r, int h, int s, const Offsets<3, T>& o, u32 (&a)[4]) {
    const u32 low = w[r * 2 + h], high = w[4 + r];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int bit = 8 * h + 4 * s + i;
      const u32 top = bit >= 2 ? high >> (bit - 2) : high << (2 - bit);
      const u32 code = and_or(top, 0x00040004u, (low >> (8 * s + 2 * i)) & 0x00030003u);
      a[i] = T::add(code | T::MAGIC, o.row[i & 1]);
    }
  }
};

// The words of this lane in a block.
template <int BITS>
__device__ __forceinline__ void load_codes(const u8* block, int lane, u32 (&w)[2 * BITS]) {
#pragma unroll
  for (int p = 0; p < BITS / 2; p++) {
    const uint4 v = load_once(reinterpret_cast<const uint4*>(block + 512 * p) + lane);
    w[4 * p] = v.x;
    w[4 * p + 1] = v.y;
    w[4 * p + 2] = v.z;
    w[4 * p + 3] = v.w;
  }
  if (BITS == 3) {
    const uint2 v = load_once(reinterpret_cast<const uint2*>(block + 512) + lane);
    w[(2 * BITS) - 2] = v.x;
    w[(2 * BITS) - 1] = v.y;
  }
}

// The same from shared memory.
template <int BITS>
__device__ __forceinline__ void shared_codes(const u8* block, int lane, u32 (&w)[2 * BITS]) {
#pragma unroll
  for (int p = 0; p < BITS / 2; p++) {
    const uint4 v = reinterpret_cast<const uint4*>(block + 512 * p)[lane];
    w[4 * p] = v.x;
    w[4 * p + 1] = v.y;
    w[4 * p + 2] = v.z;
    w[4 * p + 3] = v.w;
  }
  if (BITS == 3) {
    const uint2 v = reinterpret_cast<const uint2*>(block + 512)[lane];
    w[(2 * BITS) - 2] = v.x;
    w[(2 * BITS) - 1] = v.y;
  }
}

// Those of tile r alone (for 2 bits of both).
template <int BITS>
__device__ __forceinline__ void tile_codes(const u8* block, int lane, int r, u32 (&w)[2 * BITS]) {
  if (BITS < 4) {
    shared_codes<BITS>(block, lane, w);
  } else {
#pragma unroll
    for (int p = r * (BITS / 4); p < (r + 1) * (BITS / 4); p++) {
      const uint4 v = reinterpret_cast<const uint4*>(block + 512 * p)[lane];
      w[4 * p] = v.x;
      w[4 * p + 1] = v.y;
      w[4 * p + 2] = v.z;
      w[4 * p + 3] = v.w;
    }
  }
}
