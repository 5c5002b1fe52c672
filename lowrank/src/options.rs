//! What the passes of this crate are told alike: how large factors are.

use attar_ir::{Site, recipe::RecipeError};

/// Size of the factors of a site.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Size {
    /// This rank for every site.
    Rank(usize),
    /// The largest rank that is a multiple of `multiple_of` and takes this fraction of the parameters away.
    Ratio { ratio: f64, multiple_of: usize },
}

impl Size {
    /// From a step's `rank`, `ratio` and `multiple_of`; `usual` where none is given.
    ///
    /// # Errors
    /// Both are given, or one is out of range.
    pub(crate) fn of(
        rank: Option<usize>,
        ratio: Option<f64>,
        multiple_of: usize,
        usual: Self,
    ) -> Result<Self, RecipeError> {
        if multiple_of == 0 {
            return Err(RecipeError::invalid("multiple_of", "expected a positive integer, got 0"));
        }
        match (rank, ratio) {
            (Some(_), Some(_)) => Err(RecipeError::invalid(
                "ratio",
                "`rank` and `ratio` exclude each other; give one of them",
            )),
            (Some(0), None) => {
                Err(RecipeError::invalid("rank", "expected a positive integer, got 0"))
            }
            (Some(rank), None) => Ok(Self::Rank(rank)),
            (None, Some(ratio)) if ratio > 0.0 && ratio < 1.0 => {
                Ok(Self::Ratio { ratio, multiple_of })
            }
            (None, Some(ratio)) => Err(RecipeError::invalid(
                "ratio",
                format!(
                    "expected a fraction of the parameters between 0 and 1, both excluded, got {ratio}"
                ),
            )),
            (None, None) => Ok(usual),
        }
    }

    /// The rank of a site's factors.
    ///
    /// # Errors
    /// When so few parameters are left that there is none.
    pub(crate) fn rank(self, site: &Site) -> Result<usize, String> {
        let (ratio, multiple_of) = match self {
            Self::Rank(rank) => return Ok(rank),
            Self::Ratio { ratio, multiple_of } => (ratio, multiple_of),
        };
        let (out, inner) = (site.out_features, site.in_features);
        let each = (out + inner).max(1);
        // A hair more, so that a ratio which is met exactly is not missed by rounding.
        let kept = ((1.0 - ratio) * (out * inner) as f64 * (1.0 + 1e-12)) as usize;
        let rank = (kept / each).min(out.min(inner)) / multiple_of * multiple_of;
        if rank > 0 {
            return Ok(rank);
        }
        Err(format!(
            "a ratio of {ratio} leaves {kept} of the {} weights of {out} x {inner}, and each rank takes {each} (ranks are \
             multiples of {multiple_of}); give a smaller ratio or `keep` it",
            out * inner
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use attar_ir::Role;
    use attar_tensor::DType;

    #[test]
    fn ranks_follow_from_numbers_and_fractions() {
        let site = Site {
            name: "q".into(),
            role: Role::Query,
            out_features: 100,
            in_features: 300,
            bias: false,
            dtype: DType::F32,
        };
        let usual = Size::Rank(7);
        let of = |rank, ratio, multiple| Size::of(rank, ratio, multiple, usual);
        assert_eq!(of(None, None, 1).unwrap().rank(&site), Ok(7));
        assert_eq!(of(Some(9), None, 1).unwrap().rank(&site), Ok(9));
        assert_eq!(of(None, Some(0.2), 1).unwrap().rank(&site), Ok(60));
        assert_eq!(of(None, Some(0.2), 16).unwrap().rank(&site), Ok(48));
        let none = of(None, Some(0.99), 1).unwrap().rank(&site).unwrap_err();
        assert!(none.contains("leaves 300 of the 30000 weights"), "{none}");
        for ratio in [0.0, 1.0, -1.0, f64::NAN] {
            assert!(of(None, Some(ratio), 1).unwrap_err().to_string().starts_with("ratio: "));
        }
        assert!(of(Some(1), Some(0.1), 1).unwrap_err().to_string().contains("exclude each other"));
        assert!(of(Some(0), None, 1).is_err() && of(None, None, 0).is_err());
    }
}
