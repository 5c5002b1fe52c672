//! OWL: outlier-weighed layerwise ratios (Yin et al. 2023, arXiv:2310.05175).
//!
//! The outlier ratio of a block is the fraction of its scores `|w_ij| ‖x_j‖₂` (those of all its linears together) that
//! are greater than M times their mean. The more outliers, the more weights stay: with D the ratios of all blocks
//! stretched to `0..=2 λ`, block l keeps `1 − s + D_l − mean(D)`, so the mean is what was asked for and no block is
//! further from the least kept one than 2 λ. Statistics are those of the original model; cost one forward of it.

use attar_ir::{Block, BlockState, BlockStats, Event, Needs, Target, recipe::RecipeError};
use attar_tensor::Pattern;
use serde::Deserialize;

/// How zeros are shared out among blocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Ratios {
    /// The same everywhere.
    #[default]
    Uniform,
    /// More where the scores have few outliers.
    Owl,
}

/// λ and M.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Owl {
    lambda: f64,
    outlier: f64,
}

/// What is read of all blocks.
pub(crate) const NEEDS: Needs = Needs::SQUARE_SUM;

impl Owl {
    /// Checks the options of a step; `None` for uniform ratios.
    ///
    /// # Errors
    /// An n:m pattern, λ or M out of range.
    pub(crate) fn new(
        ratios: Ratios,
        lambda: f64,
        outlier: f64,
        pattern: Pattern,
    ) -> Result<Option<Self>, RecipeError> {
        if ratios == Ratios::Uniform {
            return Ok(None);
        }
        let Pattern::Fraction(zeros) = pattern else {
            let reason = "`owl` gives each block its own sparsity, but an n:m pattern is the same everywhere; \
                          give `sparsity` instead";
            return Err(RecipeError::invalid("ratios", reason));
        };
        let most = zeros.min(1.0 - zeros) / 2.0;
        if !(lambda > 0.0 && lambda < most) {
            let reason = format!(
                "expected more than 0 and less than {most}, so that each block has a sparsity between 0 and 1; got \
                 {lambda}"
            );
            return Err(RecipeError::invalid("lambda", reason));
        }
        if !(outlier > 0.0 && outlier.is_finite()) {
            let reason = format!("expected a finite number above 0, got {outlier}");
            return Err(RecipeError::invalid("outlier", reason));
        }
        Ok(Some(Self { lambda, outlier }))
    }

    /// The outlier ratio of a block; NaN where nothing of it is pruned.
    pub(crate) fn survey(
        self,
        block: &Block,
        targets: &[Target],
        state: &BlockState,
        stats: &BlockStats,
    ) -> f64 {
        let norms_of = |site: usize| -> Vec<f32> {
            let sums = stats.input(block.input_of(site)).and_then(|s| s.square_sum.as_ref());
            sums.map(|sums| sums.iter().map(|sum| sum.sqrt() as f32).collect()).unwrap_or_default()
        };
        let weight = |site: usize| state.linears[site].weight.as_dense();
        let (mut sum, mut count) = (0.0f64, 0usize);
        for target in targets {
            let (norms, Some(weight)) = (norms_of(target.site), weight(target.site)) else {
                continue;
            };
            for row in weight.outer_iter() {
                let scores = row.iter().zip(&norms).map(|(w, norm)| w.abs() * norm);
                sum += f64::from(scores.sum::<f32>());
                count += norms.len();
            }
        }
        let limit = (self.outlier * sum / count as f64) as f32;
        let mut outliers = 0usize;
        for target in targets {
            let (norms, Some(weight)) = (norms_of(target.site), weight(target.site)) else {
                continue;
            };
            for row in weight.outer_iter() {
                let scores = row.iter().zip(&norms).map(|(w, norm)| w.abs() * norm);
                outliers += scores.filter(|&score| score > limit).count();
            }
        }
        outliers as f64 / count as f64
    }

    /// The pattern of decoder block `index`; of what is no decoder block, the uniform one.
    pub(crate) fn pattern(self, survey: &[Vec<f64>], index: usize, pattern: Pattern) -> Pattern {
        let Pattern::Fraction(zeros) = pattern else { return pattern };
        let known = || survey.iter().flatten().copied().filter(|ratio| ratio.is_finite());
        let (least, most) = known().fold((f64::MAX, f64::MIN), |(a, b), r| (a.min(r), b.max(r)));
        let own = survey
            .get(index)
            .and_then(|own| own.first())
            .copied()
            .filter(|ratio| ratio.is_finite());
        let Some(own) = own.filter(|_| most > least) else { return pattern };
        let stretched = |ratio: f64| (ratio - least) / (most - least) * 2.0 * self.lambda;
        let mean = known().map(stretched).sum::<f64>() / known().count() as f64;
        Pattern::Fraction(zeros - stretched(own) + mean)
    }
}

/// What is worth telling: the sparsity that a block was given.
pub(crate) fn chosen(owl: Option<Owl>, pattern: Pattern) -> Vec<Event> {
    match (owl, pattern) {
        (Some(_), Pattern::Fraction(value)) => {
            vec![Event::Chosen { name: "sparsity".into(), value }]
        }
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_with_outliers_keep_more_and_the_mean_is_kept() {
        let half = Pattern::Fraction(0.5);
        let owl = Owl::new(Ratios::Owl, 0.08, 5.0, half).unwrap().unwrap();
        let survey = [0.01, 0.03, 0.02, f64::NAN].map(|ratio| vec![ratio]);
        let of = |index| match owl.pattern(&survey, index, half) {
            Pattern::Fraction(zeros) => zeros,
            Pattern::NM { .. } => unreachable!(),
        };
        let zeros: Vec<f64> = (0..3).map(of).collect();
        for (found, expected) in zeros.iter().zip([0.58, 0.42, 0.5]) {
            assert!((found - expected).abs() < 1e-9, "{zeros:?}");
        }
        // A block that has no number, and the head.
        assert_eq!(owl.pattern(&survey, 3, half), half);
        assert_eq!(owl.pattern(&survey, 9, half), half);
        assert_eq!(owl.pattern(&[vec![0.2], vec![0.2]], 0, half), half);
    }

    #[test]
    fn what_is_out_of_range_is_refused() {
        let refuse = |lambda, outlier, pattern| {
            Owl::new(Ratios::Owl, lambda, outlier, pattern).unwrap_err().to_string()
        };
        let half = Pattern::Fraction(0.5);
        assert!(refuse(0.08, 5.0, Pattern::NM { n: 2, m: 4 }).starts_with("ratios: `owl`"));
        assert!(refuse(0.3, 5.0, half).starts_with("lambda: expected more than 0"));
        assert!(refuse(0.0, 5.0, half).starts_with("lambda"));
        assert!(refuse(0.08, -1.0, half).starts_with("outlier"));
        assert_eq!(Owl::new(Ratios::Uniform, 9.0, 0.0, half), Ok(None));
    }
}
