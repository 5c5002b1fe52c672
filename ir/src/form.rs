//! The *type* of a site's weight: a product of axes. Contracts state which forms they accept and which
//! axes they change; the plan follows each site's form through the steps.

use attar_tensor::ActivationScheme;
use serde::{Deserialize, Serialize};

/// Rank axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rank {
    /// One full matrix.
    Full,
    /// A product of two thin matrices.
    Factored,
    /// A full matrix plus a low-rank correction.
    FullPlusLowRank,
}

/// Sparsity axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sparsity {
    /// No zero is promised.
    Dense,
    /// Some weights are zero and stay zero.
    Masked,
    /// At most n of every m consecutive weights of a row are not zero.
    NM {
        /// Weights that stay.
        n: u8,
        /// Weights of a group.
        m: u8,
    },
}

impl From<attar_tensor::Pattern> for Sparsity {
    fn from(pattern: attar_tensor::Pattern) -> Self {
        match pattern {
            attar_tensor::Pattern::Fraction(_) => Self::Masked,
            attar_tensor::Pattern::NM { n, m } => Self::NM { n, m },
        }
    }
}

/// Numeric axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Numeric {
    /// Floating-point weights.
    Float,
    /// Integer codes with scales and zero points.
    Quantized,
}

/// The form of one site's weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Form {
    /// Full, factored, or full plus low rank.
    pub rank: Rank,
    /// Dense or with promised zeros.
    pub sparsity: Sparsity,
    /// Float or quantized.
    pub numeric: Numeric,
    /// In which numbers the site's input enters; the scheme of the step that quantizes says it.
    #[serde(default, skip_serializing_if = "ActivationScheme::is_float")]
    pub activations: ActivationScheme,
}

impl Form {
    /// What every site of a plain checkpoint is.
    pub const DENSE_FLOAT: Self = Self {
        rank: Rank::Full,
        sparsity: Sparsity::Dense,
        numeric: Numeric::Float,
        activations: ActivationScheme::Float,
    };
}

impl std::fmt::Display for Form {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let numeric = match self.numeric {
            Numeric::Float => "float",
            Numeric::Quantized => "quantized",
        };
        let sparsity = match self.sparsity {
            Sparsity::Dense => "dense".to_owned(),
            Sparsity::Masked => "masked".to_owned(),
            Sparsity::NM { n, m } => format!("{n}:{m} sparse"),
        };
        let rank = match self.rank {
            Rank::Full => "full rank",
            Rank::Factored => "factored",
            Rank::FullPlusLowRank => "full + low rank",
        };
        write!(f, "{numeric}, {sparsity}, {rank}")?;
        match self.activations {
            ActivationScheme::Float => Ok(()),
            ActivationScheme::Int8PerToken => f.write_str(", int8 activations"),
        }
    }
}

bitflags::bitflags! {
    /// A set of forms: the values allowed on each axis.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct FormSet: u16 {
        /// Float weights.
        const FLOAT = 1;
        /// Quantized weights.
        const QUANTIZED = 1 << 1;
        /// Dense weights.
        const DENSE = 1 << 2;
        /// Masked weights.
        const MASKED = 1 << 3;
        /// n:m sparse weights.
        const NM = 1 << 4;
        /// Full rank.
        const FULL = 1 << 5;
        /// Factored.
        const FACTORED = 1 << 6;
        /// Full plus low rank.
        const FULL_PLUS_LOW_RANK = 1 << 7;
        /// Float, dense, full: a plain checkpoint's weights.
        const DENSE_FLOAT = 1 | 1 << 2 | 1 << 5;
        /// Float, full, with or without promised zeros.
        const FLOAT_ANY_ZEROS = 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5;
        /// Float, factored or full, with or without promised zeros.
        const FLOAT_ANY_RANK = 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6;
        /// Float and factored.
        const FACTORED_FLOAT = 1 | 1 << 2 | 1 << 6;
        /// Quantized, of full rank, with or without promised zeros.
        const QUANTIZED_FULL = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5;
    }
}

impl FormSet {
    /// True when every axis of `form` is allowed.
    pub const fn accepts(self, form: Form) -> bool {
        let numeric = match form.numeric {
            Numeric::Float => Self::FLOAT,
            Numeric::Quantized => Self::QUANTIZED,
        };
        let sparsity = match form.sparsity {
            Sparsity::Dense => Self::DENSE,
            Sparsity::Masked => Self::MASKED,
            Sparsity::NM { .. } => Self::NM,
        };
        let rank = match form.rank {
            Rank::Full => Self::FULL,
            Rank::Factored => Self::FACTORED,
            Rank::FullPlusLowRank => Self::FULL_PLUS_LOW_RANK,
        };
        self.contains(numeric) && self.contains(sparsity) && self.contains(rank)
    }
}

/// The axes a pass writes; `None` leaves an axis as it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FormChange {
    /// New rank axis.
    pub rank: Option<Rank>,
    /// New sparsity axis.
    pub sparsity: Option<Sparsity>,
    /// New numeric axis.
    pub numeric: Option<Numeric>,
}

impl FormChange {
    /// The pass changes values only.
    pub const NONE: Self = Self { rank: None, sparsity: None, numeric: None };
    /// The pass quantizes.
    pub const QUANTIZE: Self =
        Self { rank: None, sparsity: None, numeric: Some(Numeric::Quantized) };
    /// The pass makes thin factors.
    pub const FACTOR: Self = Self { rank: Some(Rank::Factored), sparsity: None, numeric: None };
    /// The pass puts a correction of low rank beside the weight.
    pub const CORRECT: Self =
        Self { rank: Some(Rank::FullPlusLowRank), sparsity: None, numeric: None };

    /// The form after the pass; the scheme it quantizes to adds the activations.
    pub const fn apply(self, form: Form) -> Form {
        Form {
            rank: match self.rank {
                Some(rank) => rank,
                None => form.rank,
            },
            sparsity: match self.sparsity {
                Some(sparsity) => sparsity,
                None => form.sparsity,
            },
            numeric: match self.numeric {
                Some(numeric) => numeric,
                None => form.numeric,
            },
            activations: form.activations,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantized_sites_are_not_dense_float() {
        let quantized = FormChange::QUANTIZE.apply(Form::DENSE_FLOAT);
        assert!(FormSet::DENSE_FLOAT.accepts(Form::DENSE_FLOAT));
        assert!(!FormSet::DENSE_FLOAT.accepts(quantized));
        assert_eq!(quantized.to_string(), "quantized, dense, full rank");
        let change = FormChange { sparsity: Some(Sparsity::NM { n: 2, m: 4 }), ..FormChange::NONE };
        let pruned = change.apply(Form::DENSE_FLOAT);
        assert_eq!(pruned.to_string(), "float, 2:4 sparse, full rank");
        assert!(!FormSet::DENSE_FLOAT.accepts(pruned));
        assert!(FormSet::FLOAT_ANY_ZEROS.accepts(pruned));
        // A step that quantizes says nothing of zeros: they stay.
        assert_eq!(
            FormChange::QUANTIZE.apply(pruned).to_string(),
            "quantized, 2:4 sparse, full rank"
        );
        let w8a8 = Form { activations: ActivationScheme::Int8PerToken, ..quantized };
        assert_eq!(w8a8.to_string(), "quantized, dense, full rank, int8 activations");
    }
}
