//! AVX2 and FMA: half a tile, 8 rows, are the lanes of a register.
//!
//! Codes of up to 4 bits are multiplied as unsigned by signed bytes; the 16-bit sums of a block cannot
//! overflow (8 products of pairs, each at most 2 · 15 · 127). Codes of 8 bits are widened to 16 bits first.

use std::arch::x86_64::{
    __m256, __m256i, _MM_HINT_T1, _mm_loadl_epi64, _mm_loadu_si128, _mm_prefetch, _mm256_add_epi16,
    _mm256_add_epi32, _mm256_add_ps, _mm256_and_si256, _mm256_castsi256_ps, _mm256_cvtepi32_ps,
    _mm256_cvtepu8_epi32, _mm256_cvtepu16_epi32, _mm256_cvtph_ps, _mm256_fmadd_ps, _mm256_fmsub_ps,
    _mm256_fnmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256, _mm256_madd_epi16, _mm256_maddubs_epi16,
    _mm256_mul_ps, _mm256_mullo_epi32, _mm256_or_si256, _mm256_permutevar8x32_epi32,
    _mm256_set1_epi8, _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_epi64x, _mm256_set1_ps,
    _mm256_setr_epi32, _mm256_setzero_ps, _mm256_setzero_si256, _mm256_shuffle_epi8,
    _mm256_slli_epi16, _mm256_slli_epi32, _mm256_srai_epi16, _mm256_srai_epi32, _mm256_srli_epi16,
    _mm256_srlv_epi32, _mm256_storeu_ps, _mm256_sub_ps, _mm256_xor_si256,
};

use super::input::{ByteChunk, FloatChunk};
use super::tiles::{BLOCK, KEPT, Offset, QUAD, ROWS, SPARSE, ScaleType, Shape, block_bytes};

/// Rows of a half tile.
const HALF: usize = ROWS / 2;
/// How far ahead of the codes being multiplied memory is asked for, into the second-level cache: the
/// first has too few slots for lines on their way to keep memory busy. Every line has to be asked for,
/// those of the scales too.
const AHEAD: usize = 2048;
/// The same of each of [`SIDE`] tiles.
const AHEAD_EACH: usize = 1024;
/// Tiles that are multiplied by one token side by side: memory is busier with several streams than with one.
pub(crate) const SIDE: usize = 2;

/// Writes a block once for each number, so that arrays of registers are indexed by constants.
macro_rules! unroll {
    ($i:ident in [$($n:literal)*] $body:block) => {{ $({ let $i: usize = $n; $body })* }};
}

/// Asks for what comes `ahead` bytes behind `at`.
#[inline(always)]
fn ask(at: *const u8, ahead: usize, bytes: usize) {
    let mut line = 0;
    while line < bytes {
        // SAFETY: a prefetch reads nothing and never faults; the processor has it.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(ahead + line).cast()) };
        line += 64;
    }
}

/// Checks once what the loops below rely on.
fn check(shape: &Shape, tiles: &[u8], count: usize, form: u8) {
    assert_eq!(shape.form(), form, "the kernel is for this form");
    assert_eq!(tiles.len(), count * shape.tile_bytes(), "tiles are whole");
}

/// Eight floats of the type of the scales, from row `row` on.
///
/// # Safety
/// `at` begins sixteen of them, and `row + 8` is at most 16.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn floats(scale: ScaleType, at: *const u8, row: usize) -> __m256 {
    // SAFETY: the caller's promise; no load needs alignment.
    unsafe {
        match scale {
            ScaleType::F16 => _mm256_cvtph_ps(_mm_loadu_si128(at.add(2 * row).cast())),
            ScaleType::Bf16 => _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(
                _mm_loadu_si128(at.add(2 * row).cast()),
            ))),
            ScaleType::F32 => _mm256_loadu_ps(at.add(4 * row).cast()),
        }
    }
}

/// Scales, and zero points or minima, behind the blocks of a group, from row `row` on.
///
/// # Safety
/// `at` is where they begin, and `row + 8` is at most 16.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn scales(shape: &Shape, at: *const u8, row: usize) -> (__m256, __m256) {
    // SAFETY: the caller's promise; no load needs alignment.
    unsafe {
        let behind = at.add(shape.scale_bytes());
        let offset = match shape.offset {
            Offset::Middle => _mm256_set1_ps(shape.middle()),
            Offset::Byte => {
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(behind.add(row).cast())))
            }
            Offset::Word => _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(_mm_loadu_si128(
                behind.add(2 * row).cast(),
            ))),
            Offset::Minimum => floats(shape.scale, behind, row),
        };
        (floats(shape.scale, at, row), offset)
    }
}

/// For each lane the zero points of a row in four bytes, rows from `row` on: what codes that are not stored are, and what
/// those that are stored were exclusive-ored with. Zero where every code is stored.
///
/// # Safety
/// `at` is where the scales of a group begin, and `row + 8` is at most 16.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn filling<const BITS: u8>(shape: &Shape, at: *const u8, row: usize) -> __m256i {
    if BITS != SPARSE {
        return _mm256_setzero_si256();
    }
    if shape.offset == Offset::Middle {
        return _mm256_set1_epi8(8);
    }
    // SAFETY: sixteen bytes stand behind the scales: codes of which few are stored have zero points.
    let zeros = unsafe { _mm_loadl_epi64(at.add(shape.scale_bytes() + row).cast()) };
    _mm256_mullo_epi32(_mm256_cvtepu8_epi32(zeros), _mm256_set1_epi32(0x0101_0101))
}

/// Half a block of which two in four codes are stored.
#[derive(Clone, Copy)]
struct Sparse {
    /// The word of quad 0.
    words: *const u8,
    /// What brings the four bits of a row to the low end of its lane.
    shifts: __m256i,
    /// Where in the two stored codes of a row its four columns are found, by the low three bits of which are kept.
    places: __m256i,
    /// Where the codes of a row begin in their half of a vector.
    base: __m256i,
    filling: __m256i,
}

impl Sparse {
    /// The rows from `row` on of the block at `at`, which is not looked at yet.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn new(at: *const u8, row: usize, filling: __m256i) -> Self {
        let first = _mm256_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12);
        // Kept columns 3, 5, 6, 9, 10, 12 as bits.
        let [a, b, c, d, e, f]: [u32; 6] =
            [0x8080_0100, 0x8001_8000, 0x8001_0080, 0x0180_8000, 0x0180_0080, 0x0100_8080];
        let [a, b, c, d, e, f] = [a, b, c, d, e, f].map(u32::cast_signed);
        Self {
            words: at.wrapping_add(KEPT),
            shifts: _mm256_add_epi32(first, _mm256_set1_epi32(2 * row as i32)),
            places: _mm256_setr_epi32(0, d, e, a, f, b, c, 0),
            base: _mm256_setr_epi32(
                0,
                0x0202_0202,
                0x0404_0404,
                0x0606_0606,
                0,
                0x0202_0202,
                0x0404_0404,
                0x0606_0606,
            ),
            filling,
        }
    }

    /// The codes of a quad out of the low halves of the bytes of `stored`.
    ///
    /// # Safety
    /// The block is whole, and `quad` at most 7.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn quad(self, quad: usize, stored: __m256i) -> __m256i {
        // SAFETY: a block has a word for each quad.
        let word = unsafe { self.words.add(8 * quad).cast::<i64>().read_unaligned() };
        let kept = _mm256_srlv_epi32(_mm256_set1_epi64x(word), self.shifts);
        let from = _mm256_or_si256(_mm256_permutevar8x32_epi32(self.places, kept), self.base);
        let from =
            if quad.is_multiple_of(2) { from } else { _mm256_or_si256(from, _mm256_set1_epi8(8)) };
        _mm256_xor_si256(_mm256_shuffle_epi8(stored, from), self.filling)
    }
}

/// Calls macro `$each(quad, codes)` for the quads of the half block at `$at`; codes are bytes of at most
/// 4 bits, four of each of eight rows.
macro_rules! each_quad {
    ($bits:ident, $at:expr, $sparse:expr, $each:ident) => {{
        let at = $at;
        macro_rules! load {
            ($vector:expr) => {
                _mm256_loadu_si256(at.add($vector * QUAD).cast())
            };
        }
        if $bits == 4 {
            let mask = _mm256_set1_epi8(15);
            unroll!(j in [0 1 2 3] {
                let v = load!(j);
                $each!(j, _mm256_and_si256(v, mask));
                $each!(j + 4, _mm256_and_si256(_mm256_srli_epi16::<4>(v), mask));
            });
        } else if $bits == 2 {
            let mask = _mm256_set1_epi8(3);
            unroll!(j in [0 1] {
                let v = load!(j);
                $each!(j, _mm256_and_si256(v, mask));
                $each!(j + 2, _mm256_and_si256(_mm256_srli_epi16::<2>(v), mask));
                $each!(j + 4, _mm256_and_si256(_mm256_srli_epi16::<4>(v), mask));
                $each!(j + 6, _mm256_and_si256(_mm256_srli_epi16::<6>(v), mask));
            });
        } else if $bits == SPARSE {
            let (mask, sparse) = (_mm256_set1_epi8(15), $sparse);
            unroll!(v in [0 1] {
                let stored = load!(v);
                let low = _mm256_and_si256(stored, mask);
                $each!(2 * v, sparse.quad(2 * v, low));
                $each!(2 * v + 1, sparse.quad(2 * v + 1, low));
                let high = _mm256_and_si256(_mm256_srli_epi16::<4>(stored), mask);
                $each!(2 * v + 4, sparse.quad(2 * v + 4, high));
                $each!(2 * v + 5, sparse.quad(2 * v + 5, high));
            });
        } else {
            let (mask, bit, high) = (_mm256_set1_epi8(3), _mm256_set1_epi8(4), load!(2));
            macro_rules! join {
                ($quad:expr, $low:expr, $high:expr) => {
                    $each!($quad, _mm256_or_si256(
                        _mm256_and_si256($low, mask), _mm256_and_si256($high, bit)))
                };
            }
            let (a, b) = (load!(0), load!(1));
            join!(0, a, _mm256_slli_epi16::<2>(high));
            join!(1, b, _mm256_slli_epi16::<1>(high));
            join!(2, _mm256_srli_epi16::<2>(a), high);
            join!(3, _mm256_srli_epi16::<2>(b), _mm256_srli_epi16::<1>(high));
            join!(4, _mm256_srli_epi16::<4>(a), _mm256_srli_epi16::<2>(high));
            join!(5, _mm256_srli_epi16::<4>(b), _mm256_srli_epi16::<3>(high));
            join!(6, _mm256_srli_epi16::<6>(a), _mm256_srli_epi16::<4>(high));
            join!(7, _mm256_srli_epi16::<6>(b), _mm256_srli_epi16::<5>(high));
        }
    }};
}

/// Adds to `dots` the products of half a block, rows from `row` on, with `M` tokens.
///
/// # Safety
/// `at` begins a whole block of `BITS`, `q` 32 bytes for each of the tokens; `row + 8` is at most 16.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn half_block<const BITS: u8, const M: usize>(
    at: *const u8,
    row: usize,
    q: *const i8,
    filling: __m256i,
    dots: &mut [__m256i; M],
) {
    macro_rules! x {
        ($quad:expr, $t:expr) => {
            _mm256_set1_epi32(q.add(($quad * M + $t) * 4).cast::<i32>().read_unaligned())
        };
    }
    // SAFETY: by the caller's promise all loads are within the block and the bytes of the tokens.
    unsafe {
        let sparse = Sparse::new(at, row, filling);
        let at = at.add(4 * row);
        if BITS == 8 {
            let even = _mm256_set1_epi16(255);
            unroll!(quad in [0 1 2 3 4 5 6 7] {
                let v = _mm256_loadu_si256(at.add(quad * QUAD).cast());
                let (a, b) = (_mm256_and_si256(v, even), _mm256_srli_epi16::<8>(v));
                unroll!(t in [0 1 2 3] { if t < M {
                    let x = x!(quad, t);
                    // Signed bytes in even places, then in odd ones, as 16 bits.
                    let xa = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(x));
                    let xb = _mm256_srai_epi16::<8>(x);
                    let pairs =
                        _mm256_add_epi32(_mm256_madd_epi16(a, xa), _mm256_madd_epi16(b, xb));
                    dots[t] = _mm256_add_epi32(dots[t], pairs);
                } });
            });
        } else {
            let mut pairs = [_mm256_setzero_si256(); M];
            macro_rules! add {
                ($quad:expr, $codes:expr) => {{
                    let codes = $codes;
                    unroll!(t in [0 1 2 3] { if t < M {
                        let products = _mm256_maddubs_epi16(codes, x!($quad, t));
                        pairs[t] = _mm256_add_epi16(pairs[t], products);
                    } });
                }};
            }
            each_quad!(BITS, at, sparse, add);
            let one = _mm256_set1_epi16(1);
            unroll!(t in [0 1 2 3] { if t < M {
                dots[t] = _mm256_add_epi32(dots[t], _mm256_madd_epi16(pairs[t], one));
            } });
        }
    }
}

/// The 16 rows of each of `T` neighbouring tiles times `M` tokens of bytes, `out[tile * M + token]`. With `PER_TOKEN` all
/// scales of a token are one.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn fast<const BITS: u8, const M: usize, const PER_TOKEN: bool, const T: usize>(
    shape: &Shape,
    tiles: &[u8],
    input: ByteChunk<'_>,
    out: &mut [[f32; ROWS]],
) {
    check(shape, tiles, T, BITS);
    assert_eq!(input.q.len(), shape.places() * M);
    assert_eq!(input.scales.len(), shape.blocks() * M);
    assert_eq!(input.sums.len(), shape.groups() * M);
    if T == SIDE {
        halves::<BITS, M, PER_TOKEN, 4>(shape, tiles, input, 0, out);
    } else if M <= 2 {
        // Both halves at once: one pass over the tile.
        halves::<BITS, M, PER_TOKEN, 2>(shape, tiles, input, 0, out);
    } else {
        halves::<BITS, M, PER_TOKEN, 1>(shape, tiles, input, 0, out);
        halves::<BITS, M, PER_TOKEN, 1>(shape, tiles, input, HALF, out);
    }
}

/// `HALVES` halves of tiles from row `first` on.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn halves<const BITS: u8, const M: usize, const PER_TOKEN: bool, const HALVES: usize>(
    shape: &Shape,
    tiles: &[u8],
    input: ByteChunk<'_>,
    first: usize,
    out: &mut [[f32; ROWS]],
) {
    let block_bytes = block_bytes(BITS);
    let stride = shape.tile_bytes();
    let (mut at, mut q, mut a) = (tiles.as_ptr(), input.q.as_ptr(), input.scales.as_ptr());
    // Bytes of each tile from `at` on. Behind its end the tile `SIDE` tiles further on is wanted next.
    let mut left = stride;
    let ahead = |left: usize| match HALVES {
        ..=2 => AHEAD,
        _ if left > AHEAD_EACH => AHEAD_EACH,
        _ => AHEAD_EACH + (SIDE - 1) * stride,
    };
    let mut totals = [[_mm256_setzero_ps(); M]; HALVES];
    for group in 0..shape.groups() {
        let mut sums = [[_mm256_setzero_ps(); M]; HALVES];
        let mut all = [[_mm256_setzero_si256(); M]; HALVES];
        let mut blocks = shape.group_blocks[group + 1] - shape.group_blocks[group];
        let mut fillings = [_mm256_setzero_si256(); HALVES];
        let scales_at = blocks as usize * block_bytes;
        unroll!(h in [0 1 2 3] { if h < HALVES {
            // SAFETY: by the checks of the caller scales stand behind the blocks of the group.
            fillings[h] = unsafe {
                let at = at.add(h / 2 * stride + scales_at);
                filling::<BITS>(shape, at, first + h % 2 * HALF)
            };
        } });
        while blocks > 0 {
            blocks -= 1;
            let ahead = ahead(left);
            // SAFETY: by the checks of the caller each tile holds `block_bytes` for each block, and `q`
            // and `a` hold 32 bytes and one scale of each of the `M` tokens for each block.
            unsafe {
                unroll!(h in [0 1 2 3] { if h < HALVES {
                    let at = at.add(h / 2 * stride);
                    if first == 0 && h.is_multiple_of(2) {
                        ask(at, ahead, block_bytes);
                    }
                    let mut dots = if PER_TOKEN { all[h] } else { [_mm256_setzero_si256(); M] };
                    half_block::<BITS, M>(at, first + h % 2 * HALF, q, fillings[h], &mut dots);
                    if PER_TOKEN {
                        all[h] = dots;
                    } else {
                        unroll!(t in [0 1 2 3] { if t < M {
                            let scale = _mm256_set1_ps(*a.add(t));
                            sums[h][t] =
                                _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[t]), scale, sums[h][t]);
                        } });
                    }
                } });
                at = at.add(block_bytes);
                q = q.add(BLOCK * M);
                a = a.add(M);
            }
            left -= block_bytes;
        }
        let ahead = ahead(left);
        unroll!(h in [0 1 2 3] { if h < HALVES {
            // SAFETY: scales and offsets stand behind the blocks of a group.
            let at = unsafe { at.add(h / 2 * stride) };
            if first == 0 && h.is_multiple_of(2) {
                ask(at, ahead, 128);
            }
            // SAFETY: as above.
            let (scale, offset) = unsafe { scales(shape, at, first + h % 2 * HALF) };
            unroll!(t in [0 1 2 3] { if t < M {
                if PER_TOKEN {
                    let scale = _mm256_set1_ps(input.scales[t]);
                    sums[h][t] = _mm256_mul_ps(_mm256_cvtepi32_ps(all[h][t]), scale);
                }
                let x = _mm256_set1_ps(input.sums[group * M + t]);
                let (sum, total) = (sums[h][t], totals[h][t]);
                totals[h][t] = if shape.offset == Offset::Minimum {
                    _mm256_fnmadd_ps(offset, x, _mm256_fmadd_ps(sum, scale, total))
                } else {
                    _mm256_fmadd_ps(_mm256_fnmadd_ps(offset, x, sum), scale, total)
                };
            } });
        } });
        // SAFETY: as above; at most one past the end of the first tile.
        at = unsafe { at.add(shape.scale_bytes() + shape.offset_bytes()) };
        left -= shape.scale_bytes() + shape.offset_bytes();
    }
    store(&totals, first, out);
}

#[inline]
#[target_feature(enable = "avx2")]
fn store<const M: usize, const HALVES: usize>(
    totals: &[[__m256; M]; HALVES],
    first: usize,
    out: &mut [[f32; ROWS]],
) {
    unroll!(h in [0 1 2 3] { if h < HALVES {
        unroll!(t in [0 1 2 3] { if t < M {
            let row = first + h % 2 * HALF;
            let to = &mut out[h / 2 * M + t][row..row + HALF];
            // SAFETY: the store writes eight floats, which `to` has.
            unsafe { _mm256_storeu_ps(to.as_mut_ptr(), totals[h][t]) };
        } });
    } });
}

/// Calls macro `$each(place, weights)` for the 32 places of the half block at `$at`; weights are codes
/// less their middle, of eight rows.
macro_rules! each_place {
    ($bits:ident, $at:expr, $sparse:expr, $each:ident) => {{
        let at = $at;
        macro_rules! signed {
            ($shift:literal, $top:literal, $v:expr) => {
                _mm256_cvtepi32_ps(_mm256_srai_epi32::<$top>(_mm256_slli_epi32::<$shift>($v)))
            };
        }
        macro_rules! load {
            ($vector:expr) => {
                _mm256_loadu_si256(at.add($vector * QUAD).cast())
            };
        }
        if $bits == 8 {
            let flip = _mm256_set1_epi8(-128);
            unroll!(quad in [0 1 2 3 4 5 6 7] {
                let v = _mm256_xor_si256(load!(quad), flip);
                $each!(4 * quad, signed!(24, 24, v));
                $each!(4 * quad + 1, signed!(16, 24, v));
                $each!(4 * quad + 2, signed!(8, 24, v));
                $each!(4 * quad + 3, signed!(0, 24, v));
            });
        } else if $bits == 4 {
            let flip = _mm256_set1_epi8(-120);
            unroll!(j in [0 1 2 3] {
                let v = _mm256_xor_si256(load!(j), flip);
                $each!(4 * j, signed!(28, 28, v));
                $each!(4 * (j + 4), signed!(24, 28, v));
                $each!(4 * j + 1, signed!(20, 28, v));
                $each!(4 * (j + 4) + 1, signed!(16, 28, v));
                $each!(4 * j + 2, signed!(12, 28, v));
                $each!(4 * (j + 4) + 2, signed!(8, 28, v));
                $each!(4 * j + 3, signed!(4, 28, v));
                $each!(4 * (j + 4) + 3, signed!(0, 28, v));
            });
        } else if $bits == 2 {
            let flip = _mm256_set1_epi8(-86);
            unroll!(j in [0 1] {
                let v = _mm256_xor_si256(load!(j), flip);
                $each!(4 * j, signed!(30, 30, v));
                $each!(4 * (j + 2), signed!(28, 30, v));
                $each!(4 * (j + 4), signed!(26, 30, v));
                $each!(4 * (j + 6), signed!(24, 30, v));
                $each!(4 * j + 1, signed!(22, 30, v));
                $each!(4 * (j + 2) + 1, signed!(20, 30, v));
                $each!(4 * (j + 4) + 1, signed!(18, 30, v));
                $each!(4 * (j + 6) + 1, signed!(16, 30, v));
                $each!(4 * j + 2, signed!(14, 30, v));
                $each!(4 * (j + 2) + 2, signed!(12, 30, v));
                $each!(4 * (j + 4) + 2, signed!(10, 30, v));
                $each!(4 * (j + 6) + 2, signed!(8, 30, v));
                $each!(4 * j + 3, signed!(6, 30, v));
                $each!(4 * (j + 2) + 3, signed!(4, 30, v));
                $each!(4 * (j + 4) + 3, signed!(2, 30, v));
                $each!(4 * (j + 6) + 3, signed!(0, 30, v));
            });
        } else if $bits == SPARSE {
            let flip = _mm256_set1_epi8(8);
            macro_rules! widen {
                ($quad:expr, $codes:expr) => {{
                    let v = _mm256_xor_si256($codes, flip);
                    $each!(4 * $quad, signed!(28, 28, v));
                    $each!(4 * $quad + 1, signed!(20, 28, v));
                    $each!(4 * $quad + 2, signed!(12, 28, v));
                    $each!(4 * $quad + 3, signed!(4, 28, v));
                }};
            }
            each_quad!($bits, at, $sparse, widen);
        } else {
            let flip = _mm256_set1_epi8(4);
            macro_rules! widen {
                ($quad:expr, $codes:expr) => {{
                    let v = _mm256_xor_si256($codes, flip);
                    $each!(4 * $quad, signed!(29, 29, v));
                    $each!(4 * $quad + 1, signed!(21, 29, v));
                    $each!(4 * $quad + 2, signed!(13, 29, v));
                    $each!(4 * $quad + 3, signed!(5, 29, v));
                }};
            }
            each_quad!($bits, at, $sparse, widen);
        }
    }};
}

/// The 16 rows of a tile times `M` tokens of f32; each token has `4 / M` sums, at least one.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn exact<const BITS: u8, const M: usize>(
    shape: &Shape,
    tile: &[u8],
    input: FloatChunk<'_>,
    out: &mut [[f32; ROWS]],
) {
    check(shape, tile, 1, BITS);
    assert_eq!(input.x.len(), shape.places() * M);
    let block_bytes = block_bytes(BITS);
    let middle = _mm256_set1_ps(shape.middle());
    let (mut at, mut x) = (tile.as_ptr(), input.x.as_ptr());
    let mut totals = [[_mm256_setzero_ps(); M]; 2];
    for group in 0..shape.groups() {
        let blocks = (shape.group_blocks[group + 1] - shape.group_blocks[group]) as usize;
        // SAFETY: by the checks above a group is its blocks, its scales and its offsets, and `x` holds 32
        // floats of each of the `M` tokens for each block.
        unsafe {
            let behind = at.add(blocks * block_bytes);
            let fillings =
                [filling::<BITS>(shape, behind, 0), filling::<BITS>(shape, behind, HALF)];
            let mut sums = [[[_mm256_setzero_ps(); 4]; M]; 2];
            let mut block = 0;
            while block < blocks {
                let (at, x) = (at.add(block * block_bytes), x.add(block * BLOCK * M));
                ask(at, AHEAD, block_bytes);
                unroll!(h in [0 1] {
                    macro_rules! add {
                        ($place:expr, $weights:expr) => {{
                            let (place, weights) = ($place, $weights);
                            let chain = if M >= 4 { 0 } else { place % (4 / M) };
                            unroll!(t in [0 1 2 3] { if t < M {
                                let x = _mm256_set1_ps(*x.add(place * M + t));
                                sums[h][t][chain] = _mm256_fmadd_ps(weights, x, sums[h][t][chain]);
                            } });
                        }};
                    }
                    let sparse = Sparse::new(at, h * HALF, fillings[h]);
                    each_place!(BITS, at.add(4 * h * HALF), sparse, add);
                });
                block += 1;
            }
            x = x.add(blocks * BLOCK * M);
            ask(behind, AHEAD, 128);
            unroll!(h in [0 1] {
                let (scale, offset) = scales(shape, behind, h * HALF);
                unroll!(t in [0 1 2 3] { if t < M {
                    let [a, b, c, d] = sums[h][t];
                    let sum = if M >= 4 {
                        a
                    } else {
                        _mm256_add_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d))
                    };
                    let x = _mm256_set1_ps(input.sums[group * M + t]);
                    let total = totals[h][t];
                    totals[h][t] = if shape.offset == Offset::Minimum {
                        let sum = _mm256_fmadd_ps(middle, x, sum);
                        _mm256_fnmadd_ps(offset, x, _mm256_fmadd_ps(sum, scale, total))
                    } else {
                        let sum = _mm256_fnmadd_ps(_mm256_sub_ps(offset, middle), x, sum);
                        _mm256_fmadd_ps(sum, scale, total)
                    };
                } });
            });
            at = behind.add(shape.scale_bytes() + shape.offset_bytes());
        }
    }
    store(&totals, 0, out);
}

/// Writes the weights of a tile as f32, `to[place * stride + row]`; the same bits as the scalar version.
///
/// # Safety
/// For each place sixteen floats from `to + place * stride` on may be written, and nobody else uses them.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn dequantize<const BITS: u8>(
    shape: &Shape,
    tile: &[u8],
    mut to: *mut f32,
    stride: usize,
) {
    check(shape, tile, 1, BITS);
    let block_bytes = block_bytes(BITS);
    let middle = _mm256_set1_ps(shape.middle());
    let mut at = tile.as_ptr();
    for group in 0..shape.groups() {
        let blocks = (shape.group_blocks[group + 1] - shape.group_blocks[group]) as usize;
        // SAFETY: by the checks above a group is its blocks, its scales and its offsets; what is written is
        // the caller's promise.
        unsafe {
            let behind = at.add(blocks * block_bytes);
            unroll!(h in [0 1] {
                let (scale, offset) = scales(shape, behind, h * HALF);
                let filling = filling::<BITS>(shape, behind, h * HALF);
                let shift = _mm256_sub_ps(offset, middle);
                for block in 0..blocks {
                    let to = to.add(block * BLOCK * stride + h * HALF);
                    macro_rules! write {
                        ($place:expr, $weights:expr) => {{
                            let weights = $weights;
                            let weight = if shape.offset == Offset::Minimum {
                                _mm256_fmsub_ps(_mm256_add_ps(weights, middle), scale, offset)
                            } else {
                                _mm256_mul_ps(_mm256_sub_ps(weights, shift), scale)
                            };
                            _mm256_storeu_ps(to.add($place * stride), weight);
                        }};
                    }
                    let at = at.add(block * block_bytes);
                    let sparse = Sparse::new(at, h * HALF, filling);
                    each_place!(BITS, at.add(4 * h * HALF), sparse, write);
                }
            });
            to = to.wrapping_add(blocks * BLOCK * stride);
            at = behind.add(shape.scale_bytes() + shape.offset_bytes());
        }
    }
}
