//! What the passes of this crate are told alike: how much goes, and in which pattern.

use attar_ir::recipe::RecipeError;
use attar_tensor::Pattern;

/// Largest group of an n:m pattern.
const MAX_GROUP: u8 = 64;

/// The pattern of a step's `sparsity` and `pattern`; half of the weights where neither is given.
///
/// # Errors
/// Both are given, or one is out of range.
pub(crate) fn pattern(
    sparsity: Option<f64>,
    pattern: Option<&str>,
) -> Result<Pattern, RecipeError> {
    let Some(text) = pattern else {
        let zeros = sparsity.unwrap_or(0.5);
        if zeros > 0.0 && zeros < 1.0 {
            return Ok(Pattern::Fraction(zeros));
        }
        let reason = format!("expected a fraction between 0 and 1, both excluded, got {zeros}");
        return Err(RecipeError::invalid("sparsity", reason));
    };
    if sparsity.is_some() {
        let reason = "`sparsity` and `pattern` exclude each other; give one of them";
        return Err(RecipeError::invalid("pattern", reason));
    }
    let numbers = text.split_once(':').and_then(|(n, m)| Some((n.parse().ok()?, m.parse().ok()?)));
    match numbers {
        Some((n, m)) if 0 < n && n < m && m <= MAX_GROUP => Ok(Pattern::NM { n, m }),
        _ => Err(RecipeError::invalid(
            "pattern",
            format!(
                "expected `n:m`, n of every m weights kept, with 0 < n < m <= {MAX_GROUP}, as `2:4`; got `{text}`"
            ),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_read_and_what_is_out_of_range_is_refused() {
        assert_eq!(pattern(None, None).unwrap(), Pattern::Fraction(0.5));
        assert_eq!(pattern(Some(0.7), None).unwrap(), Pattern::Fraction(0.7));
        assert_eq!(pattern(None, Some("2:4")).unwrap(), Pattern::NM { n: 2, m: 4 });
        for zeros in [0.0, 1.0, -0.5, 50.0, f64::NAN] {
            let error = pattern(Some(zeros), None).unwrap_err().to_string();
            assert!(error.starts_with("sparsity: expected a fraction between 0 and 1"), "{error}");
        }
        for text in ["4:4", "5:4", "0:4", "2/4", "2:", "-1:4", "2:400", "2:128"] {
            let error = pattern(None, Some(text)).unwrap_err().to_string();
            assert!(error.contains("`n:m`") && error.contains(text), "{error}");
        }
        let error = pattern(Some(0.5), Some("2:4")).unwrap_err().to_string();
        assert!(error.contains("exclude each other"), "{error}");
    }
}
