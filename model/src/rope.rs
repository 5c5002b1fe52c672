//! Rotary position embedding (Su et al. 2021, arXiv:2104.09864), halves convention: channel `i` of the
//! first half turns with channel `i + d/2`. Tables `[positions, d/2]` of cosines and sines, f32.

use std::f64::consts::TAU;

use crate::spec::{RopeKind, RopeSpec};

/// Cosines and sines for the first positions.
#[derive(Debug, Clone)]
pub(crate) struct RopeTable {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

fn frequencies(spec: RopeSpec, head_dim: usize) -> (Vec<f64>, f64) {
    let half = head_dim / 2;
    let base: Vec<f64> =
        (0..half).map(|i| spec.theta.powf(-2.0 * i as f64 / head_dim as f64)).collect();
    match spec.kind {
        RopeKind::Default => (base, 1.0),
        RopeKind::Linear { factor } => (base.iter().map(|f| f / factor).collect(), 1.0),
        RopeKind::Llama3 { factor, low, high, original } => {
            let scaled = base
                .iter()
                .map(|&f| {
                    let wavelength = TAU / f;
                    if wavelength < original / high {
                        f
                    } else if wavelength > original / low {
                        f / factor
                    } else {
                        let smooth = (original / wavelength - low) / (high - low);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                })
                .collect();
            (scaled, 1.0)
        }
        RopeKind::Yarn { factor, beta_fast, beta_slow, original, attention_factor, truncate } => {
            let d = head_dim as f64;
            let dimension =
                |turns: f64| d * (original / (turns * TAU)).ln() / (2.0 * spec.theta.ln());
            let (mut low, mut high) = (dimension(beta_fast), dimension(beta_slow));
            if truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            (low, high) = (low.max(0.0), high.min(d - 1.0));
            if (high - low).abs() < 1e-12 {
                high += 0.001;
            }
            let scaled = base
                .iter()
                .enumerate()
                .map(|(i, &f)| {
                    let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    f / factor * ramp + f * (1.0 - ramp)
                })
                .collect();
            (scaled, attention_factor)
        }
    }
}

impl RopeTable {
    /// Tables for positions `0..positions`.
    pub(crate) fn new(spec: RopeSpec, head_dim: usize, positions: usize) -> Self {
        let (frequencies, factor) = frequencies(spec, head_dim);
        let half = head_dim / 2;
        let (mut cos, mut sin) =
            (Vec::with_capacity(positions * half), Vec::with_capacity(positions * half));
        for position in 0..positions {
            for &frequency in &frequencies {
                // The reference rounds the frequency to f32 and multiplies in f32.
                let angle = f64::from(position as f32 * frequency as f32);
                cos.push((angle.cos() * factor) as f32);
                sin.push((angle.sin() * factor) as f32);
            }
        }
        Self { half, cos, sin }
    }

    /// Number of positions.
    pub(crate) fn positions(&self) -> usize {
        self.cos.len() / self.half.max(1)
    }

    /// Turns one head `[head_dim]` at `position` in place.
    pub(crate) fn rotate(&self, head: &mut [f32], position: usize) {
        let at = position * self.half;
        let (first, second) = head.split_at_mut(self.half);
        for i in 0..self.half {
            let (c, s) = (self.cos[at + i], self.sin[at + i]);
            let (a, b) = (first[i], second[i]);
            first[i] = a * c - b * s;
            second[i] = b * c + a * s;
        }
    }

    /// Backward of [`RopeTable::rotate`]: a gradient on what it put out, turned back, in place.
    pub(crate) fn rotate_back(&self, head: &mut [f32], position: usize) {
        let at = position * self.half;
        let (first, second) = head.split_at_mut(self.half);
        for i in 0..self.half {
            let (c, s) = (self.cos[at + i], self.sin[at + i]);
            let (a, b) = (first[i], second[i]);
            first[i] = a * c + b * s;
            second[i] = b * c - a * s;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_depend_on_the_distance_alone_and_lengths_are_kept() {
        let table = RopeTable::new(RopeSpec { theta: 1e4, kind: RopeKind::Default }, 8, 64);
        let (q, k): (Vec<f32>, Vec<f32>) =
            (0..8).map(|i| ((i as f32).sin(), (i as f32 * 1.7).cos())).unzip();
        let turned = |x: &[f32], at| {
            let mut x = x.to_vec();
            table.rotate(&mut x, at);
            x
        };
        let dot = |a: &[f32], b: &[f32]| -> f32 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
        let near = dot(&turned(&q, 9), &turned(&k, 4));
        assert!((near - dot(&turned(&q, 59), &turned(&k, 54))).abs() < 1e-5);
        assert!((near - dot(&turned(&q, 9), &turned(&k, 5))).abs() > 1e-3);
        assert!((dot(&turned(&q, 31), &turned(&q, 31)) - dot(&q, &q)).abs() < 1e-5);
        assert_eq!(turned(&q, 0), q);
    }

    #[test]
    fn scalings_keep_high_frequencies_and_divide_low_ones() {
        let of = |kind| frequencies(RopeSpec { theta: 1e4, kind }, 64).0;
        let base = of(RopeKind::Default);
        let (factor, original) = (4.0, 1024.0);
        let llama = of(RopeKind::Llama3 { factor, low: 1.0, high: 4.0, original });
        let yarn = of(RopeKind::Yarn {
            factor,
            beta_fast: 32.0,
            beta_slow: 1.0,
            original,
            attention_factor: 1.0,
            truncate: true,
        });
        for (scaled, base) in of(RopeKind::Linear { factor }).iter().zip(&base) {
            assert!((scaled * factor - base).abs() < 1e-12);
        }
        for scaled in [llama, yarn] {
            assert!((scaled[0] - base[0]).abs() < 1e-12);
            assert!((scaled[31] * factor - base[31]).abs() < 1e-12);
            for (scaled, base) in scaled.iter().zip(&base) {
                assert!(*scaled <= base * 1.000_001 && scaled * factor >= base * 0.999_999);
            }
        }
    }
}
