//! In which order windows are trained on: each epoch a permutation of all (Fisher and Yates) that depends on seed
//! and epoch alone, so that a run can be taken up at any step.

use attar_tensor::rng::Rng;

/// Batches of windows.
#[derive(Debug, Clone)]
pub struct Order {
    windows: usize,
    batch: usize,
    seed: u64,
    /// The epoch whose permutation is at hand.
    epoch: Option<usize>,
    permutation: Vec<usize>,
}

impl Order {
    /// Batches of `batch` out of `windows`.
    ///
    /// # Panics
    /// When either is zero.
    pub fn new(windows: usize, batch: usize, seed: u64) -> Self {
        assert!(windows > 0 && batch > 0, "there are windows, and batches hold some");
        Self { windows, batch: batch.min(windows), seed, epoch: None, permutation: Vec::new() }
    }

    /// Steps in which every window is seen once; the last batch of an epoch goes on with the next.
    pub const fn steps_of(&self, epochs: usize) -> usize {
        (epochs * self.windows).div_ceil(self.batch)
    }

    /// The windows of step `step`, counted from zero.
    pub fn batch(&mut self, step: usize) -> Vec<usize> {
        let first = step * self.batch;
        (first..first + self.batch).map(|at| self.window(at)).collect()
    }

    /// The window at place `at` of all epochs in a row.
    fn window(&mut self, at: usize) -> usize {
        let epoch = at / self.windows;
        if self.epoch != Some(epoch) {
            let mut rng =
                Rng::new(self.seed ^ (epoch as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            self.permutation = (0..self.windows).collect();
            for last in (1..self.windows).rev() {
                self.permutation.swap(last, rng.below(last + 1));
            }
            self.epoch = Some(epoch);
        }
        self.permutation[at % self.windows]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_sees_every_window_once_and_any_step_can_come_first() {
        let mut order = Order::new(10, 4, 7);
        let steps = order.steps_of(2);
        assert_eq!(steps, 5);
        let batches: Vec<Vec<usize>> = (0..steps).map(|step| order.batch(step)).collect();
        let flat: Vec<usize> = batches.concat();
        for epoch in flat.chunks(10) {
            let mut seen = epoch.to_vec();
            seen.sort_unstable();
            assert_eq!(seen, (0..10).collect::<Vec<_>>());
        }
        assert_ne!(flat[..10], flat[10..]);
        let mut late = Order::new(10, 4, 7);
        assert_eq!(late.batch(3), batches[3]);
        assert_eq!(late.batch(1), batches[1]);
        assert_ne!(Order::new(10, 4, 8).batch(0), batches[0]);
        assert_eq!(Order::new(2, 8, 0).batch(0).len(), 2);
    }
}
