//! AVX-512: 16 rows of a tile are the lanes of a register. The byte kernels need VNNI as well.
//!
//! Nothing is summed across lanes. A block costs, besides unpacking its codes once, 8 byte dot products,
//! one conversion and one FMA for each token; scales are applied once per group.

use std::arch::x86_64::{
    __m512, __m512i, _MM_HINT_T1, _mm_loadu_si128, _mm_prefetch, _mm256_loadu_si256, _mm512_add_ps,
    _mm512_and_si512, _mm512_castsi512_ps, _mm512_cvtepi32_ps, _mm512_cvtepu8_epi32,
    _mm512_cvtepu16_epi32, _mm512_cvtph_ps, _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_fmsub_ps,
    _mm512_fnmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mul_ps, _mm512_mullo_epi32,
    _mm512_or_si512, _mm512_permutexvar_epi32, _mm512_permutexvar_ps, _mm512_set1_epi8,
    _mm512_set1_epi32, _mm512_set1_epi64, _mm512_set1_ps, _mm512_set4_epi32, _mm512_setr_epi32,
    _mm512_setzero_ps, _mm512_setzero_si512, _mm512_shuffle_epi8, _mm512_slli_epi16,
    _mm512_slli_epi32, _mm512_srai_epi32, _mm512_srli_epi16, _mm512_srli_epi32, _mm512_srlv_epi32,
    _mm512_storeu_ps, _mm512_storeu_si512, _mm512_sub_ps, _mm512_ternarylogic_epi32,
    _mm512_xor_si512,
};

use super::input::{ByteChunk, FloatChunk};
use super::tiles::{BLOCK, KEPT, Offset, QUAD, QUADS, ROWS, SPARSE, ScaleType, Shape, block_bytes};

/// Writes a block once for each number, so that arrays of registers are indexed by constants.
macro_rules! unroll {
    ($i:ident in [$($n:literal)*] $body:block) => {{ $({ let $i: usize = $n; $body })* }};
}

/// How far ahead of the codes being multiplied memory is asked for, into the second-level cache: the
/// first has too few slots for lines on their way to keep memory busy. Every line has to be asked for,
/// those of the scales too.
const AHEAD: usize = 2048;
/// The same of each of several tiles.
const AHEAD_EACH: usize = 1024;
/// Tiles that are multiplied by so many tokens side by side: memory is busier with several streams than with one.
pub(crate) const fn side(tokens: usize) -> usize {
    match tokens {
        ..=2 => 4,
        4 => 2,
        _ => 1,
    }
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

/// For each lane the zero points of a row in four bytes: what codes that are not stored are, and what those that are
/// stored were exclusive-ored with. Zero where every code is stored.
///
/// # Safety
/// `at` is where the scales of a group begin.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn filling<const BITS: u8>(shape: &Shape, at: *const u8) -> __m512i {
    if BITS != SPARSE {
        return _mm512_setzero_si512();
    }
    if shape.offset == Offset::Middle {
        return _mm512_set1_epi8(8);
    }
    // SAFETY: sixteen bytes stand behind the scales: codes of which few are stored have zero points.
    let zeros = unsafe { _mm_loadu_si128(at.add(shape.scale_bytes()).cast()) };
    _mm512_mullo_epi32(_mm512_cvtepu8_epi32(zeros), _mm512_set1_epi32(0x0101_0101))
}

/// Where in the two stored codes of a row its four columns are found, by which of them are kept; -128 where nowhere.
const PLACES: [i32; 16] = {
    let mut places = [0i32; 16];
    let mut kept = 0;
    while kept < 16 {
        let (mut column, mut next) = (0, 0);
        while column < 4 {
            let there = kept >> column & 1 == 1;
            places[kept] |= (if there { next } else { 0x80 }) << (8 * column);
            next += if there { 1 } else { 0 };
            column += 1;
        }
        kept += 1;
    }
    places
};

/// The codes of a block of which two in four are stored, as quads of unsigned bytes.
///
/// # Safety
/// `at` begins a whole block.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn sparse_quads(at: *const u8, filling: __m512i) -> [__m512i; QUADS] {
    let mask = _mm512_set1_epi8(15);
    // Lanes are rows: the word of a quad has four bits of each, of even rows in its first half.
    let shifts = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
    let base = _mm512_set4_epi32(0x0606_0606, 0x0404_0404, 0x0202_0202, 0);
    let second = _mm512_set1_epi8(8);
    let mut quads = [_mm512_setzero_si512(); QUADS];
    // SAFETY: a block has two vectors of codes and eight words.
    unsafe {
        let places = _mm512_loadu_si512(PLACES.as_ptr().cast());
        macro_rules! expand {
            ($quad:expr, $codes:expr, $base:expr) => {{
                let word = at.add(KEPT + 8 * $quad).cast::<i64>().read_unaligned();
                let kept = _mm512_srlv_epi32(_mm512_set1_epi64(word), shifts);
                // The low four bits of each lane choose.
                let from = _mm512_or_si512(_mm512_permutexvar_epi32(kept, places), $base);
                quads[$quad] = _mm512_xor_si512(_mm512_shuffle_epi8($codes, from), filling);
            }};
        }
        let next = _mm512_or_si512(base, second);
        unroll!(v in [0 1] {
            let codes = _mm512_loadu_si512(at.add(v * QUAD).cast());
            let low = _mm512_and_si512(codes, mask);
            let high = _mm512_and_si512(_mm512_srli_epi16::<4>(codes), mask);
            expand!(2 * v, low, base);
            expand!(2 * v + 1, low, next);
            expand!(2 * v + 4, high, base);
            expand!(2 * v + 5, high, next);
        });
    }
    quads
}

/// The codes of a block as quads of unsigned bytes.
///
/// # Safety
/// `at` begins a whole block.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn quads<const BITS: u8>(at: *const u8, filling: __m512i) -> [__m512i; QUADS] {
    if BITS == SPARSE {
        // SAFETY: the caller's promise.
        return unsafe { sparse_quads(at, filling) };
    }
    macro_rules! load {
        ($vector:expr) => {
            // SAFETY: a block of `BITS` is as many vectors of 64 bytes as are read here.
            unsafe { _mm512_loadu_si512(at.add($vector * QUAD).cast()) }
        };
    }
    let mut quads = [_mm512_setzero_si512(); QUADS];
    if BITS == 8 {
        unroll!(q in [0 1 2 3 4 5 6 7] { quads[q] = load!(q); });
    } else if BITS == 4 {
        let mask = _mm512_set1_epi8(15);
        unroll!(j in [0 1 2 3] {
            let v = load!(j);
            quads[j] = _mm512_and_si512(v, mask);
            quads[j + 4] = _mm512_and_si512(_mm512_srli_epi16::<4>(v), mask);
        });
    } else {
        let mask = _mm512_set1_epi8(3);
        unroll!(j in [0 1] {
            let v = load!(j);
            quads[j] = _mm512_and_si512(v, mask);
            quads[j + 2] = _mm512_and_si512(_mm512_srli_epi16::<2>(v), mask);
            quads[j + 4] = _mm512_and_si512(_mm512_srli_epi16::<4>(v), mask);
            quads[j + 6] = _mm512_and_si512(_mm512_srli_epi16::<6>(v), mask);
        });
        if BITS == 3 {
            let (high, bit) = (load!(2), _mm512_set1_epi8(4));
            macro_rules! join {
                ($quad:literal, $high:expr) => {
                    // 0xf8 is a | (b & c).
                    quads[$quad] = _mm512_ternarylogic_epi32::<0xf8>(quads[$quad], $high, bit);
                };
            }
            join!(0, _mm512_slli_epi16::<2>(high));
            join!(1, _mm512_slli_epi16::<1>(high));
            join!(2, high);
            join!(3, _mm512_srli_epi16::<1>(high));
            join!(4, _mm512_srli_epi16::<2>(high));
            join!(5, _mm512_srli_epi16::<3>(high));
            join!(6, _mm512_srli_epi16::<4>(high));
            join!(7, _mm512_srli_epi16::<5>(high));
        }
    }
    quads
}

/// Sixteen floats of the type of the scales.
///
/// # Safety
/// `at` begins as many bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn floats(scale: ScaleType, at: *const u8) -> __m512 {
    // SAFETY: the caller's promise; no load needs alignment.
    unsafe {
        match scale {
            ScaleType::F16 => _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())),
            ScaleType::Bf16 => _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(
                _mm256_loadu_si256(at.cast()),
            ))),
            ScaleType::F32 => _mm512_loadu_ps(at.cast()),
        }
    }
}

/// Scales, and zero points or minima, behind the blocks of a group.
///
/// # Safety
/// `at` is where they begin.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(crate) unsafe fn scales(shape: &Shape, middle: __m512, at: *const u8) -> (__m512, __m512) {
    // SAFETY: the caller's promise; no load needs alignment.
    unsafe {
        let behind = at.add(shape.scale_bytes());
        let offset = match shape.offset {
            Offset::Middle => middle,
            Offset::Byte => {
                _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(behind.cast())))
            }
            Offset::Word => {
                _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm256_loadu_si256(behind.cast())))
            }
            Offset::Minimum => floats(shape.scale, behind),
        };
        (floats(shape.scale, at), offset)
    }
}

/// The 16 rows of each of `T` neighbouring tiles times `M` tokens of bytes, `out[tile * M + token]`. With `PER_TOKEN` all
/// scales of a token are one.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
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
    let block_bytes = block_bytes(BITS);
    let behind = shape.scale_bytes() + shape.offset_bytes();
    let stride = shape.tile_bytes();
    let middle = _mm512_set1_ps(shape.middle());
    let (mut at, mut q, mut a) = (tiles.as_ptr(), input.q.as_ptr(), input.scales.as_ptr());
    // Bytes of each tile from `at` on. Behind its end the tile `T` tiles further on is wanted next.
    let mut left = stride;
    let ahead = |left: usize| match T {
        1 => AHEAD,
        _ if left > AHEAD_EACH => AHEAD_EACH,
        _ => AHEAD_EACH + (T - 1) * stride,
    };
    let mut totals = [[_mm512_setzero_ps(); M]; T];
    for group in 0..shape.groups() {
        let mut sums = [[_mm512_setzero_ps(); M]; T];
        let mut dots = [[_mm512_setzero_si512(); M]; T];
        let mut filled = [_mm512_setzero_si512(); T];
        let mut blocks = shape.group_blocks[group + 1] - shape.group_blocks[group];
        let scales_at = blocks as usize * block_bytes;
        unroll!(s in [0 1 2 3] { if s < T {
            // SAFETY: by the checks above scales stand behind the blocks of the group.
            filled[s] = unsafe { filling::<BITS>(shape, at.add(s * stride + scales_at)) };
        } });
        while blocks > 0 {
            blocks -= 1;
            let ahead = ahead(left);
            // SAFETY: by the checks above each tile holds `block_bytes` for each block, and `q` and
            // `a` hold 32 bytes and one scale of each of the `M` tokens for each block.
            unsafe {
                unroll!(s in [0 1 2 3] { if s < T {
                    let at = at.add(s * stride);
                    ask(at, ahead, block_bytes);
                    let weights = quads::<BITS>(at, filled[s]);
                    unroll!(t in [0 1 2 3 4 5 6 7] { if t < M {
                        let mut dot = if PER_TOKEN { dots[s][t] } else { _mm512_setzero_si512() };
                        unroll!(quad in [0 1 2 3 4 5 6 7] {
                            let x = q.add((quad * M + t) * 4).cast::<i32>().read_unaligned();
                            dot = _mm512_dpbusd_epi32(dot, weights[quad], _mm512_set1_epi32(x));
                        });
                        if PER_TOKEN {
                            dots[s][t] = dot;
                        } else {
                            let scale = _mm512_set1_ps(*a.add(t));
                            sums[s][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, sums[s][t]);
                        }
                    } });
                } });
                at = at.add(block_bytes);
                q = q.add(BLOCK * M);
                a = a.add(M);
            }
            left -= block_bytes;
        }
        let ahead = ahead(left);
        unroll!(s in [0 1 2 3] { if s < T {
            // SAFETY: scales and offsets stand behind the blocks of a group, by the checks above.
            let at = unsafe { at.add(s * stride) };
            ask(at, ahead, 128);
            // SAFETY: as above.
            let (scale, offset) = unsafe { scales(shape, middle, at) };
            unroll!(t in [0 1 2 3 4 5 6 7] { if t < M {
                if PER_TOKEN {
                    let scale = _mm512_set1_ps(input.scales[t]);
                    sums[s][t] = _mm512_mul_ps(_mm512_cvtepi32_ps(dots[s][t]), scale);
                }
                let x = _mm512_set1_ps(input.sums[group * M + t]);
                totals[s][t] = if shape.offset == Offset::Minimum {
                    _mm512_fnmadd_ps(offset, x, _mm512_fmadd_ps(sums[s][t], scale, totals[s][t]))
                } else {
                    _mm512_fmadd_ps(_mm512_fnmadd_ps(offset, x, sums[s][t]), scale, totals[s][t])
                };
            } });
        } });
        // SAFETY: as above; at most one past the end of the first tile.
        at = unsafe { at.add(behind) };
        left -= behind;
    }
    unroll!(s in [0 1 2 3] { if s < T {
        store(&totals[s], &mut out[s * M..]);
    } });
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store<const M: usize>(totals: &[__m512; M], out: &mut [[f32; ROWS]]) {
    unroll!(t in [0 1 2 3 4 5 6 7] { if t < M {
        // SAFETY: the store writes sixteen floats, which an element of `out` has.
        unsafe { _mm512_storeu_ps(out[t].as_mut_ptr(), totals[t]) };
    } });
}

/// Codes less their middle, by the low four bits of a lane.
#[inline]
#[target_feature(enable = "avx512f")]
fn centred<const BITS: u8>() -> __m512 {
    let mut table = [0.0f32; 16];
    let mut i = 0u8;
    while i < 16 {
        let bits = if BITS == SPARSE { 4 } else { BITS };
        let mask = if BITS == 8 { 0 } else { (1 << bits) - 1 };
        table[i as usize] = f32::from(i & mask) - f32::from(1u8 << (bits - 1));
        i += 1;
    }
    // SAFETY: the table has sixteen floats.
    unsafe { _mm512_loadu_ps(table.as_ptr()) }
}

/// Calls macro `$each(place, weights)` for the 32 places of the block at `$at`; weights are codes less
/// their middle, sixteen rows of them.
macro_rules! each_place {
    ($bits:ident, $at:ident, $filling:ident, $table:ident, $each:ident) => {{
        macro_rules! load {
            ($vector:expr) => {
                _mm512_loadu_si512($at.add($vector * QUAD).cast())
            };
        }
        macro_rules! code {
            ($v:expr) => {
                _mm512_permutexvar_ps($v, $table)
            };
        }
        if $bits == 8 {
            let flip = _mm512_set1_epi8(-128);
            macro_rules! byte {
                ($v:expr) => {
                    _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>($v))
                };
            }
            unroll!(quad in [0 1 2 3 4 5 6 7] {
                let v = _mm512_xor_si512(load!(quad), flip);
                $each!(4 * quad, byte!(_mm512_slli_epi32::<24>(v)));
                $each!(4 * quad + 1, byte!(_mm512_slli_epi32::<16>(v)));
                $each!(4 * quad + 2, byte!(_mm512_slli_epi32::<8>(v)));
                $each!(4 * quad + 3, byte!(v));
            });
        } else if $bits == 4 {
            unroll!(j in [0 1 2 3] {
                let v = load!(j);
                $each!(4 * j, code!(v));
                $each!(4 * (j + 4), code!(_mm512_srli_epi32::<4>(v)));
                $each!(4 * j + 1, code!(_mm512_srli_epi32::<8>(v)));
                $each!(4 * (j + 4) + 1, code!(_mm512_srli_epi32::<12>(v)));
                $each!(4 * j + 2, code!(_mm512_srli_epi32::<16>(v)));
                $each!(4 * (j + 4) + 2, code!(_mm512_srli_epi32::<20>(v)));
                $each!(4 * j + 3, code!(_mm512_srli_epi32::<24>(v)));
                $each!(4 * (j + 4) + 3, code!(_mm512_srli_epi32::<28>(v)));
            });
        } else {
            let weights = quads::<$bits>($at, $filling);
            unroll!(quad in [0 1 2 3 4 5 6 7] {
                let v = weights[quad];
                $each!(4 * quad, code!(v));
                $each!(4 * quad + 1, code!(_mm512_srli_epi32::<8>(v)));
                $each!(4 * quad + 2, code!(_mm512_srli_epi32::<16>(v)));
                $each!(4 * quad + 3, code!(_mm512_srli_epi32::<24>(v)));
            });
        }
    }};
}

/// The 16 rows of a tile times `M` tokens of f32; each token has `4 / M` sums, at least one.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(crate) fn exact<const BITS: u8, const M: usize>(
    shape: &Shape,
    tile: &[u8],
    input: FloatChunk<'_>,
    out: &mut [[f32; ROWS]],
) {
    check(shape, tile, 1, BITS);
    assert_eq!(input.x.len(), shape.places() * M);
    let block_bytes = block_bytes(BITS);
    let behind = shape.scale_bytes() + shape.offset_bytes();
    let (middle, table) = (_mm512_set1_ps(shape.middle()), centred::<BITS>());
    let (mut at, mut x) = (tile.as_ptr(), input.x.as_ptr());
    let mut totals = [_mm512_setzero_ps(); M];
    for group in 0..shape.groups() {
        let mut sums = [[_mm512_setzero_ps(); 4]; M];
        let mut blocks = shape.group_blocks[group + 1] - shape.group_blocks[group];
        // SAFETY: by the checks above scales stand behind the blocks of the group.
        let filling = unsafe { filling::<BITS>(shape, at.add(blocks as usize * block_bytes)) };
        while blocks > 0 {
            blocks -= 1;
            ask(at, AHEAD, block_bytes);
            // SAFETY: by the checks above the tile holds `block_bytes` for each block, and `x` holds 32
            // floats of each of the `M` tokens for each block.
            unsafe {
                macro_rules! add {
                    ($place:expr, $weights:expr) => {{
                        let (place, weights) = ($place, $weights);
                        let chain = if M >= 4 { 0 } else { place % (4 / M) };
                        unroll!(t in [0 1 2 3 4 5 6 7] { if t < M {
                            let x = _mm512_set1_ps(*x.add(place * M + t));
                            sums[t][chain] = _mm512_fmadd_ps(weights, x, sums[t][chain]);
                        } });
                    }};
                }
                each_place!(BITS, at, filling, table, add);
                at = at.add(block_bytes);
                x = x.add(BLOCK * M);
            }
        }
        ask(at, AHEAD, 128);
        // SAFETY: scales and offsets stand behind the blocks of a group, by the checks above.
        let (scale, offset) = unsafe { scales(shape, middle, at) };
        unroll!(t in [0 1 2 3 4 5 6 7] { if t < M {
            let [a, b, c, d] = sums[t];
            let sum = if M >= 4 { a } else { _mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d)) };
            let x = _mm512_set1_ps(input.sums[group * M + t]);
            totals[t] = if shape.offset == Offset::Minimum {
                let sum = _mm512_fmadd_ps(middle, x, sum);
                _mm512_fnmadd_ps(offset, x, _mm512_fmadd_ps(sum, scale, totals[t]))
            } else {
                let sum = _mm512_fnmadd_ps(_mm512_sub_ps(offset, middle), x, sum);
                _mm512_fmadd_ps(sum, scale, totals[t])
            };
        } });
        // SAFETY: as above; at most one past the end of the tile.
        at = unsafe { at.add(behind) };
    }
    store(&totals, out);
}

/// Writes the weights of a tile as f32, `to[place * stride + row]`; the same bits as the scalar version.
///
/// # Safety
/// For each place sixteen floats from `to + place * stride` on may be written, and nobody else uses them.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(crate) unsafe fn dequantize<const BITS: u8>(
    shape: &Shape,
    tile: &[u8],
    mut to: *mut f32,
    stride: usize,
) {
    check(shape, tile, 1, BITS);
    let block_bytes = block_bytes(BITS);
    let (middle, table) = (_mm512_set1_ps(shape.middle()), centred::<BITS>());
    let mut at = tile.as_ptr();
    for group in 0..shape.groups() {
        let blocks = (shape.group_blocks[group + 1] - shape.group_blocks[group]) as usize;
        // SAFETY: by the checks above a group is its blocks, its scales and its offsets; what is written is
        // the caller's promise.
        unsafe {
            let behind = at.add(blocks * block_bytes);
            let (scale, offset) = scales(shape, middle, behind);
            let filling = filling::<BITS>(shape, behind);
            let shift = _mm512_sub_ps(offset, middle);
            for _ in 0..blocks {
                macro_rules! write {
                    ($place:expr, $weights:expr) => {{
                        let weights = $weights;
                        let weight = if shape.offset == Offset::Minimum {
                            _mm512_fmsub_ps(_mm512_add_ps(weights, middle), scale, offset)
                        } else {
                            _mm512_mul_ps(_mm512_sub_ps(weights, shift), scale)
                        };
                        _mm512_storeu_ps(to.add($place * stride), weight);
                    }};
                }
                each_place!(BITS, at, filling, table, write);
                at = at.add(block_bytes);
                to = to.wrapping_add(BLOCK * stride);
            }
            at = at.add(shape.scale_bytes() + shape.offset_bytes());
        }
    }
}

/// Writes the codes of a tile as bytes, quad after quad.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(crate) fn unpack<const BITS: u8>(shape: &Shape, tile: &[u8], to: &mut [u8]) {
    check(shape, tile, 1, BITS);
    assert_eq!(to.len(), shape.places() * ROWS);
    let (mut at, mut to) = (0, to.as_chunks_mut::<{ QUADS * QUAD }>().0.iter_mut());
    for group in 0..shape.groups() {
        let blocks = (shape.group_blocks[group + 1] - shape.group_blocks[group]) as usize;
        // SAFETY: by the checks above scales stand behind the blocks of the group.
        let filling =
            unsafe { filling::<BITS>(shape, tile.as_ptr().add(at + blocks * shape.block_bytes())) };
        for _ in 0..blocks {
            let to = to.next().expect("there is room for every block");
            // SAFETY: by the checks above a whole block begins at `at`, and eight stores of 64 bytes are
            // the room of a block.
            unsafe {
                let codes = quads::<BITS>(tile.as_ptr().add(at), filling);
                unroll!(quad in [0 1 2 3 4 5 6 7] {
                    _mm512_storeu_si512(to.as_mut_ptr().add(quad * QUAD).cast(), codes[quad]);
                });
            }
            at += shape.block_bytes();
        }
        at += shape.scale_bytes() + shape.offset_bytes();
    }
}
