//! AMX: 16 rows of a tile by 16 tokens in one instruction, for many tokens. The integer sums and the f32
//! steps behind them are those of the AVX-512 kernel, so that both give the same bits.
//!
//! A block is a product of 16 tokens x 32 bytes with 8 quads x 16 rows, which is how a tile of weights
//! already lies once its codes are bytes. The system grants the tile registers to a process that asks.

use std::arch::asm;
use std::arch::x86_64::{
    __cpuid, __cpuid_count, __m512, _mm512_cvtepi32_ps, _mm512_fmadd_ps, _mm512_fnmadd_ps,
    _mm512_loadu_si512, _mm512_mul_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
};
use std::sync::OnceLock;

use super::avx512;
use super::input::Bytes;
use super::tiles::{BLOCK, Offset, QUAD, QUADS, ROWS, Shape};

/// Tokens that are multiplied together.
pub(crate) const TOKENS: usize = 16;

macro_rules! each_token {
    ($t:ident $body:block) => {{
        each_token!(@ $t $body 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    }};
    (@ $t:ident $body:block $($n:literal)*) => {{ $({ let $t: usize = $n; $body })* }};
}

/// True when this machine has byte products of tiles and the system lets this process use them.
pub(crate) fn granted() -> bool {
    static GRANTED: OnceLock<bool> = OnceLock::new();
    *GRANTED.get_or_init(|| {
        // Bits of leaf 7: AMX tiles and AMX on bytes.
        let has = __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx >> 24 & 3 == 3;
        has && request()
    })
}

#[cfg(target_os = "linux")]
fn request() -> bool {
    /// `ARCH_REQ_XCOMP_PERM` and the number of the tile data.
    const REQUEST: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    // SAFETY: the call only asks for permission.
    unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, TILE_DATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn request() -> bool {
    false
}

/// The shape of the tile registers.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes: [u16; 16],
    rows: [u8; 16],
}

/// Register 0: sums, 1: tokens, 2: weights.
static CONFIG: Config = {
    let (mut bytes, mut rows) = ([0; 16], [0; 16]);
    (bytes[0], rows[0]) = (4 * ROWS as u16, TOKENS as u8);
    (bytes[1], rows[1]) = (BLOCK as u16, TOKENS as u8);
    (bytes[2], rows[2]) = (QUAD as u16, QUADS as u8);
    Config { palette: 1, start_row: 0, reserved: [0; 14], bytes, rows }
};

/// Activations of sixteen tokens beside each other: `[block][token]` and `[group][token]`.
#[derive(Debug)]
pub(crate) struct Sides {
    scales: Vec<f32>,
    sums: Vec<f32>,
}

impl Sides {
    /// Of the sixteen tokens from `first` on; `input` holds each token by itself.
    pub(crate) fn new(shape: &Shape, input: &Bytes, first: usize) -> Self {
        let mut sides = Self {
            scales: vec![0.0; shape.blocks() * TOKENS],
            sums: vec![0.0; shape.groups() * TOKENS],
        };
        for t in 0..TOKENS {
            let one = input.chunk(shape, input.chunks[first + t]);
            for (to, &scale) in sides.scales[t..].iter_mut().step_by(TOKENS).zip(one.scales) {
                *to = scale;
            }
            for (to, &sum) in sides.sums[t..].iter_mut().step_by(TOKENS).zip(one.sums) {
                *to = sum;
            }
        }
        sides
    }
}

/// The 16 rows of a tile, whose codes are `codes`, times 16 tokens whose bytes are `q [16, places]`.
/// `tile` serves for its scales. With `per_token` all scales of a token are one.
///
/// The tile registers must be configured ([`with_tiles`]).
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(crate) fn fast(
    shape: &Shape,
    (tile, codes): (&[u8], &[u8]),
    q: &[i8],
    sides: &Sides,
    per_token: bool,
    out: &mut [[f32; ROWS]; TOKENS],
) {
    let places = shape.places();
    assert_eq!(tile.len(), shape.tile_bytes());
    assert_eq!(codes.len(), places * ROWS);
    assert_eq!(q.len(), places * TOKENS);
    assert_eq!(sides.scales.len(), shape.blocks() * TOKENS);
    assert_eq!(sides.sums.len(), shape.groups() * TOKENS);
    let middle = _mm512_set1_ps(shape.middle());
    let mut dots = [[0i32; ROWS]; TOKENS];
    let mut totals: [__m512; TOKENS] = [_mm512_setzero_ps(); TOKENS];
    let mut at = 0;
    for group in 0..shape.groups() {
        let (first, end) =
            (shape.group_blocks[group] as usize, shape.group_blocks[group + 1] as usize);
        let mut sums: [__m512; TOKENS] = [_mm512_setzero_ps(); TOKENS];
        for block in first..end {
            // SAFETY: sixteen tokens `places` bytes apart, eight quads of the block, and sixteen rows of
            // sums are within `q`, `codes` and `dots` by the assertions; the registers are configured.
            unsafe {
                if !per_token || block == first {
                    asm!("tilezero tmm0", options(nostack, nomem, preserves_flags));
                }
                asm!(
                    "tileloadd tmm1, [{q} + {places}]",
                    "tileloadd tmm2, [{codes} + {quad}]",
                    "tdpbsud tmm0, tmm1, tmm2",
                    q = in(reg) q.as_ptr().add(block * BLOCK),
                    places = in(reg) places,
                    codes = in(reg) codes.as_ptr().add(block * BLOCK * ROWS),
                    quad = in(reg) QUAD,
                    options(nostack, readonly, preserves_flags),
                );
                if !per_token || block + 1 == end {
                    asm!(
                        "tilestored [{dots} + {row}], tmm0",
                        dots = in(reg) dots.as_mut_ptr(),
                        row = in(reg) 4 * ROWS,
                        options(nostack, preserves_flags),
                    );
                }
            }
            if per_token {
                continue;
            }
            let scales = &sides.scales[block * TOKENS..(block + 1) * TOKENS];
            each_token!(t {
                // SAFETY: a row of sums has sixteen of them.
                let dot = unsafe { _mm512_loadu_si512(dots[t].as_ptr().cast()) };
                let scale = _mm512_set1_ps(scales[t]);
                sums[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, sums[t]);
            });
        }
        at += (end - first) * shape.block_bytes();
        // SAFETY: scales and offsets stand behind the blocks of a group.
        let (scale, offset) = unsafe { avx512::scales(shape, middle, tile.as_ptr().add(at)) };
        at += shape.scale_bytes() + shape.offset_bytes();
        let x = &sides.sums[group * TOKENS..(group + 1) * TOKENS];
        each_token!(t {
            if per_token {
                // SAFETY: as above.
                let dot = unsafe { _mm512_loadu_si512(dots[t].as_ptr().cast()) };
                // A group without columns has stored nothing.
                let scale = if first == end { 0.0 } else { sides.scales[t] };
                sums[t] = _mm512_mul_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(scale));
            }
            let x = _mm512_set1_ps(x[t]);
            totals[t] = if shape.offset == Offset::Minimum {
                _mm512_fnmadd_ps(offset, x, _mm512_fmadd_ps(sums[t], scale, totals[t]))
            } else {
                _mm512_fmadd_ps(_mm512_fnmadd_ps(offset, x, sums[t]), scale, totals[t])
            };
        });
    }
    each_token!(t {
        // SAFETY: the store writes sixteen floats, which an element of `out` has.
        unsafe { _mm512_storeu_ps(out[t].as_mut_ptr(), totals[t]) };
    });
}

/// Runs `work` with configured tile registers and gives them back. The caller has made sure that they are
/// [`granted`].
pub(crate) fn with_tiles(work: impl FnOnce()) {
    assert!(granted(), "the system grants tiles");
    // SAFETY: the configuration is 64 bytes of palette 1, and this process may use the registers.
    unsafe {
        asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(nostack, readonly, preserves_flags));
    };
    work();
    // SAFETY: releases what was configured above.
    unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
}
