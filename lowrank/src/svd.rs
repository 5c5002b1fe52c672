//! Truncated singular value decomposition: `W ≈ U_r Σ_r V_rᵀ`, the nearest matrix of rank r in the Frobenius norm (Eckart
//! and Young 1936).
//!
//! `weight [out, in]` becomes `up = U_r [out, r]` and `down = Σ_r V_rᵀ [r, in]`; `r (out + in)` numbers stand for `out · in`.
//! Cost O(min² · max). No calibration: the baseline of the passes that know activations.

use attar_ir::{
    Block, BlockState, BlockStats, Contract, Cost, FormChange, FormSet, Limits, Needs, Pass,
    PassContext, PassDef, PassError, PassReport, Site, Target, Touches, Upstream, recipe::options,
};
use attar_tensor::{Mat, linalg::lowrank::Metric};

use crate::{
    common::{best, cost, factor, values},
    options::{Options, Size, Solver},
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
        let options: Options = options(table)?;
        Ok(Box::new(Svd(options.size()?, options.solver)))
    },
    schema: || schemars::schema_for!(Options),
};

#[derive(Debug)]
struct Svd(Size, Solver);

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

    fn chooses_ranks(&self) -> Option<Needs> {
        self.0.chooses().then_some(Needs::empty())
    }

    fn spectrum(
        &self,
        block: &Block,
        site: usize,
        weight: &Mat,
        _: &BlockStats,
    ) -> Result<Vec<f64>, PassError> {
        values(&block.sites[site].name, weight, Metric::Plain)
    }

    fn with_ranks(&self, sites: &[(Site, Vec<f64>)]) -> Result<Box<dyn Pass>, String> {
        Ok(Box::new(Self(self.0.choose(sites)?, self.1)))
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
            best((context, self.1), site, weight, Metric::Plain, rank)
        };
        let rank = |site: &Site| self.0.rank(site);
        let sites = factor("svd", (context, targets), (state, stats), rank, thin)?;
        Ok(PassReport { sites })
    }
}
