//! The instruction sets that the kernels are written for; which of them this machine has, and which is in
//! use, `attar_tensor::linalg` knows.

pub use attar_tensor::linalg::Isa;

/// Name of the kernel in reports.
pub(crate) const fn kernel_name(isa: Isa) -> &'static str {
    match isa {
        Isa::Scalar => "cpu-scalar",
        Isa::Avx2 => "cpu-avx2",
        Isa::Avx512 => "cpu-avx512",
    }
}
