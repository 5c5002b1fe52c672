//! Where an artifact comes from: explain, diff, reproduce, and the instruction set that is pinned.

use std::{fs, path::Path};

use serde_json::Value;

use crate::{attar, compress, data, model};

/// Compresses the demo model on 12 windows of 256 tokens.
fn made(preset: &str, out: &Path, extra: &[&str]) {
    let (code, _, error) = compress(preset, out, extra);
    assert_eq!(code, 0, "{error}");
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn json(args: &[&str], expected: i32) -> Value {
    let (code, stdout, error) = attar(&[args, &["--json"]].concat());
    assert_eq!(code, expected, "{stdout}{error}");
    serde_json::from_str(&stdout).unwrap()
}

fn edit_manifest(artifact: &Path, key: &str, value: &str) {
    let path = artifact.join("attar_manifest.json");
    let mut manifest: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    assert!(manifest.get(key).is_some(), "{key}");
    manifest[key] = value.into();
    fs::write(&path, serde_json::to_vec_pretty(&manifest).unwrap()).unwrap();
}

#[test]
fn explain_knows_a_tensor_by_all_its_names() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    made("gptq-w4", &out, &["--layout", "gptq"]);
    let path = text(&out);
    let site = "model.layers.0.mlp.down_proj";
    let first = json(&["explain", &path, site], 0);
    for name in [
        format!("{site}.weight"),
        format!("{site}.qweight"),
        format!("{site}.scales"),
        "layers.0.mlp.down_proj".into(),
        "0.mlp.down_proj.qzeros".into(),
    ] {
        assert_eq!(json(&["explain", &path, &name], 0), first, "{name}");
    }
    assert_eq!(first["fate"], "quantized as w4 g128 sym by step[0] (gptq)");
    assert_eq!(first["layout"], "gptq");
    assert_eq!(first["source"]["dtype"], "F32");
    assert_eq!(first["source"]["shape"], serde_json::json!([128, 384]));
    assert_eq!(first["source"]["bytes"], 4 * 128 * 384);
    let parts: Vec<&str> =
        first["written"].as_array().unwrap().iter().map(|p| p["name"].as_str().unwrap()).collect();
    assert!(parts.contains(&"model.layers.0.mlp.down_proj.qweight"), "{parts:?}");
    let step = &first["steps"][0];
    assert_eq!(step["step"], "step[0] (gptq)");
    let recipe = step["recipe"].as_str().unwrap();
    assert!(recipe.contains("pass = \"gptq\"") && recipe.contains("bits = 4"), "{recipe}");
    assert_eq!(step["statistics"]["calibration_tokens"], 12 * 256);
    assert_eq!(step["statistics"]["kinds"], serde_json::json!(["hessian"]));
    let manifest: Value =
        serde_json::from_slice(&fs::read(out.join("attar_manifest.json")).unwrap()).unwrap();
    assert_eq!(step["statistics"]["calibration_blake3"], manifest["calibration_blake3"]);
    let (weight, output) = (step["weight_error"].as_f64(), step["output_error"].as_f64());
    assert!(weight.unwrap() > output.unwrap() && output.unwrap() > 0.0);
    let (_, page, _) = attar(&["explain", &path, site]);
    for part in ["pass = \"gptq\"", "hessian over 3072 tokens", "errors", "made by attar"] {
        assert!(page.contains(part), "{part} in {page}");
    }

    let refuse = |name: &str, expected: &[&str]| {
        let (code, _, error) = attar(&["explain", &path, name]);
        assert_eq!(code, 2, "{error}");
        for part in expected {
            assert!(error.contains(part), "wanted {part:?} in: {error}");
        }
    };
    refuse("layers.0.mlp.down_prj", &["did you mean", site]);
    refuse("layers.1.q_prj", &["did you mean model.layers.1.self_attn.q_proj?"]);
    refuse("down_proj", &["end of 2 names", site, "model.layers.1.mlp.down_proj"]);
    refuse("zzzzzzzz", &["inspect"]);
}

#[test]
fn explain_tells_what_became_of_what_is_not_quantized() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    made("awq-w4", &out, &[]);
    let path = text(&out);
    let fate = |name: &str| {
        let found = json(&["explain", &path, name], 0);
        found["fate"].as_str().unwrap().to_owned()
    };
    assert_eq!(fate("model.embed_tokens.weight"), "copied, byte for byte as in the source");
    assert_eq!(fate("lm_head"), "tied to model.embed_tokens.weight");
    let norm = json(&["explain", &path, "layers.0.input_layernorm.weight"], 0);
    assert_eq!(norm["fate"], "changed by step[0] (awq), kept in its dtype");
    assert_eq!(norm["folded_by"], serde_json::json!(["step[0] (awq)"]));
    assert_eq!(norm["ledger"]["fate"], "changed");
    // v_proj carries the scales of o_proj, and two steps worked on it.
    let v = json(&["explain", &path, "layers.1.self_attn.v_proj"], 0);
    assert_eq!(v["folded_by"], serde_json::json!(["step[0] (awq)"]));
    assert_eq!(v["steps"][0]["events"][0]["event"], "chosen");
    assert_eq!(v["steps"][1]["step"], "step[1] (rtn)");
    assert!(v["steps"][1]["statistics"].is_null(), "rtn reads no statistics");

    // The source has moved away: what it held is inferred, and said to be.
    let report = out.join("report.json");
    let kept = fs::read_to_string(&report).unwrap();
    assert!(kept.contains(&model()));
    fs::write(&report, kept.replace(&model(), "/nowhere/model")).unwrap();
    let found = json(&["explain", &path, "model.embed_tokens.weight"], 0);
    assert!(found["fate"].as_str().unwrap().starts_with("copied from the source"));
    assert!(found["notes"].to_string().contains("--source"), "{found}");
    let found = json(&["explain", &path, "layers.0.mlp.up_proj"], 0);
    assert!(found["source"]["known_from"].as_str().unwrap().contains("config.json"));
    let found = json(&["explain", &path, "layers.0.mlp.up_proj", "--source", &model()], 0);
    assert!(found["source"]["known_from"].as_str().unwrap().contains("headers of"));

    // Without manifest and report it is another tool's artifact: headers speak, provenance does not.
    fs::remove_file(out.join("attar_manifest.json")).unwrap();
    fs::remove_file(&report).unwrap();
    let found = json(&["explain", &path, "layers.0.mlp.up_proj"], 0);
    assert_eq!(
        (&found["provenance"], &found["fate"]),
        (&Value::Bool(false), &"quantized as w4 g128 asym".into())
    );
    assert!(found["source"].is_null() && found["steps"].as_array().unwrap().is_empty());
    assert!(found["notes"].to_string().contains("no attar_manifest.json"));
    // A family that is not known: headers and config only.
    let config = out.join("config.json");
    let unknown = fs::read_to_string(&config).unwrap().replace("\"llama\"", "\"mamba9\"");
    fs::write(&config, unknown).unwrap();
    let found = json(&["explain", &path, "layers.0.mlp.up_proj.weight_packed"], 0);
    assert!(found["notes"].to_string().contains("mamba9"), "{found}");
    assert_eq!(found["written"].as_array().unwrap().len(), 4);
}

#[test]
fn a_tensor_that_was_left_behind_is_explained() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    crate::refusals::copy(&source);
    // Old checkpoints keep the rotary frequencies, which nobody reads.
    let weights = source.join("model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    let extra: Vec<u8> = [1.0f32, 0.5].iter().flat_map(|v| v.to_le_bytes()).collect();
    let name = "model.layers.0.self_attn.rotary_emb.inv_freq";
    {
        let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let mut all: Vec<(String, safetensors::tensor::TensorView<'_>)> =
            read.tensors().into_iter().collect();
        let dtype = safetensors::Dtype::F32;
        let view = safetensors::tensor::TensorView::new(dtype, vec![2], &extra).unwrap();
        all.push((name.into(), view));
        fs::write(&weights, safetensors::serialize(all, None).unwrap()).unwrap();
    }
    let (source, out) = (text(&source), text(&dir.path().join("out")));
    let args = ["compress", &source, "--preset", "rtn-w4", "--out", &out];
    let (code, _, error) = attar(&args);
    assert_eq!(code, 0, "{error}");
    let fate = json(&["explain", &out, name], 0)["fate"].as_str().unwrap().to_owned();
    assert_eq!(fate, "copied, byte for byte as in the source");
}

#[test]
fn diff_is_zero_for_equal_tensors_and_measures_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    made("gptq-w4", &path("a"), &[]);
    made("gptq-w4", &path("b"), &["--threads", "1"]);
    made("gptq-w3", &path("c"), &[]);
    made("gptq-w4", &path("d"), &["--layout", "gptq", "--layout", "compressed-tensors"]);
    let at = |name: &str| text(&path(name));
    let same = json(&["diff", &at("a"), &at("b")], 0);
    assert_eq!(same["identical"], true);
    assert_eq!(
        same["facts"].as_array().unwrap().len() + same["recipe"].as_array().unwrap().len(),
        0
    );

    let other = json(&["diff", &at("a"), &at("c")], 1);
    let tensors = other["tensors"].as_array().unwrap();
    assert_eq!((tensors.len(), &other["tensors_identical"]), (14, &6.into()));
    for line in tensors {
        assert_eq!(line["differs"], "scheme");
        let relative = line["relative"].as_f64().unwrap();
        assert!(relative > 0.05 && relative < 0.6, "{line}");
        assert!(line["codes"].is_null(), "codes of different widths do not compare");
    }
    let recipe = other["recipe"].to_string();
    assert!(recipe.contains("- bits = 4") && recipe.contains("+ bits = 3"), "{recipe}");
    let errors = other["errors"].as_array().unwrap();
    assert_eq!(errors.len(), 14);
    assert!(errors[0]["weight_a"].as_f64().unwrap() < errors[0]["weight_b"].as_f64().unwrap());

    // Another layout of the same codes: other bytes, the same values.
    let layouts = json(&["diff", &at("d/gptq"), &at("d/compressed-tensors")], 1);
    assert_eq!(layouts["tensors"].as_array().unwrap().len(), 14);
    for line in layouts["tensors"].as_array().unwrap() {
        assert_eq!(line["differs"], "layout");
        assert!(line["bytes_a"] != line["bytes_b"], "{line}");
        assert_eq!((&line["codes"], &line["max_abs"]), (&0.0.into(), &0.0.into()), "{line}");
    }

    // The source itself: dense against dequantized.
    let source = json(&["diff", &model(), &at("a")], 1);
    let tensors = source["tensors"].as_array().unwrap();
    assert_eq!(tensors.len(), 14);
    let site = &tensors[0];
    let named = site["name"].as_str().unwrap();
    let explained = json(&["explain", &at("a"), named], 0);
    let error = explained["steps"][0]["weight_error"].as_f64().unwrap();
    let relative = site["relative"].as_f64().unwrap();
    assert!((relative * relative / error - 1.0).abs() < 1e-3, "{relative}² is {error}");

    // One flipped bit in a copy is one tensor.
    let weights = path("b").join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&weights, bytes).unwrap();
    let flipped = json(&["diff", &at("a"), &at("b")], 1);
    assert_eq!(flipped["tensors"].as_array().unwrap().len(), 1, "{flipped}");
    assert_eq!(flipped["tensors"][0]["differs"], "values");
    let (code, page, _) = attar(&["diff", &at("a"), &at("c")]);
    assert!(code == 1 && page.contains("+ bits = 3") && page.contains("14 differ"), "{page}");
    assert_eq!(attar(&["diff", &at("a"), &at("absent")]).0, 2);
}

#[test]
fn an_artifact_is_made_again_from_its_manifest() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let layouts = ["--layout", "gptq", "--layout", "awq", "--layout", "compressed-tensors"];
    made("gptq-w4", &out, &layouts);
    // Moved, and only one of three: the manifest knows which.
    let moved = dir.path().join("elsewhere");
    fs::create_dir(&moved).unwrap();
    let one = moved.join("mine");
    fs::rename(out.join("awq"), &one).unwrap();
    let path = text(&one);
    let found = json(&["reproduce", &path], 0);
    assert_eq!(found["identical"], true);
    let files = found["files"].as_array().unwrap();
    assert!(files.len() > 3 && files.iter().all(|file| file["same"] == true), "{found}");
    assert_eq!(fs::read_dir(&moved).unwrap().count(), 1, "nothing is left beside it");

    let kept = moved.join("again");
    let kept_text = text(&kept);
    let args = ["reproduce", &path, "--source", &model(), "--out", &kept_text, "--threads", "1"];
    let (code, page, error) = attar(&args);
    assert_eq!(code, 0, "{page}{error}");
    assert!(page.contains("same") && page.contains("identical from"), "{page}");
    let manifest = |folder: &Path| fs::read(folder.join("attar_manifest.json")).unwrap();
    assert_eq!(manifest(&one), manifest(&kept.join("awq")));

    // An artifact that no longer is what it was is not reproduced.
    let weights = one.join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&weights, bytes).unwrap();
    let found = json(&["reproduce", &path], 1);
    assert!(found["notes"].to_string().contains("model.safetensors"), "{found}");
}

#[test]
fn one_variant_of_a_branching_recipe_is_made_again_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (recipe, out) = (dir.path().join("recipe.toml"), dir.path().join("out"));
    let steps = r#"
[calibration]
context = 128
samples = 6
[[step]]
pass = "awq"
id = "scaled"
[[step]]
pass = "gptq"
id = "w4"
scheme = { bits = 4 }
[[step]]
pass = "rtn"
id = "w8"
after = "source"
scheme = { bits = 8 }
[[emit]]
layout = "compressed-tensors"
"#;
    fs::write(&recipe, steps).unwrap();
    let calibration = text(&data("tinystories_calib.txt"));
    let (recipe, out_text) = (text(&recipe), text(&out));
    let args = ["compress", &model(), "--recipe", &recipe, "--out", &out_text];
    let (code, _, error) = attar(&[&args[..], &["--text", &calibration]].concat());
    assert_eq!(code, 0, "{error}");
    for (name, steps) in [("w4", 2), ("w8", 1)] {
        let path = text(&out.join(name));
        assert_eq!(json(&["reproduce", &path], 0)["identical"], true, "{name}");
        let found = json(&["explain", &path, "layers.0.mlp.up_proj"], 0);
        let lines = found["steps"].as_array().unwrap();
        assert_eq!(lines.len(), steps, "{found}");
        for (index, line) in lines.iter().enumerate() {
            // The manifest keeps the variant's own chain, and labels are places in it.
            assert!(
                line["step"].as_str().unwrap().starts_with(&format!("step[{index}]")),
                "{line}"
            );
            let pass = line["pass"].as_str().unwrap();
            assert!(line["recipe"].as_str().unwrap().contains(&format!("pass = \"{pass}\"")));
        }
    }
    let found = json(&["diff", &text(&out.join("w4")), &text(&out.join("w8"))], 1);
    assert!(found["facts"].to_string().contains("\"emit\""), "{found}");
}

#[test]
fn what_cannot_be_reproduced_says_what_differs() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    made("gptq-w4", &out, &[]);
    let path = text(&out);
    let refuse = |extra: &[&str], expected: &[&str]| {
        let (code, _, error) = attar(&[&["reproduce", path.as_str()], extra].concat());
        assert_eq!(code, 2, "{error}");
        for part in expected {
            assert!(error.contains(part), "wanted {part:?} in: {error}");
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside it");
    };
    let other_text = text(&data("tinystories_val.txt"));
    refuse(&["--text", &other_text], &["calibration set is", "recorded is", "--text"]);
    refuse(&["--text", "absent.txt"], &["absent.txt", "--ids"]);
    refuse(&["--source", "/nowhere/model"], &["/nowhere/model", "--source"]);
    let other = tempfile::tempdir().unwrap();
    let source = other.path().join("source");
    crate::refusals::copy(&source);
    let weights = source.join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&weights, bytes).unwrap();
    refuse(&["--source", &text(&source)], &["model.safetensors is", "recorded is"]);
    let used = fs::read_to_string(out.join("attar_manifest.json")).unwrap();
    if !used.contains("\"isa\": \"scalar\"") {
        refuse(&["--isa", "scalar"], &["made with", "leave --isa away"]);
    }
    edit_manifest(&out, "isa", "avx1024");
    refuse(&[], &["avx1024"]);
    edit_manifest(&out, "attar", "0.0.1");
    refuse(&[], &["made by attar 0.0.1", "use attar 0.0.1"]);
    // What another tool made has no manifest.
    let (code, _, error) = attar(&["reproduce", &model()]);
    assert!(code == 2 && error.contains("attar_manifest.json"), "{error}");
}

#[test]
fn instruction_sets_agree_and_are_recorded() {
    let dir = tempfile::tempdir().unwrap();
    let has: Vec<&str> = ["scalar", "neon", "avx2", "avx512", "amx"]
        .into_iter()
        .filter(|isa| attar(&["passes", "--isa", isa]).0 == 0)
        .collect();
    assert!(has.contains(&"scalar"));
    let (model, calibration) = (model(), text(&data("tinystories_calib.txt")));
    let held_out = text(&data("tinystories_val.txt"));
    for preset in ["gptq-w3", "awq-w4"] {
        let mut all = Vec::new();
        for isa in &has {
            for threads in ["1", "2"] {
                if *isa == "scalar" && threads == "2" {
                    continue;
                }
                let out = dir.path().join(format!("{preset}-{isa}-{threads}"));
                let path = text(&out);
                let mut args = vec!["compress", &model, "--preset", preset, "--out", &path];
                args.extend(["--text", &calibration, "--context", "64", "--samples", "3"]);
                args.extend(["--isa", isa, "--threads", threads]);
                let (code, _, error) = attar(&args);
                assert_eq!(code, 0, "{error}");
                let read = |name: &str| -> Value {
                    serde_json::from_slice(&fs::read(out.join(name)).unwrap()).unwrap()
                };
                assert_eq!(read("attar_manifest.json")["isa"], *isa);
                assert_eq!(read("report.json")["isa"], *isa);
                all.push((path.clone(), fs::read(out.join("model.safetensors")).unwrap()));
                // Every kernel is held to the f64 reference with this set pinned.
                if preset == "gptq-w3" && threads == "1" {
                    let (code, page, _) = attar(&["verify", &path, "--isa", isa]);
                    assert_eq!(code, 0, "{page}");
                }
            }
        }
        // The order of every sum and every fused product is written down, so the sets do not differ at all, but
        // for the products of AMX, which are sums of others.
        let of_tiles = |path: &str| path.contains("-amx-");
        for (path, bytes) in &all {
            let like = all.iter().find(|(other, _)| of_tiles(other) == of_tiles(path)).unwrap();
            assert!(*bytes == like.1, "{path} differs from {}", like.0);
        }
        let mut seen = Vec::new();
        for isa in &has {
            let mut args = vec!["eval", all[0].0.as_str(), "--text", &held_out, "--isa", isa];
            args.extend(["--context", "64", "--max-windows", "2"]);
            seen.push(json(&args, 0)["perplexity"].as_f64().unwrap());
        }
        assert!(seen.iter().all(|ppl| (ppl / seen[0] - 1.0).abs() < 1e-4), "{seen:?}");
    }
    let (code, _, error) = attar(&["passes", "--isa", "avx1024"]);
    assert!(code == 2 && error.contains("avx1024") && error.contains("avx2"), "{error}");
    for isa in ["neon", "avx2", "avx512", "amx"].into_iter().filter(|isa| !has.contains(isa)) {
        let (code, _, error) = attar(&["passes", "--isa", isa]);
        assert!(code == 2 && error.contains("this CPU has no"), "{error}");
    }
}
