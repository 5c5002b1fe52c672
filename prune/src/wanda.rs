//! Wanda: pruning by weights and activations (Sun et al. 2023, arXiv:2306.11695).
//!
//! The score of a weight is `|w_ij| · ‖x_j‖₂` with `‖x_j‖₂` the norm of input channel j over all calibration tokens; of
//! each output row the least become zero, with n:m of each m weights of a row. Kept weights stay what they are.
//! `weight [out, in]`, cost O(out·in). The norms come from the sum of squares over tokens; when the Hessian is there
//! its diagonal would do as well.
//!
//! Statistics are those of each block before it is pruned, behind the pruned earlier blocks, as in the authors' code,
//! which takes two forwards; `upstream = "original"` takes those of the original model, in one.

use attar_ir::{
    Block, BlockState, BlockStats, Contract, Cost, FormChange, FormSet, Limits, Needs, Pass,
    PassContext, PassDef, PassError, PassReport, SiteReport, Sparsity, Target, Touches, Upstream,
    check_finite, recipe::options, relative,
};
use attar_tensor::{Pattern, linalg::squares};
use serde::Deserialize;

use crate::{
    magnitude::{finish, prune_spans},
    options::pattern,
    owl::{NEEDS, Owl, Ratios, chosen},
};

/// Registration of `wanda`.
pub(crate) const DEF: PassDef = PassDef {
    name: "wanda",
    summary: "set the weights of each row to zero that matter least by size and activation",
    paper: "Sun et al. 2023, arXiv:2306.11695",
    example: "\
[[step]]
pass = \"wanda\"
pattern = \"4:8\"
",
    takes_scheme: false,
    symmetric_by_default: false,
    build: |table| {
        let Options { sparsity, pattern: text, ratios, lambda, outlier } = options(table)?;
        let pattern = pattern(sparsity, text.as_deref())?;
        Ok(Box::new(Wanda { pattern, owl: Owl::new(ratios, lambda, outlier, pattern)? }))
    },
    schema: || schemars::schema_for!(Options),
};

#[derive(Debug, Clone, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct Options {
    /// Fraction of the weights of each row that become zero; 0.5 when there is no pattern either.
    sparsity: Option<f64>,
    /// `n:m`: n of every m consecutive weights of a row stay, e.g. `2:4`.
    pattern: Option<String>,
    /// `owl` gives blocks whose scores have few outliers more zeros (arXiv:2310.05175); not with a pattern.
    ratios: Ratios,
    /// OWL: half of the largest difference between the sparsities of two blocks.
    lambda: f64,
    /// OWL: what is an outlier, in units of the mean score.
    outlier: f64,
}

impl Default for Options {
    fn default() -> Self {
        Self { sparsity: None, pattern: None, ratios: Ratios::Uniform, lambda: 0.08, outlier: 5.0 }
    }
}

#[derive(Debug)]
struct Wanda {
    pattern: Pattern,
    owl: Option<Owl>,
}

impl Pass for Wanda {
    fn name(&self) -> &'static str {
        "wanda"
    }

    fn contract(&self) -> Contract {
        let sparsity = Some(Sparsity::from(self.pattern));
        Contract {
            accepts: FormSet::DENSE_FLOAT,
            produces: FormChange { sparsity, ..FormChange::NONE },
            needs: Needs::SQUARE_SUM,
            upstream: Upstream::Compressed,
            touches: Touches::Block,
            looks_ahead: false,
        }
    }

    fn density(&self) -> Option<f64> {
        Some(self.pattern.density())
    }

    fn surveys(&self) -> Option<Needs> {
        self.owl.map(|_| NEEDS)
    }

    fn survey(
        &self,
        block: &Block,
        targets: &[Target],
        state: &BlockState,
        stats: &BlockStats,
    ) -> Vec<f64> {
        vec![self.owl.map_or(f64::NAN, |owl| owl.survey(block, targets, state, stats))]
    }

    fn cost(&self, block: &Block, targets: &[Target], _: &Limits) -> Cost {
        let sizes = || targets.iter().map(|target| block.sites[target.site].weights());
        let peak_bytes = 8 * sizes().max().unwrap_or(0);
        Cost { flops: 20.0 * sizes().sum::<usize>() as f64, peak_bytes, scratch_bytes: 0 }
    }

    fn apply(
        &self,
        context: &PassContext<'_>,
        targets: &[Target],
        state: &mut BlockState,
        stats: &mut BlockStats,
    ) -> Result<PassReport, PassError> {
        let mut sites = Vec::new();
        for target in targets {
            let site = &context.block.sites[target.site];
            let weight = state.linears[target.site].weight.as_dense();
            let weight = weight.expect("the plan proved a float weight");
            check_finite(&site.name, "the weight", weight)?;
            let input = stats.input(context.block.input_of(target.site));
            let sums = input.and_then(|input| input.square_sum.as_ref());
            let sums = sums.expect("the plan provides what the contract needs");
            let norms: Vec<f32> = sums.iter().map(|sum| sum.sqrt() as f32).collect();
            if let Some(channel) = norms.iter().position(|norm| !norm.is_finite()) {
                return Err(PassError::Numeric {
                    site: site.name.clone(),
                    reason: format!(
                        "the norm of input channel {channel} is not finite; check the checkpoint and the \
                         calibration text"
                    ),
                });
            }
            let mut pruned = weight.clone();
            let pattern = self.owl.map_or(self.pattern, |owl| {
                owl.pattern(context.survey, context.block.index, self.pattern)
            });
            let span = match pattern {
                Pattern::NM { m, .. } => usize::from(m),
                Pattern::Fraction(_) => site.in_features,
            };
            prune_spans(&mut pruned, span, pattern, |w, column| w.abs() * norms[column]);
            sites.push(SiteReport {
                site: site.name.clone(),
                pass: "wanda".into(),
                weight_error: relative(squares(&(&pruned - weight)), squares(weight)),
                output_error: None,
                events: chosen(self.owl, pattern),
            });
            finish(state, target.site, pruned);
        }
        Ok(PassReport { sites })
    }
}
