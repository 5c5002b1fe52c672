//! Learning rates over a run: linear warm-up, then what is left falls along a line or half a cosine (Loshchilov and
//! Hutter 2016, arXiv:1608.03983, one period), or stays.

use std::f64::consts::PI;

use serde::Deserialize;

/// What follows the warm-up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// The rate stays.
    Constant,
    /// It falls along a line.
    Linear,
    /// It falls along half a cosine.
    #[default]
    Cosine,
}

/// The fraction of the learning rate at each step of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// Steps of the run.
    pub steps: usize,
    /// Steps of the warm-up.
    pub warmup: usize,
    /// What follows it.
    pub decay: Decay,
    /// What the rate falls to, as a fraction.
    pub floor: f64,
}

impl Schedule {
    /// The fraction at `step`, counted from zero. The last step of the warm-up is the first at the full rate; the
    /// floor would be reached one step after the last.
    pub fn factor(&self, step: usize) -> f32 {
        if step < self.warmup {
            return ((step + 1) as f64 / self.warmup as f64) as f32;
        }
        let left = self.steps.saturating_sub(self.warmup).max(1);
        let progress = ((step - self.warmup) as f64 / left as f64).min(1.0);
        let falls = match self.decay {
            Decay::Constant => return 1.0,
            Decay::Linear => 1.0 - progress,
            Decay::Cosine => 0.5 * (1.0 + (PI * progress).cos()),
        };
        (self.floor + (1.0 - self.floor) * falls) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_rise_and_fall_as_they_should() {
        let of = |decay| Schedule { steps: 110, warmup: 10, decay, floor: 0.1 };
        for decay in [Decay::Constant, Decay::Linear, Decay::Cosine] {
            let schedule = of(decay);
            assert!((schedule.factor(0) - 0.1).abs() < 1e-6);
            assert!((schedule.factor(9) - 1.0).abs() < 1e-6);
            assert!((schedule.factor(10) - 1.0).abs() < 1e-6);
            let rates: Vec<f32> = (10..110).map(|step| schedule.factor(step)).collect();
            assert!(rates.windows(2).all(|pair| pair[1] <= pair[0]), "{decay:?}");
        }
        assert!((of(Decay::Linear).factor(60) - 0.55).abs() < 1e-6);
        assert!((of(Decay::Cosine).factor(60) - 0.55).abs() < 1e-6);
        assert!((of(Decay::Cosine).factor(35) - (0.1 + 0.9 * 0.853_553_4)).abs() < 1e-5);
        assert!((of(Decay::Constant).factor(109) - 1.0).abs() < 1e-6);
        // Beyond its end and without any step it stays within its bounds.
        assert!((of(Decay::Linear).factor(500) - 0.1).abs() < 1e-6);
        let none = Schedule { steps: 0, warmup: 0, decay: Decay::Cosine, floor: 0.0 };
        assert!((none.factor(0) - 1.0).abs() < 1e-6);
    }
}
