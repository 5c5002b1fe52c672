//! The layout of artifacts without a quantized linear: every weight in the dtype of the checkpoint, no
//! `quantization_config`, what any runtime of the checkpoint reads.
//!
//! A recipe that quantizes is refused here. Its values could be written dequantized, but the file would be as large as
//! the source, its rounding to the source's dtype would lie beyond what the report measured, and nothing in it would
//! say that it had been quantized.

use attar_tensor::{DType, LayoutError, LayoutId, LayoutSpec, LinearSpec, PartHeader, ScaleGrid};

/// Name of [`Dense`].
pub const DENSE: LayoutId = LayoutId("dense");

/// The layout `dense`.
#[derive(Debug)]
pub struct Dense;

impl LayoutSpec for Dense {
    fn id(&self) -> LayoutId {
        DENSE
    }

    fn parts(&self, linear: &LinearSpec) -> Result<Vec<PartHeader>, LayoutError> {
        Err(LayoutError::Scheme {
            layout: DENSE,
            scheme: linear.scheme.label(),
            reason: "it stores float weights only; emit compressed-tensors (or another layout of codes), or \
                     write the step before with `of`",
        })
    }

    fn scale_dtype(&self, _: DType) -> DType {
        DType::F32
    }

    fn scale_grid(&self, _: DType) -> ScaleGrid {
        ScaleGrid::F32
    }

    fn fuses_siblings(&self) -> bool {
        false
    }

    fn takes_factors(&self) -> bool {
        true
    }
}
