//! GPTQ's factor `U`, upper triangular with `A⁻¹ = Uᵀ U`, of a symmetric positive definite `A [n, n]`, panel of
//! rows by panel of rows, in memory or through a scratch file with the same bits.
//!
//! With J the reversal of order, `B = J A J = L Lᵀ` gives `A⁻¹ = J L⁻ᵀ L⁻¹ J`, so `U = J M J` with `M = L⁻¹`.
//! M is made by bordering and L is never stored: with the rows above panel i known,
//! `L_i,<i = B_i,<i M_<iᵀ`, `L_ii L_iiᵀ = B_ii − L_i,<i L_i,<iᵀ`, `M_ii = L_ii⁻¹` and
//! `M_i,<i = −M_ii L_i,<i M_<i`, which visits each earlier panel of M once. f64, `2/3 n³` FLOPs; held are M's
//! lower triangle (`4 n²` bytes, or one panel of it when it lies in a scratch file) and three panels.

use std::io;

use faer::{
    Accum, MatMut, MatRef, Par,
    linalg::{matmul::matmul, triangular_inverse::invert_lower_triangular},
};
use rayon::prelude::*;

use super::cholesky::{LinalgError, cholesky_lower};
use crate::{Scratch, Shelf};

/// Rows of a panel; fixed, so that memory does not change bits.
const PANEL: usize = 256;
/// Rows of a panel worked on by one task; fixed, so that threads do not change bits.
const TASK: usize = 64;

/// `M = L⁻¹` of the reversed matrix.
#[derive(Debug)]
pub struct InverseFactor {
    n: usize,
    /// Panel p holds rows `p PANEL..`, columns up to the end of its own diagonal block, row-major.
    panels: Shelf<f64>,
}

/// First row, rows and columns of panel `p`, and where it begins.
fn place(n: usize, p: usize) -> (usize, usize, usize, usize) {
    let row = p * PANEL;
    let rows = PANEL.min(n - row);
    // Σ over earlier panels of PANEL · (q + 1) PANEL.
    (row, rows, row + rows, PANEL * PANEL * (p * (p + 1) / 2))
}

fn view(x: &[f64], rows: usize, columns: usize, stride: usize) -> MatRef<'_, f64> {
    MatRef::from_column_major_slice_with_stride(x, columns, rows, stride).transpose()
}

fn view_mut(x: &mut [f64], rows: usize, columns: usize, stride: usize) -> MatMut<'_, f64> {
    MatMut::from_column_major_slice_with_stride_mut(x, columns, rows, stride).transpose_mut()
}

impl InverseFactor {
    /// Factorizes. `row(i, out)` fills `out` with `A[i][i..n]`.
    ///
    /// # Errors
    /// [`LinalgError::NotPositiveDefinite`] with the pivot's index counted from the last row;
    /// [`LinalgError::Scratch`] when the scratch file cannot be used.
    pub fn new(
        n: usize,
        row: impl Fn(usize, &mut [f64]) + Sync,
        scratch: Option<&Scratch>,
    ) -> Result<Self, LinalgError> {
        let count = n.div_ceil(PANEL);
        let total = (0..count).map(|p| place(n, p)).map(|(_, rows, columns, _)| rows * columns);
        let mut panels = Shelf::new(total.sum(), scratch)?;
        let mut buffer = Vec::new();
        let wide = PANEL.min(n) * n;
        // B_i and L_i beside it, and Σ L_ij M_j.
        let (mut b, mut l, mut sum) = (vec![0.0; wide], vec![0.0; wide], vec![0.0; wide]);
        for p in 0..count {
            let (first, rows, columns, start) = place(n, p);
            let (b, l) = (&mut b[..rows * columns], &mut l[..rows * columns]);
            let sum = &mut sum[..rows * columns];
            sum.fill(0.0);
            b.par_chunks_mut(columns).enumerate().for_each(|(r, line)| {
                // Row i of B, columns 0..=i, is row n - 1 - i of A from the diagonal on, reversed.
                let i = first + r;
                row(n - 1 - i, &mut line[..=i]);
                line[..=i].reverse();
                line[i + 1..].fill(0.0);
            });
            for q in 0..p {
                let (column, width, depth, at) = place(n, q);
                let m = panels.span(at, width * depth, &mut buffer)?;
                let m = view(m, width, depth, depth);
                let chunks = b.par_chunks(TASK * columns).zip(l.par_chunks_mut(TASK * columns));
                chunks.zip(sum.par_chunks_mut(TASK * columns)).for_each(|((b, l), sum)| {
                    let rows = b.len() / columns;
                    let b = view(b, rows, depth, columns);
                    let mut l = view_mut(&mut l[column..], rows, width, columns);
                    matmul(l.as_mut(), Accum::Replace, b, m.transpose(), 1.0, Par::Seq);
                    let sum = view_mut(sum, rows, depth, columns);
                    matmul(sum, Accum::Add, l.as_ref(), m, 1.0, Par::Seq);
                });
            }
            // B_ii, whose upper triangle is filled from the lower one, minus L_i L_iᵀ.
            let mut corner = vec![0.0f64; rows * rows];
            for r in 0..rows {
                for c in 0..=r {
                    let value = b[r * columns + first + c];
                    corner[r * rows + c] = value;
                    corner[c * rows + r] = value;
                }
            }
            if first > 0 {
                let l = view(l, rows, first, columns);
                let corner = view_mut(&mut corner, rows, rows, rows);
                matmul(corner, Accum::Add, l, l.transpose(), -1.0, Par::Seq);
            }
            cholesky_lower(&mut corner, rows).map_err(|error| match error {
                LinalgError::NotPositiveDefinite { index } => {
                    LinalgError::NotPositiveDefinite { index: first + index }
                }
                other => other,
            })?;
            let mut inverse = vec![0.0f64; rows * rows];
            invert_lower_triangular(
                MatMut::from_row_major_slice_mut(&mut inverse, rows, rows),
                MatRef::from_row_major_slice(&corner, rows, rows),
                Par::Seq,
            );
            // What was B becomes the panel of M.
            for (r, line) in b.chunks_mut(columns).enumerate() {
                line[first..].copy_from_slice(&inverse[r * rows..(r + 1) * rows]);
            }
            if first > 0 {
                let (sum, inverse) = (view(sum, rows, first, columns), &inverse);
                b.par_chunks_mut(TASK * columns).enumerate().for_each(|(task, b)| {
                    let here = b.len() / columns;
                    let m = view(&inverse[task * TASK * rows..], here, rows, rows);
                    let b = view_mut(b, here, first, columns);
                    matmul(b, Accum::Replace, m, sum, -1.0, Par::Seq);
                });
            }
            panels.write(start, b)?;
        }
        Ok(Self { n, panels })
    }

    /// Bytes held while a factor of `A [n, n]` is made and turned into panels of f32, and by these panels.
    pub fn bytes(n: usize, on_scratch: bool) -> (usize, usize) {
        let rows = PANEL.min(n);
        let buffers = 8 * (3 * rows * n + 2 * rows * rows);
        let (made, upper) = (4 * n * (n + rows), 2 * n * (n + rows));
        if on_scratch { (buffers + 8 * rows * n, 0) } else { (buffers + made, upper) }
    }

    /// Bytes held in memory.
    pub fn resident_bytes(&self) -> usize {
        self.panels.resident_bytes()
    }

    /// U in f32, in panels of `rows` rows. Each panel of M gives its memory back once it is copied.
    ///
    /// # Errors
    /// When the scratch file cannot be used.
    ///
    /// # Panics
    /// When `rows` is zero.
    pub fn into_upper(mut self, rows: usize, scratch: Option<&Scratch>) -> io::Result<UpperPanels> {
        let n = self.n;
        let mut upper = UpperPanels::new(n, rows, scratch)?;
        let (mut buffer, mut line) = (Vec::new(), Vec::new());
        for p in (0..n.div_ceil(PANEL)).rev() {
            let (first, height, columns, start) = place(n, p);
            let m = self.panels.span(start, height * columns, &mut buffer)?;
            for r in (0..height).rev() {
                // Row n - 1 - i of U from the diagonal on is row i of M up to it, reversed.
                let i = first + r;
                let row = &m[r * columns..][..=i];
                line.clear();
                line.extend(row.iter().rev().map(|&v| v as f32));
                upper.put_row(n - 1 - i, &line)?;
            }
            self.panels.truncate(start);
        }
        Ok(upper)
    }
}

/// An upper triangular matrix in f32, in panels of rows: panel p holds rows from `p · rows` on, columns from
/// there to the end.
#[derive(Debug)]
pub struct UpperPanels {
    n: usize,
    rows: usize,
    values: Shelf<f32>,
}

/// One panel: element `(i, j)` of the whole matrix is `values[(i − first) · stride + j − first]`.
#[derive(Debug, Clone, Copy)]
pub struct Panel<'a> {
    /// Row and column at which it begins.
    pub first: usize,
    /// Elements from row to row.
    pub stride: usize,
    /// The elements.
    pub values: &'a [f32],
}

impl UpperPanels {
    fn new(n: usize, rows: usize, scratch: Option<&Scratch>) -> io::Result<Self> {
        assert!(rows > 0, "panels have rows");
        let values = Shelf::new(Self::start_of(n, rows, n.div_ceil(rows)), scratch)?;
        Ok(Self { n, rows, values })
    }

    /// Elements before panel `p`.
    fn start_of(n: usize, rows: usize, p: usize) -> usize {
        let all = |q: usize| rows.min(n - q * rows) * (n - q * rows);
        (0..p).map(all).sum()
    }

    /// Stores row `i` from the diagonal on.
    fn put_row(&mut self, i: usize, row: &[f32]) -> io::Result<()> {
        let p = i / self.rows;
        let (first, stride) = (p * self.rows, self.n - p * self.rows);
        let at = Self::start_of(self.n, self.rows, p) + (i - first) * stride + i - first;
        self.values.write(at, row)
    }

    /// Rows of all panels but the last.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The panel that begins at row `p · rows`; read into `buffer` when it lies in a scratch file.
    ///
    /// # Errors
    /// When the scratch file cannot be read.
    pub fn panel<'a>(&'a self, p: usize, buffer: &'a mut Vec<f32>) -> io::Result<Panel<'a>> {
        let first = p * self.rows;
        let stride = self.n - first;
        let length = self.rows.min(stride) * stride;
        let values = self.values.span(Self::start_of(self.n, self.rows, p), length, buffer)?;
        Ok(Panel { first, stride, values })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    fn spd(n: usize) -> Vec<f64> {
        let mut rng = Rng::new(n as u64);
        let x: Vec<f64> = rng.normals(2 * n * n).into_iter().map(f64::from).collect();
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

    fn factor(
        a: &[f64],
        n: usize,
        scratch: Option<&Scratch>,
    ) -> Result<InverseFactor, LinalgError> {
        InverseFactor::new(n, |i, out| out.copy_from_slice(&a[i * n + i..(i + 1) * n]), scratch)
    }

    /// All of M, row-major.
    fn whole(factor: &InverseFactor) -> Vec<f64> {
        let n = factor.n;
        let mut all = vec![0.0; n * n];
        for p in 0..n.div_ceil(PANEL) {
            let (first, rows, columns, start) = place(n, p);
            let mut buffer = vec![0.0; rows * columns];
            factor.panels.read(start, &mut buffer).unwrap();
            for (r, line) in buffer.chunks(columns).enumerate() {
                all[(first + r) * n..][..columns].copy_from_slice(line);
            }
        }
        all
    }

    #[test]
    fn the_factor_inverts_its_matrix() {
        for n in [1, 2, 7, 130, PANEL, PANEL + 1, 2 * PANEL + 77] {
            let a = spd(n);
            let m = whole(&factor(&a, n, None).unwrap());
            let u = |i: usize, j: usize| m[(n - 1 - i) * n + n - 1 - j];
            for i in 0..n {
                assert!(u(i, i) > 0.0);
                for j in 0..i {
                    assert!(u(i, j).abs() < f64::MIN_POSITIVE, "U is upper triangular");
                }
            }
            // U A Uᵀ = I, on rows spread over the matrix.
            for i in (0..n).step_by(1 + n / 9) {
                let ua: Vec<f64> =
                    (0..n).map(|c| (i..n).map(|k| u(i, k) * a[k * n + c]).sum()).collect();
                for j in 0..n {
                    let found: f64 = (j..n).map(|k| ua[k] * u(j, k)).sum();
                    let want = if i == j { 1.0 } else { 0.0 };
                    assert!((found - want).abs() < 1e-9, "{n}: {i} {j} {found}");
                }
            }
        }
    }

    #[test]
    fn neither_scratch_nor_threads_change_bits() {
        let n = 2 * PANEL + 77;
        let a = spd(n);
        let scratch = Scratch::new(tempfile::tempfile);
        let run = |threads, scratch: Option<&Scratch>| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let made = factor(&a, n, scratch).unwrap();
                let m = whole(&made);
                let upper = made.into_upper(100, scratch).unwrap();
                let mut all = vec![0.0f32; n * n];
                for p in 0..n.div_ceil(100) {
                    let mut buffer = Vec::new();
                    let Panel { first, stride, values } = upper.panel(p, &mut buffer).unwrap();
                    for (r, line) in values.chunks(stride).enumerate() {
                        all[(first + r) * n + first..(first + r + 1) * n].copy_from_slice(line);
                    }
                }
                (m, all)
            })
        };
        let (m, upper) = run(1, None);
        assert!((m.clone(), upper.clone()) == run(2, None), "two threads");
        assert!((m.clone(), upper.clone()) == run(2, Some(&scratch)), "scratch");
        for i in 0..n {
            for j in 0..n {
                let want = m[(n - 1 - i) * n + n - 1 - j] as f32;
                assert_eq!(upper[i * n + j].to_bits() << 1, want.to_bits() << 1);
            }
        }
    }

    #[test]
    fn indefinite_matrices_are_refused_with_their_pivot() {
        let n = PANEL + 9;
        let mut a = vec![0.0; n * n];
        for i in 0..n {
            a[i * n + i] = 1.0;
        }
        a[4 * n + 4] = -1.0;
        let error = factor(&a, n, None).unwrap_err();
        assert!(matches!(error, LinalgError::NotPositiveDefinite { index } if index == n - 1 - 4));
    }
}
