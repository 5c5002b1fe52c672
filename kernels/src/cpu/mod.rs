//! One CPU kernel for every layout: codes stay packed at 4 or 8 bits in memory and are decoded in
//! registers, `x` and the sums are f32.
//!
//! Up to [`PANEL_TOKENS`] tokens the codes are multiplied directly, a row of the weight at a time
//! (decoding text is one token). From there on a panel of rows is decoded once into f32 and handed to
//! the matrix product of `attar_tensor::linalg`. An order of columns costs one gather of `x` per call.
//!
//! Work is cut into fixed tiles of rows; each output is the work of one task in one order, so that the
//! number of threads does not change a bit.

use attar_tensor::linalg::gemm_nt;
use attar_tensor::{LayoutError, PackedLinear, QuantizedLinear};
use rayon::prelude::*;

use crate::layout;
use crate::spec::{Kernel, Prepared, check_sizes};

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod isa;
mod rows;
mod scalar;

pub use isa::Isa;
use rows::{Activations, Rows};

/// Tokens from which decoding a panel of rows into f32 pays.
pub const PANEL_TOKENS: usize = 16;
/// Rows that one task multiplies.
const ROWS_PER_TASK: usize = 32;
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

/// Prepares codes that were never packed with the best kernel of this machine.
pub fn prepare(weight: &QuantizedLinear) -> Box<dyn Prepared> {
    let isa = Isa::ALL.into_iter().rfind(|isa| isa.supported());
    Box::new(CpuLinear { rows: Rows::new(weight), isa: isa.expect("scalar is always there") })
}

impl Kernel for CpuKernel {
    fn name(&self) -> &'static str {
        self.isa.kernel_name()
    }

    fn supported(&self) -> bool {
        self.isa.supported()
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
        } else if m < PANEL_TOKENS {
            self.multiply_rows(&self.rows.arrange(x, m), m, out);
        } else {
            self.multiply_panels(x, m, out);
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
        for (token, out) in out.chunks_exact_mut(rows).enumerate() {
            for (row, out) in out.iter_mut().enumerate() {
                *out = by_row[row * m + token];
            }
        }
    }

    /// One row times `m` tokens.
    fn dots(&self, row: usize, input: &Activations, m: usize, out: &mut [f32]) {
        let rows = &self.rows;
        let mut token = 0;
        #[cfg(target_arch = "x86_64")]
        {
            // Takes as many of the first number of tokens as there are, then of the next.
            macro_rules! take {
                ($dot:path, $($count:literal)*) => {{$(
                    while m - token >= $count {
                        // SAFETY: `prepare` made sure that this machine has the instruction set.
                        let sums: [f32; $count] = unsafe { $dot(rows, row, input, token) };
                        out[token..token + $count].copy_from_slice(&sums);
                        token += $count;
                    }
                )*}};
            }
            match self.isa {
                Isa::Avx2 => take!(avx2::dot, 2 1),
                Isa::Avx512 => take!(avx512::dot, 8 4 2 1),
                Isa::Scalar => {}
            }
        }
        while token < m {
            out[token] = scalar::dot(rows, row, input, token);
            token += 1;
        }
    }

    /// Many tokens: a panel of rows at a time becomes f32.
    fn multiply_panels(&self, x: &[f32], m: usize, out: &mut [f32]) {
        let places = self.rows.places();
        let arranged;
        let x = if self.rows.order.is_some() {
            arranged = self.rows.arrange(x, m);
            &arranged.x
        } else {
            x
        };
        let rows = self.rows.out_features;
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
