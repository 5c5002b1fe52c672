//! Against ggml itself: `tests/golden/ggml/make_tensors.py` made the file.

use attar_tensor::block_search;
use attar_tensor::{Granularity, QuantScheme, rng::Rng};
use proptest::prelude::*;
use safetensors::SafeTensors;

use super::*;
use crate::testing::{quantized, scheme};

const GOLDEN: &[u8] = include_bytes!("../../../../tests/golden/ggml/tensors.safetensors");

fn golden() -> SafeTensors<'static> {
    SafeTensors::deserialize(GOLDEN).unwrap()
}

fn floats(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let number = |b: &[u8]| f32::from_le_bytes(b.try_into().unwrap());
    file.tensor(name).unwrap().data().chunks_exact(4).map(number).collect()
}

fn packed(file: &SafeTensors<'_>, layout: &Ggml, what: &str) -> PackedLinear {
    let view = file.tensor(&format!("{}.{what}", layout.block)).unwrap();
    let tensor = Tensor::new(DType::U8, view.shape().to_vec(), view.data().to_vec()).unwrap();
    PackedLinear {
        layout: layout.id(),
        scheme: layout.block.scheme(),
        out_features: view.shape()[0],
        in_features: 512,
        parts: vec![(BLOCKS, tensor)],
    }
}

/// Unpacks, dequantizes by all three ways to the bits of ggml, and packs to the same bytes.
#[test]
fn every_type_is_that_of_ggml_to_the_bit() {
    let file = golden();
    for layout in &Ggml::ALL {
        for what in ["blocks", "noise"] {
            let packed = packed(&file, layout, what);
            let name = format!("{}.{what}", layout.block);
            let suffix = if what == "noise" { "noise_weight" } else { "weight" };
            let expected = floats(&file, &format!("{}.{suffix}", layout.block));
            let blocks = layout.unpack_blocks(&packed).unwrap();
            let same = |found: &Mat| {
                let found = found.as_slice().unwrap();
                let at = found.iter().zip(&expected).position(|(a, b)| a.to_bits() != b.to_bits());
                assert_eq!(at, None, "{name}: {:?}", at.map(|at| (found[at], expected[at])));
            };
            same(&blocks.dequantize());
            same(&layout.dequantize(&packed).unwrap());
            assert_eq!(layout.pack_blocks(&blocks).unwrap(), packed, "{name}");
            if layout.block.is_affine() {
                same(&layout.unpack(&packed).unwrap().dequantize());
            } else {
                assert!(layout.unpack(&packed).is_err());
            }
        }
    }
}

#[test]
fn data_free_quantization_gives_the_bytes_of_ggml() {
    let file = golden();
    let x = floats(&file, "x");
    for layout in &Ggml::ALL {
        let expected = packed(&file, layout, "blocks");
        let blocks = block_search::quantize(layout.block, &x, 8, 512);
        let found = layout.pack_blocks(&blocks).unwrap();
        let (a, b) = (layout.bytes(&found).unwrap(), layout.bytes(&expected).unwrap());
        let different: Vec<usize> = (0..a.len()).filter(|&at| a[at] != b[at]).collect();
        assert!(
            different.is_empty(),
            "{}: {} of {} bytes differ, the first at {}",
            layout.block,
            different.len(),
            a.len(),
            different[0]
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn random_blocks_survive_and_kernels_agree(
        out in 1usize..80, blocks in 1usize..3, seed: u64, which in 0usize..12,
    ) {
        let layout = &Ggml::ALL[which];
        let columns = blocks * 256;
        let mut rng = Rng::new(seed);
        let x: Vec<f32> = rng.normals(out * columns);
        let weight = block_search::quantize(layout.block, &x, out, columns);
        weight.check().unwrap();
        let packed = layout.pack_blocks(&weight).unwrap();
        prop_assert_eq!(&layout.unpack_blocks(&packed).unwrap(), &weight);
        let spec = LinearSpec {
            name: String::new(), out_features: out, in_features: columns,
            scheme: layout.block.scheme(), source_dtype: DType::F32,
        };
        prop_assert_eq!(layout.parts_bytes(&spec).unwrap(), packed.bytes());
        for report in crate::verify(layout, &packed, seed).unwrap() {
            prop_assert!(report.ok, "{:?}", report);
        }
        prop_assert_eq!(crate::check_packed(&packed), []);
    }

    #[test]
    fn affine_weights_are_carried_exactly_or_refused(
        bits in prop::sample::select(vec![2u8, 3, 4, 5, 8]),
        group in prop::sample::select(vec![0usize, 32, 64, 128]),
        symmetric: bool, out in 1usize..8, seed: u64,
    ) {
        let weight = quantized(scheme(bits, group, symmetric), out, 256, seed);
        for layout in &Ggml::ALL {
            let block = layout.block;
            let carries = matches!(block, BlockType::Q40 | BlockType::Q50 | BlockType::Q80)
                && bits + u8::from(!symmetric) <= block.bits();
            match layout.pack(&weight, DType::F32) {
                Ok(packed) => {
                    prop_assert!(carries, "{}", block);
                    prop_assert_eq!(layout.dequantize(&packed).unwrap(), weight.dequantize());
                }
                Err(_) => prop_assert!(!carries, "{}", block),
            }
        }
    }
}

#[test]
fn refusals_say_why() {
    let layout = Ggml::new(BlockType::Q40);
    let spec = |group, columns| LinearSpec {
        name: String::new(),
        out_features: 4,
        in_features: columns,
        scheme: QuantScheme { granularity: Granularity::Group(group), ..scheme(4, 32, true) },
        source_dtype: DType::F32,
    };
    assert!(layout.parts(&spec(64, 128)).is_ok());
    let text = |error: LayoutError| error.to_string();
    assert!(text(layout.parts(&spec(16, 128)).unwrap_err()).contains("multiple of 32"));
    assert!(text(layout.parts(&spec(40, 40)).unwrap_err()).contains("multiple of 32"));
    assert!(text(layout.parts(&spec(32, 48)).unwrap_err()).contains("in_features"));
    let k = Ggml::new(BlockType::Q4K);
    assert!(text(k.parts(&spec(128, 256)).unwrap_err()).contains("leave `scheme` away"));
    let weight = quantized(scheme(4, 32, true), 4, 64, 1);
    let mut off = weight.clone();
    off.scales[3] = 0.1;
    assert!(matches!(
        layout.pack(&off, DType::F32),
        Err(LayoutError::Scale { row: 1, group: 1, .. })
    ));
    let packed = layout.pack(&weight, DType::F32).unwrap();
    let mut short = packed.clone();
    short.out_features = 5;
    assert!(layout.unpack_blocks(&short).is_err());
    assert!(layout.unpack_blocks(&PackedLinear { parts: Vec::new(), ..packed.clone() }).is_err());
    assert!(k.unpack_blocks(&packed).is_err());
    assert!(k.pack_blocks(&layout.unpack_blocks(&packed).unwrap()).is_err());
}
