//! Forward and backward passes of decoder models, one block at a time, and what calibration observes there.
//!
//! One generic decoder is described by data ([`DecoderSpec`]); families differ only in how their
//! config.json is read ([`spec::ARCHS`]). Nothing here knows files: tensors come from a
//! [`attar_tensor::TensorSource`], spilled activations go to a file the caller opens.

mod attention;
mod backward;
mod block;
mod decoder;
mod descent;
mod evaluate;
mod generate;
mod gradients;
mod lesson;
mod rope;
mod slopes;
pub mod spec;
mod stream;
mod training;

pub use attention::QkNorm;
pub use backward::{BlockGradient, BlockWeights, Differentiable, Space, Tape, embed_backward};
pub use block::{BlockRun, Timing, observe_block};
pub use decoder::Decoder;
pub use evaluate::{
    BlockOps, LinearOp, Linears, LowRankOp, WeightSource, embed, final_logits, run_block,
};
pub use generate::{Generator, Sampling};
pub use gradients::sweep_gradients;
pub use lesson::{LANES, Lesson};
pub use slopes::loss_slopes;
pub use spec::{DecoderSpec, RopeKind, RopeSpec};
pub use stream::{Spill, Stream};
pub use training::{Objective, StepMemory, Student, training_step};

/// Why a model could not be read or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// config.json lacks a fact or states one that is not supported.
    #[error("config.json: {0}")]
    Config(String),
    /// A tensor that the config promises is missing or has another shape.
    #[error("tensor {name}: {reason}")]
    Tensor {
        /// Its name.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// A tensor could not be read.
    #[error(transparent)]
    Source(#[from] attar_tensor::SourceError),
    /// Spilled activations could not be written or read.
    #[error("scratch file: {0}; free space there or raise the memory limit")]
    Spill(#[from] std::io::Error),
}
