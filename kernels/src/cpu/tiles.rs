//! The form in which the CPU kernels read a linear, whatever layout it came in: tiles of 16 rows, each
//! one sequential stream with its scales and zero points inside.
//!
//! Columns are ordered by group, so that a group is contiguous, and each group is filled up to a multiple
//! of 32 columns with columns whose activation is zero. A block is 32 columns of the 16 rows: 8 *quads*
//! of 4 columns. A quad is 64 bytes, four neighbouring columns of each row in turn, which is what
//! byte dot products take: a vector of 16 (8, 4) rows by one broadcast of four activations.
//!
//! ```text
//! quad q      byte i = code[row i / 4][column 4 q + i % 4]
//! 8 bits      512 bytes: quads 0 to 7
//! 4 bits      256 bytes: vector j of 4: quad[j] | quad[j + 4] << 4
//! 2 bits      128 bytes: vector j of 2: quad[j] | quad[j + 2] << 2 | quad[j + 4] << 4 | quad[j + 6] << 6
//! 3 bits      192 bytes: as 2 bits for the low bits, then one vector: bit q = high bit of quad[q]
//!
//! 2:4 of 4    192 bytes, 3 bits per weight: of the four codes of a row in a quad at most two differ from the zero point, and
//!             only two are stored, each exclusive-ored with the zero point, and which two they are
//!             vector v of 2: byte 16 l + 8 h + 2 r + k = kept code k of row 4 l + r in quad 2 v + h,
//!                            | the same in quad 2 v + h + 4 << 4
//!             8 words of 64 bits, one for each quad: bits 32 (row % 2) + 4 (row / 2) + c = column c is kept
//!
//! a group     its blocks, 16 scales (f16, bf16 or f32), 16 offsets
//! a tile      its groups, nothing between them
//! ```
//!
//! Scales are stored in the narrowest type that holds all of them exactly. Offsets are absent when every
//! zero point is in the middle, else zero points as bytes (up to 4 bits) or 16-bit words (8 bits: a zero
//! point may be 256). With float minima (`w = scale * code - minimum`) they are of the type of the scales.

use attar_tensor::blocks::{Levels, Minimum};
use attar_tensor::{BlockQuantized, BlockType, QuantizedLinear};
use half::{bf16, f16};
use rayon::prelude::*;

use super::buffer::Buffer;

/// Rows of a tile.
pub(crate) const ROWS: usize = 16;
/// Columns of a block.
pub(crate) const BLOCK: usize = 32;
/// Groups of four columns in a block.
pub(crate) const QUADS: usize = BLOCK / 4;
/// Bytes of a quad.
pub(crate) const QUAD: usize = 4 * ROWS;

/// Name of 4-bit codes of which two in four are stored, beside the widths of the other forms.
pub(crate) const SPARSE: u8 = 24;
/// Where the words that say which codes are kept begin in a block of [`SPARSE`].
pub(crate) const KEPT: usize = 2 * QUAD;

/// Bytes of a block of a form: a width, or [`SPARSE`].
pub(crate) const fn block_bytes(form: u8) -> usize {
    if form == SPARSE { KEPT + 8 * QUADS } else { BLOCK * ROWS * form as usize / 8 }
}

/// The type of scales.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ScaleType {
    F16,
    Bf16,
    F32,
}

/// What is subtracted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Offset {
    /// `2^(bits - 1)` from each code.
    Middle,
    /// A zero point in a byte.
    Byte,
    /// A zero point in 16 bits.
    Word,
    /// A float from each product of code and scale.
    Minimum,
}

/// What stands between codes and products, shared by all rows.
#[derive(Debug, Clone)]
pub(crate) struct Shape {
    pub(crate) out_features: usize,
    pub(crate) in_features: usize,
    pub(crate) bits: u8,
    /// Two of four codes are stored.
    pub(crate) sparse: bool,
    pub(crate) scale: ScaleType,
    pub(crate) offset: Offset,
    /// First block of each group, and the number of blocks behind the last.
    pub(crate) group_blocks: Vec<u32>,
    /// Column in each place, `u32::MAX` for filling; `None` when places are columns.
    pub(crate) order: Option<Vec<u32>>,
}

impl Shape {
    pub(crate) fn groups(&self) -> usize {
        self.group_blocks.len() - 1
    }

    pub(crate) fn blocks(&self) -> usize {
        self.group_blocks[self.groups()] as usize
    }

    /// Columns with the filling.
    pub(crate) fn places(&self) -> usize {
        self.blocks() * BLOCK
    }

    /// How codes lie: a width, or [`SPARSE`].
    pub(crate) fn form(&self) -> u8 {
        if self.sparse { SPARSE } else { self.bits }
    }

    pub(crate) fn block_bytes(&self) -> usize {
        block_bytes(self.form())
    }

    pub(crate) fn scale_bytes(&self) -> usize {
        ROWS * if self.scale == ScaleType::F32 { 4 } else { 2 }
    }

    pub(crate) fn offset_bytes(&self) -> usize {
        match self.offset {
            Offset::Middle => 0,
            Offset::Byte => ROWS,
            Offset::Word => 2 * ROWS,
            Offset::Minimum => self.scale_bytes(),
        }
    }

    pub(crate) fn tile_bytes(&self) -> usize {
        self.blocks() * self.block_bytes()
            + self.groups() * (self.scale_bytes() + self.offset_bytes())
    }

    pub(crate) fn tiles(&self) -> usize {
        self.out_features.div_ceil(ROWS)
    }

    /// `2^(bits - 1)`.
    pub(crate) fn middle(&self) -> f32 {
        f32::from(1u8 << (self.bits - 1))
    }
}

/// A linear as tiles.
#[derive(Debug, Clone)]
pub(crate) struct Tiles {
    pub(crate) shape: Shape,
    data: Buffer,
}

/// Weights `scale * code - minimum` before they are tiles; the minimum is a float or `scale * zero`.
pub(crate) struct Affine<'a> {
    pub(crate) bits: u8,
    /// Two of four codes may be left away where they are zero.
    pub(crate) sparse: bool,
    pub(crate) out_features: usize,
    pub(crate) in_features: usize,
    /// `[out_features, in_features]`.
    pub(crate) codes: &'a [u8],
    /// `[out_features, groups]`.
    pub(crate) scales: &'a [f32],
    pub(crate) offsets: Offsets<'a>,
    /// Group of each column.
    pub(crate) group_of: &'a (dyn Fn(usize) -> usize + Sync),
}

/// What [`Affine`] subtracts.
#[derive(Clone, Copy)]
pub(crate) enum Offsets<'a> {
    /// Zero points `[out_features, groups]`.
    Zeros(&'a [u16]),
    /// Minima `[out_features, groups]`.
    Minima(&'a [f32]),
}

fn fits(scales: &[f32], narrow: impl Fn(f32) -> f32 + Sync) -> bool {
    scales.par_chunks(1 << 14).all(|s| s.iter().all(|&s| narrow(s).to_bits() == s.to_bits()))
}

impl Tiles {
    /// Rearranges a quantized linear whose lengths and indices have been checked. Where `sparse`, 4-bit codes of which two
    /// in four are zero lie without them.
    pub(crate) fn new(weight: &QuantizedLinear, sparse: bool) -> Self {
        let group_of = |column| weight.group_of(column);
        Self::from_affine(&Affine {
            sparse,
            bits: weight.scheme.bits,
            out_features: weight.out_features,
            in_features: weight.in_features,
            codes: &weight.codes,
            scales: &weight.scales,
            offsets: Offsets::Zeros(&weight.zeros),
            group_of: &group_of,
        })
    }

    /// True when tiles hold weights of a block type in as many bits: codes of 4 or 8 bits, a scale for each 32 of them.
    pub(crate) fn hold(block: BlockType) -> bool {
        matches!(block.bits(), 4 | 8)
            && matches!(block.levels(), Levels::Linear { .. })
            && block.sub_size() == BLOCK
    }

    /// Rearranges blocks of a type that tiles [`Tiles::hold`], whose lengths have been checked.
    pub(crate) fn of_blocks(weight: &BlockQuantized, sparse: bool) -> Self {
        assert!(Self::hold(weight.block), "tiles do not hold {}", weight.block);
        let (subs, groups) = (weight.block.subs(), weight.codes.len() / BLOCK);
        let both: Vec<(f32, f32)> =
            (0..groups).map(|at| weight.scale_min(at / subs, at % subs)).collect();
        let scales: Vec<f32> = both.iter().map(|&(scale, _)| scale).collect();
        let minima: Vec<f32> = both.iter().map(|&(_, min)| min).collect();
        let zeros = match weight.block.levels() {
            Levels::Linear { zero } => vec![zero as u16; groups],
            Levels::Codebook(_) => unreachable!("tiles hold integers"),
        };
        Self::from_affine(&Affine {
            sparse,
            bits: weight.block.bits(),
            out_features: weight.out_features,
            in_features: weight.in_features,
            codes: &weight.codes,
            scales: &scales,
            offsets: match weight.block.minimum() {
                Minimum::None => Offsets::Zeros(&zeros),
                _ => Offsets::Minima(&minima),
            },
            group_of: &|column| column / BLOCK,
        })
    }

    /// Rearranges codes, scales and offsets.
    pub(crate) fn from_affine(weight: &Affine<'_>) -> Self {
        let (rows, columns) = (weight.out_features, weight.in_features);
        let groups = weight.scales.len() / rows.max(1);
        let mut members: Vec<Vec<u32>> = vec![Vec::new(); groups];
        for column in 0..columns {
            members[(weight.group_of)(column)].push(column as u32);
        }
        let mut order = Vec::with_capacity(columns);
        let mut group_blocks = vec![0u32];
        for member in &members {
            order.extend_from_slice(member);
            order.resize(order.len().next_multiple_of(BLOCK), u32::MAX);
            group_blocks.push((order.len() / BLOCK) as u32);
        }
        let identity = order.len() == columns && order.iter().zip(0u32..).all(|(&a, b)| a == b);
        let (f16s, bf16s) =
            (|s: f32| f16::from_f32(s).to_f32(), |s: f32| bf16::from_f32(s).to_f32());
        let all = |narrow: &(dyn Fn(f32) -> f32 + Sync)| {
            fits(weight.scales, narrow)
                && match weight.offsets {
                    Offsets::Zeros(_) => true,
                    Offsets::Minima(minima) => fits(minima, narrow),
                }
        };
        let mut shape = Shape {
            out_features: rows,
            in_features: columns,
            bits: weight.bits,
            sparse: false,
            scale: if all(&f16s) {
                ScaleType::F16
            } else if all(&bf16s) {
                ScaleType::Bf16
            } else {
                ScaleType::F32
            },
            offset: match weight.offsets {
                Offsets::Minima(_) => Offset::Minimum,
                Offsets::Zeros(zeros) if zeros.iter().all(|&z| z == 1 << (weight.bits - 1)) => {
                    Offset::Middle
                }
                Offsets::Zeros(_) if weight.bits == 8 => Offset::Word,
                Offsets::Zeros(_) => Offset::Byte,
            },
            group_blocks,
            order: if identity { None } else { Some(order) },
        };
        shape.sparse = weight.sparse && two_of_four(&shape, weight);
        let mut data = Buffer::new(shape.tiles() * shape.tile_bytes());
        data.par_chunks_mut(shape.tile_bytes().max(1))
            .enumerate()
            .for_each(|(tile, to)| fill_tile(&shape, weight, tile * ROWS, to));
        Self { shape, data }
    }

    /// The same with the zeros; `None` where they are there.
    pub(crate) fn with_zeros(&self) -> Option<Self> {
        if !self.shape.sparse {
            return None;
        }
        let shape = Shape { sparse: false, ..self.shape.clone() };
        let mut data = Buffer::new(shape.tiles() * shape.tile_bytes());
        for tile in 0..shape.tiles() {
            let mut from = self.tile(tile);
            let mut to = &mut data[tile * shape.tile_bytes()..(tile + 1) * shape.tile_bytes()];
            for group in shape.group_blocks.windows(2) {
                let blocks = (group[1] - group[0]) as usize;
                let (_, zeros) = read_scales(&shape, &from[blocks * self.shape.block_bytes()..]);
                for _ in 0..blocks {
                    let mut quads = [[0u8; QUAD]; QUADS];
                    unpack_sparse(&zeros, from, &mut quads);
                    let block;
                    (block, to) = to.split_at_mut(shape.block_bytes());
                    pack_block(shape.bits, &quads, block);
                    from = &from[self.shape.block_bytes()..];
                }
                let behind = shape.scale_bytes() + shape.offset_bytes();
                let scales;
                (scales, to) = to.split_at_mut(behind);
                scales.copy_from_slice(&from[..behind]);
                from = &from[behind..];
            }
        }
        Some(Self { shape, data })
    }

    pub(crate) fn tile(&self, tile: usize) -> &[u8] {
        self.tiles(tile, 1)
    }

    /// `count` tiles from `first` on.
    pub(crate) fn tiles(&self, first: usize, count: usize) -> &[u8] {
        let bytes = self.shape.tile_bytes();
        &self.data[first * bytes..(first + count) * bytes]
    }

    pub(crate) fn resident_bytes(&self) -> usize {
        self.data.len()
            + 4 * self.shape.group_blocks.len()
            + self.shape.order.as_ref().map_or(0, |order| 4 * order.len())
    }
}

/// True when of four neighbouring places at most two hold a code other than the zero point, in every row.
fn two_of_four(shape: &Shape, weight: &Affine<'_>) -> bool {
    let Offsets::Zeros(zeros) = weight.offsets else { return false };
    let (columns, groups) = (shape.in_features, shape.groups());
    weight.bits == 4
        && (0..shape.out_features).into_par_iter().all(|row| {
            let codes = &weight.codes[row * columns..(row + 1) * columns];
            (0..groups).all(|group| {
                let zero = zeros[row * groups + group] as u8;
                let blocks = shape.group_blocks[group]..shape.group_blocks[group + 1];
                blocks.into_iter().all(|block| {
                    let placed = place(shape, codes, block as usize, zero);
                    let fits = |quad: &[u8; 4]| quad.iter().filter(|&&c| c != zero).count() <= 2;
                    placed.as_chunks::<4>().0.iter().all(fits)
                })
            })
        })
}

/// The codes of a row in the places of a block; filling is `zero`.
fn place(shape: &Shape, codes: &[u8], block: usize, zero: u8) -> [u8; BLOCK] {
    let mut placed = [0u8; BLOCK];
    let first = block * BLOCK;
    match &shape.order {
        None => placed.copy_from_slice(&codes[first..first + BLOCK]),
        Some(order) => {
            for (code, &column) in placed.iter_mut().zip(&order[first..first + BLOCK]) {
                *code = codes.get(column as usize).copied().unwrap_or(zero);
            }
        }
    }
    placed
}

fn fill_tile(shape: &Shape, weight: &Affine<'_>, first: usize, to: &mut [u8]) {
    let groups = shape.groups();
    let count = ROWS.min(shape.out_features - first);
    let (block_bytes, columns) = (shape.block_bytes(), shape.in_features);
    let mut at = 0;
    let mut quads = [[0u8; QUAD]; QUADS];
    for group in 0..groups {
        let index = |row: usize| (first + row) * groups + group;
        let zeros: [u8; ROWS] = std::array::from_fn(|row| match weight.offsets {
            Offsets::Zeros(zeros) if row < count => zeros[index(row)] as u8,
            _ => 0,
        });
        for block in shape.group_blocks[group]..shape.group_blocks[group + 1] {
            for row in 0..count {
                let codes = &weight.codes[(first + row) * columns..(first + row + 1) * columns];
                let filling = if shape.sparse { zeros[row] } else { 0 };
                let placed = place(shape, codes, block as usize, filling);
                for (quad, codes) in quads.iter_mut().zip(placed.as_chunks::<4>().0) {
                    quad[4 * row..4 * row + 4].copy_from_slice(codes);
                }
            }
            let to = &mut to[at..at + block_bytes];
            if shape.sparse {
                pack_sparse(zeros, count, &quads, to);
            } else {
                pack_block(shape.bits, &quads, to);
            }
            at += block_bytes;
        }
        let mut put = |bytes: &[u8]| {
            to[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        let mut float = |value: f32| match shape.scale {
            ScaleType::F16 => put(&f16::from_f32(value).to_le_bytes()),
            ScaleType::Bf16 => put(&bf16::from_f32(value).to_le_bytes()),
            ScaleType::F32 => put(&value.to_le_bytes()),
        };
        for row in 0..ROWS {
            float(if row < count { weight.scales[index(row)] } else { 0.0 });
        }
        if let Offsets::Minima(minima) = weight.offsets {
            for row in 0..ROWS {
                float(if row < count { minima[index(row)] } else { 0.0 });
            }
        } else if let Offsets::Zeros(zeros) = weight.offsets {
            for row in 0..ROWS {
                let zero = if row < count { zeros[index(row)] } else { 0 };
                match shape.offset {
                    Offset::Byte => put(&[zero as u8]),
                    Offset::Word => put(&zero.to_le_bytes()),
                    Offset::Middle | Offset::Minimum => {}
                }
            }
        }
    }
}

/// The bytes of a block of quads.
fn pack_block(bits: u8, quads: &[[u8; QUAD]; QUADS], to: &mut [u8]) {
    match bits {
        8 => to.copy_from_slice(quads.as_flattened()),
        4 => {
            for (j, to) in to.chunks_exact_mut(QUAD).enumerate() {
                for (i, to) in to.iter_mut().enumerate() {
                    *to = quads[j][i] | quads[j + 4][i] << 4;
                }
            }
        }
        2 | 3 => {
            let (low, high) = to.split_at_mut(2 * QUAD);
            for (j, to) in low.chunks_exact_mut(QUAD).enumerate() {
                for (i, to) in to.iter_mut().enumerate() {
                    *to = (quads[j][i] & 3)
                        | (quads[j + 2][i] & 3) << 2
                        | (quads[j + 4][i] & 3) << 4
                        | (quads[j + 6][i] & 3) << 6;
                }
            }
            for (i, to) in high.iter_mut().enumerate() {
                *to = (0..QUADS).map(|q| quads[q][i] >> 2 << q).sum();
            }
        }
        _ => unreachable!("layouts store 2, 3, 4 or 8 bits"),
    }
}

/// The bytes of a block of quads of which two in four codes are the zero point of their row; rows from `count` on have no
/// weights.
fn pack_sparse(zeros: [u8; ROWS], count: usize, quads: &[[u8; QUAD]; QUADS], to: &mut [u8]) {
    to.fill(0);
    for (q, quad) in quads.iter().enumerate() {
        let (base, shift) = (q % 4 / 2 * QUAD + q % 2 * 8, q / 4 * 4);
        let mut word = 0u64;
        for row in 0..ROWS {
            let mut codes = [0u8; 4];
            if row < count {
                codes = std::array::from_fn(|c| quad[4 * row + c] ^ zeros[row]);
            }
            // Those that are there, then any others: always two.
            let mut kept: Vec<usize> = (0..4).filter(|&c| codes[c] != 0).collect();
            kept.extend((0..4).filter(|&c| codes[c] == 0));
            kept.truncate(2);
            kept.sort_unstable();
            for (k, &c) in kept.iter().enumerate() {
                to[base + row / 4 * 16 + row % 4 * 2 + k] |= codes[c] << shift;
                word |= 1 << (32 * (row % 2) + 4 * (row / 2) + c);
            }
        }
        to[KEPT + 8 * q..KEPT + 8 * q + 8].copy_from_slice(&word.to_le_bytes());
    }
}

/// Inverse of [`pack_sparse`]; zero points come from behind the blocks of the group.
pub(crate) fn unpack_sparse(zeros: &[f32; ROWS], from: &[u8], quads: &mut [[u8; QUAD]; QUADS]) {
    for (q, quad) in quads.iter_mut().enumerate() {
        let (base, shift) = (q % 4 / 2 * QUAD + q % 2 * 8, q / 4 * 4);
        let word = from[KEPT + 8 * q..KEPT + 8 * q + 8].try_into().expect("eight bytes");
        let word = u64::from_le_bytes(word);
        for row in 0..ROWS {
            let mut next = base + row / 4 * 16 + row % 4 * 2;
            for c in 0..4 {
                let kept = word >> (32 * (row % 2) + 4 * (row / 2) + c) & 1 == 1;
                let code = if kept { from[next] >> shift & 15 } else { 0 };
                next += usize::from(kept);
                quad[4 * row + c] = code ^ zeros[row] as u8;
            }
        }
    }
}

/// Inverse of [`pack_block`].
pub(crate) fn unpack_block(bits: u8, from: &[u8], quads: &mut [[u8; QUAD]; QUADS]) {
    for (q, quad) in quads.iter_mut().enumerate() {
        for (i, code) in quad.iter_mut().enumerate() {
            *code = match bits {
                8 => from[q * QUAD + i],
                4 => from[q % 4 * QUAD + i] >> (q / 4 * 4) & 15,
                _ => {
                    let low = from[q % 2 * QUAD + i] >> (q / 2 * 2) & 3;
                    if bits == 3 { low | (from[2 * QUAD + i] >> q & 1) << 2 } else { low }
                }
            };
        }
    }
}

/// Scales and offsets behind the blocks of a group; offsets are zero points, or minima.
pub(crate) fn read_scales(shape: &Shape, from: &[u8]) -> ([f32; ROWS], [f32; ROWS]) {
    let (scales, offsets) = from.split_at(shape.scale_bytes());
    let float = |from: &[u8], row: usize| match shape.scale {
        ScaleType::F16 => f16::from_le_bytes([from[2 * row], from[2 * row + 1]]).to_f32(),
        ScaleType::Bf16 => bf16::from_le_bytes([from[2 * row], from[2 * row + 1]]).to_f32(),
        ScaleType::F32 => {
            f32::from_le_bytes(from[4 * row..4 * row + 4].try_into().expect("four bytes"))
        }
    };
    let offset = |row: usize| match shape.offset {
        Offset::Middle => shape.middle(),
        Offset::Byte => f32::from(offsets[row]),
        Offset::Word => f32::from(u16::from_le_bytes([offsets[2 * row], offsets[2 * row + 1]])),
        Offset::Minimum => float(offsets, row),
    };
    (std::array::from_fn(|row| float(scales, row)), std::array::from_fn(offset))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases;

    /// Codes, scales and offsets as they stood before they were tiles.
    fn unpack(tiles: &Tiles) -> (Vec<u8>, Vec<f32>, Vec<f32>) {
        let shape = &tiles.shape;
        let (rows, columns, groups) = (shape.out_features, shape.in_features, shape.groups());
        let mut codes = vec![0u8; rows * columns];
        let (mut scales, mut offsets) = (vec![0.0; rows * groups], vec![0.0; rows * groups]);
        for tile in 0..shape.tiles() {
            let mut stream = tiles.tile(tile);
            for group in 0..groups {
                for block in shape.group_blocks[group]..shape.group_blocks[group + 1] {
                    let mut quads = [[0u8; QUAD]; QUADS];
                    let blocks = shape.group_blocks[group + 1] - block;
                    let behind = &stream[blocks as usize * shape.block_bytes()..];
                    if shape.sparse {
                        unpack_sparse(&read_scales(shape, behind).1, stream, &mut quads);
                    } else {
                        unpack_block(shape.bits, stream, &mut quads);
                    }
                    stream = &stream[shape.block_bytes()..];
                    for row in 0..ROWS.min(rows - tile * ROWS) {
                        for within in 0..BLOCK {
                            let place = block as usize * BLOCK + within;
                            let column = shape.order.as_ref().map_or(place, |o| o[place] as usize);
                            if column < columns {
                                codes[(tile * ROWS + row) * columns + column] =
                                    quads[within / 4][4 * row + within % 4];
                            }
                        }
                    }
                }
                let (s, o) = read_scales(shape, stream);
                stream = &stream[shape.scale_bytes() + shape.offset_bytes()..];
                for row in 0..ROWS.min(rows - tile * ROWS) {
                    let at = (tile * ROWS + row) * groups + group;
                    (scales[at], offsets[at]) = (s[row], o[row]);
                }
            }
            assert!(stream.is_empty());
        }
        (codes, scales, offsets)
    }

    #[test]
    fn tiles_hold_exactly_what_was_packed_at_its_own_width() {
        for case in cases::all() {
            let weight = case.weight();
            let tiles = Tiles::new(&weight, true);
            let (codes, scales, offsets) = unpack(&tiles);
            assert_eq!(codes, weight.codes, "{case}");
            let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&scales), bits(&weight.scales), "{case}");
            let zeros: Vec<f32> = weight.zeros.iter().map(|&zero| f32::from(zero)).collect();
            assert_eq!(offsets, zeros, "{case}");
            let shape = &tiles.shape;
            let bits = if case.pruned { 3 } else { usize::from(case.bits) };
            assert_eq!(shape.block_bytes() * 8, bits * ROWS * BLOCK, "{case}");
            assert_eq!(shape.offset == Offset::Middle, case.symmetric, "{case}");
        }
    }

    #[test]
    fn scales_take_the_narrowest_type_and_zero_points_of_256_survive() {
        let case = cases::Case { bits: 8, symmetric: false, ..cases::all()[0] };
        let mut weight = case.weight();
        weight.zeros[1] = 256;
        assert_eq!(Tiles::new(&weight, true).shape.scale, ScaleType::F16);
        assert!(unpack(&Tiles::new(&weight, true)).2[1] > 255.5);
        weight.scales[3] = 2f32.powi(-100);
        assert_eq!(Tiles::new(&weight, true).shape.scale, ScaleType::F32);
        weight.scales.fill(2f32.powi(-100));
        assert_eq!(Tiles::new(&weight, true).shape.scale, ScaleType::Bf16);
    }

    #[test]
    fn minima_stand_where_zero_points_would() {
        let case = cases::all()[0];
        let weight = case.weight();
        let minima: Vec<f32> = weight.scales.iter().map(|scale| scale * 3.0).collect();
        let tiles = Tiles::from_affine(&Affine {
            bits: 4,
            sparse: true,
            out_features: weight.out_features,
            in_features: weight.in_features,
            codes: &weight.codes,
            scales: &weight.scales,
            offsets: Offsets::Minima(&minima),
            group_of: &|column| weight.group_of(column),
        });
        let (codes, scales, offsets) = unpack(&tiles);
        assert_eq!((codes, scales, offsets), (weight.codes, weight.scales, minima));
    }
}
