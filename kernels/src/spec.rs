//! What a kernel is.

use attar_tensor::compare::Tolerance;
use attar_tensor::linalg::Isa;
use attar_tensor::{ActivationScheme, LayoutError, PackedLinear, QuantScheme};
use serde::Serialize;

use crate::layout::layout_of;

/// Where a kernel runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Backend {
    /// The processor that runs this program.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

/// In which numbers a kernel multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Activations {
    /// As they come: products and sums in f32. The *exact* kernels.
    F32,
    /// Rounded to signed bytes, one f32 scale (largest magnitude / 127) for each 32 columns of a token;
    /// integer products, f32 sums. Blocks never cross a group: columns stand in the order of groups and
    /// each group begins a block. The *fast* kernels.
    Int8,
    /// Rounded to signed bytes, one f32 scale for each token (W8A8).
    Int8PerToken,
}

/// Largest normalised mean squared error of an exact kernel: f32 sums against f64 sums.
pub const MAX_NMSE_F32: f64 = 1e-11;
/// Largest normalised mean squared error of a fast kernel, 1.2 % relative root mean square.
pub const MAX_NMSE_INT8: f64 = 1.2e-2 * 1.2e-2;
/// Largest normalised mean squared error with one scale per token, 10 %: a single outlier of a token
/// coarsens all of its other values.
pub const MAX_NMSE_INT8_PER_TOKEN: f64 = 1e-1 * 1e-1;

impl Activations {
    /// As command lines and reports write it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Int8 => "int8",
            Self::Int8PerToken => "int8-per-token",
        }
    }

    /// What a scheme says of activations.
    pub const fn of(scheme: ActivationScheme) -> Self {
        match scheme {
            ActivationScheme::Float => Self::F32,
            ActivationScheme::Int8PerToken => Self::Int8PerToken,
        }
    }

    /// How far a kernel of this kind may lie from the reference as a whole; each element for itself is
    /// held to [`crate::cases::Judge::bounds`].
    pub const fn tolerance(self) -> Tolerance {
        let max_nmse = match self {
            Self::F32 => MAX_NMSE_F32,
            Self::Int8 => MAX_NMSE_INT8,
            Self::Int8PerToken => MAX_NMSE_INT8_PER_TOKEN,
        };
        Tolerance { max_nmse }
    }
}

/// A way to multiply by a packed linear.
pub trait Kernel: std::fmt::Debug + Send + Sync {
    /// Name in reports, e.g. `cpu-avx2` or `cpu-avx2-int8`.
    fn name(&self) -> &'static str;

    /// Where it runs.
    fn backend(&self) -> Backend {
        Backend::Cpu
    }

    /// What it does to activations.
    fn activations(&self) -> Activations {
        Activations::F32
    }

    /// The instructions that it is written for, e.g. `avx512` with `vnni`, or `sm_90a`.
    fn instructions(&self) -> &'static str;

    /// True when this machine can run it.
    fn supported(&self) -> bool;

    /// True when it needs no more than the instruction set in use, which may have been pinned
    /// (`attar_tensor::linalg::pin`) below what the machine has.
    fn in_use(&self) -> bool;

    /// True when it can multiply `m` tokens by weights of this scheme and width.
    fn supports(&self, scheme: QuantScheme, in_features: usize, m: usize) -> bool;

    /// How far it may lie from the reference.
    fn tolerance(&self) -> Tolerance {
        self.activations().tolerance()
    }

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

    /// Bytes held in memory; one token reads all of them once.
    fn resident_bytes(&self) -> usize;

    /// True when the weights lie without their zeros, two of four codes at most being stored.
    fn without_zeros(&self) -> bool {
        false
    }

    /// The same weight with the zeros that are left away: what the choice is measured against.
    fn with_zeros(&self) -> Option<Box<dyn Prepared>> {
        None
    }

    /// The same in other memory, so that a measurement can be kept from reading caches; `None` when the
    /// kernel offers none.
    fn duplicate(&self) -> Option<Box<dyn Prepared>> {
        None
    }

    /// `out [m, out_features] = x [m, in_features] · Wᵀ`, all row-major f32; `W` is the dequantized
    /// weight. The same bits on any number of threads.
    ///
    /// # Panics
    /// When the slices do not have these sizes.
    fn matmul(&self, x: &[f32], m: usize, out: &mut [f32]);
}

/// The kernel that [`select_kernel`] takes among `kernels`, slowest first: the last one of these
/// activations that this machine runs within the instruction set in use, for any number of tokens.
pub fn choose<'a>(
    kernels: &'a [Box<dyn Kernel>],
    packed: &PackedLinear,
    activations: Activations,
) -> Option<&'a dyn Kernel> {
    let fits = |kernel: &dyn Kernel| {
        kernel.backend() == Backend::Cpu
            && kernel.activations() == activations
            && kernel.supported()
            && kernel.in_use()
            && kernel.supports(packed.scheme, packed.in_features, 1)
    };
    kernels.iter().map(|kernel| &**kernel).rfind(|kernel| fits(*kernel))
}

/// Prepares with the best exact CPU kernel of the instruction set in use.
///
/// # Errors
/// An unknown layout, or whatever the layout finds wrong with the bytes.
pub fn select(packed: &PackedLinear) -> Result<Box<dyn Prepared>, LayoutError> {
    Ok(select_kernel(packed, Activations::F32)?.1)
}

/// Prepares with the best CPU kernel of these activations, or the best exact one where there is none;
/// also the kernel's name.
///
/// # Errors
/// As [`select`].
pub fn select_kernel(
    packed: &PackedLinear,
    activations: Activations,
) -> Result<(&'static str, Box<dyn Prepared>), LayoutError> {
    let kernels = layout_of(packed)?.kernels();
    let best = choose(&kernels, packed, activations)
        .or_else(|| choose(&kernels, packed, Activations::F32))
        .expect("the scalar kernel multiplies everything everywhere");
    Ok((best.name(), best.prepare(packed)?))
}

/// True when `isa` is no more than the instruction set in use.
pub(crate) fn within_use(isa: Isa) -> bool {
    isa <= attar_tensor::linalg::isa()
}

/// Checks the sizes that [`Prepared::matmul`] is given.
pub(crate) fn check_sizes(linear: &dyn Prepared, x: &[f32], m: usize, out: &[f32]) {
    assert_eq!(x.len(), m * linear.in_features(), "x is [m, in_features]");
    assert_eq!(out.len(), m * linear.out_features(), "out is [m, out_features]");
}
