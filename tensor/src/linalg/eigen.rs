//! Eigenvalues and eigenvectors of symmetric matrices in f64 on faer: Householder tridiagonalization, then divide and
//! conquer. Single-threaded, so that the number of threads does not change bits. Cost about 9 n³ FLOPs.

use faer::{
    MatMut, MatRef, Par, Spec,
    diag::DiagMut,
    dyn_stack::{MemBuffer, MemStack},
    linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch},
};

use super::cholesky::LinalgError;

/// `A = Qᵀ diag(values) Q`, eigenvalues falling.
#[derive(Debug, Clone, PartialEq)]
pub struct Eigen {
    /// `[n]`, falling.
    pub values: Vec<f64>,
    /// Row-major `[n, n]`; row k is the eigenvector of `values[k]`, of length one.
    pub vectors: Vec<f64>,
}

/// Decomposes a row-major symmetric `a [n, n]`, of which the lower triangle is read.
///
/// # Errors
/// [`LinalgError::NoConvergence`], which entries that are not finite cause too.
///
/// # Panics
/// When `a` is shorter than its shape.
pub fn eigen_symmetric(a: &[f64], n: usize) -> Result<Eigen, LinalgError> {
    let mut columns = vec![0.0f64; n * n];
    let mut values = decompose(a, n, Some(&mut columns))?;
    let mut vectors = Vec::with_capacity(n * n);
    columns.chunks(n.max(1)).rev().for_each(|column| vectors.extend_from_slice(column));
    values.reverse();
    Ok(Eigen { values, vectors })
}

/// The eigenvalues alone, falling; about a third of the cost.
///
/// # Errors
/// As [`eigen_symmetric`].
///
/// # Panics
/// As [`eigen_symmetric`].
pub fn eigenvalues(a: &[f64], n: usize) -> Result<Vec<f64>, LinalgError> {
    let mut values = decompose(a, n, None)?;
    values.reverse();
    Ok(values)
}

/// Eigenvalues rising, eigenvectors as columns.
fn decompose(a: &[f64], n: usize, columns: Option<&mut [f64]>) -> Result<Vec<f64>, LinalgError> {
    if n == 0 {
        return Ok(Vec::new());
    }
    if a[..n * n].iter().any(|x| !x.is_finite()) {
        return Err(LinalgError::NoConvergence);
    }
    let mut rising = vec![0.0f64; n];
    let params = Spec::default();
    let wanted = match columns {
        Some(_) => ComputeEigenvectors::Yes,
        None => ComputeEigenvectors::No,
    };
    let scratch = self_adjoint_evd_scratch::<f64>(n, wanted, Par::Seq, params);
    let mut memory = MemBuffer::new(scratch);
    self_adjoint_evd(
        MatRef::from_column_major_slice(&a[..n * n], n, n).transpose(),
        DiagMut::from_slice_mut(&mut rising),
        columns.map(|columns| MatMut::from_column_major_slice_mut(columns, n, n)),
        Par::Seq,
        MemStack::new(&mut memory),
        params,
    )
    .map_err(|_| LinalgError::NoConvergence)?;
    Ok(rising)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn factors_multiply_back_and_vectors_are_orthonormal() {
        for n in [1, 2, 7, 40, 130] {
            let x: Vec<f64> =
                Rng::new(n as u64).normals(n * n).into_iter().map(f64::from).collect();
            let a: Vec<f64> = (0..n * n).map(|i| x[i] + x[i % n * n + i / n]).collect();
            let Eigen { values, vectors } = eigen_symmetric(&a, n).unwrap();
            let alone = eigenvalues(&a, n).unwrap();
            assert!(alone.iter().zip(&values).all(|(a, b)| (a - b).abs() < 1e-11 * n as f64));
            assert!(values.windows(2).all(|pair| pair[0] >= pair[1]), "{n}");
            for i in 0..n {
                for j in 0..n {
                    let back: f64 =
                        (0..n).map(|k| values[k] * vectors[k * n + i] * vectors[k * n + j]).sum();
                    assert!((back - a[i * n + j]).abs() < 1e-12 * (n * n + 10) as f64, "{n}");
                    let dot: f64 = (0..n).map(|k| vectors[i * n + k] * vectors[j * n + k]).sum();
                    assert!((dot - f64::from(u8::from(i == j))).abs() < 1e-12, "{n} {i} {j}");
                }
            }
        }
        assert!(eigen_symmetric(&[f64::NAN], 1).is_err());
        assert_eq!(eigen_symmetric(&[], 0).unwrap().values.len(), 0);
    }
}
