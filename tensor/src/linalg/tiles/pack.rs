//! Operands as tile registers read them: planes of bf16, product l of 32 sharing a word with product l + 16.

use std::arch::x86_64::{
    __m512, __m512i, _mm512_and_si512, _mm512_castps_si512, _mm512_castsi512_ps, _mm512_loadu_ps,
    _mm512_or_si512, _mm512_reduce_or_epi32, _mm512_set1_epi32, _mm512_setzero_ps,
    _mm512_setzero_si512, _mm512_shuffle_f32x4, _mm512_shuffle_ps, _mm512_srli_epi32,
    _mm512_storeu_si512, _mm512_sub_ps, _mm512_unpackhi_ps, _mm512_unpacklo_ps,
};

use rayon::prelude::*;

use super::{
    super::microkernel::{KC, Operand, PLANES},
    DEPTH, PLANE, ROWS, SIDE, TILE, require,
};

/// The bits of an f32 that are a bf16.
const HIGH: i32 = 0xffff_0000_u32.cast_signed();

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
pub(super) fn pack(
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
pub(super) fn pack_again(
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
pub(in super::super) const fn words(n: usize, k: usize, planes: usize) -> usize {
    n.div_ceil(SIDE) * k.div_ceil(DEPTH) * planes * PLANE
}

/// Planes that all of an operand `[n, k]` takes.
pub(in super::super) fn planes(op: Operand<'_>, n: usize, k: usize) -> usize {
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
pub(in super::super) fn pack_panels(
    b: Operand<'_>,
    (n, k): (usize, usize),
    planes: usize,
    data: &mut [f32],
) {
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
pub(in super::super) fn pack_rows(x: &[f32], n: usize, at: usize, data: &mut [f32]) {
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
