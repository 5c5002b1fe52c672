//! The only room where "close enough" is defined.

use serde::{Deserialize, Serialize};

/// How far a result may lie from its reference.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Tolerance {
    /// Largest allowed normalised mean squared error, `‖a − b‖² / ‖b‖²`.
    pub max_nmse: f64,
}

/// Measured distance of a result from its reference.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Distance {
    /// `‖a − b‖² / ‖b‖²` (0 when both are zero).
    pub nmse: f64,
    /// Largest absolute difference.
    pub max_abs: f64,
}

impl Distance {
    /// Relative error `‖a − b‖₂ / ‖b‖₂`.
    pub fn relative(self) -> f64 {
        self.nmse.sqrt()
    }

    /// True when within the tolerance; never true for NaN.
    pub fn within(self, tolerance: Tolerance) -> bool {
        self.nmse <= tolerance.max_nmse && self.max_abs.is_finite()
    }
}

/// Distance of `got` from `reference`, accumulated in f64. NaN or infinity in either gives infinity.
///
/// # Panics
/// When the lengths differ.
pub fn distance(got: &[f32], reference: &[f32]) -> Distance {
    assert_eq!(got.len(), reference.len(), "compared slices have the same length");
    let (mut error, mut norm, mut max_abs) = (0.0f64, 0.0f64, 0.0f64);
    for (&a, &b) in got.iter().zip(reference) {
        let difference = f64::from(a) - f64::from(b);
        if !difference.is_finite() {
            return Distance { nmse: f64::INFINITY, max_abs: f64::INFINITY };
        }
        error += difference * difference;
        norm += f64::from(b) * f64::from(b);
        max_abs = max_abs.max(difference.abs());
    }
    let nmse = if error > 0.0 { error / norm.max(f64::MIN_POSITIVE) } else { 0.0 };
    Distance { nmse, max_abs }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nan_is_never_close() {
        let d = distance(&[f32::NAN, 1.0], &[0.0, 1.0]);
        assert!(!d.within(Tolerance { max_nmse: 1.0 }));
    }

    #[test]
    fn relative_error_of_a_scaled_vector() {
        let d = distance(&[1.1, 2.2], &[1.0, 2.0]);
        assert!((d.relative() - 0.1).abs() < 1e-6);
    }
}
