//! Passes that learn from the original model. [`PASSES`] is the list that recipes may name; what trains them
//! ([`AdamW`], [`Schedule`], [`clip_norm`], [`Order`]) serves whole-model distillation as well.

mod adamw;
mod clip;
mod dense;
mod fake;
mod learner;
mod logits;
mod loss;
mod order;
mod reconstruct;
mod rounding;
mod schedule;
mod start;
#[cfg(test)]
mod testing;
mod trainer;

pub use adamw::{AdamW, Moments};
use attar_ir::{ModelPassDef, PassDef};
pub use clip::{clip_norm, norm};
pub use learner::{Learner, Trained, fake_quantize};
pub use order::Order;
pub use schedule::{Decay, Schedule};

/// Every pass of this crate on one block after the other.
pub const PASSES: &[PassDef] = &[rounding::DEF, reconstruct::DEF];

/// Every pass of this crate on the model as a whole.
pub const MODEL_PASSES: &[ModelPassDef] = &[logits::DEF];
