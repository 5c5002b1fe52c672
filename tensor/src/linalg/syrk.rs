//! `G = XᵀX`, accumulated over many batches of rows: a symmetric rank-k update of the lower triangle in
//! strips of rows, f32 products over at most [`ROWS`] rows of X, those added in f64 in the order given.
//! Register tiles wholly above the diagonal are skipped. Cost n²·tokens FLOPs, memory 4·n² bytes (half of
//! the square in f64; a few lines of it when the sums lie in scratch files), one strip in f32 per thread, and
//! X packed.

use std::{io, sync::Mutex};

use rayon::prelude::*;

use super::{
    microkernel::{
        KC, Operand, PLANES, Panels, Product, multiply, pack_rows, panels_at_most, room_for_panels,
    },
    vectorize,
};
use crate::{Mat, Scratch, Shelf};

/// Rows of a strip of G; whole panels of every instruction set, so that few panels lie across its end.
const STRIP: usize = 624;
/// Rows of X whose products are summed in f32. The f64 sums pass through memory once per so many rows.
pub const ROWS: usize = 2048;
/// Lines of a strip that pass through memory at once when its sums lie in a scratch file.
const LINES: usize = 16;

/// The running sum of `XᵀX`.
#[derive(Debug)]
pub struct GramAccumulator {
    n: usize,
    tokens: usize,
    /// From the last (longest) strip to the first.
    strips: Vec<Strip>,
    /// Rows that wait, packed, from an index on: their borders depend on the order of rows alone.
    panels: (Vec<f32>, usize),
    held: usize,
    /// Memory for the products of a strip, used again: fresh memory costs page faults.
    products: Mutex<Vec<Vec<f32>>>,
}

/// Rows `row..row + rows` of G, columns up to the diagonal block's end.
#[derive(Debug)]
struct Strip {
    row: usize,
    rows: usize,
    columns: usize,
    sum: Shelf<f64>,
}

impl GramAccumulator {
    /// An empty sum of `n x n` in memory.
    pub fn new(n: usize) -> Self {
        Self::with_scratch(n, None).expect("memory is no file")
    }

    /// An empty sum of `n x n`, in scratch files when they are given; the same bits.
    ///
    /// # Errors
    /// When a scratch file cannot be opened or sized.
    pub fn with_scratch(n: usize, scratch: Option<&Scratch>) -> io::Result<Self> {
        let strip = |row| {
            let rows = STRIP.min(n - row);
            let columns = row + rows;
            Ok(Strip { row, rows, columns, sum: Shelf::new(rows * columns, scratch)? })
        };
        let strips = (0..n).step_by(STRIP).rev().map(strip).collect::<io::Result<_>>()?;
        let (panels, products) = (Default::default(), Mutex::default());
        Ok(Self { n, tokens: 0, strips, panels, held: 0, products })
    }

    /// Bytes of working memory of [`GramAccumulator::add`] for `tokens` rows in all, and of the sums.
    pub fn bytes(n: usize, tokens: usize, threads: usize, scratch: bool) -> usize {
        let strips = n.div_ceil(STRIP);
        let widest = STRIP.min(n) * n;
        let products = 4 * widest * threads.min(strips);
        let lines = if scratch { 8 * LINES.min(n) * n * threads.min(strips) } else { 0 };
        let strip = |row: usize| (n - row).min(STRIP) * (row + STRIP).min(n);
        let sums: usize = (0..n).step_by(STRIP).map(strip).sum();
        products
            + lines
            + if scratch { 0 } else { 8 * sums }
            + 4 * panels_at_most(n, tokens.min(ROWS).next_multiple_of(KC))
    }

    /// Rows seen.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Adds `xᵀx` for `x [tokens, n]`, row-major. Rows wait until there are many.
    ///
    /// # Errors
    /// When a scratch file cannot be read or written.
    ///
    /// # Panics
    /// When `x` is not a multiple of `n` long.
    pub fn add(&mut self, x: &[f32]) -> io::Result<()> {
        let n = self.n;
        if x.is_empty() {
            return Ok(());
        }
        assert!(n > 0 && x.len().is_multiple_of(n), "rows have {n} channels");
        self.tokens += x.len() / n;
        if self.panels.0.is_empty() {
            // Zeros that are never touched take no memory.
            self.panels = room_for_panels(n, ROWS);
        }
        let mut rest = x;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(((ROWS - self.held) * n).min(rest.len()));
            let (panels, start) = &mut self.panels;
            pack_rows(now, n, self.held, &mut panels[*start..]);
            self.held += now.len() / n;
            rest = later;
            if self.held == ROWS {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Adds the rows that wait.
    fn flush(&mut self) -> io::Result<()> {
        let (n, tokens) = (self.n, std::mem::take(&mut self.held));
        if tokens == 0 {
            return Ok(());
        }
        let panels = Panels { data: &self.panels.0[self.panels.1..], roomy: true, planes: PLANES };
        let spare = &self.products;
        self.strips.par_iter_mut().try_for_each(|strip| {
            let Strip { row, rows, columns, ref mut sum } = *strip;
            let held = spare.lock().expect("nobody panics with it").pop();
            let mut memory = held.unwrap_or_else(|| vec![0.0f32; STRIP.min(n) * n]);
            let out = &mut memory[..rows * columns];
            let none = Operand { data: &[], stride: 0, depth_contiguous: false };
            // A strip that does not end with the matrix may end inside a panel.
            multiply(Product {
                shape: (rows, n, tokens),
                alpha: 1.0,
                a: none,
                b: none,
                add: false,
                out,
                ldo: columns,
                panels: Some(panels),
                below: Some(row),
            });
            let mut buffer = Vec::new();
            for (block, products) in out.chunks(LINES * columns).enumerate() {
                let (at, length) = (block * LINES * columns, products.len());
                sum.update(at, length, &mut buffer, |sums| {
                    vectorize(
                        #[inline(always)]
                        || {
                            let lines = sums.chunks_exact_mut(columns);
                            let lines = lines.zip(products.chunks(columns));
                            for (i, (sum, product)) in lines.enumerate() {
                                let end = row + block * LINES + i;
                                for (sum, &p) in sum[..=end].iter_mut().zip(product) {
                                    *sum += f64::from(p);
                                }
                            }
                        },
                    );
                })?;
            }
            spare.lock().expect("nobody panics with it").push(memory);
            Ok::<_, io::Error>(())
        })
    }

    /// Adds another sum of the same size.
    ///
    /// # Errors
    /// When a scratch file cannot be read or written.
    ///
    /// # Panics
    /// When the sizes differ.
    pub fn merge(&mut self, mut other: Self) -> io::Result<()> {
        assert_eq!(self.n, other.n, "sums of the same size");
        self.flush()?;
        other.flush()?;
        self.tokens += other.tokens;
        let (mut here, mut there) = (Vec::new(), Vec::new());
        for (a, b) in self.strips.iter_mut().zip(&other.strips) {
            for row in 0..a.rows {
                let b = b.sum.span(row * a.columns, a.columns, &mut there)?;
                a.sum.update(row * a.columns, a.columns, &mut here, |a| {
                    for (a, b) in a.iter_mut().zip(b) {
                        *a += b;
                    }
                })?;
            }
        }
        Ok(())
    }

    /// The symmetric matrix `scale · XᵀX`, rounded to f32 once. Each strip of sums gives its memory back
    /// once it is copied, so that both never lie in memory whole.
    ///
    /// # Errors
    /// When a scratch file cannot be read.
    pub fn finish(self, scale: f64) -> io::Result<Mat> {
        let (n, strips) = self.into_sums()?;
        let mut out = Mat::zeros((n, n));
        let all = out.as_slice_mut().expect("fresh matrices are contiguous");
        // First the lower triangle alone: memory of rows not yet reached is not touched.
        Self::each_below(strips, |i, sums| {
            for (value, &sum) in all[i * n..].iter_mut().zip(sums) {
                *value = (scale * sum) as f32;
            }
        })?;
        mirror(all, n);
        Ok(out)
    }

    /// The symmetric matrix `scale · XᵀX` in f64, row-major `[n, n]`.
    ///
    /// # Errors
    /// When a scratch file cannot be read.
    pub fn finish_f64(self, scale: f64) -> io::Result<Vec<f64>> {
        let (n, strips) = self.into_sums()?;
        let mut out = vec![0.0; n * n];
        Self::each_below(strips, |i, sums| {
            for (value, &sum) in out[i * n..].iter_mut().zip(sums) {
                *value = scale * sum;
            }
        })?;
        mirror(&mut out, n);
        Ok(out)
    }

    /// The sums alone.
    fn into_sums(mut self) -> io::Result<(usize, Vec<Strip>)> {
        self.flush()?;
        Ok((self.n, self.strips))
    }

    /// Rows of the lower triangle up to the diagonal.
    fn each_below(strips: Vec<Strip>, mut visit: impl FnMut(usize, &[f64])) -> io::Result<()> {
        let mut buffer = Vec::new();
        for strip in strips {
            for i in 0..strip.rows {
                let length = strip.row + i + 1;
                visit(strip.row + i, strip.sum.span(i * strip.columns, length, &mut buffer)?);
            }
        }
        Ok(())
    }
}

/// Copies the lower triangle of `a [n, n]` to the upper one, by blocks that stay in cache.
fn mirror<T: Copy>(a: &mut [T], n: usize) {
    const BLOCK: usize = 64;
    for first in (0..n).step_by(BLOCK) {
        for start in (0..=first).step_by(BLOCK) {
            for i in first..(first + BLOCK).min(n) {
                for j in start..(start + BLOCK).min(i) {
                    a[j * n + i] = a[i * n + j];
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
    fn gram_equals_the_naive_sum_on_any_thread_count_in_memory_and_on_scratch() {
        let scratch = Scratch::new(tempfile::tempfile);
        for (t, n) in [(600, 401), (61, 1290), (30, 1264)] {
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
            let run = |threads, scratch: Option<&Scratch>| {
                rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(
                    || {
                        let mut gram = GramAccumulator::with_scratch(n, scratch).unwrap();
                        gram.add(&x[..t / 2 * n]).unwrap();
                        let mut rest = GramAccumulator::with_scratch(n, scratch).unwrap();
                        rest.add(&x[t / 2 * n..]).unwrap();
                        gram.merge(rest).unwrap();
                        assert_eq!(gram.tokens(), t);
                        gram.finish(1.0).unwrap()
                    },
                )
            };
            let (one, two) = (run(1, None), run(2, None));
            assert_eq!(one, two);
            assert_eq!(one, run(2, Some(&scratch)));
            assert!(distance(one.as_slice().unwrap(), &want).nmse < 1e-11);
        }
    }
}
