//! The CPU kernels: one packed form for every layout ([`tiles`](self)), two ways to multiply by it, each
//! for several instruction sets.
//!
//! *Exact* kernels multiply f32 activations by codes that are widened in registers. *Fast* kernels round
//! activations to bytes, with a scale for each 32 of them (or for each token: W8A8), and multiply bytes;
//! their integer sums are exact and their f32 steps the same everywhere, so that one fast kernel gives
//! the same bits on every instruction set and for any number of tokens.
//!
//! Up to [`PANEL_TOKENS`] tokens a tile of 16 rows is multiplied directly, tile after tile; weights are
//! read from memory once. Exact products of more tokens decode a panel of rows into f32 once and hand it
//! to the matrix product of `attar_tensor::linalg`; fast ones keep to the tiles, whose codes then come from
//! the first-level cache, and take the tokens in portions that stay in the second; on AMX codes become bytes
//! once and are multiplied with 16 tokens at a time. An order of columns
//! costs one gather of `x` per call.
//!
//! Work is cut into fixed tiles of rows; each output is the work of one task in one order, so that the
//! number of threads does not change a bit.

use attar_tensor::linalg::{Packing, isa as isa_in_use};
use attar_tensor::{LayoutError, PackedLinear, QuantScheme, QuantizedLinear};
use rayon::prelude::*;

use crate::layout;
use crate::spec::{Activations, Kernel, Prepared, check_sizes, within_use};

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod blocks;
mod buffer;
pub mod dense;
pub(crate) mod input;
mod isa;
#[cfg(target_arch = "aarch64")]
mod neon;
pub mod roofline;
mod scalar;
mod tiles;

pub use blocks::BlockKernel;
use input::{ByteChunk, Bytes, CHUNK, Chunk, FloatChunk, Floats};
pub use isa::Isa;
use tiles::{ROWS, Tiles};

/// Tokens from which decoding rows into f32 pays.
pub const PANEL_TOKENS: usize = 16;
/// Tokens from which AMX pays, where there is one.
pub const TILE_TOKENS: usize = 32;
/// Bytes of f32 weights that one panel takes at most.
const PANEL_BYTES: usize = 4 << 20;
/// Bytes of rounded activations that are multiplied by all tiles before the next ones are.
const PORTION_BYTES: usize = 1 << 20;
/// Bytes of tiles that are worth a task.
const TASK_BYTES: usize = 64 << 10;

/// The CPU kernel of one instruction set and one kind of activations.
#[derive(Debug, Clone, Copy)]
pub struct CpuKernel {
    /// What it is written for.
    pub isa: Isa,
    /// What it does to activations.
    pub activations: Activations,
}

impl CpuKernel {
    /// True when 4-bit weights of which two in four are zero are read without the zeros: a quarter less from memory, and more
    /// work for the processor, which only the byte kernel of AVX-512 has time for. `attar bench` shows both forms.
    const fn leaves_zeros(self) -> bool {
        matches!((self.isa, self.activations), (Isa::Avx512, Activations::Int8))
    }
}

/// The CPU kernels of this build, slowest first for each kind of activations.
pub fn kernels() -> Vec<Box<dyn Kernel>> {
    let kinds = [Activations::F32, Activations::Int8, Activations::Int8PerToken];
    let kernels = kinds
        .iter()
        .flat_map(|&activations| Isa::ALL.iter().map(move |&isa| CpuKernel { isa, activations }));
    kernels.map(|kernel| Box::new(kernel) as Box<dyn Kernel>).collect()
}

/// Prepares codes that were never packed with the exact kernel of the instruction set in use.
pub fn prepare(weight: &QuantizedLinear) -> Box<dyn Prepared> {
    let kernel = CpuKernel { isa: isa_in_use(), activations: Activations::F32 };
    Box::new(CpuLinear { tiles: Tiles::new(weight, kernel.leaves_zeros()), kernel })
}

impl Kernel for CpuKernel {
    fn name(&self) -> &'static str {
        isa::kernel_name(self.isa, self.activations)
    }

    fn activations(&self) -> Activations {
        self.activations
    }

    fn instructions(&self) -> &'static str {
        isa::instructions(self.isa, self.activations)
    }

    fn supported(&self) -> bool {
        isa::supported(self.isa, self.activations)
    }

    fn in_use(&self) -> bool {
        within_use(self.isa)
    }

    fn supports(&self, scheme: QuantScheme, _: usize, _: usize) -> bool {
        if let Some(block) = scheme.block() {
            return self.activations != Activations::Int8PerToken && Tiles::hold(block);
        }
        match self.activations {
            Activations::F32 | Activations::Int8 => true,
            Activations::Int8PerToken => scheme.bits == 8 && scheme.symmetric,
        }
    }

    fn prepare(&self, packed: &PackedLinear) -> Result<Box<dyn Prepared>, LayoutError> {
        // Every call below relies on this check.
        assert!(self.supported(), "{} does not run on this machine", self.name());
        let tiles = if packed.scheme.block().is_some() {
            let blocks = layout::layout_of(packed)?.unpack_blocks(packed)?;
            Tiles::of_blocks(&blocks, self.leaves_zeros())
        } else {
            Tiles::new(&layout::unpack(packed)?, self.leaves_zeros())
        };
        Ok(Box::new(CpuLinear { tiles, kernel: *self }))
    }
}

/// A linear in the order of the CPU kernels. The kernel is supported by this machine.
#[derive(Debug)]
struct CpuLinear {
    tiles: Tiles,
    kernel: CpuKernel,
}

impl Prepared for CpuLinear {
    fn out_features(&self) -> usize {
        self.tiles.shape.out_features
    }

    fn in_features(&self) -> usize {
        self.tiles.shape.in_features
    }

    fn resident_bytes(&self) -> usize {
        self.tiles.resident_bytes()
    }

    fn without_zeros(&self) -> bool {
        self.tiles.shape.sparse
    }

    fn with_zeros(&self) -> Option<Box<dyn Prepared>> {
        let tiles = self.tiles.with_zeros()?;
        Some(Box::new(Self { tiles, kernel: self.kernel }))
    }

    fn duplicate(&self) -> Option<Box<dyn Prepared>> {
        Some(Box::new(Self { tiles: self.tiles.clone(), kernel: self.kernel }))
    }

    fn matmul(&self, x: &[f32], m: usize, out: &mut [f32]) {
        check_sizes(self, x, m, out);
        if m == 0 || out.is_empty() {
            return;
        }
        if self.kernel.activations != Activations::F32 {
            self.multiply_bytes(x, m, out);
        } else if m < PANEL_TOKENS {
            self.multiply_floats(x, m, out);
        } else {
            self.multiply_panels(x, m, out);
        }
    }
}

/// `out [m, rows]`, of which each task writes rows of its own.
#[derive(Clone, Copy)]
struct Output {
    start: *mut f32,
    rows: usize,
}

// SAFETY: tasks write disjoint elements, see `store`.
unsafe impl Send for Output {}
// SAFETY: as above.
unsafe impl Sync for Output {}

impl Output {
    /// # Safety
    /// The element lies within the output.
    unsafe fn at(self, element: usize) -> *mut f32 {
        // SAFETY: the caller's promise.
        unsafe { self.start.add(element) }
    }

    /// Writes the rows of a tile for the tokens of a chunk.
    ///
    /// # Safety
    /// The chunk's tokens lie within the output, and no other task writes the rows of this tile.
    unsafe fn store(self, tile: usize, chunk: Chunk, values: &[[f32; ROWS]]) {
        let first = tile * ROWS;
        let count = ROWS.min(self.rows - first);
        for (t, values) in values[..chunk.count].iter().enumerate() {
            // SAFETY: `count` rows from `first` on are within the row of the token, by the caller's
            // promise.
            unsafe {
                let to = self.at((chunk.first + t) * self.rows + first);
                std::ptr::copy_nonoverlapping(values.as_ptr(), to, count);
            }
        }
    }
}

/// Calls a kernel with the width and the number of tokens as constants.
macro_rules! with_constants {
    ($bits:expr, $count:expr, $call:ident, [$($m:literal)*]) => {
        match ($bits, $count) {
            $((2, $m) => $call!(2, $m), (3, $m) => $call!(3, $m), (4, $m) => $call!(4, $m),
              (8, $m) => $call!(8, $m), (tiles::SPARSE, $m) => $call!(24, $m),)*
            _ => unreachable!("chunks and widths are those listed"),
        }
    };
}

impl CpuLinear {
    /// Calls `work` for every tile, several at a time.
    fn for_each_tile(&self, work: impl Fn(usize) + Sync + Send) {
        let shape = &self.tiles.shape;
        let least = TASK_BYTES.div_ceil(shape.tile_bytes().max(1));
        (0..shape.tiles()).into_par_iter().with_min_len(least).for_each(work);
    }

    /// Most tokens that the kernel takes at once.
    fn chunk(&self) -> usize {
        match (self.kernel.isa, self.kernel.activations) {
            (Isa::Scalar, _) => 1,
            (Isa::Avx2 | Isa::Neon, _) => 4,
            (Isa::Avx512, _) => CHUNK,
        }
    }

    fn multiply_floats(&self, x: &[f32], m: usize, out: &mut [f32]) {
        let shape = &self.tiles.shape;
        let input = Floats::new(shape, x, m, self.chunk());
        let output = Output { start: out.as_mut_ptr(), rows: shape.out_features };
        self.for_each_tile(|tile| {
            for &chunk in &input.chunks {
                let mut values = [[0.0f32; ROWS]; CHUNK];
                self.exact(tile, input.chunk(shape, chunk), chunk.count, &mut values);
                // SAFETY: `out` is `[m, rows]`, and each tile is one task's.
                unsafe { output.store(tile, chunk, &values) };
            }
        });
    }

    fn multiply_bytes(&self, x: &[f32], m: usize, out: &mut [f32]) {
        let shape = &self.tiles.shape;
        let (rows, columns) = (shape.out_features, shape.in_features);
        let portion = (PORTION_BYTES / shape.places().max(1)).next_multiple_of(CHUNK);
        for (x, out) in x.chunks(portion * columns).zip(out.chunks_mut(portion * rows)) {
            let m = m.min(out.len() / rows);
            let CpuKernel { isa, activations } = self.kernel;
            #[cfg(target_arch = "x86_64")]
            let (x, m, out) = {
                let many = if self.takes_tiles(m) { m / amx::TOKENS * amx::TOKENS } else { 0 };
                let (first, rest) = out.split_at_mut(many * rows);
                self.multiply_tiles(&x[..many * columns], many, first);
                (&x[many * columns..], m - many, rest)
            };
            let input = Bytes::new(shape, (x, m), self.chunk(), activations, isa);
            let output = Output { start: out.as_mut_ptr(), rows };
            if let &[chunk] = &input.chunks[..] {
                self.multiply_side_by_side(input.chunk(shape, chunk), chunk, output);
                continue;
            }
            self.for_each_tile(|tile| {
                for &chunk in &input.chunks {
                    let mut values = [[0.0f32; ROWS]; CHUNK];
                    self.fast((tile, 1), input.chunk(shape, chunk), chunk.count, &mut values);
                    // SAFETY: `out` is `[m, rows]`, and each tile is one task's.
                    unsafe { output.store(tile, chunk, &values) };
                }
            });
        }
    }

    /// Tiles that the kernel takes side by side for so many tokens of bytes.
    fn side(&self, count: usize) -> usize {
        match (self.kernel.isa, count) {
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512, _) => avx512::side(count),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx2, 1) => avx2::SIDE,
            _ => 1,
        }
    }

    /// Few tokens of bytes by several tiles at a time.
    fn multiply_side_by_side(&self, x: ByteChunk<'_>, chunk: Chunk, output: Output) {
        let (shape, count) = (&self.tiles.shape, chunk.count);
        let (side, tiles) = (self.side(count), shape.tiles());
        let least = TASK_BYTES.div_ceil(side * shape.tile_bytes().max(1));
        (0..tiles.div_ceil(side)).into_par_iter().with_min_len(least).for_each(|task| {
            let first = task * side;
            let mut values = [[0.0f32; ROWS]; CHUNK];
            let here = side.min(tiles - first);
            if here == side {
                self.fast((first, side), x, count, &mut values);
            } else {
                for tile in 0..here {
                    self.fast((first + tile, 1), x, count, &mut values[tile * count..]);
                }
            }
            for (tile, values) in values.chunks(count).take(here).enumerate() {
                // SAFETY: `out` is `[m, rows]`, and each tile is one task's.
                unsafe { output.store(first + tile, chunk, values) };
            }
        });
    }

    /// True when so many tokens of bytes are for AMX.
    #[cfg(target_arch = "x86_64")]
    fn takes_tiles(&self, m: usize) -> bool {
        self.kernel.isa == Isa::Avx512 && m >= TILE_TOKENS && amx::granted()
    }

    /// A multiple of 16 tokens of bytes on AMX.
    #[cfg(target_arch = "x86_64")]
    fn multiply_tiles(&self, x: &[f32], m: usize, out: &mut [f32]) {
        if m == 0 {
            return;
        }
        let (shape, places) = (&self.tiles.shape, self.tiles.shape.places());
        let CpuKernel { isa, activations } = self.kernel;
        let input = Bytes::new(shape, (x, m), 1, activations, isa);
        let tokens: Vec<amx::Sixteen> = (0..m / amx::TOKENS)
            .into_par_iter()
            .map(|at| amx::Sixteen::new(shape, &input, at * amx::TOKENS))
            .collect();
        let output = Output { start: out.as_mut_ptr(), rows: shape.out_features };
        let per_token = activations == Activations::Int8PerToken;
        (0..shape.tiles()).into_par_iter().for_each_init(
            || vec![0u8; places * ROWS],
            |codes, tile| {
                self.unpack(tile, codes);
                let bytes = (self.tiles.tile(tile), &**codes);
                amx::with_tiles(|| {
                    for (at, tokens) in tokens.iter().enumerate() {
                        let first = at * amx::TOKENS;
                        let mut values = [[0.0f32; ROWS]; amx::TOKENS];
                        // SAFETY: the kernel is AVX-512's, and the tile registers are configured.
                        unsafe { amx::fast(shape, bytes, tokens, per_token, &mut values) };
                        let chunk = Chunk { first, count: amx::TOKENS };
                        // SAFETY: `out` is `[m, rows]`, and each tile is one task's.
                        unsafe { output.store(tile, chunk, &values) };
                    }
                });
            },
        );
    }

    #[cfg(target_arch = "x86_64")]
    fn unpack(&self, tile: usize, to: &mut [u8]) {
        let (shape, tile) = (&self.tiles.shape, self.tiles.tile(tile));
        macro_rules! call {
            ($bits:literal, $m:literal) => {
                // SAFETY: `prepare` made sure that this machine has the instruction set.
                unsafe { avx512::unpack::<$bits>(shape, tile, to) }
            };
        }
        with_constants!(shape.form(), 1, call, [1]);
    }

    /// Many tokens: a panel of rows at a time becomes f32, `[places, panel rows]`.
    fn multiply_panels(&self, x: &[f32], m: usize, out: &mut [f32]) {
        let shape = &self.tiles.shape;
        let (rows, places) = (shape.out_features, shape.places());
        let placed = input::place_all(shape, x, m);
        let x = placed.as_deref().unwrap_or(x);
        let panel_rows = (PANEL_BYTES / (4 * places.max(1))).next_multiple_of(ROWS);
        let panel_rows = panel_rows.min(rows.next_multiple_of(ROWS));
        let mut panel = vec![0.0f32; panel_rows * places];
        let mut packing = Packing::default();
        for first in (0..rows).step_by(panel_rows) {
            let count = panel_rows.min(rows - first);
            let start = Output { start: panel.as_mut_ptr(), rows: panel_rows };
            (0..count.div_ceil(ROWS)).into_par_iter().for_each(|tile| {
                // SAFETY: the panel is `[places, panel rows]`, and each tile writes sixteen columns of its
                // own, which exist: panel rows are a multiple of sixteen and at least `count`.
                unsafe { self.dequantize(first / ROWS + tile, start.at(tile * ROWS), start.rows) };
            });
            let out = (&mut out[first..], rows);
            packing.nn((m, count, places), (x, places), (&panel, panel_rows), false, out);
        }
    }
}

impl CpuLinear {
    fn exact(&self, tile: usize, x: FloatChunk<'_>, count: usize, out: &mut [[f32; ROWS]; CHUNK]) {
        let (shape, tile) = (&self.tiles.shape, self.tiles.tile(tile));
        match self.kernel.isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                macro_rules! call {
                    ($bits:literal, $m:literal) => {
                        // SAFETY: `prepare` made sure that this machine has the instruction set.
                        unsafe { avx512::exact::<$bits, $m>(shape, tile, x, out) }
                    };
                }
                with_constants!(shape.form(), count, call, [1 2 4 8]);
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                macro_rules! call {
                    ($bits:literal, $m:literal) => {
                        // SAFETY: as above.
                        unsafe { avx2::exact::<$bits, $m>(shape, tile, x, out) }
                    };
                }
                with_constants!(shape.form(), count, call, [1 2 4]);
            }
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => {
                macro_rules! call {
                    ($bits:literal, $m:literal) => {
                        // SAFETY: `prepare` made sure that this machine has the instruction set.
                        unsafe { neon::exact::<$bits, $m>(shape, tile, x, out) }
                    };
                }
                with_constants!(shape.form(), count, call, [1 2 4]);
            }
            _ => {
                assert_eq!(count, 1, "plain kernels take one token at a time");
                out[0] = scalar::exact(shape, tile, x);
            }
        }
    }

    /// `side` tiles from `first` on by `count` tokens, `out[tile * count + token]`: one tile, or as many as the
    /// instruction set takes side by side for so few tokens.
    fn fast(
        &self,
        (first, side): (usize, usize),
        x: ByteChunk<'_>,
        count: usize,
        out: &mut [[f32; ROWS]],
    ) {
        let (shape, tiles) = (&self.tiles.shape, self.tiles.tiles(first, side));
        let per_token = self.kernel.activations == Activations::Int8PerToken;
        match self.kernel.isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                macro_rules! call {
                    ($bits:literal, $m:literal) => {
                        // SAFETY: `prepare` made sure that this machine has the instruction set.
                        unsafe {
                            const SIDE: usize = avx512::side($m);
                            const BYTES: bool = $bits == 8;
                            match (BYTES && per_token, side == 1) {
                                (true, true) => {
                                    avx512::fast::<$bits, $m, BYTES, 1>(shape, tiles, x, out)
                                }
                                (true, false) => {
                                    avx512::fast::<$bits, $m, BYTES, SIDE>(shape, tiles, x, out)
                                }
                                (false, true) => {
                                    avx512::fast::<$bits, $m, false, 1>(shape, tiles, x, out)
                                }
                                (false, false) => {
                                    avx512::fast::<$bits, $m, false, SIDE>(shape, tiles, x, out)
                                }
                            }
                        }
                    };
                }
                with_constants!(shape.form(), count, call, [1 2 4 8]);
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                macro_rules! call {
                    ($bits:literal, $m:literal) => {
                        // SAFETY: as above.
                        unsafe {
                            const SIDE: usize = if $m == 1 { avx2::SIDE } else { 1 };
                            const BYTES: bool = $bits == 8;
                            match (BYTES && per_token, side == 1) {
                                (true, true) => {
                                    avx2::fast::<$bits, $m, BYTES, 1>(shape, tiles, x, out)
                                }
                                (true, false) => {
                                    avx2::fast::<$bits, $m, BYTES, SIDE>(shape, tiles, x, out)
                                }
                                (false, true) => {
                                    avx2::fast::<$bits, $m, false, 1>(shape, tiles, x, out)
                                }
                                (false, false) => {
                                    avx2::fast::<$bits, $m, false, SIDE>(shape, tiles, x, out)
                                }
                            }
                        }
                    };
                }
                with_constants!(shape.form(), count, call, [1 2 4]);
            }
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => {
                macro_rules! call {
                    ($bits:literal, $m:literal) => {
                        // SAFETY: `prepare` made sure that this machine has the instruction set.
                        unsafe {
                            if $bits == 8 && per_token {
                                neon::fast::<$bits, $m, { $bits == 8 }>(shape, tiles, x, out);
                            } else {
                                neon::fast::<$bits, $m, false>(shape, tiles, x, out);
                            }
                        }
                    };
                }
                with_constants!(shape.form(), count, call, [1 2 4]);
            }
            _ => {
                assert_eq!(count, 1, "plain kernels take one token at a time");
                out[0] = scalar::fast(shape, tiles, x, per_token);
            }
        }
    }

    /// Writes the weights of a tile as f32, `to[place * stride + row]`.
    ///
    /// # Safety
    /// For each place sixteen floats from `to + place * stride` on may be written, and nobody else uses
    /// them.
    unsafe fn dequantize(&self, tile: usize, to: *mut f32, stride: usize) {
        let (shape, tile) = (&self.tiles.shape, self.tiles.tile(tile));
        match self.kernel.isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                macro_rules! call {
                    ($bits:literal, $m:literal) => {
                        // SAFETY: the caller's promise, and `prepare` made sure that this machine has the
                        // instruction set.
                        unsafe { avx512::dequantize::<$bits>(shape, tile, to, stride) }
                    };
                }
                with_constants!(shape.form(), 1, call, [1]);
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                macro_rules! call {
                    ($bits:literal, $m:literal) => {
                        // SAFETY: as above.
                        unsafe { avx2::dequantize::<$bits>(shape, tile, to, stride) }
                    };
                }
                with_constants!(shape.form(), 1, call, [1]);
            }
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => {
                macro_rules! call {
                    ($bits:literal, $m:literal) => {
                        // SAFETY: the caller's promise, and `prepare` made sure that this machine has the
                        // instruction set.
                        unsafe { neon::dequantize::<$bits>(shape, tile, to, stride) }
                    };
                }
                with_constants!(shape.form(), 1, call, [1]);
            }
            // SAFETY: the caller's promise.
            _ => unsafe { scalar::dequantize(shape, tile, to, stride) },
        }
    }
}

#[cfg(test)]
mod tests;
