//! Products of f32 on the tile registers of AMX, which multiply bf16 and add in f32.
//!
//! An f32 is the sum of three bf16, `x = x₁ + x₂ + x₃`, each the leading eight bits of what is left of it.
//! Of the nine products of two such sums the six largest are made,
//! `x y = x₁y₁ + x₁y₂ + x₂y₁ + x₂y₂ + x₁y₃ + x₃y₁ + O(2⁻²²) |x y|` (Henry, Tang and Heinecke 2019,
//! arXiv:1904.06376), and six tile products take less time than one in f32 on vectors. A plane that is zero in a
//! whole panel (weights that were bf16, or codes times bf16 scales) is left out, which changes no bit.
//!
//! The loops are those of `microkernel`: a block of A stays in the L2 cache, panels of B pass by, and an
//! element's sum runs over k in blocks of `KC`, inside of one over 32 products after the other, in a fixed order.
//! Values below 2⁻¹²⁶ count as zero.

use std::{
    arch::{
        asm,
        x86_64::{
            __m512, __m512i, _mm512_and_si512, _mm512_castps_si512, _mm512_castsi512_ps,
            _mm512_loadu_ps, _mm512_or_si512, _mm512_reduce_or_epi32, _mm512_set1_epi32,
            _mm512_setzero_ps, _mm512_setzero_si512, _mm512_shuffle_f32x4, _mm512_shuffle_ps,
            _mm512_srli_epi32, _mm512_storeu_si512, _mm512_sub_ps, _mm512_unpackhi_ps,
            _mm512_unpacklo_ps,
        },
    },
    cell::RefCell,
};

use rayon::prelude::*;

use super::microkernel::{KC, Operand, PLANES, Panels, Product};

/// Rows and columns of `out` that are made together, in four registers.
const SIDE: usize = 32;
/// Rows of a register.
const ROWS: usize = 16;
/// Products that a register holds of a row: sixteen words of two bf16.
const DEPTH: usize = 32;
/// Words of a register.
const TILE: usize = ROWS * DEPTH / 2;
/// Words of a plane of a panel at [`DEPTH`] products.
const PLANE: usize = 2 * TILE;
/// Upper bound of the rows of A that are packed at once: 768 KiB in three planes.
const MC: usize = 256;
/// Words of the next panel of B that are asked for with each [`DEPTH`] products.
const AHEAD: usize = 192;
/// Words of all panels of B at one depth that are kept for several blocks of A: 2 MiB.
const KEPT: usize = 1 << 19;
/// The bits of an f32 that are a bf16.
const HIGH: i32 = 0xffff_0000_u32.cast_signed();

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
struct Sums([[f32; SIDE]; SIDE]);

/// Sixteen vectors of sixteen.
type Square = [__m512; ROWS];

/// The vector of `x`, zero beyond its end.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn load(x: &[f32]) -> __m512 {
    if let Some(x) = x.first_chunk::<ROWS>() {
        // SAFETY: there are sixteen.
        return unsafe { _mm512_loadu_ps(x.as_ptr()) };
    }
    let mut all = [0.0f32; ROWS];
    all[..x.len()].copy_from_slice(x);
    // SAFETY: there are sixteen.
    unsafe { _mm512_loadu_ps(all.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn store(words: __m512i, to: &mut [u32; ROWS]) {
    // SAFETY: there is room for sixteen.
    unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), words) }
}

/// The bf16 that each f32 is the sum of, in the upper halves of words.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn split(x: __m512) -> [__m512i; PLANES] {
    let high = _mm512_set1_epi32(HIGH);
    let first = _mm512_and_si512(_mm512_castps_si512(x), high);
    let rest = _mm512_sub_ps(x, _mm512_castsi512_ps(first));
    let second = _mm512_and_si512(_mm512_castps_si512(rest), high);
    let rest = _mm512_sub_ps(rest, _mm512_castsi512_ps(second));
    [first, second, _mm512_and_si512(_mm512_castps_si512(rest), high)]
}

/// The planes of two vectors that share words, the first in the lower halves.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn join(first: __m512, second: __m512) -> [__m512i; PLANES] {
    let (first, second) = (split(first), split(second));
    let mut out = second;
    for plane in 0..PLANES {
        out[plane] = _mm512_or_si512(_mm512_srli_epi32::<16>(first[plane]), second[plane]);
    }
    out
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn transpose(x: &mut Square) {
    let mut pairs = [_mm512_setzero_ps(); ROWS];
    for i in (0..ROWS).step_by(2) {
        pairs[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    // Lane q of `fours[i + c]` holds column 4q + c of the rows i..i + 4.
    let mut fours = [_mm512_setzero_ps(); ROWS];
    for i in (0..ROWS).step_by(4) {
        fours[i] = _mm512_shuffle_ps::<0x44>(pairs[i], pairs[i + 2]);
        fours[i + 1] = _mm512_shuffle_ps::<0xee>(pairs[i], pairs[i + 2]);
        fours[i + 2] = _mm512_shuffle_ps::<0x44>(pairs[i + 1], pairs[i + 3]);
        fours[i + 3] = _mm512_shuffle_ps::<0xee>(pairs[i + 1], pairs[i + 3]);
    }
    for c in 0..4 {
        let low = _mm512_shuffle_f32x4::<0x44>(fours[c], fours[4 + c]);
        let high = _mm512_shuffle_f32x4::<0xee>(fours[c], fours[4 + c]);
        let low2 = _mm512_shuffle_f32x4::<0x44>(fours[8 + c], fours[12 + c]);
        let high2 = _mm512_shuffle_f32x4::<0xee>(fours[8 + c], fours[12 + c]);
        x[c] = _mm512_shuffle_f32x4::<0x88>(low, low2);
        x[4 + c] = _mm512_shuffle_f32x4::<0xdd>(low, low2);
        x[8 + c] = _mm512_shuffle_f32x4::<0x88>(high, high2);
        x[12 + c] = _mm512_shuffle_f32x4::<0xdd>(high, high2);
    }
}

/// Rows `i..i + rows` (at most sixteen) of an operand at `depth` products (at most 32) from `l` on, zero beyond: the
/// first sixteen products and the others, each one vector per row if `by_row`, else one per product.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn fetch(
    op: Operand<'_>,
    (i, rows): (usize, usize),
    (l, depth): (usize, usize),
    by_row: bool,
    out: &mut [Square; 2],
) {
    for (half, out) in out.iter_mut().enumerate() {
        let l = l + half * ROWS;
        let depth = depth.saturating_sub(half * ROWS).min(ROWS);
        let (lines, length) = if op.depth_contiguous { (rows, depth) } else { (depth, rows) };
        let start = if op.depth_contiguous { i * op.stride + l } else { l * op.stride + i };
        if lines == ROWS && length == ROWS {
            for (line, out) in out.iter_mut().enumerate() {
                *out = load(&op.data[start + line * op.stride..][..ROWS]);
            }
        } else {
            for (line, out) in out.iter_mut().enumerate() {
                *out = if line < lines && length > 0 {
                    load(&op.data[start + line * op.stride..][..length])
                } else {
                    _mm512_setzero_ps()
                };
            }
        }
        if by_row != op.depth_contiguous {
            transpose(out);
        }
    }
}

/// Packs a panel: rows `i..i + rows` (at most [`SIDE`]) of an operand at `depth` products from `l0` on, as
/// `[32 products][plane][half of the rows]` registers with `planes` planes. Rows of the operand are rows of the
/// register (`by_row`, for A) or its columns (for B); product l shares a word with product l + 16. Says how many
/// planes are not zero.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn pack(
    op: Operand<'_>,
    (i, rows): (usize, usize),
    (l0, depth): (usize, usize),
    (by_row, planes): (bool, usize),
    dest: &mut [u32],
) -> usize {
    let mut seen = [_mm512_setzero_si512(); PLANES];
    let mut space = [[_mm512_setzero_ps(); ROWS]; 2];
    for (block, dest) in dest.chunks_exact_mut(planes * PLANE).enumerate() {
        let l = block * DEPTH;
        let depth = DEPTH.min(depth - l);
        for half in 0..2 {
            let rows = rows.saturating_sub(half * ROWS).min(ROWS);
            if rows == 0 {
                for plane in dest.chunks_exact_mut(PLANE) {
                    plane[half * TILE..][..TILE].fill(0);
                }
                continue;
            }
            fetch(op, (i + half * ROWS, rows), (l0 + l, depth), by_row, &mut space);
            let [first, second] = &space;
            for line in 0..ROWS {
                let words = join(first[line], second[line]);
                for (plane, words) in words.into_iter().enumerate() {
                    seen[plane] = _mm512_or_si512(seen[plane], words);
                    if plane < planes {
                        let at = plane * PLANE + half * TILE + line * ROWS;
                        let to = dest[at..].first_chunk_mut().expect("a line of a register");
                        store(words, to);
                    }
                }
            }
        }
    }
    seen.into_iter().rposition(|bits| _mm512_reduce_or_epi32(bits) != 0).map_or(1, |last| last + 1)
}

/// Packs a panel of A from the panels of B, `room` blocks of depth each, whose columns are rows of A.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn pack_again(
    (panels, room, planes): (&[u32], usize, usize),
    n: usize,
    row: usize,
    dest: &mut [u32],
) {
    for half in 0..2 {
        let row = row + half * ROWS;
        debug_assert!(row.is_multiple_of(ROWS), "strips are whole registers");
        for (block, dest) in dest.chunks_exact_mut(PLANES * PLANE).enumerate() {
            for (plane, dest) in dest.chunks_exact_mut(PLANE).enumerate() {
                let dest = &mut dest[half * TILE..][..TILE];
                if row >= n || plane >= planes {
                    dest.fill(0);
                    continue;
                }
                let at = ((row / SIDE * room + block) * planes + plane) * PLANE;
                let from: &[f32] = bytemuck::cast_slice(&panels[at + row % SIDE / ROWS * TILE..]);
                let mut lines = [_mm512_setzero_ps(); ROWS];
                for (line, from) in lines.iter_mut().zip(from.chunks_exact(ROWS)) {
                    *line = load(from);
                }
                transpose(&mut lines);
                for (line, to) in lines.into_iter().zip(dest.as_chunks_mut().0) {
                    store(_mm512_castps_si512(line), to);
                }
            }
        }
    }
}

/// Words of the panels of B `[n, k]` in so many planes.
pub(super) const fn words(n: usize, k: usize, planes: usize) -> usize {
    n.div_ceil(SIDE) * k.div_ceil(DEPTH) * planes * PLANE
}

/// Planes that all of an operand `[n, k]` takes.
pub(super) fn planes(op: Operand<'_>, n: usize, k: usize) -> usize {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    fn of_line(x: &[f32]) -> usize {
        let mut seen = [_mm512_setzero_si512(); PLANES];
        for x in x.chunks(ROWS) {
            for (seen, plane) in seen.iter_mut().zip(split(load(x))) {
                *seen = _mm512_or_si512(*seen, plane);
            }
        }
        let last = seen.into_iter().rposition(|bits| _mm512_reduce_or_epi32(bits) != 0);
        last.map_or(1, |last| last + 1)
    }
    require();
    let (lines, length) = if op.depth_contiguous { (n, k) } else { (k, n) };
    let mut most = 1;
    for line in 0..lines {
        // SAFETY: `require` made sure of the instructions.
        most = most.max(unsafe { of_line(&op.data[line * op.stride..][..length]) });
        if most == PLANES {
            break;
        }
    }
    most
}

/// Packs all of B `[n, k]` in so many planes. Runs on rayon's current pool.
pub(super) fn pack_panels(b: Operand<'_>, (n, k): (usize, usize), planes: usize, data: &mut [f32]) {
    require();
    let mut rest: &mut [u32] = bytemuck::cast_slice_mut(&mut data[..words(n, k, planes)]);
    let mut tasks = Vec::new();
    for l0 in (0..k).step_by(KC) {
        let depth = KC.min(k - l0);
        for j in (0..n).step_by(SIDE) {
            let (dest, behind) = rest.split_at_mut(words(SIDE, depth, planes));
            tasks.push((l0, depth, j, dest));
            rest = behind;
        }
    }
    tasks.into_par_iter().with_min_len(4).for_each(|(l0, depth, j, dest)| {
        let rows = (j, SIDE.min(n - j));
        // SAFETY: `require` made sure of the instructions.
        unsafe { pack(b, rows, (l0, depth), (false, planes), dest) };
    });
}

/// Packs products `at..` of B `[n, k]` from the rows of `x [products, n]`, into panels with room for `KC` products.
/// Runs on rayon's current pool.
pub(super) fn pack_rows(x: &[f32], n: usize, at: usize, data: &mut [f32]) {
    require();
    let data: &mut [u32] = bytemuck::cast_slice_mut(data);
    let count = x.len() / n;
    let b = Operand { data: x, stride: n, depth_contiguous: false };
    let mut l0 = 0;
    while l0 < count {
        let (chunk, inside) = ((at + l0) / KC, (at + l0) % KC);
        let depth = (KC - inside).min(count - l0);
        let dest = &mut data[chunk * words(n, KC, PLANES)..][..words(n, KC, PLANES)];
        let panels = dest.par_chunks_mut(words(SIDE, KC, PLANES)).enumerate().with_min_len(4);
        panels.for_each(|(panel, dest)| {
            let columns = (panel * SIDE, SIDE.min(n - panel * SIDE));
            // Whole blocks at once, what lies before and behind them product by product.
            let mut l = 0;
            while l < depth {
                let place = inside + l;
                let dest = &mut dest[place / DEPTH * PLANES * PLANE..];
                let whole = (depth - l) / DEPTH * DEPTH;
                if place.is_multiple_of(DEPTH) && whole > 0 {
                    let dest = &mut dest[..whole / DEPTH * PLANES * PLANE];
                    // SAFETY: `require` made sure of the instructions.
                    unsafe { pack(b, columns, (l0 + l, whole), (false, PLANES), dest) };
                    l += whole;
                    continue;
                }
                let block = &mut dest[..PLANES * PLANE];
                if place.is_multiple_of(DEPTH) {
                    // What lies beyond the last product counts as zero.
                    block.fill(0);
                }
                // SAFETY: `require` made sure of the instructions.
                unsafe { add_row(&x[(l0 + l) * n + columns.0..][..columns.1], place, block) };
                l += 1;
            }
        });
        l0 += depth;
    }
}

/// Puts the product at `place` of up to 32 columns into a block of a panel of B, whose words are zero there.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn add_row(x: &[f32], place: usize, block: &mut [u32]) {
    for (half, x) in x.chunks(ROWS).enumerate() {
        let zero = _mm512_setzero_ps();
        let product = place % DEPTH;
        let planes = if product < ROWS { join(load(x), zero) } else { join(zero, load(x)) };
        for (plane, words) in planes.into_iter().enumerate() {
            let at = plane * PLANE + half * TILE + product % ROWS * ROWS;
            let line: &mut [u32; ROWS] =
                block[at..].first_chunk_mut().expect("a line of a register");
            let mut new = [0; ROWS];
            store(words, &mut new);
            for (to, word) in line.iter_mut().zip(new) {
                *to |= word;
            }
        }
    }
}

/// Makes sure that tiles, and with them AVX-512, are what this process computes with.
fn require() {
    assert!(super::level() == super::Level::Amx, "tiles are in use");
}

macro_rules! load_a {
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
    (1) => {
        load_a!("0", "1024")
    };
    (2) => {
        load_a!("2048", "3072")
    };
    (3) => {
        load_a!("4096", "5120")
    };
}

macro_rules! load_b {
    ($at:literal, $next:literal) => {
        concat!(
            "tileloadd tmm6, [{b} + {row} + ",
            $at,
            "]\n",
            "tileloadd tmm7, [{b} + {row} + ",
            $next,
            "]\n"
        )
    };
    (1) => {
        load_b!("0", "1024")
    };
    (2) => {
        load_b!("2048", "3072")
    };
    (3) => {
        load_b!("4096", "5120")
    };
}

/// The four products of the registers of two planes.
macro_rules! dot {
    () => {
        "tdpbf16ps tmm0, tmm4, tmm6\ntdpbf16ps tmm1, tmm4, tmm7\ntdpbf16ps tmm2, tmm5, tmm6\ntdpbf16ps tmm3, tmm5, tmm7\n"
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
fn multiply_panels(
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
        (1, 1) => run!(load_a!(1), load_b!(1), dot!()),
        (1, 2) => run!(load_a!(1), load_b!(1), dot!(), load_b!(2), dot!()),
        (1, _) => {
            run!(load_a!(1), load_b!(3), dot!(), load_b!(1), dot!(), load_b!(2), dot!());
        }
        (2, 1) => run!(load_a!(1), load_b!(1), dot!(), load_a!(2), dot!()),
        (2, 2) => run!(
            load_a!(1),
            load_b!(1),
            dot!(),
            load_b!(2),
            dot!(),
            load_a!(2),
            dot!(),
            load_b!(1),
            dot!()
        ),
        (2, _) => run!(
            load_a!(1),
            load_b!(3),
            dot!(),
            load_b!(1),
            dot!(),
            load_b!(2),
            dot!(),
            load_a!(2),
            dot!(),
            load_b!(1),
            dot!()
        ),
        (_, 1) => {
            run!(load_a!(1), load_b!(1), dot!(), load_a!(2), dot!(), load_a!(3), dot!());
        }
        (_, 2) => run!(
            load_a!(1),
            load_b!(1),
            dot!(),
            load_b!(2),
            dot!(),
            load_a!(2),
            dot!(),
            load_b!(1),
            dot!(),
            load_a!(3),
            dot!()
        ),
        (_, _) => run!(
            load_a!(1),
            load_b!(3),
            dot!(),
            load_b!(1),
            dot!(),
            load_b!(2),
            dot!(),
            load_a!(2),
            dot!(),
            load_b!(1),
            dot!(),
            load_a!(3),
            dot!()
        ),
    }
}

/// Runs `body` with the registers configured, and gives them back.
fn with_tiles<R>(body: impl FnOnce() -> R) -> R {
    require();
    // SAFETY: the level in use is one that this CPU and its system support; the configuration is 64 bytes.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(nostack, readonly)) };
    let result = body();
    // SAFETY: as above; nothing is kept in the registers between products.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
    result
}

/// Packing space of a thread.
#[derive(Default)]
struct Space {
    a: Vec<u32>,
    b: Vec<u32>,
}

/// The words from the first on that begins a cache line.
fn aligned(memory: &mut Vec<u32>, words: usize) -> &mut [u32] {
    if memory.len() < words + ROWS {
        memory.resize(words + ROWS, 0);
    }
    let start = memory.as_ptr().align_offset(64).min(ROWS);
    &mut memory[start..start + words]
}

thread_local! {
    /// Packing space of this thread; its content never outlives a call.
    static SPACE: RefCell<Space> = RefCell::default();
}

/// The loops of a product.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn run(product: Product<'_>, space_a: &mut [u32], space_b: &mut [u32]) {
    let Product { shape: (m, n, k), alpha, a, b, add, out, ldo, panels, below } = product;
    let mc = m.div_ceil(m.div_ceil(MC)).next_multiple_of(SIDE);
    let mut sums = Sums([[0.0; SIDE]; SIDE]);
    let mut seen_b = [0u8; KEPT / (PLANES * PLANE)];
    for l0 in (0..k).step_by(KC) {
        let depth = KC.min(k - l0);
        let deep = depth.div_ceil(DEPTH) * PLANES * PLANE;
        // The panels of B from this depth on: words, blocks of depth of each, planes.
        let ready = panels.map(|Panels { data, roomy, planes }| {
            let data: &[u32] = bytemuck::cast_slice(data);
            let room = if roomy { KC } else { depth }.div_ceil(DEPTH);
            (&data[words(n, l0, planes)..], room, planes)
        });
        // B stays packed for all blocks of A if it is small.
        let kept = panels.is_none() && m > mc && words(n, KC.min(k), PLANES) <= KEPT;
        for i0 in (0..m).step_by(mc) {
            let block = mc.min(m - i0);
            let mut seen = [PLANES; MC / SIDE];
            for (p, i) in (0..block).step_by(SIDE).enumerate() {
                let to = &mut space_a[p * deep..][..deep];
                if let (Some(ready), Some(d)) = (ready, below) {
                    pack_again(ready, n, d + i0 + i, to);
                } else {
                    let rows = (i0 + i, SIDE.min(block - i));
                    seen[p] = pack(a, rows, (l0, depth), (true, PLANES), to);
                }
            }
            for j in (0..n).step_by(SIDE) {
                // With `below`, lines of `out` may end before B does; what lies behind is not wanted.
                let columns = SIDE.min(n.min(ldo).saturating_sub(j));
                if below.is_some_and(|d| i0 + block + d <= j) {
                    break;
                }
                let (panel, next) = if let Some((data, room, planes)) = ready {
                    let size = room * planes * PLANE;
                    let (panel, next) = data[j / SIDE * size..].split_at(size);
                    ((panel, planes, planes), next.as_ptr())
                } else {
                    let (at, count) = if kept { (j / SIDE, n.div_ceil(SIDE)) } else { (0, 1) };
                    let panels = &mut space_b[..count * deep];
                    if !kept || i0 == 0 {
                        let (rows, to) = ((j, SIDE.min(n - j)), &mut panels[at * deep..][..deep]);
                        seen_b[at] = pack(b, rows, (l0, depth), (false, PLANES), to) as u8;
                    }
                    let (panel, next) = panels[at * deep..].split_at(deep);
                    ((panel, PLANES, usize::from(seen_b[at])), next.as_ptr())
                };
                for (p, i) in (0..block).step_by(SIDE).enumerate() {
                    let rows = SIDE.min(block - i);
                    if below.is_some_and(|d| i0 + i + rows + d <= j) {
                        continue;
                    }
                    let a = &space_a[p * deep..][..deep];
                    let out = &mut out[(i0 + i) * ldo + j..];
                    // A share of the next panel with each panel of A.
                    let next = next.wrapping_add(p * depth.div_ceil(DEPTH) * AHEAD);
                    let ahead = (next, out.as_ptr(), 4 * ldo);
                    multiply_panels((a, seen[p]), panel, ahead, &mut sums);
                    for (to, sums) in out.chunks_mut(ldo).zip(&sums.0).take(rows) {
                        let to = &mut to[..columns];
                        if add || l0 > 0 {
                            for (to, &sum) in to.iter_mut().zip(sums) {
                                *to = alpha.mul_add(sum, *to);
                            }
                        } else {
                            for (to, &sum) in to.iter_mut().zip(sums) {
                                *to = alpha * sum;
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Runs one product (neither side empty) on this thread.
pub(super) fn multiply(product: Product<'_>) {
    let (m, n, k) = product.shape;
    let mut space = SPACE.take();
    let deep = KC.min(k).div_ceil(DEPTH) * PLANES * PLANE;
    let Space { a, b } = &mut space;
    let a = aligned(a, MC.min(m).div_ceil(SIDE) * deep);
    let all = words(n, KC.min(k), PLANES);
    let b = aligned(b, if product.panels.is_none() && m > MC && all <= KEPT { all } else { deep });
    // SAFETY: `with_tiles` made sure of the instructions.
    with_tiles(|| unsafe { run(product, a, b) });
    SPACE.set(space);
}

#[cfg(test)]
mod tests {
    use super::super::{GramAccumulator, Level, PackedRows, gemm_nt, gemm_tn, level};
    use crate::{Mat, compare::distance, rng::Rng};

    fn exact((m, n, k): (usize, usize, usize), a: &[f32], b: &[f32]) -> Vec<f64> {
        let dot = |i: usize, j: usize| {
            (0..k).map(|l| f64::from(a[i * k + l]) * f64::from(b[j * k + l])).sum::<f64>()
        };
        (0..m * n).map(|at| dot(at / n, at % n)).collect()
    }

    /// Square root of the mean square of the errors over that of the values.
    fn error(got: &[f32], want: &[f64]) -> f64 {
        let (mut off, mut all) = (0.0, 0.0);
        for (&got, &want) in got.iter().zip(want) {
            off += (f64::from(got) - want).powi(2);
            all += want * want;
        }
        (off / all).sqrt()
    }

    #[test]
    fn sums_are_as_exact_as_those_in_f32() {
        if level() != Level::Amx {
            println!("skipped: no AMX");
            return;
        }
        let shape @ (m, n, k) = (70, 45, 1500);
        let mut rng = Rng::new(11);
        let (a, b) = (rng.normals(m * k), rng.normals(n * k));
        // Values of one sign, whose cut-off parts add up.
        let positive = |x: &[f32]| x.iter().map(|v| v.abs() + 0.1).collect::<Vec<_>>();
        for (a, b) in [(a.clone(), b.clone()), (positive(&a), positive(&b))] {
            let want = exact(shape, &a, &b);
            let mut out = vec![0.0; m * n];
            gemm_nt(shape, 1.0, (&a, k), (&b, k), false, (&mut out, n));
            let chain: Vec<f32> = (0..m * n)
                .map(|at| {
                    let (i, j) = (at / n, at % n);
                    (0..k).fold(0.0f32, |sum, l| a[i * k + l].mul_add(b[j * k + l], sum))
                })
                .collect();
            let (tiles, chain) = (error(&out, &want), error(&chain, &want));
            assert!(tiles < 1.2 * chain && tiles < 1e-6, "{tiles:e} and {chain:e}");
        }
    }

    #[test]
    fn leaving_out_planes_changes_no_bit() {
        if level() != Level::Amx {
            println!("skipped: no AMX");
            return;
        }
        let (m, n, k) = (33, 50, 600);
        let mut rng = Rng::new(12);
        let a = rng.normals(m * k);
        // Codes of four bits times scales in bf16 take two planes, bf16 one, f32 three.
        let codes: Vec<f32> =
            rng.normals(n * k).iter().map(|v| (3.0 * v).round() * 0.010_925_293).collect();
        let short = |x: &f32| f32::from_bits(x.to_bits() & 0xffff_0000);
        for (planes, b) in [(1, codes.iter().map(short).collect()), (2, codes.clone())] {
            let op = super::Operand { data: &b, stride: k, depth_contiguous: true };
            assert_eq!(super::planes(op, n, k), planes);
            let mut plain = vec![0.0; m * n];
            gemm_nt((m, n, k), 1.0, (&a, k), (&b, k), false, (&mut plain, n));
            let mut packed = vec![0.0; m * n];
            PackedRows::new((&b, k), n, k).gemm_nt(m, (&a, k), (&mut packed, n));
            assert_eq!(plain, packed);
            // One more row of B, in three planes, keeps no other row from its bits.
            let long: Vec<f32> = b.iter().copied().chain(a[..k].iter().copied()).collect();
            let mut more = vec![0.0; m * (n + 1)];
            PackedRows::new((&long, k), n + 1, k).gemm_nt(m, (&a, k), (&mut more, n + 1));
            let same = more.chunks(n + 1).zip(plain.chunks(n)).all(|(x, y)| x[..n] == *y);
            assert!(same, "planes that are zero add nothing");
        }
    }

    #[test]
    fn rows_that_come_one_by_one_are_packed_like_many() {
        let (n, tokens) = (70, 147);
        let x = Rng::new(13).normals(tokens * n);
        let mut whole = GramAccumulator::new(n);
        whole.add(&x).unwrap();
        let mut parts = GramAccumulator::new(n);
        for rows in [&x[..5 * n], &x[5 * n..6 * n], &x[6 * n..101 * n], &x[101 * n..]] {
            parts.add(rows).unwrap();
        }
        let (whole, parts) = (whole.finish(1.0).unwrap(), parts.finish(1.0).unwrap());
        assert_eq!(whole, parts);
        let mut want = Mat::zeros((n, n));
        let out = want.as_slice_mut().unwrap();
        gemm_tn((n, n, tokens), 1.0, (&x, n), (&x, n), false, (out, n));
        let (got, want) = (whole.as_slice().unwrap(), want.as_slice().unwrap());
        assert!(distance(got, want).nmse < 1e-12);
    }
}
