//! Names, dtypes, shapes and `quantization_config` of our artifacts against those that llm-compressor and
//! GPTQModel wrote for the same model in bf16 (`tests/golden/*/*.json`), key by key.

use std::{collections::BTreeMap, fs, path::Path};

use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Map, Value, json};

use crate::{attar, data};

/// The demo model in bf16, as the tools were given it.
pub(crate) fn bf16_model(folder: &Path) {
    fs::create_dir_all(folder).unwrap();
    let source = data("tinystories-656k");
    for entry in fs::read_dir(&source).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
    }
    let bytes = fs::read(source.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let rounded: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(name, view)| {
            let values = view.data().chunks(4).flat_map(|b| {
                half::bf16::from_f32(f32::from_le_bytes(b.try_into().unwrap())).to_le_bytes()
            });
            (name.to_owned(), view.shape().to_vec(), values.collect())
        })
        .collect();
    let views: BTreeMap<&str, TensorView<'_>> = rounded
        .iter()
        .map(|(name, shape, data)| {
            (name.as_str(), TensorView::new(Dtype::BF16, shape.clone(), data).unwrap())
        })
        .collect();
    fs::write(folder.join("model.safetensors"), safetensors::serialize(views, None).unwrap())
        .unwrap();
    let config = fs::read_to_string(folder.join("config.json")).unwrap();
    fs::write(folder.join("config.json"), config.replace("float32", "bfloat16")).unwrap();
}

fn header(file: &Path) -> Map<String, Value> {
    let bytes = fs::read(file).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let all: Map<String, Value> = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    all.into_iter()
        .filter(|(name, _)| name != "__metadata__")
        .map(|(name, entry)| (name, json!([entry["dtype"], entry["shape"]])))
        .collect()
}

#[test]
fn artifacts_have_the_headers_and_configs_of_the_reference_tools() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("bf16");
    bf16_model(&model);
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut seen = 0;
    for (tool, cases) in [
        (
            "compressed_tensors",
            vec![
                "w2_g64_sym",
                "w3_g64_sym",
                "w3_g128_asym",
                "w4_g128_sym",
                "w4_g32_asym",
                "w8_channel_sym",
                "w8_channel_sym_int8",
            ],
        ),
        ("gptq", vec!["w3_g64_sym", "w4_g128_asym", "w4_g128_sym", "w4_g128_sym_v2"]),
        ("awq", vec!["w4_g128_asym"]),
    ] {
        for case in cases {
            let want: Value = serde_json::from_slice(
                &fs::read(golden.join(tool).join(format!("{case}.json"))).unwrap(),
            )
            .unwrap();
            let mut parts = case.split('_');
            let bits = &parts.next().unwrap()[1..];
            let group = parts.next().unwrap();
            let group = if group == "channel" { "-1" } else { &group[1..] };
            let symmetric = parts.next() == Some("sym");
            let last = parts.next();
            let activations = if last == Some("int8") { ", activations = \"int8\"" } else { "" };
            let layout = match (tool, last) {
                ("compressed_tensors", Some("int8")) => "compressed-tensors-int",
                ("gptq", Some("v2")) => "gptq_v2",
                ("gptq", _) => "gptq",
                ("awq", _) => "awq",
                _ => "compressed-tensors",
            };
            let recipe = dir.path().join("recipe.toml");
            fs::write(
                &recipe,
                format!(
                    "[[step]]\npass = \"rtn\"\nscheme = {{ bits = {bits}, group_size = {group}, symmetric = {symmetric}{activations} }}\n"
                ),
            )
            .unwrap();
            let out = dir.path().join(format!("{tool}-{case}"));
            let [model, recipe, out_text] =
                [&model, &recipe, &out].map(|p| p.display().to_string());
            let (code, _, error) = attar(&[
                "compress", &model, "--recipe", &recipe, "--layout", layout, "--out", &out_text,
            ]);
            assert_eq!(code, 0, "{tool} {case}: {error}");
            let config: Value =
                serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
            compare_tensors(tool, case, &header(&out.join("model.safetensors")), &want);
            compare_config(tool, case, &config, &want);
            seen += 1;
        }
    }
    assert_eq!(seen, 12);
}

fn compare_tensors(tool: &str, case: &str, got: &Map<String, Value>, want: &Value) {
    let want = want["tensors"].as_object().unwrap();
    let names = |map: &Map<String, Value>| {
        let mut names: Vec<String> = map.keys().cloned().collect();
        names.sort();
        names
    };
    assert_eq!(names(got), names(want), "{tool} {case}");
    for (name, want) in want {
        let mut want = want.clone();
        if tool == "awq" && name.ends_with(".scales") {
            // AutoAWQ and its kernels store f16; GPTQModel keeps the model's bf16.
            want[0] = json!("F16");
        }
        assert_eq!(got[name], want, "{tool} {case} {name}");
    }
}

fn compare_config(tool: &str, case: &str, got: &Value, want: &Value) {
    assert_eq!(got["tie_word_embeddings"], want["tie_word_embeddings"], "{tool} {case}");
    let (got, want) =
        (&got["quantization_config"], want["quantization_config"].as_object().unwrap());
    for (key, want) in want {
        match (tool, key.as_str()) {
            // Says who made it.
            (_, "meta") => {}
            // Keys that GPTQModel adds to AWQ; AutoAWQ has none of them.
            (
                "awq",
                "checkpoint_format" | "desc_act" | "format" | "lm_head" | "method" | "pack_dtype",
            ) => assert!(got.get(key).is_none(), "{tool} {case} {key}"),
            _ => assert_eq!(&got[key], want, "{tool} {case} {key}"),
        }
    }
    for key in got.as_object().unwrap().keys() {
        let known = want.contains_key(key) || (tool == "awq" && key == "modules_to_not_convert");
        assert!(known, "{tool} {case}: {key} is not in the golden config");
    }
}
