//! Packed weights: named byte tensors in a layout, as a file stores them and a kernel eats them.

use serde::{Deserialize, Serialize};

use crate::{BlockType, DType, QuantScheme, ScaleGrid, Tensor};

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

/// The half of a layout that planning needs: names and sizes of what it stores, and why it cannot
/// carry a scheme. The half that moves bits lives with the kernels.
pub trait LayoutSpec: std::fmt::Debug + Send + Sync {
    /// Name as recipes and manifests write it.
    fn id(&self) -> LayoutId;

    /// The tensors that store this linear, in the layout's order, without an order of columns
    /// (`g_idx`) unless the layout always stores one.
    ///
    /// # Errors
    /// Why the layout cannot carry the scheme or the shape.
    fn parts(&self, linear: &LinearSpec) -> Result<Vec<PartHeader>, LayoutError>;

    /// Bytes of all parts.
    ///
    /// # Errors
    /// As [`LayoutSpec::parts`].
    fn parts_bytes(&self, linear: &LinearSpec) -> Result<usize, LayoutError> {
        Ok(self.parts(linear)?.iter().map(PartHeader::bytes).sum())
    }

    /// Dtype in which the scales of a tensor of dtype `source` are stored.
    fn scale_dtype(&self, source: DType) -> DType;

    /// The grid on which scales must lie so that packing is exact.
    fn scale_grid(&self, source: DType) -> ScaleGrid {
        match self.scale_dtype(source) {
            DType::F16 => ScaleGrid::F16,
            DType::BF16 => ScaleGrid::Bf16,
            _ => ScaleGrid::F32,
        }
    }

    /// The block type, when a weight is one tensor of blocks: such a layout carries
    /// [`crate::BlockQuantized`] weights of this type, and what of affine ones it can.
    fn block_type(&self) -> Option<BlockType> {
        None
    }

    /// The scheme of this layout itself for rows of `in_features`, for steps that give none: a block type, or
    /// the one that stands in where its blocks do not divide the rows.
    fn own_scheme(&self, _in_features: usize) -> Option<QuantScheme> {
        None
    }

    /// Smallest zero point that the layout can store.
    fn zero_min(&self) -> u8 {
        0
    }

    /// True when runtimes of this layout fuse linears that read the same input (q/k/v, gate/up), so that
    /// these must share one scheme.
    fn fuses_siblings(&self) -> bool {
        true
    }

    /// True when linears may be written as two thin ones, `<name>.down` and `<name>.up`.
    fn takes_factors(&self) -> bool {
        false
    }
}

/// Why a layout cannot carry a linear, or why bytes are not what the layout says. The caller, who
/// knows the name of the linear, adds it.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum LayoutError {
    /// The layout has no code of this width.
    #[error("layout {layout} stores {supported} bits, not {bits}; choose another width or layout")]
    Bits {
        /// The layout.
        layout: LayoutId,
        /// Bits asked for.
        bits: u8,
        /// Bits it has, for people.
        supported: &'static str,
    },
    /// A dimension is not a multiple of what the layout packs together.
    #[error(
        "layout {layout} needs {dimension} to be a multiple of {multiple}, got {size}; leave this \
         linear unquantized or choose another layout"
    )]
    Multiple {
        /// The layout.
        layout: LayoutId,
        /// `in_features` or `out_features`.
        dimension: &'static str,
        /// Its size.
        size: usize,
        /// What it must be a multiple of.
        multiple: usize,
    },
    /// The group size does not divide the columns.
    #[error("group_size {group_size} does not divide in_features {in_features}")]
    Group {
        /// Columns that share a scale.
        group_size: usize,
        /// Columns of the weight.
        in_features: usize,
    },
    /// The layout cannot store scales for this dtype.
    #[error("layout {layout} cannot store scales as {dtype}; it stores them as f16, bf16 or f32")]
    ScaleDtype {
        /// The layout.
        layout: LayoutId,
        /// Dtype asked for.
        dtype: DType,
    },
    /// The layout has no place for an order of columns.
    #[error("layout {layout} stores no column order (g_idx); use static groups or another layout")]
    ColumnOrder {
        /// The layout.
        layout: LayoutId,
    },
    /// A scale that the layout's dtype cannot represent.
    #[error(
        "scale {scale:e} of row {row}, group {group} is not representable as {dtype}; project scales \
         onto the grid of layout {layout} before rounding codes"
    )]
    Scale {
        /// The layout.
        layout: LayoutId,
        /// Row of the weight.
        row: usize,
        /// Group of columns.
        group: usize,
        /// The value.
        scale: f32,
        /// What it must be exact in.
        dtype: DType,
    },
    /// A zero point that the layout cannot store.
    #[error("zero point {zero} of row {row}, group {group}: layout {layout} stores {min}..={max}")]
    Zero {
        /// The layout.
        layout: LayoutId,
        /// Row of the weight.
        row: usize,
        /// Group of columns.
        group: usize,
        /// The value.
        zero: u16,
        /// Smallest that can be stored.
        min: u16,
        /// Largest that can be stored.
        max: u16,
    },
    /// The integer scale or minimum of a sub-block beyond its range.
    #[error("scale or minimum {value} of row {row}, group {group} is beyond what {layout} stores")]
    SubScale {
        /// The layout.
        layout: LayoutId,
        /// Row of the weight.
        row: usize,
        /// Sub-block of the row.
        group: usize,
        /// The value.
        value: i16,
    },
    /// A scheme that the layout cannot carry for another reason.
    #[error("layout {layout} cannot carry {scheme}: {reason}")]
    Scheme {
        /// The layout.
        layout: LayoutId,
        /// The scheme, for people.
        scheme: String,
        /// Why, and what can be done.
        reason: &'static str,
    },
    /// A code beyond the largest of its width.
    #[error("code {code} of row {row}, column {column} is beyond the largest, {max}")]
    Code {
        /// Row of the weight.
        row: usize,
        /// Column of the weight.
        column: usize,
        /// The value.
        code: u8,
        /// Largest code.
        max: u8,
    },
    /// A column that names a group which does not exist.
    #[error("g_idx of column {column} is {group}, but there are {groups} groups")]
    GroupIndex {
        /// Column of the weight.
        column: usize,
        /// The value.
        group: i64,
        /// Number of groups.
        groups: usize,
    },
    /// A list in the quantized linear has the wrong length.
    #[error("quantized linear: {field} has {got} elements instead of {expected}")]
    Length {
        /// Which field.
        field: &'static str,
        /// Elements that the shape calls for.
        expected: usize,
        /// Elements found.
        got: usize,
    },
    /// A part is not there.
    #[error("layout {layout}: part {suffix} is missing")]
    Missing {
        /// The layout.
        layout: LayoutId,
        /// Suffix of the part.
        suffix: &'static str,
    },
    /// A part has another dtype or shape than the layout says.
    #[error("layout {layout}: part {suffix} is {dtype} {shape:?}, expected {expected}")]
    Part {
        /// The layout.
        layout: LayoutId,
        /// Suffix of the part.
        suffix: &'static str,
        /// Dtype found.
        dtype: DType,
        /// Shape found.
        shape: Vec<usize>,
        /// Dtype and shape expected, for people.
        expected: String,
    },
    /// The bytes are in another layout, or the layout is not known.
    #[error("layout {got} given where {expected} was expected")]
    Layout {
        /// What was expected, for people.
        expected: String,
        /// What was given.
        got: LayoutId,
    },
}
