//! The closed-form update of SVD-LLM (Wang et al. 2024, arXiv:2403.07378, first version, section 3.2): of a factored weight
//! `up · down` the factor `up` is fitted again to the original weight on the activations that now come in.
//!
//! `up = W H downᵀ (down H downᵀ)⁻¹` minimises `tr((W − up·down) H (W − up·down)ᵀ)`. `W [out, in]` is the original weight,
//! `hessian [in, in]` that of the compressed stream. Cost O(r·in² + out·in·r). It pays where `down` was chosen on other
//! activations: behind svd, asvd, or svd_llm, whose statistics are those of the original model.

use attar_ir::{
    Block, BlockState, BlockStats, Contract, Cost, Factors, FormChange, FormSet, Limits, Needs,
    Pass, PassContext, PassDef, PassError, PassReport, SiteReport, Target, Touches, Upstream,
    Weight, check_finite, recipe::options, relative,
};
use attar_tensor::linalg::{lowrank::refit_up, metric, squares};
use serde::Deserialize;

use crate::common::{cost, hessian, numeric};

/// Registration of `svd_update`.
pub(crate) const DEF: PassDef = PassDef {
    name: "svd_update",
    summary: "fit the second factor of factored weights again, to the original weight on the compressed activations",
    paper: "Wang et al. 2024, arXiv:2403.07378, section 3.2 of the first version",
    example: "\
[[step]]
pass = \"svd_llm\"
ratio = 0.2
[[step]]
pass = \"svd_update\"
[[emit]]
layout = \"dense\"
",
    takes_scheme: false,
    symmetric_by_default: false,
    build: |table| {
        let Options {} = options(table)?;
        Ok(Box::new(SvdUpdate))
    },
    schema: || schemars::schema_for!(Options),
};

#[derive(Debug, Clone, Copy, Default, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct Options {}

#[derive(Debug)]
struct SvdUpdate;

impl Pass for SvdUpdate {
    fn name(&self) -> &'static str {
        "svd_update"
    }

    fn contract(&self) -> Contract {
        Contract {
            accepts: FormSet::FACTORED_FLOAT,
            produces: FormChange::NONE,
            needs: Needs::HESSIAN,
            upstream: Upstream::Compressed,
            touches: Touches::Sites,
            looks_ahead: false,
        }
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
        let mut sites = Vec::new();
        for target in targets {
            let site = &context.block.sites[target.site];
            let original = context.original[target.site].as_ref();
            let original = original.expect("the walk brings what is asked for");
            let h = hessian(stats, context.block, target.site);
            let h = h.expect("the plan provides what the contract needs");
            check_finite(&site.name, "the Hessian", h)?;
            let factors = state.linears[target.site].weight.as_factored();
            let factors = factors.expect("the plan proved factors");
            let down = factors.down.values().into_owned();
            let up = refit_up(original, &down, h).map_err(|error| numeric(&site.name, &error))?;
            let fitted = Factors::dense(down, up);
            let delta = &fitted.product() - original;
            sites.push(SiteReport {
                site: site.name.clone(),
                pass: "svd_update".into(),
                weight_error: relative(squares(&delta), squares(original)),
                output_error: Some(relative(metric(&delta, h), metric(original, h))),
                events: Vec::new(),
            });
            state.linears[target.site].weight = Weight::Factored(Box::new(fitted));
            state.weight_changed[target.site] = true;
        }
        Ok(PassReport { sites })
    }
}
