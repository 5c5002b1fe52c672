//! The column solver: weights of a linear are changed column by column, and what a column loses is carried to the
//! columns not yet reached (optimal brain surgeon, as in GPTQ, arXiv:2210.17323, and SparseGPT, arXiv:2301.00774).
//!
//! With `E = W − Ŵ`, `tr(E H Eᵀ)` is minimised per output row given `H = 2/n XᵀX`. With `H⁻¹ = UᵀU`, column i is
//! replaced by what is allowed there and its error `e = (w_i − ŵ_i) / U_ii` is subtracted from the columns behind
//! it, `w_j −= e U_ij`. What is allowed is plugged in: codes of a scheme ([`rounding`]), zeros of a pattern
//! ([`masking`]), or both. After the sweep single numbers move where that lowers the objective.
//!
//! `weight [out, in]`, `hessian [in, in]` f32, the factor in f64. Rows are worked on in tiles of [`TILE`], each on
//! its own, so that threads do not change bits.

mod factor;
mod lanes;
pub mod masking;
pub mod rounding;
mod swap;
mod sweep;
#[cfg(test)]
mod tests;

pub use factor::{Factor, FactorOptions, SolverError, factorize};
pub use swap::Group;
pub use sweep::sweep;

/// Rows worked on by one task; fixed, so that threads do not change bits.
pub const TILE: usize = 256;

/// Squared errors of some rows, f64.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Errors {
    /// `Σ e²`.
    pub weight: f64,
    /// `Σ e H eᵀ` with the Hessian as calibrated.
    pub output: f64,
}

impl Errors {
    /// Of `E` and `R = E H`, `[columns][rows]`; `added` is what dead columns were given on the diagonal, which
    /// calibration did not see.
    pub fn of(error: &[f32], residual: &[f32], rows: usize, added: &[f32]) -> Self {
        let mut errors = Self::default();
        let columns = error.chunks(rows).zip(residual.chunks(rows));
        for ((error, residual), &added) in columns.zip(added) {
            let (mut square, mut output) = (0.0f64, 0.0f64);
            for (&e, &x) in error.iter().zip(residual) {
                square += f64::from(e) * f64::from(e);
                output += f64::from(e) * f64::from(x);
            }
            errors.weight += square;
            errors.output += output - f64::from(added) * square;
        }
        errors
    }
}

impl std::iter::Sum for Errors {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, e| Self {
            weight: sum.weight + e.weight,
            output: sum.output + e.output,
        })
    }
}
