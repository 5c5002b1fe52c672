//! What a quantizer was asked for: bits, granularity, symmetry, and the grid its scales must lie on.

use serde::{Deserialize, Serialize};

use crate::BlockType;

/// How many weights share one scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Granularity {
    /// One scale per output row (group size -1 in the tools of the field).
    Channel,
    /// One scale per this many consecutive input columns of a row.
    Group(usize),
}

impl Granularity {
    /// Group size in input columns.
    pub const fn group_size(self, in_features: usize) -> usize {
        match self {
            Self::Channel => in_features,
            Self::Group(size) => size,
        }
    }

    /// `-1` for per-channel, the group size otherwise, as config files of the field write it.
    pub const fn as_config(self) -> i64 {
        match self {
            Self::Channel => -1,
            Self::Group(size) => size as i64,
        }
    }
}

/// The float type that scales are stored in. Quantizers project scales onto it BEFORE rounding codes,
/// so that packing is exact.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScaleGrid {
    /// Any f32.
    F32,
    /// Values representable as bf16.
    Bf16,
    /// Values representable as f16, normal range only.
    F16,
    /// Values representable both as f16 and as bf16 (several layouts in one run).
    F16AndBf16,
    /// The two-level scales and minima of a block type: a [`crate::BlockQuantized`] carries the result.
    Blocks(BlockType),
}

impl ScaleGrid {
    /// The coarsest grid that lies in both. A block type is met by nothing but itself; the plan keeps it
    /// apart from other grids.
    pub const fn intersect(self, other: Self) -> Self {
        match (self, other) {
            (Self::Blocks(block), _) | (_, Self::Blocks(block)) => Self::Blocks(block),
            (Self::F32, grid) | (grid, Self::F32) => grid,
            (Self::F16, Self::F16) => Self::F16,
            (Self::Bf16, Self::Bf16) => Self::Bf16,
            _ => Self::F16AndBf16,
        }
    }

    /// The nearest representable positive scale; never zero, never infinite.
    pub fn project(self, scale: f32) -> f32 {
        // f16 subnormals are avoided: several GPU kernels flush them.
        const F16_MIN: f32 = 6.103_515_6e-5;
        const F16_MAX: f32 = 65504.0;
        let bf16 = |s: f32| half::bf16::from_f32(s).to_f32();
        let f16 = |s: f32| half::f16::from_f32(s.clamp(F16_MIN, F16_MAX)).to_f32();
        match self {
            Self::F32 => scale.max(f32::MIN_POSITIVE),
            Self::Bf16 => bf16(scale.max(f32::MIN_POSITIVE)),
            // One factor of a block's scale.
            Self::F16 | Self::Blocks(_) => f16(scale),
            // A bf16 in f16's normal range has 8 significant bits and is therefore an f16.
            Self::F16AndBf16 => bf16(scale.clamp(F16_MIN, 65280.0)),
        }
    }
}

/// In which numbers the input of a linear enters the product: what the artifact says, whatever kernel eats
/// it.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum ActivationScheme {
    /// As they come: weight-only quantization.
    #[default]
    Float,
    /// Signed bytes, symmetric, one scale for each token, found while it runs (W8A8).
    Int8PerToken,
}

impl ActivationScheme {
    /// True for weight-only quantization.
    pub const fn is_float(&self) -> bool {
        matches!(self, Self::Float)
    }
}

/// Numbers of an affine integer quantization: `w = (code - zero) * scale`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct QuantScheme {
    /// Bits per code: 2, 3, 4 or 8.
    pub bits: u8,
    /// How many weights share a scale.
    pub granularity: Granularity,
    /// Symmetric: the zero point is `2^(bits-1)` for every group.
    pub symmetric: bool,
    /// What the scales are projected onto.
    pub scale_grid: ScaleGrid,
    /// Smallest zero point that every target layout can store (GPTQ v1 stores `zero - 1`, so 1).
    pub zero_min: u8,
    /// What the runtime does to the input.
    #[serde(default, skip_serializing_if = "ActivationScheme::is_float")]
    pub activations: ActivationScheme,
}

impl QuantScheme {
    /// Largest code, `2^bits - 1`.
    pub const fn max_code(self) -> u8 {
        ((1u16 << self.bits) - 1) as u8
    }

    /// Zero point of a symmetric scheme, `2^(bits-1)`.
    pub const fn mid_code(self) -> u8 {
        1 << (self.bits - 1)
    }

    /// Group size in input columns.
    pub const fn group_size(self, in_features: usize) -> usize {
        self.granularity.group_size(in_features)
    }

    /// Number of groups in a row, or `None` when the group size does not divide `in_features`.
    pub const fn groups(self, in_features: usize) -> Option<usize> {
        let size = self.group_size(in_features);
        if size == 0 || !in_features.is_multiple_of(size) { None } else { Some(in_features / size) }
    }

    /// The block type, when the scales are those of one.
    pub const fn block(self) -> Option<BlockType> {
        match self.scale_grid {
            ScaleGrid::Blocks(block) => Some(block),
            _ => None,
        }
    }

    /// Short name as people write it, e.g. `w4 g128 sym`, `w8a8 channel sym` or `q4_k`.
    pub fn label(self) -> String {
        if let Some(block) = self.block() {
            return block.name().to_owned();
        }
        let group = match self.granularity {
            Granularity::Channel => "channel".to_owned(),
            Granularity::Group(size) => format!("g{size}"),
        };
        let activations = match self.activations {
            ActivationScheme::Float => "",
            ActivationScheme::Int8PerToken => "a8",
        };
        let symmetric = if self.symmetric { "sym" } else { "asym" };
        format!("w{}{activations} {group} {symmetric}", self.bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn projection_is_idempotent_and_lies_in_both_grids() {
        for i in 1..2000 {
            let scale = i as f32 * 3.3e-5;
            for grid in [ScaleGrid::F32, ScaleGrid::Bf16, ScaleGrid::F16, ScaleGrid::F16AndBf16] {
                let once = grid.project(scale);
                assert!(once > 0.0 && once.is_finite());
                assert_eq!(once.to_bits(), grid.project(once).to_bits());
            }
            let both = ScaleGrid::F16AndBf16.project(scale);
            assert_eq!(both.to_bits(), half::f16::from_f32(both).to_f32().to_bits());
            assert_eq!(both.to_bits(), half::bf16::from_f32(both).to_f32().to_bits());
        }
    }

    #[test]
    fn zero_scale_becomes_the_smallest_normal() {
        assert!(ScaleGrid::F16.project(0.0) > 0.0);
        assert!(ScaleGrid::Bf16.project(0.0) > 0.0);
    }
}
