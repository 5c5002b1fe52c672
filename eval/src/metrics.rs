//! Perplexity, KL divergence and top-1 agreement over windows of tokens.
//!
//! `perplexity = exp(mean −ln p(x_{t+1} | x_≤t))`; `KL = mean Σ_v p(v) (ln p(v) − ln q(v))`, nats, full
//! vocabulary, `p` the original and `q` the compressed model; top-1 agreement is the fraction of scored
//! positions with the same most likely token. Sums in f64. Intervals are percentile bootstraps over
//! windows, paired because both models see the same windows.

use attar_tensor::{
    Mat,
    linalg::{exp_in_place, vectorize},
    rng::Rng,
};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Which positions of a window are scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Score {
    /// Every position but the first.
    All,
    /// Only the second half, as llama.cpp does.
    SecondHalf,
}

/// A 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// 2.5th percentile.
    pub low: f64,
    /// 97.5th percentile.
    pub high: f64,
}

/// Result of an evaluation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Perplexity of the evaluated model.
    pub perplexity: f64,
    /// Bootstrap interval of it.
    pub perplexity_interval: Interval,
    /// Scored positions.
    pub tokens: usize,
    /// Tokens per window.
    pub context: usize,
    /// Windows.
    pub windows: usize,
    /// Which positions were scored.
    pub score: Score,
    /// Perplexity of the reference on the same positions.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reference_perplexity: Option<f64>,
    /// `perplexity / reference_perplexity`, and its paired interval.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub perplexity_ratio: Option<f64>,
    /// Paired bootstrap interval of the ratio.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub perplexity_ratio_interval: Option<Interval>,
    /// Mean KL(reference ‖ model), nats.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub kl_mean: Option<f64>,
    /// Bootstrap interval of it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub kl_mean_interval: Option<Interval>,
    /// Fraction of positions with the same most likely token.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub top1_agreement: Option<f64>,
    /// Bootstrap interval of it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub top1_agreement_interval: Option<Interval>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Window {
    count: f64,
    nll: f64,
    reference_nll: f64,
    kl: f64,
    same: f64,
}

/// Collects windows.
#[derive(Debug)]
pub struct Evaluator {
    score: Score,
    context: usize,
    compared: bool,
    windows: Vec<Window>,
}

/// Partial sums of a reduction over a row.
const LANES: usize = 16;

/// One row of logits: `log Σ e^v`, the index of the largest, and `e^(v − max)` of every entry with its sum.
struct Row {
    log_partition: f64,
    top: usize,
    exps: Vec<f32>,
    sum: f64,
}

impl Row {
    /// Exponentials in f32 (relative error under 1e-6), their sum in f64.
    fn new(row: &[f32]) -> Self {
        let mut exps = row.to_vec();
        let (max, sum) = vectorize(
            #[inline(always)]
            || {
                let mut max = [f32::NEG_INFINITY; LANES];
                let (chunks, tail) = exps.as_chunks::<LANES>();
                for chunk in chunks {
                    for l in 0..LANES {
                        max[l] = if chunk[l] > max[l] { chunk[l] } else { max[l] };
                    }
                }
                let max = max.iter().chain(tail).fold(f32::NEG_INFINITY, |a, &b| a.max(b));
                for v in &mut exps {
                    *v -= max;
                }
                exp_in_place(&mut exps);
                (max, reduce(&exps, &exps, |e, _| e))
            },
        );
        let top = row.iter().position(|&v| v >= max).unwrap_or(0);
        Self { log_partition: f64::from(max) + sum.ln(), top, exps, sum }
    }

    /// `Σ p (log p − log q)` with p of `self` and q of `other`, nats, from the logits of both.
    fn divergence(&self, logits: &[f32], other: &Self, other_logits: &[f32]) -> f64 {
        let shift = self.log_partition - other.log_partition;
        let mut differences = logits.to_vec();
        let total = vectorize(
            #[inline(always)]
            || {
                for (d, q) in differences.iter_mut().zip(other_logits) {
                    *d -= q;
                }
                // The shift is taken off in f64 before the weighted sum, so that nothing cancels in it.
                reduce(&self.exps, &differences, |e, d| e * (d - shift))
            },
        );
        total / self.sum
    }
}

/// `Σ f(a, b)` in f64, in lanes of fixed order.
#[inline(always)]
fn reduce(a: &[f32], b: &[f32], f: impl Fn(f64, f64) -> f64) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let ((a, tail_a), (b, tail_b)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for l in 0..LANES {
            lanes[l] += f(f64::from(a[l]), f64::from(b[l]));
        }
    }
    for ((lane, &a), &b) in lanes.iter_mut().zip(tail_a).zip(tail_b) {
        *lane += f(f64::from(a), f64::from(b));
    }
    lanes.iter().sum()
}

impl Evaluator {
    /// An empty evaluation.
    pub fn new(context: usize, score: Score) -> Self {
        Self { score, context, compared: false, windows: Vec::new() }
    }

    /// Adds a window: logits `[tokens, vocab]` of the model (and of the reference) for `ids [tokens]`.
    ///
    /// # Panics
    /// When shapes disagree, or some windows come with a reference and others without.
    pub fn add(&mut self, logits: &Mat, reference: Option<&Mat>, ids: &[u32]) {
        assert_eq!(logits.nrows(), ids.len(), "one row of logits per token");
        if let Some(reference) = reference {
            assert_eq!(reference.dim(), logits.dim(), "both models have the same vocabulary");
        }
        let compared = reference.is_some();
        assert!(
            self.windows.is_empty() || self.compared == compared,
            "all windows are compared with the reference or none is"
        );
        self.compared = compared;
        let first = match self.score {
            Score::All => 0,
            Score::SecondHalf => ids.len() / 2,
        };
        let positions: Vec<Window> = (first..ids.len().saturating_sub(1))
            .into_par_iter()
            .map(|t| {
                let row = logits.row(t);
                let row = row.as_slice().expect("rows are contiguous");
                let q = Row::new(row);
                let next = ids[t + 1] as usize;
                let nll = q.log_partition - f64::from(row[next]);
                let mut window = Window { count: 1.0, nll, ..Window::default() };
                if let Some(reference) = reference {
                    let logits = reference.row(t);
                    let logits = logits.as_slice().expect("rows are contiguous");
                    let p = Row::new(logits);
                    window.reference_nll = p.log_partition - f64::from(logits[next]);
                    window.same = f64::from(u8::from(q.top == p.top));
                    window.kl = p.divergence(logits, &q, row);
                }
                window
            })
            .collect();
        // Summed in order, so that threads do not change the result.
        let mut sum = Window::default();
        for p in &positions {
            sum.count += p.count;
            sum.nll += p.nll;
            sum.reference_nll += p.reference_nll;
            sum.kl += p.kl;
            sum.same += p.same;
        }
        self.windows.push(sum);
    }

    /// The result; `seed` drives the bootstrap.
    pub fn finish(&self, seed: u64) -> Evaluation {
        let total = |picks: &[usize], f: fn(&Window) -> f64| -> f64 {
            let (sum, count) = picks.iter().fold((0.0, 0.0), |(s, n), &i| {
                (s + f(&self.windows[i]), n + self.windows[i].count)
            });
            // Nothing scored is no measurement: NaN, which gates refuse, instead of a perfect score.
            if count > 0.0 { sum / count } else { f64::NAN }
        };
        let all: Vec<usize> = (0..self.windows.len()).collect();
        let mut rng = Rng::new(seed);
        let draws: Vec<Vec<usize>> =
            (0..1000).map(|_| all.iter().map(|_| rng.below(all.len().max(1))).collect()).collect();
        let interval = |f: &dyn Fn(&[usize]) -> f64| {
            let mut values: Vec<f64> = draws.iter().map(|draw| f(draw)).collect();
            values.sort_by(f64::total_cmp);
            Interval { low: values[24], high: values[974] }
        };
        let perplexity = |picks: &[usize]| total(picks, |w| w.nll).exp();
        let ratio = |picks: &[usize]| total(picks, |w| w.nll - w.reference_nll).exp();
        let kl = |picks: &[usize]| total(picks, |w| w.kl);
        let same = |picks: &[usize]| total(picks, |w| w.same);
        let compared = |value: f64| self.compared.then_some(value);
        Evaluation {
            perplexity: perplexity(&all),
            perplexity_interval: interval(&perplexity),
            tokens: self.windows.iter().map(|w| w.count as usize).sum(),
            context: self.context,
            windows: self.windows.len(),
            score: self.score,
            reference_perplexity: compared(total(&all, |w| w.reference_nll).exp()),
            perplexity_ratio: compared(ratio(&all)),
            perplexity_ratio_interval: self.compared.then(|| interval(&ratio)),
            kl_mean: compared(kl(&all)),
            kl_mean_interval: self.compared.then(|| interval(&kl)),
            top1_agreement: compared(same(&all)),
            top1_agreement_interval: self.compared.then(|| interval(&same)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logits(seed: u64) -> Mat {
        Mat::from_shape_vec((6, 5), Rng::new(seed).normals(30)).unwrap()
    }

    #[test]
    fn the_same_model_does_not_diverge() {
        let mut evaluator = Evaluator::new(6, Score::All);
        evaluator.add(&logits(1), Some(&logits(1)), &[0, 1, 2, 3, 4, 0]);
        let result = evaluator.finish(0);
        assert!(result.kl_mean.unwrap().abs() < 1e-7);
        assert!((result.top1_agreement.unwrap() - 1.0).abs() < 1e-12);
        assert_eq!(result.tokens, 5);
    }

    #[test]
    fn numbers_follow_their_formulas() {
        let ids = [0u32, 1, 2, 3, 4, 0];
        let (q, p) = (logits(2), logits(3));
        let softmax = |m: &Mat, t: usize| -> Vec<f64> {
            let e: Vec<f64> = m.row(t).iter().map(|&v| f64::from(v).exp()).collect();
            let z: f64 = e.iter().sum();
            e.iter().map(|v| v / z).collect()
        };
        for (score, first) in [(Score::All, 0), (Score::SecondHalf, 3)] {
            let mut evaluator = Evaluator::new(6, score);
            evaluator.add(&q, Some(&p), &ids);
            let result = evaluator.finish(0);
            let n = (5 - first) as f64;
            let (mut nll, mut kl) = (0.0, 0.0);
            for t in first..5 {
                let (q, p) = (softmax(&q, t), softmax(&p, t));
                nll -= q[ids[t + 1] as usize].ln();
                kl += p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum::<f64>();
            }
            assert!((result.perplexity - (nll / n).exp()).abs() < 1e-5);
            assert!((result.kl_mean.unwrap() - kl / n).abs() < 1e-6);
        }
    }

    #[test]
    fn nothing_scored_is_not_a_perfect_score() {
        let result = Evaluator::new(6, Score::All).finish(0);
        assert!(result.perplexity.is_nan() && result.tokens == 0);
    }

    #[test]
    fn intervals_hold_the_mean_and_depend_on_the_seed_alone() {
        let mut evaluator = Evaluator::new(6, Score::All);
        for seed in 0..8 {
            evaluator.add(&logits(seed), Some(&logits(seed + 100)), &[0, 1, 2, 3, 4, 0]);
        }
        let (result, again) = (evaluator.finish(5), evaluator.finish(5));
        assert_eq!(result, again);
        let holds = |interval: Option<Interval>, value: Option<f64>| {
            let (interval, value) = (interval.unwrap(), value.unwrap());
            interval.low < value && value < interval.high
        };
        assert!(holds(Some(result.perplexity_interval), Some(result.perplexity)));
        assert!(holds(result.perplexity_ratio_interval, result.perplexity_ratio));
        assert!(holds(result.kl_mean_interval, result.kl_mean));
        assert!(result.kl_mean.unwrap() > 0.0);
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_threads() {
        let logits =
            |seed| Mat::from_shape_vec((64, 300), Rng::new(seed).normals(64 * 300)).unwrap();
        let (q, p) = (logits(1), logits(2));
        let ids: Vec<u32> = (0..64).map(|t| t * 37 % 300).collect();
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut evaluator = Evaluator::new(64, Score::SecondHalf);
                evaluator.add(&q, Some(&p), &ids);
                evaluator.finish(0)
            })
        };
        assert_eq!(run(1), run(3));
    }

    #[test]
    fn a_nan_logit_spoils_the_result_visibly() {
        let mut broken = logits(1);
        broken[[2, 3]] = f32::NAN;
        let mut evaluator = Evaluator::new(6, Score::All);
        evaluator.add(&broken, Some(&logits(1)), &[0, 1, 2, 3, 4, 0]);
        let result = evaluator.finish(0);
        assert!(result.perplexity.is_nan() && result.kl_mean.unwrap().is_nan());
    }
}
