//! Low rank on the demo model: two linears in the place of one and corrections beside codes are written, read back, run
//! and judged like everything else, survive kills and threads, and are refused where nobody could read them.

use std::{fs, path::Path};

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

fn emit(layout: &str, options: &str) -> String {
    format!("[[emit]]\nlayout = \"{layout}\"\n{options}\n")
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// KL divergence to the demo model and perplexity, on a few windows.
fn judged(artifact: &Path) -> (f64, f64) {
    let (path, text) = (artifact.display().to_string(), data("tinystories_val.txt"));
    let (reference, text) = (model(), text.display().to_string());
    let mut args = vec!["eval", &path, "--text", &text, "--reference", &reference];
    args.extend(["--context", "256", "--max-windows", "8", "--json"]);
    let (code, stdout, error) = attar(&args);
    assert_eq!(code, 0, "{error}");
    let found: Value = serde_json::from_str(&stdout).unwrap();
    let number = |key: &str| {
        let direct = found.get(key).or_else(|| found["divergence"].get(key));
        direct.and_then(Value::as_f64).unwrap_or_else(|| panic!("{key} in {found}"))
    };
    (number("kl_mean"), number("perplexity"))
}

fn tensor(path: &Path, name: &str) -> (Vec<usize>, Vec<f32>) {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let found = file.tensor(name).unwrap();
    let values = found.data().chunks_exact(4);
    (found.shape().to_vec(), values.map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect())
}

const SVD_LLM: &str = "ratio = 0.2\nmultiple_of = 16";

#[test]
fn factors_are_written_as_two_linears_and_multiply_back() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let recipe = step("svd_llm", SVD_LLM)
        + &emit("dense", "dir = \"two\"")
        + &emit("dense", "dir = \"one\"\nmerge = true");
    let (code, _, error) = compress(&recipe, &out, &[]);
    assert_eq!(code, 0, "{error}");
    let site = "model.layers.1.mlp.up_proj";
    let two = out.join("two/model.safetensors");
    let (down_shape, down) = tensor(&two, &format!("{site}.down.weight"));
    let (up_shape, up) = tensor(&two, &format!("{site}.up.weight"));
    assert_eq!((down_shape.as_slice(), up_shape.as_slice()), (&[64, 128][..], &[384, 64][..]));
    let config = json(&out.join("two/config.json"));
    assert_eq!(config["low_rank"][site], 64);
    let code = fs::read_to_string(out.join("two/modeling_attar.py")).unwrap();
    assert!(code.contains("class FactoredForCausalLM(LlamaForCausalLM)"), "{code}");
    // Merged is the product, to the rounding of f32.
    let (shape, merged) = tensor(&out.join("one/model.safetensors"), &format!("{site}.weight"));
    assert_eq!(shape, [384, 128]);
    for i in [0, 17, 383] {
        for j in [0, 5, 127] {
            let sum: f64 =
                (0..64).map(|k| f64::from(up[i * 64 + k]) * f64::from(down[k * 128 + j])).sum();
            assert!((sum - f64::from(merged[i * 128 + j])).abs() < 1e-6, "{i} {j}");
        }
    }
    assert!(json(&out.join("one/config.json")).get("low_rank").is_none());
    assert!(!out.join("one/modeling_attar.py").exists());
    let (a, b) = (judged(&out.join("two")), judged(&out.join("one")));
    assert!((a.0 - b.0).abs() < 1e-5 && (a.1 / b.1 - 1.0).abs() < 1e-5, "{a:?} {b:?}");
    let report = json(&out.join("two/report.json"));
    let fates = report["ledger"].as_array().unwrap();
    let line = fates.iter().find(|line| line["tensor"] == format!("{site}.weight")).unwrap();
    assert!(line["fate"] == "factored" && line["detail"].as_str().unwrap().starts_with("rank 64"));
    let two = out.join("two").display().to_string();
    let (code, stdout, _) = attar(&["verify", &two, "--source", &model()]);
    assert!(code == 0 && stdout.contains("verified"), "{stdout}");
    let (code, stdout, error) = attar(&["run", &two, "--prompt", "Once upon", "--tokens", "8"]);
    assert!(code == 0 && stdout.starts_with("Once upon"), "{stdout}{error}");
    let gguf = format!("{two}-gguf");
    let (code, _, error) = attar(&["convert", &two, "--layout", "f16", "--out", &gguf]);
    assert!(code == 2 && error.contains("merge = true"), "{error}");
    // It is no source of another compression, and says so.
    let (code, _, error) =
        attar(&["compress", &two, "--preset", "rtn-w4", "--out", &format!("{two}-again")]);
    assert!(code == 2 && error.contains("factored already"), "{error}");
}

#[test]
fn ranks_are_chosen_under_one_budget() {
    let dir = tempfile::tempdir().unwrap();
    let uniform = dir.path().join("uniform");
    let (code, _, error) =
        compress(&(step("svd_llm", "ratio = 0.3") + &emit("dense", "")), &uniform, &[]);
    assert_eq!(code, 0, "{error}");
    let parameters = |out: &Path| -> f64 {
        let ranks = json(&out.join("config.json"));
        let bytes = fs::read(out.join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let thin = |name: &String| name.contains(".down.") || name.contains(".up.");
        assert_eq!(ranks["low_rank"].as_object().unwrap().len(), 14);
        let names: Vec<String> = file.names().into_iter().map(str::to_owned).collect();
        let size = |name: &String| file.tensor(name).unwrap().shape().iter().product::<usize>();
        names.iter().filter(|name| thin(name)).map(|name| size(name) as f64).sum()
    };
    for (tag, options) in [
        ("shared", "ratio = 0.3\nshare = \"model\""),
        ("randomized", "ratio = 0.3\nshare = \"model\"\nsolver = \"randomized\""),
        ("fwsvd", "ratio = 0.3\nshare = \"model\""),
    ] {
        let out = dir.path().join(tag);
        let pass = if tag == "fwsvd" { "fwsvd" } else { "svd_llm" };
        let (code, _, error) = compress(&(step(pass, options) + &emit("dense", "")), &out, &[]);
        assert_eq!(code, 0, "{error}");
        let (ours, all) = (parameters(&out), 393_216.0);
        assert!(ours <= 0.7 * all && ours > 0.69 * all, "{ours}");
        let (found, other) = (judged(&out), judged(&uniform));
        assert!(tag == "fwsvd" || found.0 < 0.9 * other.0, "{found:?} {other:?}");
        let (code, stdout, error) = attar(&["reproduce", out.to_str().unwrap()]);
        assert_eq!(code, 0, "{stdout}{error}");
    }
    // Each site keeps what was asked for, and what follows sees the chosen ranks.
    let out = dir.path().join("energy");
    let recipe = step("svd", "energy = 0.6\nmultiple_of = 8")
        + &step("rtn", "scheme = { bits = 8, group_size = 8 }");
    let (code, _, error) = compress(&recipe, &out, &[]);
    assert_eq!(code, 0, "{error}");
    let ranks = json(&out.join("config.json"))["low_rank"].clone();
    let ranks: Vec<u64> = ranks.as_object().unwrap().values().filter_map(Value::as_u64).collect();
    assert!(ranks.iter().all(|rank| rank % 8 == 0) && ranks.iter().any(|rank| *rank != ranks[0]));
    let report = json(&out.join("report.json"));
    for entry in report["sites"].as_array().unwrap().iter().filter(|e| e["pass"] == "svd") {
        let events = entry["events"].as_array().unwrap();
        let kept = events.iter().find(|event| event["name"] == "energy kept").unwrap();
        assert!(kept["value"].as_f64().unwrap() >= 0.6, "{entry}");
    }
}

#[test]
fn each_knowledge_of_the_activations_helps() {
    let dir = tempfile::tempdir().unwrap();
    let found = ["svd", "asvd", "svd_llm"].map(|pass| {
        let out = dir.path().join(pass);
        let (code, _, error) =
            compress(&(step(pass, "ratio = 0.2") + &emit("dense", "")), &out, &[]);
        assert_eq!(code, 0, "{error}");
        judged(&out).1
    });
    assert!(found[0] > 1.1 * found[1] && found[1] > 1.2 * found[2], "{found:?}");
    // What the loss says of the weights.
    let out = dir.path().join("fwsvd");
    let (code, _, error) =
        compress(&(step("fwsvd", "ratio = 0.2") + &emit("dense", "")), &out, &[]);
    assert_eq!(code, 0, "{error}");
    let fwsvd = judged(&out).1;
    assert!(fwsvd < found[0] / 1.2 && fwsvd > found[2], "{fwsvd} {found:?}");
    let report = json(&out.join("report.json"));
    let bytes = |key: &str| report[key].as_u64().unwrap();
    assert!(bytes("measured_peak_bytes") <= bytes("predicted_peak_bytes"), "memory");
    // A second factor fitted to the stream mends what the first did not know.
    let out = dir.path().join("updated");
    let recipe = step("svd", "ratio = 0.2") + &step("svd_update", "") + &emit("dense", "");
    let (code, _, error) = compress(&recipe, &out, &[]);
    assert_eq!(code, 0, "{error}");
    assert!(judged(&out).1 < 0.8 * found[0]);
}

#[test]
fn quantized_factors_are_packed_and_verified() {
    let dir = tempfile::tempdir().unwrap();
    let measured = [("gptq", 4), ("rtn", 4), ("gptq", 8)].map(|(pass, bits)| {
        let out = dir.path().join(format!("{pass}{bits}"));
        let scheme = format!("scheme = {{ bits = {bits}, group_size = 16 }}");
        let recipe = step("svd_llm", SVD_LLM) + &step(pass, &scheme);
        let (code, _, error) = compress(&recipe, &out, &[]);
        assert_eq!(code, 0, "{error}");
        let path = out.display().to_string();
        let (_, stdout, _) = attar(&["verify", &path, "--source", &model()]);
        assert!(stdout.contains("28 quantized linears, 1 dense"), "{stdout}");
        assert!(stdout.contains("verified"), "{stdout}");
        let explained = attar(&["explain", &path, "layers.1.mlp.up_proj"]);
        assert!(explained.0 == 0 && explained.1.contains("rank 64"), "{}", explained.1);
        judged(&out).0
    });
    assert!(measured[0] < measured[1] && measured[2] < measured[0], "{measured:?}");
}

#[test]
fn a_correction_lies_beside_the_codes_and_is_run_with_them() {
    let dir = tempfile::tempdir().unwrap();
    let scheme = "scheme = { bits = 3, group_size = 128 }";
    let mut found = Vec::new();
    for (name, recipe) in [
        ("w3", step("gptq", scheme)),
        ("eora", step("gptq", scheme) + &step("eora", "rank = 8")),
        ("lorc", step("gptq", scheme) + &step("lorc", "rank = 8")),
        ("awq", step("awq", "") + &step("gptq", scheme)),
        ("folded", step("awq", "") + &step("gptq", scheme) + &step("eora", "rank = 8")),
    ] {
        let out = dir.path().join(name);
        let (code, _, error) = compress(&recipe, &out, &[]);
        assert_eq!(code, 0, "{error}");
        let path = out.display().to_string();
        let (code, stdout, _) = attar(&["verify", &path, "--source", &model()]);
        assert!(code == 0 && stdout.contains("14 quantized linears"), "{stdout}");
        found.push(judged(&out).0);
    }
    assert!(found[1] < 0.85 * found[0], "{found:?}");
    assert!(found[2] < found[0] && found[4] < 0.85 * found[3], "{found:?}");
    let adapter = dir.path().join("eora/adapter");
    let config = json(&adapter.join("adapter_config.json"));
    assert!(config["peft_type"] == "LORA" && config["r"] == 8 && config["lora_alpha"] == 8);
    let name = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight";
    assert_eq!(tensor(&adapter.join("adapter_model.safetensors"), name).0, [8, 384]);
    // The codes are those without the correction of this block's inputs: the first block's first linears.
    let codes = |name: &str| {
        let bytes = fs::read(dir.path().join(name).join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let packed = file.tensor("model.layers.0.self_attn.q_proj.weight_packed").unwrap();
        packed.data().to_vec()
    };
    assert_eq!(codes("w3"), codes("eora"));
    let eora = dir.path().join("eora").display().to_string();
    let gptq = format!("{eora}-gptq");
    let (code, _, error) = attar(&["convert", &eora, "--layout", "gptq", "--out", &gptq]);
    assert!(code == 2 && error.contains("correction in adapter/"), "{error}");
    let lorc = dir.path().join("lorc").display().to_string();
    let (code, stdout, _) = attar(&["diff", &eora, &lorc]);
    assert!(code == 1 && stdout.contains("lora_A"), "{stdout}");
    let (code, stdout, _) = attar(&["explain", &eora, "layers.0.mlp.down_proj"]);
    assert!(code == 0 && stdout.contains("lora_B.weight"), "{stdout}");
    // A flipped bit in the adapter is found, and an adapter that does not fit is not run.
    let weights = adapter.join("adapter_model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&weights, &bytes).unwrap();
    let path = dir.path().join("eora").display().to_string();
    let (code, stdout, _) = attar(&["verify", &path]);
    assert!(code == 1 && stdout.contains("adapter/adapter_model.safetensors"), "{stdout}");
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(4000)]).into_owned();
    let at = text.find("layers.0.mlp.down").unwrap();
    bytes[at + 7] = b'9';
    fs::write(&weights, bytes).unwrap();
    let (code, _, error) = attar(&["run", &path, "--prompt", "Once", "--tokens", "2"]);
    assert!(code == 2 && error.contains("no linear of this model"), "{error}");
}

#[test]
fn bytes_depend_neither_on_threads_nor_on_kills() {
    let dir = tempfile::tempdir().unwrap();
    let gptq = step("gptq", "scheme = { bits = 4, group_size = 16 }");
    for (tag, recipe) in [
        ("factors", step("svd_llm", SVD_LLM) + &gptq),
        (
            "update",
            step("svd_llm", "upstream = \"original\"")
                + &step("svd_update", "")
                + &emit("dense", ""),
        ),
        ("gradients", step("fwsvd", "ratio = 0.2") + &emit("dense", "")),
        ("correction", gptq.clone() + &step("eora", "rank = 4")),
    ] {
        let files = |out: &Path| {
            let adapter = fs::read(out.join("adapter/adapter_model.safetensors")).ok();
            let weights = fs::read(out.join("model.safetensors")).unwrap();
            (weights, fs::read(out.join("attar_manifest.json")).unwrap(), adapter)
        };
        let work = dir.path().join(format!("{tag}-work")).display().to_string();
        let mut all = Vec::new();
        for (run, extra) in [
            ("1", vec!["--threads", "1"]),
            ("2", vec!["--threads", "2", "--scratch", work.as_str()]),
            // Everything is taken back from the work directory.
            ("3", vec!["--threads", "2", "--scratch", work.as_str()]),
        ] {
            let out = dir.path().join(format!("{tag}-{run}"));
            let (code, _, error) = compress(&recipe, &out, &extra);
            assert_eq!(code, 0, "{error}");
            if run == "3" {
                let report = json(&out.join("report.json"));
                let reused = report["reused"].as_array().unwrap();
                assert!(reused[0] == reused[1] && reused[0].as_u64().unwrap() > 0, "{reused:?}");
            }
            all.push(files(&out));
        }
        assert!(all[0] == all[1] && all[1] == all[2], "{tag}");
        // Half of the results go; the rest is done again to the same bytes.
        let objects = fs::read_dir(Path::new(&work).join("objects")).unwrap();
        let mut objects: Vec<_> = objects.flatten().map(|entry| entry.path()).collect();
        objects.sort();
        let mut gone = 0;
        for object in objects.iter().step_by(2) {
            fs::remove_dir_all(object).unwrap();
            gone += 1;
        }
        assert!(gone > 0, "{tag}");
        let out = dir.path().join(format!("{tag}-4"));
        let (code, _, error) = compress(&recipe, &out, &["--scratch", &work]);
        assert_eq!(code, 0, "{error}");
        assert!(files(&out) == all[0], "{tag}");
    }
}

#[test]
fn what_nobody_could_read_is_refused_before_any_work() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let refuse = |recipe: &str, extra: &[&str], expected: &str| {
        let (code, _, error) = compress(recipe, &out, extra);
        assert!(code == 2 && error.contains(expected), "{expected}: {error}");
        assert!(!out.exists());
    };
    let (dense, w4) = (emit("dense", ""), step("rtn", "scheme = { bits = 4, group_size = -1 }"));
    refuse(&(step("svd", "rank = 65") + &dense), &[], "64 x 128 has ranks from 1 to 64");
    refuse(
        &(step("svd", "rank = 64") + &dense),
        &[],
        "the largest rank that makes it smaller is 42",
    );
    refuse(&(step("svd", "ratio = 1.2") + &dense), &[], "step[0].ratio: expected a fraction");
    refuse(&(step("svd", "sites = \"lm_head\"\nkeep = []") + &dense), &[], "the output head");
    refuse(
        &(step("fwsvd", "sites = \"lm_head\"\nkeep = []") + &dense),
        &[],
        "`keep` the output head",
    );
    refuse(&(step("eora", "") + &dense), &[], "cannot take weights that are float");
    refuse(&(step("svd", "") + &step("svd", "") + &dense), &[], "factored");
    refuse(&(step("svd", "") + &w4 + &emit("gptq", "")), &[], "know no factored linears");
    refuse(&(step("svd", "") + &w4 + &emit("q8_0", "")), &[], "know no factored linears");
    refuse(&(step("svd", "") + &w4 + &emit("dense", "merge = true")), &[], "product of quantized");
    refuse(&(w4.clone() + &emit("gptq", "merge = true")), &[], "no step makes any");
    refuse(
        &(w4.clone() + &step("lorc", "rank = 4") + &emit("q4_0", "")),
        &[],
        "no place for an adapter",
    );
    refuse(&(w4 + &step("lorc", "rank = 65") + &emit("gptq", "")), &[], "ranks from 1 to 64");
    let uneven = step("svd", "") + &step("rtn", "scheme = { bits = 4, group_size = 32 }");
    refuse(&uneven, &[], "q_proj.up (51)");
    refuse(&uneven, &[], "or give step[0] (svd), which chose these ranks, `multiple_of = 32`");
    let (code, _, error) = compress(&uneven.replace("svd\"\n", "svd\"\nrank = 20\n"), &out, &[]);
    assert!(code == 2 && error.contains("up (20)") && !error.contains("multiple_of"), "{error}");
    let ignored = step("rtn", "importance = true\nscheme = { bits = 4, group_size = 16 }");
    refuse(&(step("svd", "multiple_of = 16") + &ignored), &[], "would be ignored");
    refuse(&ignored, &[], "would be ignored");
    refuse(&(step("svd", "") + &dense), &["--target", "vllm"], "factored-linears");
    let folded = step("svd", "sites = \"*.up_proj\"")
        + &step("awq", "sites = \"*.down_proj\"")
        + &step("rtn", "sites = \"*.down_proj\"\nscheme = { bits = 4, group_size = 64 }");
    refuse(&folded, &[], "factored by step[0] (svd)");
    // What a step learned would be taken back.
    let learned = step("autoround", "scheme = { bits = 4, group_size = 64 }\nlogits = false");
    refuse(
        &(learned + &step("eora", "rank = 4") + &emit("gptq", "")),
        &[],
        "step[0] (autoround) has moved",
    );
}

#[test]
fn every_example_runs() {
    let dir = tempfile::tempdir().unwrap();
    let mut found = 0;
    for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("examples")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|end| end != "toml") {
            continue;
        }
        found += 1;
        let recipe = fs::read_to_string(&path).unwrap();
        let out = dir.path().join(found.to_string());
        let (code, _, error) = compress(&recipe, &out, &[]);
        assert_eq!(code, 0, "{}: {error}", path.display());
        let (code, stdout, _) = attar(&["verify", out.to_str().unwrap(), "--source", &model()]);
        assert_eq!(code, 0, "{}: {stdout}", path.display());
    }
    assert!(found >= 3, "{found}");
}
