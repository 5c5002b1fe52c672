//! What a kernel is.

use attar_tensor::{LayoutError, PackedLinear};

use crate::layout::layout_of;

/// A way to multiply by a packed linear.
pub trait Kernel: std::fmt::Debug + Send + Sync {
    /// Name in reports, e.g. `cpu-avx2`.
    fn name(&self) -> &'static str;

    /// True when this machine can run it.
    fn supported(&self) -> bool;

    /// True when it needs no more than the instruction set in use, which may have been pinned
    /// (`attar_tensor::linalg::pin`) below what the machine has.
    fn in_use(&self) -> bool;

    /// Rearranges the packed bytes for multiplication. The result keeps nothing of `packed`.
    ///
    /// # Errors
    /// Whatever the layout finds wrong with the bytes.
    ///
    /// # Panics
    /// When the kernel is not supported.
    fn prepare(&self, packed: &PackedLinear) -> Result<Box<dyn Prepared>, LayoutError>;
}

/// A linear that is ready to be multiplied by.
pub trait Prepared: std::fmt::Debug + Send + Sync {
    /// Rows of the weight.
    fn out_features(&self) -> usize;

    /// Columns of the weight.
    fn in_features(&self) -> usize;

    /// Bytes held in memory.
    fn resident_bytes(&self) -> usize;

    /// `out [m, out_features] = x [m, in_features] · Wᵀ`, all row-major f32; `W` is the dequantized
    /// weight. The same bits on any number of threads.
    ///
    /// # Panics
    /// When the slices do not have these sizes.
    fn matmul(&self, x: &[f32], m: usize, out: &mut [f32]);
}

/// Prepares with the best kernel of the instruction set in use.
///
/// # Errors
/// An unknown layout, or whatever the layout finds wrong with the bytes.
pub fn select(packed: &PackedLinear) -> Result<Box<dyn Prepared>, LayoutError> {
    let kernels = layout_of(packed)?.kernels();
    let best = kernels.iter().rfind(|kernel| kernel.supported() && kernel.in_use());
    best.expect("the scalar kernel runs everywhere").prepare(packed)
}

/// Checks the sizes that [`Prepared::matmul`] is given.
pub(crate) fn check_sizes(linear: &dyn Prepared, x: &[f32], m: usize, out: &[f32]) {
    assert_eq!(x.len(), m * linear.in_features(), "x is [m, in_features]");
    assert_eq!(out.len(), m * linear.out_features(), "out is [m, out_features]");
}
