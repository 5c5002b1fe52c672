//! SVD-LLM: truncation-aware whitening (Wang et al. 2024, arXiv:2403.07378, section 3.1).
//!
//! Minimises `‖WX − W'X‖²` over W' of rank r: with `H = 2/n XXᵀ = L Lᵀ` the singular values of `W L` are what cutting them
//! costs, so `W' = U_r Σ_r V_rᵀ L⁻¹`. `weight [out, in]`, `hessian [in, in]`. Cost O(out·in² + min³).
//!
//! Deliberate differences from the authors' code: L is never inverted, since `U_r Σ_r V_rᵀ L⁻¹ = U_r U_rᵀ W`, so no dampening
//! enters where the smaller side is the output. As there, H is that of the original model. The closed-form update of U on
//! the compressed stream (section 3.2 of the paper's first version) is the step `svd_update` behind this one; with
//! `upstream = "compressed"` statistics come stage by stage behind what was factored before, and U is that optimum already.

use attar_ir::{
    Block, BlockState, BlockStats, Contract, Cost, FormChange, FormSet, Limits, Needs, Pass,
    PassContext, PassDef, PassError, PassReport, Site, Target, Touches, Upstream, check_finite,
    recipe::options,
};
use attar_tensor::{Mat, linalg::lowrank::Metric};

use crate::{
    common::{best, cost, factor, hessian, values},
    options::{Options, Size, Solver},
};

/// Registration of `svd_llm`.
pub(crate) const DEF: PassDef = PassDef {
    name: "svd_llm",
    summary: "put two thin matrices in the place of each, the nearest by what they put out on the calibration inputs",
    paper: "Wang et al. 2024, arXiv:2403.07378",
    example: "\
[[step]]
pass = \"svd_llm\"
ratio = 0.2
share = \"model\"
multiple_of = 16
[[step]]
pass = \"gptq\"
scheme = { bits = 4, group_size = 16 }
",
    takes_scheme: false,
    symmetric_by_default: false,
    build: |table| {
        let options: Options = options(table)?;
        Ok(Box::new(SvdLlm(options.size()?, options.solver)))
    },
    schema: || schemars::schema_for!(Options),
};

#[derive(Debug)]
struct SvdLlm(Size, Solver);

impl Pass for SvdLlm {
    fn name(&self) -> &'static str {
        "svd_llm"
    }

    fn contract(&self) -> Contract {
        Contract {
            accepts: FormSet::DENSE_FLOAT,
            produces: FormChange::FACTOR,
            needs: Needs::HESSIAN,
            upstream: Upstream::Original,
            touches: Touches::Sites,
            looks_ahead: false,
        }
    }

    fn rank(&self, site: &Site) -> Result<Option<usize>, String> {
        self.0.rank(site).map(Some)
    }

    fn chooses_ranks(&self) -> Option<Needs> {
        self.0.chooses().then_some(Needs::HESSIAN)
    }

    fn spectrum(
        &self,
        block: &Block,
        site: usize,
        weight: &Mat,
        stats: &BlockStats,
    ) -> Result<Vec<f64>, PassError> {
        let name = &block.sites[site].name;
        let h = hessian(stats, block, site).expect("the plan provides what is asked for");
        check_finite(name, "the Hessian", h)?;
        values(name, weight, Metric::Hessian(h))
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
        let stats = &*stats;
        let thin = |site: usize, weight: &_, rank| {
            let name = &context.block.sites[site].name;
            let h = hessian(stats, context.block, site);
            let h = h.expect("the plan provides what the contract needs");
            check_finite(name, "the Hessian", h)?;
            best((context, self.1), site, weight, Metric::Hessian(h), rank)
        };
        let rank = |site: &Site| self.0.rank(site);
        let sites = factor("svd_llm", (context, targets), (state, stats), rank, thin)?;
        Ok(PassReport { sites })
    }
}
