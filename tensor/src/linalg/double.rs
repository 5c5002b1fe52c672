//! Products and inverses in f64 for passes that choose and solve, row-major slices, on faer. Rows of a product
//! are cut into fixed tasks, so that threads do not change bits.

use faer::{
    Accum, MatMut, MatRef, Par,
    linalg::{matmul::matmul, triangular_inverse::invert_lower_triangular},
};
use rayon::prelude::*;

use super::cholesky::{LinalgError, cholesky_lower};

/// Rows worked on by one task.
const TASK: usize = 64;

/// `out [m, n] = beta · out + alpha · a [m, k] · b [k, n]`; `beta` is 0 or 1.
///
/// # Panics
/// When a slice is shorter than its shape.
pub fn gemm(
    (m, n, k): (usize, usize, usize),
    alpha: f64,
    a: &[f64],
    b: &[f64],
    add: bool,
    out: &mut [f64],
) {
    assert!(a.len() >= m * k && b.len() >= k * n && out.len() >= m * n, "shapes fit");
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        if !add {
            out[..m * n].fill(0.0);
        }
        return;
    }
    let accum = if add { Accum::Add } else { Accum::Replace };
    let b = MatRef::from_column_major_slice(&b[..k * n], n, k).transpose();
    out[..m * n].par_chunks_mut(TASK * n).zip(a[..m * k].par_chunks(TASK * k)).for_each(
        |(out, a)| {
            let rows = a.len() / k;
            let a = MatRef::from_column_major_slice(a, k, rows).transpose();
            let out = MatMut::from_column_major_slice_mut(out, n, rows).transpose_mut();
            matmul(out, accum, a, b, alpha, Par::Seq);
        },
    );
}

/// The inverse of a symmetric positive definite `a [n, n]`, of which the lower triangle is read.
///
/// # Errors
/// [`LinalgError::NotPositiveDefinite`].
pub fn inverse_spd(mut a: Vec<f64>, n: usize) -> Result<Vec<f64>, LinalgError> {
    for i in 0..n {
        for j in i + 1..n {
            a[i * n + j] = a[j * n + i];
        }
    }
    cholesky_lower(&mut a, n)?;
    let mut lower = vec![0.0f64; n * n];
    invert_lower_triangular(
        MatMut::from_column_major_slice_mut(&mut lower, n, n).transpose_mut(),
        MatRef::from_column_major_slice(&a, n, n).transpose(),
        Par::Seq,
    );
    // A⁻¹ = L⁻ᵀ L⁻¹.
    for (i, row) in a.chunks_mut(n).enumerate() {
        for (j, value) in row.iter_mut().enumerate() {
            *value = lower[j * n + i];
        }
    }
    let mut out = vec![0.0; n * n];
    gemm((n, n, n), 1.0, &a, &lower, false, &mut out);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn the_inverse_of_a_gram_matrix() {
        let (n, m) = (70, 90);
        let x: Vec<f64> = Rng::new(1).normals(n * m).into_iter().map(f64::from).collect();
        let mut t = vec![0.0; n * m];
        for i in 0..n {
            for j in 0..m {
                t[j * n + i] = x[i * m + j];
            }
        }
        let mut gram = vec![0.0; n * n];
        gemm((n, n, m), 1.0, &x, &t, false, &mut gram);
        let inverse = inverse_spd(gram.clone(), n).unwrap();
        let mut eye = vec![0.0; n * n];
        gemm((n, n, n), 1.0, &gram, &inverse, false, &mut eye);
        for (i, value) in eye.iter().enumerate() {
            let wanted = f64::from(u8::from(i / n == i % n));
            assert!((value - wanted).abs() < 1e-9, "{i} {value}");
        }
        gram[n + 1] = -1.0;
        assert!(inverse_spd(gram, n).is_err());
    }
}
