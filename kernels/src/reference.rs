//! The oracle: unpack to f32, multiply with f64 sums, column by column. Slow and obvious.

use attar_tensor::{LayoutError, Mat, PackedLinear};
use rayon::prelude::*;

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
