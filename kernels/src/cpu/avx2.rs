//! AVX2 and FMA: `M` tokens at a time, eight codes per register.
//!
//! Per group `sum (code - zero) * x = sum code * x - zero * sum x`; the sums of `x` are made once per
//! call, so that a weight costs one conversion and one FMA per token.

use std::arch::x86_64::{
    __m256, __m256i, _mm_add_ps, _mm_add_ss, _mm_cvtss_f32, _mm_loadl_epi64, _mm_movehdup_ps,
    _mm_movehl_ps, _mm256_add_ps, _mm256_and_si256, _mm256_castps256_ps128, _mm256_cvtepi32_ps,
    _mm256_cvtepu8_epi32, _mm256_extractf128_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_mul_ps,
    _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_ps, _mm256_srli_epi32, _mm256_storeu_ps,
    _mm256_sub_ps,
};

use super::rows::{Activations, BLOCK, Rows};

const HALF: usize = BLOCK / 2;

/// `W[row] · x[token + i]` for `i` in `0..M`; `NIBBLES` is `rows.nibbles`, a constant so that the loop
/// holds one kind of block.
#[target_feature(enable = "avx2,fma")]
pub(crate) fn dot<const M: usize, const NIBBLES: bool>(
    rows: &Rows,
    row: usize,
    input: &Activations,
    token: usize,
) -> [f32; M] {
    let groups = rows.groups();
    let x = token_blocks::<M>(input, token, rows.places());
    let codes = rows.row_codes(row);
    let (nibbles, bytes) = (codes.as_chunks::<HALF>().0, codes.as_chunks::<BLOCK>().0);
    let (scales, zeros) = (rows.row_scales(row), rows.row_zeros(row));
    let mut totals = [_mm256_setzero_ps(); M];
    let mut shifts = [0.0f32; M];
    // Counters and plain loops: an iterator or a closure that is not inlined into a function with a
    // target feature keeps the sums in memory, which costs more than the products.
    let (mut group, mut block) = (0, 0);
    while group < groups {
        let mut sums = [[_mm256_setzero_ps(); 4]; M];
        let end = rows.group_blocks[group + 1] as usize;
        while block < end {
            let weights =
                if NIBBLES { nibble_block(&nibbles[block]) } else { byte_block(&bytes[block]) };
            let mut i = 0;
            while i < M {
                let x = &x[i][block];
                sums[i][0] = _mm256_fmadd_ps(weights[0], load(&x[0]), sums[i][0]);
                sums[i][1] = _mm256_fmadd_ps(weights[1], load(&x[1]), sums[i][1]);
                sums[i][2] = _mm256_fmadd_ps(weights[2], load(&x[2]), sums[i][2]);
                sums[i][3] = _mm256_fmadd_ps(weights[3], load(&x[3]), sums[i][3]);
                i += 1;
            }
            block += 1;
        }
        let scale = _mm256_set1_ps(scales[group]);
        let shift = scales[group] * zeros[group];
        let mut i = 0;
        while i < M {
            let [a, b, c, d] = sums[i];
            let sum = _mm256_add_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d));
            totals[i] = _mm256_fmadd_ps(sum, scale, totals[i]);
            shifts[i] += shift * input.sums[(token + i) * groups + group];
            i += 1;
        }
        group += 1;
    }
    let mut out = [0.0; M];
    let mut i = 0;
    while i < M {
        out[i] = horizontal_sum(totals[i]) - shifts[i];
        i += 1;
    }
    out
}

/// The activations of `M` tokens, cut into blocks of four quarters.
#[inline]
fn token_blocks<const M: usize>(
    input: &Activations,
    token: usize,
    places: usize,
) -> [&[[[f32; 8]; 4]]; M] {
    std::array::from_fn(|i| {
        let x = &input.x[(token + i) * places..(token + i + 1) * places];
        x.as_chunks::<8>().0.as_chunks::<4>().0
    })
}

/// The 32 codes of a block of 16 bytes as floats, in the order of columns.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn nibble_block(codes: &[u8; HALF]) -> [__m256; 4] {
    let mask = _mm256_set1_epi32(15);
    let first = widen(codes.first_chunk().expect("a block has sixteen bytes"));
    let second = widen(codes.last_chunk().expect("a block has sixteen bytes"));
    [
        _mm256_cvtepi32_ps(_mm256_and_si256(first, mask)),
        _mm256_cvtepi32_ps(_mm256_and_si256(second, mask)),
        _mm256_cvtepi32_ps(_mm256_srli_epi32::<4>(first)),
        _mm256_cvtepi32_ps(_mm256_srli_epi32::<4>(second)),
    ]
}

/// The 32 codes of a block of 32 bytes as floats.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn byte_block(codes: &[u8; BLOCK]) -> [__m256; 4] {
    let quarters = codes.as_chunks::<8>().0;
    [
        _mm256_cvtepi32_ps(widen(&quarters[0])),
        _mm256_cvtepi32_ps(widen(&quarters[1])),
        _mm256_cvtepi32_ps(widen(&quarters[2])),
        _mm256_cvtepi32_ps(widen(&quarters[3])),
    ]
}

/// Eight bytes to eight 32-bit integers.
#[inline]
#[target_feature(enable = "avx2")]
fn widen(bytes: &[u8; 8]) -> __m256i {
    // SAFETY: the load reads eight bytes, which the array has, and needs no alignment.
    _mm256_cvtepu8_epi32(unsafe { _mm_loadl_epi64(bytes.as_ptr().cast()) })
}

#[inline]
#[target_feature(enable = "avx2")]
fn load(values: &[f32; 8]) -> __m256 {
    // SAFETY: the load reads eight floats, which the array has, and needs no alignment.
    unsafe { _mm256_loadu_ps(values.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn horizontal_sum(v: __m256) -> f32 {
    let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}

/// Writes the weights of one row, in the order of places; the same bits as the scalar version.
#[target_feature(enable = "avx2,fma")]
pub(crate) fn dequantize(rows: &Rows, row: usize, out: &mut [f32]) {
    let codes = rows.row_codes(row);
    let (nibbles, codes) = (codes.as_chunks::<HALF>().0, codes.as_chunks::<BLOCK>().0);
    let out = out.as_chunks_mut::<8>().0.as_chunks_mut::<4>().0;
    let (scales, zeros) = (rows.row_scales(row), rows.row_zeros(row));
    for group in 0..rows.groups() {
        let (scale, zero) = (_mm256_set1_ps(scales[group]), _mm256_set1_ps(zeros[group]));
        let mut block = rows.group_blocks[group] as usize;
        while block < rows.group_blocks[group + 1] as usize {
            let weights = if rows.nibbles {
                nibble_block(&nibbles[block])
            } else {
                byte_block(&codes[block])
            };
            let mut quarter = 0;
            while quarter < 4 {
                let weight = _mm256_mul_ps(_mm256_sub_ps(weights[quarter], zero), scale);
                // SAFETY: the store writes eight floats, which the quarter has.
                unsafe { _mm256_storeu_ps(out[block][quarter].as_mut_ptr(), weight) };
                quarter += 1;
            }
            block += 1;
        }
    }
}
