//! Truncated singular value decomposition: `W ≈ U_r Σ_r V_rᵀ`, the nearest matrix of rank r in the Frobenius norm (Eckart
//! and Young 1936).
//!
//! `weight [out, in]` becomes `up = U_r [out, r]` and `down = Σ_r V_rᵀ [r, in]`; `r (out + in)` numbers stand for `out · in`.
//! Cost O(min² · max). No calibration: the baseline of the passes that know activations.

use attar_ir::{
    Block, BlockState, BlockStats, Contract, Cost, FormChange, FormSet, Limits, Needs, Pass,
    PassContext, PassDef, PassError, PassReport, Site, Target, Touches, Upstream, recipe::options,
};
use attar_tensor::linalg::lowrank::Metric;
use serde::Deserialize;

use crate::{
    common::{best, cost, factor},
    options::Size,
};

/// Registration of `svd`.
pub(crate) const DEF: PassDef = PassDef {
    name: "svd",
    summary: "put two thin matrices in the place of each, the nearest by their numbers; no calibration",
    paper: "Eckart and Young 1936, doi:10.1007/BF02288367",
    example: "\
[[step]]
pass = \"svd\"
ratio = 0.2
[[emit]]
layout = \"dense\"
",
    takes_scheme: false,
    symmetric_by_default: false,
    build: |table| {
        let Options { rank, ratio, multiple_of } = options(table, KEYS)?;
        Ok(Box::new(Svd(Size::of(rank, ratio, multiple_of, USUAL)?)))
    },
    schema: || schemars::schema_for!(Options),
};

/// Options of every pass that factors.
pub(crate) const KEYS: &[&str] = &["rank", "ratio", "multiple_of"];
/// What is done where neither a rank nor a ratio is given.
pub(crate) const USUAL: Size = Size::Ratio { ratio: 0.2, multiple_of: 1 };

#[derive(Debug, Clone, Copy, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct Options {
    /// Rank of every site's factors, instead of a ratio.
    rank: Option<usize>,
    /// Fraction of each site's parameters that is taken away; 0.2 when there is no rank either.
    ratio: Option<f64>,
    /// With a ratio: ranks are rounded down to multiples of it.
    multiple_of: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { rank: None, ratio: None, multiple_of: 1 }
    }
}

#[derive(Debug)]
struct Svd(Size);

impl Pass for Svd {
    fn name(&self) -> &'static str {
        "svd"
    }

    fn contract(&self) -> Contract {
        Contract {
            accepts: FormSet::DENSE_FLOAT,
            produces: FormChange::FACTOR,
            needs: Needs::empty(),
            upstream: Upstream::Compressed,
            touches: Touches::Sites,
            looks_ahead: false,
        }
    }

    fn rank(&self, site: &Site) -> Result<Option<usize>, String> {
        self.0.rank(site).map(Some)
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
        let thin = |site: usize, weight: &_, rank| {
            best(&context.block.sites[site].name, weight, Metric::Plain, rank)
        };
        let rank = |site: &Site| self.0.rank(site);
        let sites = factor("svd", (context, targets), (state, stats), rank, thin)?;
        Ok(PassReport { sites })
    }
}
