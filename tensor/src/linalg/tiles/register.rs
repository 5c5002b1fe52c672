//! One block of the output on the tile registers.

use std::arch::asm;

use super::{super::microkernel::PLANES, PLANE, ROWS, SIDE, require};

/// Words of the next panel of B that are asked for with each [`DEPTH`] products.
pub(super) const AHEAD: usize = 192;

/// Shape of the eight tile registers: all are sixteen rows of 64 bytes.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes: [u16; 16],
    rows: [u8; 16],
}

static CONFIG: Config = {
    let (mut bytes, mut rows) = ([0; 16], [0; 16]);
    let mut register = 0;
    while register < 8 {
        (bytes[register], rows[register]) = (64, ROWS as u8);
        register += 1;
    }
    Config { palette: 1, start_row: 0, reserved: [0; 14], bytes, rows }
};

/// Sums of a block of `out`.
#[repr(C, align(64))]
pub(super) struct Sums(pub(super) [[f32; SIDE]; SIDE]);

/// The four products of the registers of two planes.
macro_rules! dot {
    () => {
        "tdpbf16ps tmm0, tmm4, tmm6\ntdpbf16ps tmm1, tmm4, tmm7\ntdpbf16ps tmm2, tmm5, tmm6\ntdpbf16ps tmm3, tmm5, tmm7\n"
    };
}

/// Loads plane `$plane` of A.
macro_rules! load_a {
    (1) => {
        load_a!("0", "1024")
    };
    (2) => {
        load_a!("2048", "3072")
    };
    (3) => {
        load_a!("4096", "5120")
    };
    ($at:literal, $next:literal) => {
        concat!(
            "tileloadd tmm4, [{a} + {row} + ",
            $at,
            "]\n",
            "tileloadd tmm5, [{a} + {row} + ",
            $next,
            "]\n"
        )
    };
}

/// Loads plane `$plane` of B and multiplies.
macro_rules! by_b {
    (1) => {
        by_b!("0", "1024")
    };
    (2) => {
        by_b!("2048", "3072")
    };
    (3) => {
        by_b!("4096", "5120")
    };
    ($at:literal, $next:literal) => {
        concat!(
            "tileloadd tmm6, [{b} + {row} + ",
            $at,
            "]\n",
            "tileloadd tmm7, [{b} + {row} + ",
            $next,
            "]\n",
            dot!()
        )
    };
}

/// What the first plane of A is multiplied with, of so many planes of B; the last one loaded is the last but the first.
macro_rules! first {
    (1) => {
        concat!(load_a!(1), by_b!(1))
    };
    (2) => {
        concat!(load_a!(1), by_b!(1), by_b!(2))
    };
    (3) => {
        concat!(load_a!(1), by_b!(3), by_b!(1), by_b!(2))
    };
}

/// The second plane of A, behind [`first`].
macro_rules! second {
    (1) => {
        concat!(load_a!(2), dot!())
    };
    (2) => {
        concat!(load_a!(2), dot!(), by_b!(1))
    };
}

/// The third plane of A, behind [`second`].
macro_rules! third {
    () => {
        concat!(load_a!(3), dot!())
    };
}

/// One block of `out` over `$blocks` times [`DEPTH`] products; the steps are what is loaded and multiplied for each.
macro_rules! product {
    ($a:expr, $b:expr, $b_step:expr, $blocks:expr, $ahead:expr, $out:expr, $($step:expr),+) => {
        asm!(
            "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
            "2:",
            concat!($($step),+),
            "prefetcht1 [{next}]",
            "prefetcht1 [{next} + 64]",
            "prefetcht1 [{next} + 128]",
            "prefetcht1 [{next} + 192]",
            "prefetcht1 [{next} + 256]",
            "prefetcht1 [{next} + 320]",
            "prefetcht1 [{next} + 384]",
            "prefetcht1 [{next} + 448]",
            "prefetcht1 [{next} + 512]",
            "prefetcht1 [{next} + 576]",
            "prefetcht1 [{next} + 640]",
            "prefetcht1 [{next} + 704]",
            "prefetcht1 [{line}]",
            "prefetcht1 [{line} + 64]",
            "prefetcht1 [{line} + {ldo}]",
            "prefetcht1 [{line} + {ldo} + 64]",
            "add {next}, 768",
            "lea {line}, [{line} + 2*{ldo}]",
            "add {a}, 6144",
            "add {b}, {b_step}",
            "dec {blocks}",
            "jnz 2b",
            "add {row}, 64",
            "tilestored [{out} + {row}], tmm0",
            "tilestored [{out} + {row} + 64], tmm1",
            "tilestored [{out} + {row} + 2048], tmm2",
            "tilestored [{out} + {row} + 2112], tmm3",
            a = inout(reg) $a => _,
            b = inout(reg) $b => _,
            b_step = in(reg) $b_step,
            blocks = inout(reg) $blocks => _,
            row = inout(reg) 64usize => _,
            next = inout(reg) $ahead.0 => _,
            line = inout(reg) $ahead.1 => _,
            ldo = in(reg) $ahead.2,
            out = in(reg) $out,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}

/// `out = A Bᵀ` of a panel of A in three planes and one of B in `planes`, of which so many are not zero. The order
/// of the terms is the same whichever of them are left out. `ahead` is what to ask the caches for: a panel of B that
/// is wanted soon, lines of the output and their distance in bytes; it is not read.
#[inline]
pub(super) fn multiply_panels(
    (a, seen_a): (&[u32], usize),
    (b, planes, seen_b): (&[u32], usize, usize),
    ahead: (*const u32, *const f32, usize),
    out: &mut Sums,
) {
    let blocks = a.len() / (PLANES * PLANE);
    assert!(blocks > 0 && a.len() == blocks * PLANES * PLANE, "A is whole blocks");
    assert!(b.len() >= blocks * planes * PLANE && seen_b <= planes, "B is as deep");
    let (a, b, out) = (a.as_ptr(), b.as_ptr(), out.0.as_mut_ptr());
    let step = planes * PLANE * 4;
    macro_rules! run {
        ($($step:expr),+) => {
            // SAFETY: only `with_tiles` leads here, which made sure that this CPU has AMX for bf16 and configured
            // the registers. A has `blocks` times three planes and B at least `blocks` times `planes` planes of
            // 2048 bytes, of which `seen_b <= planes` are read; `out` is 32 lines of 128 bytes. Requests for cache
            // lines fault nowhere.
            unsafe { product!(a, b, step, blocks, ahead, out, $($step),+) }
        };
    }
    match (seen_a, seen_b) {
        (1, 1) => run!(first!(1)),
        (1, 2) => run!(first!(2)),
        (1, _) => run!(first!(3)),
        (2, 1) => run!(first!(1), second!(1)),
        (2, 2) => run!(first!(2), second!(2)),
        (2, _) => run!(first!(3), second!(2)),
        (_, 1) => run!(first!(1), second!(1), third!()),
        (_, 2) => run!(first!(2), second!(2), third!()),
        (_, _) => run!(first!(3), second!(2), third!()),
    }
}

/// Runs `body` with the registers configured, and gives them back.
pub(super) fn with_tiles<R>(body: impl FnOnce() -> R) -> R {
    require();
    // SAFETY: the level in use is one that this CPU and its system support; the configuration is 64 bytes.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(nostack, readonly)) };
    let result = body();
    // SAFETY: as above; nothing is kept in the registers between products.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
    result
}
