//! Pruning passes. Those on the model as a whole ([`MODEL_PASSES`]) take whole channels, heads and blocks away, so
//! that any runtime loads what is left.

mod cut;
mod depth;
mod ffn;
mod heads;
mod hidden;

use attar_ir::ModelPassDef;

/// Every pass of this crate on the model as a whole.
pub const MODEL_PASSES: &[ModelPassDef] =
    &[depth::DEF, ffn::DEF, heads::GROUPS, heads::HEADS, hidden::DEF];
