//! ASVD: singular values of the weight with each input channel scaled by the size of its activations (Yuan et al. 2023,
//! arXiv:2312.05821, eq. 6 to 8).
//!
//! With `S = diag(mean |x_j|^alpha)` the best approximation of `W S` of rank r is taken and S divided out again:
//! `W ≈ U_r Σ_r V_rᵀ S⁻¹`. `weight [out, in]`. Cost O(min² · max). The paper's alpha is 0.5.
//!
//! Deliberate differences from the authors' code: S is never inverted (`up = U_r`, `down = U_rᵀ W`, the same product);
//! ranks are those that the step asks for, not searched by perplexity; statistics come behind the factored earlier
//! blocks unless `upstream = "original"`, as there.

use attar_ir::{
    Block, BlockState, BlockStats, Contract, Cost, FormChange, FormSet, Limits, Needs, Pass,
    PassContext, PassDef, PassError, PassReport, Site, Target, Touches, Upstream,
    recipe::{RecipeError, options},
};
use attar_tensor::linalg::lowrank::Metric;
use serde::Deserialize;

use crate::{
    common::{best, cost, factor},
    options::Size,
    svd::USUAL,
};

/// Registration of `asvd`.
pub(crate) const DEF: PassDef = PassDef {
    name: "asvd",
    summary: "put two thin matrices in the place of each, input channels weighed by the size of their activations",
    paper: "Yuan et al. 2023, arXiv:2312.05821",
    example: "\
[[step]]
pass = \"asvd\"
ratio = 0.2
[[emit]]
layout = \"dense\"
",
    takes_scheme: false,
    symmetric_by_default: false,
    build: |table| {
        let known = ["rank", "ratio", "multiple_of", "alpha"];
        let Options { rank, ratio, multiple_of, alpha } = options(table, &known)?;
        if !(0.0..=2.0).contains(&alpha) {
            let reason = format!("expected a number from 0 to 2, got {alpha}");
            return Err(RecipeError::invalid("alpha", reason));
        }
        let size = Size::of(rank, ratio, multiple_of, USUAL)?;
        Ok(Box::new(Asvd { size, alpha }))
    },
    schema: || schemars::schema_for!(Options),
};

#[derive(Debug, Clone, Copy, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct Options {
    /// Rank of every site's factors, instead of a ratio.
    rank: Option<usize>,
    /// Fraction of each site's parameters that is taken away; 0.2 when there is no rank either.
    ratio: Option<f64>,
    /// With a ratio: ranks are rounded down to multiples of it.
    multiple_of: usize,
    /// Power of the mean absolute activation; 0 is svd.
    alpha: f64,
}

impl Default for Options {
    fn default() -> Self {
        Self { rank: None, ratio: None, multiple_of: 1, alpha: 0.5 }
    }
}

#[derive(Debug)]
struct Asvd {
    size: Size,
    alpha: f64,
}

impl Pass for Asvd {
    fn name(&self) -> &'static str {
        "asvd"
    }

    fn contract(&self) -> Contract {
        Contract {
            accepts: FormSet::DENSE_FLOAT,
            produces: FormChange::FACTOR,
            needs: Needs::ABS_MEAN,
            upstream: Upstream::Compressed,
            touches: Touches::Sites,
            looks_ahead: false,
        }
    }

    fn rank(&self, site: &Site) -> Result<Option<usize>, String> {
        self.size.rank(site).map(Some)
    }

    fn cost(&self, block: &Block, targets: &[Target], _: &Limits) -> Cost {
        cost(block, targets, false)
    }

    fn apply(
        &self,
        context: &PassContext<'_>,
        targets: &[Target],
        state: &mut BlockState,
        stats: &mut BlockStats,
    ) -> Result<PassReport, PassError> {
        let stats = &*stats;
        let thin = |site: usize, weight: &_, rank| {
            let input = stats.input(context.block.input_of(site));
            let means = input.and_then(|input| input.abs_mean.as_ref());
            let means = means.expect("the plan provides what the contract needs");
            // A channel that is silent still has a scale, as in the authors' code.
            let scales: Vec<f64> =
                means.iter().map(|&mean| f64::from(mean).powf(self.alpha) + 1e-6).collect();
            best(&context.block.sites[site].name, weight, Metric::Scales(&scales), rank)
        };
        let rank = |site: &Site| self.size.rank(site);
        let sites = factor("asvd", (context, targets), (state, stats), rank, thin)?;
        Ok(PassReport { sites })
    }
}
