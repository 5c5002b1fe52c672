//! A float linear in training, by AdamW. Rates are relative to the root mean square of the weights, which differs from
//! model to model. Weights that were pruned have no derivative and stay zero.

use attar_tensor::{Mat, linalg::squares};

use crate::{AdamW, Moments};

/// One linear in training.
#[derive(Debug)]
pub(crate) struct DenseLinear {
    moments: Moments,
    /// Root mean square of the weights at the start.
    size: f32,
    pruned: Option<Vec<bool>>,
}

impl DenseLinear {
    /// Begins at `weight`; with `masked` its zeros stay.
    pub(crate) fn new(weight: &Mat, masked: bool) -> Self {
        let count = weight.len().max(1) as f64;
        Self {
            moments: Moments::new(weight.len()),
            size: (squares(weight) / count).sqrt() as f32,
            pruned: masked.then(|| weight.iter().map(|&w| w == 0.0).collect()),
        }
    }

    /// Bytes for `weights` weights.
    pub(crate) const fn bytes(weights: usize) -> usize {
        Moments::bytes(weights) + weights
    }

    /// One step; `t` counts from one. `gradient` is used up.
    pub(crate) fn step(&mut self, t: usize, rate: f32, weight: &mut Mat, gradient: &mut Mat) {
        let weight = weight.as_slice_mut().expect("standard layout");
        let gradient = gradient.as_slice_mut().expect("standard layout");
        if let Some(pruned) = &self.pruned {
            for (d, _) in gradient.iter_mut().zip(pruned).filter(|(_, pruned)| **pruned) {
                *d = 0.0;
            }
        }
        let adam = AdamW { beta2: 0.99, ..AdamW::default() };
        adam.step(t, rate * self.size, &mut self.moments, weight, gradient);
    }
}
