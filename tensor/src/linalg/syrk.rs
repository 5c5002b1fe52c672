//! `G = XᵀX`, accumulated over many batches of rows: a symmetric rank-k update of the lower triangle in
//! strips of rows, f32 products over at most [`ROWS`] rows of X, those added in f64 in the order given.
//! Register tiles wholly above the diagonal are skipped. Cost n²·tokens FLOPs, memory 4·n² bytes (half of
//! the square in f64) and one strip in f32 per thread.

use rayon::prelude::*;

use super::microkernel::{Operand, Product, multiply, pack_panels};
use crate::Mat;

/// Rows of a strip of G; whole panels of every instruction set, so that no panel lies across its end.
const STRIP: usize = 624;
/// Rows of X whose products are summed in f32. The f64 sums pass through memory once per so many rows:
/// batches given to [`GramAccumulator::add`] are best a multiple of it.
pub const ROWS: usize = 2048;

/// The running sum of `XᵀX`.
#[derive(Debug, Clone)]
pub struct GramAccumulator {
    n: usize,
    tokens: usize,
    /// From the last (longest) strip to the first.
    strips: Vec<Strip>,
}

/// Rows `row..row + rows` of G, columns up to the diagonal block's end.
#[derive(Debug, Clone)]
struct Strip {
    row: usize,
    rows: usize,
    columns: usize,
    sum: Vec<f64>,
}

impl GramAccumulator {
    /// An empty sum of `n x n`.
    pub fn new(n: usize) -> Self {
        let strip = |row| {
            let rows = STRIP.min(n - row);
            let columns = row + rows;
            Strip { row, rows, columns, sum: vec![0.0; rows * columns] }
        };
        let strips = (0..n).step_by(STRIP).rev().map(strip).collect();
        Self { n, tokens: 0, strips }
    }

    /// Rows seen.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Adds `xᵀx` for `x [tokens, n]`, row-major.
    ///
    /// # Panics
    /// When `x` is not a multiple of `n` long.
    pub fn add(&mut self, x: &[f32]) {
        let n = self.n;
        if x.is_empty() {
            return;
        }
        assert!(n > 0 && x.len().is_multiple_of(n), "rows have {n} channels");
        self.tokens += x.len() / n;
        for x in x.chunks(ROWS * n) {
            let tokens = x.len() / n;
            let across = |data| Operand { data, stride: n, depth_contiguous: false };
            // Packed once for all strips.
            let (panels, start) = pack_panels(across(x), n, tokens);
            let panels = &panels[start..];
            self.strips.par_iter_mut().for_each(|strip| {
                let Strip { row, rows, columns, ref mut sum } = *strip;
                // A strip that does not end with the matrix may end inside a panel.
                let mut out = vec![0.0f32; rows * columns];
                multiply(Product {
                    shape: (rows, n, tokens),
                    alpha: 1.0,
                    a: across(&x[row..]),
                    b: across(x),
                    add: false,
                    out: &mut out,
                    ldo: columns,
                    panels: Some(panels),
                    below: Some(row),
                });
                let lines = sum.chunks_exact_mut(columns).zip(out.chunks_exact(columns));
                for (i, (sum, product)) in lines.enumerate() {
                    for (sum, &p) in sum[..=row + i].iter_mut().zip(product) {
                        *sum += f64::from(p);
                    }
                }
            });
        }
    }

    /// Adds another sum of the same size.
    ///
    /// # Panics
    /// When the sizes differ.
    pub fn merge(&mut self, other: &Self) {
        assert_eq!(self.n, other.n, "sums of the same size");
        self.tokens += other.tokens;
        for (a, b) in self.strips.iter_mut().zip(&other.strips) {
            for (a, b) in a.sum.iter_mut().zip(&b.sum) {
                *a += b;
            }
        }
    }

    /// The symmetric matrix `scale · XᵀX`, rounded to f32 once.
    pub fn finish(self, scale: f64) -> Mat {
        let mut out = Mat::zeros((self.n, self.n));
        self.each_below(|i, j, sum| {
            let value = (scale * sum) as f32;
            out[[i, j]] = value;
            out[[j, i]] = value;
        });
        out
    }

    /// The symmetric matrix `scale · XᵀX` in f64, row-major `[n, n]`.
    pub fn finish_f64(self, scale: f64) -> Vec<f64> {
        let n = self.n;
        let mut out = vec![0.0; n * n];
        self.each_below(|i, j, sum| {
            out[i * n + j] = scale * sum;
            out[j * n + i] = scale * sum;
        });
        out
    }

    fn each_below(self, mut visit: impl FnMut(usize, usize, f64)) {
        for strip in self.strips {
            for (i, sums) in strip.sum.chunks_exact(strip.columns).enumerate() {
                for (j, &sum) in sums[..=strip.row + i].iter().enumerate() {
                    visit(strip.row + i, j, sum);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{compare::distance, rng::Rng};

    #[test]
    fn gram_equals_the_naive_sum_on_any_thread_count() {
        for (t, n) in [(600, 401), (61, 1290)] {
            let x = Rng::new(5).normals(t * n);
            let mut want = vec![0.0f64; n * n];
            for row in x.chunks(n) {
                for i in 0..n {
                    for j in 0..n {
                        want[i * n + j] += f64::from(row[i]) * f64::from(row[j]);
                    }
                }
            }
            let want: Vec<f32> = want.iter().map(|&v| v as f32).collect();
            let run = |threads| {
                rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(
                    || {
                        let mut gram = GramAccumulator::new(n);
                        gram.add(&x[..t / 2 * n]);
                        let mut rest = GramAccumulator::new(n);
                        rest.add(&x[t / 2 * n..]);
                        gram.merge(&rest);
                        assert_eq!(gram.tokens(), t);
                        gram.finish(1.0)
                    },
                )
            };
            let (one, two) = (run(1), run(2));
            assert_eq!(one, two);
            assert!(distance(one.as_slice().unwrap(), &want).nmse < 1e-11);
        }
    }
}
