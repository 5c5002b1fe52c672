//! Which instructions this machine has, found at run time; the only place that asks.

/// An instruction set that a kernel is written for, slowest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// No more than the compiler's baseline.
    Scalar,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F.
    Avx512,
}

impl Isa {
    /// All of them, slowest first.
    pub const ALL: [Self; 3] = [Self::Scalar, Self::Avx2, Self::Avx512];

    /// True when this machine has it.
    pub fn supported(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return match self {
            Self::Scalar => true,
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            Self::Avx512 => Self::Avx2.supported() && is_x86_feature_detected!("avx512f"),
        };
        #[cfg(not(target_arch = "x86_64"))]
        return self == Self::Scalar;
    }

    /// Name of the kernel in reports.
    pub const fn kernel_name(self) -> &'static str {
        match self {
            Self::Scalar => "cpu-scalar",
            Self::Avx2 => "cpu-avx2",
            Self::Avx512 => "cpu-avx512",
        }
    }
}
