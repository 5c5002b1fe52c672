//! Errors in the metric of a Hessian.

use rayon::prelude::*;

use super::{gemm_nt, sum_sq};
use crate::Mat;

/// Rows worked on by one task; fixed, so that threads do not change bits.
const ROWS: usize = 256;

/// Columns of H multiplied at once in [`metric`].
const STRIP: usize = 256;

/// `tr(D H Dᵀ)` for `d [out, in]` and a symmetric `h [in, in]`, of which the lower triangle is read;
/// products in f32, sum in f64. Cost out·in² FLOPs.
///
/// # Panics
/// When a matrix is not in standard layout.
pub fn metric(d: &Mat, h: &Mat) -> f64 {
    let n = d.ncols();
    let (d, h) = (d.as_slice().expect("standard layout"), h.as_slice().expect("standard layout"));
    let tiles: Vec<f64> = d
        .par_chunks(ROWS * n)
        .map(|d| {
            let m = d.len() / n;
            let mut product = vec![0.0f32; m * STRIP];
            let mut total = 0.0;
            for first in (0..n).step_by(STRIP) {
                let width = STRIP.min(n - first);
                let end = first + width;
                // d H dᵀ = Σ over strips J of d_J (H_JJ d_Jᵀ + 2 H_J,<J d_<Jᵀ).
                for (columns, factor) in [(0..first, 2.0), (first..end, 1.0)] {
                    if columns.is_empty() {
                        continue;
                    }
                    let (shape, start) = ((m, width, columns.len()), columns.start);
                    let h = (&h[first * n + start..], n);
                    let out = (product.as_mut_slice(), width);
                    gemm_nt(shape, 1.0, (&d[start..], n), h, false, out);
                    let mut sum = 0.0f64;
                    for (d, p) in d.chunks(n).zip(product.chunks(width)) {
                        let d = &d[first..end];
                        sum += d
                            .iter()
                            .zip(p)
                            .map(|(a, b)| f64::from(*a) * f64::from(*b))
                            .sum::<f64>();
                    }
                    total += factor * sum;
                }
            }
            total
        })
        .collect();
    tiles.iter().sum()
}

/// `Σ x²`: f32 within a chunk, chunks in f64.
///
/// # Panics
/// When the matrix is not in standard layout.
pub fn squares(x: &Mat) -> f64 {
    x.as_slice().expect("standard layout").chunks(4096).map(|x| f64::from(sum_sq(x))).sum()
}
