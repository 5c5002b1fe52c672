//! Scale and zero-point search of one group, and the projection of scales onto a layout's grid.
//!
//! Min-max, symmetric: `scale = 2·max|w| / (2^b − 1)`, zero `2^(b−1)`; asymmetric:
//! `scale = (max − min) / (2^b − 1)` with the range widened to hold 0. The search shrinks the range by
//! factors and keeps the one with the least `Σ_i h_i (w_i − ŵ_i)²`.

use crate::{QuantScheme, linalg::vectorize};

/// Scale and zero point of one group.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GroupGrid {
    /// On the scheme's scale grid.
    pub scale: f32,
    /// Code that means zero.
    pub zero: u16,
}

/// How the range of a group is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clip {
    /// The whole range.
    MinMax,
    /// The shrunken range with the least weighted squared error, over this many steps of 2 %.
    Search(u32),
}

impl GroupGrid {
    /// Code nearest to `w` (ties to even).
    #[inline(always)]
    pub fn code(self, w: f32, max_code: f32) -> f32 {
        (w / self.scale + f32::from(self.zero)).round_ties_even().clamp(0.0, max_code)
    }

    /// Value of a code.
    #[inline(always)]
    pub fn value(self, code: f32) -> f32 {
        (code - f32::from(self.zero)) * self.scale
    }
}

#[inline(always)]
fn error(
    w: &[f32],
    importance: Option<&[f32]>,
    inverse: f32,
    scale: f32,
    zero: f32,
    top: f32,
) -> f32 {
    const LANES: usize = 16;
    let mut lanes = [0.0f32; LANES];
    let (low, high) = (-zero, top - zero);
    let one = |w: f32| {
        let d = (w * inverse).round_ties_even().clamp(low, high) * scale - w;
        d * d
    };
    let mut chunks = w.chunks_exact(LANES);
    let mut tail = 0.0;
    if let Some(h) = importance {
        let mut weights = h.chunks_exact(LANES);
        for (w, h) in chunks.by_ref().zip(weights.by_ref()) {
            for i in 0..LANES {
                lanes[i] += h[i] * one(w[i]);
            }
        }
        for (&w, &h) in chunks.remainder().iter().zip(weights.remainder()) {
            tail += h * one(w);
        }
    } else {
        for w in chunks.by_ref() {
            for i in 0..LANES {
                lanes[i] += one(w[i]);
            }
        }
        for &w in chunks.remainder() {
            tail += one(w);
        }
    }
    lanes.iter().sum::<f32>() + tail
}

/// Smallest and largest of the weights and 0, in lanes.
#[inline(always)]
fn range(w: &[f32]) -> (f32, f32) {
    const LANES: usize = 32;
    let (mut low, mut high) = ([0.0f32; LANES], [0.0f32; LANES]);
    let (whole, tail) = w.as_chunks::<LANES>();
    // Comparisons instead of `f32::min`, which spends instructions on NaN; weights were checked.
    for w in whole {
        for l in 0..LANES {
            low[l] = if w[l] < low[l] { w[l] } else { low[l] };
            high[l] = if w[l] > high[l] { w[l] } else { high[l] };
        }
    }
    for (l, &w) in tail.iter().enumerate() {
        low[l] = low[l].min(w);
        high[l] = high[l].max(w);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            low[l] = if low[l + width] < low[l] { low[l + width] } else { low[l] };
            high[l] = if high[l + width] > high[l] { high[l + width] } else { high[l] };
        }
        width /= 2;
    }
    (low[0], high[0])
}

/// The grid of a range `low..=high` that holds 0.
fn grid_of(low: f32, high: f32, scheme: QuantScheme) -> GroupGrid {
    let top = f32::from(scheme.max_code());
    if scheme.symmetric {
        let scale = scheme.scale_grid.project(2.0 * high.max(-low) / top);
        GroupGrid { scale, zero: u16::from(scheme.mid_code()) }
    } else {
        let scale = scheme.scale_grid.project((high - low) / top);
        let zero = (-low / scale).round_ties_even().clamp(f32::from(scheme.zero_min), top);
        GroupGrid { scale, zero: zero as u16 }
    }
}

/// Chooses the grid of one group. Inlined, so that a caller under [`vectorize`] needs no second dispatch.
///
/// `importance` weighs the columns (e.g. the diagonal of a Hessian).
#[inline(always)]
pub fn choose_grid(
    w: &[f32],
    importance: Option<&[f32]>,
    scheme: QuantScheme,
    clip: Clip,
) -> GroupGrid {
    let (low, high) = range(w);
    let full = grid_of(low, high, scheme);
    let Clip::Search(steps) = clip else { return full };
    if low >= high {
        return full;
    }
    let top = f32::from(scheme.max_code());
    vectorize(
        #[inline(always)]
        || {
            let cost = |grid: GroupGrid| {
                let zero = f32::from(grid.zero);
                error(w, importance, 1.0 / grid.scale, grid.scale, zero, top)
            };
            let (mut best, mut least) = (full, cost(full));
            for step in 0..steps {
                // A symmetric range may grow too: -8..7 reaches further below zero than above.
                let shrink = 1.07 - 0.02 * step as f32;
                let grid = grid_of(low * shrink, high * shrink, scheme);
                let found = cost(grid);
                if found < least {
                    (best, least) = (grid, found);
                }
            }
            best
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Granularity, ScaleGrid, rng::Rng};

    fn scheme(bits: u8, symmetric: bool) -> QuantScheme {
        QuantScheme {
            bits,
            granularity: Granularity::Group(64),
            symmetric,
            scale_grid: ScaleGrid::F16,
            zero_min: 1,
            activations: crate::ActivationScheme::Float,
        }
    }

    fn loss(w: &[f32], grid: GroupGrid, top: f32) -> f64 {
        w.iter().map(|&v| f64::from(grid.value(grid.code(v, top)) - v).powi(2)).sum()
    }

    #[test]
    fn search_is_never_worse_than_min_max_and_bits_help() {
        let mut rng = Rng::new(9);
        for symmetric in [true, false] {
            let mut before = f64::INFINITY;
            for bits in [2u8, 3, 4, 8] {
                let mut total = 0.0;
                for _ in 0..20 {
                    let w = rng.normals(64);
                    let s = scheme(bits, symmetric);
                    let top = f32::from(s.max_code());
                    let plain = loss(&w, choose_grid(&w, None, s, Clip::MinMax), top);
                    let grid = choose_grid(&w, None, s, Clip::Search(35));
                    let searched = loss(&w, grid, top);
                    assert!(searched <= plain * 1.0001);
                    assert!(grid.zero >= 1 && f32::from(grid.zero) <= top);
                    assert_eq!(grid.scale.to_bits(), s.scale_grid.project(grid.scale).to_bits());
                    total += searched;
                }
                assert!(total < before);
                before = total;
            }
        }
    }
}
