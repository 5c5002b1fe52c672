//! The search of [`super::search`] over a matrix: sixteen rows at a time, each a lane.

#![allow(
    clippy::inline_always,
    reason = "a body that is not inlined loses the vector instructions"
)]

use half::f16;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::{
    lane::Lane,
    pieces,
    search::{Found, Kind, code, search as search_lanes},
};
use crate::{
    blocks::{BlockQuantized, BlockType, Minimum, SUPER},
    linalg::arch,
};

/// Rows of a task.
const LANES: usize = 16;

/// Quantizes `weight [out_features, in_features]`, finite f32, so that `Σ h (w − ŵ)²` is small;
/// `importance [in_features]` is `h`, 1 where it is absent. Columns of no importance count a little, so that
/// what is not seen is not ruined.
///
/// # Panics
/// When blocks do not divide a row or a slice has another size.
pub fn search(
    block: BlockType,
    weight: &[f32],
    out_features: usize,
    in_features: usize,
    importance: Option<&[f32]>,
) -> BlockQuantized {
    assert_eq!(weight.len(), out_features * in_features, "the weight is [out, in]");
    let importance = importance.map(|h| {
        assert_eq!(h.len(), in_features, "one importance per column");
        floored(h)
    });
    let mut out = BlockQuantized::zeros(block, out_features, in_features);
    let kind = Kind::new(block);
    let blocks = LANES * (in_features / block.size());
    let when = |there: bool, count: usize| if there { count } else { 0 };
    let has_min = block.minimum() != Minimum::None;
    let subs = when(block.sub_scale_range().is_some(), blocks * block.subs());
    let mins = when(!out.sub_mins.is_empty(), blocks * block.subs());
    let tasks = out_features.div_ceil(LANES);
    let mut dmin = pieces(&mut out.dmin, when(has_min, blocks), tasks);
    let mut sub_scales = pieces(&mut out.sub_scales, subs, tasks);
    let mut sub_mins = pieces(&mut out.sub_mins, mins, tasks);
    weight
        .par_chunks(LANES * in_features)
        .zip(out.codes.par_chunks_mut(LANES * in_features))
        .zip(out.d.par_chunks_mut(blocks).zip(dmin.par_iter_mut()))
        .zip(sub_scales.par_iter_mut().zip(sub_mins.par_iter_mut()))
        .for_each(|(((weight, codes), (d, dmin)), (sub_scales, sub_mins))| {
            arch().dispatch(Rows {
                kind: &kind,
                n: in_features,
                weight,
                importance: importance.as_deref(),
                codes,
                d,
                dmin,
                sub_scales,
                sub_mins,
            });
        });
    out
}

/// Importance with a floor of a millionth of its mean.
fn floored(h: &[f32]) -> Vec<f32> {
    let mean = h.iter().map(|&h| f64::from(h.max(0.0))).sum::<f64>() / h.len().max(1) as f64;
    // Near 1 on average: sums of squares of small weights stay normal numbers.
    let unit = if mean > 0.0 && mean.is_finite() { 1.0 / mean } else { 0.0 };
    h.iter().map(|&h| ((f64::from(h) * unit) as f32).max(1e-6)).collect()
}

/// One task.
struct Rows<'a> {
    kind: &'a Kind,
    n: usize,
    weight: &'a [f32],
    importance: Option<&'a [f32]>,
    codes: &'a mut [u8],
    d: &'a mut [f16],
    dmin: &'a mut [f16],
    sub_scales: &'a mut [i8],
    sub_mins: &'a mut [u8],
}

impl WithSimd for Rows<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match (self.kind.has_min(), self.kind.codebook()) {
            (true, _) => self.run::<S, true, false>(simd),
            (false, true) => self.run::<S, false, true>(simd),
            (false, false) => self.run::<S, false, false>(simd),
        }
    }
}

impl Rows<'_> {
    #[inline(always)]
    fn run<S: Simd, const MIN: bool, const CODEBOOK: bool>(mut self, simd: S) {
        let (size, rows) = (self.kind.block.size(), self.weight.len() / self.n);
        let mut lines = vec![0.0f32; size * LANES];
        let zero = simd.splat_f32s(0.0);
        let (mut x, mut w) = ([zero; SUPER], [zero; SUPER]);
        for (at, first) in (0..self.n).step_by(size).enumerate() {
            for (row, weight) in self.weight.chunks_exact(self.n).enumerate() {
                for (c, &v) in weight[first..first + size].iter().enumerate() {
                    lines[c * LANES + row] = v;
                }
            }
            for (c, w) in w[..size].iter_mut().enumerate() {
                *w = simd.splat_f32s(self.importance.map_or(1.0, |h| h[first + c]));
            }
            for r in (0..rows).step_by(S::F32_LANES) {
                for (c, x) in x[..size].iter_mut().enumerate() {
                    *x = Lane::load(simd, &lines[c * LANES + r..]).1;
                }
                let found =
                    search_lanes::<S, MIN, CODEBOOK>(simd, self.kind, &x[..size], &w[..size]);
                self.keep(&found, at, r, rows);
                let sub = self.kind.block.sub_size();
                for (j, x) in x[..size].chunks_exact(sub).enumerate() {
                    let scale = found.d * found.scales[j];
                    let min = found.dmin * found.mins[j];
                    let live = Lane(simd, zero).below(scale.abs());
                    let over = live.select(Lane::splat(simd, 1.0) / scale, Lane(simd, zero));
                    for (i, &x) in x.iter().enumerate() {
                        let code = code::<S, CODEBOOK>(self.kind, (Lane(simd, x) + min) * over);
                        code.store(&mut lines[(j * sub + i) * LANES + r..]);
                    }
                }
            }
            for (row, codes) in self.codes.chunks_exact_mut(self.n).enumerate() {
                for (c, code) in codes[first..first + size].iter_mut().enumerate() {
                    // A small whole number: its low bits after the shift are the number.
                    *code = (lines[c * LANES + row] + 8_388_608.0).to_bits() as u8;
                }
            }
        }
    }

    /// Stores the scales of block `at` of the rows from `r`.
    #[inline(always)]
    fn keep<S: Simd>(&mut self, found: &Found<S>, at: usize, r: usize, rows: usize) {
        let (blocks, subs) = (self.n / self.kind.block.size(), self.kind.block.subs());
        let mut lanes = [0.0f32; LANES];
        let count = S::F32_LANES.min(rows - r);
        let place = |l: usize| (r + l) * blocks + at;
        found.d.store(&mut lanes);
        for (l, &v) in lanes[..count].iter().enumerate() {
            self.d[place(l)] = f16::from_f32(v);
        }
        if !self.dmin.is_empty() {
            found.dmin.store(&mut lanes);
            for (l, &v) in lanes[..count].iter().enumerate() {
                self.dmin[place(l)] = f16::from_f32(v);
            }
        }
        for j in 0..subs {
            if !self.sub_scales.is_empty() {
                found.scales[j].store(&mut lanes);
                for (l, &v) in lanes[..count].iter().enumerate() {
                    self.sub_scales[place(l) * subs + j] = v as i8;
                }
            }
            if !self.sub_mins.is_empty() {
                found.mins[j].store(&mut lanes);
                for (l, &v) in lanes[..count].iter().enumerate() {
                    self.sub_mins[place(l) * subs + j] = v as u8;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{block_search::quantize, rng::Rng};

    const ROWS: usize = 21;
    const COLUMNS: usize = 512;

    fn weights() -> Vec<f32> {
        let mut x = Rng::new(11).normals(ROWS * COLUMNS);
        // A long tail, a row of zeros, one of ones, one that is never below zero.
        x.iter_mut().step_by(37).for_each(|v| *v *= 6.0);
        x[COLUMNS..2 * COLUMNS].fill(0.0);
        x[2 * COLUMNS..3 * COLUMNS].fill(1.0);
        x[3 * COLUMNS..4 * COLUMNS].iter_mut().for_each(|v| *v = v.abs() + 0.1);
        x
    }

    fn loss(found: &BlockQuantized, x: &[f32], h: Option<&[f32]>) -> f64 {
        let values = found.dequantize();
        let pairs = values.iter().zip(x).enumerate();
        pairs
            .map(|(i, (a, b))| {
                f64::from(a - b).powi(2) * h.map_or(1.0, |h| f64::from(h[i % COLUMNS]))
            })
            .sum()
    }

    #[test]
    fn the_search_is_below_the_range_and_importance_is_heeded() {
        let x = weights();
        let h: Vec<f32> = Rng::new(2).normals(COLUMNS).iter().map(|v| (2.0 * v).exp()).collect();
        for block in BlockType::ALL {
            let ranged = quantize(block, &x, ROWS, COLUMNS);
            let plain = search(block, &x, ROWS, COLUMNS, None);
            let weighed = search(block, &x, ROWS, COLUMNS, Some(&h));
            plain.check().unwrap();
            weighed.check().unwrap();
            assert!(loss(&plain, &x, None) < loss(&ranged, &x, None), "{block}");
            assert!(loss(&weighed, &x, Some(&h)) < loss(&plain, &x, Some(&h)), "{block}");
            let row = |r: usize| plain.dequantize().row(r).to_vec();
            assert!(row(1).iter().all(|&v| v == 0.0), "{block} keeps a row of zeros");
            assert!(row(2).iter().all(|&v| (v - 1.0).abs() < 0.02), "{block} a row of ones");
        }
    }

    #[test]
    fn bits_depend_neither_on_threads_nor_on_neighbours() {
        let x = weights();
        for block in BlockType::ALL {
            let run = |threads: usize, rows: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| search(block, &x[..rows * COLUMNS], rows, COLUMNS, None))
            };
            let whole = run(2, ROWS);
            assert_eq!(whole, run(1, ROWS));
            assert_eq!(run(1, 5).codes, whole.codes[..5 * COLUMNS]);
        }
    }

    #[test]
    fn weights_beyond_a_half_and_importance_without_any_stay_finite() {
        let huge = vec![1e30f32; 256];
        let tiny = vec![1e-30f32; 256];
        for block in BlockType::ALL {
            for x in [&huge, &tiny] {
                let found = search(block, x, 1, 256, Some(&[0.0; 256]));
                found.check().unwrap();
                assert!(found.dequantize().iter().all(|v| v.is_finite()), "{block}");
            }
        }
    }
}
