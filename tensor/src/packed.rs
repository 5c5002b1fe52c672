//! Packed weights: named byte tensors in a layout, as a file stores them and a kernel eats them.

use serde::{Deserialize, Serialize};

use crate::{DType, QuantScheme, Tensor};

/// The name of a packed layout, as recipes and manifests write it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct LayoutId(pub &'static str);

impl std::fmt::Display for LayoutId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

/// What planning knows of a linear before its weights are read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinearSpec {
    /// Tensor name without `.weight`, e.g. `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// Rows of the weight.
    pub out_features: usize,
    /// Columns of the weight.
    pub in_features: usize,
    /// Bits, group, symmetry, scale grid.
    pub scheme: QuantScheme,
    /// Dtype of the tensor in the source checkpoint (compressed-tensors scales take it).
    pub source_dtype: DType,
}

/// Name suffix, dtype and shape of one tensor that a layout stores for a linear.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PartHeader {
    /// Suffix behind the linear's name, e.g. `qweight`.
    pub suffix: &'static str,
    /// Element type.
    pub dtype: DType,
    /// Shape, outermost first.
    pub shape: Vec<usize>,
}

impl PartHeader {
    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size()
    }
}

/// One linear in a packed layout.
#[derive(Debug, Clone, PartialEq)]
pub struct PackedLinear {
    /// Where the bits sit.
    pub layout: LayoutId,
    /// Bits, group, symmetry, scale grid.
    pub scheme: QuantScheme,
    /// Rows of the weight.
    pub out_features: usize,
    /// Columns of the weight.
    pub in_features: usize,
    /// `(suffix, tensor)` in the layout's own order.
    pub parts: Vec<(&'static str, Tensor)>,
}

impl PackedLinear {
    /// The part with this suffix.
    pub fn part(&self, suffix: &str) -> Option<&Tensor> {
        self.parts.iter().find(|(name, _)| *name == suffix).map(|(_, tensor)| tensor)
    }

    /// Bytes of all parts.
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(|(_, tensor)| tensor.bytes().len()).sum()
    }
}
