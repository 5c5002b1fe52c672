//! AutoAWQ GEMM: 4-bit codes of eight neighbouring rows in one word, in an interleaved order.
//!
//! | part | dtype | shape | |
//! |---|---|---|---|
//! | `qweight` | I32 | `[in, out / 8]` | codes, packed along `out` |
//! | `qzeros` | I32 | `[groups, out / 8]` | zero points, packed the same way |
//! | `scales` | F16 | `[groups, out]` | |
//!
//! ```text
//! qweight[i, w]   bits 31..28  27..24  23..20  19..16  15..12  11..8   7..4    3..0
//!                 row    8w+7    8w+5    8w+3    8w+1    8w+6    8w+4    8w+2    8w
//! ```
//!
//! There is no place for an order of columns, and no width but 4.

use attar_tensor::compare::Tolerance;
use attar_tensor::{
    DType, LayoutError, LayoutId, LayoutSpec, LinearSpec, PackedLinear, PartHeader, QuantizedLinear,
};
use rayon::prelude::*;

use super::{
    Layout, check_multiple, check_packed_head, check_quantized, groups, part_scales, part_words,
    scales_tensor, spec_of, transpose, weights_only, words_tensor,
};

/// Largest normalised mean squared error of a kernel: f32 sums against f64 sums.
pub const MAX_NMSE_AWQ: f64 = 1e-10;

/// The layout `awq`.
#[derive(Debug, Clone, Copy)]
pub struct Awq;

const ID: LayoutId = LayoutId("awq");
const QWEIGHT: &str = "qweight";
const QZEROS: &str = "qzeros";
const SCALES: &str = "scales";
/// Values in a word.
const PER_WORD: usize = 8;
/// `ORDER[i]` is the row, of eight, whose value sits in nibble `i`.
const ORDER: [usize; PER_WORD] = [0, 2, 4, 6, 1, 3, 5, 7];
/// Columns that one task packs.
const COLUMNS_PER_TASK: usize = 64;
/// Rows that one task packs at a time: a cache line of words.
const ROW_TILE: usize = 128;

impl LayoutSpec for Awq {
    fn id(&self) -> LayoutId {
        ID
    }

    fn parts(&self, linear: &LinearSpec) -> Result<Vec<PartHeader>, LayoutError> {
        weights_only(ID, linear.scheme)?;
        if linear.scheme.bits != 4 {
            let bits = linear.scheme.bits;
            return Err(LayoutError::Bits { layout: ID, bits, supported: "only 4" });
        }
        let (rows, columns) = (linear.out_features, linear.in_features);
        check_multiple(ID, "out_features", rows, PER_WORD)?;
        let groups = groups(linear.scheme, columns)?;
        let part = |suffix, dtype, shape| PartHeader { suffix, dtype, shape };
        Ok(vec![
            part(QWEIGHT, DType::I32, vec![columns, rows / PER_WORD]),
            part(QZEROS, DType::I32, vec![groups, rows / PER_WORD]),
            part(SCALES, DType::F16, vec![groups, rows]),
        ])
    }

    fn scale_dtype(&self, _source: DType) -> DType {
        DType::F16
    }
}

impl Layout for Awq {
    fn pack(&self, weight: &QuantizedLinear, source: DType) -> Result<PackedLinear, LayoutError> {
        self.parts(&spec_of(weight, source))?;
        if weight.g_idx.is_some() {
            return Err(LayoutError::ColumnOrder { layout: ID });
        }
        let groups = check_quantized(ID, weight, 0..=u16::from(weight.scheme.max_code()))?;
        let (rows, columns) = (weight.out_features, weight.in_features);
        let zeros: Vec<u8> = weight.zeros.iter().map(|&zero| zero as u8).collect();
        let scales = transpose(&weight.scales, rows, groups);
        let scales = scales_tensor(ID, DType::F16, vec![groups, rows], &scales, |at| {
            (at % rows, at / rows)
        })?;
        let words = rows / PER_WORD;
        Ok(PackedLinear {
            layout: ID,
            scheme: weight.scheme,
            out_features: rows,
            in_features: columns,
            parts: vec![
                (
                    QWEIGHT,
                    words_tensor(vec![columns, words], &interleave(&weight.codes, rows, columns)),
                ),
                (QZEROS, words_tensor(vec![groups, words], &interleave(&zeros, rows, groups))),
                (SCALES, scales),
            ],
        })
    }

    fn unpack(&self, packed: &PackedLinear) -> Result<QuantizedLinear, LayoutError> {
        let groups = check_packed_head(self, packed)?;
        let (rows, columns) = (packed.out_features, packed.in_features);
        let words = rows / PER_WORD;
        let qweight = part_words(packed, QWEIGHT, &[columns, words])?;
        let qzeros = part_words(packed, QZEROS, &[groups, words])?;
        let scales = part_scales(packed, SCALES, &[groups, rows])?;
        let zeros = deinterleave(&qzeros, rows, groups);
        Ok(QuantizedLinear {
            scheme: packed.scheme,
            out_features: rows,
            in_features: columns,
            codes: deinterleave(&qweight, rows, columns),
            scales: transpose(&scales, groups, rows),
            zeros: zeros.into_iter().map(u16::from).collect(),
            g_idx: None,
        })
    }

    fn tolerance(&self) -> Tolerance {
        Tolerance { max_nmse: MAX_NMSE_AWQ }
    }
}

/// `[rows, columns]` 4-bit values to words `[columns, rows / 8]`.
fn interleave(values: &[u8], rows: usize, columns: usize) -> Vec<u32> {
    let words = rows / PER_WORD;
    let mut out = vec![0u32; columns * words];
    out.par_chunks_mut((words * COLUMNS_PER_TASK).max(1)).enumerate().for_each(|(task, out)| {
        for tile in (0..words).step_by(ROW_TILE / PER_WORD) {
            for (i, out) in out.chunks_mut(words).enumerate() {
                let column = task * COLUMNS_PER_TASK + i;
                let end = words.min(tile + ROW_TILE / PER_WORD);
                for (word, out) in out[tile..end].iter_mut().enumerate() {
                    let row = (tile + word) * PER_WORD;
                    for (nibble, &which) in ORDER.iter().enumerate() {
                        let value = u32::from(values[(row + which) * columns + column]);
                        *out |= value << (4 * nibble);
                    }
                }
            }
        }
    });
    out
}

/// Inverse of [`interleave`].
fn deinterleave(words: &[u32], rows: usize, columns: usize) -> Vec<u8> {
    let row_words = rows / PER_WORD;
    let mut out = vec![0u8; rows * columns];
    out.par_chunks_mut((PER_WORD * columns).max(1)).enumerate().for_each(|(word, out)| {
        for column in 0..columns {
            let value = words[column * row_words + word];
            for (nibble, &which) in ORDER.iter().enumerate() {
                out[which * columns + column] = (value >> (4 * nibble)) as u8 & 15;
            }
        }
    });
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{quantized, scheme, shuffle_groups};

    #[test]
    fn nibbles_hold_even_rows_first() {
        let values: Vec<u8> = (0..8).collect();
        assert_eq!(interleave(&values, 8, 1), [0x7531_6420]);
    }

    #[test]
    fn only_four_bits_and_no_column_order() {
        let three = quantized(scheme(3, 32, false), 8, 64, 3);
        let error = Awq.pack(&three, DType::F16).unwrap_err();
        assert_eq!(
            error.to_string(),
            "layout awq stores only 4 bits, not 3; choose another width or layout"
        );
        let mut ordered = quantized(scheme(4, 32, false), 8, 64, 3);
        shuffle_groups(&mut ordered, 1);
        assert_eq!(Awq.pack(&ordered, DType::F16), Err(LayoutError::ColumnOrder { layout: ID }));
    }

    #[test]
    fn group_that_does_not_divide_names_both_numbers() {
        let mut weight = quantized(scheme(4, 32, false), 8, 64, 3);
        weight.in_features = 80;
        let error = Awq.pack(&weight, DType::F16).unwrap_err();
        assert_eq!(error, LayoutError::Group { group_size: 32, in_features: 80 });
    }
}
