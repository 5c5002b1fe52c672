//! The blocked product behind `gemm` and `syrk`: `out (+)= alpha · A · B` on register tiles of f32.
//!
//! Three loops around a register tile (Goto and van de Geijn 2008, "Anatomy of high-performance matrix
//! multiplication"): a block of A of `MC x KC` is packed into panels of `MR` rows and stays in the L2
//! cache, a panel of B of `KC` x a few vectors is packed just before its use and stays in L1, and the
//! register tile sums `KC` products per element in one fused chain. An element's sum therefore runs over
//! k in blocks of `KC` in a fixed order, wherever its tile lies: any partition of `out` gives the same
//! bits.
//!
//! Everything under `pulp`'s dispatch must be `#[inline(always)]` (closures included), or it is compiled
//! without the vector instructions.

#![allow(
    clippy::inline_always,
    reason = "a body that is not inlined loses the vector instructions"
)]

use std::cell::RefCell;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::isa::arch;
#[cfg(target_arch = "x86_64")]
use super::{Level, level, tiles};

/// Products that are summed in registers before they reach `out`.
pub(super) const KC: usize = 512;
/// Upper bound of the rows of A that are packed at once (`MC x KC` f32 are half of a 2 MiB L2).
const MC: usize = 640;
/// Products between two requests for memory.
const STEP: usize = 16;
/// Floats per cache line.
const LINE: usize = 16;

/// An operand: element `(i, l)` is `data[i * stride + l]` when `depth_contiguous` (l is the summed
/// index), else `data[l * stride + i]`.
#[derive(Clone, Copy)]
pub(super) struct Operand<'a> {
    pub(super) data: &'a [f32],
    pub(super) stride: usize,
    pub(super) depth_contiguous: bool,
}

/// One product: `out [m, n] (+)= alpha · a [m, k] · (b [n, k])ᵀ`.
pub(super) struct Product<'a> {
    pub(super) shape: (usize, usize, usize),
    pub(super) alpha: f32,
    pub(super) a: Operand<'a>,
    pub(super) b: Operand<'a>,
    pub(super) add: bool,
    pub(super) out: &'a mut [f32],
    pub(super) ldo: usize,
    /// B packed beforehand; `b` is then not read.
    pub(super) panels: Option<Panels<'a>>,
    /// `Some(d)`, with panels: row i of A is row `d + i` of B and read from the panels, `a` is not; elements with
    /// `column > row + d` are not wanted and may be left unwritten.
    pub(super) below: Option<usize>,
}

/// B packed by [`pack_panels`] or [`pack_rows`].
#[derive(Clone, Copy)]
pub(super) struct Panels<'a> {
    pub(super) data: &'a [f32],
    /// Every panel has room for `KC` products, also where the depth ends before (`pack_rows`).
    pub(super) roomy: bool,
    /// bf16 per value, on tiles.
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "tiles are AMX's"))]
    pub(super) planes: usize,
}

impl<'a> Panels<'a> {
    /// The panels from depth `l0` on, and the room of each.
    #[inline(always)]
    fn at(self, l0: usize, depth: usize, width: usize) -> (&'a [f32], usize) {
        (&self.data[l0 * width..], if self.roomy { KC } else { depth })
    }
}

/// Vectors of the next panel of B when `left` columns are not packed yet: three, but four are left as two
/// and two, since a single one keeps the registers waiting.
#[inline(always)]
const fn panel_vectors(left: usize, lanes: usize) -> usize {
    match left.div_ceil(lanes) {
        1 => 1,
        2 | 4 => 2,
        _ => 3,
    }
}

/// First column and width of the panel of B `[n, k]` that holds column `column`.
fn panel_of(column: usize, n: usize, lanes: usize) -> (usize, usize) {
    // All panels but the last two have three vectors.
    let mut j = (column / (3 * lanes)).min(n.div_ceil(3 * lanes).saturating_sub(3)) * 3 * lanes;
    loop {
        let width = panel_vectors(n - j, lanes) * lanes;
        if column < j + width {
            return (j, width);
        }
        j += width;
    }
}

/// What the packing needs beyond `pulp::Simd`.
trait Isa: Simd {
    /// Transposes an 8 x 8 block.
    #[inline(always)]
    fn transpose(self, rows: [[f32; 8]; 8]) -> [[f32; 8]; 8] {
        let mut out = [[0.0; 8]; 8];
        for (c, out) in out.iter_mut().enumerate() {
            for (r, out) in out.iter_mut().enumerate() {
                *out = rows[r][c];
            }
        }
        out
    }

    /// Asks for a cache line, in the nearest cache.
    #[inline(always)]
    fn prefetch(self, _: &f32) {}

    /// Asks for a cache line, in the second cache.
    #[inline(always)]
    fn prefetch_far(self, _: &f32) {}
}

impl Isa for pulp::Scalar {}

/// Memory is left to the processor's own prefetching: pulp has no instruction that asks for it, and this crate no
/// `unsafe` for one.
#[cfg(target_arch = "aarch64")]
impl Isa for pulp::aarch64::Neon {}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use pulp::x86::{V3, V4};

    use super::Isa;

    impl Isa for V3 {
        /// The halves of two rows share a register, so that only in-lane shuffles remain.
        #[inline(always)]
        fn transpose(self, rows: [[f32; 8]; 8]) -> [[f32; 8]; 8] {
            let mut out = [[0.0f32; 8]; 8];
            for half in 0..2 {
                let mut joined = [[0.0f32; 8]; 4];
                for i in 0..4 {
                    joined[i][..4].copy_from_slice(&rows[i][half * 4..half * 4 + 4]);
                    joined[i][4..].copy_from_slice(&rows[i + 4][half * 4..half * 4 + 4]);
                }
                let [r0, r1, r2, r3] = joined.map(bytemuck::cast);
                let lo01 = self.avx._mm256_unpacklo_ps(r0, r1);
                let hi01 = self.avx._mm256_unpackhi_ps(r0, r1);
                let lo23 = self.avx._mm256_unpacklo_ps(r2, r3);
                let hi23 = self.avx._mm256_unpackhi_ps(r2, r3);
                let to = &mut out[half * 4..half * 4 + 4];
                to[0] = bytemuck::cast(self.avx._mm256_shuffle_ps::<0b01_00_01_00>(lo01, lo23));
                to[1] = bytemuck::cast(self.avx._mm256_shuffle_ps::<0b11_10_11_10>(lo01, lo23));
                to[2] = bytemuck::cast(self.avx._mm256_shuffle_ps::<0b01_00_01_00>(hi01, hi23));
                to[3] = bytemuck::cast(self.avx._mm256_shuffle_ps::<0b11_10_11_10>(hi01, hi23));
            }
            out
        }

        #[inline(always)]
        fn prefetch(self, at: &f32) {
            self.sse._mm_prefetch::<3>(std::ptr::from_ref(at).cast());
        }

        #[inline(always)]
        fn prefetch_far(self, at: &f32) {
            self.sse._mm_prefetch::<2>(std::ptr::from_ref(at).cast());
        }
    }

    impl Isa for V4 {
        #[inline(always)]
        fn transpose(self, rows: [[f32; 8]; 8]) -> [[f32; 8]; 8] {
            Isa::transpose(*self, rows)
        }

        #[inline(always)]
        fn prefetch(self, at: &f32) {
            Isa::prefetch(*self, at);
        }

        #[inline(always)]
        fn prefetch_far(self, at: &f32) {
            Isa::prefetch_far(*self, at);
        }
    }
}

/// Packs `rows` of an operand from row `i` and depth `l0` as `dest [depth, W]`, zero beyond `rows`.
#[inline(always)]
fn pack<I: Isa, const W: usize>(
    isa: I,
    op: Operand<'_>,
    i: usize,
    rows: usize,
    l0: usize,
    dest: &mut [f32],
) {
    let (dest, _) = dest.as_chunks_mut::<W>();
    if !op.depth_contiguous {
        for (l, to) in dest.iter_mut().enumerate() {
            let from = &op.data[(l0 + l) * op.stride + i..][..rows];
            if rows == W {
                to.copy_from_slice(from);
            } else {
                to[..rows].copy_from_slice(from);
                to[rows..].fill(0.0);
            }
        }
        return;
    }
    let start = i * op.stride + l0;
    let depth = dest.len();
    let mut done = 0;
    if rows == W && W.is_multiple_of(if I::F32_LANES == 4 { 4 } else { 8 }) {
        done = depth / 8 * 8;
        for group in (0..W).step_by(8) {
            // Four are left where vectors have four floats.
            let count = 8.min(W - group);
            for l in (0..done).step_by(8) {
                let mut block = [[0.0f32; 8]; 8];
                for (r, row) in block.iter_mut().enumerate().take(count) {
                    let at = start + (group + r) * op.stride + l;
                    row.copy_from_slice(&op.data[at..at + 8]);
                }
                let block = isa.transpose(block);
                for (to, column) in dest[l..l + 8].iter_mut().zip(&block) {
                    to[group..group + count].copy_from_slice(&column[..count]);
                }
            }
        }
    }
    for (l, to) in dest.iter_mut().enumerate().skip(done) {
        for (r, to) in to.iter_mut().enumerate() {
            *to = if r < rows { op.data[start + r * op.stride + l] } else { 0.0 };
        }
    }
}

/// Packs all `rows` of an operand whose depth is not contiguous from row `i` and depth `l0` as panels of
/// `MR` rows, many panels at a time: lines of memory are read whole.
#[inline(always)]
fn pack_across<const MR: usize>(
    op: Operand<'_>,
    i: usize,
    rows: usize,
    (l0, depth): (usize, usize),
    dest: &mut [f32],
) {
    /// Panels at a time; their places in `dest` share sets of the first cache, which has more ways.
    const TOGETHER: usize = 8;
    for first in (0..rows / MR).step_by(TOGETHER) {
        let panels = TOGETHER.min(rows / MR - first);
        let dest = &mut dest[first * MR * depth..][..panels * MR * depth];
        for l in 0..depth {
            let from = &op.data[(l0 + l) * op.stride + i + first * MR..][..panels * MR];
            for (p, from) in from.as_chunks::<MR>().0.iter().enumerate() {
                dest[(p * depth + l) * MR..][..MR].copy_from_slice(from);
            }
        }
    }
}

/// Packs the rows from `row` on of B `[n, k]` as a panel of A from the panels of B at this depth, `room` products
/// each; zero beyond `n`.
#[inline(always)]
fn pack_again<const MR: usize>(
    (panels, room): (&[f32], usize),
    (n, lanes): (usize, usize),
    row: usize,
    dest: &mut [f32],
) {
    let dest = dest.as_chunks_mut::<MR>().0;
    let (j, width) = panel_of(row, n, lanes);
    if row - j + MR <= width {
        let lines = panels[j * room..].chunks_exact(width);
        for (to, from) in dest.iter_mut().zip(lines) {
            to.copy_from_slice(&from[row - j..][..MR]);
        }
        return;
    }
    for r in 0..MR {
        let place = (row + r < n).then(|| panel_of(row + r, n, lanes));
        for (l, to) in dest.iter_mut().enumerate() {
            to[r] = place.map_or(0.0, |(j, width)| panels[j * room + l * width + row + r - j]);
        }
    }
}

/// The register tile: `MR` rows times `NV` vectors. `ahead(step)` is called once per [`STEP`] products, to ask
/// for memory: asked for all at once, it would keep what the products need waiting.
#[inline(always)]
fn tile<I: Isa, const MR: usize, const NV: usize>(
    isa: I,
    a: &[[f32; MR]],
    b: &[[I::f32s; NV]],
    ahead: impl Fn(usize),
) -> [[I::f32s; NV]; MR] {
    let mut sum = [[isa.splat_f32s(0.0); NV]; MR];
    for (step, (a, b)) in a.chunks(STEP).zip(b.chunks(STEP)).enumerate() {
        ahead(step);
        for (a, b) in a.iter().zip(b) {
            for i in 0..MR {
                let a = isa.splat_f32s(a[i]);
                for j in 0..NV {
                    sum[i][j] = isa.mul_add_f32s(a, b[j], sum[i][j]);
                }
            }
        }
    }
    sum
}

/// Writes `rows x columns` of a register tile to `out`.
#[inline(always)]
fn store<I: Isa, const MR: usize, const NV: usize>(
    isa: I,
    sum: &[[I::f32s; NV]; MR],
    alpha: f32,
    add: bool,
    (rows, columns): (usize, usize),
    out: &mut [f32],
    ldo: usize,
) {
    let width = NV * I::F32_LANES;
    let alphas = isa.splat_f32s(alpha);
    for (i, sum) in sum.iter().enumerate().take(rows) {
        if columns == width {
            let (to, _) = I::as_mut_simd_f32s(&mut out[i * ldo..][..width]);
            for (to, &sum) in to.iter_mut().zip(sum) {
                *to = if add {
                    isa.mul_add_f32s(alphas, sum, *to)
                } else {
                    isa.mul_f32s(alphas, sum)
                };
            }
        } else {
            let mut line = [0.0f32; 64];
            let (vectors, _) = I::as_mut_simd_f32s(&mut line);
            vectors[..NV].copy_from_slice(sum);
            for (to, &sum) in out[i * ldo..][..columns].iter_mut().zip(&line) {
                *to = if add { alpha.mul_add(sum, *to) } else { alpha * sum };
            }
        }
    }
}

impl Product<'_> {
    /// One panel of B (`NV` vectors, `W = NV * lanes` columns from `j`) against the packed block of A.
    #[inline(always)]
    fn panel<I: Isa, const MR: usize, const NV: usize, const W: usize>(
        &mut self,
        isa: I,
        packed_a: &[f32],
        packed_b: &mut [f32],
        (i0, block, j, l0, depth): (usize, usize, usize, usize, usize),
    ) {
        // With `below`, lines of `out` may end before B does: inside a panel, whose rest is not wanted.
        let columns = W.min(self.shape.1.min(self.ldo).saturating_sub(j));
        let panel = if let Some(panels) = self.panels {
            let (data, room) = panels.at(l0, depth, self.shape.1.next_multiple_of(I::F32_LANES));
            &data[j * room..]
        } else {
            pack::<I, W>(isa, self.b, j, columns, l0, &mut packed_b[..W * depth]);
            &*packed_b
        };
        // The panel after this one, a share of it per tile.
        let next = match self.panels {
            Some(panels) if j + W < self.shape.1 => {
                &panel[W * if panels.roomy { KC } else { depth }..]
            }
            _ => &[],
        };
        let next = &next[..next.len().min(W * depth)];
        let (b, _) = I::as_simd_f32s(&panel[..W * depth]);
        let (b, _) = b.as_chunks::<NV>();
        let steps = depth.div_ceil(STEP);
        let share = (W * depth / LINE).div_ceil(block.div_ceil(MR)).div_ceil(steps);
        let lines = (MR * NV).div_ceil(steps);
        for (p, i) in (0..block).step_by(MR).enumerate() {
            let rows = MR.min(block - i);
            if self.below.is_some_and(|d| i0 + i + rows + d <= j) {
                continue;
            }
            let at = (i0 + i) * self.ldo + j;
            let (out, ldo) = (&self.out[at..], self.ldo);
            let ahead = |step: usize| {
                for line in step * lines..((step + 1) * lines).min(MR * NV) {
                    if let Some(at) = out.get(line / NV * ldo + line % NV * LINE) {
                        isa.prefetch(at);
                    }
                }
                for line in (p * steps + step) * share..(p * steps + step + 1) * share {
                    if let Some(at) = next.get(line * LINE) {
                        isa.prefetch_far(at);
                    }
                }
            };
            let (a, _) = packed_a[p * MR * depth..][..MR * depth].as_chunks::<MR>();
            let sum = tile::<I, MR, NV>(isa, a, b, ahead);
            let add = self.add || l0 > 0;
            let out = &mut self.out[at..];
            store::<I, MR, NV>(isa, &sum, self.alpha, add, (rows, columns), out, self.ldo);
        }
    }

    /// Packs a block of A.
    #[inline(always)]
    fn pack_a<I: Isa, const MR: usize>(
        &self,
        isa: I,
        packed_a: &mut [f32],
        (i0, block, l0, depth): (usize, usize, usize, usize),
    ) {
        let mut done = 0;
        if let (Some(panels), Some(d)) = (self.panels, self.below) {
            let (n, lanes) = (self.shape.1, I::F32_LANES);
            let panels = panels.at(l0, depth, n.next_multiple_of(lanes));
            for (p, i) in (0..block).step_by(MR).enumerate() {
                let to = &mut packed_a[p * MR * depth..][..MR * depth];
                pack_again::<MR>(panels, (n, lanes), d + i0 + i, to);
            }
            done = block;
        } else if !self.a.depth_contiguous {
            pack_across::<MR>(self.a, i0, block, (l0, depth), packed_a);
            done = block / MR * MR;
        }
        for i in (done..block).step_by(MR) {
            let to = &mut packed_a[i * depth..][..MR * depth];
            pack::<I, MR>(isa, self.a, i0 + i, MR.min(block - i), l0, to);
        }
    }

    #[inline(always)]
    fn run<I: Isa, const MR: usize, const W1: usize, const W2: usize, const W3: usize>(
        mut self,
        isa: I,
        packed_a: &mut [f32],
        packed_b: &mut [f32],
    ) {
        let (m, n, k) = self.shape;
        let mc = m.div_ceil(m.div_ceil(MC)).next_multiple_of(MR);
        for l0 in (0..k).step_by(KC) {
            let depth = KC.min(k - l0);
            for i0 in (0..m).step_by(mc) {
                let block = mc.min(m - i0);
                self.pack_a::<I, MR>(isa, packed_a, (i0, block, l0, depth));
                let mut j = 0;
                while j < n {
                    let place = (i0, block, j, l0, depth);
                    match panel_vectors(n - j, I::F32_LANES) {
                        3 => {
                            self.panel::<I, MR, 3, W3>(isa, packed_a, packed_b, place);
                            j += W3;
                        }
                        2 => {
                            self.panel::<I, MR, 2, W2>(isa, packed_a, packed_b, place);
                            j += W2;
                        }
                        _ => {
                            self.panel::<I, MR, 1, W1>(isa, packed_a, packed_b, place);
                            j += W1;
                        }
                    }
                }
            }
        }
    }
}

/// Packs the panels of B, `[n, k]` by `b`, at the depths from `l0` on, in the order in which `Product::run`
/// visits them.
struct Pack<'a, I> {
    isa: I,
    b: Operand<'a>,
    n: usize,
    l0: usize,
    depth: usize,
    /// Columns, from the beginning of a panel to the end of one.
    columns: (usize, usize),
    /// Products that a panel has room for, and where in it these begin.
    room: (usize, usize),
    dest: &'a mut [f32],
}

impl<I: Isa> Pack<'_, I> {
    #[inline(always)]
    fn run<const W1: usize, const W2: usize, const W3: usize>(self) {
        let Self { isa, b, n, l0, depth, columns: (first, end), room: (room, inside), dest } = self;
        let mut j = first;
        while j < end {
            let left = n - j;
            let to = &mut dest[(j - first) * room..];
            match panel_vectors(left, I::F32_LANES) {
                3 => {
                    let to = &mut to[W3 * inside..][..W3 * depth];
                    pack::<I, W3>(isa, b, j, W3.min(left), l0, to);
                    j += W3;
                }
                2 => {
                    let to = &mut to[W2 * inside..][..W2 * depth];
                    pack::<I, W2>(isa, b, j, W2.min(left), l0, to);
                    j += W2;
                }
                _ => {
                    let to = &mut to[W1 * inside..][..W1 * depth];
                    pack::<I, W1>(isa, b, j, W1.min(left), l0, to);
                    j += W1;
                }
            }
        }
    }
}

impl<I: Isa> WithSimd for Pack<'_, I> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        match I::F32_LANES {
            16 => self.run::<16, 32, 48>(),
            8 => self.run::<8, 16, 24>(),
            4 => self.run::<4, 8, 12>(),
            _ => self.run::<1, 2, 3>(),
        }
    }
}

impl Pack<'_, ()> {
    /// Packs with the instruction set in use.
    fn dispatch(self) {
        let Self { isa: (), b, n, l0, depth, columns, room, dest } = self;
        match arch() {
            #[cfg(target_arch = "x86_64")]
            Arch::V4(isa) => {
                Simd::vectorize(isa, Pack { isa, b, n, l0, depth, columns, room, dest });
            }
            #[cfg(target_arch = "x86_64")]
            Arch::V3(isa) => {
                Simd::vectorize(isa, Pack { isa, b, n, l0, depth, columns, room, dest });
            }
            #[cfg(target_arch = "aarch64")]
            Arch::Neon(isa) => {
                Simd::vectorize(isa, Pack { isa, b, n, l0, depth, columns, room, dest });
            }
            _ => {
                let isa = pulp::Scalar::new();
                Simd::vectorize(isa, Pack { isa, b, n, l0, depth, columns, room, dest });
            }
        }
    }
}

/// Floats per vector of the instruction set in use.
fn lanes() -> usize {
    match arch() {
        #[cfg(target_arch = "x86_64")]
        Arch::V4(_) => 16,
        #[cfg(target_arch = "x86_64")]
        Arch::V3(_) => 8,
        #[cfg(target_arch = "aarch64")]
        Arch::Neon(_) => 4,
        _ => 1,
    }
}

/// True when products run on tiles.
#[cfg(target_arch = "x86_64")]
fn on_tiles() -> bool {
    level() == Level::Amx
}

/// f32 that the panels of B `[n, k]` take at most, on any machine: on tiles, three bf16 per value.
pub(super) const fn panels_at_most(n: usize, k: usize) -> usize {
    n.next_multiple_of(32) * k.next_multiple_of(32) / 2 * 3 + LINE
}

/// Fresh memory of so many f32 for panels, and where in it they begin: at a cache line.
fn aligned_memory(floats: usize) -> (Vec<f32>, usize) {
    let data = vec![0.0f32; floats + LINE];
    let start = data.as_ptr().align_offset(4 * LINE).min(LINE);
    (data, start)
}

/// f32 of the panels of B `[n, k]` in so many planes.
fn panel_floats(n: usize, k: usize, planes: usize) -> usize {
    #[cfg(target_arch = "x86_64")]
    if on_tiles() {
        return tiles::words(n, k, planes);
    }
    let _ = planes;
    n.next_multiple_of(lanes()) * k
}

/// Fresh memory for panels of B `[n, k]`, and where in it they begin: at a cache line.
pub(super) fn room_for_panels(n: usize, k: usize) -> (Vec<f32>, usize) {
    aligned_memory(panel_floats(n, k, PLANES))
}

/// bf16 per f32 on tiles, where nothing is known of a value.
pub(super) const PLANES: usize = 3;

/// All of B for [`Product::panels`], from the returned index on, and its planes. Runs on rayon's current pool.
pub(super) fn pack_panels(b: Operand<'_>, n: usize, k: usize) -> (Vec<f32>, usize, usize) {
    let mut data = Vec::new();
    let (start, planes) = pack_panels_into(&mut data, b, n, k);
    (data, start, planes)
}

/// As [`pack_panels`], into memory that is used again.
pub(super) fn pack_panels_into(
    data: &mut Vec<f32>,
    b: Operand<'_>,
    n: usize,
    k: usize,
) -> (usize, usize) {
    /// Panels per task.
    const TASK: usize = 4;
    #[cfg(target_arch = "x86_64")]
    let planes = if on_tiles() { tiles::planes(b, n, k) } else { PLANES };
    #[cfg(not(target_arch = "x86_64"))]
    let planes = PLANES;
    let (lanes, floats) = (lanes(), panel_floats(n, k, planes));
    if data.len() < floats + LINE {
        // Nothing of the old content is wanted.
        *data = Vec::new();
        *data = aligned_memory(floats).0;
    }
    let start = data.as_ptr().align_offset(4 * LINE).min(LINE);
    #[cfg(target_arch = "x86_64")]
    if on_tiles() {
        tiles::pack_panels(b, (n, k), planes, &mut data[start..]);
        return (start, planes);
    }
    let width = n.next_multiple_of(lanes);
    let mut rest = &mut data[start..start + width * k];
    let mut tasks = Vec::new();
    for l0 in (0..k).step_by(KC) {
        let depth = KC.min(k - l0);
        let mut j = 0;
        while j < n {
            let first = j;
            for _ in 0..TASK {
                if j < n {
                    j += panel_vectors(n - j, lanes) * lanes;
                }
            }
            let (dest, behind) = rest.split_at_mut((j - first) * depth);
            tasks.push((l0, depth, first, j.min(n), dest));
            rest = behind;
        }
    }
    tasks.into_par_iter().for_each(|(l0, depth, first, end, dest)| {
        let (columns, room) = ((first, end), (depth, 0));
        Pack { isa: (), b, n, l0, depth, columns, room, dest }.dispatch();
    });
    (start, planes)
}

/// Packs products `at..` of B `[n, k]` from the rows of `x [products, n]`, into roomy panels. Runs on rayon's
/// current pool.
pub(super) fn pack_rows(x: &[f32], n: usize, at: usize, data: &mut [f32]) {
    /// Panels per task.
    const TASK: usize = 8;
    #[cfg(target_arch = "x86_64")]
    if on_tiles() {
        return tiles::pack_rows(x, n, at, data);
    }
    let (lanes, count) = (lanes(), x.len() / n);
    let width = n.next_multiple_of(lanes);
    let b = Operand { data: x, stride: n, depth_contiguous: false };
    let mut l0 = 0;
    while l0 < count {
        let (block, inside) = ((at + l0) / KC, (at + l0) % KC);
        let depth = (KC - inside).min(count - l0);
        let mut rest = &mut data[block * KC * width..][..KC * width];
        let mut tasks = Vec::new();
        let mut j = 0;
        while j < n {
            let first = j;
            for _ in 0..TASK {
                if j < n {
                    j += panel_vectors(n - j, lanes) * lanes;
                }
            }
            let (dest, behind) = rest.split_at_mut((j - first) * KC);
            tasks.push((first, j.min(n), dest));
            rest = behind;
        }
        tasks.into_par_iter().for_each(|(first, end, dest)| {
            let (columns, room) = ((first, end), (KC, inside));
            Pack { isa: (), b, n, l0, depth, columns, room, dest }.dispatch();
        });
        l0 += depth;
    }
}

struct Entry<'a, I> {
    isa: I,
    product: Product<'a>,
    packed_a: &'a mut [f32],
    packed_b: &'a mut [f32],
}

impl<I: Isa> WithSimd for Entry<'_, I> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { isa, product, packed_a, packed_b } = self;
        match I::F32_LANES {
            // 24 sums, 3 vectors of B and a broadcast of A in 32 registers.
            16 => product.run::<I, 8, 16, 32, 48>(isa, packed_a, packed_b),
            // 12 sums, 3 vectors of B and a broadcast of A in 16 registers.
            8 => product.run::<I, 4, 8, 16, 24>(isa, packed_a, packed_b),
            // 24 sums, 3 vectors of B and two vectors of A, whose lanes are taken one by one, in 32 registers.
            4 => product.run::<I, 8, 4, 8, 12>(isa, packed_a, packed_b),
            _ => product.run::<I, 4, 1, 2, 3>(isa, packed_a, packed_b),
        }
    }
}

thread_local! {
    /// Packing space of this thread; its content never outlives a call.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Runs one product on this thread with the instruction set in use.
pub(super) fn multiply(product: Product<'_>) {
    let (m, n, k) = product.shape;
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        if !product.add {
            for row in product.out.chunks_mut(product.ldo.max(1)).take(m) {
                row[..n].fill(0.0);
            }
        }
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if on_tiles() {
        return tiles::multiply(product);
    }
    let mut scratch = SCRATCH.take();
    let room_a = MC.min(m).next_multiple_of(LINE) * KC.min(k);
    let room_b = 48 * KC.min(k);
    let room = room_a + room_b + 2 * LINE;
    if scratch.len() < room {
        scratch.resize(room, 0.0);
    }
    // Panels start on a cache line, or every other vector load touches two.
    let start = scratch.as_ptr().align_offset(4 * LINE).min(LINE);
    let (packed_a, packed_b) = scratch[start..].split_at_mut(room_a.next_multiple_of(LINE));
    match arch() {
        #[cfg(target_arch = "x86_64")]
        Arch::V4(isa) => Simd::vectorize(isa, Entry { isa, product, packed_a, packed_b }),
        #[cfg(target_arch = "x86_64")]
        Arch::V3(isa) => Simd::vectorize(isa, Entry { isa, product, packed_a, packed_b }),
        #[cfg(target_arch = "aarch64")]
        Arch::Neon(isa) => Simd::vectorize(isa, Entry { isa, product, packed_a, packed_b }),
        _ => {
            let isa = pulp::Scalar::new();
            Simd::vectorize(isa, Entry { isa, product, packed_a, packed_b });
        }
    }
    SCRATCH.set(scratch);
}
