//! Which kernel a product takes, with which grid and workspace: a function of its shape alone, so that the same bits come out
//! of every device of a generation.

use bytemuck::{Pod, Zeroable};

use super::packed::BLOCK_ROWS;

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

/// Argument of `attar_copy`, `AttarCopy` of `device/arrange.cuh`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct CopyArgument {
    /// from, to.
    pub pointers: [u64; 2],
    /// Units of 16 bytes.
    pub units: i64,
}

/// Copies bytes, a multiple of 16 of them.
pub fn copy_launch(bytes: usize) -> Launch {
    let grid = [(bytes / 16).div_ceil(1024) as u32, 1, 1];
    Launch { symbol: "attar_copy".to_owned(), grid, threads: 256, shared: 0, cluster: 1 }
}

/// Puts `m` tokens into the order of places.
pub fn arrange_launch(places: usize, m: usize) -> Launch {
    let grid = [places.div_ceil(256) as u32, m.min(65535) as u32, 1];
    Launch { symbol: "attar_arrange".to_owned(), grid, threads: 256, shared: 0, cluster: 1 }
}

/// What a device's kernels may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Generation {
    /// Asynchronous copies and `mma.sync`: compute capability 8.0 and later.
    Ampere,
    /// Copies in bulk, barriers of copies, clusters and `wgmma` too: machine code for 9.0a.
    Hopper,
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
    /// Blocks of a cluster, along the second axis of the grid.
    pub cluster: u32,
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
    /// Half chunks of a group.
    pub group_halves: usize,
    /// Tokens.
    pub m: usize,
    /// What the device's kernels may use.
    pub generation: Generation,
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

/// Blocks of which two fit on each multiprocessor of an H100 or H200.
const HOPPER_BLOCKS: usize = 264;
/// Blocks of a cluster, and how many blocks of such clusters an H200 runs at once with one on a multiprocessor (measured: its
/// groups of processors have 16 or 18 multiprocessors, not all of them whole).
const CLUSTERS: [(usize, usize); 6] = [(2, 132), (3, 117), (4, 120), (6, 102), (7, 105), (8, 120)];

impl Problem {
    /// True when every part of 128 columns lies in one group.
    fn whole_parts(&self) -> bool {
        self.group_halves.is_multiple_of(4) || self.group_halves >= 2 * self.chunks
    }

    /// Few tokens on Hopper: `device/stream.cuh`.
    fn stream(&self) -> MatmulLaunch {
        const WARPS: usize = 8;
        let blocks = self.rows.div_ceil(BLOCK_ROWS);
        let (tokens, bits) = (self.m.min(8), usize::from(self.bits));
        let depth = if self.bits <= 3 { 3 } else { 2 };
        let place = 32 + 256 * tokens + depth * (1024 * bits + 528 * tokens);
        MatmulLaunch {
            launch: Launch {
                symbol: self.symbol("stream", 8),
                grid: [blocks.min(HOPPER_BLOCKS) as u32, 1, self.m.div_ceil(8) as u32],
                threads: 32 * WARPS as u32,
                shared: (32 + WARPS * place) as u32,
                cluster: 1,
            },
            splits: 1,
            partial_bytes: 0,
            counters: 0,
        }
    }

    /// More tokens on Hopper: `device/hopper.cuh`.
    fn hopper(&self) -> MatmulLaunch {
        let tokens = [8, 16, 32, 64].into_iter().find(|&tokens| self.m <= tokens).unwrap_or(128);
        let rows = if tokens <= 64 { 4 * BLOCK_ROWS } else { 8 * BLOCK_ROWS };
        let folds = if self.whole_parts() { 1 } else { 4 };
        let bits = usize::from(self.bits);
        let stage = (256 * tokens + 16 * bits * rows + 6 * folds * rows).next_multiple_of(1024);
        let count = (225 * 1024 / (stage + 16)).min(if tokens <= 32 { 12 } else { 8 });
        let (tiles_m, tiles_n) = (self.m.div_ceil(tokens), self.rows.div_ceil(rows));
        let stages = self.chunks.div_ceil(2);
        // The largest cluster with which all tiles run at once, and with which each block has something to do.
        let splits = CLUSTERS
            .into_iter()
            .rev()
            .find(|&(cluster, room)| tiles_m * tiles_n * cluster <= room && 4 * cluster <= stages)
            .map_or(1, |(cluster, _)| cluster);
        MatmulLaunch {
            launch: Launch {
                symbol: self.symbol("hopper", tokens),
                grid: [tiles_n as u32, splits as u32, tiles_m as u32],
                threads: if tokens <= 16 { 512 } else { 384 },
                shared: (1024 + count * (stage + 16)) as u32,
                cluster: splits as u32,
            },
            splits: splits as u32,
            partial_bytes: 0,
            counters: 0,
        }
    }

    fn symbol(&self, kind: &str, tokens: usize) -> String {
        let fine = if self.whole_parts() { "" } else { "_fine" };
        format!("attar_{kind}_w{}_{}_{tokens}{fine}", self.bits, self.half.name())
    }

    /// Every kernel that multiplies so many tokens, [`Problem::launch`] first.
    ///
    /// # Panics
    /// When there is nothing to multiply.
    pub fn launches(&self) -> Vec<MatmulLaunch> {
        let chosen = self.launch();
        let mut all = vec![chosen];
        if self.generation == Generation::Hopper && self.m <= 8 {
            let other = |launch: &MatmulLaunch| launch.launch.symbol != all[0].launch.symbol;
            let more = [self.stream(), self.hopper()].into_iter().find(other);
            all.extend(more);
        }
        all
    }

    /// Kernel, grid and workspace.
    ///
    /// # Panics
    /// When there is nothing to multiply.
    pub fn launch(&self) -> MatmulLaunch {
        assert!(self.m > 0 && self.rows > 0 && self.chunks > 0, "there is something to multiply");
        match (self.generation, self.m) {
            (Generation::Ampere, _) => {}
            // Activations of more tokens cost the stream more than the tiles, unless those are few (measured before tiles of 8 tokens).
            (Generation::Hopper, ..=4) => return self.stream(),
            (Generation::Hopper, ..=8) if self.rows < 8192 => return self.stream(),
            (Generation::Hopper, _) => return self.hopper(),
        }
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
                cluster: 1,
            },
            splits: splits as u32,
            partial_bytes: if splits > 1 { tiles * splits * rows * tokens * 4 } else { 0 },
            counters: if splits > 1 { tiles } else { 0 },
        }
    }
}
