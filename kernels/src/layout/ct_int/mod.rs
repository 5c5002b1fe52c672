//! compressed-tensors `int-quantized`: W8A8, a signed byte for each weight.
//!
//! | part | dtype | shape | |
//! |---|---|---|---|
//! | `weight` | I8 | `[out, in]` | `code - 128`, row-major |
//! | `weight_scale` | source dtype | `[out, 1]` | f32, f16 or bf16 |
//!
//! ```text
//! byte     row * in + column
//! value    w = weight * weight_scale[row], weight = code - 128 in -128..=127
//! ```
//!
//! Inputs are rounded to signed bytes with one scale per token while the model runs
//! ([`ActivationScheme::Int8PerToken`]): `y = (q · weight) · scale_of_token · weight_scale`, the sum in
//! integers. The format stores other things under the same name (weights alone, zero points, static
//! scales of inputs, one scale for a tensor); vLLM takes such a scheme for another one or refuses it, so they
//! are refused here.

use attar_tensor::compare::Tolerance;
use attar_tensor::{
    ActivationScheme, DType, Granularity, LayoutError, LayoutId, LayoutSpec, LinearSpec,
    PackedLinear, PartHeader, QuantizedLinear, Tensor,
};

use super::{
    Layout, check_packed_head, check_quantized, part, part_scales, scales_tensor, spec_of,
};

/// Largest normalised mean squared error of a kernel: f32 sums against f64 sums.
pub const MAX_NMSE_CT_INT: f64 = 1e-10;

/// The layout `compressed-tensors-int`.
#[derive(Debug, Clone, Copy)]
pub struct CtInt;

const ID: LayoutId = LayoutId("compressed-tensors-int");
const WEIGHT: &str = "weight";
const SCALE: &str = "weight_scale";
/// A code of 0 is stored as this.
const LEAST: u8 = 0x80;

impl LayoutSpec for CtInt {
    fn id(&self) -> LayoutId {
        ID
    }

    fn parts(&self, linear: &LinearSpec) -> Result<Vec<PartHeader>, LayoutError> {
        let scheme = linear.scheme;
        let refuse =
            |reason| Err(LayoutError::Scheme { layout: ID, scheme: scheme.label(), reason });
        if scheme.activations != ActivationScheme::Int8PerToken {
            return refuse(
                "its runtimes round activations; give the scheme `activations = \"int8\"`, or use layout \
                 compressed-tensors",
            );
        }
        if scheme.bits != 8 {
            return Err(LayoutError::Bits { layout: ID, bits: scheme.bits, supported: "8" });
        }
        if scheme.granularity != Granularity::Channel {
            return refuse(
                "a product with one scale per token has one scale per row; give `group_size = -1`",
            );
        }
        if !scheme.symmetric {
            return refuse("its products have no zero points; give `symmetric = true`");
        }
        let scale = self.scale_dtype(linear.source_dtype);
        if scale != linear.source_dtype {
            return Err(LayoutError::ScaleDtype { layout: ID, dtype: linear.source_dtype });
        }
        let (rows, columns) = (linear.out_features, linear.in_features);
        Ok(vec![
            PartHeader { suffix: WEIGHT, dtype: DType::I8, shape: vec![rows, columns] },
            PartHeader { suffix: SCALE, dtype: scale, shape: vec![rows, 1] },
        ])
    }

    fn scale_dtype(&self, source: DType) -> DType {
        match source {
            DType::F32 | DType::F16 => source,
            _ => DType::BF16,
        }
    }
}

impl Layout for CtInt {
    fn pack(&self, weight: &QuantizedLinear, source: DType) -> Result<PackedLinear, LayoutError> {
        let headers = self.parts(&spec_of(weight, source))?;
        check_quantized(ID, weight, 0..=u16::from(weight.scheme.max_code()))?;
        if weight.g_idx.is_some() {
            return Err(LayoutError::ColumnOrder { layout: ID });
        }
        let (rows, columns) = (weight.out_features, weight.in_features);
        let bytes = weight.codes.iter().map(|code| code ^ LEAST).collect();
        let tensor = Tensor::new(DType::I8, vec![rows, columns], bytes);
        let scale = &headers[1];
        let scales =
            scales_tensor(ID, scale.dtype, scale.shape.clone(), &weight.scales, |row| (row, 0))?;
        Ok(PackedLinear {
            layout: ID,
            scheme: weight.scheme,
            out_features: rows,
            in_features: columns,
            parts: vec![(WEIGHT, tensor.expect("codes were counted")), (SCALE, scales)],
        })
    }

    fn unpack(&self, packed: &PackedLinear) -> Result<QuantizedLinear, LayoutError> {
        check_packed_head(self, packed)?;
        let (rows, columns) = (packed.out_features, packed.in_features);
        let stored = part(packed, WEIGHT, &[DType::I8], &[rows, columns])?;
        Ok(QuantizedLinear {
            scheme: packed.scheme,
            out_features: rows,
            in_features: columns,
            codes: stored.bytes().iter().map(|byte| byte ^ LEAST).collect(),
            scales: part_scales(packed, SCALE, &[rows, 1])?,
            zeros: vec![u16::from(packed.scheme.mid_code()); rows],
            g_idx: None,
        })
    }

    fn tolerance(&self) -> Tolerance {
        Tolerance { max_nmse: MAX_NMSE_CT_INT }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{quantized, scheme};
    use attar_tensor::QuantScheme;

    fn w8a8() -> QuantScheme {
        QuantScheme { activations: ActivationScheme::Int8PerToken, ..scheme(8, 0, true) }
    }

    #[test]
    fn bytes_are_signed_and_come_back() {
        for (rows, columns) in [(7, 45), (1, 1), (64, 128)] {
            let mut weight = quantized(w8a8(), rows, columns, 3);
            weight.codes[0] = 0;
            let packed = CtInt.pack(&weight, DType::F32).unwrap();
            assert_eq!(packed.part(WEIGHT).unwrap().view().to_i64().unwrap()[0], -128);
            assert_eq!(CtInt.unpack(&packed).unwrap(), weight);
            assert_eq!(CtInt.parts_bytes(&spec_of(&weight, DType::F32)).unwrap(), packed.bytes());
        }
    }

    #[test]
    fn other_schemes_are_refused_and_told_why() {
        let refused = |scheme: QuantScheme, part: &str| {
            let error = CtInt.pack(&quantized(scheme, 4, 64, 1), DType::F32).unwrap_err();
            assert!(error.to_string().contains(part), "{error}");
        };
        let float = ActivationScheme::Float;
        refused(QuantScheme { activations: float, ..w8a8() }, "activations = \"int8\"");
        refused(QuantScheme { bits: 4, ..w8a8() }, "stores 8 bits, not 4");
        refused(QuantScheme { granularity: Granularity::Group(32), ..w8a8() }, "group_size = -1");
        refused(QuantScheme { symmetric: false, ..w8a8() }, "symmetric = true");
        let mut ordered = quantized(w8a8(), 4, 64, 1);
        ordered.g_idx = Some(vec![0; 64]);
        assert!(matches!(CtInt.pack(&ordered, DType::F32), Err(LayoutError::ColumnOrder { .. })));
        assert!(matches!(
            CtInt.pack(&quantized(w8a8(), 4, 64, 1), DType::F8E4M3),
            Err(LayoutError::ScaleDtype { .. })
        ));
    }

    #[test]
    fn lying_bytes_are_refused() {
        let good = CtInt.pack(&quantized(w8a8(), 4, 64, 1), DType::F16).unwrap();
        for at in 0..2 {
            let mut missing = good.clone();
            let (suffix, _) = missing.parts.remove(at);
            assert_eq!(CtInt.unpack(&missing), Err(LayoutError::Missing { layout: ID, suffix }));
            let mut wrong = good.clone();
            wrong.parts[at].1 = Tensor::from_i32(vec![1], &[0]).unwrap();
            assert!(matches!(CtInt.unpack(&wrong), Err(LayoutError::Part { .. })));
        }
    }

    #[test]
    fn layouts_of_weights_alone_refuse_activations() {
        let weight = quantized(w8a8(), 32, 64, 1);
        for layout in crate::LAYOUTS.iter().filter(|layout| layout.id() != ID) {
            let error = layout.parts(&spec_of(&weight, DType::F16)).unwrap_err().to_string();
            assert!(error.contains("compressed-tensors-int"), "{}: {error}", layout.id());
        }
    }
}
