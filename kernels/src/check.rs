//! What can be wrong with packed bytes although they have the right shapes.

use attar_tensor::{BlockQuantized, LayoutError, PackedLinear};

use crate::layout;

/// Something that no quantizer writes.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Defect {
    /// Parts missing or misshapen, an order of columns that names an absent group.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Scales that are NaN or infinite.
    #[error("{count} scales are not finite, the first in row {row}, group {group}")]
    ScaleNotFinite {
        /// How many.
        count: usize,
        /// Row of the first.
        row: usize,
        /// Group of the first.
        group: usize,
    },
    /// Scales that are zero, so that their weights are lost.
    #[error("{count} scales are zero, the first in row {row}, group {group}")]
    ScaleZero {
        /// How many.
        count: usize,
        /// Row of the first.
        row: usize,
        /// Group of the first.
        group: usize,
    },
    /// Zero points beyond the largest code: the group holds no zero.
    #[error(
        "{count} zero points are beyond the largest code, the first ({zero}) in row {row}, group {group}"
    )]
    ZeroOutOfRange {
        /// How many.
        count: usize,
        /// Value of the first.
        zero: u16,
        /// Row of the first.
        row: usize,
        /// Group of the first.
        group: usize,
    },
    /// The scheme says symmetric, but zero points are not in the middle.
    #[error(
        "the scheme is symmetric but {count} zero points are not {mid}, the first in row {row}, group {group}"
    )]
    ZeroNotMiddle {
        /// How many.
        count: usize,
        /// `2^(bits-1)`.
        mid: u8,
        /// Row of the first.
        row: usize,
        /// Group of the first.
        group: usize,
    },
}

/// Everything wrong with these bytes; empty when nothing is.
pub fn check_packed(packed: &PackedLinear) -> Vec<Defect> {
    let layout = layout::layout_of(packed);
    if let Ok(layout) = layout
        && layout.block_type().is_some()
    {
        return match layout.unpack_blocks(packed) {
            Ok(weight) => check_blocks(&weight),
            Err(error) => vec![Defect::Layout(error)],
        };
    }
    let weight = match layout::unpack(packed) {
        Ok(weight) => weight,
        Err(error) => return vec![Defect::Layout(error)],
    };
    let groups = weight.groups();
    let place = |at: usize| (at / groups, at % groups);
    let mut defects = Vec::new();
    if let Some((count, at)) = find(&weight.scales, |scale| !scale.is_finite()) {
        let (row, group) = place(at);
        defects.push(Defect::ScaleNotFinite { count, row, group });
    }
    if let Some((count, at)) = find(&weight.scales, |&scale| scale == 0.0) {
        let (row, group) = place(at);
        defects.push(Defect::ScaleZero { count, row, group });
    }
    let max = u16::from(weight.scheme.max_code());
    if let Some((count, at)) = find(&weight.zeros, |&zero| zero > max) {
        let (row, group) = place(at);
        defects.push(Defect::ZeroOutOfRange { count, zero: weight.zeros[at], row, group });
    }
    let mid = weight.scheme.mid_code();
    if weight.scheme.symmetric
        && let Some((count, at)) = find(&weight.zeros, |&zero| zero != u16::from(mid))
    {
        let (row, group) = place(at);
        defects.push(Defect::ZeroNotMiddle { count, mid, row, group });
    }
    defects
}

/// Scales and minima of blocks. A scale of zero is what ggml itself writes for a block of zeros.
fn check_blocks(weight: &BlockQuantized) -> Vec<Defect> {
    let blocks = weight.blocks().max(1);
    let bad = |values: &[half::f16]| find(values, |value| !value.is_finite());
    [bad(&weight.d), bad(&weight.dmin)]
        .into_iter()
        .flatten()
        .map(|(count, at)| Defect::ScaleNotFinite { count, row: at / blocks, group: at % blocks })
        .collect()
}

/// How many values are bad, and where the first is.
fn find<T>(values: &[T], bad: impl Fn(&T) -> bool) -> Option<(usize, usize)> {
    let first = values.iter().position(&bad)?;
    Some((values[first..].iter().filter(|value| bad(value)).count(), first))
}

#[cfg(test)]
mod tests {
    use attar_tensor::{DType, Tensor};

    use super::*;
    use crate::layout::{CtPacked, Gptq, Layout};
    use crate::testing::{quantized, scheme};

    #[test]
    fn sound_bytes_have_no_defect() {
        let weight = quantized(scheme(4, 32, false), 32, 64, 1);
        assert_eq!(check_packed(&Gptq::V1.pack(&weight, DType::F16).unwrap()), []);
    }

    #[test]
    fn bad_scales_and_zero_points_are_found_and_counted() {
        let mut weight = quantized(scheme(4, 32, false), 32, 64, 1);
        weight.zeros[5] = 16;
        let mut packed = Gptq::V1.pack(&weight, DType::F16).unwrap();
        let mut scales = packed.part("scales").unwrap().view().to_f32().unwrap();
        scales[3] = f32::NAN;
        scales[4] = f32::INFINITY;
        scales[40] = 0.0;
        packed.parts[2].1 = Tensor::from_f32(DType::F16, vec![2, 32], &scales).unwrap();
        assert_eq!(
            check_packed(&packed),
            [
                Defect::ScaleNotFinite { count: 2, row: 3, group: 0 },
                Defect::ScaleZero { count: 1, row: 8, group: 1 },
                Defect::ZeroOutOfRange { count: 1, zero: 16, row: 2, group: 1 },
            ]
        );
    }

    #[test]
    fn a_symmetric_scheme_with_other_zero_points_is_found() {
        let weight = quantized(scheme(4, 32, false), 32, 32, 1);
        let mut packed = Gptq::V2.pack(&weight, DType::F16).unwrap();
        packed.scheme.symmetric = true;
        assert!(matches!(check_packed(&packed)[..], [Defect::ZeroNotMiddle { mid: 8, .. }]));
    }

    #[test]
    fn wrong_shapes_are_found() {
        let weight = quantized(scheme(4, 32, true), 4, 64, 1);
        let mut packed = CtPacked.pack(&weight, DType::F16).unwrap();
        packed.out_features = 5;
        assert!(matches!(
            check_packed(&packed)[..],
            [Defect::Layout(LayoutError::Part { suffix: "weight_packed", .. })]
        ));
    }
}
