//! The column sweep and its refinement for block types with two levels of scales, on one tile of rows; as in
//! `column_solver::rounding`, rows are lanes.
//!
//! When the sweep reaches a block, its scales and minima are searched on the columns as error feedback has left
//! them, each weighed by what its error will cost, `1 / U_ii²`, and stand on the format's grid before a code is
//! rounded. Columns keep their order, since a block is a run of columns.
//!
//! Refinement moves one number at a time, each by the step along it that lowers `e H eᵀ`, projected onto its grid:
//! `d` and `dmin` (halves), the integer scale and minimum of each sub-block, then each code. A change `δ` along
//! the direction `v` of Ŵ changes the objective by `δ² v H vᵀ − 2 δ v Rᵀ`.
//! Cost per round: `2·rows·in²` in products and about `4·rows·in·256` in vectors.

use std::io;

use attar_tensor::{
    BlockQuantized, BlockType,
    block_search::{
        lane::Lane,
        search::{Found, Kind, level, search},
    },
    blocks::{IQ4_VALUES, Levels, Minimum, SUPER},
    column_solver::{Errors, Factor},
    linalg::{arch, factor::Panel, gemm_tn},
};
use half::f16;
use pulp::{Simd, WithSimd};

use super::Options;

/// Rows of a tile are padded to a multiple of this, the longest vector.
const LANES: usize = 16;

/// One tile of rows in work, column by column: `[columns, sub-blocks or blocks][rows]`.
struct Work<'a> {
    factor: &'a Factor,
    hessian: &'a [f32],
    kind: Kind,
    n: usize,
    rows: usize,
    levels: Vec<f32>,
    d: Vec<f32>,
    dmin: Vec<f32>,
    /// Integers.
    scales: Vec<f32>,
    mins: Vec<f32>,
    /// `E = W − Ŵ`.
    error: Vec<f32>,
    /// `R = E H`.
    residual: Vec<f32>,
}

/// Solves a tile `weight [rows, in]`; `hessian [in, in]` has dead columns filled.
pub(super) fn solve(
    weight: &[f32],
    hessian: &[f32],
    factor: &Factor,
    block: BlockType,
    options: &Options,
) -> io::Result<(BlockQuantized, Errors)> {
    let n = factor.order.len();
    let count = weight.len() / n;
    let rows = count.next_multiple_of(LANES);
    let (blocks, subs) = (n / block.size(), n / block.sub_size());
    let mut work = Work {
        factor,
        hessian,
        kind: Kind::new(block),
        n,
        rows,
        levels: vec![0.0; n * rows],
        d: vec![0.0; blocks * rows],
        dmin: vec![0.0; blocks * rows],
        scales: vec![0.0; subs * rows],
        mins: vec![0.0; subs * rows],
        error: vec![0.0; n * rows],
        residual: Vec::new(),
    };
    for (r, row) in weight.chunks(n).enumerate() {
        for (c, &w) in row.iter().enumerate() {
            work.error[c * rows + r] = w;
        }
    }
    work.sweep()?;
    arch().dispatch(Subtract(&mut work));
    let mut residual = vec![0.0; n * rows];
    gemm_tn((n, rows, n), 1.0, (hessian, n), (&work.error, rows), false, (&mut residual, rows));
    work.residual = residual;
    for _ in 0..options.refine {
        for first in (0..n).step_by(SUPER) {
            work.refine(first, (first + SUPER).min(n), options.inner);
        }
    }
    let errors = Errors::of(&work.error, &work.residual, rows, &factor.added);
    Ok((work.result(count), errors))
}

impl Work<'_> {
    fn sweep(&mut self) -> io::Result<()> {
        let (n, rows) = (self.n, self.rows);
        let mut work = self.error.clone();
        let panel = self.factor.upper.rows();
        let mut errors = vec![0.0f32; panel * rows];
        let mut buffer = Vec::new();
        for start in (0..n).step_by(panel) {
            let end = (start + panel).min(n);
            let upper = self.factor.upper.panel(start / panel, &mut buffer)?;
            let lines = (work.as_mut_slice(), errors.as_mut_slice());
            arch().dispatch(Sweep { tile: self, lines, upper, span: (start, end) });
            if end < n {
                let errors = &errors[..(end - start) * rows];
                let rest = (&mut work[end * rows..], rows);
                let upper = (&upper.values[end - start..], upper.stride);
                gemm_tn((n - end, rows, end - start), -1.0, upper, (errors, rows), true, rest);
            }
        }
        Ok(())
    }

    /// Refines the columns `first..end` and carries the change to the residual of all columns.
    fn refine(&mut self, first: usize, end: usize, inner: usize) {
        let (n, rows, width) = (self.n, self.rows, end - first);
        let mut delta = vec![0.0f32; width * rows];
        arch().dispatch(Refine { tile: self, delta: &mut delta, span: (first, end), inner });
        let h = (&self.hessian[first * n..], n);
        let out = (self.residual.as_mut_slice(), rows);
        gemm_tn((n, rows, width), -1.0, h, (&delta, rows), true, out);
    }

    /// Row-major, without the padding.
    fn result(&self, count: usize) -> BlockQuantized {
        let (block, rows) = (self.kind.block, self.rows);
        let mut out = BlockQuantized::zeros(block, count, self.n);
        let turn = |from: &[f32], r: usize| -> Vec<f32> {
            from.iter().skip(r).step_by(rows).copied().collect()
        };
        let (blocks, subs) = (self.n / block.size(), self.n / block.sub_size());
        for r in 0..count {
            for (to, level) in out.codes[r * self.n..].iter_mut().zip(turn(&self.levels, r)) {
                *to = match block.levels() {
                    Levels::Linear { zero } => (level + f32::from(zero)) as u8,
                    Levels::Codebook(_) => {
                        IQ4_VALUES.iter().position(|&v| f32::from(v) >= level).unwrap_or(15) as u8
                    }
                };
            }
            for (to, v) in out.d[r * blocks..(r + 1) * blocks].iter_mut().zip(turn(&self.d, r)) {
                *to = f16::from_f32(v);
            }
            if !out.dmin.is_empty() {
                let to = out.dmin[r * blocks..(r + 1) * blocks].iter_mut();
                for (to, v) in to.zip(turn(&self.dmin, r)) {
                    *to = f16::from_f32(v);
                }
            }
            if !out.sub_scales.is_empty() {
                let to = out.sub_scales[r * subs..(r + 1) * subs].iter_mut();
                for (to, v) in to.zip(turn(&self.scales, r)) {
                    *to = v as i8;
                }
            }
            if !out.sub_mins.is_empty() {
                let to = out.sub_mins[r * subs..(r + 1) * subs].iter_mut();
                for (to, v) in to.zip(turn(&self.mins, r)) {
                    *to = v as u8;
                }
            }
        }
        out
    }

    #[inline(always)]
    fn at<S: Simd>(&self, simd: S, x: &[f32], index: usize, r: usize) -> Lane<S> {
        Lane::load(simd, &x[index * self.rows + r..])
    }

    /// Scale and minimum of sub-block `j`.
    #[inline(always)]
    fn scale_min<S: Simd>(&self, simd: S, j: usize, r: usize) -> (Lane<S>, Lane<S>) {
        let block = j / self.kind.block.subs();
        let scale = self.at(simd, &self.d, block, r) * self.at(simd, &self.scales, j, r);
        if !self.kind.has_min() {
            return (scale, Lane::splat(simd, 0.0));
        }
        (scale, self.at(simd, &self.dmin, block, r) * self.at(simd, &self.mins, j, r))
    }

    /// Ŵ of one column.
    #[inline(always)]
    fn value<S: Simd>(&self, simd: S, column: usize, r: usize) -> Lane<S> {
        let (scale, min) = self.scale_min(simd, column / self.kind.block.sub_size(), r);
        scale * self.at(simd, &self.levels, column, r) - min
    }
}

/// Subtracts Ŵ from the weights that the sweep left in `error`.
struct Subtract<'t, 'a>(&'t mut Work<'a>);

impl WithSimd for Subtract<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let work = self.0;
        for column in 0..work.n {
            for r in (0..work.rows).step_by(S::F32_LANES) {
                let at = column * work.rows + r;
                let error = Lane::load(simd, &work.error[at..]) - work.value(simd, column, r);
                error.store(&mut work.error[at..]);
            }
        }
    }
}

/// One panel of the sweep.
struct Sweep<'t, 'a> {
    tile: &'t mut Work<'a>,
    /// Weights not yet rounded, and the errors of this panel, `[columns][rows]`.
    lines: (&'t mut [f32], &'t mut [f32]),
    /// Rows `span` of U.
    upper: Panel<'t>,
    span: (usize, usize),
}

impl WithSimd for Sweep<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match (self.tile.kind.has_min(), self.tile.kind.codebook()) {
            (true, _) => self.run::<S, true, false>(simd),
            (false, true) => self.run::<S, false, true>(simd),
            (false, false) => self.run::<S, false, false>(simd),
        }
    }
}

impl Sweep<'_, '_> {
    #[inline(always)]
    fn run<S: Simd, const MIN: bool, const CODEBOOK: bool>(self, simd: S) {
        let Self { tile, lines: (work, errors), upper, span: (start, end) } = self;
        let rows = tile.rows;
        let (size, sub) = (tile.kind.block.size(), tile.kind.block.sub_size());
        let zero = Lane::splat(simd, 0.0);
        let mut local = vec![zero.1; end - start];
        // What an error of each column will cost, near 1 on average.
        let pivot = |i: usize| upper.values[(i - start) * upper.stride + i - start];
        let costs: Vec<f32> = (start..end).map(|i| 1.0 / (pivot(i) * pivot(i))).collect();
        let mean = costs.iter().sum::<f32>() / costs.len() as f32;
        let mut weights = vec![zero.1; end - start];
        for (weight, cost) in weights.iter_mut().zip(&costs) {
            *weight = simd.splat_f32s(cost / mean);
        }
        for r in (0..rows).step_by(S::F32_LANES) {
            for (i, local) in local.iter_mut().enumerate() {
                *local = Lane::load(simd, &work[(start + i) * rows + r..]).1;
            }
            let (mut scale, mut min, mut over) = (zero, zero, zero);
            for i in start..end {
                if i % size == 0 {
                    let span = i - start..i - start + size;
                    let found = search::<S, MIN, CODEBOOK>(
                        simd,
                        &tile.kind,
                        &local[span.clone()],
                        &weights[span],
                    );
                    tile.keep(&found, i / size, r);
                }
                if i % sub == 0 {
                    (scale, min) = tile.scale_min(simd, i / sub, r);
                    over = inverse(scale);
                }
                let upper = &upper.values[(i - start) * upper.stride..][i - start..end - start];
                let (here, behind) = local[i - start..].split_first_mut().expect("column i");
                let here = Lane(simd, *here);
                let code = level::<S, CODEBOOK>(&tile.kind, (here + min) * over);
                code.store(&mut tile.levels[i * rows + r..]);
                let value = scale * code - min;
                let minus = (value - here) * Lane::splat(simd, 1.0 / upper[0]);
                for (y, &x) in behind.iter_mut().zip(&upper[1..]) {
                    *y = minus.mul_add(Lane::splat(simd, x), Lane(simd, *y)).1;
                }
                (-minus).store(&mut errors[(i - start) * rows + r..]);
            }
        }
    }
}

/// `1 / x`, 0 where `x` is 0.
#[inline(always)]
fn inverse<S: Simd>(x: Lane<S>) -> Lane<S> {
    let (zero, one) = (Lane::splat(x.0, 0.0), Lane::splat(x.0, 1.0));
    zero.below(x.abs()).select(one / x, zero)
}

impl Work<'_> {
    #[inline(always)]
    fn keep<S: Simd>(&mut self, found: &Found<S>, block: usize, r: usize) {
        let (rows, subs) = (self.rows, self.kind.block.subs());
        found.d.store(&mut self.d[block * rows + r..]);
        found.dmin.store(&mut self.dmin[block * rows + r..]);
        for j in 0..subs {
            found.scales[j].store(&mut self.scales[(block * subs + j) * rows + r..]);
            found.mins[j].store(&mut self.mins[(block * subs + j) * rows + r..]);
        }
    }
}

/// Refinement of the columns `span`, whole blocks; their change goes to `delta`.
struct Refine<'t, 'a> {
    tile: &'t mut Work<'a>,
    delta: &'t mut [f32],
    span: (usize, usize),
    inner: usize,
}

impl WithSimd for Refine<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        if self.tile.kind.codebook() {
            self.run::<S, true>(simd);
        } else {
            self.run::<S, false>(simd);
        }
    }
}

/// What the refinement of one vector of rows works on: columns `first..end`.
struct Lines<S: Simd> {
    first: usize,
    end: usize,
    r: usize,
    residual: Vec<S::f32s>,
    /// The direction, from column `first`, and its product with H.
    along: Vec<S::f32s>,
    product: Vec<S::f32s>,
}

impl Refine<'_, '_> {
    #[inline(always)]
    fn run<S: Simd, const CODEBOOK: bool>(self, simd: S) {
        let Self { tile, delta, span: (first, end), inner } = self;
        let (width, rows) = (end - first, tile.rows);
        let none = vec![simd.splat_f32s(0.0); width];
        let mut old = none.clone();
        let mut lines =
            Lines { first, end, r: 0, residual: none.clone(), along: none.clone(), product: none };
        let (size, sub) = (tile.kind.block.size(), tile.kind.block.sub_size());
        for r in (0..rows).step_by(S::F32_LANES) {
            lines.r = r;
            for (at, old) in old.iter_mut().enumerate() {
                lines.residual[at] = Lane::load(simd, &tile.residual[(first + at) * rows + r..]).1;
                *old = tile.value(simd, first + at, r).1;
            }
            for _ in 0..inner {
                for block in first / size..end / size {
                    tile.move_factors(simd, &mut lines, block);
                }
                for j in first / sub..end / sub {
                    tile.move_integers(simd, &mut lines, j);
                    tile.descend::<S, CODEBOOK>(simd, &mut lines, j);
                }
            }
            for (at, &old) in old.iter().enumerate() {
                let place = (first + at) * rows + r;
                let change = tile.value(simd, first + at, r) - Lane(simd, old);
                change.store(&mut delta[at * rows + r..]);
                let error = Lane::load(simd, &tile.error[place..]) - change;
                error.store(&mut tile.error[place..]);
            }
        }
    }
}

impl Work<'_> {
    /// `v R` and `v H v` along the direction in `lines.along`, columns `from..to`; fills `lines.product`.
    #[inline(always)]
    fn slope<S: Simd>(
        &self,
        simd: S,
        lines: &mut Lines<S>,
        (from, to): (usize, usize),
    ) -> (Lane<S>, Lane<S>) {
        /// Columns added to the product at once; sub-blocks are multiples.
        const TOGETHER: usize = 4;
        let (first, end, n) = (lines.first, lines.end, self.n);
        let zero = Lane::splat(simd, 0.0);
        lines.product.fill(zero.1);
        for column in (from..to).step_by(TOGETHER) {
            let v = |k: usize| Lane(simd, lines.along[column + k - first]);
            let (v0, v1, v2, v3) = (v(0), v(1), v(2), v(3));
            let row = |k: usize| &self.hessian[(column + k) * n + first..(column + k) * n + end];
            let (h0, h1, h2, h3) = (row(0), row(1), row(2), row(3));
            for ((((p, &a), &b), &c), &d) in
                lines.product.iter_mut().zip(h0).zip(h1).zip(h2).zip(h3)
            {
                let sum = v0.mul_add(Lane::splat(simd, a), Lane(simd, *p));
                let sum = v1.mul_add(Lane::splat(simd, b), sum);
                let sum = v2.mul_add(Lane::splat(simd, c), sum);
                *p = v3.mul_add(Lane::splat(simd, d), sum).1;
            }
        }
        let (mut slope, mut curve) = (zero, zero);
        for at in from - first..to - first {
            let v = Lane(simd, lines.along[at]);
            slope = v.mul_add(Lane(simd, lines.residual[at]), slope);
            curve = v.mul_add(Lane(simd, lines.product[at]), curve);
        }
        (slope, curve)
    }

    /// The number `old` moved along the direction as far as `project` lets it, where that lowers the objective.
    #[inline(always)]
    fn moved<S: Simd>(
        lines: &mut Lines<S>,
        old: Lane<S>,
        (slope, curve): (Lane<S>, Lane<S>),
        new: Lane<S>,
    ) -> Lane<S> {
        let simd = old.0;
        let zero = Lane::splat(simd, 0.0);
        let step = new - old;
        let change = step * (step * curve - (slope + slope));
        let choice = change.below(zero);
        let step = choice.select(step, zero);
        for (x, &p) in lines.residual.iter_mut().zip(&lines.product) {
            *x = (-step).mul_add(Lane(simd, p), Lane(simd, *x)).1;
        }
        choice.select(new, old)
    }

    /// Moves `d` and `dmin` of a block.
    #[inline(always)]
    fn move_factors<S: Simd>(&mut self, simd: S, lines: &mut Lines<S>, block: usize) {
        let (rows, r) = (self.rows, lines.r);
        let (size, sub) = (self.kind.block.size(), self.kind.block.sub_size());
        let (from, to) = (block * size, (block + 1) * size);
        for column in from..to {
            let scale = self.at(simd, &self.scales, column / sub, r);
            let v = scale * self.at(simd, &self.levels, column, r);
            lines.along[column - lines.first] = v.1;
        }
        let found = self.slope(simd, lines, (from, to));
        let old = self.at(simd, &self.d, block, r);
        let new = half(old + found.0 * inverse(found.1));
        let new = Self::moved(lines, old, found, new);
        new.store(&mut self.d[block * rows + r..]);
        if !self.kind.has_min() {
            return;
        }
        for column in from..to {
            let min = self.at(simd, &self.mins, column / sub, r);
            lines.along[column - lines.first] = (-min).1;
        }
        let found = self.slope(simd, lines, (from, to));
        let old = self.at(simd, &self.dmin, block, r);
        let new = half(old + found.0 * inverse(found.1));
        let new = if self.kind.block.minimum() == Minimum::Added {
            new
        } else {
            new.max(Lane::splat(simd, 0.0))
        };
        let new = Self::moved(lines, old, found, new);
        new.store(&mut self.dmin[block * rows + r..]);
    }

    /// Moves the integer scale and minimum of a sub-block.
    #[inline(always)]
    fn move_integers<S: Simd>(&mut self, simd: S, lines: &mut Lines<S>, j: usize) {
        let Some((low, high)) = self.kind.block.sub_scale_range() else { return };
        let (rows, r, sub) = (self.rows, lines.r, self.kind.block.sub_size());
        let (from, to) = (j * sub, (j + 1) * sub);
        let block = j / self.kind.block.subs();
        let d = self.at(simd, &self.d, block, r);
        for column in from..to {
            let v = d * self.at(simd, &self.levels, column, r);
            lines.along[column - lines.first] = v.1;
        }
        let found = self.slope(simd, lines, (from, to));
        let old = self.at(simd, &self.scales, j, r);
        let new = within(old + found.0 * inverse(found.1), f32::from(low), f32::from(high));
        let new = Self::moved(lines, old, found, new);
        new.store(&mut self.scales[j * rows + r..]);
        let Minimum::Subtracted { max } = self.kind.block.minimum() else { return };
        let minus = -self.at(simd, &self.dmin, block, r);
        for column in from..to {
            lines.along[column - lines.first] = minus.1;
        }
        let found = self.slope(simd, lines, (from, to));
        let old = self.at(simd, &self.mins, j, r);
        let new = within(old + found.0 * inverse(found.1), 0.0, f32::from(max));
        let new = Self::moved(lines, old, found, new);
        new.store(&mut self.mins[j * rows + r..]);
    }

    /// Each code of a sub-block moves to the minimum along its column.
    #[inline(always)]
    fn descend<S: Simd, const CODEBOOK: bool>(&mut self, simd: S, lines: &mut Lines<S>, j: usize) {
        let (n, rows, r) = (self.n, self.rows, lines.r);
        let (first, end) = (lines.first, lines.end);
        let sub = self.kind.block.sub_size();
        let (scale, _) = self.scale_min(simd, j, r);
        let over = inverse(scale);
        for column in j * sub..(j + 1) * sub {
            let at = column * rows + r;
            let code = Lane::load(simd, &self.levels[at..]);
            let h = &self.hessian[column * n + first..column * n + end];
            let gain = over * Lane::splat(simd, 1.0 / h[column - first]);
            let ideal = Lane(simd, lines.residual[column - first]).mul_add(gain, code);
            let new = level::<S, CODEBOOK>(&self.kind, ideal);
            let minus = (code - new) * scale;
            if simd.reduce_max_f32s(minus.abs().1) > 0.0 {
                new.store(&mut self.levels[at..]);
                for (y, &x) in lines.residual.iter_mut().zip(h) {
                    *y = minus.mul_add(Lane::splat(simd, x), Lane(simd, *y)).1;
                }
            }
        }
    }
}

/// The nearest integer of a range.
#[inline(always)]
fn within<S: Simd>(x: Lane<S>, low: f32, high: f32) -> Lane<S> {
    x.max(Lane::splat(x.0, low)).min(Lane::splat(x.0, high)).round()
}

/// The nearest half.
#[inline(always)]
fn half<S: Simd>(x: Lane<S>) -> Lane<S> {
    x.each(|v| f16::from_f32(v.clamp(-65504.0, 65504.0)).to_f32())
}
