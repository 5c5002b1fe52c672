//! Quantization to block types, each block on its own.
//!
//! [`quantize`] is what llama.cpp's quantizer makes without an importance matrix, to the bit (checked against
//! ggml's own bytes in `attar_kernels`); it serves the types with one level, whose range decides, and as the
//! measure of the others. Sums are f32 in the order of the columns. Cost per weight: a few operations for types
//! with one level, 20 to 40 candidates of a sub-block's scale for the others.
//!
//! [`search()`] minimises the weighted squared error, see [`mod@search`]; lanes of vectors are rows.

use half::f16;
use rayon::prelude::*;

use crate::blocks::{BlockQuantized, BlockType, Minimum};

mod iq4;
mod kquant;
pub mod lane;
mod rows;
pub mod search;
mod simple;

pub use rows::search;

/// The place of one block's result.
#[derive(Debug)]
pub(crate) struct Block<'a> {
    pub(crate) codes: &'a mut [u8],
    pub(crate) d: &'a mut f16,
    /// Not read for types without minima.
    pub(crate) dmin: &'a mut f16,
    pub(crate) sub_scales: &'a mut [i8],
    pub(crate) sub_mins: &'a mut [u8],
}

/// Quantizes `weight [out_features, in_features]`, finite f32, each block on its own.
///
/// # Panics
/// When blocks do not divide a row or the slice has another size.
pub fn quantize(
    block: BlockType,
    weight: &[f32],
    out_features: usize,
    in_features: usize,
) -> BlockQuantized {
    assert_eq!(weight.len(), out_features * in_features, "the weight is [out, in]");
    let mut out = BlockQuantized::zeros(block, out_features, in_features);
    for_blocks(&mut out, |at, mut to| {
        let x = &weight[at * block.size()..(at + 1) * block.size()];
        match block {
            BlockType::Q80 => simple::q8_0(x, &mut to),
            BlockType::Q40 => simple::around_zero(x, &mut to, 8.0),
            BlockType::Q50 => simple::around_zero(x, &mut to, 16.0),
            BlockType::Q41 => simple::above_minimum(x, &mut to, 15),
            BlockType::Q51 => simple::above_minimum(x, &mut to, 31),
            BlockType::Q2K => kquant::q2_k(x, &mut to),
            BlockType::Q3K => kquant::q3_k(x, &mut to),
            BlockType::Q4K => kquant::q45_k(x, &mut to, 15, (-1.0, 20)),
            BlockType::Q5K => kquant::q45_k(x, &mut to, 31, (-0.5, 15)),
            BlockType::Q6K => kquant::q6_k(x, &mut to),
            BlockType::Iq4Nl | BlockType::Iq4Xs => iq4::iq4(x, &mut to),
        }
    });
    out
}

/// Runs `make` on every block of a linear, in parallel; the number counts over all rows.
pub(crate) fn for_blocks(out: &mut BlockQuantized, make: impl Fn(usize, Block<'_>) + Sync) {
    /// Blocks of one task.
    const TASK: usize = 64;
    let block = out.block;
    let (size, subs) = (block.size(), block.subs());
    let has_min = block.minimum() != Minimum::None;
    let scales = if block.sub_scale_range().is_some() { subs } else { 0 };
    let mins = if out.sub_mins.is_empty() { 0 } else { subs };
    // Absent lists become lists of empty pieces.
    let mut no_min = vec![f16::ZERO; if has_min { 0 } else { out.d.len() }];
    let dmin = if has_min { &mut out.dmin } else { &mut no_min };
    let tasks = out.d.len().div_ceil(TASK);
    let codes = out.codes.par_chunks_mut(TASK * size);
    let d = out.d.par_chunks_mut(TASK).zip(dmin.par_chunks_mut(TASK));
    let mut scale_pieces = pieces(&mut out.sub_scales, TASK * scales, tasks);
    let mut min_pieces = pieces(&mut out.sub_mins, TASK * mins, tasks);
    codes
        .zip(d)
        .zip(scale_pieces.par_iter_mut().zip(min_pieces.par_iter_mut()))
        .enumerate()
        .for_each(|(task, ((codes, (d, dmin)), (sub_scales, sub_mins)))| {
            for (i, codes) in codes.chunks_exact_mut(size).enumerate() {
                let piece = |subs: usize| i * subs..(i + 1) * subs;
                make(
                    task * TASK + i,
                    Block {
                        codes,
                        d: &mut d[i],
                        dmin: &mut dmin[i],
                        sub_scales: &mut sub_scales[piece(scales)],
                        sub_mins: &mut sub_mins[piece(mins)],
                    },
                );
            }
        });
}

/// Cuts a list into `count` pieces of at most `size`; all empty when `size` is 0.
fn pieces<T>(list: &mut [T], size: usize, count: usize) -> Vec<&mut [T]> {
    let mut rest = list;
    let mut next = || {
        let all = std::mem::take(&mut rest);
        let (piece, tail) = all.split_at_mut(size.min(all.len()));
        rest = tail;
        piece
    };
    (0..count).map(|_| next()).collect()
}

/// The nearest integer, ties to even, of a number below 2²² in size.
#[inline(always)]
pub(crate) fn nearest(x: f32) -> i32 {
    ((x + 12_582_912.0).to_bits() & 0x7f_ffff) as i32 - 0x40_0000
}
