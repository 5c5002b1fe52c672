//! `G = XᵀX`, accumulated over many batches of rows: a symmetric rank-k update on the lower triangle in
//! blocks, f32 products per tile of at most [`ROWS`] rows, tiles added in f64 in the order given.
//! Cost n²·tokens FLOPs, memory 4·n² bytes (half of the square in f64).

use rayon::prelude::*;

use super::gemm::gemm_tn;
use crate::Mat;

/// Columns of an output tile.
const TILE: usize = 256;
/// Rows of X whose products are summed in f32.
const ROWS: usize = 512;

/// The running sum of `XᵀX`.
#[derive(Debug, Clone)]
pub struct GramAccumulator {
    n: usize,
    tokens: usize,
    /// Lower-triangular tiles `(i, j)`, `j <= i`, row-major over tiles.
    tiles: Vec<Tile>,
}

#[derive(Debug, Clone)]
struct Tile {
    row: usize,
    column: usize,
    rows: usize,
    columns: usize,
    sum: Vec<f64>,
}

impl GramAccumulator {
    /// An empty sum of `n x n`.
    pub fn new(n: usize) -> Self {
        let mut tiles = Vec::new();
        for row in (0..n).step_by(TILE) {
            for column in (0..=row).step_by(TILE) {
                let (rows, columns) = (TILE.min(n - row), TILE.min(n - column));
                tiles.push(Tile { row, column, rows, columns, sum: vec![0.0; rows * columns] });
            }
        }
        Self { n, tokens: 0, tiles }
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
        assert!(x.len().is_multiple_of(n), "rows have {n} channels");
        self.tokens += x.len() / n;
        self.tiles.par_iter_mut().for_each(|tile| {
            let mut product = vec![0.0f32; tile.rows * tile.columns];
            for x in x.chunks(ROWS * n) {
                let shape = (tile.rows, tile.columns, x.len() / n);
                let out = (product.as_mut_slice(), tile.columns);
                gemm_tn(shape, 1.0, (&x[tile.row..], n), (&x[tile.column..], n), false, out);
                for (sum, &p) in tile.sum.iter_mut().zip(&product) {
                    *sum += f64::from(p);
                }
            }
        });
    }

    /// Adds another sum of the same size.
    ///
    /// # Panics
    /// When the sizes differ.
    pub fn merge(&mut self, other: &Self) {
        assert_eq!(self.n, other.n, "sums of the same size");
        self.tokens += other.tokens;
        for (a, b) in self.tiles.iter_mut().zip(&other.tiles) {
            for (a, b) in a.sum.iter_mut().zip(&b.sum) {
                *a += b;
            }
        }
    }

    /// The symmetric matrix `scale · XᵀX`, rounded to f32 once.
    pub fn finish(self, scale: f64) -> Mat {
        let mut out = Mat::zeros((self.n, self.n));
        for tile in self.tiles {
            for i in 0..tile.rows {
                for j in 0..tile.columns {
                    let (row, column) = (tile.row + i, tile.column + j);
                    if column <= row {
                        let value = (scale * tile.sum[i * tile.columns + j]) as f32;
                        out[[row, column]] = value;
                        out[[column, row]] = value;
                    }
                }
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{compare::distance, rng::Rng};

    #[test]
    fn gram_equals_the_naive_sum_on_any_thread_count() {
        let (t, n) = (1100, 300);
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
            rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
                let mut gram = GramAccumulator::new(n);
                gram.add(&x[..700 * n]);
                gram.add(&x[700 * n..]);
                assert_eq!(gram.tokens(), t);
                gram.finish(1.0)
            })
        };
        let (one, two) = (run(1), run(2));
        assert_eq!(one, two);
        assert!(distance(one.as_slice().unwrap(), &want).nmse < 1e-11);
    }
}
