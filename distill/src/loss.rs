//! What a student is told by the logits of its teacher. With `p` the teacher's and `q` the student's distribution at
//! temperature τ (Hinton et al. 2015, arXiv:1503.02531, whose factor τ² keeps the size of gradients):
//!
//! - forward KL `Σ p ln(p / q)`: the student covers what the teacher holds possible; gradient on its logits `τ (q − p)`;
//! - reverse KL `Σ q ln(q / p)` (MiniLLM, Gu et al. 2023, arXiv:2306.08543): it keeps to what the teacher holds likely;
//!   `τ q ⊙ (ln(q / p) − KL)`;
//! - Jensen-Shannon (GKD, Agarwal et al. 2023, arXiv:2306.13649) `β KL(p ‖ m) + (1 − β) KL(q ‖ m)`, `m = β p + (1 − β) q`:
//!   `(1 − β) τ q ⊙ (ln(q / m) − KL(q ‖ m))`.
//!
//! Beside it cross-entropy with the text, `−ln q[next]` at temperature 1. All f32, losses in f64.

use attar_tensor::linalg::{dot, softmax_row_log_sum};
use serde::Deserialize;

/// How the student's distribution is held against the teacher's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Divergence {
    /// KL(teacher ‖ student).
    #[default]
    ForwardKl,
    /// KL(student ‖ teacher).
    ReverseKl,
    /// Between both, see `beta`.
    JensenShannon,
}

impl Divergence {
    /// As recipes write it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::ForwardKl => "forward_kl",
            Self::ReverseKl => "reverse_kl",
            Self::JensenShannon => "jensen_shannon",
        }
    }
}

/// The loss on one row of logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct RowLoss {
    /// Against the teacher.
    pub(crate) divergence: Divergence,
    /// β of Jensen-Shannon.
    pub(crate) beta: f32,
    /// τ.
    pub(crate) temperature: f32,
    /// Share of the cross-entropy with the text, 0 to 1; the teacher has the rest.
    pub(crate) text: f32,
}

/// Room for a row's work.
#[derive(Debug, Clone, Default)]
pub(crate) struct Row {
    own: Vec<f32>,
    p: Vec<f32>,
    q: Vec<f32>,
}

impl RowLoss {
    /// Turns the student's logits `z` into the gradient on them, times `scale`; returns the loss, not scaled. `teacher` are
    /// its logits, absent where the text has the whole share; `next` is the token that follows in the text.
    ///
    /// # Panics
    /// When the teacher is absent and has a share.
    pub(crate) fn apply(
        &self,
        z: &mut [f32],
        teacher: Option<&[f32]>,
        next: Option<u32>,
        scale: f32,
        row: &mut Row,
    ) -> f64 {
        let Row { own, p, q } = row;
        own.clear();
        own.extend_from_slice(z);
        let mut loss = 0.0;
        z.fill(0.0);
        if self.text < 1.0 {
            let teacher = teacher.expect("a teacher with a share puts out logits");
            let share = 1.0 - self.text;
            loss += f64::from(share) * self.against(own, teacher, scale * share, z, (p, q));
        }
        if let Some(next) = next.filter(|_| self.text > 0.0) {
            let weight = scale * self.text;
            let logit = own[next as usize];
            let log_sum = softmax_row_log_sum(own);
            loss += f64::from(self.text) * (f64::from(log_sum) - f64::from(logit));
            for (z, own) in z.iter_mut().zip(own.iter()) {
                *z += weight * own;
            }
            z[next as usize] -= weight;
        }
        loss
    }

    /// The divergence of logits `own` from `teacher`, times τ²; writes its gradient times `scale` to `d`.
    fn against(
        &self,
        own: &[f32],
        teacher: &[f32],
        scale: f32,
        d: &mut [f32],
        (p, q): (&mut Vec<f32>, &mut Vec<f32>),
    ) -> f64 {
        let inverse = 1.0 / self.temperature;
        let (scale, square) =
            (scale * self.temperature, f64::from(self.temperature * self.temperature));
        for (to, from) in [(&mut *p, teacher), (&mut *q, own)] {
            to.clear();
            to.extend(from.iter().map(|v| v * inverse));
        }
        let (log_p, log_q) = (softmax_row_log_sum(p), softmax_row_log_sum(q));
        match self.divergence {
            Divergence::ForwardKl => {
                // Σ p (ln p − ln q) = Σ p (t − z) / τ − (ln Σ e^t − ln Σ e^z)
                let along = f64::from(dot(p, teacher)) - f64::from(dot(p, own));
                for ((d, p), q) in d.iter_mut().zip(p.iter()).zip(q.iter()) {
                    *d = scale * (q - p);
                }
                square * (along * f64::from(inverse) - f64::from(log_p) + f64::from(log_q))
            }
            Divergence::ReverseKl => {
                let along = f64::from(dot(q, own)) - f64::from(dot(q, teacher));
                let kl = along * f64::from(inverse) - f64::from(log_q) + f64::from(log_p);
                let shift = log_p - log_q - kl as f32;
                for ((d, q), (z, t)) in d.iter_mut().zip(q.iter()).zip(own.iter().zip(teacher)) {
                    *d = scale * q * ((z - t) * inverse + shift);
                }
                square * kl
            }
            Divergence::JensenShannon => {
                let beta = self.beta;
                let (mut of_p, mut of_q) = (0.0f64, 0.0f64);
                for ((d, &p), &q) in d.iter_mut().zip(p.iter()).zip(q.iter()) {
                    // Where a probability has vanished its own part is zero.
                    let m = (beta * p + (1.0 - beta) * q).max(f32::MIN_POSITIVE);
                    let ln = |x: f32| (x.max(f32::MIN_POSITIVE) / m).ln();
                    of_p += f64::from(p * ln(p));
                    *d = ln(q);
                    of_q += f64::from(q * *d);
                }
                let rest = 1.0 - beta;
                for (d, q) in d.iter_mut().zip(q.iter()) {
                    *d = scale * rest * q * (*d - of_q as f32);
                }
                square * (f64::from(beta) * of_p + f64::from(rest) * of_q)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use attar_tensor::rng::Rng;

    fn softmax(x: &[f64], t: f64) -> Vec<f64> {
        let sum: f64 = x.iter().map(|v| (v / t).exp()).sum();
        x.iter().map(|v| (v / t).exp() / sum).collect()
    }

    fn reference(of: &RowLoss, z: &[f64], teacher: &[f64], next: usize) -> f64 {
        let t = f64::from(of.temperature);
        let (p, q) = (softmax(teacher, t), softmax(z, t));
        let kl =
            |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * (a / b).ln()).sum() };
        let beta = f64::from(of.beta);
        let between = match of.divergence {
            Divergence::ForwardKl => kl(&p, &q),
            Divergence::ReverseKl => kl(&q, &p),
            Divergence::JensenShannon => {
                let m: Vec<f64> =
                    p.iter().zip(&q).map(|(p, q)| beta * p + (1.0 - beta) * q).collect();
                beta * kl(&p, &m) + (1.0 - beta) * kl(&q, &m)
            }
        };
        let text = f64::from(of.text);
        (1.0 - text) * t * t * between - text * softmax(z, 1.0)[next].ln()
    }

    #[test]
    fn losses_and_gradients_are_those_of_their_formulas() {
        let mut rng = Rng::new(6);
        let (z, teacher) = (rng.normals(41), rng.normals(41));
        let wide = |x: &[f32]| x.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
        let teacher64 = wide(&teacher);
        for divergence in [Divergence::ForwardKl, Divergence::ReverseKl, Divergence::JensenShannon]
        {
            for (temperature, text, beta) in [(1.0, 0.0, 0.5), (2.0, 0.0, 0.3), (0.7, 0.4, 0.8)] {
                let of = RowLoss { divergence, beta, temperature, text };
                let mut d = z.clone();
                let loss = of.apply(&mut d, Some(&teacher), Some(7), 0.5, &mut Row::default());
                let want = reference(&of, &wide(&z), &teacher64, 7);
                assert!((loss - want).abs() < 2e-6 * (1.0 + want), "{of:?}: {loss} {want}");
                for at in 0..z.len() {
                    let moved = |by: f64| {
                        let mut z = wide(&z);
                        z[at] += by;
                        reference(&of, &z, &teacher64, 7)
                    };
                    let slope = 0.5 * (moved(1e-5) - moved(-1e-5)) / 2e-5;
                    assert!((f64::from(d[at]) - slope).abs() < 1e-6, "{of:?}: {} {slope}", d[at]);
                }
            }
        }
    }

    #[test]
    fn a_student_like_its_teacher_has_no_loss_and_vanished_tokens_do_no_harm() {
        let mut z = Rng::new(2).normals(33);
        z[5] = -200.0;
        for divergence in [Divergence::ForwardKl, Divergence::ReverseKl, Divergence::JensenShannon]
        {
            let of = RowLoss { divergence, beta: 0.5, temperature: 1.0, text: 0.0 };
            let mut d = z.clone();
            let loss = of.apply(&mut d, Some(&z), None, 1.0, &mut Row::default());
            assert!(loss.abs() < 1e-6, "{divergence:?}: {loss}");
            assert!(d.iter().all(|d| d.abs() < 1e-6), "{divergence:?}");
            let mut other = z.clone();
            (other[5], other[6]) = (3.0, -300.0);
            let loss = of.apply(&mut other, Some(&z), None, 1.0, &mut Row::default());
            assert!(loss.is_finite() && loss > 0.0 && other.iter().all(|d| d.is_finite()));
        }
        // Without a next token the text has no part.
        let of = RowLoss {
            text: 1.0,
            ..RowLoss { divergence: Divergence::ForwardKl, beta: 0.5, temperature: 1.0, text: 0.0 }
        };
        let mut d = z.clone();
        assert!(of.apply(&mut d, None, None, 1.0, &mut Row::default()).abs() < f64::MIN_POSITIVE);
        assert!(d.iter().all(|d| d.abs() < f32::MIN_POSITIVE));
    }
}
