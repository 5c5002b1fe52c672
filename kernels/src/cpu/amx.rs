//! AMX: 16 rows of a tile by 16 tokens in one instruction, for many tokens. The integer sums and the f32
//! steps behind them are those of the AVX-512 kernel, so that both give the same bits.
//!
//! A block is a product of 16 tokens x 32 bytes with 8 quads x 16 rows, which is how a tile of weights
//! already lies once its codes are bytes. The system grants the tile registers to a process that asks.

use std::arch::asm;
use std::arch::x86_64::{
    __m512, _mm512_cvtepi32_ps, _mm512_fmadd_ps, _mm512_fnmadd_ps, _mm512_loadu_si512,
    _mm512_mul_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
};

use attar_tensor::linalg::amx;

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
    amx::granted(amx::INT8)
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

/// Registers 0 and 3: sums, 1 and 4: tokens, 2 and 5: weights; two blocks are on their way at a time.
static CONFIG: Config = {
    let (mut bytes, mut rows) = ([0; 16], [0; 16]);
    (bytes[0], rows[0]) = (4 * ROWS as u16, TOKENS as u8);
    (bytes[1], rows[1]) = (BLOCK as u16, TOKENS as u8);
    (bytes[2], rows[2]) = (QUAD as u16, QUADS as u8);
    (bytes[3], rows[3]) = (bytes[0], rows[0]);
    (bytes[4], rows[4]) = (bytes[1], rows[1]);
    (bytes[5], rows[5]) = (bytes[2], rows[2]);
    Config { palette: 1, start_row: 0, reserved: [0; 14], bytes, rows }
};

/// Activations of sixteen tokens beside each other: `[block][token]` and `[group][token]`.
#[derive(Debug)]
pub(crate) struct Sixteen {
    /// `[block][token][32 places]`: rows of a register that lie next to each other. At the distance of
    /// whole tokens, often a power of two, they would push each other out of the first-level cache.
    q: Vec<i8>,
    scales: Vec<f32>,
    sums: Vec<f32>,
}

impl Sixteen {
    /// The sixteen tokens from `first` on; `input` holds each token by itself.
    pub(crate) fn new(shape: &Shape, input: &Bytes, first: usize) -> Self {
        let mut all = Self {
            q: vec![0; shape.places() * TOKENS],
            scales: vec![0.0; shape.blocks() * TOKENS],
            sums: vec![0.0; shape.groups() * TOKENS],
        };
        for t in 0..TOKENS {
            let one = input.chunk(shape, input.chunks[first + t]);
            let blocks = all.q.as_chunks_mut::<BLOCK>().0[t..].iter_mut().step_by(TOKENS);
            for (to, q) in blocks.zip(one.q.as_chunks::<BLOCK>().0) {
                *to = *q;
            }
            for (to, &scale) in all.scales[t..].iter_mut().step_by(TOKENS).zip(one.scales) {
                *to = scale;
            }
            for (to, &sum) in all.sums[t..].iter_mut().step_by(TOKENS).zip(one.sums) {
                *to = sum;
            }
        }
        all
    }
}

/// Multiplies block `$block` in three registers and stores its sums, if `$zero` from zero on.
macro_rules! product {
    ($c:literal, $a:literal, $b:literal, $zero:expr, $input:ident, $codes:ident, $block:expr, $dots:expr) => {{
        if $zero {
            asm!(concat!("tilezero tmm", $c), options(nostack, nomem, preserves_flags));
        }
        asm!(
            concat!("tileloadd tmm", $a, ", [{q} + {row}]"),
            concat!("tileloadd tmm", $b, ", [{codes} + {quad}]"),
            concat!("tdpbsud tmm", $c, ", tmm", $a, ", tmm", $b),
            q = in(reg) $input.q.as_ptr().add($block * BLOCK * TOKENS),
            row = in(reg) BLOCK,
            codes = in(reg) $codes.as_ptr().add($block * BLOCK * ROWS),
            quad = in(reg) QUAD,
            options(nostack, readonly, preserves_flags),
        );
        if let Some(dots) = $dots {
            let dots: &mut [[i32; ROWS]; TOKENS] = dots;
            asm!(
                concat!("tilestored [{dots} + {row}], tmm", $c),
                dots = in(reg) dots.as_mut_ptr(),
                row = in(reg) 4 * ROWS,
                options(nostack, preserves_flags),
            );
        }
    }};
}

/// The 16 rows of a tile, whose codes are `codes`, times 16 tokens. `tile` serves for its scales. With
/// `per_token` all scales of a token are one.
///
/// The tile registers must be configured ([`with_tiles`]).
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(crate) fn fast(
    shape: &Shape,
    (tile, codes): (&[u8], &[u8]),
    input: &Sixteen,
    per_token: bool,
    out: &mut [[f32; ROWS]; TOKENS],
) {
    let places = shape.places();
    assert_eq!(tile.len(), shape.tile_bytes());
    assert_eq!(codes.len(), places * ROWS);
    assert_eq!(input.q.len(), places * TOKENS);
    assert_eq!(input.scales.len(), shape.blocks() * TOKENS);
    assert_eq!(input.sums.len(), shape.groups() * TOKENS);
    let middle = _mm512_set1_ps(shape.middle());
    let mut dots = [[[0i32; ROWS]; TOKENS]; 2];
    let mut totals: [__m512; TOKENS] = [_mm512_setzero_ps(); TOKENS];
    let mut sums: [__m512; TOKENS] = [_mm512_setzero_ps(); TOKENS];
    // Groups of one block follow each other in pairs too, so products run ahead by one block.
    let blocks = shape.blocks();
    if !per_token && blocks > 0 {
        // SAFETY: sixteen tokens, eight quads of the block and sixteen rows of sums are within `q`,
        // `codes` and `dots` by the assertions; the registers are configured.
        unsafe { product!("0", "1", "2", true, input, codes, 0, Some(&mut dots[0])) };
    }
    let mut at = 0;
    for group in 0..shape.groups() {
        let (first, end) =
            (shape.group_blocks[group] as usize, shape.group_blocks[group + 1] as usize);
        for block in first..end {
            if per_token {
                let last = (block + 1 == end).then_some(&mut dots[0]);
                // SAFETY: as above.
                unsafe { product!("0", "1", "2", block == first, input, codes, block, last) };
                continue;
            }
            let next = block + 1;
            if next < blocks {
                let [even, odd] = &mut dots;
                // SAFETY: as above.
                unsafe {
                    if next % 2 == 1 {
                        product!("3", "4", "5", true, input, codes, next, Some(odd));
                    } else {
                        product!("0", "1", "2", true, input, codes, next, Some(even));
                    }
                }
            }
            let scales = &input.scales[block * TOKENS..(block + 1) * TOKENS];
            let dots = &dots[block % 2];
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
        let x = &input.sums[group * TOKENS..(group + 1) * TOKENS];
        if per_token && first < end {
            each_token!(t {
                // SAFETY: as above.
                let dot = unsafe { _mm512_loadu_si512(dots[0][t].as_ptr().cast()) };
                let scale = _mm512_set1_ps(input.scales[t]);
                sums[t] = _mm512_mul_ps(_mm512_cvtepi32_ps(dot), scale);
            });
        }
        if shape.offset == Offset::Minimum {
            each_token!(t {
                let total = _mm512_fmadd_ps(sums[t], scale, totals[t]);
                totals[t] = _mm512_fnmadd_ps(offset, _mm512_set1_ps(x[t]), total);
                sums[t] = _mm512_setzero_ps();
            });
        } else {
            each_token!(t {
                let sum = _mm512_fnmadd_ps(offset, _mm512_set1_ps(x[t]), sums[t]);
                totals[t] = _mm512_fmadd_ps(sum, scale, totals[t]);
                sums[t] = _mm512_setzero_ps();
            });
        }
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
