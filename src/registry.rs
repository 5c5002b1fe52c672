//! The visible list of all passes and layouts.

use attar_ir::PassDef;
use attar_tensor::LayoutSpec;

/// Every pass that recipes may name.
pub(crate) fn passes() -> Vec<&'static PassDef> {
    attar_quant::PASSES.iter().collect()
}

/// The half of each layout that planning reads.
pub(crate) fn layouts() -> Vec<&'static dyn LayoutSpec> {
    attar_kernels::LAYOUTS.iter().map(|layout| *layout as &dyn LayoutSpec).collect()
}
