//! `out = beta * out + a · b` in f32 on faer's kernels (AVX-512, AVX2+FMA or NEON, chosen at run time).
//! Names say which operand is transposed: `nt` is `a · bᵀ`, the linear layer.

use faer::{Accum, MatMut, MatRef, Par, linalg::matmul::matmul};

use crate::Mat;

fn span(rows: usize, columns: usize, stride: usize) -> usize {
    if rows == 0 { 0 } else { (rows - 1) * stride + columns }
}

fn view(x: &[f32], rows: usize, columns: usize, stride: usize) -> MatRef<'_, f32> {
    MatRef::from_row_major_slice_with_stride(
        &x[..span(rows, columns, stride)],
        rows,
        columns,
        stride,
    )
}

fn view_mut(x: &mut [f32], rows: usize, columns: usize, stride: usize) -> MatMut<'_, f32> {
    let end = span(rows, columns, stride);
    // faer 0.24.4's `from_row_major_slice_with_stride_mut` mixes up its strides and writes out of
    // bounds; the transposed column-major view is the same matrix.
    MatMut::from_column_major_slice_with_stride_mut(&mut x[..end], columns, rows, stride)
        .transpose_mut()
}

fn product(out: MatMut<'_, f32>, add: bool, a: MatRef<'_, f32>, b: MatRef<'_, f32>, alpha: f32) {
    let accumulate = if add { Accum::Add } else { Accum::Replace };
    matmul(out, accumulate, a, b, alpha, Par::Seq);
}

/// A row-major operand: `(elements, distance between rows)`.
pub type Rows<'a> = (&'a [f32], usize);

/// `out [m, n] (+)= alpha · a [m, k] · (b [n, k])ᵀ`, all row-major with a row stride; added to `out`
/// when `add` is set.
///
/// # Panics
/// When a slice is too short for its shape.
pub fn gemm_nt(
    (m, n, k): (usize, usize, usize),
    alpha: f32,
    (a, lda): Rows<'_>,
    (b, ldb): Rows<'_>,
    add: bool,
    (out, ldo): (&mut [f32], usize),
) {
    product(
        view_mut(out, m, n, ldo),
        add,
        view(a, m, k, lda),
        view(b, n, k, ldb).transpose(),
        alpha,
    );
}

/// `out [m, n] (+)= alpha · a [m, k] · b [k, n]`; see [`gemm_nt`].
///
/// # Panics
/// When a slice is too short for its shape.
pub fn gemm_nn(
    (m, n, k): (usize, usize, usize),
    alpha: f32,
    (a, lda): Rows<'_>,
    (b, ldb): Rows<'_>,
    add: bool,
    (out, ldo): (&mut [f32], usize),
) {
    product(view_mut(out, m, n, ldo), add, view(a, m, k, lda), view(b, k, n, ldb), alpha);
}

/// `out [m, n] (+)= alpha · (a [k, m])ᵀ · b [k, n]`; see [`gemm_nt`].
///
/// # Panics
/// When a slice is too short for its shape.
pub fn gemm_tn(
    (m, n, k): (usize, usize, usize),
    alpha: f32,
    (a, lda): Rows<'_>,
    (b, ldb): Rows<'_>,
    add: bool,
    (out, ldo): (&mut [f32], usize),
) {
    product(
        view_mut(out, m, n, ldo),
        add,
        view(a, k, m, lda).transpose(),
        view(b, k, n, ldb),
        alpha,
    );
}

fn rows(x: &Mat) -> &[f32] {
    x.as_slice().expect("owned matrices are in standard layout")
}

/// `x [m, k] · (w [n, k])ᵀ`.
///
/// # Panics
/// When the inner dimensions differ.
pub fn matmul_nt(x: &Mat, w: &Mat) -> Mat {
    let ((m, k), (n, k2)) = (x.dim(), w.dim());
    assert_eq!(k, k2, "inner dimensions agree");
    let mut out = Mat::zeros((m, n));
    let to = out.as_slice_mut().expect("fresh matrices are contiguous");
    gemm_nt((m, n, k), 1.0, (rows(x), k), (rows(w), k), false, (to, n));
    out
}

/// `a [m, k] · b [k, n]`.
///
/// # Panics
/// When the inner dimensions differ.
pub fn matmul_nn(a: &Mat, b: &Mat) -> Mat {
    let ((m, k), (k2, n)) = (a.dim(), b.dim());
    assert_eq!(k, k2, "inner dimensions agree");
    let mut out = Mat::zeros((m, n));
    let to = out.as_slice_mut().expect("fresh matrices are contiguous");
    gemm_nn((m, n, k), 1.0, (rows(a), k), (rows(b), n), false, (to, n));
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{compare::distance, rng::Rng};

    #[test]
    fn products_agree_with_f64_for_odd_shapes_and_strides() {
        let mut rng = Rng::new(3);
        for (m, n, k) in [(1, 1, 1), (3, 5, 7), (17, 33, 65), (64, 100, 48)] {
            let (lda, ldb, ldo) = (k + 3, k + 1, n + 2);
            let (a, b) = (rng.normals(m * lda), rng.normals(n * ldb));
            let mut want = vec![0.0f32; m * n];
            for i in 0..m {
                for j in 0..n {
                    want[i * n + j] = (0..k)
                        .map(|l| f64::from(a[i * lda + l]) * f64::from(b[j * ldb + l]))
                        .sum::<f64>() as f32;
                }
            }
            let mut out = vec![1.0; m * ldo];
            gemm_nt((m, n, k), 1.0, (&a, lda), (&b, ldb), true, (&mut out, ldo));
            let got: Vec<f32> =
                (0..m).flat_map(|i| out[i * ldo..i * ldo + n].iter().map(|v| v - 1.0)).collect();
            assert!(distance(&got, &want).nmse < 1e-10, "{m} {n} {k}");
            if m > 1 {
                assert!((out[n] - 1.0).abs() < f32::EPSILON, "padding is left alone");
            }
            let bt = Mat::from_shape_fn((k, n), |(l, j)| b[j * ldb + l]);
            let am = Mat::from_shape_fn((m, k), |(i, l)| a[i * lda + l]);
            assert!(distance(rows(&matmul_nn(&am, &bt)), &want).nmse < 1e-10);
            let at = Mat::from_shape_fn((k, m), |(l, i)| a[i * lda + l]);
            let mut tn = vec![0.0; m * n];
            gemm_tn((m, n, k), 1.0, (rows(&at), m), (rows(&bt), n), false, (&mut tn, n));
            assert!(distance(&tn, &want).nmse < 1e-10);
        }
    }
}
