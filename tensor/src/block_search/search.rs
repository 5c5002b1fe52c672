//! The search for the two levels of scales of a block, weighed: it minimises `Σ h (w − ŵ)²` over a block, one
//! block per lane of a vector, and is the same whether `h` is an importance (the diagonal of a Hessian) or 1.
//!
//! 1. Each sub-block alone: stretched ranges, for each the codes and their weighted least-squares line (a slope
//!    for types without minima); the best is improved by rounding and fitting in turn.
//! 2. The block's `d` (and `dmin`): of several the one with the least error of the rounded sub-scales, each
//!    weighed by its curvature.
//! 3. On `d` and `dmin` as halves, each sub-block tries its integers and their neighbours with the exact error,
//!    then `d` and `dmin` move to their least-squares optimum; a round counts only where it lowers the error.
//!
//! Differs from ggml's search in 3 (it rounds sub-scales once and does not look at the weights again) and in
//! closed-form errors of the candidates in 1.
//! Cost per weight: about 500 operations for types with minima, 300 for others, in vectors.

#![allow(
    clippy::inline_always,
    reason = "a body that is not inlined loses the vector instructions"
)]

use half::f16;
use pulp::Simd;

use super::lane::Lane;
use crate::blocks::{BlockType, IQ4_VALUES, Levels, Minimum};

/// Most sub-blocks of a block.
pub const SUBS: usize = 16;
/// Rounds of the third step.
const ROUNDS: usize = 2;
/// Rounds of fitting and rounding after the candidates.
const ALTERNATIONS: usize = 2;
/// Below this a sub-block counts as zero.
const TINY: f32 = 1e-15;

/// What the search knows of a type.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    /// The type.
    pub block: BlockType,
    /// Smallest and largest level; those of the codebook for types with one.
    low: f32,
    high: f32,
    /// Range of the integer scales; `None` for types with one level.
    scales: Option<(f32, f32)>,
    minimum: Minimum,
}

impl Kind {
    /// Of a type.
    pub fn new(block: BlockType) -> Self {
        let (low, high) = match block.levels() {
            // q8_0 leaves its lowest code alone.
            Levels::Linear { .. } if block == BlockType::Q80 => (-127.0, 127.0),
            Levels::Linear { zero } => {
                let zero = f32::from(zero);
                (-zero, f32::from(block.max_code()) - zero)
            }
            Levels::Codebook(values) => (f32::from(values[0]), f32::from(values[15])),
        };
        let scales = block.sub_scale_range().map(|(low, high)| (f32::from(low), f32::from(high)));
        Self { block, low, high, scales, minimum: block.minimum() }
    }

    /// True when a code stands for an entry of a codebook.
    pub const fn codebook(&self) -> bool {
        matches!(self.block.levels(), Levels::Codebook(_))
    }

    /// True when a minimum is stored.
    pub const fn has_min(&self) -> bool {
        !matches!(self.minimum, Minimum::None)
    }
}

/// Scales of one block per lane; integers as floats, `d` and `dmin` exact as halves.
#[derive(Debug, Clone, Copy)]
pub struct Found<S: Simd> {
    /// Factor of the scales.
    pub d: Lane<S>,
    /// Factor of the minima.
    pub dmin: Lane<S>,
    /// 1 for types with one level.
    pub scales: [Lane<S>; SUBS],
    /// −1 for types that add `dmin`, 0 for types without minima.
    pub mins: [Lane<S>; SUBS],
}

/// The level nearest to `x`.
#[inline(always)]
pub fn level<S: Simd, const CODEBOOK: bool>(kind: &Kind, x: Lane<S>) -> Lane<S> {
    let simd = x.0;
    if CODEBOOK {
        // Each boundary that lies below adds the step across it.
        let mut value = Lane::splat(simd, f32::from(IQ4_VALUES[0]));
        let none = Lane::splat(simd, 0.0);
        for pair in IQ4_VALUES.windows(2) {
            let (a, b) = (f32::from(pair[0]), f32::from(pair[1]));
            let passed = Lane::splat(simd, 0.5 * (a + b)).below(x);
            value = value + passed.select(Lane::splat(simd, b - a), none);
        }
        value
    } else {
        x.max(Lane::splat(simd, kind.low)).min(Lane::splat(simd, kind.high)).round()
    }
}

/// The code of the level nearest to `x`, as a float.
#[inline(always)]
pub fn code<S: Simd, const CODEBOOK: bool>(kind: &Kind, x: Lane<S>) -> Lane<S> {
    let simd = x.0;
    if CODEBOOK {
        let (one, none) = (Lane::splat(simd, 1.0), Lane::splat(simd, 0.0));
        let mut count = none;
        for pair in IQ4_VALUES.windows(2) {
            let between = 0.5 * (f32::from(pair[0]) + f32::from(pair[1]));
            count = count + Lane::splat(simd, between).below(x).select(one, none);
        }
        count
    } else {
        let first = match kind.block.levels() {
            Levels::Linear { zero } => f32::from(zero),
            Levels::Codebook(_) => 0.0,
        };
        level::<S, CODEBOOK>(kind, x) + Lane::splat(simd, first)
    }
}

/// `x` as the nearest half.
#[inline(always)]
fn half<S: Simd>(x: Lane<S>) -> Lane<S> {
    x.each(|v| f16::from_f32(v.clamp(-65504.0, 65504.0)).to_f32())
}

/// `1 / x`, 0 where `x` is 0.
#[inline(always)]
fn inverse<S: Simd>(x: Lane<S>) -> Lane<S> {
    let (zero, one) = (Lane::splat(x.0, 0.0), Lane::splat(x.0, 1.0));
    zero.below(x.abs()).select(one / x, zero)
}

/// Weighted sums of a sub-block's levels and weights.
#[derive(Clone, Copy)]
struct Sums<S: Simd> {
    l: Lane<S>,
    ll: Lane<S>,
    lx: Lane<S>,
}

#[inline(always)]
fn sums<S: Simd, const CODEBOOK: bool>(
    kind: &Kind,
    (x, w): (&[S::f32s], &[S::f32s]),
    inverse: Lane<S>,
    min: Lane<S>,
) -> Sums<S> {
    let simd = inverse.0;
    let zero = Lane::splat(simd, 0.0);
    let mut sums = Sums { l: zero, ll: zero, lx: zero };
    let offset = min * inverse;
    for (&x, &w) in x.iter().zip(w) {
        let (x, w) = (Lane(simd, x), Lane(simd, w));
        let l = level::<S, CODEBOOK>(kind, x.mul_add(inverse, offset));
        let wl = w * l;
        sums.l = sums.l + wl;
        sums.ll = wl.mul_add(l, sums.ll);
        sums.lx = wl.mul_add(x, sums.lx);
    }
    sums
}

/// Scale and subtracted minimum of one sub-block with its weighted error.
#[derive(Clone, Copy)]
struct Fit<S: Simd> {
    scale: Lane<S>,
    min: Lane<S>,
    error: Lane<S>,
    ll: Lane<S>,
}

/// Weighted sums of a sub-block's weights.
#[derive(Clone, Copy)]
struct Moments<S: Simd> {
    w: Lane<S>,
    x: Lane<S>,
    xx: Lane<S>,
}

impl<S: Simd> Moments<S> {
    #[inline(always)]
    fn new(simd: S, x: &[S::f32s], w: &[S::f32s]) -> Self {
        let zero = Lane::splat(simd, 0.0);
        let mut moments = Self { w: zero, x: zero, xx: zero };
        for (&x, &w) in x.iter().zip(w) {
            let (x, w) = (Lane(simd, x), Lane(simd, w));
            let wx = w * x;
            moments.w = moments.w + w;
            moments.x = moments.x + wx;
            moments.xx = wx.mul_add(x, moments.xx);
        }
        moments
    }

    /// The least-squares line through the codes; no error where there is none.
    #[inline(always)]
    fn line<const MIN: bool>(&self, kind: &Kind, sums: Sums<S>) -> Fit<S> {
        let simd = sums.l.0;
        let zero = Lane::splat(simd, 0.0);
        let infinite = Lane::splat(simd, f32::INFINITY);
        let alone = sums.lx * inverse(sums.ll);
        if !MIN {
            let error = self.xx - alone * sums.lx;
            let error = zero.below(sums.ll).select(error, infinite);
            return Fit { scale: alone, min: zero, error, ll: sums.ll };
        }
        let determinant = self.w * sums.ll - sums.l * sums.l;
        // Rounding leaves a determinant of equal codes near zero, not at it.
        let floor = self.w * sums.ll * Lane::splat(simd, 1e-5);
        let over = inverse(determinant);
        let mut scale = (self.w * sums.lx - self.x * sums.l) * over;
        let mut min = (sums.l * sums.lx - sums.ll * self.x) * over;
        if !matches!(kind.minimum, Minimum::Added) {
            let above = min.below(zero);
            scale = above.select(alone, scale);
            min = above.select(zero, min);
        }
        let error = self.xx - scale * sums.lx + min * self.x;
        // Equal codes are a slope alone.
        let good = floor.below(determinant);
        Fit {
            scale: good.select(scale, alone),
            min: good.select(min, zero),
            error: good.select(error, self.xx - alone * sums.lx),
            ll: sums.ll,
        }
    }
}

#[inline(always)]
fn better<S: Simd>(a: Fit<S>, b: Fit<S>) -> Fit<S> {
    let choice = b.error.below(a.error);
    Fit {
        scale: choice.select(b.scale, a.scale),
        min: choice.select(b.min, a.min),
        error: choice.select(b.error, a.error),
        ll: choice.select(b.ll, a.ll),
    }
}

/// Takes the line through the codes of a scale and a minimum where it is better.
#[inline(always)]
fn try_one<S: Simd, const MIN: bool, const CODEBOOK: bool>(
    kind: &Kind,
    xw: (&[S::f32s], &[S::f32s]),
    moments: &Moments<S>,
    best: &mut Fit<S>,
    inverse: Lane<S>,
    min: Lane<S>,
) {
    let sums = sums::<S, CODEBOOK>(kind, xw, inverse, min);
    *best = better(*best, moments.line::<MIN>(kind, sums));
}

/// One sub-block alone.
#[inline(always)]
fn fit<S: Simd, const MIN: bool, const CODEBOOK: bool>(
    kind: &Kind,
    x: &[S::f32s],
    w: &[S::f32s],
    moments: &Moments<S>,
) -> Fit<S> {
    let simd = moments.w.0;
    let zero = Lane::splat(simd, 0.0);
    let (mut low, mut high) = (zero, zero);
    if matches!(kind.minimum, Minimum::Added) {
        (low, high) = (Lane(simd, x[0]), Lane(simd, x[0]));
    }
    for &x in x {
        low = low.min(Lane(simd, x));
        high = high.max(Lane(simd, x));
    }
    let mut best = Fit { scale: zero, min: zero, error: moments.xx, ll: zero };
    if MIN {
        // Constant weights: their minimum alone.
        let constant = Fit {
            min: -low,
            error: moments.xx - low * (moments.x + moments.x - low * moments.w),
            ..best
        };
        best = better(best, constant);
        let over = inverse(high - low);
        let steps = if kind.high < 8.0 { 24 } else { 16 };
        for step in 0..steps {
            let stretch = kind.high - 0.95 + 1.6 / (steps - 1) as f32 * step as f32;
            try_one::<S, MIN, CODEBOOK>(
                kind,
                (x, w),
                moments,
                &mut best,
                Lane::splat(simd, stretch) * over,
                -low,
            );
        }
    } else {
        let extreme = high.below(-low).select(low, high);
        let live = Lane::splat(simd, TINY).below(extreme.abs());
        let over = live.select(inverse(extreme), zero);
        // The weight largest in size lies near the end that reaches further, or near the other.
        let (wide, narrow) = (kind.low, kind.high);
        let unit = -wide / 32.0 * if CODEBOOK { 2.0 } else { 1.0 };
        let unit = unit.max(0.11);
        for step in -8i8..=7 {
            try_one::<S, MIN, CODEBOOK>(
                kind,
                (x, w),
                moments,
                &mut best,
                Lane::splat(simd, unit.mul_add(f32::from(step), wide)) * over,
                zero,
            );
        }
        for step in -5i8..=5 {
            try_one::<S, MIN, CODEBOOK>(
                kind,
                (x, w),
                moments,
                &mut best,
                Lane::splat(simd, unit.mul_add(f32::from(step), narrow)) * over,
                zero,
            );
        }
    }
    for _ in 0..ALTERNATIONS {
        let (scale, min) = (inverse(best.scale), best.min);
        try_one::<S, MIN, CODEBOOK>(kind, (x, w), moments, &mut best, scale, min);
    }
    best
}

/// A factor for which `values` are nearly integers of `range`, weighed.
#[inline(always)]
fn factor<S: Simd>(values: &[Lane<S>], weights: &[Lane<S>], (low, high): (f32, f32)) -> Lane<S> {
    let simd = values[0].0;
    let zero = Lane::splat(simd, 0.0);
    let mut extreme = zero;
    for &v in values {
        extreme = extreme.abs().below(v.abs()).select(v, extreme);
    }
    let over = Lane::splat(simd, TINY).below(extreme.abs()).select(inverse(extreme), zero);
    let end = if low < 0.0 { low } else { high };
    let (mut best, mut d) = (zero, zero);
    // Down to three quarters of the range.
    let unit = end.abs() / 48.0;
    for step in -2i8..=12 {
        let inverse_d = Lane::splat(simd, end - end.signum() * unit * f32::from(step)) * over;
        let (mut vl, mut ll) = (zero, zero);
        for (&v, &w) in values.iter().zip(weights) {
            let l =
                (v * inverse_d).round().max(Lane::splat(simd, low)).min(Lane::splat(simd, high));
            let wl = w * l;
            vl = wl.mul_add(v, vl);
            ll = wl.mul_add(l, ll);
        }
        let gain = vl * vl * inverse(ll);
        let choice = best.below(gain);
        best = choice.select(gain, best);
        d = choice.select(vl * inverse(ll), d);
    }
    half(d)
}

/// `x` within a range.
#[inline(always)]
fn clamp<S: Simd>(x: Lane<S>, (low, high): (f32, f32)) -> Lane<S> {
    x.max(Lane::splat(x.0, low)).min(Lane::splat(x.0, high))
}

/// Exact weighted error of a sub-block on a scale and a minimum.
#[inline(always)]
fn error<S: Simd, const MIN: bool, const CODEBOOK: bool>(
    kind: &Kind,
    (x, w): (&[S::f32s], &[S::f32s]),
    scale: Lane<S>,
    min: Lane<S>,
) -> Lane<S> {
    let simd = scale.0;
    let over = inverse(scale);
    let offset = min * over;
    let mut sum = Lane::splat(simd, 0.0);
    for (&x, &w) in x.iter().zip(w) {
        let (x, w) = (Lane(simd, x), Lane(simd, w));
        let (l, e);
        if MIN {
            l = level::<S, CODEBOOK>(kind, x.mul_add(over, offset));
            e = l.mul_add(scale, -(x + min));
        } else {
            l = level::<S, CODEBOOK>(kind, x * over);
            e = l.mul_add(scale, -x);
        }
        sum = (w * e).mul_add(e, sum);
    }
    sum
}

/// Chooses the scales of a block per lane: `x` and `w` are its weights and their importance, column by column.
#[inline(always)]
pub fn search<S: Simd, const MIN: bool, const CODEBOOK: bool>(
    simd: S,
    kind: &Kind,
    x: &[S::f32s],
    w: &[S::f32s],
) -> Found<S> {
    let zero = Lane::splat(simd, 0.0);
    let (size, subs) = (kind.block.sub_size(), kind.block.subs());
    let mut found =
        Found { d: zero, dmin: zero, scales: [Lane::splat(simd, 1.0); SUBS], mins: [zero; SUBS] };
    let mut fits = [Fit { scale: zero, min: zero, error: zero, ll: zero }; SUBS];
    let mut moments = [Moments { w: zero, x: zero, xx: zero }; SUBS];
    for j in 0..subs {
        let span = j * size..(j + 1) * size;
        let (x, w) = (&x[span.clone()], &w[span]);
        moments[j] = Moments::new(simd, x, w);
        fits[j] = fit::<S, MIN, CODEBOOK>(kind, x, w, &moments[j]);
    }
    let Some(range) = kind.scales else {
        found.d = half(fits[0].scale);
        if MIN {
            // The best minimum for the scale as it is stored.
            let sums = sums::<S, CODEBOOK>(kind, (x, w), inverse(found.d), fits[0].min);
            let min = (found.d * sums.l - moments[0].x) * inverse(moments[0].w);
            found.dmin = half(-min);
            found.mins = [Lane::splat(simd, -1.0); SUBS];
        }
        return found;
    };
    let mut values = [zero; SUBS];
    let mut weights = [zero; SUBS];
    for j in 0..subs {
        (values[j], weights[j]) = (fits[j].scale, fits[j].ll);
    }
    found.d = factor(&values[..subs], &weights[..subs], range);
    let top = match kind.minimum {
        Minimum::Subtracted { max } => f32::from(max),
        _ => 0.0,
    };
    if MIN {
        for j in 0..subs {
            (values[j], weights[j]) = (fits[j].min, moments[j].w);
        }
        found.dmin = factor(&values[..subs], &weights[..subs], (0.0, top));
    }
    let (over, over_min) = (inverse(found.d), inverse(found.dmin));
    for (j, fit) in fits.iter().enumerate().take(subs) {
        found.scales[j] = clamp(fit.scale * over, range).round();
        found.mins[j] = clamp(fit.min * over_min, (0.0, top)).round();
    }
    let mut best = found;
    let mut least = Lane::splat(simd, f32::INFINITY);
    for round in 0..=ROUNDS {
        let mut total = zero;
        let (mut a11, mut a12, mut a22, mut b1, mut b2) = (zero, zero, zero, zero, zero);
        for j in 0..subs {
            let span = j * size..(j + 1) * size;
            let xw = (&x[span.clone()], &w[span]);
            let (scale, min) = (found.scales[j], found.mins[j]);
            let mut lowest = Lane::splat(simd, f32::INFINITY);
            let around: &[f32] = if round < ROUNDS { &[0.0, -1.0, 1.0] } else { &[0.0] };
            let beside: &[f32] = if MIN { around } else { &[0.0] };
            for &a in around {
                let s = clamp(scale + Lane::splat(simd, a), range);
                for &b in beside {
                    let m = clamp(min + Lane::splat(simd, b), (0.0, top));
                    let e = error::<S, MIN, CODEBOOK>(kind, xw, found.d * s, found.dmin * m);
                    let choice = e.below(lowest);
                    lowest = choice.select(e, lowest);
                    found.scales[j] = choice.select(s, found.scales[j]);
                    found.mins[j] = choice.select(m, found.mins[j]);
                }
            }
            total = total + lowest;
            let (s, m) = (found.scales[j], found.mins[j]);
            let sums = sums::<S, CODEBOOK>(kind, xw, inverse(found.d * s), found.dmin * m);
            a11 = (s * s).mul_add(sums.ll, a11);
            a12 = a12 - s * m * sums.l;
            a22 = (m * m).mul_add(moments[j].w, a22);
            b1 = s.mul_add(sums.lx, b1);
            b2 = b2 - m * moments[j].x;
        }
        let choice = total.below(least);
        least = choice.select(total, least);
        best.d = choice.select(found.d, best.d);
        best.dmin = choice.select(found.dmin, best.dmin);
        for j in 0..subs {
            best.scales[j] = choice.select(found.scales[j], best.scales[j]);
            best.mins[j] = choice.select(found.mins[j], best.mins[j]);
        }
        if round == ROUNDS {
            break;
        }
        let alone = b1 * inverse(a11);
        let (mut d, mut dmin) = (alone, zero);
        if MIN {
            let determinant = a11 * a22 - a12 * a12;
            let good = (a11 * a22 * Lane::splat(simd, 1e-5)).below(determinant);
            let over = inverse(determinant);
            d = good.select((b1 * a22 - b2 * a12) * over, alone);
            dmin = good.select((b2 * a11 - b1 * a12) * over, found.dmin);
            let negative = dmin.below(zero);
            d = negative.select(found.d, d);
            dmin = negative.select(found.dmin, dmin);
        }
        found = best;
        found.d = half(d);
        found.dmin = half(dmin);
    }
    best
}
