//! The instruction set that vectorised code runs with: the best of this CPU, or the one that was pinned
//! at the start of the process so that results made on another CPU can be made again. Everything in
//! `linalg`, the solvers of the passes and the kernels ask here; nobody else asks the CPU.
//!
//! [`Isa`] is what vector code is written for. [`Level`] is all that a process computes with: one of those, and
//! above AVX-512 products on the tile registers of AMX, whose sums run in another order.

use std::sync::OnceLock;

use pulp::Arch;

/// An instruction set that code is written for, slowest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// No more than the compiler's baseline for this target (SSE2 on x86-64), in plain code.
    Scalar,
    /// aarch64: Advanced SIMD, which every such CPU has.
    Neon,
    /// x86-64-v3: AVX2 and FMA.
    Avx2,
    /// x86-64-v4: AVX-512 F, BW, CD, DQ and VL.
    Avx512,
}

/// What a process computes with, slowest first. Up to AVX-512 all give the same bits in products; `Amx` has bits of
/// its own, since its products are those of bf16 (see `tiles`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// [`Isa::Scalar`].
    Scalar,
    /// [`Isa::Neon`].
    Neon,
    /// [`Isa::Avx2`].
    Avx2,
    /// [`Isa::Avx512`].
    Avx512,
    /// [`Isa::Avx512`], and products of matrices on AMX tiles of bf16.
    Amx,
}

/// Why an instruction set cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IsaError {
    /// A name that is none.
    #[error("no instruction set `{name}`; known are scalar, neon, avx2, avx512 and amx")]
    Unknown {
        /// What was given.
        name: String,
    },
    /// This CPU lacks it.
    #[error("this CPU has no {asked}; it has {}", .has.join(", "))]
    Unsupported {
        /// What was asked for.
        asked: Level,
        /// Names of what there is, slowest first.
        has: Vec<&'static str>,
    },
    /// Code has run already with another one.
    #[error("{used} is in use already; pin {asked} before anything is computed")]
    InUse {
        /// What was asked for.
        asked: Level,
        /// What code has run with.
        used: Level,
    },
}

impl Isa {
    /// Those that this build has code for, slowest first.
    #[cfg(target_arch = "x86_64")]
    pub const ALL: &'static [Self] = &[Self::Scalar, Self::Avx2, Self::Avx512];
    /// Those that this build has code for, slowest first.
    #[cfg(target_arch = "aarch64")]
    pub const ALL: &'static [Self] = &[Self::Scalar, Self::Neon];
    /// Those that this build has code for, slowest first.
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    pub const ALL: &'static [Self] = &[Self::Scalar];

    /// Name as reports write it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Neon => "neon",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    /// True when this CPU has it.
    pub fn supported(self) -> bool {
        self.arch().is_some()
    }

    /// The dispatch token; `None` when this CPU lacks the instructions.
    fn arch(self) -> Option<Arch> {
        match self {
            Self::Scalar => Some(Arch::Scalar),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => pulp::aarch64::Neon::try_new().map(Arch::Neon),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => pulp::x86::V3::try_new().map(Arch::V3),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => pulp::x86::V4::try_new().map(Arch::V4),
            // Of another architecture.
            _ => None,
        }
    }
}

impl Level {
    /// All of them, on whatever architecture; slowest first.
    pub const ALL: [Self; 5] = [Self::Scalar, Self::Neon, Self::Avx2, Self::Avx512, Self::Amx];

    /// Name as `--isa` and manifests write it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Amx => "amx",
            _ => self.isa().name(),
        }
    }

    /// What its vector code is written for.
    pub const fn isa(self) -> Isa {
        match self {
            Self::Scalar => Isa::Scalar,
            Self::Neon => Isa::Neon,
            Self::Avx2 => Isa::Avx2,
            Self::Avx512 | Self::Amx => Isa::Avx512,
        }
    }

    /// True when this CPU has it and the system lets this process use it.
    pub fn supported(self) -> bool {
        self.isa().supported() && (self != Self::Amx || amx::granted(amx::BF16))
    }

    /// The best that this CPU has.
    pub fn best() -> Self {
        Self::ALL.into_iter().rfind(|level| level.supported()).unwrap_or(Self::Scalar)
    }
}

/// The tile registers of AMX.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub mod amx {
    use std::{
        arch::x86_64::{__cpuid, __cpuid_count},
        sync::OnceLock,
    };

    /// Products of bytes: a bit of leaf 7.
    pub const INT8: u32 = 1 << 25;
    /// Products of bf16: a bit of leaf 7.
    pub const BF16: u32 = 1 << 22;

    /// True when this CPU has tiles and such products and the system lets this process use the registers, which
    /// it grants to a process that asks.
    pub fn granted(products: u32) -> bool {
        /// The tile registers: a bit of leaf 7.
        const TILES: u32 = 1 << 24;
        /// `ARCH_REQ_XCOMP_PERM` and the number of the tile data.
        const REQUEST: libc::c_long = 0x1023;
        const TILE_DATA: libc::c_long = 18;
        static HAS: OnceLock<u32> = OnceLock::new();
        let has = *HAS.get_or_init(|| {
            let leaf = if __cpuid(0).eax >= 7 { __cpuid_count(7, 0).edx } else { 0 };
            // SAFETY: the call only asks for permission.
            let ask = || unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, TILE_DATA) == 0 };
            if leaf & TILES != 0 && ask() { leaf } else { 0 }
        });
        has & products == products
    }
}

/// The tile registers of AMX, which there are none of here.
#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
pub mod amx {
    /// Products of bytes.
    pub const INT8: u32 = 1;
    /// Products of bf16.
    pub const BF16: u32 = 2;

    /// Never.
    pub fn granted(_: u32) -> bool {
        false
    }
}

impl std::fmt::Display for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::fmt::Display for Level {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Level {
    type Err = IsaError;

    fn from_str(name: &str) -> Result<Self, IsaError> {
        let found = Self::ALL.into_iter().find(|level| level.name() == name);
        found.ok_or_else(|| IsaError::Unknown { name: name.to_owned() })
    }
}

/// What this process runs with, set once.
static CHOSEN: OnceLock<(Level, Arch)> = OnceLock::new();

fn chosen() -> (Level, Arch) {
    *CHOSEN.get_or_init(|| {
        let best = Level::best();
        (best, best.isa().arch().expect("the best is supported"))
    })
}

/// Pins what this process computes with. Call it once, before anything is computed.
///
/// # Errors
/// [`IsaError::Unsupported`] when this CPU lacks it, [`IsaError::InUse`] when another one was pinned or
/// used before.
pub fn pin(level: Level) -> Result<(), IsaError> {
    let Some(arch) = level.isa().arch().filter(|_| level.supported()) else {
        let has = Level::ALL.iter().filter(|level| level.supported()).map(|l| l.name()).collect();
        return Err(IsaError::Unsupported { asked: level, has });
    };
    let (used, _) = *CHOSEN.get_or_init(|| (level, arch));
    if used == level { Ok(()) } else { Err(IsaError::InUse { asked: level, used }) }
}

/// What this process computes with: what was pinned, else the best.
pub fn level() -> Level {
    chosen().0
}

/// The instruction set of its vector code.
pub fn isa() -> Isa {
    chosen().0.isa()
}

/// The same as `pulp`'s token, to dispatch explicit vector code with.
#[inline]
pub fn arch() -> Arch {
    chosen().1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_and_the_first_choice_stays() {
        for level in Level::ALL {
            assert_eq!(level.name().parse(), Ok(level));
        }
        let error = "avx1024".parse::<Level>().unwrap_err().to_string();
        assert!(error.contains("avx1024") && error.contains("avx2"), "{error}");
        let used = level();
        assert_eq!((used, isa()), (Level::best(), Level::best().isa()));
        assert_eq!(pin(used), Ok(()));
        for other in Level::ALL.into_iter().filter(|&level| level != used) {
            let error = pin(other).unwrap_err();
            let expected = if other.supported() { "in use already" } else { "this CPU has no" };
            assert!(error.to_string().contains(expected), "{error}");
        }
        let missing = IsaError::Unsupported { asked: Level::Avx512, has: vec!["scalar", "avx2"] };
        assert_eq!(missing.to_string(), "this CPU has no avx512; it has scalar, avx2");
    }
}
