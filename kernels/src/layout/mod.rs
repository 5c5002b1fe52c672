//! Packed layouts: where the bits of a quantized linear sit in a file.
//!
//! Each layout is described once, in its own folder, with a bit diagram. Packing is exact or refuses:
//! `unpack(pack(q)) == q`. The half that planning needs is [`LayoutSpec`].

use std::borrow::Cow;

use attar_tensor::compare::Tolerance;
use attar_tensor::{
    BlockQuantized, DType, LayoutError, LayoutId, LayoutSpec, LinearSpec, Mat, PackedLinear,
    QuantScheme, QuantizedLinear, Tensor,
};

use crate::cpu;
use crate::spec::Kernel;

pub mod awq;
pub(crate) mod bits;
pub mod ct_int;
pub mod ct_packed;
pub mod ggml;
#[cfg(test)]
mod golden;
pub mod gptq;

pub use awq::Awq;
pub use ct_int::CtInt;
pub use ct_packed::CtPacked;
pub use ggml::Ggml;
pub use gptq::Gptq;

/// A layout that can pack and unpack.
pub trait Layout: LayoutSpec {
    /// Packs a quantized linear; `source` is the dtype of the tensor in the source checkpoint.
    ///
    /// # Errors
    /// Whatever the layout cannot store exactly: width, shape, a scale off its grid, a zero point out
    /// of range, an order of columns.
    fn pack(&self, weight: &QuantizedLinear, source: DType) -> Result<PackedLinear, LayoutError>;

    /// Inverse of [`Layout::pack`]; also reads foreign files. An order of columns that is `column /
    /// group_size` reads as `None`.
    ///
    /// # Errors
    /// Missing parts, wrong dtypes or shapes, an order of columns that names an absent group.
    fn unpack(&self, packed: &PackedLinear) -> Result<QuantizedLinear, LayoutError>;

    /// Packs a weight in blocks; layouts of other kinds refuse.
    ///
    /// # Errors
    /// Another block type than the layout's, wrong lengths, values out of range.
    fn pack_blocks(&self, weight: &BlockQuantized) -> Result<PackedLinear, LayoutError> {
        Err(LayoutError::Layout {
            expected: self.id().0.to_owned(),
            got: LayoutId(weight.block.name()),
        })
    }

    /// Inverse of [`Layout::pack_blocks`].
    ///
    /// # Errors
    /// A layout of another kind, a missing part, a wrong shape.
    fn unpack_blocks(&self, packed: &PackedLinear) -> Result<BlockQuantized, LayoutError> {
        Err(LayoutError::Layout { expected: "a layout of blocks".to_owned(), got: packed.layout })
    }

    /// An affine weight in this layout's blocks; exact or refused.
    ///
    /// # Errors
    /// As [`Layout::pack`], or a layout of another kind.
    fn blocks_of(&self, _: &QuantizedLinear) -> Result<BlockQuantized, LayoutError> {
        Err(LayoutError::Layout { expected: "a layout of blocks".to_owned(), got: self.id() })
    }

    /// The weight `[out_features, in_features]` that these bytes stand for.
    ///
    /// # Errors
    /// As [`Layout::unpack`].
    fn dequantize(&self, packed: &PackedLinear) -> Result<Mat, LayoutError> {
        Ok(self.unpack(packed)?.dequantize())
    }

    /// Every kernel of this build that eats this layout, slowest first; not all need be supported by
    /// this machine.
    fn kernels(&self) -> Vec<Box<dyn Kernel>> {
        cpu::kernels()
    }

    /// How far a kernel may lie from the reference.
    fn tolerance(&self) -> Tolerance;
}

/// All layouts, in the order in which they are listed to people.
pub static LAYOUTS: &[&dyn Layout] = &[
    &CtPacked,
    &Gptq::V1,
    &Gptq::V2,
    &Awq,
    &CtInt,
    &Ggml::ALL[0],
    &Ggml::ALL[1],
    &Ggml::ALL[2],
    &Ggml::ALL[3],
    &Ggml::ALL[4],
    &Ggml::ALL[5],
    &Ggml::ALL[6],
    &Ggml::ALL[7],
    &Ggml::ALL[8],
    &Ggml::ALL[9],
    &Ggml::ALL[10],
    &Ggml::ALL[11],
];

/// The layouts that store affine weights of any group as named parts, not blocks.
#[cfg(test)]
pub(crate) fn affine_layouts() -> impl Iterator<Item = &'static dyn Layout> {
    LAYOUTS.iter().copied().filter(|l| l.block_type().is_none() && l.id() != CtInt.id())
}

/// Suffixes of the parts of every layout, in the order in which they are looked for. A dense linear has a
/// tensor `weight`, too.
pub const SUFFIXES: &[&str] = &[
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "blocks",
];

/// Suffixes of the packed parts of a linear that has tensors of the suffixes that `has` knows; none for a dense
/// one.
pub fn suffixes_of(has: impl Fn(&str) -> bool) -> Vec<&'static str> {
    // A tensor `weight` is a part when scales lie beside it, and codes nowhere else.
    let bytes = has("weight_scale") && !has("weight_packed");
    let part = |suffix: &&&str| has(suffix) && (**suffix != "weight" || bytes);
    SUFFIXES.iter().filter(part).copied().collect()
}

/// The layout of this name.
pub fn layout(name: &str) -> Option<&'static dyn Layout> {
    LAYOUTS.iter().copied().find(|layout| layout.id().0 == name)
}

/// The layout that made these bytes.
///
/// # Errors
/// [`LayoutError::Layout`] when this build does not know it.
pub fn layout_of(packed: &PackedLinear) -> Result<&'static dyn Layout, LayoutError> {
    layout(packed.layout.0).ok_or_else(|| LayoutError::Layout {
        expected: LAYOUTS.iter().map(|l| l.id().0).collect::<Vec<_>>().join(", "),
        got: packed.layout,
    })
}

/// Unpacks whatever layout it is.
///
/// # Errors
/// As [`Layout::unpack`], or an unknown layout.
pub fn unpack(packed: &PackedLinear) -> Result<QuantizedLinear, LayoutError> {
    layout_of(packed)?.unpack(packed)
}

/// Refuses what a layout of weights alone cannot say of activations.
pub(crate) fn weights_only(layout: LayoutId, scheme: QuantScheme) -> Result<(), LayoutError> {
    if scheme.activations.is_float() {
        return Ok(());
    }
    Err(LayoutError::Scheme {
        layout,
        scheme: scheme.label(),
        reason: "it says nothing of activations; emit compressed-tensors-int, or leave `activations` out",
    })
}

/// Groups of a row, or why there are none.
pub(crate) fn groups(scheme: QuantScheme, in_features: usize) -> Result<usize, LayoutError> {
    scheme
        .groups(in_features)
        .ok_or(LayoutError::Group { group_size: scheme.group_size(in_features), in_features })
}

pub(crate) fn check_multiple(
    layout: LayoutId,
    dimension: &'static str,
    size: usize,
    multiple: usize,
) -> Result<(), LayoutError> {
    if size.is_multiple_of(multiple) {
        Ok(())
    } else {
        Err(LayoutError::Multiple { layout, dimension, size, multiple })
    }
}

/// What planning would know of this linear.
pub(crate) fn spec_of(weight: &QuantizedLinear, source_dtype: DType) -> LinearSpec {
    LinearSpec {
        name: String::new(),
        out_features: weight.out_features,
        in_features: weight.in_features,
        scheme: weight.scheme,
        source_dtype,
    }
}

/// Checks what every layout relies on: lengths, codes within their width, zero points within
/// `min..=max`, symmetric zero points in the middle, groups that exist. Returns the number of groups.
pub(crate) fn check_quantized(
    layout: LayoutId,
    weight: &QuantizedLinear,
    zero_range: std::ops::RangeInclusive<u16>,
) -> Result<usize, LayoutError> {
    let (rows, columns) = (weight.out_features, weight.in_features);
    let groups = groups(weight.scheme, columns)?;
    let lengths = [
        ("codes", rows * columns, weight.codes.len()),
        ("scales", rows * groups, weight.scales.len()),
        ("zeros", rows * groups, weight.zeros.len()),
        ("g_idx", columns, weight.g_idx.as_ref().map_or(columns, Vec::len)),
    ];
    for (field, expected, got) in lengths {
        if expected != got {
            return Err(LayoutError::Length { field, expected, got });
        }
    }
    let max = weight.scheme.max_code();
    // A maximum vectorises; a search does not.
    if weight.codes.iter().fold(0, |a, &b| a.max(b)) > max {
        let at = weight.codes.iter().position(|&code| code > max).expect("one is beyond the max");
        let code = weight.codes[at];
        return Err(LayoutError::Code { row: at / columns, column: at % columns, code, max });
    }
    let (min, max) = if weight.scheme.symmetric {
        let mid = u16::from(weight.scheme.mid_code());
        (mid, mid)
    } else {
        zero_range.into_inner()
    };
    if let Some(at) = weight.zeros.iter().position(|zero| !(min..=max).contains(zero)) {
        let (row, group) = (at / groups, at % groups);
        return Err(LayoutError::Zero { layout, row, group, zero: weight.zeros[at], min, max });
    }
    if let Some(g_idx) = &weight.g_idx
        && let Some(column) = g_idx.iter().position(|&group| group as usize >= groups)
    {
        return Err(LayoutError::GroupIndex { column, group: i64::from(g_idx[column]), groups });
    }
    Ok(groups)
}

/// Stores scales `values`, refusing those that `dtype` cannot represent. `place` gives row and group
/// of an index.
pub(crate) fn scales_tensor(
    layout: LayoutId,
    dtype: DType,
    shape: Vec<usize>,
    values: &[f32],
    place: impl Fn(usize) -> (usize, usize),
) -> Result<Tensor, LayoutError> {
    let tensor = Tensor::from_f32(dtype, shape, values)
        .map_err(|_| LayoutError::ScaleDtype { layout, dtype })?;
    let stored = tensor.view().to_f32().expect("from_f32 made a float tensor");
    match values.iter().zip(&stored).position(|(a, b)| a.to_bits() != b.to_bits() || !a.is_finite())
    {
        None => Ok(tensor),
        Some(at) => {
            let (row, group) = place(at);
            Err(LayoutError::Scale { layout, row, group, scale: values[at], dtype })
        }
    }
}

/// The part with this suffix, of one of these dtypes and of this shape.
pub(crate) fn part<'a>(
    packed: &'a PackedLinear,
    suffix: &'static str,
    dtypes: &[DType],
    shape: &[usize],
) -> Result<&'a Tensor, LayoutError> {
    let layout = packed.layout;
    let tensor = packed.part(suffix).ok_or(LayoutError::Missing { layout, suffix })?;
    if dtypes.contains(&tensor.dtype()) && tensor.shape() == shape {
        return Ok(tensor);
    }
    let names: Vec<String> = dtypes.iter().map(ToString::to_string).collect();
    Err(LayoutError::Part {
        layout,
        suffix,
        dtype: tensor.dtype(),
        shape: tensor.shape().to_vec(),
        expected: format!("{} {shape:?}", names.join(" or ")),
    })
}

/// Dtypes in which files of the field store scales.
pub(crate) const SCALE_DTYPES: &[DType] = &[DType::F16, DType::BF16, DType::F32];

/// The words of an I32 part.
pub(crate) fn part_words<'a>(
    packed: &'a PackedLinear,
    suffix: &'static str,
    shape: &[usize],
) -> Result<Cow<'a, [u32]>, LayoutError> {
    let bytes = part(packed, suffix, &[DType::I32], shape)?.bytes();
    if let Ok(words) = bytemuck::try_cast_slice(bytes) {
        return Ok(Cow::Borrowed(words));
    }
    let word = |b: &[u8]| u32::from_le_bytes(b.try_into().expect("chunks are words"));
    Ok(Cow::Owned(bytes.chunks_exact(4).map(word).collect()))
}

/// Scales as f32, in the part's own order.
pub(crate) fn part_scales(
    packed: &PackedLinear,
    suffix: &'static str,
    shape: &[usize],
) -> Result<Vec<f32>, LayoutError> {
    let tensor = part(packed, suffix, SCALE_DTYPES, shape)?;
    Ok(tensor.view().to_f32().expect("the dtype was checked"))
}

/// An I32 tensor of these words.
pub(crate) fn words_tensor(shape: Vec<usize>, words: &[u32]) -> Tensor {
    Tensor::from_i32(shape, bytemuck::cast_slice(words)).expect("words were counted by the shape")
}

/// Reads an order of columns; one that says `column / group_size` is `None`, an absent part too.
pub(crate) fn part_g_idx(
    packed: &PackedLinear,
    suffix: &'static str,
    groups: usize,
) -> Result<Option<Vec<u32>>, LayoutError> {
    if packed.part(suffix).is_none() {
        return Ok(None);
    }
    let columns = packed.in_features;
    let tensor = part(packed, suffix, &[DType::I32, DType::I64], &[columns])?;
    let values = tensor.view().to_i64().expect("the dtype was checked");
    let group_size = packed.scheme.group_size(columns);
    if values.iter().enumerate().all(|(column, &group)| group == (column / group_size) as i64) {
        return Ok(None);
    }
    let mut g_idx = Vec::with_capacity(columns);
    for (column, &group) in values.iter().enumerate() {
        match usize::try_from(group) {
            Ok(index) if index < groups => g_idx.push(index as u32),
            _ => return Err(LayoutError::GroupIndex { column, group, groups }),
        }
    }
    Ok(Some(g_idx))
}

/// Refuses bytes of another layout and schemes that the shape cannot have. Returns the groups.
pub(crate) fn check_packed_head(
    spec: &dyn LayoutSpec,
    packed: &PackedLinear,
) -> Result<usize, LayoutError> {
    if packed.layout != spec.id() {
        return Err(LayoutError::Layout { expected: spec.id().0.to_owned(), got: packed.layout });
    }
    spec.parts(&LinearSpec {
        name: String::new(),
        out_features: packed.out_features,
        in_features: packed.in_features,
        scheme: packed.scheme,
        source_dtype: DType::F16,
    })?;
    groups(packed.scheme, packed.in_features)
}

/// Transposes `[rows, columns]` into `[columns, rows]`.
pub(crate) fn transpose<T: Copy>(values: &[T], rows: usize, columns: usize) -> Vec<T> {
    let mut out = Vec::with_capacity(values.len());
    for column in 0..columns {
        out.extend((0..rows).map(|row| values[row * columns + column]));
    }
    out
}

#[cfg(test)]
mod tests {
    use attar_tensor::ScaleGrid;
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{quantized, scheme};

    #[test]
    fn names_are_unique_and_found() {
        for (i, a) in LAYOUTS.iter().enumerate() {
            assert!(LAYOUTS[..i].iter().all(|b| b.id() != a.id()));
            assert_eq!(layout(a.id().0).unwrap().id(), a.id());
        }
        assert!(layout("ggml").is_none());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn unpack_inverts_pack(
            bits in prop::sample::select(vec![2u8, 3, 4, 8]),
            out in 1usize..4,
            blocks in 1usize..5,
            group in prop::sample::select(vec![0usize, 16, 32, 64]),
            symmetric: bool,
            act_order: bool,
            seed: u64,
            source in prop::sample::select(vec![DType::F32, DType::F16, DType::BF16]),
        ) {
            let (out, columns) = (out * 32, blocks * 64);
            for layout in affine_layouts() {
                let mut scheme = scheme(bits, group, symmetric);
                scheme.scale_grid = layout.scale_grid(source);
                scheme.zero_min = layout.zero_min();
                let mut weight = quantized(scheme, out, columns, seed);
                if act_order && layout.id().0 != "awq" {
                    crate::testing::shuffle_groups(&mut weight, seed);
                }
                if layout.id().0 == "awq" && bits != 4 {
                    prop_assert!(layout.pack(&weight, source).is_err());
                    continue;
                }
                let packed = layout.pack(&weight, source).unwrap();
                let headers = layout.parts(&spec_of(&weight, source)).unwrap();
                for header in &headers {
                    let tensor = packed.part(header.suffix).unwrap();
                    prop_assert_eq!(tensor.dtype(), header.dtype);
                    prop_assert_eq!(tensor.shape(), header.shape.as_slice());
                }
                if weight.g_idx.is_none() {
                    prop_assert_eq!(headers.len(), packed.parts.len());
                    prop_assert_eq!(
                        layout.parts_bytes(&spec_of(&weight, source)).unwrap(), packed.bytes());
                }
                prop_assert_eq!(&layout.unpack(&packed).unwrap(), &weight);
            }
        }
    }

    #[test]
    fn packing_refuses_what_it_cannot_store() {
        for layout in affine_layouts() {
            let mut good = scheme(4, 32, false);
            good.scale_grid = ScaleGrid::F16AndBf16;
            let weight = quantized(good, 32, 64, 5);
            layout.pack(&weight, DType::BF16).unwrap();

            let mut off_grid = weight.clone();
            off_grid.scales[3] = 0.1;
            let error = layout.pack(&off_grid, DType::BF16).unwrap_err();
            assert!(
                matches!(error, LayoutError::Scale { row: 1, group: 1, .. }),
                "{}: {error}",
                layout.id()
            );
            let mut zero = weight.clone();
            zero.zeros[2] = 17;
            assert!(matches!(
                layout.pack(&zero, DType::BF16),
                Err(LayoutError::Zero { row: 1, group: 0, zero: 17, .. })
            ));
            zero.zeros[2] = 0;
            assert_eq!(layout.pack(&zero, DType::BF16).is_err(), layout.zero_min() == 1);
            let mut code = weight.clone();
            code.codes[65] = 16;
            assert!(matches!(
                layout.pack(&code, DType::BF16),
                Err(LayoutError::Code { row: 1, column: 1, code: 16, max: 15 })
            ));
            let mut short = weight.clone();
            short.scales.pop();
            assert!(matches!(
                layout.pack(&short, DType::BF16),
                Err(LayoutError::Length { field: "scales", expected: 64, got: 63 })
            ));
            let mut index = weight.clone();
            index.g_idx = Some(vec![2; 64]);
            assert!(layout.pack(&index, DType::BF16).is_err());
            let mut lying = weight.clone();
            lying.scheme.symmetric = true;
            assert!(layout.pack(&lying, DType::BF16).is_err());
        }
    }

    #[test]
    fn unpacking_refuses_missing_and_misshapen_parts() {
        for layout in affine_layouts() {
            let mut scheme = scheme(4, 32, false);
            scheme.scale_grid = ScaleGrid::F16;
            let packed = layout.pack(&quantized(scheme, 32, 64, 5), DType::F16).unwrap();
            for at in 0..packed.parts.len() {
                let suffix = packed.parts[at].0;
                if !suffix.contains("g_idx") {
                    let mut missing = packed.clone();
                    missing.parts.remove(at);
                    assert_eq!(
                        layout.unpack(&missing),
                        Err(LayoutError::Missing { layout: layout.id(), suffix })
                    );
                }
                let mut wrong = packed.clone();
                wrong.parts[at].1 = Tensor::from_i32(vec![1], &[0]).unwrap();
                assert!(matches!(layout.unpack(&wrong), Err(LayoutError::Part { .. })), "{suffix}");
            }
            let mut other = packed.clone();
            other.layout = LayoutId("nobody");
            assert!(matches!(layout.unpack(&other), Err(LayoutError::Layout { .. })));
            assert!(matches!(super::unpack(&other), Err(LayoutError::Layout { .. })));
        }
    }
}
