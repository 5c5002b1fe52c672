//! Pruning on the demo model: promises are kept in the bytes, refusals come before work, RECIPES.md is what the
//! passes say.

use std::{collections::BTreeMap, fs, path::Path};

use safetensors::SafeTensors;
use serde_json::Value;

use super::{attar, data, model};

fn compress(recipe: &str, out: &Path, extra: &[&str]) -> (i32, String, String) {
    let file = out.with_extension("toml");
    fs::write(&file, recipe).unwrap();
    let (model, text) = (model(), data("tinystories_calib.txt").display().to_string());
    let (file, out) = (file.display().to_string(), out.display().to_string());
    let mut args = vec!["compress", &model, "--recipe", &file, "--out", &out];
    args.extend(["--text", &text, "--context", "256", "--samples", "8"]);
    args.extend(extra);
    attar(&args)
}

fn step(pass: &str, options: &str) -> String {
    format!("[[step]]\npass = \"{pass}\"\n{options}\n")
}

fn weights(path: &Path) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let bytes = fs::read(path.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let list = |name: &str| {
        let tensor = file.tensor(name).unwrap();
        assert_eq!(tensor.dtype(), safetensors::Dtype::F32, "{name} is in the source's dtype");
        let values = tensor.data().chunks_exact(4);
        let values = values.map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        (name.to_owned(), (tensor.shape().to_vec(), values))
    };
    file.names().into_iter().map(list).collect()
}

#[test]
fn dense_artifacts_are_the_source_with_zeros() {
    let dir = tempfile::tempdir().unwrap();
    let source = weights(&data("tinystories-656k"));
    let config = |path: &Path| -> Value {
        serde_json::from_slice(&fs::read(path.join("config.json")).unwrap()).unwrap()
    };
    for (pass, options, n, m) in [
        ("magnitude", "pattern = \"2:4\"", 2, 4),
        ("wanda", "pattern = \"4:8\"", 4, 8),
        ("wanda", "pattern = \"2:4\"\nupstream = \"original\"", 2, 4),
        ("sparsegpt", "pattern = \"1:4\"", 1, 4),
        ("sparsegpt", "pattern = \"2:4\"\nexchange = false\nrefine = 0", 2, 4),
    ] {
        let out = dir.path().join("out");
        let (code, _, error) = compress(&step(pass, options), &out, &[]);
        assert_eq!(code, 0, "{error}");
        assert_eq!(config(&out), config(&data("tinystories-656k")));
        let pruned = weights(&out);
        assert_eq!(pruned.len(), source.len());
        for (name, (shape, values)) in &pruned {
            // The demo model's one copy of its tied embedding has the head's name.
            let before = &source.get(name).unwrap_or_else(|| &source["lm_head.weight"]).1;
            if !name.contains("_proj") {
                assert_eq!(values, before, "{name}");
                continue;
            }
            assert!(shape[1].is_multiple_of(m));
            let groups = values.chunks(m);
            assert!(groups.clone().all(|g| g.iter().filter(|w| **w != 0.0).count() <= n));
            let zeros = values.iter().filter(|w| w.to_bits() == 0).count();
            assert_eq!(zeros, values.len() / m * (m - n), "{pass} {name}");
            if pass != "sparsegpt" {
                assert!(
                    values.iter().zip(before).all(|(a, b)| *a == 0.0 || a.to_bits() == b.to_bits())
                );
            }
        }
        let report: Value =
            serde_json::from_slice(&fs::read(out.join("report.json")).unwrap()).unwrap();
        let lines = report["sparsity"].as_array().unwrap();
        assert_eq!(lines.len(), 14);
        assert!(lines.iter().all(|line| line["pattern"] == format!("{n}:{m}")));
        let (code, stdout, _) = attar(&["verify", out.to_str().unwrap(), "--source", &model()]);
        assert!(code == 0 && stdout.contains("14 pruned linears"), "{stdout}");
        fs::remove_dir_all(&out).unwrap();
    }
}

#[test]
fn a_broken_pattern_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let (code, _, error) = compress(&step("magnitude", "pattern = \"2:4\""), &out, &[]);
    assert_eq!(code, 0, "{error}");
    let file = out.join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let names: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let name = "model.layers.1.mlp.up_proj.weight";
    let start = names[name]["data_offsets"][0].as_u64().unwrap() as usize + 8 + header;
    for weight in 0..4 {
        bytes[start + 4 * weight..][..4].copy_from_slice(&1.0f32.to_le_bytes());
    }
    fs::write(&file, bytes).unwrap();
    let (code, stdout, _) = attar(&["verify", out.to_str().unwrap()]);
    assert_eq!(code, 1);
    assert!(stdout.contains("layers.1.mlp.up_proj: promised 2:4, but row 0"), "{stdout}");
    assert!(stdout.contains("columns 0 to 3"), "{stdout}");
}

#[test]
fn masks_survive_quantization() {
    let dir = tempfile::tempdir().unwrap();
    let prune = step("sparsegpt", "pattern = \"2:4\"");
    for (tail, layout) in [
        (step("rtn", "scheme = { bits = 4, group_size = 64 }"), "gptq"),
        (step("gptq", "scheme = { bits = 3, group_size = 64, symmetric = false }"), "gptq"),
        (step("awq", "") + &step("gptq", "scheme = { bits = 4, group_size = 64 }"), "awq"),
        (
            step("smoothquant", "folds = \"all\"")
                + &step("rtn", "scheme = { bits = 8, group_size = -1, activations = \"int8\" }"),
            "compressed-tensors-int",
        ),
        (step("rtn", "importance = true"), "q4_0"),
        (step("rtn", ""), "q8_0"),
    ] {
        let out = dir.path().join("out");
        let (code, _, error) = compress(&format!("{prune}{tail}"), &out, &["--layout", layout]);
        assert_eq!(code, 0, "{tail} {error}");
        let (code, stdout, _) = attar(&["verify", out.to_str().unwrap()]);
        assert!(code == 0 && stdout.contains("14 pruned linears"), "{tail} {stdout}");
        // 4-bit codes lie in memory without their zeros where the kernel has time for it.
        let (code, stdout, error) =
            attar(&["run", out.to_str().unwrap(), "--bench", "2,2", "--json"]);
        assert_eq!(code, 0, "{tail} {error}");
        let run: Value = serde_json::from_str(&stdout).unwrap();
        let kernels = run["kernels"].as_object().unwrap();
        let without = kernels.values().map(|kernel| kernel["without_zeros"].as_u64().unwrap());
        let without: u64 = without.sum();
        let fast = kernels.contains_key("cpu-avx512vnni-int8");
        let packed = fast && (tail.contains("bits = 4") || layout == "q4_0");
        assert_eq!(without, if packed { 14 } else { 0 }, "{tail} {stdout}");
        fs::remove_dir_all(&out).unwrap();
    }
    // Pruned and rounded in one step.
    for options in ["pattern = \"2:4\"", "sparsity = 0.5", "sparsity = 0.5\nexchange = false"] {
        let out = dir.path().join("out");
        let scheme = "\nscheme = { bits = 4, group_size = 64 }";
        let recipe = step("sparsegpt", &format!("{options}{scheme}"));
        let (code, _, error) = compress(&recipe, &out, &[]);
        assert_eq!(code, 0, "{error}");
        let report: Value =
            serde_json::from_slice(&fs::read(out.join("report.json")).unwrap()).unwrap();
        assert_eq!(report["layout"], "compressed-tensors");
        for line in report["sparsity"].as_array().unwrap() {
            assert!(line["zeros"].as_f64().unwrap() > 0.499, "{line}");
        }
        fs::remove_dir_all(&out).unwrap();
    }
}

#[test]
fn what_is_wrong_is_told_before_work() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let scheme = "scheme = { bits = 4, group_size = 64 }";
    let prune = step("sparsegpt", "");
    for (recipe, layout, expected) in [
        (step("wanda", "sparsity = 1.5"), "dense", "step[0].sparsity: expected a fraction between"),
        (step("wanda", "pattern = \"4:2\""), "dense", "step[0].pattern: expected `n:m`"),
        (step("magnitude", "pattern = \"2:5\""), "dense", "in_features that 5 divides, but"),
        (step("rtn", scheme) + &prune, "gptq", "cannot take weights that are quantized"),
        (prune.clone() + &step("wanda", ""), "dense", "cannot take weights that are float, masked"),
        (prune.clone(), "gptq", "no step quantizes; emit layout `dense`"),
        (step("rtn", scheme), "dense", "it stores float weights only"),
        (prune.clone() + &step("rtn", ""), "q4_1", "would not stay zero"),
        (prune.clone() + &step("gptq", ""), "q4_0", "its feedback would fill weights"),
    ] {
        let (code, _, error) = compress(&recipe, &out, &["--layout", layout]);
        assert_eq!(code, 2, "{recipe} {error}");
        assert!(error.contains(expected), "{recipe} {error}");
        assert!(!out.exists());
    }
    // Every site is told, with both numbers.
    let (_, _, error) = compress(&step("magnitude", "pattern = \"2:5\""), &out, &[]);
    assert!(
        error.contains("layers.1.mlp.down_proj has 384") && error.contains("has 128"),
        "{error}"
    );
}

#[test]
fn pruning_does_not_depend_on_threads_and_goes_on_after_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = step("sparsegpt", "sparsity = 0.4\nscheme = { bits = 4, group_size = 32 }");
    let mut all = Vec::new();
    for (name, threads) in [("a", "1"), ("b", "2")] {
        let out = dir.path().join(name);
        let cache = dir.path().join("cache").display().to_string();
        let (code, _, error) =
            compress(&recipe, &out, &["--threads", threads, "--scratch", &cache]);
        assert_eq!(code, 0, "{error}");
        all.push(fs::read(out.join("model.safetensors")).unwrap());
    }
    // The second run took the first one's results; a third has none.
    let out = dir.path().join("c");
    assert_eq!(compress(&recipe, &out, &["--threads", "2"]).0, 0);
    all.push(fs::read(out.join("model.safetensors")).unwrap());
    assert!(all[0] == all[1] && all[1] == all[2]);
}

#[test]
fn owl_gives_blocks_their_own_ratios() {
    let dir = tempfile::tempdir().unwrap();
    for (pass, more) in [("wanda", ""), ("sparsegpt", "scheme = { bits = 4, group_size = 64 }")] {
        let options = format!("sparsity = 0.5\nratios = \"owl\"\nlambda = 0.1\n{more}");
        let (out, cache) = (dir.path().join(pass), dir.path().join("cache").display().to_string());
        let (code, _, error) = compress(&step(pass, &options), &out, &["--scratch", &cache]);
        assert_eq!(code, 0, "{error}");
        let report: Value =
            serde_json::from_slice(&fs::read(out.join("report.json")).unwrap()).unwrap();
        let zeros: Vec<f64> = report["sparsity"]
            .as_array()
            .unwrap()
            .iter()
            .map(|l| l["zeros"].as_f64().unwrap())
            .collect();
        // Two blocks: one is at each end of the range.
        let (first, second) = (zeros[0], zeros[13]);
        assert!((first + second - 1.0).abs() < 0.01, "{zeros:?}");
        assert!(((first - second).abs() - 0.2).abs() < 0.01, "{zeros:?}");
        // A second run has nothing left to do, and asks for no survey.
        let again = dir.path().join(format!("{pass}-again"));
        let (code, stdout, _) = compress(&step(pass, &options), &again, &["--scratch", &cache]);
        assert!(code == 0 && stdout.contains("results were there already"), "{stdout}");
        assert!(
            fs::read(out.join("model.safetensors")).unwrap()
                == fs::read(again.join("model.safetensors")).unwrap()
        );
    }
    let (code, _, error) =
        compress(&step("wanda", "pattern = \"2:4\"\nratios = \"owl\""), &dir.path().join("x"), &[]);
    assert!(code == 2 && error.contains("step[0].ratios: `owl` gives each block"), "{error}");
}

#[test]
fn recipes_md_is_what_the_passes_say() {
    let (code, stdout, _) = attar(&["passes", "--markdown"]);
    assert_eq!(code, 0);
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("RECIPES.md");
    let committed = fs::read_to_string(file).unwrap();
    assert!(committed == stdout, "RECIPES.md is old; run `attar passes --markdown > RECIPES.md`");
}

#[test]
fn every_recipe_of_recipes_md_runs() {
    let dir = tempfile::tempdir().unwrap();
    let text =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("RECIPES.md")).unwrap();
    let mut found = 0;
    for recipe in text.split("```toml\n").skip(1).filter_map(|rest| rest.split("```").next()) {
        found += 1;
        let out = dir.path().join(found.to_string());
        let (code, _, error) = compress(recipe, &out, &[]);
        assert_eq!(code, 0, "{recipe}\n{error}");
    }
    assert!(found >= 6, "{found}");
}
