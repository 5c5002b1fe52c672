//! The column sweep and its refinement on one tile of rows, stored column by column: rows are the lanes of
//! vector instructions, so that each lane carries its own scale, code and error, and no step is sequential
//! over rows.
//!
//! With `E = W − Ŵ` and `R = E H`, the objective of a row is `e H eᵀ`, and a change `δ` of Ŵ in the columns of
//! a block B changes it by `δ H_BB δᵀ − 2 δ R_Bᵀ`. Refinement visits blocks of whole groups. Inside a block
//! the scale of each group moves to the minimum along it and each code to the minimum along its column,
//! alternating, at the cost of the block's own square of H; then `R −= δ H_B` is one product.
//! Cost per round: `2·rows·in²` in products and about `2·rows·in·block` in vectors.
//!
//! Weights that were pruned have the code of their zero point, exactly: the sweep carries what feedback has put
//! there on to the columns behind, and refinement leaves them alone or, where the mask may move, exchanges one for
//! a kept weight of the same row where that lowers the objective.

use std::io;

use pulp::{Simd, WithSimd};

use super::{
    Errors, Factor,
    lanes::{LANES, add_scaled, load, round_code, store},
    swap::{Group, swap},
};
use crate::{
    QuantScheme,
    grid::{Clip, GroupGrid, choose_grid},
    linalg::{arch, factor::Panel, gemm_tn},
};

/// Columns of a refinement block, rounded to whole groups.
const BLOCK: usize = 128;
/// Groups wider than this are refined in slices, their scale in a pass of its own.
const WIDE: usize = 512;

/// What a tile may do.
#[derive(Debug, Clone, Copy)]
pub struct RoundingOptions {
    /// Codes and scales.
    pub scheme: QuantScheme,
    /// Rounds of refinement after the sweep.
    pub refine: usize,
    /// Repetitions inside each block of a round.
    pub inner: usize,
    /// Which weights are pruned.
    pub mask: Mask,
}

/// Weights that stay zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mask {
    /// None is promised to.
    None,
    /// Those that are zero in the weight given.
    Fixed,
    /// As many as are zero in the weight given, in each group of so many columns.
    Free(Group),
}

/// Memory that one tile after the other works in; fresh memory costs page faults.
#[derive(Debug, Default)]
pub struct Space {
    codes: Vec<f32>,
    error: Vec<f32>,
    /// Weights in the factor's order, then the residual.
    lines: Vec<f32>,
    /// Errors of a block of the sweep.
    errors: Vec<f32>,
    /// 1 for weights that stay, 0 for those that were pruned; empty where none was.
    kept: Vec<f32>,
}

/// One tile of rows: what is given and where results go, row-major.
#[derive(Debug)]
pub struct Tile<'a> {
    /// What the sweep begins with, `[rows, in]`.
    pub weight: &'a [f32],
    /// What the result is held against; the weight itself when absent.
    pub target: Option<&'a [f32]>,
    /// `[rows, in]`.
    pub codes: &'a mut [u8],
    /// `[rows, groups]`.
    pub grids: &'a mut [GroupGrid],
}

/// The same tile column by column, padded to whole lanes: `[columns or groups][rows]`.
struct Work<'a, 's> {
    factor: &'a Factor,
    hessian: &'a [f32],
    scheme: QuantScheme,
    n: usize,
    size: usize,
    rows: usize,
    /// Codes as floats.
    codes: &'s mut [f32],
    /// 1 for weights that stay; empty where none was pruned.
    kept: &'s mut [f32],
    scales: Vec<f32>,
    zeros: Vec<f32>,
    /// `E`.
    error: &'s mut [f32],
    /// `R`; during the sweep the weights in the factor's order.
    residual: &'s mut [f32],
}

impl Tile<'_> {
    /// Solves the tile; `hessian [in, in]` is in the original order, dead columns filled.
    ///
    /// # Errors
    /// When the factor lies on scratch and cannot be read.
    pub fn solve(
        self,
        hessian: &[f32],
        factor: &Factor,
        options: &RoundingOptions,
        space: &mut Space,
    ) -> io::Result<Errors> {
        let scheme = options.scheme;
        let n = factor.order.len();
        let size = scheme.group_size(n);
        let (groups, count) = (n / size, self.weight.len() / n);
        let rows = count.next_multiple_of(LANES);
        for (row, grids) in self.weight.chunks(n).zip(self.grids.chunks_mut(groups)) {
            for (g, grid) in grids.iter_mut().enumerate() {
                let span = g * size..(g + 1) * size;
                let importance = Some(&factor.diagonal[span.clone()]);
                *grid = choose_grid(&row[span], importance, scheme, Clip::Search(35));
            }
        }
        let Space { codes, error, lines, errors, kept } = space;
        // Only rows of padding have to be zero.
        error.clear();
        error.resize(n * rows, 0.0);
        codes.resize(n * rows, 0.0);
        lines.resize(n * rows, 0.0);
        kept.clear();
        if options.mask != Mask::None {
            kept.resize(n * rows, 0.0);
            for (r, row) in self.weight.chunks(n).enumerate() {
                for (c, &w) in row.iter().enumerate() {
                    kept[c * rows + r] = f32::from(u8::from(w != 0.0));
                }
            }
        }
        let mut work = Work {
            factor,
            hessian,
            scheme,
            n,
            size,
            rows,
            codes,
            kept,
            scales: vec![1.0; groups * rows],
            zeros: vec![0.0; groups * rows],
            error,
            residual: lines,
        };
        for (r, grids) in self.grids.chunks(groups).enumerate() {
            for (g, grid) in grids.iter().enumerate() {
                work.scales[g * rows + r] = grid.scale;
                work.zeros[g * rows + r] = f32::from(grid.zero);
            }
        }
        // Zero rows of padding stay exactly zero: their codes are their zero points.
        work.sweep(self.weight, errors)?;
        if let Some(target) = self.target {
            work.turn(target);
        }
        work.fill_error();
        let (h, shape) = (work.hessian, (n, rows, n));
        gemm_tn(shape, 1.0, (h, n), (work.error, rows), false, (work.residual, rows));
        let block = if size > WIDE { BLOCK } else { (BLOCK / size).max(1) * size };
        let mask = match options.mask {
            // Weights are exchanged inside a block, which has to hold whole groups of n:m.
            Mask::Free(Group::Columns(m)) if !block.is_multiple_of(m) => Mask::Fixed,
            mask => mask,
        };
        for _ in 0..options.refine {
            if size > WIDE {
                work.refit_wide();
                for first in (0..n).step_by(BLOCK) {
                    work.refine_block(first, (first + BLOCK).min(n), (1, false, mask));
                }
            } else {
                for first in (0..n).step_by(block) {
                    let how = (options.inner, true, mask);
                    work.refine_block(first, (first + block).min(n), how);
                }
            }
        }
        for (first, codes) in self.codes.chunks_mut(LANES * n).enumerate() {
            for c in 0..n {
                let from = &work.codes[c * rows + first * LANES..][..LANES];
                for (&code, row) in from.iter().zip(codes.chunks_mut(n)) {
                    row[c] = code as u8;
                }
            }
        }
        for (r, grids) in self.grids.chunks_mut(groups).enumerate() {
            for (g, grid) in grids.iter_mut().enumerate() {
                grid.scale = work.scales[g * rows + r];
            }
        }
        Ok(Errors::of(work.error, work.residual, rows, &factor.added))
    }
}

impl Work<'_, '_> {
    /// Puts the weights into `error`.
    fn turn(&mut self, weight: &[f32]) {
        let (n, rows) = (self.n, self.rows);
        for (first, lines) in weight.chunks(LANES * n).enumerate() {
            for c in 0..n {
                let to = &mut self.error[c * rows + first * LANES..][..LANES];
                for (to, row) in to.iter_mut().zip(lines.chunks(n)) {
                    *to = row[c];
                }
            }
        }
    }

    /// Rounds column by column in the factor's order; fills `codes` and puts the weights into `error`.
    fn sweep(&mut self, weight: &[f32], errors: &mut Vec<f32>) -> io::Result<()> {
        let (n, rows) = (self.n, self.rows);
        self.turn(weight);
        let work = std::mem::take(&mut self.residual);
        for (line, &column) in work.chunks_mut(rows).zip(&self.factor.order) {
            line.copy_from_slice(&self.error[column * rows..(column + 1) * rows]);
        }
        let block = self.factor.upper.rows();
        errors.resize(block * rows, 0.0);
        let mut buffer = Vec::new();
        for start in (0..n).step_by(block) {
            let end = (start + block).min(n);
            let upper = self.factor.upper.panel(start / block, &mut buffer)?;
            let lines = (&mut *work, errors.as_mut_slice());
            arch().dispatch(Sweep { tile: self, lines, upper, span: (start, end) });
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

    /// Subtracts Ŵ from the weights that the sweep left in `error`.
    fn fill_error(&mut self) {
        let rows = self.rows;
        let columns = self.error.chunks_mut(rows).zip(self.codes.chunks(rows));
        for (c, (error, codes)) in columns.enumerate() {
            let group = c / self.size * rows;
            let (scales, zeros) = (&self.scales[group..][..rows], &self.zeros[group..][..rows]);
            for (((e, &code), &scale), &zero) in error.iter_mut().zip(codes).zip(scales).zip(zeros)
            {
                *e -= (code - zero) * scale;
            }
        }
    }

    /// Refines the columns `first..end` and carries the change to the residual of all columns.
    fn refine_block(&mut self, first: usize, end: usize, options: (usize, bool, Mask)) {
        let (n, rows, width) = (self.n, self.rows, end - first);
        let mut delta = vec![0.0f32; width * rows];
        arch().dispatch(Refine { tile: self, delta: &mut delta, span: (first, end), options });
        let h = (&self.hessian[first * n..], n);
        let out = (&mut *self.residual, rows);
        gemm_tn((n, rows, width), -1.0, h, (&delta, rows), true, out);
    }

    /// As `refit` for groups wider than a block, through products.
    fn refit_wide(&mut self) {
        let (n, rows, size) = (self.n, self.rows, self.size);
        let mut product = vec![0.0f32; n * rows];
        for first in (0..n).step_by(size) {
            let zeros = &self.zeros[first / size * rows..][..rows];
            let codes = &self.codes[first * rows..(first + size) * rows];
            let levels: Vec<f32> = codes
                .chunks(rows)
                .flat_map(|codes| codes.iter().zip(zeros).map(|(code, zero)| code - zero))
                .collect();
            let h = (&self.hessian[first * n..], n);
            let out = (product.as_mut_slice(), rows);
            gemm_tn((n, rows, size), 1.0, h, (&levels, rows), false, out);
            for r in 0..rows {
                let (mut slope, mut curve) = (0.0f32, 0.0f32);
                for c in 0..size {
                    let (level, at) = (levels[c * rows + r], (first + c) * rows + r);
                    slope += level * self.residual[at];
                    curve += level * product[at];
                }
                let scale = &mut self.scales[first / size * rows + r];
                let step = step_scale(self.scheme, scale, slope, curve);
                for c in 0..n {
                    self.residual[c * rows + r] -= step * product[c * rows + r];
                }
                for c in 0..size {
                    self.error[(first + c) * rows + r] -= step * levels[c * rows + r];
                }
            }
        }
    }
}

/// Moves a scale to the minimum of `step² curve − 2 step slope`, projected onto the grid, and returns the
/// step; zero where that would not lower it.
#[inline(always)]
fn step_scale(scheme: QuantScheme, scale: &mut f32, slope: f32, curve: f32) -> f32 {
    let wanted = *scale + slope / curve;
    if curve > 0.0 && wanted > 0.0 && wanted.is_finite() {
        let projected = scheme.scale_grid.project(wanted);
        let step = projected - *scale;
        if step * step * curve - 2.0 * step * slope < 0.0 {
            *scale = projected;
            return step;
        }
    }
    0.0
}

/// One block of the sweep, columns `span` of the factor's order.
struct Sweep<'t, 'a, 's> {
    tile: &'t mut Work<'a, 's>,
    /// Weights not yet rounded, and the errors of this block, `[columns][rows]`.
    lines: (&'t mut [f32], &'t mut [f32]),
    /// Rows `span` of U.
    upper: Panel<'t>,
    span: (usize, usize),
}

impl WithSimd for Sweep<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        if self.tile.kept.is_empty() {
            self.run::<S, false>(simd);
        } else {
            self.run::<S, true>(simd);
        }
    }
}

impl Sweep<'_, '_, '_> {
    #[inline(always)]
    fn run<S: Simd, const MASKED: bool>(self, simd: S) {
        let Self { tile, lines: (work, errors), upper, span: (start, end) } = self;
        let (rows, size) = (tile.rows, tile.size);
        let top = simd.splat_f32s(f32::from(tile.scheme.max_code()));
        let mut local = vec![simd.splat_f32s(0.0); end - start];
        for r in (0..rows).step_by(S::F32_LANES) {
            for (i, local) in local.iter_mut().enumerate() {
                *local = load::<S>(work, (start + i) * rows + r);
            }
            for i in start..end {
                let column = tile.factor.order[i];
                let group = column / size * rows + r;
                let (scale, zero) = (load::<S>(&tile.scales, group), load::<S>(&tile.zeros, group));
                // From the diagonal to the end of the block.
                let upper = &upper.values[(i - start) * upper.stride..][i - start..end - start];
                let (here, behind) = local[i - start..].split_first_mut().expect("column i");
                let code = simd.add_f32s(simd.div_f32s(*here, scale), zero);
                let mut code = round_code(simd, code, top);
                if MASKED {
                    let kept = load::<S>(tile.kept, column * rows + r);
                    code = simd.mul_add_f32s(simd.sub_f32s(code, zero), kept, zero);
                }
                store::<S>(tile.codes, column * rows + r, code);
                let value = simd.mul_f32s(simd.sub_f32s(code, zero), scale);
                let inverse = simd.splat_f32s(-1.0 / upper[0]);
                let minus = simd.mul_f32s(simd.sub_f32s(*here, value), inverse);
                add_scaled(simd, behind, minus, &upper[1..]);
                store::<S>(errors, (i - start) * rows + r, simd.neg_f32s(minus));
            }
        }
    }
}

/// Refinement of the columns `span`; their change goes to `delta`.
struct Refine<'t, 'a, 's> {
    tile: &'t mut Work<'a, 's>,
    delta: &'t mut [f32],
    span: (usize, usize),
    /// Repetitions, whether scales move, and whether the mask does.
    options: (usize, bool, Mask),
}

impl WithSimd for Refine<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        if self.tile.kept.is_empty() {
            self.run::<S, false>(simd);
        } else {
            self.run::<S, true>(simd);
        }
    }
}

impl Refine<'_, '_, '_> {
    #[inline(always)]
    fn run<S: Simd, const MASKED: bool>(self, simd: S) {
        let Self { tile, delta, span: (first, end), options: (inner, refit, mask) } = self;
        let (width, rows) = (end - first, tile.rows);
        let zeros = vec![simd.splat_f32s(0.0); width];
        let (mut residual, mut product, mut old) = (zeros.clone(), zeros.clone(), zeros);
        for r in (0..rows).step_by(S::F32_LANES) {
            for at in 0..width {
                residual[at] = load::<S>(tile.residual, (first + at) * rows + r);
                old[at] = tile.values(simd, first + at, r);
            }
            for _ in 0..inner {
                let step = tile.size.min(width);
                for group in (first..end).step_by(step) {
                    let span = (first, end);
                    if refit {
                        tile.refit(simd, &mut residual, &mut product, span, group, r);
                    }
                    tile.descend::<S, MASKED>(simd, &mut residual, span, (group, group + step), r);
                }
                if let (true, Mask::Free(group)) = (MASKED, mask) {
                    tile.exchange(simd, &mut residual, (first, end), group, r);
                }
            }
            for (at, &old) in old.iter().enumerate() {
                let place = (first + at) * rows + r;
                let change = simd.sub_f32s(tile.values(simd, first + at, r), old);
                store::<S>(delta, at * rows + r, change);
                let error = simd.sub_f32s(load::<S>(tile.error, place), change);
                store::<S>(tile.error, place, error);
            }
        }
    }
}

impl Work<'_, '_> {
    /// Ŵ of one column.
    #[inline(always)]
    fn values<S: Simd>(&self, simd: S, column: usize, r: usize) -> S::f32s {
        let group = column / self.size * self.rows + r;
        let level = simd
            .sub_f32s(load::<S>(self.codes, column * self.rows + r), load::<S>(&self.zeros, group));
        simd.mul_f32s(level, load::<S>(&self.scales, group))
    }

    /// Moves the scale of the group that begins at `group` to the minimum along it.
    #[inline(always)]
    fn refit<S: Simd>(
        &mut self,
        simd: S,
        residual: &mut [S::f32s],
        product: &mut [S::f32s],
        (first, end): (usize, usize),
        group: usize,
        r: usize,
    ) {
        /// Columns added to the product at once.
        const TOGETHER: usize = 4;
        let (n, rows) = (self.n, self.rows);
        let at = group / self.size * rows + r;
        let zero = load::<S>(&self.zeros, at);
        let none = simd.splat_f32s(0.0);
        let columns = group..group + self.size;
        product.fill(none);
        for from in columns.clone().step_by(TOGETHER) {
            // A group that is no multiple of four repeats its last row with level zero.
            let column = |k: usize| (from + k).min(columns.end - 1);
            let mut levels = [none; TOGETHER];
            for (k, level) in levels.iter_mut().enumerate().take(columns.end - from) {
                *level = simd.sub_f32s(load::<S>(self.codes, (from + k) * rows + r), zero);
            }
            let row = |k: usize| &self.hessian[column(k) * n + first..column(k) * n + end];
            let (h0, h1, h2, h3) = (row(0), row(1), row(2), row(3));
            for ((((p, &a), &b), &c), &d) in product.iter_mut().zip(h0).zip(h1).zip(h2).zip(h3) {
                let sum = simd.mul_add_f32s(levels[0], simd.splat_f32s(a), *p);
                let sum = simd.mul_add_f32s(levels[1], simd.splat_f32s(b), sum);
                let sum = simd.mul_add_f32s(levels[2], simd.splat_f32s(c), sum);
                *p = simd.mul_add_f32s(levels[3], simd.splat_f32s(d), sum);
            }
        }
        let (mut slope, mut curve) = (none, none);
        for column in columns {
            let level = simd.sub_f32s(load::<S>(self.codes, column * rows + r), zero);
            slope = simd.mul_add_f32s(level, residual[column - first], slope);
            curve = simd.mul_add_f32s(level, product[column - first], curve);
        }
        let (mut slopes, mut curves, mut steps) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
        store::<S>(&mut slopes, 0, slope);
        store::<S>(&mut curves, 0, curve);
        for l in 0..S::F32_LANES {
            let scale = &mut self.scales[at + l];
            steps[l] = step_scale(self.scheme, scale, slopes[l], curves[l]);
        }
        let minus = simd.neg_f32s(load::<S>(&steps, 0));
        for (x, &p) in residual.iter_mut().zip(product.iter()) {
            *x = simd.mul_add_f32s(minus, p, *x);
        }
    }

    /// Each code of the columns `from..to` moves to the minimum along its column.
    #[inline(always)]
    fn descend<S: Simd, const MASKED: bool>(
        &mut self,
        simd: S,
        residual: &mut [S::f32s],
        (first, end): (usize, usize),
        (from, to): (usize, usize),
        r: usize,
    ) {
        let (n, rows, size) = (self.n, self.rows, self.size);
        let top = simd.splat_f32s(f32::from(self.scheme.max_code()));
        let one = simd.splat_f32s(1.0);
        for column in from..to {
            let scale = load::<S>(&self.scales, column / size * rows + r);
            let at = column * rows + r;
            let code = load::<S>(self.codes, at);
            let h = &self.hessian[column * n + first..column * n + end];
            let inverse = simd.splat_f32s(1.0 / h[column - first]);
            let gain = simd.mul_f32s(inverse, simd.div_f32s(one, scale));
            let ideal = simd.mul_add_f32s(residual[column - first], gain, code);
            let mut moved = round_code(simd, ideal, top);
            if MASKED {
                let (zero, kept) =
                    (load::<S>(&self.zeros, column / size * rows + r), load::<S>(self.kept, at));
                moved = simd.mul_add_f32s(simd.sub_f32s(moved, zero), kept, zero);
            }
            let minus = simd.mul_f32s(simd.sub_f32s(code, moved), scale);
            if simd.reduce_max_f32s(simd.abs_f32s(minus)) > 0.0 {
                store::<S>(self.codes, at, moved);
                add_scaled(simd, residual, minus, h);
            }
        }
    }

    /// Exchanges pruned weights for kept ones where that lowers the objective.
    #[inline(always)]
    fn exchange<S: Simd>(
        &mut self,
        simd: S,
        residual: &mut [S::f32s],
        (first, end): (usize, usize),
        group: Group,
        r: usize,
    ) {
        let (n, rows, size) = (self.n, self.rows, self.size);
        let none = simd.splat_f32s(0.0);
        let (mut values, mut kept) = (vec![none; end - first], vec![none; end - first]);
        for column in first..end {
            values[column - first] = self.values(simd, column, r);
            kept[column - first] = load::<S>(self.kept, column * rows + r);
        }
        let top = f32::from(self.scheme.max_code());
        let (scales, zeros) = (&self.scales, &self.zeros);
        let project = |at: usize, lane: usize, value: f32| {
            let group = (first + at) / size * rows + r + lane;
            let (scale, zero) = (scales[group], zeros[group]);
            ((value / scale + zero).round_ties_even().clamp(0.0, top) - zero) * scale
        };
        swap(simd, residual, &mut values, &mut kept, (self.hessian, n, first), group, project);
        for column in first..end {
            let at = column / size * rows + r;
            let (scale, zero) = (load::<S>(&self.scales, at), load::<S>(&self.zeros, at));
            let level = simd.div_f32s(values[column - first], scale);
            let code = round_code(simd, simd.add_f32s(level, zero), simd.splat_f32s(top));
            store::<S>(self.codes, column * rows + r, code);
            store::<S>(self.kept, column * rows + r, kept[column - first]);
        }
    }
}
