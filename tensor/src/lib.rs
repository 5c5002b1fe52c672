//! Values: numbers with a shape. No model, no file, no policy.
//!
//! Everything that crosses a crate boundary in Attar is one of these: a [`Tensor`] of raw bytes as it
//! lies in a file, a [`Mat`] in working precision, a [`QuantizedLinear`] (layout-neutral codes, scales
//! and zero points), a [`BlockQuantized`] (codes with two-level scales), or a [`PackedLinear`] (the bytes a
//! kernel eats).

pub mod block_search;
pub mod blocks;
pub mod column_solver;
pub mod compare;
pub mod dtype;
pub mod grid;
pub mod linalg;
pub mod mask;
pub mod packed;
pub mod quantized;
pub mod rng;
pub mod scheme;
pub mod scratch;
pub mod store;
#[allow(
    clippy::module_inception,
    reason = "the crate and its central value share the field's name"
)]
pub mod tensor;

pub use blocks::{BlockQuantized, BlockType};
pub use dtype::DType;
pub use mask::Pattern;
pub use packed::{LayoutError, LayoutId, LayoutSpec, LinearSpec, PackedLinear, PartHeader};
pub use quantized::QuantizedLinear;
pub use scheme::{ActivationScheme, Granularity, QuantScheme, ScaleGrid};
pub use scratch::{Scratch, Shelf};
pub use store::{SourceError, TensorHeader, TensorSink, TensorSource};
pub use tensor::{Tensor, TensorView};

/// A row-major matrix in working precision, f32.
pub type Mat = ndarray::Array2<f32>;
