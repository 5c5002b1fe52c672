//! NEON: a quarter of a tile, 4 rows, are the lanes of a register. The byte kernels need the dot products of bytes (SDOT)
//! as well.
//!
//! The dot products are of signed bytes: codes of 8 bits lose 128 and sums of activations times 128 are added again, in
//! integers. SDOT and prefetches have no stable intrinsics yet and are written as assembly.

use std::arch::aarch64::{
    float32x4_t, int8x16_t, int32x4_t, uint8x16_t, uint8x16x2_t, vaddq_f32, vaddq_s32, vaddq_u8,
    vand_u8, vandq_u8, vcombine_u8, vcvt_f32_f16, vcvtq_f32_s32, vcvtq_f32_u32, vdup_n_u8,
    vdupq_laneq_s32, vdupq_n_f32, vdupq_n_s8, vdupq_n_s32, vdupq_n_u8, veorq_u8, vextq_s32,
    vfmaq_f32, vfmaq_laneq_f32, vfmaq_n_f32, vfmsq_f32, vget_high_u16, vget_low_u16, vld1_u8,
    vld1_u16, vld1q_f32, vld1q_s8, vld1q_u8, vmovl_u8, vmovl_u16, vmulq_f32, vmulq_n_f32,
    vnegq_f32, vorrq_u8, vpaddq_s32, vqtbl1q_u8, vqtbl2q_u8, vreinterpret_f16_u16,
    vreinterpretq_f32_u32, vreinterpretq_s8_u8, vreinterpretq_s32_u8, vshl_n_u8, vshll_n_u16,
    vshlq_n_s32, vshlq_n_u8, vshr_n_u8, vshrq_n_s32, vshrq_n_u8, vst1q_f32, vsubq_f32, vsubq_s32,
    vsubq_u8,
};
use std::arch::asm;

use super::input::{ByteChunk, FloatChunk};
use super::tiles::{BLOCK, KEPT, Offset, QUAD, ROWS, SPARSE, ScaleType, Shape, block_bytes};

/// Rows of a register.
const LANES: usize = 4;
/// Registers of a tile.
const WHOLE: usize = ROWS / LANES;
/// How far ahead of the codes being multiplied memory is asked for, as on the other instruction sets; not measured.
const AHEAD: usize = 2048;

/// Writes a block once for each number, so that arrays of registers are indexed by constants.
macro_rules! unroll {
    ($i:ident in [$($n:literal)*] $body:block) => {{ $({ let $i: usize = $n; $body })* }};
}

/// Asks for a line of memory, in the second-level cache.
#[inline(always)]
pub(super) fn prefetch(at: *const u8) {
    // SAFETY: a prefetch reads nothing and never faults.
    unsafe {
        asm!("prfm pldl2keep, [{}]", in(reg) at, options(nostack, preserves_flags, readonly));
    }
}

/// Asks for what comes `AHEAD` bytes behind `at`.
#[inline(always)]
fn ask(at: *const u8, bytes: usize) {
    let mut line = 0;
    while line < bytes {
        prefetch(at.wrapping_add(AHEAD + line));
        line += 64;
    }
}

/// Adds to each lane of `sums` the products of its four bytes with those of lane `LANE` of `x`.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn dot_lane<const LANE: usize>(mut sums: int32x4_t, codes: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: arithmetic on registers; the processor has the instruction.
    unsafe {
        asm!(
            "sdot {sums:v}.4s, {codes:v}.16b, {x:v}.4b[{lane}]",
            sums = inout(vreg) sums,
            codes = in(vreg) codes,
            x = in(vreg) x,
            lane = const LANE,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// [`dot_lane`] for a lane that is known once everything is inlined.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn dot_at(sums: int32x4_t, codes: int8x16_t, x: int8x16_t, lane: usize) -> int32x4_t {
    match lane {
        0 => dot_lane::<0>(sums, codes, x),
        1 => dot_lane::<1>(sums, codes, x),
        2 => dot_lane::<2>(sums, codes, x),
        _ => dot_lane::<3>(sums, codes, x),
    }
}

/// Adds to each lane of `sums` the products of its four bytes with those of the same lane of `x`.
#[inline]
#[target_feature(enable = "neon,dotprod")]
pub(super) fn dot(mut sums: int32x4_t, codes: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: arithmetic on registers; the processor has the instruction.
    unsafe {
        asm!(
            "sdot {sums:v}.4s, {codes:v}.16b, {x:v}.16b",
            sums = inout(vreg) sums,
            codes = in(vreg) codes,
            x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// Adds to `sums` the weights times lane `lane` of `x`, which is known once everything is inlined.
#[inline]
#[target_feature(enable = "neon")]
fn fma_at(sums: float32x4_t, weights: float32x4_t, x: float32x4_t, lane: usize) -> float32x4_t {
    match lane {
        0 => vfmaq_laneq_f32::<0>(sums, weights, x),
        1 => vfmaq_laneq_f32::<1>(sums, weights, x),
        2 => vfmaq_laneq_f32::<2>(sums, weights, x),
        _ => vfmaq_laneq_f32::<3>(sums, weights, x),
    }
}

/// Checks once what the loops below rely on.
fn check(shape: &Shape, tile: &[u8], form: u8) {
    assert_eq!(shape.form(), form, "the kernel is for this form");
    assert_eq!(tile.len(), shape.tile_bytes(), "a tile is whole");
}

/// Four floats of the type of the scales, from row `row` on.
///
/// # Safety
/// `at` begins sixteen of them, and `row + 4` is at most 16.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn floats(scale: ScaleType, at: *const u8, row: usize) -> float32x4_t {
    // SAFETY: the caller's promise; no load needs alignment.
    unsafe {
        match scale {
            ScaleType::F16 => vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(at.add(2 * row).cast()))),
            ScaleType::Bf16 => {
                vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(at.add(2 * row).cast())))
            }
            ScaleType::F32 => vld1q_f32(at.add(4 * row).cast()),
        }
    }
}

/// Scales, and zero points or minima, behind the blocks of a group, of `R` quarters from quarter `first` on.
///
/// # Safety
/// `at` is where they begin, and `first + R` is at most 4.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn scales<const R: usize>(
    shape: &Shape,
    at: *const u8,
    first: usize,
) -> [(float32x4_t, float32x4_t); R] {
    let middle = vdupq_n_f32(shape.middle());
    let mut both = [(middle, middle); R];
    // SAFETY: the caller's promise; no load needs alignment.
    unsafe {
        let behind = at.add(shape.scale_bytes());
        unroll!(l in [0 1 2 3] { if l < R {
            let row = (first + l) * LANES;
            let offset = match shape.offset {
                Offset::Middle => middle,
                Offset::Byte => {
                    // The lower half of eight that are read, or the upper one.
                    let zeros = vmovl_u8(vld1_u8(behind.add(row / 8 * 8)));
                    let low = row.is_multiple_of(8);
                    let four = if low { vget_low_u16(zeros) } else { vget_high_u16(zeros) };
                    vcvtq_f32_u32(vmovl_u16(four))
                }
                Offset::Word => vcvtq_f32_u32(vmovl_u16(vld1_u16(behind.add(2 * row).cast()))),
                Offset::Minimum => floats(shape.scale, behind, row),
            };
            both[l] = (floats(shape.scale, at, row), offset);
        } });
    }
    both
}

/// Each of the first four bytes four times, each of the others likewise.
const SPREAD: [[u8; 16]; WHOLE] = {
    let mut spread = [[0u8; 16]; WHOLE];
    let mut i = 0;
    while i < 64 {
        spread[i / 16][i % 16] = (i / 4) as u8;
        i += 1;
    }
    spread
};

/// For each byte of a quad, which byte of [`Sparse::kept`] says what is kept of its row: those of the even rows lie before
/// those of the odd ones, and of each byte the low half comes first.
const WORDS: [[u8; 16]; WHOLE] = {
    let mut words = [[0u8; 16]; WHOLE];
    let mut i = 0;
    while i < 64 {
        let row = i / 4;
        words[i / 16][i % 16] = (row / 4 + row % 2 * 4 + row % 4 / 2 * 8) as u8;
        i += 1;
    }
    words
};

/// Where in the two stored codes of a row its four columns are found, by the low three bits of which are kept; 128 where
/// nowhere. Two are kept, always: columns 3, 5, 6, 9, 10 or 12 as bits.
const PLACES: [u8; 32] = {
    let mut places = [0x80u8; 32];
    let mut kept: usize = 0;
    while kept < 16 {
        if kept.count_ones() == 2 {
            let (mut column, mut next) = (0, 0);
            while column < 4 {
                if kept >> column & 1 == 1 {
                    places[4 * (kept & 7) + column] = next;
                    next += 1;
                }
                column += 1;
            }
        }
        kept += 1;
    }
    places
};

/// What expands blocks of which two in four codes are stored.
#[derive(Clone, Copy)]
struct Sparse {
    places: uint8x16x2_t,
    words: [uint8x16_t; WHOLE],
    /// Column of each byte of a quad.
    columns: uint8x16_t,
    /// Where the codes of a row begin in their half of a vector.
    base: uint8x16_t,
    /// For each byte of a quad the zero point of its row: what codes that are not stored are, and what those that are
    /// stored were exclusive-ored with.
    filling: [uint8x16_t; WHOLE],
}

impl Sparse {
    /// For a group whose scales begin at `at`. Where every code is stored nothing of it is used.
    ///
    /// # Safety
    /// `at` is where the scales of a group begin.
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn new<const BITS: u8>(shape: &Shape, at: *const u8) -> Self {
        let nothing = vdupq_n_u8(0);
        let mut sparse = Self {
            places: uint8x16x2_t(nothing, nothing),
            words: [nothing; WHOLE],
            columns: nothing,
            base: nothing,
            filling: [nothing; WHOLE],
        };
        if BITS != SPARSE {
            return sparse;
        }
        // SAFETY: tables of as many bytes as are read; sixteen bytes stand behind the scales unless zero points are in the
        // middle, since codes of which few are stored have zero points.
        unsafe {
            sparse.places =
                uint8x16x2_t(vld1q_u8(PLACES.as_ptr()), vld1q_u8(PLACES.as_ptr().add(16)));
            let zeros = if shape.offset == Offset::Middle {
                vdupq_n_u8(8)
            } else {
                vld1q_u8(at.add(shape.scale_bytes()))
            };
            unroll!(l in [0 1 2 3] {
                sparse.words[l] = vld1q_u8(WORDS[l].as_ptr());
                sparse.filling[l] = vqtbl1q_u8(zeros, vld1q_u8(SPREAD[l].as_ptr()));
            });
            sparse.columns = vld1q_u8([0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3u8].as_ptr());
            sparse.base = vshlq_n_u8::<1>(vld1q_u8(SPREAD[0].as_ptr()));
        }
        sparse
    }

    /// Which codes of a quad are kept: what each byte of [`WORDS`] points to, times four.
    ///
    /// # Safety
    /// `at` begins a whole block, and `quad` is at most 7.
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn kept(at: *const u8, quad: usize) -> uint8x16_t {
        // SAFETY: a block has a word for each quad.
        let word = unsafe { vld1_u8(at.add(KEPT + 8 * quad)) };
        let three = vdup_n_u8(7 << 2);
        let low = vand_u8(vshl_n_u8::<2>(word), three);
        let high = vand_u8(vshr_n_u8::<2>(word), three);
        vcombine_u8(low, high)
    }

    /// The codes of register `l` of a quad out of the low halves of the bytes of `stored`.
    #[inline]
    #[target_feature(enable = "neon")]
    fn quad(&self, l: usize, odd: bool, kept: uint8x16_t, stored: uint8x16_t) -> uint8x16_t {
        let entry = vorrq_u8(vqtbl1q_u8(kept, self.words[l]), self.columns);
        let base = if odd { vaddq_u8(self.base, vdupq_n_u8(8)) } else { self.base };
        let from = vorrq_u8(vqtbl2q_u8(self.places, entry), base);
        veorq_u8(vqtbl1q_u8(stored, from), self.filling[l])
    }
}

/// Calls macro `$each(quad, register, codes)` for the quads of `$registers` quarters of the block at `$at` from quarter
/// `$first` on; codes are unsigned bytes, four of each of four rows.
macro_rules! each_quad {
    ($bits:ident, $registers:ident, $first:expr, $at:expr, $sparse:expr, $each:ident) => {{
        let (at, first) = ($at, $first);
        macro_rules! load {
            ($vector:expr, $l:expr) => {
                vld1q_u8(at.add($vector * QUAD + (first + $l) * 16))
            };
        }
        if $bits == 8 {
            unroll!(quad in [0 1 2 3 4 5 6 7] { unroll!(l in [0 1 2 3] { if l < $registers {
                $each!(quad, l, load!(quad, l));
            } }); });
        } else if $bits == 4 {
            let mask = vdupq_n_u8(15);
            unroll!(j in [0 1 2 3] { unroll!(l in [0 1 2 3] { if l < $registers {
                let v = load!(j, l);
                $each!(j, l, vandq_u8(v, mask));
                $each!(j + 4, l, vshrq_n_u8::<4>(v));
            } }); });
        } else if $bits == 2 {
            let mask = vdupq_n_u8(3);
            unroll!(j in [0 1] { unroll!(l in [0 1 2 3] { if l < $registers {
                let v = load!(j, l);
                $each!(j, l, vandq_u8(v, mask));
                $each!(j + 2, l, vandq_u8(vshrq_n_u8::<2>(v), mask));
                $each!(j + 4, l, vandq_u8(vshrq_n_u8::<4>(v), mask));
                $each!(j + 6, l, vshrq_n_u8::<6>(v));
            } }); });
        } else if $bits == SPARSE {
            let (mask, sparse) = (vdupq_n_u8(15), $sparse);
            unroll!(v in [0 1] {
                let kept = [
                    Sparse::kept(at, 2 * v),
                    Sparse::kept(at, 2 * v + 1),
                    Sparse::kept(at, 2 * v + 4),
                    Sparse::kept(at, 2 * v + 5),
                ];
                unroll!(l in [0 1 2 3] { if l < $registers {
                    let stored = load!(v, l);
                    let low = vandq_u8(stored, mask);
                    $each!(2 * v, l, sparse.quad(first + l, false, kept[0], low));
                    $each!(2 * v + 1, l, sparse.quad(first + l, true, kept[1], low));
                    let high = vshrq_n_u8::<4>(stored);
                    $each!(2 * v + 4, l, sparse.quad(first + l, false, kept[2], high));
                    $each!(2 * v + 5, l, sparse.quad(first + l, true, kept[3], high));
                } });
            });
        } else {
            let (mask, bit) = (vdupq_n_u8(3), vdupq_n_u8(4));
            macro_rules! join {
                ($low:expr, $high:expr) => {
                    vorrq_u8(vandq_u8($low, mask), vandq_u8($high, bit))
                };
            }
            unroll!(l in [0 1 2 3] { if l < $registers {
                let (a, b, high) = (load!(0, l), load!(1, l), load!(2, l));
                $each!(0, l, join!(a, vshlq_n_u8::<2>(high)));
                $each!(1, l, join!(b, vshlq_n_u8::<1>(high)));
                $each!(2, l, join!(vshrq_n_u8::<2>(a), high));
                $each!(3, l, join!(vshrq_n_u8::<2>(b), vshrq_n_u8::<1>(high)));
                $each!(4, l, join!(vshrq_n_u8::<4>(a), vshrq_n_u8::<2>(high)));
                $each!(5, l, join!(vshrq_n_u8::<4>(b), vshrq_n_u8::<3>(high)));
                $each!(6, l, vorrq_u8(vshrq_n_u8::<6>(a), vandq_u8(vshrq_n_u8::<4>(high), bit)));
                $each!(7, l, vorrq_u8(vshrq_n_u8::<6>(b), vandq_u8(vshrq_n_u8::<5>(high), bit)));
            } });
        }
    }};
}

/// The 16 rows of a tile times `M` tokens of bytes. With `PER_TOKEN` all scales of a token are one.
#[target_feature(enable = "neon,dotprod")]
pub(crate) fn fast<const BITS: u8, const M: usize, const PER_TOKEN: bool>(
    shape: &Shape,
    tile: &[u8],
    input: ByteChunk<'_>,
    out: &mut [[f32; ROWS]],
) {
    check(shape, tile, BITS);
    assert_eq!(input.q.len(), shape.places() * M);
    assert_eq!(input.scales.len(), shape.blocks() * M);
    assert_eq!(input.sums.len(), shape.groups() * M);
    if M <= 2 {
        quarters::<BITS, M, PER_TOKEN, 4, 0>(shape, tile, input, out);
    } else {
        // Sums of more would not stay in registers.
        quarters::<BITS, M, PER_TOKEN, 2, 0>(shape, tile, input, out);
        quarters::<BITS, M, PER_TOKEN, 2, 2>(shape, tile, input, out);
    }
}

/// `R` quarters of a tile from quarter `FIRST` on.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn quarters<
    const BITS: u8,
    const M: usize,
    const PER_TOKEN: bool,
    const R: usize,
    const FIRST: usize,
>(
    shape: &Shape,
    tile: &[u8],
    input: ByteChunk<'_>,
    out: &mut [[f32; ROWS]],
) {
    let block_bytes = block_bytes(BITS);
    let (mut at, mut q, mut a) = (tile.as_ptr(), input.q.as_ptr(), input.scales.as_ptr());
    let mut totals = [[vdupq_n_f32(0.0); R]; M];
    for group in 0..shape.groups() {
        let mut sums = [[vdupq_n_f32(0.0); R]; M];
        let mut dots = [[vdupq_n_s32(0); R]; M];
        let blocks = (shape.group_blocks[group + 1] - shape.group_blocks[group]) as usize;
        // SAFETY: by the checks of the caller scales stand behind the blocks of the group.
        let sparse = unsafe { Sparse::new::<BITS>(shape, at.add(blocks * block_bytes)) };
        for _ in 0..blocks {
            if M == 1 {
                ask(at, block_bytes);
            }
            // SAFETY: by the checks of the caller the tile holds `block_bytes` for each block, and `q`
            // and `a` hold 32 bytes and one scale of each of the `M` tokens for each block.
            unsafe {
                if !PER_TOKEN {
                    dots = [[vdupq_n_s32(0); R]; M];
                }
                // Vector v holds 4 / M quads, token next to token.
                let mut x = [vdupq_n_s8(0); 8];
                unroll!(v in [0 1 2 3 4 5 6 7] { if v < 2 * M {
                    x[v] = vld1q_s8(q.add(16 * v));
                } });
                macro_rules! add {
                    ($quad:expr, $l:expr, $codes:expr) => {{
                        let (quad, l, codes) = ($quad, $l, $codes);
                        // 128 less where codes use the bit of the sign.
                        let codes =
                            if BITS == 8 { veorq_u8(codes, vdupq_n_u8(128)) } else { codes };
                        let codes = vreinterpretq_s8_u8(codes);
                        unroll!(t in [0 1 2 3] { if t < M {
                            let at = quad * M + t;
                            dots[t][l] = dot_at(dots[t][l], codes, x[at / 4], at % 4);
                        } });
                    }};
                }
                each_quad!(BITS, R, FIRST, at, sparse, add);
                if BITS == 8 {
                    let less = less::<M>(&x);
                    unroll!(t in [0 1 2 3] { if t < M { unroll!(l in [0 1 2 3] { if l < R {
                        dots[t][l] = vsubq_s32(dots[t][l], less[t]);
                    } }); } });
                }
                if !PER_TOKEN {
                    unroll!(t in [0 1 2 3] { if t < M { unroll!(l in [0 1 2 3] { if l < R {
                        let dot = vcvtq_f32_s32(dots[t][l]);
                        sums[t][l] = vfmaq_n_f32(sums[t][l], dot, *a.add(t));
                    } }); } });
                }
                at = at.add(block_bytes);
                q = q.add(BLOCK * M);
                a = a.add(M);
            }
        }
        if M == 1 {
            ask(at, 128);
        }
        // SAFETY: scales and offsets stand behind the blocks of a group.
        let of_rows = unsafe { scales::<R>(shape, at, FIRST) };
        unroll!(l in [0 1 2 3] { if l < R {
            let (scale, offset) = of_rows[l];
            unroll!(t in [0 1 2 3] { if t < M {
                let (mut sum, total) = (sums[t][l], totals[t][l]);
                if PER_TOKEN {
                    sum = vmulq_n_f32(vcvtq_f32_s32(dots[t][l]), input.scales[t]);
                }
                let x = vdupq_n_f32(input.sums[group * M + t]);
                totals[t][l] = if shape.offset == Offset::Minimum {
                    vfmsq_f32(vfmaq_f32(total, sum, scale), offset, x)
                } else {
                    vfmaq_f32(total, vfmsq_f32(sum, offset, x), scale)
                };
            } });
        } });
        // SAFETY: as above; at most one past the end of the tile.
        at = unsafe { at.add(shape.scale_bytes() + shape.offset_bytes()) };
    }
    store(&totals, FIRST, out);
}

/// For each of `M` tokens -128 times the sum of its 32 bytes, in all lanes.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn less<const M: usize>(x: &[int8x16_t; 8]) -> [int32x4_t; 4] {
    let mut less = vdupq_n_s32(0);
    unroll!(v in [0 1 2 3 4 5 6 7] { if v < 2 * M {
        less = dot(less, vdupq_n_s8(-128), x[v]);
    } });
    // A lane holds a token's part, and the next lane the next token's.
    let none = vdupq_n_s32(0);
    match M {
        1 => {
            let pairs = vpaddq_s32(less, less);
            [vpaddq_s32(pairs, pairs), none, none, none]
        }
        2 => {
            let both = vaddq_s32(less, vextq_s32::<2>(less, less));
            [vdupq_laneq_s32::<0>(both), vdupq_laneq_s32::<1>(both), none, none]
        }
        _ => [
            vdupq_laneq_s32::<0>(less),
            vdupq_laneq_s32::<1>(less),
            vdupq_laneq_s32::<2>(less),
            vdupq_laneq_s32::<3>(less),
        ],
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn store<const M: usize, const R: usize>(
    totals: &[[float32x4_t; R]; M],
    first: usize,
    out: &mut [[f32; ROWS]],
) {
    unroll!(t in [0 1 2 3] { if t < M { unroll!(l in [0 1 2 3] { if l < R {
        let to = &mut out[t][(first + l) * LANES..(first + l + 1) * LANES];
        // SAFETY: the store writes four floats, which `to` has.
        unsafe { vst1q_f32(to.as_mut_ptr(), totals[t][l]) };
    } }); } });
}

/// Calls macro `$each(place, register, weights)` for the 32 places of `$registers` quarters of a block; weights are codes
/// less their middle, of four rows.
macro_rules! each_place {
    ($bits:ident, $registers:ident, $at:expr, $middle:expr, $sparse:expr, $each:ident) => {{
        let middle = $middle;
        macro_rules! widen {
            ($quad:expr, $l:expr, $codes:expr) => {{
                let (quad, l) = ($quad, $l);
                let v = vreinterpretq_s32_u8(vsubq_u8($codes, middle));
                $each!(4 * quad, l, vcvtq_f32_s32(vshrq_n_s32::<24>(vshlq_n_s32::<24>(v))));
                $each!(4 * quad + 1, l, vcvtq_f32_s32(vshrq_n_s32::<24>(vshlq_n_s32::<16>(v))));
                $each!(4 * quad + 2, l, vcvtq_f32_s32(vshrq_n_s32::<24>(vshlq_n_s32::<8>(v))));
                $each!(4 * quad + 3, l, vcvtq_f32_s32(vshrq_n_s32::<24>(v)));
            }};
        }
        each_quad!($bits, $registers, 0, $at, $sparse, widen);
    }};
}

/// The 16 rows of a tile times `M` tokens of f32; each token has `4 / M` sums.
#[target_feature(enable = "neon")]
pub(crate) fn exact<const BITS: u8, const M: usize>(
    shape: &Shape,
    tile: &[u8],
    input: FloatChunk<'_>,
    out: &mut [[f32; ROWS]],
) {
    check(shape, tile, BITS);
    assert_eq!(input.x.len(), shape.places() * M);
    let block_bytes = block_bytes(BITS);
    let (middle, byte) = (vdupq_n_f32(shape.middle()), vdupq_n_u8(1 << (shape.bits - 1)));
    let (mut at, mut x) = (tile.as_ptr(), input.x.as_ptr());
    let mut totals = [[vdupq_n_f32(0.0); WHOLE]; M];
    for group in 0..shape.groups() {
        let blocks = (shape.group_blocks[group + 1] - shape.group_blocks[group]) as usize;
        let mut sums = [[[vdupq_n_f32(0.0); WHOLE]; 4]; M];
        // SAFETY: by the checks above scales stand behind the blocks of the group.
        let sparse = unsafe { Sparse::new::<BITS>(shape, at.add(blocks * block_bytes)) };
        for _ in 0..blocks {
            if M == 1 {
                ask(at, block_bytes);
            }
            // SAFETY: by the checks above the tile holds `block_bytes` for each block, and `x` holds 32
            // floats of each of the `M` tokens for each block.
            unsafe {
                macro_rules! add {
                    ($place:expr, $l:expr, $weights:expr) => {{
                        let (place, l, weights) = ($place, $l, $weights);
                        let chain = if M >= 4 { 0 } else { place % (4 / M) };
                        unroll!(t in [0 1 2 3] { if t < M {
                            // Four at a time, or every one would take a register of its own.
                            let at = place * M + t;
                            let x = vld1q_f32(x.add(at / 4 * 4));
                            sums[t][chain][l] = fma_at(sums[t][chain][l], weights, x, at % 4);
                        } });
                    }};
                }
                each_place!(BITS, WHOLE, at, byte, &sparse, add);
                at = at.add(block_bytes);
                x = x.add(BLOCK * M);
            }
        }
        if M == 1 {
            ask(at, 128);
        }
        // SAFETY: scales and offsets stand behind the blocks of a group.
        let of_rows = unsafe { scales::<WHOLE>(shape, at, 0) };
        unroll!(l in [0 1 2 3] {
            let (scale, offset) = of_rows[l];
            unroll!(t in [0 1 2 3] { if t < M {
                let [a, b, c, d] = sums[t];
                let sum = if M >= 4 {
                    a[l]
                } else {
                    vaddq_f32(vaddq_f32(a[l], b[l]), vaddq_f32(c[l], d[l]))
                };
                let x = vdupq_n_f32(input.sums[group * M + t]);
                let total = totals[t][l];
                totals[t][l] = if shape.offset == Offset::Minimum {
                    let sum = vfmaq_f32(sum, middle, x);
                    vfmsq_f32(vfmaq_f32(total, sum, scale), offset, x)
                } else {
                    let sum = vfmsq_f32(sum, vsubq_f32(offset, middle), x);
                    vfmaq_f32(total, sum, scale)
                };
            } });
        });
        // SAFETY: as above; at most one past the end of the tile.
        at = unsafe { at.add(shape.scale_bytes() + shape.offset_bytes()) };
    }
    store(&totals, 0, out);
}

/// Writes the weights of a tile as f32, `to[place * stride + row]`; the same bits as the scalar version.
///
/// # Safety
/// For each place sixteen floats from `to + place * stride` on may be written, and nobody else uses them.
#[target_feature(enable = "neon")]
pub(crate) unsafe fn dequantize<const BITS: u8>(
    shape: &Shape,
    tile: &[u8],
    mut to: *mut f32,
    stride: usize,
) {
    check(shape, tile, BITS);
    let block_bytes = block_bytes(BITS);
    let (middle, byte) = (vdupq_n_f32(shape.middle()), vdupq_n_u8(1 << (shape.bits - 1)));
    let mut at = tile.as_ptr();
    for group in 0..shape.groups() {
        let blocks = (shape.group_blocks[group + 1] - shape.group_blocks[group]) as usize;
        // SAFETY: by the checks above a group is its blocks, its scales and its offsets; what is written is
        // the caller's promise.
        unsafe {
            let behind = at.add(blocks * block_bytes);
            let sparse = Sparse::new::<BITS>(shape, behind);
            let of_rows = scales::<WHOLE>(shape, behind, 0);
            for _ in 0..blocks {
                macro_rules! write {
                    ($place:expr, $l:expr, $weights:expr) => {{
                        let (weights, (scale, offset)) = ($weights, of_rows[$l]);
                        let weight = if shape.offset == Offset::Minimum {
                            vfmaq_f32(vnegq_f32(offset), vaddq_f32(weights, middle), scale)
                        } else {
                            vmulq_f32(vsubq_f32(weights, vsubq_f32(offset, middle)), scale)
                        };
                        vst1q_f32(to.add($place * stride + $l * LANES), weight);
                    }};
                }
                each_place!(BITS, WHOLE, at, byte, &sparse, write);
                at = at.add(block_bytes);
                to = to.wrapping_add(BLOCK * stride);
            }
            at = behind.add(shape.scale_bytes() + shape.offset_bytes());
        }
    }
}
