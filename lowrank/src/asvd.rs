//! ASVD: singular values of the weight with each input channel scaled by the size of its activations (Yuan et al. 2023,
//! arXiv:2312.05821, eq. 6 to 8).
//!
//! With `S = diag(mean |x_j|^alpha)` the best approximation of `W S` of rank r is taken and S divided out again:
//! `W ≈ U_r Σ_r V_rᵀ S⁻¹`. `weight [out, in]`. Cost O(min² · max). The paper's alpha is 0.5.
//!
//! Deliberate differences from the authors' code: S is never inverted (`up = U_r`, `down = U_rᵀ W`, the same product);
//! ranks are those that the step asks for, not searched by perplexity.

use attar_ir::{
    Block, BlockState, BlockStats, Contract, Cost, FormChange, FormSet, Limits, Needs, Pass,
    PassContext, PassDef, PassError, PassReport, Site, Target, Touches, Upstream,
    recipe::{RecipeError, options},
};
use attar_tensor::{Mat, linalg::lowrank::Metric};
use serde::Deserialize;

use crate::{
    common::{best, cost, factor, values},
    options::{Options, Share, Size, Solver},
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
        let own: AsvdOptions = options(table)?;
        let AsvdOptions { rank, ratio, share, energy, multiple_of, solver, alpha } = own;
        if !(0.0..=2.0).contains(&alpha) {
            let reason = format!("expected a number from 0 to 2, got {alpha}");
            return Err(RecipeError::invalid("alpha", reason));
        }
        let size = Options { rank, ratio, share, energy, multiple_of, solver }.size()?;
        Ok(Box::new(Asvd { size, solver, alpha }))
    },
    schema: || schemars::schema_for!(AsvdOptions),
};

#[derive(Debug, Clone, Copy, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct AsvdOptions {
    /// Rank of every site's factors, instead of a ratio.
    rank: Option<usize>,
    /// Fraction of the parameters that is taken away; 0.2 where nothing else is given.
    ratio: Option<f64>,
    /// With a ratio: `site` takes it of each site, `model` shares one budget out among all sites of the step.
    share: Share,
    /// Fraction of the squared singular values that each site keeps (in the metric of the pass), instead of a ratio.
    energy: Option<f64>,
    /// Chosen ranks are rounded to multiples of it.
    multiple_of: usize,
    /// `exact`, or `randomized`: much faster where the rank is a small part of the width, within the error bound that the
    /// report states.
    solver: Solver,
    /// Power of the mean absolute activation; 0 is svd.
    alpha: f64,
}

impl Default for AsvdOptions {
    fn default() -> Self {
        let Options { rank, ratio, share, energy, multiple_of, solver } = Options::default();
        Self { rank, ratio, share, energy, multiple_of, solver, alpha: 0.5 }
    }
}

#[derive(Debug)]
struct Asvd {
    size: Size,
    solver: Solver,
    alpha: f64,
}

impl Asvd {
    /// The diagonal of S.
    fn scales(&self, block: &Block, site: usize, stats: &BlockStats) -> Vec<f64> {
        let input = stats.input(block.input_of(site));
        let means = input.and_then(|input| input.abs_mean.as_ref());
        let means = means.expect("the plan provides what the contract needs");
        // A channel that is silent still has a scale, as in the authors' code.
        means.iter().map(|&mean| f64::from(mean).powf(self.alpha) + 1e-6).collect()
    }
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
            upstream: Upstream::Original,
            touches: Touches::Sites,
            looks_ahead: false,
        }
    }

    fn rank(&self, site: &Site) -> Result<Option<usize>, String> {
        self.size.rank(site).map(Some)
    }

    fn chooses_ranks(&self) -> Option<Needs> {
        self.size.chooses().then_some(Needs::ABS_MEAN)
    }

    fn spectrum(
        &self,
        block: &Block,
        site: usize,
        weight: &Mat,
        stats: &BlockStats,
    ) -> Result<Vec<f64>, PassError> {
        let scales = self.scales(block, site, stats);
        values(&block.sites[site].name, weight, Metric::Scales(&scales))
    }

    fn with_ranks(&self, sites: &[(Site, Vec<f64>)]) -> Result<Box<dyn Pass>, String> {
        let Self { solver, alpha, .. } = *self;
        Ok(Box::new(Self { size: self.size.choose(sites)?, solver, alpha }))
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
            let scales = self.scales(context.block, site, stats);
            best((context, self.solver), site, weight, Metric::Scales(&scales), rank)
        };
        let rank = |site: &Site| self.size.rank(site);
        let sites = factor("asvd", (context, targets), (state, stats), rank, thin)?;
        Ok(PassReport { sites })
    }
}
