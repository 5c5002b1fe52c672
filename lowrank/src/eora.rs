//! EoRA: a low-rank correction of what compression did to a weight, in the eigenspace of its inputs (Liu et al. 2024,
//! arXiv:2410.21271, eq. 4 to 7).
//!
//! With `ΔW = W − Ŵ` and `H = Q Λ Qᵀ` the best approximation of rank r of `ΔW Q Λ^½` is taken and `Λ^-½ Qᵀ` multiplied back:
//! the product `B A` with the least `‖(ΔW − BA) X‖²`. `weight [out, in]`, `hessian [in, in]`. Cost O(out·in² + min³).
//!
//! Deliberate differences from the authors' code: H is never inverted (`B = U_r`, `A = U_rᵀ ΔW`, the same product, with U the
//! left singular vectors of `ΔW H^½`), and it is that of the inputs as the compressed model has them, stage by stage.

use attar_ir::{
    Block, BlockState, BlockStats, Contract, Corrected, Cost, Event, Factors, FormChange, FormSet,
    Limits, Needs, Pass, PassContext, PassDef, PassError, PassReport, Site, SiteReport, Target,
    Touches, Upstream, Weight, check_finite,
    recipe::{RecipeError, options},
    relative,
};
use attar_tensor::{
    Mat,
    linalg::{
        lowrank::{Metric, Thin},
        metric, squares,
    },
};
use serde::Deserialize;

use crate::{
    common::{best, bound, cost, hessian},
    options::Solver,
};

/// Registration of `eora`.
pub(crate) const DEF: PassDef = PassDef {
    name: "eora",
    summary: "correct quantized weights by a product of thin matrices, the best on the calibration inputs",
    paper: "Liu et al. 2024, arXiv:2410.21271",
    example: "\
[[step]]
pass = \"gptq\"
scheme = { bits = 3, group_size = 128 }
[[step]]
pass = \"eora\"
rank = 8
",
    takes_scheme: false,
    symmetric_by_default: false,
    build: |table| {
        let (rank, solver) = size(table)?;
        Ok(Box::new(Eora(rank, solver)))
    },
    schema: || schemars::schema_for!(Options),
};

#[derive(Debug, Clone, Copy, Default, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Options {
    /// Rank of every site's correction; 16 where nothing is said.
    rank: Option<usize>,
    /// `exact`, or `randomized`: much faster where the rank is a small part of the width, within the error bound that the
    /// report states.
    solver: Solver,
}

/// Rank of a correction from a step's options.
pub(crate) fn size(table: &toml::Table) -> Result<(usize, Solver), RecipeError> {
    let Options { rank, solver } = options(table)?;
    match rank {
        Some(0) => Err(RecipeError::invalid("rank", "expected a positive integer, got 0")),
        rank => Ok((rank.unwrap_or(16), solver)),
    }
}

#[derive(Debug)]
struct Eora(usize, Solver);

impl Pass for Eora {
    fn name(&self) -> &'static str {
        "eora"
    }

    fn contract(&self) -> Contract {
        contract(Needs::HESSIAN)
    }

    fn rank(&self, _: &Site) -> Result<Option<usize>, String> {
        Ok(Some(self.0))
    }

    fn reads_original(&self) -> bool {
        true
    }

    fn cost(&self, block: &Block, targets: &[Target], _: &Limits) -> Cost {
        cost(block, targets, true)
    }

    fn apply(
        &self,
        context: &PassContext<'_>,
        targets: &[Target],
        state: &mut BlockState,
        stats: &mut BlockStats,
    ) -> Result<PassReport, PassError> {
        let stats = &*stats;
        correct("eora", (context, targets), (state, stats), |site, delta| {
            let name = &context.block.sites[site].name;
            let h = hessian(stats, context.block, site);
            let h = h.expect("the plan provides what the contract needs");
            check_finite(name, "the Hessian", h)?;
            best((context, self.1), site, delta, Metric::Hessian(h), self.0)
        })
    }
}

/// What passes that correct promise.
pub(crate) const fn contract(needs: Needs) -> Contract {
    Contract {
        accepts: FormSet::QUANTIZED_FULL,
        produces: FormChange::CORRECT,
        needs,
        upstream: Upstream::Compressed,
        touches: Touches::Sites,
        looks_ahead: false,
    }
}

/// Puts a correction of what is missing beside every target.
pub(crate) fn correct(
    pass: &'static str,
    (context, targets): (&PassContext<'_>, &[Target]),
    (state, stats): (&mut BlockState, &BlockStats),
    best: impl Fn(usize, &Mat) -> Result<Thin, PassError>,
) -> Result<PassReport, PassError> {
    let mut sites = Vec::new();
    for target in targets {
        let site = &context.block.sites[target.site];
        let original = context.original[target.site].as_ref();
        let original = original.expect("the walk brings what is asked for");
        check_finite(&site.name, "the weight", original)?;
        let base = state.linears[target.site].weight.clone();
        let missing = original - &*base.values();
        let thin = best(target.site, &missing)?;
        let mut events: Vec<Event> = bound(&thin).into_iter().collect();
        let Thin { down, up, .. } = thin;
        let correction = Factors::dense(down, up);
        let left = &missing - &correction.product();
        let h = hessian(stats, context.block, target.site);
        let of_metric = |delta: &Mat, h: &Mat| metric(delta, h);
        if let Some(h) = h {
            let value = relative(of_metric(&left, h), of_metric(&missing, h));
            events.push(Event::Chosen { name: "output error left".into(), value });
        }
        sites.push(SiteReport {
            site: site.name.clone(),
            pass: pass.into(),
            weight_error: relative(squares(&left), squares(original)),
            output_error: h.map(|h| relative(of_metric(&left, h), of_metric(original, h))),
            events,
        });
        let corrected = Corrected { base, correction };
        state.linears[target.site].weight = Weight::Corrected(Box::new(corrected));
    }
    Ok(PassReport { sites })
}
