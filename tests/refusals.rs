//! Bad input from the command line: exit code 2, a message that names the place, nothing left behind.

use std::{fs, path::Path};

use crate::{attar, data};

/// A copy of the demo model that a test may damage.
pub(crate) fn copy(to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(data("tinystories-656k")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

fn refused(model: &Path, extra: &[&str], expected: &[&str]) {
    let out = model.with_extension("out");
    let (model, out_text) = (model.display().to_string(), out.display().to_string());
    let mut args = vec!["compress", &model, "--out", &out_text];
    args.extend(if extra.is_empty() { &["--preset", "rtn-w4"] } else { extra });
    let (code, _, error) = attar(&args);
    assert_eq!(code, 2, "{expected:?}: {error}");
    for part in expected {
        assert!(error.contains(part), "wanted {part:?} in: {error}");
    }
    assert!(!error.contains("panicked"), "{error}");
    assert!(!out.exists() && !out.with_extension("out.partial").exists(), "{error}");
}

#[test]
fn damaged_checkpoints_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    let weights = model.join("model.safetensors");
    let fresh = || {
        let _ = fs::remove_dir_all(&model);
        copy(&model);
    };
    fresh();
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() - 100]).unwrap();
    refused(&model, &[], &["model.safetensors", "truncated"]);
    fs::write(&weights, &bytes[..5]).unwrap();
    refused(&model, &[], &["truncated"]);
    // A NaN in a weight: named with its index, and the half-written output is gone.
    let mut damaged = bytes.clone();
    let at = damaged.len() - 40_000;
    damaged[at / 4 * 4 - 4..at / 4 * 4].copy_from_slice(&f32::NAN.to_le_bytes());
    damaged[at - 8..at + 8].fill(0xff);
    fs::write(&weights, &damaged).unwrap();
    refused(&model, &[], &["NaN", "flat index"]);
    let (code, _, error) =
        attar(&["run", model.to_str().unwrap(), "--prompt", "a", "--tokens", "2"]);
    assert!(code == 2 && error.contains("NaN"), "{error}");
    fresh();
    fs::remove_file(&weights).unwrap();
    refused(&model, &[], &["has neither model.safetensors"]);
    fs::write(model.join("pytorch_model.bin"), [0u8; 8]).unwrap();
    refused(&model, &[], &["pytorch_model.bin", "damaged or truncated", "ask its publisher"]);

    fresh();
    let config = fs::read_to_string(model.join("config.json")).unwrap();
    let with = |from: &str, to: &str| {
        assert!(config.contains(from));
        fs::write(model.join("config.json"), config.replace(from, to)).unwrap();
    };
    with("\"llama\"", "\"mamba9\"");
    refused(&model, &[], &["mamba9", "llama"]);
    with("  \"num_hidden_layers\": 2,\n", "");
    refused(&model, &[], &["num_hidden_layers"]);
    with("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3");
    refused(&model, &[], &["model.layers.2", "missing"]);
    with("\"intermediate_size\": 384", "\"intermediate_size\": 512");
    refused(&model, &[], &["shape"]);
    with("{", "{{");
    refused(&model, &[], &["config.json", "not JSON"]);
}

#[test]
fn calibration_that_cannot_serve_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    copy(&model);
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let preset = ["--preset", "gptq-w4", "--context", "64"];
    let with = |flag: &str, path: &str, expected: &[&str]| {
        refused(&model, &[&preset[..], &[flag, path]].concat(), expected);
    };
    with("--text", &file("empty.txt", ""), &["0 tokens", "--context"]);
    with("--text", "absent.txt", &["absent.txt"]);
    with("--ids", &file("none.jsonl", "\n"), &["holds no window"]);
    with("--ids", &file("bad.jsonl", "{\"ids\": [1, 2]}\n"), &["line 1", "input_ids"]);
    // Ids of another model's vocabulary.
    with(
        "--ids",
        &file("wrong.jsonl", "{\"input_ids\": [5, 70000]}\n"),
        &["70000", "2048", "tokenizer"],
    );
    fs::remove_file(model.join("tokenizer.json")).unwrap();
    with("--text", &file("some.txt", "Once upon a time"), &["tokenizer.json"]);
}

#[test]
fn recipe_typos_suggest_the_nearest_key_and_odd_groups_are_all_listed() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    copy(&model);
    let recipe = dir.path().join("r.toml");
    for (text, expected) in [
        ("[[step]]\npass = \"gtpq\"\n", vec!["gtpq", "gptq"]),
        ("[[step]]\npass = \"rtn\"\nscheme = { bit = 4 }\n", vec!["bit", "bits"]),
        ("[[stpe]]\npass = \"rtn\"\n", vec!["stpe", "step"]),
        (
            "[[step]]\npass = \"rtn\"\nsites = \"attn.*\"\nscheme = { bits = 4 }\n",
            vec!["attn.*", "matches"],
        ),
        (
            "[[step]]\npass = \"rtn\"\nscheme = { bits = 4, group_size = 96 }\n",
            vec!["q_proj", "down_proj", "96", "128"],
        ),
    ] {
        fs::write(&recipe, text).unwrap();
        let path = recipe.display().to_string();
        if expected.contains(&"down_proj") {
            // 96 divides 384: only the sites where it does not are listed.
            let (code, _, error) =
                attar(&["plan", &model.display().to_string(), "--recipe", &path]);
            assert_eq!(code, 2);
            assert!(error.contains("q_proj") && error.contains("up_proj"), "{error}");
            assert!(!error.contains("down_proj"), "{error}");
            continue;
        }
        refused(&model, &["--recipe", &path], &expected);
    }
}

#[cfg(unix)]
#[test]
fn an_output_that_cannot_be_written_is_refused_before_any_work() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    copy(&model);
    let file = dir.path().join("file");
    fs::write(&file, "mine").unwrap();
    let run = |out: &Path| {
        let (model, out) = (model.display().to_string(), out.display().to_string());
        attar(&["compress", &model, "--preset", "rtn-w4", "--out", &out])
    };
    assert_eq!(run(&file).0, 2);
    assert_eq!(run(&file.join("below")).0, 2);
    assert_eq!(fs::read_to_string(&file).unwrap(), "mine");
    let full = dir.path().join("full");
    fs::create_dir(&full).unwrap();
    fs::write(full.join("keep"), "mine").unwrap();
    let (code, _, error) = run(&full);
    assert!(code == 2 && error.contains("not empty") && full.join("keep").exists(), "{error}");
    // Root may write anywhere else, so a filesystem that refuses everyone stands for read-only places.
    if Path::new("/proc/self").exists() {
        let (code, _, error) = run(Path::new("/proc/attar-out"));
        assert!(code == 2 && error.contains("/proc/attar-out"), "{error}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn output_that_is_lost_is_no_success() {
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_attar"));
    let status = command.arg("passes").stdout(full).stderr(std::process::Stdio::null());
    assert_eq!(status.status().unwrap().code(), Some(2));
}

#[test]
fn a_machine_without_a_gpu_is_told_what_is_missing() {
    let model = data("tinystories-656k").display().to_string();
    let (code, text, error) = attar(&["verify", &model, "--backend", "cuda"]);
    // Where there is a GPU, every kernel is run on the shared cases.
    if code == 0 {
        assert!(text.contains("attar_decode_w4_f16_8") && text.contains("verified"), "{text}");
    } else {
        assert_eq!(code, 2, "{text}{error}");
        assert!(error.contains("driver") || error.contains("compute capability"), "{error}");
        assert!(!error.contains("panicked"), "{error}");
    }
}
