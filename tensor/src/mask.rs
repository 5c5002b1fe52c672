//! Which weights stay: patterns of zeros, and the choice of a mask by scores.

use serde::{Deserialize, Serialize};

/// A pattern of zeros in a weight `[out, in]`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pattern {
    /// This fraction of the weights is zero, anywhere.
    Fraction(f64),
    /// At most `n` of every `m` consecutive weights of a row are not zero.
    NM {
        /// Weights that stay.
        n: u8,
        /// Weights of a group.
        m: u8,
    },
}

impl Pattern {
    /// Fraction of weights that stay.
    pub fn density(self) -> f64 {
        match self {
            Self::Fraction(zeros) => 1.0 - zeros,
            Self::NM { n, m } => f64::from(n) / f64::from(m),
        }
    }

    /// Zeros among the first `count` weights, rounded to the nearest.
    pub fn zeros(self, count: usize) -> usize {
        match self {
            Self::Fraction(zeros) => ((zeros * count as f64).round() as usize).min(count),
            Self::NM { n, m } => count / usize::from(m) * usize::from(m - n),
        }
    }
}

/// Sets the weights of the `zeros` least scores to zero; of equal scores the earlier ones go first.
///
/// # Panics
/// When the slices differ in length or scores are NaN.
pub fn zero_least(weights: &mut [f32], scores: &[f32], zeros: usize, order: &mut Vec<u32>) {
    assert_eq!(weights.len(), scores.len(), "one score per weight");
    if zeros == 0 {
        return;
    }
    order.clear();
    order.extend(0..scores.len() as u32);
    let key = |&at: &u32| (scores[at as usize], at);
    let compare = |a: &u32, b: &u32| {
        let (a, b) = (key(a), key(b));
        a.0.total_cmp(&b.0).then(a.1.cmp(&b.1))
    };
    if zeros < order.len() {
        order.select_nth_unstable_by(zeros - 1, compare);
    }
    for &at in &order[..zeros.min(order.len())] {
        weights[at as usize] = 0.0;
    }
}

/// Zeros per group of `m` consecutive weights beyond what an n:m pattern allows; `None` when it holds.
pub fn breaks_pattern(row: &[f32], n: u8, m: u8) -> Option<usize> {
    row.chunks(usize::from(m))
        .position(|group| group.iter().filter(|&&w| w != 0.0).count() > usize::from(n))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_scores_go_and_ties_go_in_order() {
        let scores = [3.0, 1.0, 1.0, 2.0, 1.0];
        for (zeros, expected) in [
            (0, [1.0, 1.0, 1.0, 1.0, 1.0]),
            (2, [1.0, 0.0, 0.0, 1.0, 1.0]),
            (4, [1.0, 0.0, 0.0, 0.0, 0.0]),
            (5, [0.0; 5]),
        ] {
            let mut weights = [1.0; 5];
            zero_least(&mut weights, &scores, zeros, &mut Vec::new());
            assert_eq!(weights.map(f32::to_bits), expected.map(f32::to_bits));
        }
    }

    #[test]
    fn patterns_count_their_zeros() {
        assert_eq!(Pattern::Fraction(0.5).zeros(7), 4);
        assert_eq!(Pattern::NM { n: 1, m: 4 }.zeros(8), 6);
        assert!((Pattern::NM { n: 1, m: 4 }.density() - 0.25).abs() < 1e-12);
        assert_eq!(breaks_pattern(&[1.0, 0.0, 0.0, 2.0, 1.0, 1.0, 1.0, 0.0], 2, 4), Some(1));
        assert_eq!(breaks_pattern(&[1.0, 0.0, 0.0, 2.0], 2, 4), None);
    }
}
