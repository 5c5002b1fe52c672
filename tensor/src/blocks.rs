//! Weights in blocks with two-level scales: the types that ggml (llama.cpp) stores.
//!
//! A row is cut into blocks of [`BlockType::size`] weights, a block into sub-blocks of
//! [`BlockType::sub_size`]. Both factors of a sub-block's scale are kept, `d` (f16, one per block) and an
//! integer, so that packing stays exact:
//!
//! ```text
//! scale  = d · sub_scale                  (sub_scale = 1 for types with one level)
//! min    = dmin · sub_min                 (k-quants),  −dmin (q4_1, q5_1),  0 otherwise
//! weight = scale · level(code) − min      level(code) = code − zero, or an entry of a codebook
//! ```
//!
//! All products and the difference are f32, in this order: that is what ggml computes, to the bit.

use half::f16;
use serde::{Deserialize, Serialize};

use crate::{Granularity, LayoutError, Mat, QuantScheme, ScaleGrid};

/// Weights in a block of the k-quants.
pub const SUPER: usize = 256;

/// Values of the 4-bit codes of iq4_nl and iq4_xs.
pub const IQ4_VALUES: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// A block format with integer codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BlockType {
    /// 4 bits around zero, a scale per 32.
    #[serde(rename = "q4_0")]
    Q40,
    /// 4 bits above a minimum, a scale per 32.
    #[serde(rename = "q4_1")]
    Q41,
    /// 5 bits around zero, a scale per 32.
    #[serde(rename = "q5_0")]
    Q50,
    /// 5 bits above a minimum, a scale per 32.
    #[serde(rename = "q5_1")]
    Q51,
    /// 8 bits around zero, a scale per 32.
    #[serde(rename = "q8_0")]
    Q80,
    /// 2 bits above a minimum, per 16 a scale and a minimum of 4 bits.
    #[serde(rename = "q2_k")]
    Q2K,
    /// 3 bits around zero, per 16 a scale of 6 bits.
    #[serde(rename = "q3_k")]
    Q3K,
    /// 4 bits above a minimum, per 32 a scale and a minimum of 6 bits.
    #[serde(rename = "q4_k")]
    Q4K,
    /// 5 bits above a minimum, per 32 a scale and a minimum of 6 bits.
    #[serde(rename = "q5_k")]
    Q5K,
    /// 6 bits around zero, per 16 a scale of 8 bits.
    #[serde(rename = "q6_k")]
    Q6K,
    /// 4 bits into a codebook, a scale per 32.
    #[serde(rename = "iq4_nl")]
    Iq4Nl,
    /// 4 bits into a codebook, per 32 a scale of 6 bits.
    #[serde(rename = "iq4_xs")]
    Iq4Xs,
}

/// What a code of a block type stands for before it is scaled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Levels {
    /// `code − zero`.
    Linear {
        /// The code that means zero; 0 where a minimum is subtracted.
        zero: i16,
    },
    /// An entry of a table.
    Codebook(&'static [i8; 16]),
}

/// How a block type stores minima.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Minimum {
    /// It has none; a code means zero.
    None,
    /// `+dmin` is added, f16, one per block.
    Added,
    /// `dmin · sub_min` is subtracted, `sub_min` in `0..=max`.
    Subtracted {
        /// Largest `sub_min`.
        max: u8,
    },
}

impl BlockType {
    /// All of them, in the order in which they are listed to people.
    pub const ALL: [Self; 12] = [
        Self::Q80,
        Self::Q6K,
        Self::Q5K,
        Self::Q51,
        Self::Q50,
        Self::Q4K,
        Self::Q41,
        Self::Q40,
        Self::Iq4Xs,
        Self::Iq4Nl,
        Self::Q3K,
        Self::Q2K,
    ];

    /// Name as recipes and manifests write it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Q40 => "q4_0",
            Self::Q41 => "q4_1",
            Self::Q50 => "q5_0",
            Self::Q51 => "q5_1",
            Self::Q80 => "q8_0",
            Self::Q2K => "q2_k",
            Self::Q3K => "q3_k",
            Self::Q4K => "q4_k",
            Self::Q5K => "q5_k",
            Self::Q6K => "q6_k",
            Self::Iq4Nl => "iq4_nl",
            Self::Iq4Xs => "iq4_xs",
        }
    }

    /// The type of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|block| block.name() == name)
    }

    /// Weights in a block.
    pub const fn size(self) -> usize {
        match self {
            Self::Q40 | Self::Q41 | Self::Q50 | Self::Q51 | Self::Q80 | Self::Iq4Nl => 32,
            Self::Q2K | Self::Q3K | Self::Q4K | Self::Q5K | Self::Q6K | Self::Iq4Xs => SUPER,
        }
    }

    /// Weights that share a scale.
    pub const fn sub_size(self) -> usize {
        match self {
            Self::Q2K | Self::Q3K | Self::Q6K => 16,
            _ => 32,
        }
    }

    /// Sub-blocks of a block.
    pub const fn subs(self) -> usize {
        self.size() / self.sub_size()
    }

    /// Bytes of a block.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Q40 | Self::Iq4Nl => 18,
            Self::Q41 => 20,
            Self::Q50 => 22,
            Self::Q51 => 24,
            Self::Q80 => 34,
            Self::Q2K => 84,
            Self::Q3K => 110,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
            Self::Iq4Xs => 136,
        }
    }

    /// Bits of a code.
    pub const fn bits(self) -> u8 {
        match self {
            Self::Q2K => 2,
            Self::Q3K => 3,
            Self::Q40 | Self::Q41 | Self::Q4K | Self::Iq4Nl | Self::Iq4Xs => 4,
            Self::Q50 | Self::Q51 | Self::Q5K => 5,
            Self::Q6K => 6,
            Self::Q80 => 8,
        }
    }

    /// Largest code.
    pub const fn max_code(self) -> u8 {
        ((1u16 << self.bits()) - 1) as u8
    }

    /// What a code stands for.
    pub const fn levels(self) -> Levels {
        match self {
            Self::Q41 | Self::Q51 | Self::Q2K | Self::Q4K | Self::Q5K => Levels::Linear { zero: 0 },
            Self::Q40 | Self::Q50 | Self::Q80 | Self::Q3K | Self::Q6K => {
                Levels::Linear { zero: 1 << (self.bits() - 1) }
            }
            Self::Iq4Nl | Self::Iq4Xs => Levels::Codebook(&IQ4_VALUES),
        }
    }

    /// How minima are stored.
    pub const fn minimum(self) -> Minimum {
        match self {
            Self::Q41 | Self::Q51 => Minimum::Added,
            Self::Q2K => Minimum::Subtracted { max: 15 },
            Self::Q4K | Self::Q5K => Minimum::Subtracted { max: 63 },
            _ => Minimum::None,
        }
    }

    /// Range of the integer scales of sub-blocks; `None` for types with one level.
    pub const fn sub_scale_range(self) -> Option<(i8, i8)> {
        match self {
            Self::Q2K => Some((0, 15)),
            Self::Q4K | Self::Q5K => Some((0, 63)),
            Self::Q3K | Self::Iq4Xs => Some((-32, 31)),
            Self::Q6K => Some((i8::MIN, i8::MAX)),
            _ => None,
        }
    }

    /// True when every weight is `(code − zero) · scale`, so that a [`crate::QuantizedLinear`] carries it.
    pub const fn is_affine(self) -> bool {
        matches!(self.levels(), Levels::Linear { .. }) && matches!(self.minimum(), Minimum::None)
    }

    /// True when a weight of exactly zero can be stored beside any other weight.
    pub const fn has_zero(self) -> bool {
        self.is_affine()
    }

    /// Bytes of a row, or `None` when blocks do not divide it.
    pub const fn row_bytes(self, in_features: usize) -> Option<usize> {
        if in_features.is_multiple_of(self.size()) {
            Some(in_features / self.size() * self.bytes())
        } else {
            None
        }
    }

    /// The type in which llama.cpp stores rows that blocks of this type do not divide: one with blocks of
    /// 32, of at least as many bits. `None` for types that have such blocks themselves.
    pub const fn fallback(self) -> Option<Self> {
        match self {
            Self::Q2K | Self::Q3K => Some(Self::Q40),
            Self::Iq4Xs => Some(Self::Iq4Nl),
            Self::Q4K => Some(Self::Q50),
            Self::Q5K => Some(Self::Q51),
            Self::Q6K => Some(Self::Q80),
            _ => None,
        }
    }

    /// The scheme that stands for this type in plans and reports.
    pub const fn scheme(self) -> QuantScheme {
        QuantScheme {
            bits: self.bits(),
            granularity: Granularity::Group(self.sub_size()),
            symmetric: self.is_affine(),
            scale_grid: ScaleGrid::Blocks(self),
            zero_min: 0,
            activations: crate::ActivationScheme::Float,
        }
    }
}

impl std::fmt::Display for BlockType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A linear in blocks, see the head of this module. Rows are whole numbers of blocks.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockQuantized {
    /// The format.
    pub block: BlockType,
    /// Rows of the weight.
    pub out_features: usize,
    /// Columns of the weight.
    pub in_features: usize,
    /// `[out_features, in_features]`, row-major, each in `0..=max_code`.
    pub codes: Vec<u8>,
    /// `[out_features, blocks]`: factor of the scales.
    pub d: Vec<f16>,
    /// `[out_features, blocks]`: factor of the minima, or what is added; empty for types without minima.
    pub dmin: Vec<f16>,
    /// `[out_features, blocks, subs]`; empty for types with one level.
    pub sub_scales: Vec<i8>,
    /// `[out_features, blocks, subs]`; empty unless minima have two levels.
    pub sub_mins: Vec<u8>,
}

impl BlockQuantized {
    /// All codes, scales and minima zero.
    ///
    /// # Panics
    /// When blocks do not divide a row.
    pub fn zeros(block: BlockType, out_features: usize, in_features: usize) -> Self {
        assert!(in_features.is_multiple_of(block.size()), "rows are whole numbers of blocks");
        let blocks = out_features * (in_features / block.size());
        let subs = blocks * block.subs();
        Self {
            block,
            out_features,
            in_features,
            codes: vec![0; out_features * in_features],
            d: vec![f16::ZERO; blocks],
            dmin: if block.minimum() == Minimum::None {
                Vec::new()
            } else {
                vec![f16::ZERO; blocks]
            },
            sub_scales: if block.sub_scale_range().is_some() { vec![0; subs] } else { Vec::new() },
            sub_mins: match block.minimum() {
                Minimum::Subtracted { .. } => vec![0; subs],
                _ => Vec::new(),
            },
        }
    }

    /// Blocks in a row.
    pub const fn blocks(&self) -> usize {
        self.in_features / self.block.size()
    }

    /// Checks lengths and ranges.
    ///
    /// # Errors
    /// [`LayoutError::Multiple`], [`LayoutError::Length`], [`LayoutError::Code`] or
    /// [`LayoutError::SubScale`].
    pub fn check(&self) -> Result<(), LayoutError> {
        let block = self.block;
        if !self.in_features.is_multiple_of(block.size()) {
            return Err(LayoutError::Multiple {
                layout: crate::LayoutId(block.name()),
                dimension: "in_features",
                size: self.in_features,
                multiple: block.size(),
            });
        }
        let blocks = self.out_features * self.blocks();
        let subs = blocks * block.subs();
        let when = |there: bool, count: usize| if there { count } else { 0 };
        let two = matches!(block.minimum(), Minimum::Subtracted { .. });
        let lengths = [
            ("codes", self.out_features * self.in_features, self.codes.len()),
            ("d", blocks, self.d.len()),
            ("dmin", when(block.minimum() != Minimum::None, blocks), self.dmin.len()),
            ("sub_scales", when(block.sub_scale_range().is_some(), subs), self.sub_scales.len()),
            ("sub_mins", when(two, subs), self.sub_mins.len()),
        ];
        for (field, expected, got) in lengths {
            if expected != got {
                return Err(LayoutError::Length { field, expected, got });
            }
        }
        let max = block.max_code();
        if self.codes.iter().fold(0, |a, &b| a.max(b)) > max {
            let at = self.codes.iter().position(|&code| code > max).expect("one is beyond");
            let (row, column) = (at / self.in_features, at % self.in_features);
            return Err(LayoutError::Code { row, column, code: self.codes[at], max });
        }
        let per_row = subs / self.out_features.max(1);
        let fail = |at: usize, value: i16| LayoutError::SubScale {
            layout: crate::LayoutId(block.name()),
            row: at / per_row,
            group: at % per_row,
            value,
        };
        if let Some((low, high)) = block.sub_scale_range()
            && let Some(at) = self.sub_scales.iter().position(|s| *s < low || *s > high)
        {
            return Err(fail(at, i16::from(self.sub_scales[at])));
        }
        if let Minimum::Subtracted { max } = block.minimum()
            && let Some(at) = self.sub_mins.iter().position(|&m| m > max)
        {
            return Err(fail(at, i16::from(self.sub_mins[at])));
        }
        Ok(())
    }

    /// `scale` and `min` of sub-block `sub` of block `at` (counted over all rows).
    pub fn scale_min(&self, at: usize, sub: usize) -> (f32, f32) {
        let d = self.d[at].to_f32();
        let place = at * self.block.subs() + sub;
        let scale = match self.sub_scales.get(place) {
            Some(&s) => d * f32::from(s),
            None => d,
        };
        let min = match self.block.minimum() {
            Minimum::None => 0.0,
            Minimum::Added => -self.dmin[at].to_f32(),
            Minimum::Subtracted { .. } => self.dmin[at].to_f32() * f32::from(self.sub_mins[place]),
        };
        (scale, min)
    }

    /// Writes row `row` of the dequantized weight into `out [in_features]`.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        let codes = &self.codes[row * self.in_features..(row + 1) * self.in_features];
        let sub_size = self.block.sub_size();
        let first = row * self.blocks();
        let spans = out.chunks_exact_mut(sub_size).zip(codes.chunks_exact(sub_size));
        for (at, (out, codes)) in spans.enumerate() {
            let (scale, min) =
                self.scale_min(first + at / self.block.subs(), at % self.block.subs());
            sub_block(self.block, scale, min, codes, out);
        }
    }

    /// The dequantized weight `[out_features, in_features]`, f32.
    pub fn dequantize(&self) -> Mat {
        let mut weight = Mat::zeros((self.out_features, self.in_features));
        for (row, mut out) in weight.outer_iter_mut().enumerate() {
            self.dequantize_row(
                row,
                out.as_slice_mut().expect("rows of a fresh matrix are contiguous"),
            );
        }
        weight
    }
}

/// Values of one sub-block: `scale · level(code) − min`.
pub fn sub_block(block: BlockType, scale: f32, min: f32, codes: &[u8], out: &mut [f32]) {
    match block.levels() {
        Levels::Linear { zero } => {
            let has_min = block.minimum() != Minimum::None;
            for (out, &code) in out.iter_mut().zip(codes) {
                let value = scale * f32::from(i16::from(code) - zero);
                *out = if has_min { value - min } else { value };
            }
        }
        Levels::Codebook(values) => {
            for (out, &code) in out.iter_mut().zip(codes) {
                *out = scale * f32::from(values[usize::from(code & 15)]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_and_fallbacks_divide_by_32() {
        for block in BlockType::ALL {
            assert_eq!(BlockType::from_name(block.name()), Some(block));
            assert_eq!(block.scheme().label(), block.name());
            assert_eq!(block.size() % block.sub_size(), 0);
            match block.fallback() {
                Some(other) => assert!(other.size() == 32 && other.bits() >= block.bits()),
                None => assert_eq!(block.size(), 32),
            }
            let json = serde_json_name(block);
            assert_eq!(json, block.name());
        }
    }

    /// The name that serde gives, without a JSON crate.
    fn serde_json_name(block: BlockType) -> &'static str {
        use serde::de::{IntoDeserializer, value::Error};
        let named: Result<BlockType, Error> =
            BlockType::deserialize(block.name().into_deserializer());
        named.expect("the name is known").name()
    }

    #[test]
    fn lies_are_found() {
        let good = BlockQuantized::zeros(BlockType::Q4K, 2, 512);
        good.check().unwrap();
        let mut bad = good.clone();
        bad.codes[513] = 16;
        assert!(matches!(bad.check(), Err(LayoutError::Code { row: 1, column: 1, .. })));
        let mut bad = good.clone();
        bad.sub_scales[17] = -1;
        assert!(matches!(bad.check(), Err(LayoutError::SubScale { row: 1, group: 1, .. })));
        let mut bad = good.clone();
        bad.sub_mins[3] = 64;
        assert!(matches!(bad.check(), Err(LayoutError::SubScale { row: 0, group: 3, .. })));
        let mut bad = good.clone();
        bad.dmin.pop();
        assert!(matches!(bad.check(), Err(LayoutError::Length { field: "dmin", .. })));
        let mut bad = good;
        bad.in_features = 511;
        assert!(matches!(bad.check(), Err(LayoutError::Multiple { multiple: 256, .. })));
    }
}
