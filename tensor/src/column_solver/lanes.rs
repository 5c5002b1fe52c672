//! Vectors of rows.

use pulp::Simd;

/// Rows of a tile are padded to a multiple of this, the longest vector.
pub(super) const LANES: usize = 16;

/// One vector of `x` from element `at`.
#[inline(always)]
pub(super) fn load<S: Simd>(x: &[f32], at: usize) -> S::f32s {
    S::as_simd_f32s(&x[at..at + S::F32_LANES]).0[0]
}

#[inline(always)]
pub(super) fn store<S: Simd>(x: &mut [f32], at: usize, value: S::f32s) {
    S::as_mut_simd_f32s(&mut x[at..at + S::F32_LANES]).0[0] = value;
}

/// Codes nearest to `x`, `0..=top`, ties to even: adding 1.5 · 2²³ leaves the rounded integer.
#[inline(always)]
pub(super) fn round_code<S: Simd>(simd: S, x: S::f32s, top: S::f32s) -> S::f32s {
    let shift = simd.splat_f32s(12_582_912.0);
    let x = simd.min_f32s(simd.max_f32s(x, simd.splat_f32s(0.0)), top);
    simd.sub_f32s(simd.add_f32s(x, shift), shift)
}

/// `y[j] += a · x[j]`.
#[inline(always)]
pub(super) fn add_scaled<S: Simd>(simd: S, y: &mut [S::f32s], a: S::f32s, x: &[f32]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = simd.mul_add_f32s(a, simd.splat_f32s(x), *y);
    }
}
