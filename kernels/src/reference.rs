//! The oracles. Of weights alone: unpack to f32, multiply with f64 sums, column by column. Of W8A8: round
//! the activations as the scheme says, multiply the integers exactly. Slow and obvious.

use attar_tensor::{LayoutError, Mat, PackedLinear, QuantizedLinear};
use rayon::prelude::*;

use crate::cpu::input::SMALLEST;
use crate::layout;
use crate::spec::{Prepared, check_sizes};

/// The dequantized weight `[out_features, in_features]`.
#[derive(Debug, Clone)]
pub struct Reference {
    weight: Mat,
}

impl Reference {
    /// Unpacks and dequantizes.
    ///
    /// # Errors
    /// As [`layout::unpack`].
    pub fn new(packed: &PackedLinear) -> Result<Self, LayoutError> {
        Ok(Self { weight: layout::layout_of(packed)?.dequantize(packed)? })
    }
}

impl Prepared for Reference {
    fn out_features(&self) -> usize {
        self.weight.nrows()
    }

    fn in_features(&self) -> usize {
        self.weight.ncols()
    }

    fn resident_bytes(&self) -> usize {
        self.weight.len() * size_of::<f32>()
    }

    fn matmul(&self, x: &[f32], m: usize, out: &mut [f32]) {
        check_sizes(self, x, m, out);
        let (rows, columns) = self.weight.dim();
        let tokens = out.par_chunks_mut(rows.max(1)).zip(x.par_chunks(columns.max(1)));
        tokens.for_each(|(out, x)| {
            for (out, weight) in out.iter_mut().zip(self.weight.outer_iter()) {
                let sum: f64 =
                    x.iter().zip(weight).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
                *out = sum as f32;
            }
        });
    }
}

/// Signed bytes of one token and their scale, as `ActivationScheme::Int8PerToken` means them: symmetric,
/// the scale is `max|x| / 127` in f32, and a byte is `x · (127 / max|x|)` rounded to nearest, ties to even. A
/// token whose largest magnitude is below 1e-30 is all zeros.
///
/// vLLM's kernels divide by 127, too. The compressed-tensors library, which transformers uses, divides
/// `max|x|` by 127.5: its steps are 0.4 % finer, and its bytes differ where a value lies near the middle of
/// two steps.
pub fn round_token(x: &[f32]) -> (Vec<i8>, f32) {
    let largest = x.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    if largest < SMALLEST {
        return (vec![0; x.len()], 0.0);
    }
    let inverse = 127.0 / largest;
    let bytes = x.iter().map(|x| (x * inverse).round_ties_even() as i8).collect();
    (bytes, largest / 127.0)
}

/// The products of a W8A8 linear, `[m, out_features]`: `(Σ q · w) · scale_of_token · scale_of_row` with `q`
/// of [`round_token`] and `w = code - 128`, the sum in integers, the scales in f64.
///
/// # Panics
/// When `weight` is not 8 bits, symmetric, one scale per row.
pub fn w8a8(weight: &QuantizedLinear, x: &[f32]) -> Vec<f64> {
    let (rows, columns) = (weight.out_features, weight.in_features);
    assert!(weight.scheme.bits == 8 && weight.scheme.symmetric && weight.scales.len() == rows);
    let mut out = vec![0.0; x.len() / columns.max(1) * rows];
    let tokens = out.par_chunks_mut(rows.max(1)).zip(x.par_chunks(columns.max(1)));
    tokens.for_each(|(out, x)| {
        let (q, step) = round_token(x);
        let codes = weight.codes.chunks_exact(columns.max(1));
        for ((out, codes), scale) in out.iter_mut().zip(codes).zip(&weight.scales) {
            let products =
                q.iter().zip(codes).map(|(&q, &code)| i64::from(q) * (i64::from(code) - 128));
            *out = products.sum::<i64>() as f64 * f64::from(step) * f64::from(*scale);
        }
    });
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases::{Input, Judge};
    use crate::spec::Activations;
    use crate::testing::{quantized, scheme};

    /// The integers' product is that of the rounded activations, and within half a step of the exact one.
    #[test]
    fn the_oracle_of_w8a8_against_that_in_f64() {
        for (rows, columns) in [(33, 257), (7, 64)] {
            let weight = quantized(scheme(8, 0, true), rows, columns, 9);
            let judge = Judge::new(&weight);
            for input in Input::ALL {
                let x = input.activations(40, columns, 4);
                let got = w8a8(&weight, &x);
                let rounded: Vec<f32> = (x.chunks(columns))
                    .flat_map(|x| {
                        let (q, step) = round_token(x);
                        assert!(
                            q.contains(&127) || q.contains(&-127),
                            "the largest uses the range"
                        );
                        q.into_iter().map(move |q| f32::from(q) * step)
                    })
                    .collect();
                let exact = judge.reference(&rounded);
                let size = exact.iter().fold(0.0f64, |size, y| size.max(y.abs()));
                assert!(got.iter().zip(&exact).all(|(a, b)| (a - b).abs() < 1e-6 * size));
                let bounds = judge.bounds(&x, Activations::Int8PerToken);
                let float = judge.reference(&x);
                let within = |((a, b), bound): ((&f64, &f64), &f64)| (a - b).abs() <= *bound;
                assert!(got.iter().zip(&float).zip(&bounds).all(within));
                assert!(got.iter().zip(&float).any(|(a, b)| (a - b).abs() > 1e-4 * size));
            }
        }
        assert_eq!(round_token(&[0.0, -1e-31]), (vec![0, 0], 0.0));
        // 127 / 254 of a step each: ties go to even.
        assert_eq!(round_token(&[127.0, 0.5, 1.5, -2.5]).0, [127, 0, 2, -2]);
    }
}
