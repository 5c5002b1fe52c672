//! The instruction sets that the kernels are written for; which of them this machine has, and which is in
//! use, `attar_tensor::linalg` knows. Byte dot products of AVX-512 and NEON are asked for here.

pub use attar_tensor::linalg::Isa;

use crate::spec::Activations;

/// Name of the kernel in reports.
pub(crate) const fn kernel_name(isa: Isa, activations: Activations) -> &'static str {
    match (isa, activations) {
        (Isa::Scalar, Activations::F32) => "cpu-scalar",
        (Isa::Neon, Activations::F32) => "cpu-neon",
        (Isa::Avx2, Activations::F32) => "cpu-avx2",
        (Isa::Avx512, Activations::F32) => "cpu-avx512",
        (Isa::Scalar, Activations::Int8) => "cpu-scalar-int8",
        (Isa::Neon, Activations::Int8) => "cpu-neon-int8",
        (Isa::Avx2, Activations::Int8) => "cpu-avx2-int8",
        (Isa::Avx512, Activations::Int8) => "cpu-avx512vnni-int8",
        (Isa::Scalar, Activations::Int8PerToken) => "cpu-scalar-w8a8",
        (Isa::Neon, Activations::Int8PerToken) => "cpu-neon-w8a8",
        (Isa::Avx2, Activations::Int8PerToken) => "cpu-avx2-w8a8",
        (Isa::Avx512, Activations::Int8PerToken) => "cpu-avx512vnni-w8a8",
    }
}

/// The instructions of the kernel.
pub(crate) const fn instructions(isa: Isa, activations: Activations) -> &'static str {
    match (isa, activations) {
        (Isa::Scalar, _) => "baseline",
        (Isa::Neon, Activations::F32) => "neon",
        (Isa::Neon, _) => "neon, dotprod",
        (Isa::Avx2, _) => "avx2, fma",
        (Isa::Avx512, Activations::F32) => "avx512 f, bw, dq, vl",
        (Isa::Avx512, _) => "avx512 f, bw, dq, vl, vnni; amx int8 for many tokens where granted",
    }
}

/// True when this machine can run the kernel.
pub(crate) fn supported(isa: Isa, activations: Activations) -> bool {
    isa.supported()
        && match isa {
            Isa::Avx512 => activations == Activations::F32 || has_vnni(),
            Isa::Neon => activations == Activations::F32 || has_dotprod(),
            Isa::Scalar | Isa::Avx2 => true,
        }
}

#[cfg(target_arch = "x86_64")]
fn has_vnni() -> bool {
    std::arch::is_x86_feature_detected!("avx512vnni")
}

#[cfg(not(target_arch = "x86_64"))]
const fn has_vnni() -> bool {
    false
}

#[cfg(target_arch = "aarch64")]
fn has_dotprod() -> bool {
    std::arch::is_aarch64_feature_detected!("dotprod")
}

#[cfg(not(target_arch = "aarch64"))]
const fn has_dotprod() -> bool {
    false
}
