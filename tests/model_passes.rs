//! Passes on the whole model from the command line: what they promise holds in the files.

use std::{fs, path::Path};

use serde_json::Value;

use super::{attar, data, model};

fn compress(recipe: &str, out: &Path, extra: &[&str]) -> (i32, String, String) {
    let file = out.with_extension("toml");
    fs::write(&file, recipe).unwrap();
    let (model, file, text) = (model(), file.display().to_string(), data("tinystories_calib.txt"));
    let (out, text) = (out.display().to_string(), text.display().to_string());
    let mut args = vec!["compress", &model, "--recipe", &file, "--out", &out, "--text", &text];
    args.extend(["--context", "256", "--samples", "12"]);
    args.extend(extra);
    attar(&args)
}

fn logits(path: &Path) -> Vec<f32> {
    let dir = tempfile::tempdir().unwrap();
    let dump = dir.path().join("first.logits");
    let (path, text) = (path.display().to_string(), data("tinystories_val.txt"));
    let (to, text) = (dump.display().to_string(), text.display().to_string());
    let mut args = vec!["eval", &path, "--text", &text, "--context", "256"];
    args.extend(["--max-windows", "2", "--dump-logits", &to, "--json"]);
    let (code, _, error) = attar(&args);
    assert_eq!(code, 0, "{error}");
    let bytes = fs::read(dump).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let data = tensors.tensor("logits").unwrap().data().to_vec();
    data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// `‖a − b‖ / ‖b‖`.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |values: &mut dyn Iterator<Item = f32>| {
        values.map(|v| f64::from(v) * f64::from(v)).sum::<f64>()
    };
    assert_eq!(a.len(), b.len());
    (square(&mut a.iter().zip(b).map(|(a, b)| a - b)) / square(&mut b.iter().copied())).sqrt()
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn a_rotated_model_computes_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let original = logits(&data("tinystories-656k"));
    for (name, options) in [
        ("hadamard", ""),
        ("orthogonal", "kind = \"orthogonal\""),
        ("values", "stream = false"),
        ("axes", "kind = \"pca\""),
    ] {
        let out = dir.path().join(name);
        let recipe = format!("[[step]]\npass = \"rotate\"\n{options}\n");
        let (code, _, error) = compress(&recipe, &out, &[]);
        assert_eq!(code, 0, "{error}");
        let far = distance(&logits(&out), &original);
        assert!(far < 1e-5, "{name}: {far:e}");
        let config = json(&out.join("config.json"));
        assert_eq!(config["tie_word_embeddings"], name == "values", "{name}");
        let (code, stdout, error) =
            attar(&["verify", &out.display().to_string(), "--source", &model()]);
        assert_eq!(code, 0, "{stdout}{error}");
    }
    // Another basis, another rounding: the seed reaches the bytes, threads do not.
    let recipe = "[[step]]\npass = \"rotate\"\n[[step]]\npass = \"rtn\"\nscheme = { bits = 4 }\n";
    let bytes = |name: &str, extra: &[&str]| {
        let out = dir.path().join(name);
        let (code, _, error) = compress(recipe, &out, extra);
        assert_eq!(code, 0, "{error}");
        fs::read(out.join("model.safetensors")).unwrap()
    };
    let one = bytes("one", &["--threads", "1"]);
    assert!(one == bytes("two", &["--threads", "2"]));
    assert!(one != bytes("other", &["--seed", "1"]));
}

#[test]
fn the_least_principal_axes_of_the_stream_are_cut_better_than_channels() {
    let dir = tempfile::tempdir().unwrap();
    let cut = "[[step]]\npass = \"prune_hidden\"\nratio = 0.25\n[[emit]]\nlayout = \"dense\"\n";
    let axes = format!("[[step]]\npass = \"rotate\"\nkind = \"pca\"\nvalues = false\n{cut}");
    let original = logits(&data("tinystories-656k"));
    let make = |name: &str, recipe: &str, threads: &str| {
        let out = dir.path().join(name);
        let (code, _, error) = compress(recipe, &out, &["--threads", threads]);
        assert_eq!(code, 0, "{error}");
        out
    };
    let (plain, turned) = (make("plain", cut, "2"), make("turned", &axes, "2"));
    let (far, near) = (distance(&logits(&plain), &original), distance(&logits(&turned), &original));
    assert!(near < 0.8 * far, "{far} -> {near}");
    let report = json(&turned.join("report.json"));
    let peak = |key: &str| report[key].as_u64().unwrap();
    assert!(peak("measured_peak_bytes") <= peak("predicted_peak_bytes"));
    // Axes come in the order of their energy, which is nearly that of their mean absolute values.
    let removed = report["model"][1]["removed"].as_array().unwrap();
    let last = removed.iter().filter(|axis| axis.as_u64().unwrap() >= 96).count();
    assert!(removed.len() == 32 && last >= 28, "{removed:?}");
    let bytes = |out: &Path| fs::read(out.join("model.safetensors")).unwrap();
    assert!(bytes(&turned) == bytes(&make("one", &axes, "1")));
    let recipe = dir.path().join("recipe.toml");
    fs::write(&recipe, &axes).unwrap();
    let (code, _, error) = attar(&["plan", &model(), "--recipe", &recipe.display().to_string()]);
    assert!(code == 2 && error.contains("calibration"), "{error}");
}

#[test]
fn a_pruned_model_has_the_shapes_that_were_planned_and_the_update_lowers_its_error() {
    let dir = tempfile::tempdir().unwrap();
    for (pass, options, expected) in [
        ("prune_ffn", "ratio = 0.25\nmultiple_of = 32", ("intermediate_size", 288)),
        ("prune_kv_groups", "ratio = 0.25", ("num_attention_heads", 6)),
        ("prune_heads", "ratio = 0.5", ("num_attention_heads", 4)),
    ] {
        let mut errors = Vec::new();
        for update in [true, false] {
            let out = dir.path().join(format!("{pass}-{update}"));
            let recipe = format!("[[step]]\npass = \"{pass}\"\n{options}\nupdate = {update}\n");
            let (code, _, error) = compress(&recipe, &out, &[]);
            assert_eq!(code, 0, "{pass}: {error}");
            let config = json(&out.join("config.json"));
            assert_eq!(config[expected.0], expected.1, "{pass}");
            let report = json(&out.join("report.json"));
            let lines = report["model"].as_array().unwrap();
            assert_eq!(lines.len(), 2, "{pass}: one line for each block");
            errors.push(lines[0]["output_error"].as_f64().unwrap());
            let (code, stdout, error) =
                attar(&["verify", &out.display().to_string(), "--source", &model()]);
            assert_eq!(code, 0, "{pass}: {stdout}{error}");
            assert!(logits(&out).iter().all(|v| v.is_finite()));
        }
        assert!(errors[0] < errors[1], "{pass}: {errors:?}");
    }
}

#[test]
fn what_is_ranked_by_slopes_of_the_loss_is_planned_and_does_not_depend_on_threads() {
    let dir = tempfile::tempdir().unwrap();
    let mut removed = Vec::new();
    for (at, (pass, options)) in [
        ("prune_ffn", "importance = \"taylor\"\nmultiple_of = 32"),
        ("prune_ffn", "importance = \"taylor_elements\"\nmultiple_of = 32"),
        ("prune_ffn", "multiple_of = 32"),
        ("prune_kv_groups", "ratio = 0.25\nimportance = \"taylor\""),
        ("prune_heads", "ratio = 0.5\nimportance = \"taylor_elements\""),
        ("prune_hidden", "importance = \"taylor\"\nmultiple_of = 16"),
    ]
    .into_iter()
    .enumerate()
    {
        let recipe = format!("[[step]]\npass = \"{pass}\"\n{options}\n");
        let run = |threads: &str| {
            let out = dir.path().join(format!("{at}-{threads}"));
            let (code, _, error) = compress(&recipe, &out, &["--threads", threads]);
            assert_eq!(code, 0, "{recipe}: {error}");
            out
        };
        let (one, two) = (run("1"), run("2"));
        let bytes = |out: &Path| fs::read(out.join("model.safetensors")).unwrap();
        assert!(bytes(&one) == bytes(&two), "{recipe}");
        let report = json(&one.join("report.json"));
        removed.push(report["model"][0]["removed"].clone());
        let (code, stdout, error) =
            attar(&["verify", &one.display().to_string(), "--source", &model()]);
        assert_eq!(code, 0, "{recipe}: {stdout}{error}");
    }
    // Each ranking has its own answer.
    assert!(removed[0] != removed[1] && removed[0] != removed[2] && removed[1] != removed[2]);
    let file = dir.path().join("r.toml");
    let recipe = "[[step]]\npass = \"prune_ffn\"\nimportance = \"taylor\"\n";
    fs::write(&file, recipe).unwrap();
    let plan = |recipe: &str, extra: &[&str]| {
        fs::write(&file, recipe).unwrap();
        let text = data("tinystories_calib.txt").display().to_string();
        let file = file.display().to_string();
        let model = model();
        let mut args = vec!["plan", &model, "--recipe", &file, "--text", &text, "--samples", "16"];
        args.extend(extra);
        attar(&args)
    };
    let (code, with, error) = plan(recipe, &["--context", "64"]);
    assert!(code == 0 && with.contains("ranked by slopes of the loss"), "{with}{error}");
    let (code, _, error) = plan(recipe, &["--context", "1"]);
    assert!(
        code == 2 && error.contains("slopes of the loss need windows of two tokens"),
        "{error}"
    );
}

#[test]
fn blocks_and_channels_of_the_whole_model_go() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("depth");
    let recipe = "[[step]]\npass = \"prune_depth\"\nby = \"loss\"\n\
                  [[step]]\npass = \"prune_hidden\"\nratio = 0.25\n\
                  [[step]]\npass = \"rtn\"\nscheme = { bits = 8, group_size = 32 }\n";
    let (code, _, error) = compress(recipe, &out, &[]);
    assert_eq!(code, 0, "{error}");
    let config = json(&out.join("config.json"));
    assert_eq!((&config["num_hidden_layers"], &config["hidden_size"]), (&1.into(), &96.into()));
    // The width of a head no longer follows from the others.
    assert_eq!(config["head_dim"], 16);
    let report = json(&out.join("report.json"));
    let what: Vec<_> = report["model"].as_array().unwrap().iter().map(|e| &e["what"]).collect();
    assert_eq!(what, ["blocks", "hidden"]);
    let (code, stdout, error) =
        attar(&["verify", &out.display().to_string(), "--source", &model()]);
    assert_eq!(code, 0, "{stdout}{error}");
    // What is left of a tensor is told: which block it was, and by what it was changed.
    let tensor = "model.layers.0.input_layernorm.weight";
    let (code, stdout, error) = attar(&["explain", &out.display().to_string(), tensor]);
    assert_eq!(code, 0, "{error}");
    assert!(
        stdout.contains("changed by step[0] (prune_depth), step[1] (prune_hidden)"),
        "{stdout}"
    );
    let lines = report["ledger"].as_array().unwrap();
    let dropped = lines.iter().filter(|line| line["fate"] == "dropped").count();
    assert_eq!(dropped, 9, "every tensor of the block that went");
    for text in [&report["predicted_peak_bytes"], &report["measured_peak_bytes"]] {
        assert!(text.as_u64().unwrap() > 0);
    }
    assert!(report["measured_peak_bytes"].as_u64() <= report["predicted_peak_bytes"].as_u64());
    // The same recipe again, as the manifest tells it.
    let again = dir.path().join("again");
    let (code, _, error) = compress(recipe, &again, &["--threads", "1"]);
    assert_eq!(code, 0, "{error}");
    for file in ["model.safetensors", "attar_manifest.json"] {
        assert!(fs::read(out.join(file)).unwrap() == fs::read(again.join(file)).unwrap(), "{file}");
    }
}

#[test]
fn what_cannot_be_reshaped_is_refused_before_any_work() {
    let dir = tempfile::tempdir().unwrap();
    let rtn = "[[step]]\npass = \"rtn\"\nscheme = { bits = 4 }\n";
    for (at, (recipe, expected)) in [
        (
            format!("{rtn}[[step]]\npass = \"prune_ffn\"\n"),
            "step[1] (prune_ffn): works on the whole model",
        ),
        ("[[step]]\npass = \"prune_ffn\"\nratio = 1.5\n".into(), "between 0 and 1"),
        ("[[step]]\npass = \"prune_ffn\"\nratio = 0.01\n".into(), "leaves 384"),
        ("[[step]]\npass = \"prune_kv_groups\"\nratio = 0.1\n".into(), "leaves 4"),
        ("[[step]]\npass = \"prune_heads\"\nratio = 0.1\n".into(), "equally many of each of 4"),
        ("[[step]]\npass = \"prune_depth\"\nblocks = 2\n".into(), "expected 1 to 1"),
        (format!("[[step]]\npass = \"prune_ffn\"\nratio = 0.25\nmultiple_of = 32\n{rtn}"), "288"),
        ("[[step]]\npass = \"rotate\"\nsites = \"mlp.*\"\n".into(), "leave `sites` away"),
        ("[[step]]\npass = \"rotate\"\nstream = false\nvalues = false\n".into(), "neither"),
        ("[[step]]\npass = \"rotate\"\n[[emit]]\nlayout = \"gptq\"\n".into(), "layout gptq"),
        ("[[step]]\npass = \"prune_ffn\"\npercdamp = -1.0\n".into(), "percdamp"),
        ("[[step]]\npass = \"prune_ffn\"\nimportance = \"slope\"\n".into(), "taylor_elements"),
        (
            "[[step]]\npass = \"prune_hidden\"\nimportance = \"taylor_elements\"\n".into(),
            "`activation` or `taylor`",
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let out = dir.path().join(at.to_string());
        let (code, _, error) = compress(&recipe, &out, &[]);
        assert_eq!(code, 2, "{recipe}: {error}");
        assert!(error.contains(expected), "{recipe}: {error}");
        assert!(!out.exists() && !out.with_extension("scratch").exists());
    }
    let out = dir.path().join("text").display().to_string();
    let file = dir.path().join("r.toml");
    fs::write(&file, "[[step]]\npass = \"prune_ffn\"\n").unwrap();
    let file = file.display().to_string();
    let (code, _, error) = attar(&["compress", &model(), "--recipe", &file, "--out", &out]);
    assert!(code == 2 && error.contains("needs calibration data"), "{error}");
}

/// A checkpoint that says less: bf16, biases on q, k and v, an output head of its own.
fn qwen2(to: &Path) {
    let bytes = fs::read(data("tinystories-656k").join("model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut made: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    let bf16 = |data: &[u8]| -> Vec<u8> {
        let floats = data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
        floats.flat_map(|v| half::bf16::from_f32(v).to_le_bytes()).collect()
    };
    for (name, view) in tensors.tensors() {
        made.push((name.clone(), view.shape().to_vec(), bf16(view.data())));
        if name == "lm_head.weight" {
            let embedding = "model.embed_tokens.weight".to_owned();
            made.push((embedding, view.shape().to_vec(), bf16(view.data())));
        }
        for part in ["q_proj", "k_proj", "v_proj"] {
            if let Some(stem) = name.strip_suffix(&format!("{part}.weight")) {
                let rows = view.shape()[0];
                let bias: Vec<u8> = (0..rows)
                    .flat_map(|i| half::bf16::from_f32((i as f32).sin() * 0.3).to_le_bytes())
                    .collect();
                made.push((format!("{stem}{part}.bias"), vec![rows], bias));
            }
        }
    }
    fs::create_dir_all(to).unwrap();
    let views = made.iter().map(|(name, shape, data)| {
        let dtype = safetensors::Dtype::BF16;
        let view = safetensors::tensor::TensorView::new(dtype, shape.clone(), data).unwrap();
        (name.as_str(), view)
    });
    safetensors::serialize_to_file(views, None, &to.join("model.safetensors")).unwrap();
    let mut config = json(&data("tinystories-656k").join("config.json"));
    config["model_type"] = "qwen2".into();
    config["tie_word_embeddings"] = false.into();
    fs::write(to.join("config.json"), config.to_string()).unwrap();
    let tokenizer = data("tinystories-656k").join("tokenizer.json");
    fs::copy(tokenizer, to.join("tokenizer.json")).unwrap();
}

#[test]
fn biases_and_heads_of_their_own_follow_in_their_dtype() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("qwen2");
    qwen2(&source);
    let original = logits(&source);
    let run = |name: &str, recipe: &str| {
        let (out, file) = (dir.path().join(name), dir.path().join(format!("{name}.toml")));
        fs::write(&file, recipe).unwrap();
        let (model, file) = (source.display().to_string(), file.display().to_string());
        let (to, text) = (out.display().to_string(), data("tinystories_calib.txt"));
        let text = text.display().to_string();
        let mut args = vec!["compress", &model, "--recipe", &file, "--out", &to, "--text", &text];
        args.extend(["--context", "256", "--samples", "12"]);
        let (code, _, error) = attar(&args);
        assert_eq!(code, 0, "{name}: {error}");
        let (code, stdout, error) = attar(&["verify", &to, "--source", &model]);
        assert_eq!(code, 0, "{name}: {stdout}{error}");
        let bytes = fs::read(out.join("model.safetensors")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        for (tensor, view) in tensors.tensors() {
            assert_eq!(view.dtype(), safetensors::Dtype::BF16, "{tensor}");
        }
        distance(&logits(&out), &original)
    };
    // bf16 rounds every turned weight once.
    let far = run("rotate", "[[step]]\npass = \"rotate\"\n");
    assert!(far < 2e-2, "{far}");
    let with = run("groups", "[[step]]\npass = \"prune_kv_groups\"\nratio = 0.25\n");
    let without =
        run("plain", "[[step]]\npass = \"prune_kv_groups\"\nratio = 0.25\nupdate = false\n");
    assert!(with < without && with > 0.01, "{with} {without}");
    // Little of the stream goes: what the norms put out keeps its size.
    let hidden = "[[step]]\npass = \"prune_hidden\"\nratio = 0.0625\nmultiple_of = 8\n";
    let far = run("hidden", hidden);
    assert!(far < 0.9, "{far}");
}
