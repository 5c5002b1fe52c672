//! The command line as scripts use it, on the demo model.
#![allow(clippy::unwrap_used, reason = "a test may stop anywhere")]

mod bundle;
mod distill;
mod distill_model;
mod gguf;
mod headers;
mod imatrix;
mod lowrank;
mod memory;
mod model_passes;
mod provenance;
mod pruning;
mod refusals;
mod resume;
mod targets;
mod w8a8;

use std::{
    fs,
    path::{Path, PathBuf},
};

use assert_cmd::Command;
use serde_json::Value;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn attar(args: &[&str]) -> (i32, String, String) {
    let output = Command::cargo_bin("attar").unwrap().args(args).output().unwrap();
    (
        output.status.code().unwrap_or(-1),
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

fn model() -> String {
    data("tinystories-656k").display().to_string()
}

fn compress(preset: &str, out: &Path, extra: &[&str]) -> (i32, String, String) {
    let (model, text) = (model(), data("tinystories_calib.txt").display().to_string());
    let out = out.display().to_string();
    let mut args = vec!["compress", &model, "--preset", preset, "--out", &out];
    args.extend(["--text", &text, "--context", "256", "--samples", "12"]);
    args.extend(extra);
    attar(&args)
}

#[test]
fn threads_and_repetition_do_not_change_a_byte() {
    let dir = tempfile::tempdir().unwrap();
    for preset in ["gptq-w3", "awq-w4"] {
        let mut all = Vec::new();
        for (run, threads) in [("a", "1"), ("b", "2"), ("c", "2")] {
            let out = dir.path().join(format!("{preset}-{run}"));
            let (code, _, error) = compress(preset, &out, &["--threads", threads]);
            assert_eq!(code, 0, "{error}");
            let manifest = fs::read(out.join("attar_manifest.json")).unwrap();
            all.push((fs::read(out.join("model.safetensors")).unwrap(), manifest));
        }
        assert!(all[0] == all[1] && all[1] == all[2], "{preset}");
    }
}

#[test]
fn every_layout_measures_the_same_and_verifies() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let layouts = ["--layout", "compressed-tensors", "--layout", "gptq", "--layout", "awq"];
    let (code, _, error) = compress("gptq-w4", &out, &layouts);
    assert_eq!(code, 0, "{error}");
    let text = data("tinystories_val.txt").display().to_string();
    let mut seen = Vec::new();
    for layout in ["compressed-tensors", "gptq", "awq"] {
        let path = out.join(layout).display().to_string();
        let (code, stdout, error) = attar(&["verify", &path, "--source", &model()]);
        assert_eq!(code, 0, "{stdout}{error}");
        let windows = ["--context", "256", "--max-windows", "8", "--json"];
        let mut args = vec!["eval", &path, "--text", &text, "--reference"];
        let source = model();
        args.push(&source);
        args.extend(windows);
        let (code, stdout, error) = attar(&args);
        assert_eq!(code, 0, "{error}");
        let json: Value = serde_json::from_str(&stdout).unwrap();
        assert!(json["kl_mean"].as_f64().unwrap() < 0.2);
        assert!(json["bits_per_weight"].as_f64().unwrap() < 4.6);
        seen.push(json["perplexity"].as_f64().unwrap());
        let report = dir.path().join(format!("{layout}.json"));
        fs::write(&report, &stdout).unwrap();
        let report = report.display().to_string();
        let policy = dir.path().join("policy.toml");
        for (limit, expected) in [("1.5", 0), ("1.0001", 1)] {
            fs::write(&policy, format!("max_perplexity_ratio = {limit}")).unwrap();
            let (code, ..) = attar(&["gate", &report, "--policy", policy.to_str().unwrap()]);
            assert_eq!(code, expected);
        }
        fs::write(&policy, "max_bytes_ratio = 0.9\nmax_kl = 1.0").unwrap();
        assert_eq!(attar(&["gate", &report, "--policy", policy.to_str().unwrap()]).0, 2);
    }
    assert!((seen[0] - seen[1]).abs() < 1e-3 && (seen[1] - seen[2]).abs() < 1e-3, "{seen:?}");
    // One flipped bit is found.
    let weights = out.join("gptq/model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&weights, bytes).unwrap();
    assert_eq!(attar(&["verify", out.join("gptq").to_str().unwrap()]).0, 1);
}

#[test]
fn what_can_be_known_early_is_an_error_early() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let refuse = |result: (i32, String, String), expected: &str| {
        assert_eq!(result.0, 2, "{expected}: {}", result.2);
        assert!(result.2.contains(expected), "{expected}: {}", result.2);
        assert!(!out.exists());
    };
    refuse(compress("gptq-w3", &out, &["--layout", "awq"]), "awq");
    refuse(compress("gptq-w4", &out, &["--group", "96"]), "96");
    refuse(compress("gtpq-w4", &out, &[]), "gptq-w4");
    let (model, path) = (model(), out.display().to_string());
    refuse(attar(&["compress", &model, "--preset", "gptq-w4", "--out", &path]), "calibration");
    let recipe = dir.path().join("recipe.toml");
    fs::write(&recipe, "[[step]]\npass = \"rtn\"\nschem = { bits = 4 }\n").unwrap();
    let recipe = recipe.display().to_string();
    refuse(attar(&["compress", &model, "--recipe", &recipe, "--out", &path]), "schem");
    let below_a_file = Path::new(&recipe).join("out");
    assert_eq!(compress("rtn-w4", &below_a_file, &[]).0, 2);
    let short = dir.path().join("short.txt");
    fs::write(&short, "Once upon a time.").unwrap();
    let short = short.display().to_string();
    let args = ["compress", &model, "--preset", "gptq-w4", "--out", &path, "--text", &short];
    refuse(attar(&args), "fewer than one window");
}

#[test]
fn text_is_generated_through_the_packed_kernels() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    assert_eq!(compress("rtn-w8", &out, &[]).0, 0);
    let args = ["--prompt", "Once upon a time", "--tokens", "12"];
    let generate = |path: &str| {
        let mut all = vec!["run", path];
        all.extend(args);
        let (code, stdout, error) = attar(&all);
        assert_eq!(code, 0, "{error}");
        stdout
    };
    let (packed, dense) = (generate(out.to_str().unwrap()), generate(&model()));
    assert!(packed.starts_with("Once upon a time") && dense.len() > 20, "{packed}{dense}");
}

#[test]
fn speeds_name_kernels_and_their_tolerance() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    assert_eq!(compress("rtn-w4", &out, &[]).0, 0);
    let path = out.to_str().unwrap();
    let json = |args: &[&str]| -> Value {
        let (code, stdout, error) = attar(args);
        assert_eq!(code, 0, "{error}");
        serde_json::from_str(&stdout).unwrap()
    };
    let run = |activations: &str| {
        json(&["run", path, "--bench", "40,3", "--json", "--activations", activations])
    };
    for (activations, tolerance) in [("int8", 1.2e-2), ("f32", 10f64.powf(-5.5))] {
        let run = run(activations);
        assert_eq!(run["activations"], activations);
        assert!((run["relative_error_tolerance"].as_f64().unwrap() / tolerance - 1.0).abs() < 1e-9);
        for (what, tokens) in [("prefill", 40), ("decode", 3)] {
            assert_eq!(run[what]["tokens"], tokens);
            assert!(run[what]["tokens_per_second"].as_f64().unwrap() > 0.0);
        }
        let kernels = run["kernels"].as_object().unwrap();
        let fast = kernels.keys().filter(|name| name.ends_with("-int8")).count();
        assert_eq!(fast, usize::from(activations == "int8"), "{kernels:?}");
    }
    let bench =
        json(&["bench", path, "--m", "1,33", "--rotate", "1MiB", "--seconds", "0", "--json"]);
    assert!(bench["roofline"]["read_gb_per_s"].as_f64().unwrap() > 0.0);
    let lines = bench["lines"].as_array().unwrap();
    let chosen: Vec<_> = lines.iter().filter(|line| line["chosen"] == true).collect();
    assert!(!chosen.is_empty() && chosen.len() < lines.len(), "{lines:?}");
    assert!(lines.iter().all(|line| line["microseconds"].as_f64().unwrap() > 0.0));
    let (code, _, error) = attar(&["run", path, "--bench", "40"]);
    assert!(code == 2 && error.contains("PREFILL,DECODE"), "{error}");
}

#[test]
fn unsafe_code_stays_in_its_rooms() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut folders: Vec<PathBuf> =
        ["src", "tensor", "ir", "formats", "model", "quant", "prune", "lowrank", "distill", "eval"]
            .map(|f| root.join(f))
            .into();
    // Maps of files, permission to use tile registers, products on them.
    let rooms = [
        "formats/src/mmap.rs",
        "tensor/src/linalg/isa.rs",
        "tensor/src/linalg/tiles/pack.rs",
        "tensor/src/linalg/tiles/register.rs",
        "tensor/src/linalg/tiles/mod.rs",
    ]
    .map(|f| root.join(f));
    let mut seen = 0;
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") && !rooms.contains(&path) {
                seen += 1;
                let text = fs::read_to_string(&path).unwrap();
                let bad = text.contains("unsafe {") || text.contains("unsafe fn");
                assert!(!bad, "{}", path.display());
            }
        }
    }
    assert!(seen > 30);
}
