//! Thin factors of a matrix that are best in a metric, f64 inside, f32 outside.
//!
//! For `W [out, in]` and a metric `H = L Lᵀ [in, in]` the product `A B` of rank r with the least
//! `tr((W − AB) H (W − AB)ᵀ) = ‖(W − AB) L‖²` is `A = U`, `B = Uᵀ W`, with U the r first left singular vectors of `W L`
//! (Eckart and Young: `U Uᵀ W L` is the best approximation of `W L`, and multiplying by `L⁻¹` leaves `U Uᵀ W`). So L is
//! never inverted: a singular metric needs no dampening for it. U comes from the smaller of the Gram matrices `W H Wᵀ`
//! and `Lᵀ Wᵀ W L`. `up = U` has orthonormal columns, `down = Uᵀ W` carries the sizes.

use rayon::prelude::*;

use super::{
    cholesky::{LinalgError, cholesky_lower},
    double::{gemm, inverse_spd},
    eigen::{eigen_symmetric, eigenvalues},
};
use crate::{Mat, rng::Rng};

/// Columns of the metric that are in f64 at once.
const STRIP: usize = 256;
/// Rows worked on by one task; fixed, so that threads do not change bits.
const ROWS: usize = 64;
/// First dampening of a metric without a Cholesky factor, as a fraction of its mean diagonal.
const DAMPENING: f64 = 1e-9;

/// What the error of an approximation is weighed with.
#[derive(Debug, Clone, Copy)]
pub enum Metric<'a> {
    /// Nothing: the Frobenius norm.
    Plain,
    /// `H = diag(d²)`, d `[in]`.
    Scales(&'a [f64]),
    /// Symmetric `[in, in]`, positive semidefinite.
    Hessian(&'a Mat),
}

/// `down [r, in]` and `up [out, r]`, `W ≈ up · down`.
#[derive(Debug, Clone, PartialEq)]
pub struct Thin {
    /// `[r, in]`.
    pub down: Mat,
    /// `[out, r]`, columns orthonormal (zero beyond the numerical rank).
    pub up: Mat,
    /// Squared singular values in the metric, falling: all of them, or as many as a randomized search has seen.
    pub spectrum: Vec<f64>,
    /// Sum of all of them.
    pub whole: f64,
    /// Bound on the largest that is left, where it was measured ([`random_rank`]).
    pub bound: Option<f64>,
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| f64::from(x)).collect()
}

fn transposed(a: &[f64], rows: usize, columns: usize) -> Vec<f64> {
    let mut out = vec![0.0; rows * columns];
    out.par_chunks_mut(rows.max(1)).enumerate().for_each(|(j, out)| {
        for (i, out) in out.iter_mut().enumerate() {
            *out = a[i * columns + j];
        }
    });
    out
}

/// `a [m, k] · b [n, k]ᵀ`.
fn product_nt((m, n, k): (usize, usize, usize), a: &[f64], b: &[f64]) -> Vec<f64> {
    let mut out = vec![0.0; m * n];
    gemm((m, n, k), 1.0, a, &transposed(b, n, k), false, &mut out);
    out
}

/// `a [m, n] H b [k, n]ᵀ`, `[m, k]`, for a symmetric `h [n, n]`; strips of H are widened one after the other.
///
/// # Panics
/// When shapes do not fit or `h` is not in standard layout.
pub fn sandwich((m, k, n): (usize, usize, usize), a: &[f64], h: &Mat, b: &[f64]) -> Vec<f64> {
    let h = h.as_slice().expect("standard layout");
    let mut out = vec![0.0; m * k];
    for first in (0..n).step_by(STRIP) {
        let width = STRIP.min(n - first);
        // H is symmetric: its columns are its rows.
        let rows = wide(&h[first * n..(first + width) * n]);
        let strip = product_nt((m, width, n), a, &rows);
        let mut right = vec![0.0; width * k];
        for (j, right) in right.chunks_mut(k.max(1)).enumerate() {
            for (i, right) in right.iter_mut().enumerate() {
                *right = b[i * n + first + j];
            }
        }
        gemm((m, k, width), 1.0, &strip, &right, true, &mut out);
    }
    out
}

/// The lower Cholesky factor of a semidefinite metric, dampened as little as it takes.
fn factor(h: &Mat) -> Result<Vec<f64>, LinalgError> {
    let n = h.nrows();
    let whole = wide(h.as_slice().expect("standard layout"));
    let mean = (0..n).map(|i| whole[i * n + i]).sum::<f64>() / n.max(1) as f64;
    let mut added = DAMPENING * mean;
    for _ in 0..12 {
        let mut a = whole.clone();
        for i in 0..n {
            a[i * n + i] += added;
        }
        match cholesky_lower(&mut a, n) {
            Ok(()) => return Ok(a),
            Err(LinalgError::NotPositiveDefinite { .. }) => added *= 10.0,
            Err(other) => return Err(other),
        }
    }
    let mut a = whole;
    for i in 0..n {
        a[i * n + i] += mean;
    }
    cholesky_lower(&mut a, n)?;
    Ok(a)
}

/// The best approximation of `weight` of rank `rank` in a metric.
///
/// # Errors
/// [`LinalgError`] when the metric is indefinite or an entry is not finite.
///
/// # Panics
/// When shapes do not fit, a matrix is not in standard layout, or the rank is above `min(out, in)`.
pub fn best_rank(weight: &Mat, metric: Metric<'_>, rank: usize) -> Result<Thin, LinalgError> {
    let (out, n) = weight.dim();
    assert!(rank <= out.min(n), "a rank of the matrix");
    let w = wide(weight.as_slice().expect("standard layout"));
    let (gram, other) = small_gram(&w, (out, n), metric)?;
    let eigen = eigen_symmetric(&gram, out.min(n))?;
    // Rows are the first left singular vectors.
    let (left, spectrum) = if let Some(wl) = other {
        // U = W L V Σ⁻¹, row by row.
        let mut left = vec![0.0; rank * out];
        gemm((rank, out, n), 1.0, &eigen.vectors[..rank * n], &wl, false, &mut left);
        orthonormalize(&mut left, out);
        (left, eigen.values)
    } else {
        let mut left = eigen.vectors;
        left.truncate(rank * out);
        (left, eigen.values)
    };
    let mut down = vec![0.0; rank * n];
    gemm((rank, n, out), 1.0, &left, &w, false, &mut down);
    let spectrum: Vec<f64> = spectrum.into_iter().map(|value| value.max(0.0)).collect();
    let whole = spectrum.iter().sum();
    let up = narrow((out, rank), &transposed(&left, rank, out));
    Ok(Thin { down: narrow((rank, n), &down), up, spectrum, whole, bound: None })
}

fn narrow(shape: (usize, usize), values: &[f64]) -> Mat {
    let values = values.iter().map(|&x| x as f32).collect();
    Mat::from_shape_vec(shape, values).expect("as many values as the shape has")
}

/// Directions beyond the rank that a randomized search follows.
const OVERSAMPLE: usize = 8;
/// Multiplications with the Gram matrix.
const POWERS: usize = 3;
/// Fresh directions that measure what is left.
const PROBES: usize = 6;

/// As [`best_rank`], by a randomized search for the range (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithms
/// 4.4 and 5.3): `rank + 8` random directions are multiplied three times with `W H Wᵀ` and made orthonormal in between.
/// Cost O(rank · in · (out + in)) instead of O(out·in² + min³). [`Thin::bound`] is lemma 4.1 of that paper on six fresh
/// directions: the largest squared singular value that is left is above it with a probability of at most 1e-6.
///
/// # Errors
/// As [`best_rank`].
///
/// # Panics
/// As [`best_rank`].
pub fn random_rank(
    weight: &Mat,
    metric: Metric<'_>,
    rank: usize,
    seed: u64,
) -> Result<Thin, LinalgError> {
    let (out, n) = weight.dim();
    assert!(rank <= out.min(n), "a rank of the matrix");
    let w = wide(weight.as_slice().expect("standard layout"));
    let wt = transposed(&w, out, n);
    let k = (rank + OVERSAMPLE).min(out.min(n));
    let mut rng = Rng::new(seed);
    let mut random =
        |rows: usize| -> Vec<f64> { (0..rows * out).map(|_| f64::from(rng.normal())).collect() };
    let mut rows = random(k);
    // x W H Wᵀ for rows x, with x W.
    let through = |x: &[f64]| {
        let count = x.len() / out.max(1);
        let mut y = vec![0.0; count * n];
        gemm((count, n, out), 1.0, x, &w, false, &mut y);
        let z = weighed(&y, (count, n), metric);
        let mut back = vec![0.0; count * out];
        gemm((count, out, n), 1.0, &z, &wt, false, &mut back);
        (y, back)
    };
    for _ in 0..POWERS {
        orthonormalize(&mut rows, out);
        rows = through(&rows).1;
    }
    orthonormalize(&mut rows, out);
    let (_, back) = through(&rows);
    let small = product_nt((k, k, out), &back, &rows);
    let eigen = eigen_symmetric(&small, k)?;
    let mut left = vec![0.0; rank * out];
    gemm((rank, out, k), 1.0, &eigen.vectors[..rank * k], &rows, false, &mut left);
    let mut down = vec![0.0; rank * n];
    gemm((rank, n, out), 1.0, &left, &w, false, &mut down);
    // (1 − U Uᵀ) W H Wᵀ (1 − U Uᵀ) on fresh directions.
    let mut probes = random(PROBES);
    project_out(&mut probes, &left, out);
    let (_, mut seen) = through(&probes);
    project_out(&mut seen, &left, out);
    let norm = |row: &[f64]| row.iter().map(|x| x * x).sum::<f64>().sqrt();
    let most = seen.chunks(out.max(1)).map(norm).fold(0.0, f64::max);
    let whole = match metric {
        Metric::Plain => w.iter().map(|x| x * x).sum(),
        Metric::Scales(d) => scale_columns(&w, d).iter().map(|x| x * x).sum(),
        Metric::Hessian(h) => super::metric(weight, h),
    };
    Ok(Thin {
        down: narrow((rank, n), &down),
        up: narrow((out, rank), &transposed(&left, rank, out)),
        spectrum: eigen.values.into_iter().map(|value| value.max(0.0)).collect(),
        whole,
        bound: Some(10.0 * (2.0 / std::f64::consts::PI).sqrt() * most),
    })
}

/// Rows times the metric.
fn weighed(rows: &[f64], (count, n): (usize, usize), metric: Metric<'_>) -> Vec<f64> {
    match metric {
        Metric::Plain => rows.to_vec(),
        Metric::Scales(d) => scale_columns(&scale_columns(rows, d), d),
        Metric::Hessian(h) => {
            let h = h.as_slice().expect("standard layout");
            let mut out = vec![0.0; count * n];
            for first in (0..n).step_by(STRIP) {
                let width = STRIP.min(n - first);
                let strip =
                    product_nt((count, width, n), rows, &wide(&h[first * n..][..width * n]));
                for (out, strip) in out.chunks_mut(n).zip(strip.chunks(width)) {
                    out[first..first + width].copy_from_slice(strip);
                }
            }
            out
        }
    }
}

/// Takes from every row what lies in the span of orthonormal rows.
fn project_out(rows: &mut [f64], basis: &[f64], n: usize) {
    for row in rows.chunks_mut(n.max(1)) {
        for other in basis.chunks(n.max(1)) {
            let dot: f64 = row.iter().zip(other).map(|(a, b)| a * b).sum();
            row.iter_mut().zip(other).for_each(|(a, b)| *a -= dot * b);
        }
    }
}

/// The smaller Gram matrix of `W L`: `W H Wᵀ`, or `Lᵀ Wᵀ W L` with `(W L)ᵀ` beside it.
fn small_gram(
    w: &[f64],
    (out, n): (usize, usize),
    metric: Metric<'_>,
) -> Result<(Vec<f64>, Option<Vec<f64>>), LinalgError> {
    if out <= n {
        let gram = match metric {
            Metric::Plain => product_nt((out, out, n), w, w),
            Metric::Scales(d) => {
                let scaled = scale_columns(w, d);
                product_nt((out, out, n), &scaled, &scaled)
            }
            Metric::Hessian(h) => sandwich((out, out, n), w, h, w),
        };
        return Ok((gram, None));
    }
    let wl = match metric {
        Metric::Plain => w.to_vec(),
        Metric::Scales(d) => scale_columns(w, d),
        Metric::Hessian(h) => {
            let mut wl = vec![0.0; out * n];
            gemm((out, n, n), 1.0, w, &factor(h)?, false, &mut wl);
            wl
        }
    };
    let wl = transposed(&wl, out, n);
    Ok((product_nt((n, n, out), &wl, &wl), Some(wl)))
}

/// Squared singular values of `weight · L` for a metric `L Lᵀ`, falling: entry k is what rank k + 1 is worth.
///
/// # Errors
/// As [`best_rank`].
///
/// # Panics
/// When shapes do not fit or a matrix is not in standard layout.
pub fn spectrum(weight: &Mat, metric: Metric<'_>) -> Result<Vec<f64>, LinalgError> {
    let w = wide(weight.as_slice().expect("standard layout"));
    let (gram, _) = small_gram(&w, weight.dim(), metric)?;
    let values = eigenvalues(&gram, weight.nrows().min(weight.ncols()))?;
    Ok(values.into_iter().map(|value| value.max(0.0)).collect())
}

fn scale_columns(w: &[f64], d: &[f64]) -> Vec<f64> {
    w.chunks(d.len().max(1)).flat_map(|row| row.iter().zip(d).map(|(w, d)| w * d)).collect()
}

/// Gram and Schmidt, twice, row by row; rows that depend on those before become zero.
fn orthonormalize(rows: &mut [f64], n: usize) {
    let norm = |row: &[f64]| row.iter().map(|x| x * x).sum::<f64>().sqrt();
    let largest = rows.chunks(n.max(1)).map(norm).fold(0.0, f64::max);
    for at in 0..rows.len() / n.max(1) {
        let (before, rest) = rows.split_at_mut(at * n);
        let row = &mut rest[..n];
        let first = norm(row);
        for _ in 0..2 {
            for other in before.chunks(n) {
                let dot: f64 = row.iter().zip(other).map(|(a, b)| a * b).sum();
                row.iter_mut().zip(other).for_each(|(a, b)| *a -= dot * b);
            }
        }
        let left = norm(row);
        let inverse = if left > 1e-9 * first && left > 1e-12 * largest { 1.0 / left } else { 0.0 };
        for x in row {
            *x *= inverse;
        }
    }
}

/// The `up [out, r]` with the least `tr((W − up·down) H (W − up·down)ᵀ)` for a given `down [r, in]`:
/// `W H downᵀ (down H downᵀ)⁻¹`. Directions of `down` that H does not see are dampened away.
///
/// # Errors
/// [`LinalgError`] when `down H downᵀ` is indefinite.
///
/// # Panics
/// When shapes do not fit or a matrix is not in standard layout.
pub fn refit_up(weight: &Mat, down: &Mat, h: &Mat) -> Result<Mat, LinalgError> {
    let ((out, n), r) = (weight.dim(), down.nrows());
    let w = wide(weight.as_slice().expect("standard layout"));
    let d = wide(down.as_slice().expect("standard layout"));
    let mut small = sandwich((r, r, n), &d, h, &d);
    dampen(&mut small, r);
    let inverse = inverse_spd(small, r)?;
    let cross = sandwich((out, r, n), &w, h, &d);
    let mut up = vec![0.0; out * r];
    gemm((out, r, r), 1.0, &cross, &inverse, false, &mut up);
    Ok(narrow((out, r), &up))
}

/// The `up` for another `down` (a quantized one) that comes nearest to `up · down` in a metric:
/// `up (down H d̂ᵀ) (d̂ H d̂ᵀ)⁻¹`, small products all of them.
///
/// # Errors
/// [`LinalgError`] when `d̂ H d̂ᵀ` is indefinite.
///
/// # Panics
/// When shapes do not fit or a matrix is not in standard layout.
pub fn follow_down(up: &Mat, down: &Mat, other: &Mat, h: &Mat) -> Result<Mat, LinalgError> {
    let ((out, r), n) = (up.dim(), down.ncols());
    let wide = |x: &Mat| wide(x.as_slice().expect("standard layout"));
    let (d, other) = (wide(down), wide(other));
    let mut small = sandwich((r, r, n), &other, h, &other);
    dampen(&mut small, r);
    let inverse = inverse_spd(small, r)?;
    let cross = sandwich((r, r, n), &d, h, &other);
    let mut between = vec![0.0; r * r];
    gemm((r, r, r), 1.0, &cross, &inverse, false, &mut between);
    let mut followed = vec![0.0; out * r];
    gemm((out, r, r), 1.0, &wide(up), &between, false, &mut followed);
    Ok(narrow((out, r), &followed))
}

/// Makes a semidefinite `a [r, r]` definite, by as little as it takes.
fn dampen(a: &mut [f64], r: usize) {
    let mean = (0..r).map(|i| a[i * r + i]).sum::<f64>() / r.max(1) as f64;
    for i in 0..r {
        a[i * r + i] += 1e-9 * mean.max(f64::MIN_POSITIVE);
    }
}

/// `tr(Δ H Δᵀ)` for the difference `Δ` of two products `up · down`, and the same of the first product; the plain squares
/// without a metric. No product is made.
///
/// # Panics
/// When shapes do not fit or a matrix is not in standard layout.
pub fn product_error(first: (&Mat, &Mat), second: (&Mat, &Mat), h: Option<&Mat>) -> [f64; 2] {
    let ((out, r), n) = (first.0.dim(), first.1.ncols());
    let (s, t) = (second.0.ncols(), first.0.ncols() + second.0.ncols());
    let wide = |x: &Mat| wide(x.as_slice().expect("standard layout"));
    let rows = [wide(first.1), wide(second.1)].concat();
    let gram = match h {
        Some(h) => sandwich((t, t, n), &rows, h, &rows),
        None => product_nt((t, t, n), &rows, &rows),
    };
    let (a, b) = (wide(first.0), wide(second.0));
    let mut left = Vec::with_capacity(out * t);
    for i in 0..out {
        left.extend_from_slice(&a[i * r..(i + 1) * r]);
        left.extend(b[i * s..(i + 1) * s].iter().map(|x| -x));
    }
    let mut through = vec![0.0; out * t];
    gemm((out, t, t), 1.0, &left, &gram, false, &mut through);
    let error = left.iter().zip(&through).map(|(a, b)| a * b).sum();
    for row in left.chunks_mut(t) {
        row[r..].fill(0.0);
    }
    gemm((out, t, t), 1.0, &left, &gram, false, &mut through);
    [error, left.iter().zip(&through).map(|(a, b)| a * b).sum()]
}

/// `down H downᵀ [r, r]`, what `up` sees of the metric.
///
/// # Panics
/// When shapes do not fit or a matrix is not in standard layout.
pub fn inner_metric(down: &Mat, h: &Mat) -> Mat {
    let (r, n) = down.dim();
    let d = wide(down.as_slice().expect("standard layout"));
    let small = sandwich((r, r, n), &d, h, &d);
    Mat::from_shape_fn((r, r), |(i, j)| (0.5 * (small[i * r + j] + small[j * r + i])) as f32)
}

/// `up [out, r] · down [r, in]`, sums in f64.
///
/// # Panics
/// When shapes do not fit or a matrix is not in standard layout.
pub fn multiply(up: &Mat, down: &Mat) -> Mat {
    let ((out, r), n) = (up.dim(), down.ncols());
    let d = wide(down.as_slice().expect("standard layout"));
    let mut product = Mat::zeros((out, n));
    let rows = product.as_slice_mut().expect("a fresh matrix is in standard layout");
    let up = up.as_slice().expect("standard layout");
    rows.par_chunks_mut((ROWS * n).max(1)).zip(up.par_chunks((ROWS * r).max(1))).for_each(
        |(out, up)| {
            let m = out.len() / n.max(1);
            let mut sums = vec![0.0; m * n];
            gemm((m, n, r), 1.0, &wide(up), &d, false, &mut sums);
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out = sum as f32);
        },
    );
    product
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg;

    fn random(rows: usize, columns: usize, seed: u64) -> Mat {
        Mat::from_shape_vec((rows, columns), Rng::new(seed).normals(rows * columns)).unwrap()
    }

    fn hessian(n: usize, tokens: usize, seed: u64) -> Mat {
        let mut x = random(tokens, n, seed);
        for (i, mut column) in x.columns_mut().into_iter().enumerate() {
            column *= 1.0 + (i % 5) as f32;
        }
        let mut h = x.t().dot(&x);
        h *= 2.0 / tokens as f32;
        h.as_standard_layout().to_owned()
    }

    fn error(w: &Mat, thin: &Thin, h: &Mat) -> f64 {
        linalg::metric(&(&multiply(&thin.up, &thin.down) - w), h)
    }

    #[test]
    fn a_matrix_of_rank_r_is_found_exactly_and_full_rank_is_identity() {
        for (out, n) in [(40, 60), (60, 40), (33, 33)] {
            let h = hessian(n, 2 * n, 3);
            let d: Vec<f64> = (0..n).map(|i| 1.0 + i as f64 / 7.0).collect();
            for metric in [Metric::Plain, Metric::Scales(&d), Metric::Hessian(&h)] {
                let thin = random(out, 9, 1).dot(&random(9, n, 2));
                for (w, rank) in [(thin, 9), (random(out, n, 5), out.min(n))] {
                    let found = best_rank(&w, metric, rank).unwrap();
                    let back = multiply(&found.up, &found.down);
                    let worst = (&back - &w).iter().fold(0.0f32, |a, x| a.max(x.abs()));
                    assert!(worst < 2e-5, "{out} {n} {rank} {worst}");
                }
            }
        }
    }

    #[test]
    fn the_best_in_its_metric_leaves_what_the_spectrum_says() {
        for (out, n) in [(40, 60), (60, 40)] {
            let (w, h) = (random(out, n, 7), hessian(n, 3 * n, 8));
            let best = best_rank(&w, Metric::Hessian(&h), 11).unwrap();
            let promised: f64 = best.spectrum[11..].iter().sum();
            let found = error(&w, &best, &h);
            assert!((found / promised - 1.0).abs() < 1e-3, "{found} {promised}");
            let alone = spectrum(&w, Metric::Hessian(&h)).unwrap();
            let near = |(a, b): (&f64, &f64)| (a - b).abs() < 1e-9 * best.spectrum[0];
            assert!(alone.len() == 40 && alone.iter().zip(&best.spectrum).all(near));
            let plain = best_rank(&w, Metric::Plain, 11).unwrap();
            assert!(found < error(&w, &plain, &h));
            // Refitting the best changes nothing, refitting another helps.
            let up = refit_up(&w, &best.down, &h).unwrap();
            let again = error(&w, &Thin { up, ..best.clone() }, &h);
            assert!((again / found - 1.0).abs() < 1e-3, "{again} {found}");
            let up = refit_up(&w, &plain.down, &h).unwrap();
            let refitted = error(&w, &Thin { up, ..plain.clone() }, &h);
            assert!(refitted < error(&w, &plain, &h) && refitted >= found * 0.999);
        }
    }

    #[test]
    fn a_randomized_search_comes_near_the_best_and_bounds_what_is_left() {
        for (out, n) in [(90, 140), (140, 90)] {
            // Singular values that fall, as those of weights do.
            let mut w = random(out, n, 3);
            for (k, mut column) in w.columns_mut().into_iter().enumerate() {
                column *= 1.0 / (1.0 + k as f32 / 8.0);
            }
            let h = hessian(n, 2 * n, 5);
            let d: Vec<f64> = (0..n).map(|i| 1.0 + (i % 3) as f64).collect();
            for metric in [Metric::Plain, Metric::Scales(&d), Metric::Hessian(&h)] {
                let best = best_rank(&w, metric, 12).unwrap();
                let found = random_rank(&w, metric, 12, 7).unwrap();
                let kept = |thin: &Thin| thin.spectrum[..12].iter().sum::<f64>();
                assert!(kept(&found) > 0.99 * kept(&best) && kept(&found) <= 1.0001 * kept(&best));
                assert!((found.whole / best.whole - 1.0).abs() < 1e-3);
                let bound = found.bound.unwrap();
                assert!(bound >= best.spectrum[12], "{bound} {}", best.spectrum[12]);
                assert!(bound < 100.0 * best.spectrum[12], "{bound} {}", best.spectrum[12]);
                assert_eq!(found, random_rank(&w, metric, 12, 7).unwrap());
                assert_ne!(found.up, random_rank(&w, metric, 12, 8).unwrap().up);
            }
        }
        let thin = random(40, 5, 1).dot(&random(5, 60, 2));
        let found = random_rank(&thin, Metric::Plain, 5, 1).unwrap();
        let worst =
            (&multiply(&found.up, &found.down) - &thin).iter().fold(0.0f32, |a, x| a.max(x.abs()));
        assert!(worst < 1e-4 && found.bound.unwrap() < 1e-6 * found.whole, "{worst}");
    }

    #[test]
    fn errors_of_products_are_those_of_the_matrices_and_up_follows_down() {
        let (out, n, r) = (30, 50, 8);
        let h = hessian(n, 200, 4);
        let (up, down) = (random(out, r, 1), random(r, n, 2));
        let other = down.mapv(|x| (x * 3.0).round() / 3.0);
        let whole = multiply(&up, &down);
        for metric in [None, Some(&h)] {
            let of = |d: &Mat| metric.map_or_else(|| linalg::squares(d), |h| linalg::metric(d, h));
            let found = product_error((&up, &down), (&up, &other), metric);
            let want = [of(&(&multiply(&up, &other) - &whole)), of(&whole)];
            assert!(found.iter().zip(want).all(|(a, b)| (a / b - 1.0).abs() < 1e-3));
        }
        let before = product_error((&up, &down), (&up, &other), Some(&h))[0];
        let followed = follow_down(&up, &down, &other, &h).unwrap();
        let after = product_error((&up, &down), (&followed, &other), Some(&h))[0];
        assert!(after < 0.95 * before, "{after} {before}");
        let again = refit_up(&whole, &other, &h).unwrap();
        let worst = (&again - &followed).iter().fold(0.0f32, |a, x| a.max(x.abs()));
        assert!(worst < 1e-3, "{worst}");
        let same = follow_down(&up, &down, &down, &h).unwrap();
        assert!((&same - &up).iter().all(|x| x.abs() < 1e-4));
    }

    #[test]
    fn singular_metrics_and_dead_weights_are_taken() {
        let (out, n) = (30, 20);
        let mut h = hessian(n, 5, 1);
        h.row_mut(3).fill(0.0);
        h.column_mut(3).fill(0.0);
        let w = random(out, n, 2);
        let found = best_rank(&w, Metric::Hessian(&h), 6).unwrap();
        assert!(error(&w, &found, &h) < 1e-5 * linalg::metric(&w, &h));
        let zero = best_rank(&Mat::zeros((out, n)), Metric::Hessian(&h), 6).unwrap();
        assert!(zero.up.iter().chain(&zero.down).all(|x| x.is_finite()));
        assert!(refit_up(&w, &found.down, &h).unwrap().iter().all(|x| x.is_finite()));
    }

    #[test]
    fn bits_do_not_depend_on_threads() {
        let (w, h) = (random(150, 300, 1), hessian(300, 500, 2));
        let run = |threads| {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
                let thin = best_rank(&w, Metric::Hessian(&h), 20).unwrap();
                (multiply(&thin.up, &thin.down), refit_up(&w, &thin.down, &h).unwrap(), thin)
            })
        };
        assert_eq!(run(1), run(2));
    }
}
