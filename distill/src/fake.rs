//! A linear whose codes and scales are learned: `Ŵ = s · q`, `q = clamp(round(l), −z, 2ᵇ − 1 − z)`, with a level `l`
//! for each weight and a scale `s` for each group, on the grid in which scales are stored. Rounding and clamping pass
//! derivatives on as they are (straight-through estimator, Bengio et al. 2013, arXiv:1308.3432), so
//! `∂/∂l = s · ∂/∂Ŵ` and `∂/∂s = Σ q · ∂/∂Ŵ` over the group. Levels are kept within half a step of the codes there
//! are, and within `reach` of where they began.

use attar_tensor::{Mat, QuantScheme, QuantizedLinear, linalg::vectorize};
use rayon::prelude::*;

use crate::{AdamW, Moments};

/// How far beyond the outermost codes, or from an edge between codes, levels stay.
const MARGIN: f32 = 1e-3;
/// Rows of one task.
const ROWS: usize = 16;

/// One linear in training.
#[derive(Debug)]
pub(crate) struct FakeLinear {
    scheme: QuantScheme,
    shape: (usize, usize),
    size: usize,
    /// `[out, in]`.
    levels: Vec<f32>,
    /// Where they began, when they may not go far.
    origin: Option<(Vec<f32>, f32)>,
    /// `[out, groups]`: scales at the start, and factors on them.
    base: Vec<f32>,
    factors: Vec<f32>,
    zeros: Vec<u16>,
    /// Weights that stay zero, where some were pruned.
    pruned: Option<Vec<bool>>,
    moments: Option<Moments>,
    factor_moments: Moments,
    factor_gradient: Vec<f32>,
}

/// What scales and codes of a group are made of.
struct Shared<'a> {
    scheme: QuantScheme,
    base: &'a [f32],
    factors: &'a [f32],
    zeros: &'a [u16],
}

impl<'a> Shared<'a> {
    fn of(linear: &'a FakeLinear) -> Self {
        let FakeLinear { scheme, base, factors, zeros, .. } = linear;
        Self { scheme: *scheme, base, factors, zeros }
    }

    fn scale(&self, group: usize) -> f32 {
        self.scheme.scale_grid.project(self.base[group] * self.factors[group])
    }

    fn span(&self, group: usize) -> (f32, f32) {
        let zero = f32::from(self.zeros[group]);
        (-zero, f32::from(self.scheme.max_code()) - zero)
    }
}

/// One group: returns `Σ q d`, makes derivatives by levels of `gradient`, and moves the levels by `rate` against the
/// sign of those, within the codes there are.
#[inline(always)]
fn advance(
    gradient: &mut [f32],
    levels: &mut [f32],
    scale: f32,
    (low, high): (f32, f32),
    rate: f32,
) -> f32 {
    const LANES: usize = 16;
    let (first, last) = (low - 0.5 + MARGIN, high + 0.5 - MARGIN);
    let mut lanes = [0.0f32; LANES];
    for (gradient, levels) in gradient.chunks_mut(LANES).zip(levels.chunks_mut(LANES)) {
        for ((lane, d), level) in lanes.iter_mut().zip(gradient).zip(levels) {
            *lane += level.round_ties_even().clamp(low, high) * *d;
            *d *= scale;
            let step = if *d > 0.0 {
                rate
            } else if *d < 0.0 {
                -rate
            } else {
                0.0
            };
            *level = (*level - step).clamp(first, last);
        }
    }
    lanes.iter().sum::<f32>()
}

/// How levels move.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Mover {
    /// Not at all: codes stay.
    Fixed,
    /// By the sign of the derivative (SignSGD).
    Sign,
    /// By Adam.
    Adam(AdamW),
}

impl FakeLinear {
    /// Begins at `start`, each level as near to `weight` as its code allows.
    pub(crate) fn new(
        weight: &Mat,
        start: &QuantizedLinear,
        masked: bool,
        reach: Option<f32>,
        adam: bool,
    ) -> Self {
        let (out, n) = weight.dim();
        let size = start.scheme.group_size(n);
        let groups = n / size;
        let values = weight.as_slice().expect("standard layout");
        let mut levels = vec![0.0f32; out * n];
        levels.par_chunks_mut(n).enumerate().for_each(|(row, levels)| {
            for (c, level) in levels.iter_mut().enumerate() {
                let group = row * groups + c / size;
                let code = f32::from(start.codes[row * n + c]) - f32::from(start.zeros[group]);
                let wanted = values[row * n + c] / start.scales[group];
                let edge = 0.5 - MARGIN;
                *level = wanted.clamp(code - edge, code + edge);
            }
        });
        let pruned = masked.then(|| values.iter().map(|&w| w == 0.0).collect());
        Self {
            scheme: start.scheme,
            shape: (out, n),
            size,
            origin: reach.map(|reach| (levels.clone(), reach)),
            moments: adam.then(|| Moments::new(out * n)),
            levels,
            base: start.scales.clone(),
            factors: vec![1.0; out * groups],
            zeros: start.zeros.clone(),
            pruned,
            factor_moments: Moments::new(out * groups),
            factor_gradient: vec![0.0; out * groups],
        }
    }

    /// Bytes for `weights` weights in groups of `size`, with Adam's moments.
    pub(crate) const fn bytes(weights: usize, size: usize, adam: bool, reach: bool) -> usize {
        4 * weights * (1 + if reach { 1 } else { 0 })
            + if adam { Moments::bytes(weights) } else { 0 }
            + 30 * (weights / size)
    }

    /// Writes Ŵ.
    pub(crate) fn values(&self, out: &mut Mat) {
        let (n, size) = (self.shape.1, self.size);
        let (shared, groups) = (Shared::of(self), n / size);
        let tasks = out.as_slice_mut().expect("standard layout").par_chunks_mut(n * ROWS);
        tasks.zip(self.levels.par_chunks(n * ROWS)).enumerate().for_each(
            |(task, (out, levels))| {
                for (at, (out, levels)) in out.chunks_mut(size).zip(levels.chunks(size)).enumerate()
                {
                    let group = task * ROWS * groups + at;
                    let (scale, (low, high)) = (shared.scale(group), shared.span(group));
                    vectorize(
                        #[inline(always)]
                        || {
                            for (out, &level) in out.iter_mut().zip(levels) {
                                *out = level.round_ties_even().clamp(low, high) * scale;
                            }
                        },
                    );
                }
            },
        );
    }

    /// The codes and scales as they are now.
    pub(crate) fn quantized(&self) -> QuantizedLinear {
        let (out, n) = self.shape;
        let (shared, groups) = (Shared::of(self), n / self.size);
        let mut codes = vec![0u8; out * n];
        codes.par_chunks_mut(n).zip(self.levels.par_chunks(n)).enumerate().for_each(
            |(row, (codes, levels))| {
                for (c, (code, &level)) in codes.iter_mut().zip(levels).enumerate() {
                    let group = row * groups + c / self.size;
                    let (low, high) = shared.span(group);
                    *code = (level.round_ties_even().clamp(low, high) - low) as u8;
                }
            },
        );
        QuantizedLinear {
            scheme: self.scheme,
            out_features: out,
            in_features: n,
            codes,
            scales: (0..out * groups).map(|group| shared.scale(group)).collect(),
            zeros: self.zeros.clone(),
            g_idx: None,
        }
    }

    /// One step against `gradient`, the derivatives by Ŵ, which is used up: levels at `rate` (in steps between codes),
    /// factors of scales at `scale_rate`. `t` counts from one.
    pub(crate) fn step(
        &mut self,
        t: usize,
        (rate, scale_rate): (f32, f32),
        mover: Mover,
        gradient: &mut Mat,
    ) {
        let (n, size) = (self.shape.1, self.size);
        let groups = n / size;
        let gradient = gradient.as_slice_mut().expect("standard layout");
        let mut sums = std::mem::take(&mut self.factor_gradient);
        // By its sign a level moves at once; others are moved below.
        let signed = if mover == Mover::Sign { rate } else { 0.0 };
        let Self { scheme, base, factors, zeros, levels, .. } = self;
        let shared = Shared { scheme: *scheme, base, factors, zeros };
        gradient
            .par_chunks_mut(n * ROWS)
            .zip(levels.par_chunks_mut(n * ROWS))
            .zip(sums.par_chunks_mut(groups * ROWS))
            .enumerate()
            .for_each(|(task, ((gradient, levels), sums))| {
                let spans = gradient.chunks_mut(size).zip(levels.chunks_mut(size)).zip(sums);
                for (at, ((gradient, levels), sum)) in spans.enumerate() {
                    let group = task * ROWS * groups + at;
                    let (scale, (low, high)) = (shared.scale(group), shared.span(group));
                    let total = vectorize(
                        #[inline(always)]
                        || advance(gradient, levels, scale, (low, high), signed),
                    );
                    *sum = total * shared.base[group];
                }
            });
        let adam = AdamW::default();
        if scale_rate > 0.0 {
            adam.step(t, scale_rate, &mut self.factor_moments, &mut self.factors, &sums);
        }
        self.factor_gradient = sums;
        if let (true, Mover::Adam(adam), Some(moments)) = (rate > 0.0, mover, &mut self.moments) {
            adam.step(t, rate, moments, &mut self.levels, gradient);
        }
        if rate > 0.0 && (mover != Mover::Sign || self.origin.is_some() || self.pruned.is_some()) {
            self.confine();
        }
    }

    /// Brings levels back to where they may be.
    fn confine(&mut self) {
        let (n, size) = (self.shape.1, self.size);
        let (groups, top) = (n / size, f32::from(self.scheme.max_code()));
        let Self { levels, zeros, origin, pruned, .. } = self;
        let (zeros, origin, pruned) = (&*zeros, &*origin, &*pruned);
        levels.par_chunks_mut(n).enumerate().for_each(|(row, levels)| {
            for (g, levels) in levels.chunks_mut(size).enumerate() {
                let low = -f32::from(zeros[row * groups + g]);
                let (low, high) = (low - 0.5 + MARGIN, low + top + 0.5 - MARGIN);
                for level in levels.iter_mut() {
                    *level = level.clamp(low, high);
                }
            }
            if let Some((origin, reach)) = origin {
                let origin = &origin[row * n..(row + 1) * n];
                for (level, from) in levels.iter_mut().zip(origin) {
                    *level = level.clamp(from - *reach, from + *reach);
                }
            }
            if let Some(pruned) = pruned {
                for (level, _) in
                    levels.iter_mut().zip(&pruned[row * n..]).filter(|(_, pruned)| **pruned)
                {
                    *level = 0.0;
                }
            }
        });
    }
}
