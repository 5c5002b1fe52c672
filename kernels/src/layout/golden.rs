//! Our bits against those of the reference tools: `tests/golden/*/make_tensors.py` made these files.

use attar_tensor::compare::distance;
use attar_tensor::{
    DType, Granularity, PackedLinear, QuantScheme, QuantizedLinear, ScaleGrid, Tensor,
};
use safetensors::SafeTensors;

use super::{Awq, CtPacked, Gptq, Layout};
use crate::Defect;

const COMPRESSED_TENSORS: &[u8] =
    include_bytes!("../../../tests/golden/compressed_tensors/tensors.safetensors");
const GPTQ: &[u8] = include_bytes!("../../../tests/golden/gptq/tensors.safetensors");
const AWQ: &[u8] = include_bytes!("../../../tests/golden/awq/tensors.safetensors");

/// A case of the reference tool: its packed bytes, the codes and zero points that went in, and the
/// weight it dequantizes to.
struct Case {
    packed: PackedLinear,
    codes: Vec<u8>,
    zeros: Vec<u16>,
    weight: Vec<f32>,
}

/// Case names, e.g. `w4_g128_sym`, `w3_channel_asym_v2`.
fn names(file: &SafeTensors<'_>) -> Vec<String> {
    let mut names: Vec<String> =
        file.names().iter().filter_map(|name| Some(name.strip_suffix(".codes")?.into())).collect();
    names.sort();
    names
}

fn scheme(name: &str) -> QuantScheme {
    let mut words = name.split('_');
    let bits = words.next().unwrap().strip_prefix('w').unwrap().parse().unwrap();
    let granularity = match words.next().unwrap() {
        "channel" => Granularity::Channel,
        group => Granularity::Group(group.strip_prefix('g').unwrap().parse().unwrap()),
    };
    let symmetric = words.next().unwrap() == "sym";
    QuantScheme {
        bits,
        granularity,
        symmetric,
        scale_grid: ScaleGrid::F32,
        zero_min: 0,
        activations: attar_tensor::ActivationScheme::Float,
    }
}

fn read(
    file: &SafeTensors<'_>,
    name: &str,
    layout: &dyn Layout,
    suffixes: &[&'static str],
) -> Case {
    let tensor = |suffix: &str| {
        let view = file.tensor(&format!("{name}.{suffix}")).ok()?;
        let dtype = DType::from_safetensors_name(&format!("{:?}", view.dtype())).unwrap();
        Some(Tensor::new(dtype, view.shape().to_vec(), view.data().to_vec()).unwrap())
    };
    let codes = tensor("codes").unwrap();
    let zeros = tensor("zeros").unwrap();
    let &[out_features, in_features] = codes.shape() else { panic!("codes are a matrix") };
    let parts = suffixes.iter().filter_map(|&suffix| Some((suffix, tensor(suffix)?))).collect();
    Case {
        packed: PackedLinear {
            layout: layout.id(),
            scheme: scheme(name),
            out_features,
            in_features,
            parts,
        },
        codes: codes.bytes().to_vec(),
        zeros: zeros.bytes().iter().map(|&zero| u16::from(zero)).collect(),
        weight: tensor("weight").unwrap().view().to_f32().unwrap(),
    }
}

/// Unpacks to the tool's codes, dequantizes to the tool's weight, and packs to the tool's bytes.
fn check(name: &str, layout: &dyn Layout, case: &Case, max_relative: f64) -> QuantizedLinear {
    let weight = layout.unpack(&case.packed).unwrap();
    assert_eq!(weight.codes, case.codes, "{name}");
    assert_eq!(weight.zeros, case.zeros, "{name}");
    let dense = weight.dequantize();
    let found = distance(dense.as_slice().unwrap(), &case.weight).relative();
    assert!(found <= max_relative, "{name}: {found:e}");
    let source = case.packed.parts.iter().find(|(suffix, _)| suffix.contains("scale")).unwrap();
    let again = layout.pack(&weight, source.1.dtype()).unwrap();
    for (suffix, tensor) in &again.parts {
        assert_eq!(Some(tensor), case.packed.part(suffix), "{name}.{suffix}");
    }
    assert_eq!(again.parts.len(), case.packed.parts.len(), "{name}");
    weight
}

#[test]
fn compressed_tensors() {
    let file = SafeTensors::deserialize(COMPRESSED_TENSORS).unwrap();
    let names = names(&file);
    assert!(names.len() >= 13);
    for name in &names {
        let suffixes =
            ["weight_packed", "weight_zero_point", "weight_scale", "weight_shape", "weight_g_idx"];
        let case = read(&file, name, &CtPacked, &suffixes);
        // The tool rounds the dequantized weight to the dtype of the scales.
        let max_relative = if name.contains("bf16") {
            4e-3
        } else if name.contains("f16") {
            5e-4
        } else {
            1e-7
        };
        let weight = check(name, &CtPacked, &case, max_relative);
        assert_eq!(weight.g_idx.is_some(), name.ends_with("g_idx"));
    }
}

#[test]
fn gptq() {
    let file = SafeTensors::deserialize(GPTQ).unwrap();
    let names = names(&file);
    assert!(names.len() >= 13);
    for name in &names {
        let layout = if name.contains("_v2") { Gptq::V2 } else { Gptq::V1 };
        let case = read(&file, name, &layout, &["qweight", "qzeros", "scales", "g_idx"]);
        if name.ends_with("_wrap") {
            // Zero points of 0, which version 1 has no room for. The tool wraps around and borrows
            // from the neighbours; readers of the field disagree about such files.
            assert_eq!(layout.unpack(&case.packed).unwrap().codes, case.codes);
            let defects = crate::check_packed(&case.packed);
            assert!(
                matches!(defects[..], [Defect::ZeroOutOfRange { zero: 16, .. }]),
                "{defects:?}"
            );
            continue;
        }
        let weight = check(name, &layout, &case, 1e-7);
        assert_eq!(weight.g_idx.is_some(), name.contains("desc"), "{name}");
    }
}

#[test]
fn awq() {
    let file = SafeTensors::deserialize(AWQ).unwrap();
    let names = names(&file);
    assert!(names.len() >= 3);
    for name in &names {
        let case = read(&file, name, &Awq, &["qweight", "qzeros", "scales"]);
        check(name, &Awq, &case, 1e-7);
    }
}
