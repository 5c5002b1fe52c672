//! AdamW: Adam with decoupled weight decay (Loshchilov and Hutter 2017, arXiv:1711.05101, Alg. 2).
//!
//! `m ← β₁ m + (1 − β₁) g`, `v ← β₂ v + (1 − β₂) g²`,
//! `w ← w − η (m / (1 − β₁ᵗ) / (√(v / (1 − β₂ᵗ)) + ε) + λ w)`. All f32, the corrections of the bias in f64.
//! Element by element, so that the bits do not depend on how the work is cut.

use attar_tensor::linalg::vectorize;
use rayon::prelude::*;

/// Elements of one task.
const CHUNK: usize = 1 << 14;

/// The constants of the method; the learning rate comes with each step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Decay of the mean, β₁.
    pub beta1: f32,
    /// Decay of the mean square, β₂.
    pub beta2: f32,
    /// ε.
    pub epsilon: f32,
    /// Decoupled weight decay, λ.
    pub decay: f32,
}

impl Default for AdamW {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, decay: 0.0 }
    }
}

/// Running means of one tensor's gradient.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    /// Of the gradient.
    pub first: Vec<f32>,
    /// Of its square.
    pub second: Vec<f32>,
}

impl Moments {
    /// Zeros for `length` weights.
    pub fn new(length: usize) -> Self {
        Self { first: vec![0.0; length], second: vec![0.0; length] }
    }

    /// Bytes for `length` weights.
    pub const fn bytes(length: usize) -> usize {
        8 * length
    }
}

impl AdamW {
    /// Step `t` (the first is 1) at learning rate `rate`.
    ///
    /// # Panics
    /// When the lengths differ, or at step zero.
    pub fn step(
        &self,
        t: usize,
        rate: f32,
        moments: &mut Moments,
        weights: &mut [f32],
        gradient: &[f32],
    ) {
        assert!(t > 0, "steps are counted from one");
        assert_eq!(weights.len(), gradient.len(), "one derivative per weight");
        assert_eq!(weights.len(), moments.first.len(), "one moment per weight");
        let correction = |beta: f32| 1.0 - f64::from(beta).powf(t as f64);
        let (beta1, beta2) = (self.beta1, self.beta2);
        let scale = (f64::from(rate) / correction(beta1)) as f32;
        let root = (1.0 / correction(beta2).sqrt()) as f32;
        let (keep, epsilon) = (1.0 - rate * self.decay, self.epsilon);
        let moments = moments.first.par_chunks_mut(CHUNK).zip(moments.second.par_chunks_mut(CHUNK));
        let tensors = weights.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK));
        moments.zip(tensors).for_each(|((m, v), (w, g))| {
            vectorize(
                #[inline(always)]
                || {
                    for (((m, v), w), &g) in m.iter_mut().zip(v.iter_mut()).zip(w.iter_mut()).zip(g)
                    {
                        *m = beta1 * *m + (1.0 - beta1) * g;
                        *v = beta2 * *v + (1.0 - beta2) * g * g;
                        *w = keep * *w - scale * *m / (v.sqrt() * root + epsilon);
                    }
                },
            );
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use attar_tensor::rng::Rng;

    /// The paper's lines in f64.
    fn reference(of: AdamW, rate: f64, start: &[f32], gradients: &[Vec<f32>]) -> Vec<f64> {
        let (b1, b2) = (f64::from(of.beta1), f64::from(of.beta2));
        let n = start.len();
        let (mut m, mut v) = (vec![0.0; n], vec![0.0; n]);
        let mut w: Vec<f64> = start.iter().map(|&w| f64::from(w)).collect();
        for (t, gradient) in gradients.iter().enumerate() {
            let power = t as i32 + 1;
            for i in 0..n {
                let g = f64::from(gradient[i]);
                m[i] = b1 * m[i] + (1.0 - b1) * g;
                v[i] = b2 * v[i] + (1.0 - b2) * g * g;
                let mean: f64 = m[i] / (1.0 - b1.powi(power));
                let square: f64 = v[i] / (1.0 - b2.powi(power));
                let step = mean / (square.sqrt() + f64::from(of.epsilon));
                w[i] -= rate * (step + f64::from(of.decay) * w[i]);
            }
        }
        w
    }

    #[test]
    fn steps_are_those_of_the_paper() {
        let mut rng = Rng::new(3);
        let n = 2 * CHUNK + 37;
        let start = rng.normals(n);
        let gradients: Vec<Vec<f32>> = (0..5).map(|_| rng.normals(n)).collect();
        for decay in [0.0, 0.1] {
            let of = AdamW { decay, ..AdamW::default() };
            let wanted = reference(of, 1e-2, &start, &gradients);
            let (mut w, mut moments) = (start.clone(), Moments::new(n));
            for (t, gradient) in gradients.iter().enumerate() {
                of.step(t + 1, 1e-2, &mut moments, &mut w, gradient);
            }
            for (w, wanted) in w.iter().zip(&wanted) {
                assert!((f64::from(*w) - wanted).abs() < 3e-6, "{w} {wanted}");
            }
        }
    }

    #[test]
    fn a_parabola_is_descended_and_decay_alone_shrinks() {
        let of = AdamW::default();
        let (mut w, mut moments) = (vec![3.0f32, -2.0], Moments::new(2));
        for t in 1..=400 {
            let gradient = [2.0 * (w[0] - 1.0), 20.0 * (w[1] - 0.5)];
            of.step(t, 0.05, &mut moments, &mut w, &gradient);
        }
        assert!((w[0] - 1.0).abs() < 0.02 && (w[1] - 0.5).abs() < 0.02, "{w:?}");
        let of = AdamW { decay: 0.5, ..of };
        let (mut w, mut moments) = (vec![4.0f32], Moments::new(1));
        of.step(1, 0.1, &mut moments, &mut w, &[0.0]);
        assert!((w[0] - 3.8).abs() < 1e-6);
    }

    #[test]
    fn bits_do_not_depend_on_threads() {
        let mut rng = Rng::new(5);
        let n = 3 * CHUNK + 5;
        let (start, gradient) = (rng.normals(n), rng.normals(n));
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let (mut w, mut moments) = (start.clone(), Moments::new(n));
                for t in 1..4 {
                    AdamW::default().step(t, 1e-3, &mut moments, &mut w, &gradient);
                }
                w
            })
        };
        assert_eq!(run(1), run(2));
    }
}
