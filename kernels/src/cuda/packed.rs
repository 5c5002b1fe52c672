//! The packed form of the CUDA kernels.
//!
//! Rows stand in blocks of 32, columns in chunks of 64; a block times a chunk is 256 · bits bytes, which one warp loads 16
//! bytes per lane at a time. Blocks follow each other along the columns, so that a warp reads one contiguous stream:
//!
//! ```text
//! codes    [rows / 32][chunks][plane][lane][16 bytes]
//! scales   [groups][rows, padded to 32]     f16, bf16 or f32, as the artifact has them
//! zeros    [groups][rows, padded to 32]     u8, u16 with 8 bits; none when all are 2^(bits-1)
//! order    [chunks * 64]                    column of each place, -1 for padding; none when place = column
//!
//! lane 4g + t holds rows 4g .. 4g+3 of the block and columns 16k + 8j + 2t + e of the chunk, k < 4, j, e = 0, 1
//!
//! 4 bits, word r*4 + h*2 + s:     bits 31..28 27..24 23..20 19..16 15..12 11..8  7..4   3..0
//!                                 row      c1     c0     c1     c0     c1    c0    c1     c0     ci = 4g + 2r + i
//!                                 column    9      9      1      1      8     8     0      0     + 32h + 16s + 2t
//! ```
//!
//! The other widths are described in `device/codes.cuh`. Groups are padded to 32 columns, or to a multiple of 64, with
//! places that no column takes (their activation is zero). An order of columns (act-order) sorts columns by group; the
//! activations are put into that order once per product.

use attar_tensor::{DType, LayoutError, PackedLinear, QuantizedLinear};
use rayon::prelude::*;

use crate::layout;

/// Columns of a chunk.
pub const CHUNK: usize = 64;
/// Columns of half a chunk, the finest group.
pub const HALF: usize = 32;
/// Rows of a block.
pub const BLOCK_ROWS: usize = 32;

/// Type of the scales, as the kernels number it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum ScaleKind {
    /// Half precision.
    F16 = 0,
    /// Brain float.
    Bf16 = 1,
    /// Single precision.
    F32 = 2,
}

impl ScaleKind {
    /// Of a tensor of scales.
    pub fn of(dtype: DType) -> Option<Self> {
        match dtype {
            DType::F16 => Some(Self::F16),
            DType::BF16 => Some(Self::Bf16),
            DType::F32 => Some(Self::F32),
            _ => None,
        }
    }

    /// Of the scales that an artifact stores.
    pub fn of_packed(packed: &PackedLinear) -> Self {
        let scales = packed.part("scales").or_else(|| packed.part("weight_scale"));
        scales.and_then(|part| Self::of(part.dtype())).unwrap_or(Self::F32)
    }

    /// Size in bytes.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::F32 => 4,
        }
    }
}

/// Where columns stand in the packed form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Places {
    /// Groups of the weight.
    pub groups: usize,
    /// Half chunks of a group: 1 or even.
    pub group_halves: usize,
    /// Chunks of a row.
    pub chunks: usize,
    /// Column of each place, -1 for padding; `None` when place and column are the same.
    pub order: Option<Vec<i32>>,
}

impl Places {
    /// For `columns` in `groups` of equal size, or in the groups that `g_idx` names.
    pub fn new(columns: usize, groups: usize, g_idx: Option<&[u32]>) -> Self {
        let groups = groups.max(1);
        let mut members = vec![Vec::new(); groups];
        let size = columns.div_ceil(groups).max(1);
        for column in 0..columns {
            let group = g_idx.map_or(column / size, |g_idx| g_idx[column] as usize);
            members[group].push(column as i32);
        }
        let most = members.iter().map(Vec::len).max().unwrap_or(0).max(1);
        let group_halves =
            if most <= HALF && groups > 1 { 1 } else { most.next_multiple_of(CHUNK) / HALF };
        let chunks = (groups * group_halves).div_ceil(2);
        let mut order = vec![-1; chunks * CHUNK];
        for (group, members) in members.iter().enumerate() {
            order[group * group_halves * HALF..][..members.len()].copy_from_slice(members);
        }
        let plain = order.len() == columns && order.iter().zip(0..).all(|(&a, b)| a == b);
        Self { groups, group_halves, chunks, order: (!plain).then_some(order) }
    }

    /// Places of a row, padding included.
    pub fn places(&self) -> usize {
        self.chunks * CHUNK
    }

    /// Groups for which the packed form has scales: one more than there are when half a chunk is padding.
    pub fn padded_groups(&self) -> usize {
        self.chunks * 2 / self.group_halves
    }
}

/// A weight as the CUDA kernels eat it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CudaWeights {
    /// Bits per code.
    pub bits: u8,
    /// Rows of the weight.
    pub rows: usize,
    /// Columns of the weight.
    pub columns: usize,
    /// Where its columns stand.
    pub places: Places,
    /// Packed codes.
    pub codes: Vec<u8>,
    /// Type of the scales.
    pub scale_kind: ScaleKind,
    /// Scales.
    pub scales: Vec<u8>,
    /// Zero points; `None` when the scheme is symmetric and all stand in the middle.
    pub zeros: Option<Vec<u8>>,
}

impl CudaWeights {
    /// From any layout; the type of the scales is that of the artifact.
    ///
    /// # Errors
    /// As [`layout::unpack`].
    pub fn new(packed: &PackedLinear) -> Result<Self, LayoutError> {
        Ok(Self::pack(&layout::unpack(packed)?, ScaleKind::of_packed(packed)))
    }

    /// Packs codes whose scales `kind` holds exactly.
    pub fn pack(weight: &QuantizedLinear, kind: ScaleKind) -> Self {
        let (bits, rows, columns) = (weight.scheme.bits, weight.out_features, weight.in_features);
        let places = Places::new(columns, weight.groups(), weight.g_idx.as_deref());
        let blocks = rows.div_ceil(BLOCK_ROWS);
        let chunk_bytes = 256 * usize::from(bits);
        let mut codes = vec![0u8; blocks * places.chunks * chunk_bytes];
        codes.par_chunks_mut((places.chunks * chunk_bytes).max(1)).enumerate().for_each(
            |(block, out)| {
                for (chunk, out) in out.chunks_mut(chunk_bytes).enumerate() {
                    pack_chunk(weight, &places, block, chunk, out);
                }
            },
        );
        let padded_rows = blocks * BLOCK_ROWS;
        let groups = weight.groups();
        let by_group = |put: &mut dyn FnMut(usize, usize)| {
            for group in 0..groups {
                for row in 0..rows {
                    put(group * padded_rows + row, row * groups + group);
                }
            }
        };
        let mut scales = vec![0u8; places.padded_groups() * padded_rows * kind.bytes()];
        by_group(&mut |to, from| {
            let scale = weight.scales[from];
            match kind {
                ScaleKind::F16 => scales[2 * to..2 * to + 2]
                    .copy_from_slice(&half::f16::from_f32(scale).to_le_bytes()),
                ScaleKind::Bf16 => scales[2 * to..2 * to + 2]
                    .copy_from_slice(&half::bf16::from_f32(scale).to_le_bytes()),
                ScaleKind::F32 => scales[4 * to..4 * to + 4].copy_from_slice(&scale.to_le_bytes()),
            }
        });
        let middle = u16::from(weight.scheme.mid_code());
        let plain = weight.scheme.symmetric && weight.zeros.iter().all(|&zero| zero == middle);
        let zeros = (!plain).then(|| {
            let size = zero_bytes(bits);
            let mut zeros = vec![0u8; places.padded_groups() * padded_rows * size];
            by_group(&mut |to, from| {
                zeros[size * to..size * (to + 1)]
                    .copy_from_slice(&weight.zeros[from].to_le_bytes()[..size]);
            });
            zeros
        });
        Self { bits, rows, columns, places, codes, scale_kind: kind, scales, zeros }
    }

    /// Bytes that one product reads.
    pub fn bytes(&self) -> usize {
        let order = self.places.order.as_ref().map_or(0, |order| order.len() * 4);
        self.codes.len() + self.scales.len() + self.zeros.as_ref().map_or(0, Vec::len) + order
    }
}

/// Size of a stored zero point.
pub const fn zero_bytes(bits: u8) -> usize {
    if bits == 8 { 2 } else { 1 }
}

/// Packs the codes of one block of rows and one chunk of columns, `256 * bits` bytes.
fn pack_chunk(
    weight: &QuantizedLinear,
    places: &Places,
    block: usize,
    chunk: usize,
    out: &mut [u8],
) {
    let bits = weight.scheme.bits;
    let mut words = vec![0u32; out.len() / 4];
    let mut code = |lane: usize, word: usize, shift: usize, code: u32| {
        // Planes of four words per lane; the last two words of 3 bits have a plane of two.
        let at = match (bits, word) {
            (3, 4..) => 128 + lane * 2 + word - 4,
            _ => word / 4 * 128 + lane * 4 + word % 4,
        };
        words[at] |= code << shift;
    };
    for lane in 0..32 {
        for i in 0..64 {
            let bit = |n: usize| i >> n & 1;
            let (r, h, s, j, e, i) = (bit(0), bit(1), bit(2), bit(3), bit(4), bit(5));
            let row = block * BLOCK_ROWS + lane / 4 * 4 + 2 * r + i;
            let place = chunk * CHUNK + 32 * h + 16 * s + 8 * j + lane % 4 * 2 + e;
            let column = places.order.as_ref().map_or(place as i32, |order| order[place]);
            let Ok(column) = usize::try_from(column) else { continue };
            if row >= weight.out_features {
                continue;
            }
            let c = u32::from(weight.codes[row * weight.in_features + column]);
            let a = i + 2 * j;
            match bits {
                4 => code(lane, r * 4 + h * 2 + s, 4 * a + 16 * e, c),
                8 => code(lane, (r * 4 + h * 2 + s) * 2 + j, 16 * i + 8 * e, c),
                2 => code(lane, r * 2 + h, 8 * s + 2 * a + 16 * e, c),
                _ => {
                    code(lane, r * 2 + h, 8 * s + 2 * a + 16 * e, c & 3);
                    code(lane, 4 + r, 8 * h + 4 * s + a + 16 * e, c >> 2);
                }
            }
        }
    }
    for (out, word) in out.chunks_exact_mut(4).zip(words) {
        out.copy_from_slice(&word.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases;

    #[test]
    fn places_pad_groups_and_follow_an_order() {
        let plain = Places::new(256, 2, None);
        assert_eq!((plain.group_halves, plain.chunks, plain.order), (4, 4, None));
        let small = Places::new(72, 3, None);
        assert_eq!((small.group_halves, small.chunks, small.padded_groups()), (1, 2, 4));
        let order = small.order.unwrap();
        assert_eq!((order[23], order[24], order[32], order[127]), (23, -1, 24, -1));
        let channel = Places::new(77, 1, None);
        assert_eq!((channel.group_halves, channel.chunks), (4, 2));
        let g_idx: Vec<u32> = (0..128).map(|column| (column + 1) % 2).collect();
        let act = Places::new(128, 2, Some(&g_idx));
        assert_eq!(act.order.unwrap()[..3], [1, 3, 5]);
    }

    #[test]
    fn every_code_is_packed_once() {
        for case in cases::all() {
            let weight = case.weight();
            let packed = CudaWeights::pack(&weight, ScaleKind::F32);
            let count = |bytes: &[u8]| bytes.iter().map(|b| u64::from(b.count_ones())).sum::<u64>();
            assert_eq!(count(&packed.codes), count(&weight.codes), "{case}");
        }
    }
}
