//! Which kernel a product takes, with which grid and workspace: a function of its shape alone, so that the same bits come out
//! of every device of a generation.

use bytemuck::{Pod, Zeroable};

use super::packed::{BLOCK_ROWS, CudaWeights};

/// Type of activations and results.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Half {
    /// IEEE half precision.
    F16,
    /// Brain float.
    Bf16,
}

impl Half {
    /// Both.
    pub const ALL: [Self; 2] = [Self::F16, Self::Bf16];

    /// As symbols and tables write it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }

    /// Bits of the nearest number of this type.
    pub fn round(self, x: f32) -> u16 {
        match self {
            Self::F16 => half::f16::from_f32(x).to_bits(),
            Self::Bf16 => half::bf16::from_f32(x).to_bits(),
        }
    }

    /// The number of these bits.
    pub fn value(self, bits: u16) -> f32 {
        match self {
            Self::F16 => half::f16::from_bits(bits).to_f32(),
            Self::Bf16 => half::bf16::from_bits(bits).to_f32(),
        }
    }

    /// Distance between neighbouring numbers of this type at `x`.
    pub fn unit(self, x: f64) -> f64 {
        let (bits, low) = match self {
            Self::F16 => (10, -14),
            Self::Bf16 => (7, -126),
        };
        let exponent = if x == 0.0 { low } else { (x.abs().log2().floor() as i32).max(low) };
        2f64.powi(exponent - bits)
    }
}

/// Argument of the matmul kernels, `AttarMatmul` of `device/matmul.cuh`; pointers are filled in by the device.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct MatmulArgument {
    /// codes, scales, zeros, x, out, partial, arrived.
    pub pointers: [u64; 7],
    /// Tokens.
    pub m: i32,
    /// Rows of the weight.
    pub rows: i32,
    /// Chunks of a row.
    pub chunks: i32,
    /// Half chunks of a group.
    pub group_halves: i32,
    /// Type of the scales.
    pub scale_kind: i32,
    /// Blocks that share the columns of a tile.
    pub splits: i32,
    /// Elements from token to token of `x`.
    pub x_stride: i64,
    /// Elements from token to token of `out`.
    pub out_stride: i64,
}

/// Argument of `attar_arrange`, `AttarArrange` of `device/arrange.cuh`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct ArrangeArgument {
    /// x, order, out.
    pub pointers: [u64; 3],
    /// Tokens.
    pub m: i32,
    /// Places of a row.
    pub places: i32,
    /// Elements from token to token of `x`.
    pub x_stride: i64,
    /// Elements from token to token of `out`.
    pub out_stride: i64,
}

/// Puts `m` tokens into the order of places.
pub fn arrange_launch(places: usize, m: usize) -> Launch {
    let grid = [places.div_ceil(256) as u32, m.min(65535) as u32, 1];
    Launch { symbol: "attar_arrange".to_owned(), grid, threads: 256, shared: 0 }
}

/// One launch.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Launch {
    /// Name of the kernel.
    pub symbol: String,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
}

/// A product to be launched.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct MatmulLaunch {
    /// Kernel and grid.
    pub launch: Launch,
    /// Blocks that share the columns of a tile.
    pub splits: u32,
    /// Bytes of f32 partial sums.
    pub partial_bytes: usize,
    /// Counters, 4 bytes each, zero before the first launch and after every launch.
    pub counters: usize,
}

/// Shape of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Problem {
    /// Bits per code.
    pub bits: u8,
    /// Type of activations and results.
    pub half: Half,
    /// Rows of the weight.
    pub rows: usize,
    /// Chunks of 64 columns.
    pub chunks: usize,
    /// Tokens.
    pub m: usize,
}

/// Tokens up to which weights stream through registers.
pub const DECODE_TOKENS: usize = 16;
/// Blocks that fill a GPU of this time.
const BLOCKS: usize = 128;
/// Chunks that a block of the decoding kernel shall have at least, one for each warp.
const DECODE_CHUNKS: usize = 8;
/// Chunks that a block of the other kernel shall have at least, enough to fill its pipeline.
const GEMM_CHUNKS: usize = 4;
/// Stages of its pipeline, as `device/gemm.cuh` has them.
const STAGES: usize = 4;

impl Problem {
    /// Of these weights.
    pub fn new(weights: &CudaWeights, half: Half, m: usize) -> Self {
        let (bits, rows, chunks) = (weights.bits, weights.rows, weights.places.chunks);
        Self { bits, half, rows, chunks, m }
    }

    /// Kernel, grid and workspace.
    ///
    /// # Panics
    /// When there is nothing to multiply.
    pub fn launch(&self) -> MatmulLaunch {
        assert!(self.m > 0 && self.rows > 0 && self.chunks > 0, "there is something to multiply");
        // Tokens of a tile, rows of a tile.
        let (kind, tokens, rows) = match self.m {
            ..=8 => ("decode", 8, BLOCK_ROWS),
            9..=DECODE_TOKENS => ("decode", 16, BLOCK_ROWS),
            17..=32 => ("gemm", 32, 8 * BLOCK_ROWS),
            33..=64 => ("gemm", 64, 8 * BLOCK_ROWS),
            _ => ("gemm", 128, 4 * BLOCK_ROWS),
        };
        let (tiles_m, tiles_n) = (self.m.div_ceil(tokens), self.rows.div_ceil(rows));
        let tiles = tiles_m * tiles_n;
        let decode = kind == "decode";
        let least = if decode { DECODE_CHUNKS } else { GEMM_CHUNKS };
        let splits = BLOCKS.div_ceil(tiles).min(self.chunks / least).clamp(1, 64);
        let shared = if decode {
            8 * rows * tokens * 4
        } else {
            STAGES * (rows / BLOCK_ROWS * 256 * usize::from(self.bits) + 128 * tokens)
        };
        MatmulLaunch {
            launch: Launch {
                symbol: format!("attar_{kind}_w{}_{}_{tokens}", self.bits, self.half.name()),
                grid: [tiles_n as u32, splits as u32, tiles_m as u32],
                threads: 256,
                shared: (shared + 16) as u32,
            },
            splits: splits as u32,
            partial_bytes: if splits > 1 { tiles * splits * rows * tokens * 4 } else { 0 },
            counters: if splits > 1 { tiles } else { 0 },
        }
    }
}
