//! GPTQ (AutoGPTQ, GPTQModel): columns of codes as dense bit streams, rows side by side.
//!
//! | part | dtype | shape | |
//! |---|---|---|---|
//! | `qweight` | I32 | `[in * bits / 32, out]` | codes, packed along `in` |
//! | `qzeros` | I32 | `[groups, out * bits / 32]` | zero points, packed along `out` |
//! | `scales` | F16 | `[groups, out]` | foreign files may hold bf16 or f32 |
//! | `g_idx` | I32 | `[in]` | group of each column, in any order |
//!
//! Both streams are least significant bit first; with 3 bits, 32 values fill 3 words:
//!
//! ```text
//! 4 bits   qweight[w, o]   bits 31..28  27..24  ...  7..4    3..0        of row o, columns
//!                               8w+7    8w+6    ...  8w+1    8w
//! 3 bits   qweight[3w.., o]   word 0: c9 .. c0 in bits 29..0, two low bits of c10 above
//!                             word 1: high bit of c10, c20 .. c11 in bits 30..1, low bit of c21 above
//!                             word 2: two high bits of c21, c31 .. c22 in bits 31..2
//! ```
//!
//! There are two conventions. Version 1 (`checkpoint_format` `gptq`) stores `zero - 1`, so that a zero
//! point of 0 cannot be stored and `max_code + 1` can. Version 2 (`gptq_v2`) stores the zero point.
//! GPTQModel writes a zero point of 0 in version 1 all the same, by subtracting 1 from every field of the
//! word at once, so that it wraps and borrows from its neighbour; most readers take it as `max_code + 1`,
//! as this one does, and `check_packed` reports it.

use attar_tensor::compare::Tolerance;
use attar_tensor::{
    DType, LayoutError, LayoutId, LayoutSpec, LinearSpec, PackedLinear, PartHeader, QuantizedLinear,
};
use rayon::prelude::*;

use super::{
    Layout, bits, check_multiple, check_packed_head, check_quantized, groups, part_g_idx,
    part_scales, part_words, scales_tensor, spec_of, transpose, weights_only, words_tensor,
};

/// Largest normalised mean squared error of a kernel: f32 sums against f64 sums.
pub const MAX_NMSE_GPTQ: f64 = 1e-10;

/// The layouts `gptq` and `gptq_v2`.
#[derive(Debug, Clone, Copy)]
pub struct Gptq {
    id: LayoutId,
    /// What is added to a stored zero point: 1 in version 1.
    zero_offset: u16,
}

const QWEIGHT: &str = "qweight";
const QZEROS: &str = "qzeros";
const SCALES: &str = "scales";
const G_IDX: &str = "g_idx";
/// Rows and columns that fill whole words at every width.
const MULTIPLE: usize = 32;
/// Rows of codes that are packed side by side, one cache line of words.
const TILE: usize = 16;
/// Blocks of 32 columns that one task packs.
const BLOCKS_PER_TASK: usize = 8;

impl Gptq {
    /// Stores `zero - 1`.
    pub const V1: Self = Self { id: LayoutId("gptq"), zero_offset: 1 };
    /// Stores the zero point.
    pub const V2: Self = Self { id: LayoutId("gptq_v2"), zero_offset: 0 };
}

impl LayoutSpec for Gptq {
    fn id(&self) -> LayoutId {
        self.id
    }

    fn parts(&self, linear: &LinearSpec) -> Result<Vec<PartHeader>, LayoutError> {
        let layout = self.id;
        weights_only(layout, linear.scheme)?;
        let width = linear.scheme.bits;
        if !matches!(width, 2 | 3 | 4 | 8) {
            return Err(LayoutError::Bits { layout, bits: width, supported: "2, 3, 4, 8" });
        }
        let (rows, columns) = (linear.out_features, linear.in_features);
        check_multiple(layout, "in_features", columns, MULTIPLE)?;
        check_multiple(layout, "out_features", rows, MULTIPLE)?;
        let groups = groups(linear.scheme, columns)?;
        let part = |suffix, dtype, shape| PartHeader { suffix, dtype, shape };
        Ok(vec![
            part(QWEIGHT, DType::I32, vec![bits::words(columns, width), rows]),
            part(QZEROS, DType::I32, vec![groups, bits::words(rows, width)]),
            part(SCALES, self.scale_dtype(linear.source_dtype), vec![groups, rows]),
            part(G_IDX, DType::I32, vec![columns]),
        ])
    }

    fn scale_dtype(&self, _source: DType) -> DType {
        DType::F16
    }

    fn zero_min(&self) -> u8 {
        self.zero_offset as u8
    }
}

impl Layout for Gptq {
    fn pack(&self, weight: &QuantizedLinear, source: DType) -> Result<PackedLinear, LayoutError> {
        self.parts(&spec_of(weight, source))?;
        let (scheme, width) = (weight.scheme, weight.scheme.bits);
        let offset = self.zero_offset;
        let groups =
            check_quantized(self.id, weight, offset..=u16::from(scheme.max_code()) + offset)?;
        let (rows, columns) = (weight.out_features, weight.in_features);

        let mut qweight = vec![0u32; bits::words(columns, width) * rows];
        let block_words = usize::from(width) * rows;
        qweight.par_chunks_mut((block_words * BLOCKS_PER_TASK).max(1)).enumerate().for_each(
            |(task, out)| {
                for tile in (0..rows).step_by(TILE) {
                    for (i, out) in out.chunks_mut(block_words).enumerate() {
                        let start = (task * BLOCKS_PER_TASK + i) * bits::CHUNK;
                        for row in tile..rows.min(tile + TILE) {
                            let codes = &weight.codes[row * columns + start..][..bits::CHUNK];
                            let codes = codes.try_into().expect("a chunk was cut");
                            let words = bits::pack32(codes, width);
                            for (j, &word) in words[..usize::from(width)].iter().enumerate() {
                                out[j * rows + row] = word;
                            }
                        }
                    }
                }
            },
        );

        let row_words = bits::words(rows, width);
        let mut qzeros = vec![0u32; groups * row_words];
        for (group, out) in qzeros.chunks_mut(row_words.max(1)).enumerate() {
            let zeros: Vec<u8> =
                (0..rows).map(|row| (weight.zeros[row * groups + group] - offset) as u8).collect();
            bits::pack_row(&zeros, width, out);
        }
        let scales = transpose(&weight.scales, rows, groups);
        let scales = scales_tensor(self.id, DType::F16, vec![groups, rows], &scales, |at| {
            (at % rows, at / rows)
        })?;
        let g_idx: Vec<u32> = (0..columns).map(|column| weight.group_of(column) as u32).collect();
        Ok(PackedLinear {
            layout: self.id,
            scheme,
            out_features: rows,
            in_features: columns,
            parts: vec![
                (QWEIGHT, words_tensor(vec![bits::words(columns, width), rows], &qweight)),
                (QZEROS, words_tensor(vec![groups, row_words], &qzeros)),
                (SCALES, scales),
                (G_IDX, words_tensor(vec![columns], &g_idx)),
            ],
        })
    }

    fn unpack(&self, packed: &PackedLinear) -> Result<QuantizedLinear, LayoutError> {
        let groups = check_packed_head(self, packed)?;
        let (rows, columns) = (packed.out_features, packed.in_features);
        let width = packed.scheme.bits;
        let qweight = part_words(packed, QWEIGHT, &[bits::words(columns, width), rows])?;
        let row_words = bits::words(rows, width);
        let qzeros = part_words(packed, QZEROS, &[groups, row_words])?;
        let scales = part_scales(packed, SCALES, &[groups, rows])?;
        let g_idx = part_g_idx(packed, G_IDX, groups)?;

        let mut codes = vec![0u8; rows * columns];
        codes.par_chunks_mut((columns * TILE).max(1)).enumerate().for_each(|(tile, codes)| {
            let mut words = [0u32; 8];
            for block in 0..columns / bits::CHUNK {
                let from = &qweight[block * usize::from(width) * rows..];
                for (i, codes) in codes.chunks_mut(columns).enumerate() {
                    for (j, word) in words[..usize::from(width)].iter_mut().enumerate() {
                        *word = from[j * rows + tile * TILE + i];
                    }
                    codes[block * bits::CHUNK..][..bits::CHUNK]
                        .copy_from_slice(&bits::unpack32(&words, width));
                }
            }
        });

        let mut by_group = vec![0u8; rows];
        let mut zeros = vec![0u16; rows * groups];
        for (group, words) in qzeros.chunks(row_words.max(1)).enumerate() {
            bits::unpack_row(words, width, &mut by_group);
            for (row, &stored) in by_group.iter().enumerate() {
                zeros[row * groups + group] = u16::from(stored) + self.zero_offset;
            }
        }
        Ok(QuantizedLinear {
            scheme: packed.scheme,
            out_features: rows,
            in_features: columns,
            codes,
            scales: transpose(&scales, groups, rows),
            zeros,
            g_idx,
        })
    }

    fn tolerance(&self) -> Tolerance {
        Tolerance { max_nmse: MAX_NMSE_GPTQ }
    }
}

#[cfg(test)]
mod tests {
    use attar_tensor::Tensor;

    use super::*;
    use crate::testing::{quantized, scheme, shuffle_groups};

    #[test]
    fn the_two_versions_differ_by_one_in_every_zero_point() {
        let weight = quantized(scheme(4, 32, true), 32, 32, 3);
        let words = |layout: Gptq| {
            layout.pack(&weight, DType::F16).unwrap().part(QZEROS).unwrap().view().to_i64().unwrap()
        };
        assert!(words(Gptq::V1).iter().all(|&word| word == 0x7777_7777));
        assert!(words(Gptq::V2).iter().all(|&word| word as u32 == 0x8888_8888));
    }

    #[test]
    fn version_one_stores_the_zero_point_beyond_the_largest_code() {
        let mut weight = quantized(scheme(4, 32, false), 32, 32, 3);
        weight.zeros[0] = 16;
        let packed = Gptq::V1.pack(&weight, DType::F16).unwrap();
        assert_eq!(Gptq::V1.unpack(&packed).unwrap(), weight);
        assert!(matches!(
            Gptq::V2.pack(&weight, DType::F16),
            Err(LayoutError::Zero { zero: 16, max: 15, .. })
        ));
    }

    #[test]
    fn foreign_files_with_bf16_scales_wide_g_idx_or_none_are_read() {
        let mut scheme = scheme(4, 32, false);
        scheme.scale_grid = attar_tensor::ScaleGrid::F16AndBf16;
        let mut weight = quantized(scheme, 32, 96, 3);
        shuffle_groups(&mut weight, 9);
        let mut packed = Gptq::V1.pack(&weight, DType::F16).unwrap();
        let scales = packed.part(SCALES).unwrap().view().to_f32().unwrap();
        packed.parts[2].1 = Tensor::from_f32(DType::BF16, vec![3, 32], &scales).unwrap();
        let g_idx = packed.part(G_IDX).unwrap().view().to_i64().unwrap();
        packed.parts[3].1 = Tensor::from_i64(vec![96], &g_idx).unwrap();
        assert_eq!(Gptq::V1.unpack(&packed).unwrap(), weight);
        packed.parts.pop();
        assert_eq!(Gptq::V1.unpack(&packed).unwrap().g_idx, None);
    }

    #[test]
    fn both_numbers_of_a_bad_shape_are_said() {
        let error = Gptq::V1.pack(&quantized(scheme(4, 0, true), 32, 40, 3), DType::F16);
        let text = error.unwrap_err().to_string();
        assert!(
            text.contains("in_features") && text.contains("40") && text.contains("32"),
            "{text}"
        );
        assert!(Gptq::V1.pack(&quantized(scheme(4, 0, true), 40, 32, 3), DType::F16).is_err());
    }

    #[test]
    fn a_column_in_an_absent_group_is_refused() {
        let mut packed =
            Gptq::V1.pack(&quantized(scheme(4, 32, true), 32, 64, 3), DType::F16).unwrap();
        for bad in [2, -1] {
            let mut g_idx = vec![0; 64];
            g_idx[5] = bad;
            packed.parts[3].1 = Tensor::from_i32(vec![64], &g_idx).unwrap();
            assert!(matches!(
                Gptq::V1.unpack(&packed),
                Err(LayoutError::GroupIndex { column: 5, groups: 2, .. })
            ));
        }
    }
}
