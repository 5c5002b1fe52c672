//! The visible list of all passes and layouts.

use attar_ir::{ModelPassDef, PassDef, recipe::Known};
use attar_tensor::LayoutSpec;

/// Every pass that recipes may name.
#[derive(Debug)]
pub(crate) struct Passes {
    /// Those on the model as a whole.
    pub(crate) model: Vec<&'static ModelPassDef>,
    /// Those on one block after the other.
    pub(crate) block: Vec<&'static PassDef>,
}

impl Passes {
    /// As recipes take them.
    pub(crate) fn as_known(&self) -> Known<'_> {
        Known { block: &self.block, model: &self.model }
    }
}

/// Every pass that recipes may name.
pub(crate) fn known() -> Passes {
    Passes {
        model: attar_quant::MODEL_PASSES
            .iter()
            .chain(attar_prune::MODEL_PASSES)
            .chain(attar_distill::MODEL_PASSES)
            .collect(),
        block: attar_quant::PASSES
            .iter()
            .chain(attar_prune::PASSES)
            .chain(attar_lowrank::PASSES)
            .chain(attar_distill::PASSES)
            .collect(),
    }
}

/// The half of each layout that planning reads.
pub(crate) fn layouts() -> Vec<&'static dyn LayoutSpec> {
    let packed = attar_kernels::LAYOUTS.iter().map(|layout| *layout as &dyn LayoutSpec);
    packed.chain([&attar_ir::plan::Dense as &dyn LayoutSpec]).collect()
}
