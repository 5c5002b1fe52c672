//! One CPU kernel for every layout: codes stay packed at 4 or 8 bits in memory and are decoded in
//! registers, `x` and the sums are f32.
//!
//! Below [`TILE_TOKENS`] tokens the codes are multiplied directly, a row of the weight at a time
//! (decoding text is one token). From there on rows are decoded once into f32 and handed to the matrix
//! product of `attar_tensor::linalg`: a tile of rows per task while tokens are few, a panel of rows
//! shared by tasks that split the tokens from [`PANEL_TOKENS`] on. An order of columns costs one gather
//! of `x` per call.
//!
//! Work is cut into fixed tiles of rows; each output is the work of one task in one order, so that the
//! number of threads does not change a bit.

use attar_tensor::linalg::{gemm_nt, isa as isa_in_use};
use attar_tensor::{LayoutError, PackedLinear, QuantScheme, QuantizedLinear};
use rayon::prelude::*;

use crate::layout;
use crate::spec::{Kernel, Prepared, check_sizes, within_use};

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod blocks;
mod isa;
mod rows;
mod scalar;

pub use blocks::BlockKernel;
pub use isa::Isa;
use rows::{Activations, Rows};

/// Tokens from which decoding rows into f32 pays.
pub const TILE_TOKENS: usize = 8;
/// Tokens from which tasks split the tokens instead of the rows.
pub const PANEL_TOKENS: usize = 64;
/// Rows that one task multiplies.
const ROWS_PER_TASK: usize = 32;
/// Bytes of f32 weights that one task decodes at a time, about half a second-level cache.
const TILE_BYTES: usize = 1 << 19;
/// Bytes of f32 weights that one panel takes at most.
const PANEL_BYTES: usize = 4 << 20;
/// Multiplications below which a second thread costs more than it brings.
const SERIAL_WORK: usize = 1 << 17;

/// The CPU kernel of one instruction set.
#[derive(Debug, Clone, Copy)]
pub struct CpuKernel {
    /// What it is written for.
    pub isa: Isa,
}

/// The CPU kernels of this build, slowest first.
pub fn kernels() -> Vec<Box<dyn Kernel>> {
    Isa::ALL.iter().map(|&isa| Box::new(CpuKernel { isa }) as Box<dyn Kernel>).collect()
}

/// Prepares codes that were never packed with the kernel of the instruction set in use.
pub fn prepare(weight: &QuantizedLinear) -> Box<dyn Prepared> {
    Box::new(CpuLinear { rows: Rows::new(weight), isa: isa_in_use() })
}

impl Kernel for CpuKernel {
    fn name(&self) -> &'static str {
        isa::kernel_name(self.isa)
    }

    fn instructions(&self) -> &'static str {
        self.isa.name()
    }

    fn supported(&self) -> bool {
        self.isa.supported()
    }

    fn in_use(&self) -> bool {
        within_use(self.isa)
    }

    fn supports(&self, _: QuantScheme, _: usize, _: usize) -> bool {
        true
    }

    fn prepare(&self, packed: &PackedLinear) -> Result<Box<dyn Prepared>, LayoutError> {
        // Every call below relies on this check.
        assert!(self.supported(), "{} does not run on this machine", self.name());
        let rows = Rows::new(&layout::unpack(packed)?);
        Ok(Box::new(CpuLinear { rows, isa: self.isa }))
    }
}

/// A linear in the order of the CPU kernels. `isa` is supported by this machine.
#[derive(Debug)]
struct CpuLinear {
    rows: Rows,
    isa: Isa,
}

impl Prepared for CpuLinear {
    fn out_features(&self) -> usize {
        self.rows.out_features
    }

    fn in_features(&self) -> usize {
        self.rows.in_features
    }

    fn resident_bytes(&self) -> usize {
        self.rows.resident_bytes()
    }

    fn matmul(&self, x: &[f32], m: usize, out: &mut [f32]) {
        check_sizes(self, x, m, out);
        if m == 0 || out.is_empty() {
            return;
        }
        if self.rows.places() == 0 {
            out.fill(0.0);
        } else if m < TILE_TOKENS {
            self.multiply_rows(&self.rows.arrange(x, m), m, out);
        } else {
            let arranged = self.rows.order.as_ref().map(|_| self.rows.arrange(x, m).x);
            let x = arranged.as_deref().unwrap_or(x);
            if m < PANEL_TOKENS {
                self.multiply_tiles(x, m, out);
            } else {
                self.multiply_panels(x, m, out);
            }
        }
    }
}

impl CpuLinear {
    /// Few tokens: each row of codes is read once from memory and multiplied by all tokens.
    fn multiply_rows(&self, input: &Activations, m: usize, out: &mut [f32]) {
        let rows = self.rows.out_features;
        if m == 1 {
            let tasks = out.par_chunks_mut(ROWS_PER_TASK).enumerate();
            let min = if rows * self.rows.places() < SERIAL_WORK { usize::MAX } else { 1 };
            tasks.with_min_len(min).for_each(|(task, out)| {
                for (i, out) in out.iter_mut().enumerate() {
                    self.dots(task * ROWS_PER_TASK + i, input, 1, std::slice::from_mut(out));
                }
            });
            return;
        }
        let mut by_row = vec![0.0f32; rows * m];
        let min = if m * rows * self.rows.places() < SERIAL_WORK { usize::MAX } else { 1 };
        by_row.par_chunks_mut(ROWS_PER_TASK * m).enumerate().with_min_len(min).for_each(
            |(task, by_row)| {
                for (i, out) in by_row.chunks_exact_mut(m).enumerate() {
                    self.dots(task * ROWS_PER_TASK + i, input, m, out);
                }
            },
        );
        transpose_into(&by_row, m, out);
    }

    /// One row times `m` tokens.
    fn dots(&self, row: usize, input: &Activations, m: usize, out: &mut [f32]) {
        let rows = &self.rows;
        let mut token = 0;
        #[cfg(target_arch = "x86_64")]
        {
            // Takes as many of the first number of tokens as there are, then of the next.
            macro_rules! take {
                ($isa:ident: $($count:literal)*) => {{$(
                    while m - token >= $count {
                        // SAFETY: `prepare` made sure that this machine has the instruction set.
                        let sums = unsafe {
                            if rows.nibbles {
                                $isa::dot::<$count, true>(rows, row, input, token)
                            } else {
                                $isa::dot::<$count, false>(rows, row, input, token)
                            }
                        };
                        out[token..token + $count].copy_from_slice(&sums);
                        token += $count;
                    }
                )*}};
            }
            match self.isa {
                Isa::Avx2 => take!(avx2: 2 1),
                Isa::Avx512 => take!(avx512: 4 2 1),
                Isa::Scalar => {}
            }
        }
        while token < m {
            out[token] = scalar::dot(rows, row, input, token);
            token += 1;
        }
    }

    /// More tokens: each task decodes a tile of rows that stays in its cache. `x` is in the order of
    /// places.
    fn multiply_tiles(&self, x: &[f32], m: usize, out: &mut [f32]) {
        let (rows, places) = (self.rows.out_features, self.rows.places());
        let tile_rows = (TILE_BYTES / (4 * places)).clamp(16, 64);
        let mut by_row = vec![0.0f32; rows * m];
        by_row.par_chunks_mut(tile_rows * m).enumerate().for_each_init(
            || vec![0.0f32; tile_rows * places],
            |tile, (task, by_row)| {
                let count = by_row.len() / m;
                let tile = &mut tile[..count * places];
                for (i, weights) in tile.chunks_exact_mut(places).enumerate() {
                    self.dequantize(task * tile_rows + i, weights);
                }
                gemm_nt((count, m, places), 1.0, (tile, places), (x, places), false, (by_row, m));
            },
        );
        transpose_into(&by_row, m, out);
    }

    /// Many tokens: a panel of rows at a time becomes f32. `x` is in the order of places.
    fn multiply_panels(&self, x: &[f32], m: usize, out: &mut [f32]) {
        let (rows, places) = (self.rows.out_features, self.rows.places());
        let panel_rows = (PANEL_BYTES / (4 * places)).next_multiple_of(ROWS_PER_TASK).min(rows);
        let mut panel = vec![0.0f32; panel_rows * places];
        // Depends on `m` alone: enough tasks for many threads, enough tokens to pay for packing.
        let tokens = (m / 8).next_multiple_of(16).clamp(32, 256);
        for first in (0..rows).step_by(panel_rows) {
            let count = panel_rows.min(rows - first);
            let panel = &mut panel[..count * places];
            panel
                .par_chunks_mut(places)
                .enumerate()
                .with_min_len(ROWS_PER_TASK)
                .for_each(|(i, weights)| self.dequantize(first + i, weights));
            let panel = &*panel;
            out.par_chunks_mut(tokens * rows).zip(x.par_chunks(tokens * places)).for_each(
                |(out, x)| {
                    let m = x.len() / places;
                    let out = (&mut out[first..], rows);
                    gemm_nt((m, count, places), 1.0, (x, places), (panel, places), false, out);
                },
            );
        }
    }

    fn dequantize(&self, row: usize, weights: &mut [f32]) {
        match self.isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `prepare` made sure that this machine has the instruction set.
            Isa::Avx2 => unsafe { avx2::dequantize(&self.rows, row, weights) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx512 => unsafe { avx512::dequantize(&self.rows, row, weights) },
            _ => scalar::dequantize(&self.rows, row, weights),
        }
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
