//! AVX-512 F: sixteen codes per register; a 4-bit code is an index into a table of the sixteen weights
//! of its group, so that decoding is one permutation and products are those of the exact weights.

use std::arch::x86_64::{
    __m512, __m512i, _mm_loadu_si128, _mm512_add_ps, _mm512_cvtepi32_ps, _mm512_cvtepu8_epi32,
    _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_mul_ps, _mm512_permutexvar_ps, _mm512_reduce_add_ps,
    _mm512_set1_ps, _mm512_setr_ps, _mm512_setzero_ps, _mm512_srli_epi32, _mm512_storeu_ps,
    _mm512_sub_ps,
};

use super::rows::{Activations, BLOCK, Rows};

const HALF: usize = BLOCK / 2;

/// `W[row] · x[token + i]` for `i` in `0..M`; `NIBBLES` is `rows.nibbles`, a constant so that the loop
/// holds one kind of block.
#[target_feature(enable = "avx512f")]
pub(crate) fn dot<const M: usize, const NIBBLES: bool>(
    rows: &Rows,
    row: usize,
    input: &Activations,
    token: usize,
) -> [f32; M] {
    let x = token_blocks::<M>(input, token, rows.places());
    let codes = rows.row_codes(row);
    let (nibbles, bytes) = (codes.as_chunks::<HALF>().0, codes.as_chunks::<BLOCK>().0);
    let (scales, zeros) = (rows.row_scales(row), rows.row_zeros(row));
    let mut sums = [[_mm512_setzero_ps(); 2]; M];
    // Counters and plain loops: an iterator or a closure that is not inlined into a function with a
    // target feature keeps the sums in memory, which costs more than the products.
    let (mut group, mut block) = (0, 0);
    while group < scales.len() {
        let weights = Weights::new(scales[group], zeros[group]);
        group += 1;
        let end = rows.group_blocks[group] as usize;
        while block < end {
            let halves = if NIBBLES {
                weights.nibbles(&nibbles[block])
            } else {
                weights.bytes(&bytes[block])
            };
            let mut i = 0;
            while i < M {
                let [low, high] = &x[i][block];
                sums[i][0] = _mm512_fmadd_ps(halves[0], load(low), sums[i][0]);
                sums[i][1] = _mm512_fmadd_ps(halves[1], load(high), sums[i][1]);
                i += 1;
            }
            block += 1;
        }
    }
    let mut out = [0.0; M];
    let mut i = 0;
    while i < M {
        out[i] = _mm512_reduce_add_ps(_mm512_add_ps(sums[i][0], sums[i][1]));
        i += 1;
    }
    out
}

/// The activations of `M` tokens, cut into blocks of two halves.
#[inline]
fn token_blocks<const M: usize>(
    input: &Activations,
    token: usize,
    places: usize,
) -> [&[[[f32; HALF]; 2]]; M] {
    std::array::from_fn(|i| {
        let x = &input.x[(token + i) * places..(token + i + 1) * places];
        x.as_chunks::<HALF>().0.as_chunks::<2>().0
    })
}

/// The map from codes to weights of one group.
struct Weights {
    table: __m512,
    scale: __m512,
    zero: __m512,
}

impl Weights {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn new(scale: f32, zero: f32) -> Self {
        let (scale, zero) = (_mm512_set1_ps(scale), _mm512_set1_ps(zero));
        let codes = _mm512_setr_ps(
            0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0,
        );
        Self { table: _mm512_mul_ps(_mm512_sub_ps(codes, zero), scale), scale, zero }
    }

    /// The permutation reads only the low four bits of an index, so that no mask is needed.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn nibbles(&self, codes: &[u8; HALF]) -> [__m512; 2] {
        let codes = widen(codes);
        [
            _mm512_permutexvar_ps(codes, self.table),
            _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(codes), self.table),
        ]
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn bytes(&self, codes: &[u8; BLOCK]) -> [__m512; 2] {
        let (low, high) = codes.split_at(HALF);
        let low = _mm512_cvtepi32_ps(widen(low.try_into().expect("half a block")));
        let high = _mm512_cvtepi32_ps(widen(high.try_into().expect("half a block")));
        [
            _mm512_mul_ps(_mm512_sub_ps(low, self.zero), self.scale),
            _mm512_mul_ps(_mm512_sub_ps(high, self.zero), self.scale),
        ]
    }
}

/// Sixteen bytes to sixteen 32-bit integers.
#[inline]
#[target_feature(enable = "avx512f")]
fn widen(bytes: &[u8; HALF]) -> __m512i {
    // SAFETY: the load reads sixteen bytes, which the array has, and needs no alignment.
    _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) })
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(values: &[f32; HALF]) -> __m512 {
    // SAFETY: the load reads sixteen floats, which the array has, and needs no alignment.
    unsafe { _mm512_loadu_ps(values.as_ptr()) }
}

/// Writes the weights of one row, in the order of places; the same bits as the scalar version.
#[target_feature(enable = "avx512f")]
pub(crate) fn dequantize(rows: &Rows, row: usize, out: &mut [f32]) {
    let codes = rows.row_codes(row);
    let (nibbles, codes) = (codes.as_chunks::<HALF>().0, codes.as_chunks::<BLOCK>().0);
    let out = out.as_chunks_mut::<HALF>().0.as_chunks_mut::<2>().0;
    let (scales, zeros) = (rows.row_scales(row), rows.row_zeros(row));
    for group in 0..rows.groups() {
        let weights = Weights::new(scales[group], zeros[group]);
        let mut block = rows.group_blocks[group] as usize;
        while block < rows.group_blocks[group + 1] as usize {
            let halves = if rows.nibbles {
                weights.nibbles(&nibbles[block])
            } else {
                weights.bytes(&codes[block])
            };
            let out = &mut out[block];
            // SAFETY: the stores write sixteen floats each, which the two halves have.
            unsafe {
                _mm512_storeu_ps(out[0].as_mut_ptr(), halves[0]);
                _mm512_storeu_ps(out[1].as_mut_ptr(), halves[1]);
            }
            block += 1;
        }
    }
}
