//! One block's weights in flight.

use attar_tensor::{Mat, QuantizedLinear};

/// The weight of one linear, in one of the forms of [`crate::Form`].
#[derive(Debug, Clone, PartialEq)]
pub enum Weight {
    /// `[out_features, in_features]`, f32.
    Dense(Mat),
    /// Codes, scales and zero points.
    Quantized(QuantizedLinear),
}

impl Weight {
    /// The float weight, when it is one.
    pub const fn as_dense(&self) -> Option<&Mat> {
        match self {
            Self::Dense(weight) => Some(weight),
            Self::Quantized(_) => None,
        }
    }

    /// The quantized weight, when it is one.
    pub const fn as_quantized(&self) -> Option<&QuantizedLinear> {
        match self {
            Self::Dense(_) => None,
            Self::Quantized(weight) => Some(weight),
        }
    }
}

/// One linear in flight.
#[derive(Debug, Clone, PartialEq)]
pub struct LinearState {
    /// Its weight.
    pub weight: Weight,
    /// `[out_features]`.
    pub bias: Option<Vec<f32>>,
}

/// One block in flight. `linears[i]` belongs to `block.sites[i]`, `norms[i]` to `block.norms[i]`.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockState {
    /// [`crate::Block::index`].
    pub index: usize,
    /// Weights and biases of the sites.
    pub linears: Vec<LinearState>,
    /// Weights of the norms, `[width]` each.
    pub norms: Vec<Vec<f32>>,
    /// True for linears and norms that a pass changed and that must be written anew: bit i for
    /// `linears[i]`'s bias, see [`BlockState::norm_changed`].
    pub bias_changed: Vec<bool>,
    /// Norms that a fold changed.
    pub norm_changed: Vec<bool>,
    /// Dense linears whose values a pass changed.
    pub weight_changed: Vec<bool>,
}

impl BlockState {
    /// A block as loaded, nothing changed yet.
    pub fn new(index: usize, linears: Vec<LinearState>, norms: Vec<Vec<f32>>) -> Self {
        let (l, n) = (linears.len(), norms.len());
        Self {
            index,
            linears,
            norms,
            bias_changed: vec![false; l],
            norm_changed: vec![false; n],
            weight_changed: vec![false; l],
        }
    }
}
