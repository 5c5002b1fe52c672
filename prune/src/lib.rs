//! Pruning passes. Those on blocks ([`PASSES`]) set weights of one block to zero, by the fraction or in the pattern
//! that was asked for. Those on the model as a whole ([`MODEL_PASSES`]) take whole channels, heads and blocks away,
//! so that any runtime loads what is left.

mod cut;
mod depth;
mod ffn;
mod heads;
mod hidden;
mod magnitude;
mod options;
mod owl;
mod sparsegpt;
mod wanda;

use attar_ir::{ModelPassDef, PassDef};

/// Every pass of this crate on one block after the other.
pub const PASSES: &[PassDef] = &[magnitude::DEF, wanda::DEF, sparsegpt::DEF];

/// Every pass of this crate on the model as a whole.
pub const MODEL_PASSES: &[ModelPassDef] =
    &[depth::DEF, ffn::DEF, heads::GROUPS, heads::HEADS, hidden::DEF];
