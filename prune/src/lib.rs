//! Pruning passes. Each sets weights of one block to zero, by the fraction or in the pattern that was asked for;
//! [`PASSES`] is the list that recipes may name.

mod magnitude;
mod options;
mod owl;
mod sparsegpt;
mod wanda;

use attar_ir::PassDef;

/// Every pass of this crate.
pub const PASSES: &[PassDef] = &[magnitude::DEF, wanda::DEF, sparsegpt::DEF];
