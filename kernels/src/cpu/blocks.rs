//! The plain kernel of block types: rows stay packed in memory, a tile of them is decoded to f32 at a time
//! and handed to the matrix product. Correct for every type and unhurried; types that [`Tiles::hold`](super::tiles::Tiles::hold)
//! have the kernels of tiles too.

use attar_tensor::linalg::gemm_nt;
use attar_tensor::{LayoutError, PackedLinear, QuantScheme};
use rayon::prelude::*;

use crate::layout::{Ggml, layout_of};
use crate::spec::{Kernel, Prepared, check_sizes};

/// Rows that one task decodes and multiplies; fixed, so that threads do not change bits.
const TILE_ROWS: usize = 16;

/// Decodes and multiplies.
#[derive(Debug, Clone, Copy)]
pub struct BlockKernel;

impl Kernel for BlockKernel {
    fn name(&self) -> &'static str {
        "cpu-blocks"
    }

    fn supported(&self) -> bool {
        true
    }

    fn in_use(&self) -> bool {
        true
    }

    fn instructions(&self) -> &'static str {
        "portable"
    }

    fn supports(&self, scheme: QuantScheme, _: usize, _: usize) -> bool {
        scheme.block().is_some()
    }

    fn prepare(&self, packed: &PackedLinear) -> Result<Box<dyn Prepared>, LayoutError> {
        let layout = layout_of(packed)?.block_type().map(Ggml::new).ok_or_else(|| {
            LayoutError::Layout { expected: "a layout of blocks".to_owned(), got: packed.layout }
        })?;
        Ok(Box::new(BlockLinear {
            bytes: layout.bytes(packed)?.to_vec(),
            layout,
            out_features: packed.out_features,
            in_features: packed.in_features,
        }))
    }
}

#[derive(Debug, Clone)]
struct BlockLinear {
    layout: &'static Ggml,
    bytes: Vec<u8>,
    out_features: usize,
    in_features: usize,
}

impl Prepared for BlockLinear {
    fn out_features(&self) -> usize {
        self.out_features
    }

    fn in_features(&self) -> usize {
        self.in_features
    }

    fn resident_bytes(&self) -> usize {
        self.bytes.len()
    }

    fn duplicate(&self) -> Option<Box<dyn Prepared>> {
        Some(Box::new(self.clone()))
    }

    fn matmul(&self, x: &[f32], m: usize, out: &mut [f32]) {
        check_sizes(self, x, m, out);
        let (rows, n) = (self.out_features, self.in_features);
        if m == 0 || rows == 0 || n == 0 {
            out.fill(0.0);
            return;
        }
        let row_bytes = self.bytes.len() / rows;
        let mut by_row = vec![0.0f32; rows * m];
        by_row
            .par_chunks_mut(TILE_ROWS * m)
            .zip(self.bytes.par_chunks(TILE_ROWS * row_bytes))
            .for_each_init(
                || vec![0.0f32; TILE_ROWS * n],
                |tile, (by_row, bytes)| {
                    let count = by_row.len() / m;
                    let tile = &mut tile[..count * n];
                    self.layout.dequantize_blocks(bytes, tile);
                    gemm_nt((count, m, n), 1.0, (tile, n), (x, n), false, (by_row, m));
                },
            );
        transpose_into(&by_row, m, out);
    }
}

/// `[rows, m]` to `out [m, rows]`.
fn transpose_into(by_row: &[f32], m: usize, out: &mut [f32]) {
    let rows = by_row.len() / m;
    for (token, out) in out.chunks_exact_mut(rows).enumerate() {
        for (row, out) in out.iter_mut().enumerate() {
            *out = by_row[row * m + token];
        }
    }
}
