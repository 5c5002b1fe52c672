//! compressed-tensors `pack-quantized`: rows of codes as dense bit streams.
//!
//! | part | dtype | shape | |
//! |---|---|---|---|
//! | `weight_packed` | I32 | `[out, ceil(in * bits / 32)]` | codes, packed along `in` |
//! | `weight_zero_point` | I32 | `[ceil(out * bits / 32), groups]` | asymmetric only; packed along `out` |
//! | `weight_scale` | source dtype | `[out, groups]` | f32, f16 or bf16 |
//! | `weight_shape` | I64 | `[2]` | `out, in` |
//! | `weight_g_idx` | I32 | `[in]` | only when columns are not in group order |
//!
//! The format's integers are signed; stored is `signed + 2^(bits-1)`, for codes and zero points alike,
//! which are exactly the unsigned codes and zero points of a `QuantizedLinear`.
//! Each row is a stream of its own, least significant bit first, the last word filled up with zeros:
//!
//! ```text
//! 4 bits   word 0                               3 bits   word 0            word 1            word 2
//!          31..28 27..24  ...  7..4   3..0               31 30 29..27 .. 2..0   31 30..28 .. 0   31..29 .. 1 0
//!          c7     c6      ...  c1     c0                 c10lo c9     .. c0     c21lo c20 .. c10hi c31 .. c21hi
//! ```

use attar_tensor::compare::Tolerance;
use attar_tensor::{
    DType, LayoutError, LayoutId, LayoutSpec, LinearSpec, PackedLinear, PartHeader,
    QuantizedLinear, Tensor,
};
use rayon::prelude::*;

use super::{
    Layout, bits, check_packed_head, check_quantized, groups, part, part_g_idx, part_scales,
    part_words, scales_tensor, spec_of, weights_only, words_tensor,
};

/// Largest normalised mean squared error of a kernel: f32 sums against f64 sums.
pub const MAX_NMSE_CT_PACKED: f64 = 1e-10;

/// The layout `compressed-tensors`.
#[derive(Debug, Clone, Copy)]
pub struct CtPacked;

const ID: LayoutId = LayoutId("compressed-tensors");
const PACKED: &str = "weight_packed";
const ZERO_POINT: &str = "weight_zero_point";
const SCALE: &str = "weight_scale";
const SHAPE: &str = "weight_shape";
const G_IDX: &str = "weight_g_idx";

impl LayoutSpec for CtPacked {
    fn id(&self) -> LayoutId {
        ID
    }

    fn parts(&self, linear: &LinearSpec) -> Result<Vec<PartHeader>, LayoutError> {
        let scheme = linear.scheme;
        weights_only(ID, scheme)?;
        if !matches!(scheme.bits, 2 | 3 | 4 | 8) {
            return Err(LayoutError::Bits {
                layout: ID,
                bits: scheme.bits,
                supported: "2, 3, 4, 8",
            });
        }
        let scale = self.scale_dtype(linear.source_dtype);
        if scale != linear.source_dtype {
            return Err(LayoutError::ScaleDtype { layout: ID, dtype: linear.source_dtype });
        }
        let groups = groups(scheme, linear.in_features)?;
        let (rows, columns) = (linear.out_features, linear.in_features);
        let words = bits::words(columns, scheme.bits);
        let mut parts =
            vec![PartHeader { suffix: PACKED, dtype: DType::I32, shape: vec![rows, words] }];
        if !scheme.symmetric {
            let shape = vec![bits::words(rows, scheme.bits), groups];
            parts.push(PartHeader { suffix: ZERO_POINT, dtype: DType::I32, shape });
        }
        parts.push(PartHeader { suffix: SCALE, dtype: scale, shape: vec![rows, groups] });
        parts.push(PartHeader { suffix: SHAPE, dtype: DType::I64, shape: vec![2] });
        Ok(parts)
    }

    fn takes_factors(&self) -> bool {
        true
    }

    fn scale_dtype(&self, source: DType) -> DType {
        match source {
            DType::F32 | DType::F16 => source,
            _ => DType::BF16,
        }
    }
}

impl Layout for CtPacked {
    fn pack(&self, weight: &QuantizedLinear, source: DType) -> Result<PackedLinear, LayoutError> {
        let headers = self.parts(&spec_of(weight, source))?;
        let width = weight.scheme.bits;
        let groups = check_quantized(ID, weight, 0..=u16::from(weight.scheme.max_code()))?;
        let (rows, columns) = (weight.out_features, weight.in_features);
        let mut parts = Vec::with_capacity(5);
        for PartHeader { suffix, dtype, shape } in headers {
            let tensor = match suffix {
                PACKED => {
                    let mut packed = vec![0u32; shape[0] * shape[1]];
                    packed
                        .par_chunks_mut(shape[1].max(1))
                        .zip(weight.codes.par_chunks(columns.max(1)))
                        .with_min_len(16)
                        .for_each(|(out, codes)| bits::pack_row(codes, width, out));
                    words_tensor(shape, &packed)
                }
                ZERO_POINT => {
                    let mut packed = vec![0u32; shape[0] * groups];
                    let mut stream = vec![0u32; shape[0]];
                    for group in 0..groups {
                        let zeros: Vec<u8> =
                            (0..rows).map(|row| weight.zeros[row * groups + group] as u8).collect();
                        bits::pack_row(&zeros, width, &mut stream);
                        for (word, &value) in stream.iter().enumerate() {
                            packed[word * groups + group] = value;
                        }
                    }
                    words_tensor(shape, &packed)
                }
                SCALE => scales_tensor(ID, dtype, shape, &weight.scales, |at| {
                    (at / groups, at % groups)
                })?,
                _ => Tensor::from_i64(shape, &[rows as i64, columns as i64])
                    .expect("the shape part holds two numbers"),
            };
            parts.push((suffix, tensor));
        }
        if let Some(g_idx) = &weight.g_idx {
            let tensor = words_tensor(vec![columns], g_idx);
            parts.push((G_IDX, tensor));
        }
        Ok(PackedLinear {
            layout: ID,
            scheme: weight.scheme,
            out_features: rows,
            in_features: columns,
            parts,
        })
    }

    fn unpack(&self, packed: &PackedLinear) -> Result<QuantizedLinear, LayoutError> {
        let groups = check_packed_head(self, packed)?;
        let (rows, columns) = (packed.out_features, packed.in_features);
        let (scheme, width) = (packed.scheme, packed.scheme.bits);
        let words = bits::words(columns, width);
        let stored = part_words(packed, PACKED, &[rows, words])?;
        let mut codes = vec![0u8; rows * columns];
        codes
            .par_chunks_mut(columns.max(1))
            .zip(stored.par_chunks(words.max(1)))
            .with_min_len(16)
            .for_each(|(codes, words)| bits::unpack_row(words, width, codes));
        let zeros = if scheme.symmetric {
            vec![u16::from(scheme.mid_code()); rows * groups]
        } else {
            let words = bits::words(rows, width);
            let stored = part_words(packed, ZERO_POINT, &[words, groups])?;
            let mut zeros = vec![0u16; rows * groups];
            let mut column = vec![0u8; rows];
            for group in 0..groups {
                let stream: Vec<u32> =
                    (0..words).map(|word| stored[word * groups + group]).collect();
                bits::unpack_row(&stream, width, &mut column);
                for (row, &zero) in column.iter().enumerate() {
                    zeros[row * groups + group] = u16::from(zero);
                }
            }
            zeros
        };
        let scales = part_scales(packed, SCALE, &[rows, groups])?;
        let shape = part(packed, SHAPE, &[DType::I64, DType::I32], &[2])?;
        let stated = shape.view().to_i64().expect("the dtype was checked");
        if stated != [rows as i64, columns as i64] {
            return Err(LayoutError::Part {
                layout: ID,
                suffix: SHAPE,
                dtype: shape.dtype(),
                shape: stated.iter().map(|&dim| usize::try_from(dim).unwrap_or(0)).collect(),
                expected: format!("contents [{rows}, {columns}]"),
            });
        }
        let g_idx = part_g_idx(packed, G_IDX, groups)?;
        Ok(QuantizedLinear {
            scheme,
            out_features: rows,
            in_features: columns,
            codes,
            scales,
            zeros,
            g_idx,
        })
    }

    fn tolerance(&self) -> Tolerance {
        Tolerance { max_nmse: MAX_NMSE_CT_PACKED }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{quantized, scheme};

    #[test]
    fn shapes_that_fill_no_word() {
        for bits in [2, 3, 4, 8] {
            let weight = quantized(scheme(bits, 5, false), 7, 45, 1);
            let packed = CtPacked.pack(&weight, DType::F32).unwrap();
            assert_eq!(CtPacked.unpack(&packed).unwrap(), weight);
        }
    }

    #[test]
    fn a_lying_shape_is_refused() {
        let weight = quantized(scheme(4, 32, true), 4, 32, 1);
        let mut packed = CtPacked.pack(&weight, DType::F32).unwrap();
        let at = packed.parts.iter().position(|(name, _)| *name == SHAPE).unwrap();
        packed.parts[at].1 = Tensor::from_i64(vec![2], &[4, 31]).unwrap();
        assert!(matches!(CtPacked.unpack(&packed), Err(LayoutError::Part { suffix: SHAPE, .. })));
    }

    #[test]
    fn scales_take_only_float_sources() {
        let weight = quantized(scheme(4, 32, true), 4, 32, 1);
        assert!(matches!(
            CtPacked.pack(&weight, DType::F8E4M3),
            Err(LayoutError::ScaleDtype { dtype: DType::F8E4M3, .. })
        ));
    }
}
