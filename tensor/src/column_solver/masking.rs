//! The column sweep with zeros plugged in (SparseGPT, Frantar & Alistarh 2023, arXiv:2301.00774, Alg. 1) and the
//! refinement of mask and values, on one tile of rows, column by column: rows are lanes.
//!
//! When the sweep reaches a block of columns, the weights with the least `w² / U_ii²` become zero; with n:m,
//! the m − n least of each m columns when it reaches these, so that the choice knows what feedback has added.
//! What the zeros lose is carried on. The sweep gives kept weights only what comes from the columns before them;
//! refinement gives them the rest: on the residual `R = E H` each kept weight moves to the minimum along its column,
//! `v += r / H_jj`, and a pruned weight is exchanged for a kept one of the same block and row (with n:m, of the
//! same m columns) where that lowers the objective. So each round lowers it or leaves it.
//! Cost: `rows·in²` for the sweep, `2·rows·in²` for the residual and for each round.

use std::io;

use pulp::{Simd, WithSimd};

use super::{
    Errors, Factor,
    lanes::{LANES, add_scaled, load, store},
    swap::{Group, swap},
};
use crate::{
    Pattern,
    linalg::{arch, factor::Panel, gemm_tn},
};

/// Columns of a refinement block, rounded to whole groups of n:m.
const BLOCK: usize = 128;

/// What a tile may do.
#[derive(Debug, Clone, Copy)]
pub struct MaskingOptions {
    /// Which weights are to be zero.
    pub pattern: Pattern,
    /// Rounds of refinement after the sweep.
    pub refine: usize,
    /// Repetitions inside each block of a round.
    pub inner: usize,
    /// Whether refinement may exchange pruned weights for kept ones.
    pub exchange: bool,
}

/// Memory that one tile after the other works in.
#[derive(Debug, Default)]
pub struct Space {
    values: Vec<f32>,
    kept: Vec<f32>,
    error: Vec<f32>,
    /// Weights in the factor's order, then the residual.
    lines: Vec<f32>,
    errors: Vec<f32>,
}

/// One tile of rows: what is given and where the result goes, row-major.
#[derive(Debug)]
pub struct Tile<'a> {
    /// `[rows, in]`.
    pub weight: &'a [f32],
    /// `[rows, in]`; pruned weights are exactly zero.
    pub out: &'a mut [f32],
}

/// The same tile column by column, padded to whole lanes: `[columns][rows]`.
struct Work<'a, 's> {
    factor: &'a Factor,
    hessian: &'a [f32],
    n: usize,
    rows: usize,
    values: &'s mut [f32],
    /// 1 for weights that stay, else 0.
    kept: &'s mut [f32],
    error: &'s mut [f32],
    residual: &'s mut [f32],
}

/// Columns of a block for a pattern: whole groups.
fn block_of(pattern: Pattern, columns: usize) -> usize {
    match pattern {
        Pattern::Fraction(_) => columns,
        Pattern::NM { m, .. } => (columns / usize::from(m)).max(1) * usize::from(m),
    }
}

/// Columns of a block of the sweep, to be the panel of its factor.
pub fn panel(pattern: Pattern, block_size: usize) -> usize {
    block_of(pattern, block_size)
}

impl Tile<'_> {
    /// Solves the tile; `hessian [in, in]` is in the original order, dead columns filled. With n:m the factor
    /// keeps the columns' order.
    ///
    /// # Errors
    /// When the factor lies on scratch and cannot be read.
    pub fn solve(
        self,
        hessian: &[f32],
        factor: &Factor,
        options: &MaskingOptions,
        space: &mut Space,
    ) -> io::Result<Errors> {
        let n = factor.order.len();
        let count = self.weight.len() / n;
        let rows = count.next_multiple_of(LANES);
        let Space { values, kept, error, lines, errors } = space;
        error.clear();
        error.resize(n * rows, 0.0);
        for list in [&mut *values, &mut *kept, &mut *lines] {
            list.resize(n * rows, 0.0);
        }
        let mut work = Work { factor, hessian, n, rows, values, kept, error, residual: lines };
        for (r, row) in self.weight.chunks(n).enumerate() {
            for (c, &w) in row.iter().enumerate() {
                work.error[c * rows + r] = w;
            }
        }
        work.sweep(options.pattern, count, errors)?;
        for (error, value) in work.error.iter_mut().zip(&*work.values) {
            *error -= value;
        }
        let (h, shape) = (work.hessian, (n, rows, n));
        gemm_tn(shape, 1.0, (h, n), (work.error, rows), false, (work.residual, rows));
        let group = match options.pattern {
            _ if !options.exchange => None,
            Pattern::Fraction(_) => Some(Group::Block),
            Pattern::NM { m, .. } => Some(Group::Columns(usize::from(m))),
        };
        let block = block_of(options.pattern, BLOCK);
        for _ in 0..options.refine {
            for first in (0..n).step_by(block) {
                work.refine((first, (first + block).min(n)), options.inner, group);
            }
        }
        for (r, row) in self.out.chunks_mut(n).enumerate() {
            for (c, to) in row.iter_mut().enumerate() {
                let at = c * rows + r;
                *to = if work.kept[at] > 0.0 { work.values[at] } else { 0.0 };
            }
        }
        Ok(Errors::of(work.error, work.residual, rows, &factor.added))
    }
}

impl Work<'_, '_> {
    /// Chooses and applies the mask; weights come in `error` and stay there.
    fn sweep(&mut self, pattern: Pattern, count: usize, errors: &mut Vec<f32>) -> io::Result<()> {
        let (n, rows) = (self.n, self.rows);
        let work = std::mem::take(&mut self.residual);
        for (line, &column) in work.chunks_mut(rows).zip(&self.factor.order) {
            line.copy_from_slice(&self.error[column * rows..(column + 1) * rows]);
        }
        let block = self.factor.upper.rows();
        errors.resize(block * rows, 0.0);
        let (mut buffer, mut scores, mut order) = (Vec::new(), Vec::new(), Vec::new());
        for start in (0..n).step_by(block) {
            let end = (start + block).min(n);
            let upper = self.factor.upper.panel(start / block, &mut buffer)?;
            if let Pattern::Fraction(_) = pattern {
                scores.clear();
                for i in start..end {
                    let pivot = upper.values[(i - start) * upper.stride + i - start];
                    let line = &work[i * rows..][..count];
                    scores.extend(line.iter().map(|w| w * w / (pivot * pivot)));
                    self.kept[self.factor.order[i] * rows..][..rows].fill(1.0);
                }
                order.clear();
                order.extend(0..scores.len() as u32);
                // Rounded so that the whole tile has what was asked for.
                let zeros = pattern.zeros(end * count) - pattern.zeros(start * count);
                if zeros > 0 {
                    let score = |at: u32| scores[at as usize];
                    order.select_nth_unstable_by(zeros - 1, |&a, &b| {
                        score(a).total_cmp(&score(b)).then(a.cmp(&b))
                    });
                }
                for &at in &order[..zeros] {
                    let (i, r) = (start + at as usize / count, at as usize % count);
                    self.kept[self.factor.order[i] * rows + r] = 0.0;
                }
            }
            let lines = (&mut *work, errors.as_mut_slice());
            arch().dispatch(Sweep { tile: self, lines, upper, span: (start, end), pattern });
            if end < n {
                let errors = &errors[..(end - start) * rows];
                let rest = (&mut work[end * rows..], rows);
                let upper = (&upper.values[end - start..], upper.stride);
                gemm_tn((n - end, rows, end - start), -1.0, upper, (errors, rows), true, rest);
            }
        }
        self.residual = work;
        Ok(())
    }

    /// Refines the columns of a block and carries the change to the residual of all columns.
    fn refine(&mut self, (first, end): (usize, usize), inner: usize, group: Option<Group>) {
        let (n, rows, width) = (self.n, self.rows, end - first);
        let mut delta = vec![0.0f32; width * rows];
        arch().dispatch(Refine { tile: self, delta: &mut delta, span: (first, end), inner, group });
        let h = (&self.hessian[first * n..], n);
        let out = (&mut *self.residual, rows);
        gemm_tn((n, rows, width), -1.0, h, (&delta, rows), true, out);
    }
}

/// One block of the sweep, columns `span` of the factor's order.
struct Sweep<'t, 'a, 's> {
    tile: &'t mut Work<'a, 's>,
    lines: (&'t mut [f32], &'t mut [f32]),
    upper: Panel<'t>,
    span: (usize, usize),
    pattern: Pattern,
}

impl WithSimd for Sweep<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { tile, lines: (work, errors), upper, span: (start, end), pattern } = self;
        let rows = tile.rows;
        let mut local = vec![simd.splat_f32s(0.0); end - start];
        for r in (0..rows).step_by(S::F32_LANES) {
            for (i, local) in local.iter_mut().enumerate() {
                *local = load::<S>(work, (start + i) * rows + r);
            }
            for i in start..end {
                if let Pattern::NM { n, m } = pattern {
                    let m = usize::from(m);
                    if i % m == 0 {
                        let span = i - start..(i - start + m).min(end - start);
                        choose(simd, &local, span, &upper, usize::from(n), |at, kept| {
                            store::<S>(tile.kept, tile.factor.order[start + at] * rows + r, kept);
                        });
                    }
                }
                let at = tile.factor.order[i] * rows + r;
                let upper = &upper.values[(i - start) * upper.stride..][i - start..end - start];
                let (here, behind) = local[i - start..].split_first_mut().expect("column i");
                let value = simd.mul_f32s(*here, load::<S>(tile.kept, at));
                store::<S>(tile.values, at, value);
                let inverse = simd.splat_f32s(-1.0 / upper[0]);
                let minus = simd.mul_f32s(simd.sub_f32s(*here, value), inverse);
                add_scaled(simd, behind, minus, &upper[1..]);
                store::<S>(errors, (i - start) * rows + r, simd.neg_f32s(minus));
            }
        }
    }
}

/// Keeps the `n` columns of a span with the greatest scores `w² / U_ii²`, of equal ones the later.
#[inline(always)]
fn choose<S: Simd>(
    simd: S,
    local: &[S::f32s],
    span: std::ops::Range<usize>,
    upper: &Panel<'_>,
    n: usize,
    mut put: impl FnMut(usize, S::f32s),
) {
    let (none, one) = (simd.splat_f32s(0.0), simd.splat_f32s(1.0));
    let score = |at: usize| {
        let over = simd.splat_f32s(1.0 / upper.values[at * upper.stride + at]);
        let scaled = simd.mul_f32s(local[at], over);
        simd.mul_f32s(scaled, scaled)
    };
    let limit = simd.splat_f32s(n as f32 - 0.5);
    for a in span.clone() {
        let own = score(a);
        // How many are greater.
        let mut rank = none;
        for b in span.clone() {
            let other = score(b);
            let above = if b > a {
                simd.less_than_or_equal_f32s(own, other)
            } else {
                simd.less_than_f32s(own, other)
            };
            if a != b {
                rank = simd.add_f32s(rank, simd.select_f32s(above, one, none));
            }
        }
        put(a, simd.select_f32s(simd.less_than_f32s(rank, limit), one, none));
    }
}

/// Refinement of the columns `span`; their change goes to `delta`.
struct Refine<'t, 'a, 's> {
    tile: &'t mut Work<'a, 's>,
    delta: &'t mut [f32],
    span: (usize, usize),
    inner: usize,
    group: Option<Group>,
}

impl WithSimd for Refine<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { tile, delta, span: (first, end), inner, group } = self;
        let (n, width, rows) = (tile.n, end - first, tile.rows);
        let zeros = vec![simd.splat_f32s(0.0); width];
        let (mut residual, mut values, mut kept) = (zeros.clone(), zeros.clone(), zeros);
        for r in (0..rows).step_by(S::F32_LANES) {
            for at in 0..width {
                let place = (first + at) * rows + r;
                residual[at] = load::<S>(tile.residual, place);
                values[at] = load::<S>(tile.values, place);
                kept[at] = load::<S>(tile.kept, place);
            }
            for _ in 0..inner {
                for column in 0..width {
                    let h = &tile.hessian[(first + column) * n + first..][..width];
                    let gain = simd.mul_f32s(simd.splat_f32s(1.0 / h[column]), kept[column]);
                    let step = simd.mul_f32s(residual[column], gain);
                    values[column] = simd.add_f32s(values[column], step);
                    add_scaled(simd, &mut residual, simd.neg_f32s(step), h);
                }
                if let Some(group) = group {
                    let corner = (tile.hessian, n, first);
                    let free = |_: usize, _: usize, value: f32| value;
                    swap(simd, &mut residual, &mut values, &mut kept, corner, group, free);
                }
            }
            for at in 0..width {
                let place = (first + at) * rows + r;
                let change = simd.sub_f32s(values[at], load::<S>(tile.values, place));
                store::<S>(delta, at * rows + r, change);
                let error = simd.sub_f32s(load::<S>(tile.error, place), change);
                store::<S>(tile.error, place, error);
                store::<S>(tile.values, place, values[at]);
                store::<S>(tile.kept, place, kept[at]);
            }
        }
    }
}
