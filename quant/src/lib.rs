//! Quantization passes. Each maps one block's float weights to codes, scales and zero points (or, for
//! awq and smoothquant, prepares them by scaling); [`PASSES`] is the list that recipes may name.

mod awq;
mod common;
mod gptq;
mod rotate;
mod rtn;
mod smoothquant;
#[cfg(test)]
mod testing;

use attar_ir::{ModelPassDef, PassDef};
pub use rtn::round_to_nearest;

/// Every pass of this crate.
pub const PASSES: &[PassDef] = &[rtn::DEF, gptq::DEF, awq::DEF, smoothquant::DEF];

/// Every pass of this crate on the model as a whole.
pub const MODEL_PASSES: &[ModelPassDef] = &[rotate::DEF];
