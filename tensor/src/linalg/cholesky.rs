//! Cholesky factors in f64 on faer, `A = L Lᵀ`, and solutions of positive definite equations.

use std::io;

use faer::{
    MatMut, Par, Spec,
    dyn_stack::{MemBuffer, MemStack},
    linalg::cholesky::llt::factor::{
        LltParams, LltRegularization, cholesky_in_place, cholesky_in_place_scratch,
    },
};

/// Numerics that cannot go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinalgError {
    /// The matrix is not positive definite.
    #[error("matrix is not positive definite at pivot {index}")]
    NotPositiveDefinite {
        /// Pivot at which the factorization stopped.
        index: usize,
    },
    /// An iteration that finds eigenvalues did not end, or an entry is not finite.
    #[error(
        "eigenvalues were not found: an entry is not finite, or the iteration did not converge"
    )]
    NoConvergence,
    /// The scratch file cannot be opened, read or written.
    #[error("scratch file: {0}; free space there or raise the memory limit")]
    Scratch(#[from] io::Error),
}

/// Replaces the lower triangle of a row-major symmetric `a [n, n]` by `L` with `A = L Lᵀ`; the strict
/// upper triangle becomes zero.
///
/// # Errors
/// [`LinalgError::NotPositiveDefinite`] with the pivot's index; `a` is then spoiled.
pub fn cholesky_lower(a: &mut [f64], n: usize) -> Result<(), LinalgError> {
    let params = Spec::<LltParams, f64>::default();
    let mut memory = MemBuffer::new(cholesky_in_place_scratch::<f64>(n, Par::Seq, params));
    let stack = MemStack::new(&mut memory);
    // A symmetric matrix is its own transpose: the column-major view lets faer work on contiguous
    // columns, and its lower triangle is our upper one.
    let view = MatMut::from_column_major_slice_mut(a, n, n);
    cholesky_in_place(view, LltRegularization::default(), Par::Seq, stack, params).map_err(
        |error| {
            let faer::linalg::cholesky::llt::factor::LltError::NonPositivePivot { index } = error;
            LinalgError::NotPositiveDefinite { index }
        },
    )?;
    for i in 0..n {
        if !a[i * n + i].is_finite() || a[i * n + i] <= 0.0 {
            return Err(LinalgError::NotPositiveDefinite { index: i });
        }
    }
    for i in 0..n {
        for j in 0..i {
            a[i * n + j] = a[j * n + i];
            a[j * n + i] = 0.0;
        }
    }
    // a[j*n+i] (column-major lower) has been moved to the row-major lower triangle.
    for i in 0..n {
        for j in i + 1..n {
            a[i * n + j] = 0.0;
        }
    }
    Ok(())
}

/// Solves `A x = b` in place of `b [n]` for a row-major symmetric positive definite `a [n, n]`, which is
/// consumed.
///
/// # Errors
/// [`LinalgError::NotPositiveDefinite`] with the pivot's index; `b` is then untouched.
pub fn solve_spd(mut a: Vec<f64>, n: usize, b: &mut [f64]) -> Result<(), LinalgError> {
    cholesky_lower(&mut a, n)?;
    for i in 0..n {
        let row = &a[i * n..=i * n + i];
        let known: f64 = row[..i].iter().zip(&*b).map(|(l, y)| l * y).sum();
        b[i] = (b[i] - known) / row[i];
    }
    for i in (0..n).rev() {
        let row = &a[i * n..=i * n + i];
        b[i] /= row[i];
        let x = b[i];
        for (b, l) in b.iter_mut().zip(&row[..i]) {
            *b -= l * x;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    fn spd(n: usize) -> Vec<f64> {
        let x: Vec<f64> =
            Rng::new(n as u64).normals(2 * n * n).into_iter().map(f64::from).collect();
        let mut a = vec![0.0; n * n];
        for row in x.chunks(n) {
            for i in 0..n {
                for j in 0..n {
                    a[i * n + j] += row[i] * row[j];
                }
            }
        }
        a
    }

    #[test]
    fn factors_multiply_back() {
        for n in [1, 2, 7, 40, 130] {
            let a = spd(n);
            let mut l = a.clone();
            cholesky_lower(&mut l, n).unwrap();
            for i in 0..n {
                for j in 0..n {
                    let back: f64 = (0..n).map(|k| l[i * n + k] * l[j * n + k]).sum();
                    assert!((back - a[i * n + j]).abs() < 1e-8 * (n * n + 1) as f64);
                }
            }
        }
    }

    #[test]
    fn indefinite_matrices_are_refused() {
        let mut a = vec![1.0, 2.0, 2.0, 1.0];
        assert!(matches!(cholesky_lower(&mut a, 2), Err(LinalgError::NotPositiveDefinite { .. })));
    }

    #[test]
    fn solutions_satisfy_their_equations() {
        for n in [1, 5, 33] {
            let a = spd(n);
            let want: Vec<f64> = (0..n).map(|i| (i as f64).sin()).collect();
            let mut b: Vec<f64> =
                a.chunks(n).map(|row| row.iter().zip(&want).map(|(a, x)| a * x).sum()).collect();
            solve_spd(a, n, &mut b).unwrap();
            assert!(b.iter().zip(&want).all(|(b, x)| (b - x).abs() < 1e-7), "{n}");
        }
    }
}
