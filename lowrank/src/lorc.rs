//! LoRC: a low-rank correction of what quantization did to a weight (Yao et al. 2023, ZeroQuant-V2, arXiv:2303.08302,
//! section 5): the truncated singular value decomposition of `ΔW = W − Ŵ`, `Ŵ + U_r Σ_r V_rᵀ`.
//!
//! `weight [out, in]`. Cost O(min² · max). No calibration: what eora is without the metric of the inputs.

use attar_ir::{
    Block, BlockState, BlockStats, Contract, Cost, Limits, Needs, Pass, PassContext, PassDef,
    PassError, PassReport, Site, Target,
};
use attar_tensor::linalg::lowrank::Metric;

use crate::{
    common::{best, cost},
    eora::{Options, contract, correct, size},
    options::Solver,
};

/// Registration of `lorc`.
pub(crate) const DEF: PassDef = PassDef {
    name: "lorc",
    summary: "correct quantized weights by a product of thin matrices, the nearest by their numbers; no calibration",
    paper: "Yao et al. 2023, arXiv:2303.08302",
    example: "\
[[step]]
pass = \"rtn\"
scheme = { bits = 3, group_size = 128 }
[[step]]
pass = \"lorc\"
rank = 8
",
    takes_scheme: false,
    symmetric_by_default: false,
    build: |table| {
        let (rank, solver) = size(table)?;
        Ok(Box::new(Lorc(rank, solver)))
    },
    schema: || schemars::schema_for!(Options),
};

#[derive(Debug)]
struct Lorc(usize, Solver);

impl Pass for Lorc {
    fn name(&self) -> &'static str {
        "lorc"
    }

    fn contract(&self) -> Contract {
        contract(Needs::empty())
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
        correct("lorc", (context, targets), (state, stats), |site, delta| {
            best((context, self.1), site, delta, Metric::Plain, self.0)
        })
    }
}
