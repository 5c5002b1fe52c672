//! The instruction set that vectorised code runs with: the best of this CPU, or the one that was pinned
//! at the start of the process so that results made on another CPU can be made again. Everything in
//! `linalg`, the solvers of the passes and the kernels ask here; nobody else asks the CPU.

use std::sync::OnceLock;

use pulp::Arch;

/// An instruction set that code is written for, slowest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// No more than the compiler's baseline for this target (SSE2 on x86-64).
    Scalar,
    /// x86-64-v3: AVX2 and FMA.
    Avx2,
    /// x86-64-v4: AVX-512 F, BW, CD, DQ and VL.
    Avx512,
}

/// Why an instruction set cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IsaError {
    /// A name that is none.
    #[error("no instruction set `{name}`; known are scalar, avx2 and avx512")]
    Unknown {
        /// What was given.
        name: String,
    },
    /// This CPU lacks it.
    #[error("this CPU has no {asked}; it has {}", .has.join(", "))]
    Unsupported {
        /// What was asked for.
        asked: Isa,
        /// Names of what there is, slowest first.
        has: Vec<&'static str>,
    },
    /// Code has run already with another one.
    #[error("{used} is in use already; pin {asked} before anything is computed")]
    InUse {
        /// What was asked for.
        asked: Isa,
        /// What code has run with.
        used: Isa,
    },
}

impl Isa {
    /// All of them, slowest first.
    pub const ALL: [Self; 3] = [Self::Scalar, Self::Avx2, Self::Avx512];

    /// Name as `--isa` and manifests write it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    /// True when this CPU has it.
    pub fn supported(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => pulp::x86::V3::is_available(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => pulp::x86::V4::is_available(),
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::Avx512 => false,
        }
    }

    /// The best that this CPU has.
    pub fn best() -> Self {
        Self::ALL.into_iter().rfind(|isa| isa.supported()).unwrap_or(Self::Scalar)
    }

    /// The dispatch token; `None` when this CPU lacks the instructions.
    fn arch(self) -> Option<Arch> {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Scalar => Some(Arch::Scalar),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => pulp::x86::V3::try_new().map(Arch::V3),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => pulp::x86::V4::try_new().map(Arch::V4),
            // Elsewhere the baseline is all there is, and pulp's best is that.
            #[cfg(not(target_arch = "x86_64"))]
            Self::Scalar => Some(Arch::new()),
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::Avx512 => None,
        }
    }
}

impl std::fmt::Display for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Isa {
    type Err = IsaError;

    fn from_str(name: &str) -> Result<Self, IsaError> {
        let found = Self::ALL.into_iter().find(|isa| isa.name() == name);
        found.ok_or_else(|| IsaError::Unknown { name: name.to_owned() })
    }
}

/// What this process runs with, set once.
static CHOSEN: OnceLock<(Isa, Arch)> = OnceLock::new();

fn chosen() -> (Isa, Arch) {
    *CHOSEN.get_or_init(|| {
        let best = Isa::best();
        (best, best.arch().expect("the best is supported"))
    })
}

/// Pins the instruction set of this process. Call it once, before anything is computed.
///
/// # Errors
/// [`IsaError::Unsupported`] when this CPU lacks it, [`IsaError::InUse`] when another one was pinned or
/// used before.
pub fn pin(isa: Isa) -> Result<(), IsaError> {
    let Some(arch) = isa.arch() else {
        let has = Isa::ALL.iter().filter(|isa| isa.supported()).map(|isa| isa.name()).collect();
        return Err(IsaError::Unsupported { asked: isa, has });
    };
    let (used, _) = *CHOSEN.get_or_init(|| (isa, arch));
    if used == isa { Ok(()) } else { Err(IsaError::InUse { asked: isa, used }) }
}

/// The instruction set in use: the pinned one, else the best.
pub fn isa() -> Isa {
    chosen().0
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
        for isa in Isa::ALL {
            assert_eq!(isa.name().parse(), Ok(isa));
        }
        let error = "avx1024".parse::<Isa>().unwrap_err().to_string();
        assert!(error.contains("avx1024") && error.contains("avx2"), "{error}");
        let used = isa();
        assert_eq!(used, Isa::best());
        assert_eq!(pin(used), Ok(()));
        for other in Isa::ALL.into_iter().filter(|&isa| isa != used) {
            let error = pin(other).unwrap_err();
            let expected = if other.supported() { "in use already" } else { "this CPU has no" };
            assert!(error.to_string().contains(expected), "{error}");
        }
        let missing = IsaError::Unsupported { asked: Isa::Avx512, has: vec!["scalar", "avx2"] };
        assert_eq!(missing.to_string(), "this CPU has no avx512; it has scalar, avx2");
    }
}
