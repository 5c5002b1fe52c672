//! The visible list of all passes and layouts.

use attar_ir::PassDef;
use attar_tensor::LayoutSpec;

/// Every pass that recipes may name.
pub(crate) fn passes() -> Vec<&'static PassDef> {
    attar_quant::PASSES.iter().chain(attar_prune::PASSES).collect()
}

/// The half of each layout that planning reads.
pub(crate) fn layouts() -> Vec<&'static dyn LayoutSpec> {
    let packed = attar_kernels::LAYOUTS.iter().map(|layout| *layout as &dyn LayoutSpec);
    packed.chain([&attar_ir::plan::Dense as &dyn LayoutSpec]).collect()
}
