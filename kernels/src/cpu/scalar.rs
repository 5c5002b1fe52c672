//! The plain kernels: what every other one is measured against for readability.

use super::input::{ByteChunk, FloatChunk};
use super::tiles::{
    BLOCK, Offset, QUAD, QUADS, ROWS, Shape, read_scales, unpack_block, unpack_sparse,
};

/// Calls `block(codes, index of the block)` and `group(scales, offsets, index of the group)` in the order
/// of the stream.
fn walk(
    shape: &Shape,
    mut tile: &[u8],
    mut block: impl FnMut(&[[u8; QUAD]; QUADS], usize),
    mut group: impl FnMut(&[f32; ROWS], &[f32; ROWS], usize),
) {
    let mut quads = [[0u8; QUAD]; QUADS];
    for at in 0..shape.groups() {
        let blocks = shape.group_blocks[at]..shape.group_blocks[at + 1];
        let (scales, offsets) = read_scales(shape, &tile[blocks.len() * shape.block_bytes()..]);
        for index in blocks {
            if shape.sparse {
                unpack_sparse(&offsets, tile, &mut quads);
            } else {
                unpack_block(shape.bits, tile, &mut quads);
            }
            block(&quads, index as usize);
            tile = &tile[shape.block_bytes()..];
        }
        group(&scales, &offsets, at);
        tile = &tile[shape.scale_bytes() + shape.offset_bytes()..];
    }
}

/// The 16 rows of a tile times one token of bytes.
pub(crate) fn fast(
    shape: &Shape,
    tile: &[u8],
    input: ByteChunk<'_>,
    per_token: bool,
) -> [f32; ROWS] {
    let mut totals = [0.0f32; ROWS];
    let sums = std::cell::Cell::new([0.0f32; ROWS]);
    let dots = std::cell::Cell::new([0i32; ROWS]);
    walk(
        shape,
        tile,
        |quads, block| {
            let q = input.q[block * BLOCK..(block + 1) * BLOCK].as_chunks::<4>().0;
            let mut dot = if per_token { dots.get() } else { [0i32; ROWS] };
            for (codes, q) in quads.iter().zip(q) {
                for (dot, codes) in dot.iter_mut().zip(codes.as_chunks::<4>().0) {
                    for (&code, &q) in codes.iter().zip(q) {
                        *dot += i32::from(code) * i32::from(q);
                    }
                }
            }
            if per_token {
                dots.set(dot);
                return;
            }
            let mut sum = sums.get();
            for (sum, &dot) in sum.iter_mut().zip(&dot) {
                *sum = (dot as f32).mul_add(input.scales[block], *sum);
            }
            sums.set(sum);
        },
        |scales, offsets, group| {
            let mut sum = sums.take();
            if per_token {
                for (sum, dot) in sum.iter_mut().zip(dots.take()) {
                    *sum = dot as f32 * input.scales[0];
                }
            }
            for row in 0..ROWS {
                totals[row] = finish(
                    shape.offset,
                    totals[row],
                    sum[row],
                    (scales[row], offsets[row]),
                    input.sums[group],
                );
            }
        },
    );
    totals
}

/// Adds one group: `sum` is over its codes, `x` over its activations.
fn finish(offset: Offset, total: f32, sum: f32, (scale, offset_of_row): (f32, f32), x: f32) -> f32 {
    if offset == Offset::Minimum {
        (-offset_of_row).mul_add(x, sum.mul_add(scale, total))
    } else {
        (-offset_of_row).mul_add(x, sum).mul_add(scale, total)
    }
}

/// The 16 rows of a tile times one token of f32.
pub(crate) fn exact(shape: &Shape, tile: &[u8], input: FloatChunk<'_>) -> [f32; ROWS] {
    let mut totals = [0.0f32; ROWS];
    let sums = std::cell::Cell::new([0.0f32; ROWS]);
    let middle = shape.middle();
    walk(
        shape,
        tile,
        |quads, block| {
            let x = input.x[block * BLOCK..(block + 1) * BLOCK].as_chunks::<4>().0;
            let mut sum = sums.get();
            for (codes, x) in quads.iter().zip(x) {
                for (sum, codes) in sum.iter_mut().zip(codes.as_chunks::<4>().0) {
                    let products = codes.iter().zip(x).map(|(&c, &x)| (f32::from(c) - middle) * x);
                    *sum += products.sum::<f32>();
                }
            }
            sums.set(sum);
        },
        |scales, offsets, group| {
            let (sum, x) = (sums.take(), input.sums[group]);
            for row in 0..ROWS {
                totals[row] += if shape.offset == Offset::Minimum {
                    (sum[row] + middle * x) * scales[row] - offsets[row] * x
                } else {
                    (sum[row] - (offsets[row] - middle) * x) * scales[row]
                };
            }
        },
    );
    totals
}

/// Writes the weights of a tile as f32, `to[place * stride + row]`.
///
/// # Safety
/// For each place sixteen floats from `to + place * stride` on may be written, and nobody else uses them.
pub(crate) unsafe fn dequantize(shape: &Shape, tile: &[u8], to: *mut f32, stride: usize) {
    let mut codes = Vec::with_capacity(shape.places());
    let codes = std::cell::RefCell::new(&mut codes);
    walk(
        shape,
        tile,
        |quads, _| codes.borrow_mut().push(*quads),
        |scales, offsets, group| {
            let first = shape.group_blocks[group] as usize * BLOCK;
            for (block, quads) in codes.borrow_mut().drain(..).enumerate() {
                for place in 0..BLOCK {
                    for row in 0..ROWS {
                        let code = f32::from(quads[place / 4][4 * row + place % 4]);
                        let weight = if shape.offset == Offset::Minimum {
                            code.mul_add(scales[row], -offsets[row])
                        } else {
                            (code - offsets[row]) * scales[row]
                        };
                        // SAFETY: the caller's promise.
                        unsafe {
                            to.add((first + block * BLOCK + place) * stride + row).write(weight);
                        }
                    }
                }
            }
        },
    );
}
