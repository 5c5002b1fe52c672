//! Exchanges of a pruned weight for a kept one of the same row, rows as lanes.
//!
//! Pruning `v_i` changes the objective of a row by `v_i² H_ii + 2 v_i r_i` and its slope by `r_j += v_i H_ij`;
//! a weight put at j then lowers it by `2 v_j r_j − v_j² H_jj`, at most `r_j² / H_jj`. An exchange is made only
//! where the sum of both, at the value that is allowed at j, lowers the objective.

use pulp::Simd;

/// Columns among which the number of kept weights of a row stays what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// A block of the refinement.
    Block,
    /// This many consecutive columns; they divide a block.
    Columns(usize),
}

/// Exchanges tried per block, row and repetition where any column may be exchanged for any.
const TRIES: usize = 4;
/// What an exchange has to gain, relative to what the weight that comes gains, so that rounding errors do not
/// exchange weights for ever.
const MARGIN: f32 = 1e-4;

/// A block of the Hessian: rows of `n`, the block's first column.
pub(super) type Corner<'a> = (&'a [f32], usize, usize);

#[inline(always)]
fn entry((h, n, first): Corner<'_>, i: usize, j: usize) -> f32 {
    h[(first + i) * n + first + j]
}

/// Exchanges weights of a vector of rows. `residual`, `values` and `kept` are those of the block's columns;
/// `project(column, lane, value)` is the nearest value that is allowed.
#[inline(always)]
pub(super) fn swap<S: Simd>(
    simd: S,
    residual: &mut [S::f32s],
    values: &mut [S::f32s],
    kept: &mut [S::f32s],
    corner: Corner<'_>,
    group: Group,
    project: impl Fn(usize, usize, f32) -> f32,
) {
    match group {
        Group::Block => {
            for _ in 0..TRIES {
                let pair = likely(simd, residual, values, kept, corner);
                if !exchange(simd, residual, values, kept, corner, pair, &project) {
                    break;
                }
            }
        }
        Group::Columns(m) => {
            for from in (0..residual.len()).step_by(m) {
                let to = (from + m).min(residual.len());
                let pair = best(simd, residual, values, kept, corner, (from, to));
                exchange(simd, residual, values, kept, corner, pair, &project);
            }
        }
    }
}

/// The kept column that costs least and the pruned one that gains most, each on its own; −1 where there is none.
#[inline(always)]
fn likely<S: Simd>(
    simd: S,
    residual: &[S::f32s],
    values: &[S::f32s],
    kept: &[S::f32s],
    corner: Corner<'_>,
) -> (S::f32s, S::f32s) {
    let (half, none) = (simd.splat_f32s(0.5), simd.splat_f32s(-1.0));
    let (mut least, mut most) = (simd.splat_f32s(f32::MAX), simd.splat_f32s(0.0));
    let (mut leaves, mut comes) = (none, none);
    for column in 0..residual.len() {
        let (r, v, here) = (residual[column], values[column], simd.splat_f32s(column as f32));
        let curve = entry(corner, column, column);
        let stays = simd.less_than_f32s(half, kept[column]);
        let cost =
            simd.mul_f32s(v, simd.mul_add_f32s(v, simd.splat_f32s(curve), simd.add_f32s(r, r)));
        let cost = simd.select_f32s(stays, cost, simd.splat_f32s(f32::MAX));
        let gain = simd.mul_f32s(simd.mul_f32s(r, r), simd.splat_f32s(1.0 / curve));
        let gain = simd.select_f32s(stays, none, gain);
        let (below, above) = (simd.less_than_f32s(cost, least), simd.less_than_f32s(most, gain));
        least = simd.select_f32s(below, cost, least);
        leaves = simd.select_f32s(below, here, leaves);
        most = simd.select_f32s(above, gain, most);
        comes = simd.select_f32s(above, here, comes);
    }
    (leaves, comes)
}

/// The best pair of the columns `from..to`; −1 where none gains.
#[inline(always)]
fn best<S: Simd>(
    simd: S,
    residual: &[S::f32s],
    values: &[S::f32s],
    kept: &[S::f32s],
    corner: Corner<'_>,
    (from, to): (usize, usize),
) -> (S::f32s, S::f32s) {
    let (half, none) = (simd.splat_f32s(0.5), simd.splat_f32s(-1.0));
    let mut most = simd.splat_f32s(0.0);
    let (mut leaves, mut comes) = (none, none);
    for i in from..to {
        let (r, v) = (residual[i], values[i]);
        let stays = simd.less_than_f32s(half, kept[i]);
        let curve = simd.splat_f32s(entry(corner, i, i));
        let cost = simd.mul_f32s(v, simd.mul_add_f32s(v, curve, simd.add_f32s(r, r)));
        for j in from..to {
            let slope = simd.mul_add_f32s(v, simd.splat_f32s(entry(corner, i, j)), residual[j]);
            let gain = simd.mul_f32s(slope, slope);
            let gain = simd.mul_f32s(gain, simd.splat_f32s(1.0 / entry(corner, j, j)));
            let gain = simd.sub_f32s(gain, cost);
            let gain = simd.select_f32s(stays, gain, none);
            let gain = simd.select_f32s(simd.less_than_f32s(half, kept[j]), none, gain);
            let above = simd.less_than_f32s(most, gain);
            most = simd.select_f32s(above, gain, most);
            leaves = simd.select_f32s(above, simd.splat_f32s(i as f32), leaves);
            comes = simd.select_f32s(above, simd.splat_f32s(j as f32), comes);
        }
    }
    (leaves, comes)
}

/// Makes the exchanges that gain; true when there was any.
#[inline(always)]
fn exchange<S: Simd>(
    _: S,
    residual: &mut [S::f32s],
    values: &mut [S::f32s],
    kept: &mut [S::f32s],
    corner: Corner<'_>,
    (leaves, comes): (S::f32s, S::f32s),
    project: &impl Fn(usize, usize, f32) -> f32,
) -> bool {
    let lanes = S::F32_LANES;
    let (leaves, comes) = ([leaves], [comes]);
    let (leaves, comes): (&[f32], &[f32]) =
        (bytemuck::cast_slice(&leaves), bytemuck::cast_slice(&comes));
    let residual: &mut [f32] = bytemuck::cast_slice_mut(residual);
    let values: &mut [f32] = bytemuck::cast_slice_mut(values);
    let kept: &mut [f32] = bytemuck::cast_slice_mut(kept);
    let (h, n, first) = corner;
    let mut any = false;
    for lane in 0..lanes {
        if leaves[lane] < 0.0 || comes[lane] < 0.0 {
            continue;
        }
        let (i, j) = (leaves[lane] as usize, comes[lane] as usize);
        let (old, slope) = (values[i * lanes + lane], residual[j * lanes + lane]);
        let slope = slope + old * entry(corner, i, j);
        let curve = entry(corner, j, j);
        let new = project(j, lane, slope / curve);
        let gain = new * (2.0 * slope - new * curve);
        let cost = old * (old * entry(corner, i, i) + 2.0 * residual[i * lanes + lane]);
        // NaN gains nothing.
        let gains = gain * (1.0 - MARGIN) > cost;
        if !gains || new == 0.0 {
            continue;
        }
        any = true;
        let width = residual.len() / lanes;
        let left = &h[(first + i) * n + first..][..width];
        let right = &h[(first + j) * n + first..][..width];
        for ((r, &a), &b) in residual[lane..].iter_mut().step_by(lanes).zip(left).zip(right) {
            *r += old * a - new * b;
        }
        (values[i * lanes + lane], kept[i * lanes + lane]) = (0.0, 0.0);
        (values[j * lanes + lane], kept[j * lanes + lane]) = (new, 1.0);
    }
    any
}
