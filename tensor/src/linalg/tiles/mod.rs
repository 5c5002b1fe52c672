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
//! Planes below 2⁻¹²⁶ count as zero, so values lose digits from 2⁻¹¹⁰ down; an infinity makes NaN, where a product in
//! f32 would have kept it.
//!
//! `pack` lays operands out, `register` multiplies them, here are the loops.

mod pack;
mod register;

use std::cell::RefCell;

use super::microkernel::{KC, PLANES, Panels, Product};
use pack::{pack, pack_again};
pub(super) use pack::{pack_panels, pack_rows, planes, words};
use register::{AHEAD, Sums, multiply_panels, with_tiles};

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
/// Words of all panels of B at one depth that are kept for several blocks of A: 2 MiB.
const KEPT: usize = 1 << 19;

/// Makes sure that tiles, and with them AVX-512, are what this process computes with.
fn require() {
    assert!(super::level() == super::Level::Amx, "tiles are in use");
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
            let op =
                super::super::microkernel::Operand { data: &b, stride: k, depth_contiguous: true };
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
