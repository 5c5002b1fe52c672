//! Distillation of a whole model from the command line, on the demo model: it learns, the same bytes come out however it is
//! run, and what cannot be is refused before any work.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use safetensors::SafeTensors;
use serde_json::Value;

use super::{attar, data, model};

fn arguments(recipe: &str, out: &Path, extra: &[&str]) -> Vec<String> {
    let file = out.with_extension("toml");
    fs::write(&file, recipe).unwrap();
    let text = data("tinystories_calib.txt").display().to_string();
    let mut all: Vec<String> =
        ["compress", &model(), "--text", &text, "--recipe"].iter().map(|&a| a.to_owned()).collect();
    all.extend([file.display().to_string(), "--out".into(), out.display().to_string()]);
    all.extend(["--context", "128", "--samples", "40"].map(str::to_owned));
    all.extend(extra.iter().map(|&a| a.to_owned()));
    all
}

fn run(recipe: &str, out: &Path, extra: &[&str]) -> (i32, String) {
    let arguments = arguments(recipe, out, extra);
    let (code, _, error) = attar(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    (code, error)
}

/// Mean KL divergence of an artifact from the original on held-out text, nats.
fn kl(out: &Path) -> f64 {
    let text = data("tinystories_val.txt").display().to_string();
    let (out, model) = (out.display().to_string(), model());
    let args = ["eval", &out, "--reference", &model, "--text", &text, "--context", "128"];
    let args: Vec<&str> = args.into_iter().chain(["--max-windows", "24", "--json"]).collect();
    let (code, stdout, error) = attar(&args);
    assert_eq!(code, 0, "{error}");
    let value: Value = serde_json::from_str(&stdout).unwrap();
    let found = value["kl_mean"].as_f64().or_else(|| value["eval"]["kl_mean"].as_f64());
    found.or_else(|| value["kl_mean"]["value"].as_f64()).unwrap_or_else(|| panic!("{stdout}"))
}

fn weights(out: &Path) -> Vec<u8> {
    fs::read(out.join("model.safetensors")).unwrap()
}

const CUT: &str = "[[step]]\npass = \"prune_ffn\"\nratio = 0.5\n";

fn distill(options: &str) -> String {
    format!("[[step]]\npass = \"distill\"\n{options}\n")
}

#[test]
fn a_cut_model_learns_back_what_it_knew_by_every_loss() {
    let dir = tempfile::tempdir().unwrap();
    let of = |name: &str, recipe: &str| {
        let out = dir.path().join(name);
        let (code, error) = run(recipe, &out, &[]);
        assert_eq!(code, 0, "{name}: {error}");
        (kl(&out), out)
    };
    let (before, _) = of("cut", CUT);
    for (name, options, most) in [
        ("forward", "batch = 4\nepochs = 3\nrate = 3e-3", 0.9),
        ("reverse", "batch = 4\nepochs = 3\nrate = 3e-3\nloss = \"reverse_kl\"", 0.95),
        ("js", "batch = 4\nepochs = 3\nrate = 3e-3\nloss = \"jensen_shannon\"\nbeta = 0.3", 0.9),
        (
            "mixed",
            "batch = 4\nepochs = 3\nrate = 3e-3\ntext = 0.2\nhidden = 0.5\ntemperature = 2.0",
            0.95,
        ),
        ("streams", "batch = 4\nepochs = 3\nrate = 3e-3\nhidden = 0.5\nhidden_at = \"all\"", 0.9),
        ("norms", "batch = 4\nepochs = 3\ntrain = \"norms\"", 0.99),
        ("adapters", "batch = 4\nepochs = 3\ntrain = \"adapters\"\nrank = 8\naccumulate = 2", 0.99),
    ] {
        let (after, out) = of(name, &format!("{CUT}{}", distill(options)));
        assert!(after < most * before, "{name}: {before} -> {after}");
        let report: Value =
            serde_json::from_slice(&fs::read(out.join("report.json")).unwrap()).unwrap();
        let training = &report["model"].as_array().unwrap().last().unwrap()["training"];
        let peak = |key: &str| report[key].as_u64().unwrap();
        assert!(peak("measured_peak_bytes") <= peak("predicted_peak_bytes"), "{name}");
        let curve = training["curve"].as_array().unwrap();
        let loss = |at: usize| curve[at][1].as_f64().unwrap();
        assert!(loss(curve.len() - 1) < loss(0), "{name}: {curve:?}");
        assert_eq!(training["tokens"], 3 * 40 * 128, "{name}");
        let html = fs::read_to_string(out.join("report.html")).unwrap();
        assert!(html.contains("loss by step") && html.contains("<polyline"), "{name}");
        let (code, stdout, error) =
            attar(&["verify", &out.display().to_string(), "--source", &model()]);
        assert_eq!(code, 0, "{stdout}{error}");
    }
    let (code, stdout, error) = attar(&[
        "explain",
        &dir.path().join("norms").display().to_string(),
        "model.layers.0.input_layernorm.weight",
    ]);
    assert_eq!(code, 0, "{error}");
    assert!(stdout.contains("values trained by forward_kl in 30 steps"), "{stdout}");
}

#[test]
fn training_through_rounding_makes_rounding_cheaper() {
    let dir = tempfile::tempdir().unwrap();
    let round = "[[step]]\npass = \"rtn\"\nscheme = { bits = 3, group_size = 64 }\n";
    let learn = distill("batch = 4\nepochs = 3\nrounding = { bits = 3, group_size = 64 }");
    let (plain, trained) = (dir.path().join("plain"), dir.path().join("trained"));
    let (code, error) = run(round, &plain, &[]);
    assert_eq!(code, 0, "{error}");
    let (code, error) = run(&format!("{learn}{round}"), &trained, &[]);
    assert_eq!(code, 0, "{error}");
    let (plain, trained) = (kl(&plain), kl(&trained));
    assert!(trained < 0.8 * plain, "{plain} -> {trained}");
}

/// The artifact's tensors whose names end so, one after the other.
fn parts(out: &Path, suffix: &str) -> Vec<u8> {
    let bytes = weights(out);
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut names: Vec<&str> = file.names().into_iter().filter(|n| n.ends_with(suffix)).collect();
    names.sort_unstable();
    names.into_iter().flat_map(|name| file.tensor(name).unwrap().data().to_vec()).collect()
}

#[test]
fn scales_learn_behind_codes_that_stay() {
    let dir = tempfile::tempdir().unwrap();
    let scales = distill("train = \"scales\"\nbatch = 4\nepochs = 3\nrate = 5e-3");
    let gptq = |scheme: &str| format!("[[step]]\npass = \"gptq\"\nscheme = {{ {scheme} }}\n");
    for (layout, scheme, codes, most) in [
        ("gptq", "bits = 2, group_size = 64", ".qweight", 0.93),
        (
            "compressed-tensors",
            "bits = 3, group_size = -1, symmetric = false",
            ".weight_packed",
            0.98,
        ),
    ] {
        let emit = format!("[[emit]]\nlayout = \"{layout}\"\n");
        let (plain, learned) = (dir.path().join(layout), dir.path().join(format!("{layout}-l")));
        let (code, error) = run(&format!("{}{emit}", gptq(scheme)), &plain, &[]);
        assert_eq!(code, 0, "{error}");
        let recipe = format!("{}{scales}{emit}", gptq(scheme));
        let (code, error) = run(&recipe, &learned, &["--threads", "2"]);
        assert_eq!(code, 0, "{error}");
        assert!(!parts(&plain, codes).is_empty());
        assert!(parts(&plain, codes) == parts(&learned, codes), "{layout}: codes stay");
        for suffix in [".qzeros", ".weight_zero_point", "norm.weight", "embed_tokens.weight"] {
            assert!(parts(&plain, suffix) == parts(&learned, suffix), "{layout}: {suffix} stays");
        }
        assert!(parts(&plain, "scale") != parts(&learned, "scale") || layout == "gptq");
        assert!(parts(&plain, ".scales") != parts(&learned, ".scales") || layout != "gptq");
        let (before, after) = (kl(&plain), kl(&learned));
        assert!(after < most * before, "{layout}: {before} -> {after}");
        let report: Value =
            serde_json::from_slice(&fs::read(learned.join("report.json")).unwrap()).unwrap();
        let peak = |key: &str| report[key].as_u64().unwrap();
        assert!(peak("measured_peak_bytes") <= peak("predicted_peak_bytes"), "{layout}");
        assert_eq!(report["model"][0]["step"], "step[1] (distill)");
        let path = learned.display().to_string();
        let (code, stdout, error) = attar(&["verify", &path, "--source", &model()]);
        assert_eq!(code, 0, "{stdout}{error}");
        if layout == "gptq" {
            let (code, stdout, error) = attar(&["reproduce", &path]);
            assert_eq!(code, 0, "{stdout}{error}");
            // On one thread; then from what lies in the work directory.
            let work = dir.path().join("work").display().to_string();
            for extra in [
                ["--threads", "1", "--scratch", work.as_str()],
                ["--threads", "2", "--scratch", &work],
            ] {
                let again = dir.path().join(format!("again{}", extra[1]));
                let (code, error) = run(&recipe, &again, &extra);
                assert_eq!(code, 0, "{error}");
                assert!(weights(&again) == weights(&learned), "{extra:?}");
            }
        }
    }
    let refused = |recipe: &str, words: &str| {
        let out = dir.path().join("out");
        let (code, error) = run(recipe, &out, &[]);
        assert!(code == 2 && error.contains(words), "{words}: {error}");
        assert!(!out.exists());
    };
    let w4 = gptq("bits = 4, group_size = 64");
    refused(&scales, "behind one that quantizes");
    refused(&format!("{scales}{w4}"), "it is the last step");
    refused(&format!("{w4}{scales}{}", distill("")), "it is the last step");
    let wanda = "[[step]]\npass = \"wanda\"\n";
    refused(
        &format!("{wanda}{scales}[[emit]]\nlayout = \"dense\"\n"),
        "no step before it makes any",
    );
    refused(
        &format!("{w4}{scales}").replace("\"scales\"", "\"scales\"\nrounding = { bits = 4 }"),
        "rounding",
    );
    let q4_k = format!("[[step]]\npass = \"rtn\"\n{scales}[[emit]]\nlayout = \"q8_0\"\n");
    refused(&q4_k, "block types");
    let factored = format!(
        "[[step]]\npass = \"svd\"\nmultiple_of = 16\n{}{scales}",
        gptq("bits = 4, group_size = 16")
    );
    refused(&factored, "factors");
    let head = w4.replace("scheme", "keep = []\nsites = \"lm_head\"\nscheme");
    refused(&format!("{w4}{head}{scales}"), "the output head is not trained");
}

#[test]
fn threads_memory_and_kills_do_not_change_a_byte() {
    let dir = tempfile::tempdir().unwrap();
    let options = "batch = 4\nepochs = 2\nhidden = 0.3\nhidden_at = [0, 1]";
    let recipe = format!("{CUT}{}", distill(options));
    let made = |name: &str, extra: &[&str]| {
        let out = dir.path().join(name);
        let (code, error) = run(&recipe, &out, extra);
        assert_eq!(code, 0, "{name}: {error}");
        (weights(&out), error)
    };
    let (want, _) = made("one", &["--threads", "1"]);
    assert!(want == made("two", &["--threads", "2"]).0, "threads");
    assert!(want != made("seed", &["--seed", "3"]).0, "the seed counts");
    // Killed after its first and its third saved state.
    for kills in [1, 3] {
        let out: PathBuf = dir.path().join(format!("killed{kills}"));
        let extra = ["--progress", "json", "--checkpoint-every", "0"];
        for _ in 0..2 {
            let mut child = Command::new(assert_cmd::cargo::cargo_bin("attar"))
                .args(arguments(&recipe, &out, &extra))
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            let mut seen = 0;
            for line in BufReader::new(child.stderr.take().unwrap()).lines() {
                seen += usize::from(line.unwrap().contains("\"saved\":true"));
                if seen == kills {
                    break;
                }
            }
            assert_eq!(seen, kills, "states are saved");
            child.kill().unwrap();
            assert!(!child.wait().unwrap().success());
        }
        let (bytes, error) = made(&format!("killed{kills}"), &["--checkpoint-every", "0"]);
        assert!(error.contains("goes on at step"), "{error}");
        assert!(bytes == want, "killed {kills}");
        assert!(!dir.path().join(format!("killed{kills}.scratch")).exists());
    }
}

#[test]
fn a_teacher_elsewhere_is_named_by_its_hash_and_the_run_is_reproduced() {
    let dir = tempfile::tempdir().unwrap();
    let (cut, learned) = (dir.path().join("cut"), dir.path().join("learned"));
    let (code, error) = run(CUT, &cut, &[]);
    assert_eq!(code, 0, "{error}");
    // Relative to the recipe, wherever the command runs.
    std::os::unix::fs::symlink(model(), dir.path().join("original")).unwrap();
    let options = "steps = 12\nbatch = 4\nteacher = \"original\"";
    let mut arguments = arguments(&distill(options), &learned, &[]);
    arguments[1] = cut.display().to_string();
    let (code, _, error) = attar(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(code, 0, "{error}");
    assert!(kl(&learned) < 0.97 * kl(&cut));
    let manifest = fs::read_to_string(learned.join("attar_manifest.json")).unwrap();
    let manifest: Value = serde_json::from_str(&manifest).unwrap();
    assert_eq!(manifest["teacher_blake3"]["step[0] (distill)"].as_str().unwrap().len(), 64);
    let (code, stdout, error) = attar(&["reproduce", &learned.display().to_string()]);
    assert_eq!(code, 0, "{stdout}{error}");
}

#[test]
fn what_cannot_be_trained_is_refused_before_any_work() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let refused = |options: &str, extra: &[&str], words: &[&str]| {
        let (code, error) = run(&distill(options), &out, extra);
        assert_eq!(code, 2, "{options}: {error}");
        for word in words {
            assert!(error.contains(word), "{options}: {error}");
        }
        assert!(!out.exists() && !dir.path().join("out.scratch").exists(), "{options}");
    };
    refused("temperature = 0.0", &[], &["temperature", "0.05"]);
    refused("loss = \"hinge\"", &[], &["unknown variant", "forward_kl"]);
    refused("epoch = 2", &[], &["unknown key `epoch`", "epochs"]);
    refused("batch = 0", &[], &["expected 1 to"]);
    refused("hidden_at = \"all\"", &[], &["hidden_at", "give `hidden` one"]);
    refused("hidden = 1.0\nhidden_at = [0, 7]", &[], &["no block 7", "0 to 1"]);
    refused("hidden = 1.0\nhidden_at = [1, 1]", &[], &["named twice"]);
    refused("accumulate = 4294967296", &[], &["accumulate", "expected 1 to"]);
    refused("train = \"adapters\"\nrank = 100", &[], &["rank 100", "64"]);
    refused(
        "rounding = { bits = 3, group_size = 100 }",
        &[],
        &["group_size 100", "does not divide"],
    );
    refused("rounding = { bits = 5 }", &[], &["2, 3, 4 or 8"]);
    refused("", &["--memory", "32MiB"], &["step[0] (distill)", "give --memory"]);
    let other = dir.path().join("other");
    fs::create_dir(&other).unwrap();
    for file in ["model.safetensors", "tokenizer.json", "config.json"] {
        fs::copy(data("tinystories-656k").join(file), other.join(file)).unwrap();
    }
    let swap = |file: &str, from: &str, to: &str| {
        let text = fs::read_to_string(data("tinystories-656k").join(file)).unwrap();
        assert!(text.contains(from), "{file} holds {from}");
        fs::write(other.join(file), text.replacen(from, to, 1)).unwrap();
    };
    let teacher = format!("teacher = \"{}\"", other.display());
    let tokenizer = fs::read_to_string(other.join("tokenizer.json")).unwrap();
    let tokenizer: Value = serde_json::from_str(&tokenizer).unwrap();
    let vocab = tokenizer["model"]["vocab"].as_object().unwrap();
    let token = vocab.keys().find(|t| t.len() > 4 && t.is_ascii() && !t.contains('|')).unwrap();
    swap("tokenizer.json", &format!("\"{token}\":"), &format!("\"{token}x\":"));
    refused(&teacher, &[], &["other numbers", "one tokenizer"]);
    swap("config.json", "2048", "2049");
    refused(&teacher, &[], &["2049 tokens", "2048"]);
    refused("teacher = \"/nowhere\"", &[], &["teacher /nowhere"]);
    fs::copy(data("tinystories-656k").join("tokenizer.json"), other.join("tokenizer.json"))
        .unwrap();
    swap("config.json", "{", "{ \"quantization_config\": {},");
    refused(&teacher, &[], &["is quantized", "the checkpoint it was made of"]);
    // Streams of another width, or turned, cannot be compared number by number.
    let behind = |first: &str, words: &[&str]| {
        let recipe = format!("[[step]]\n{first}\n{}", distill("hidden = 0.5"));
        let (code, error) = run(&recipe, &out, &[]);
        assert_eq!(code, 2, "{first}: {error}");
        for word in words {
            assert!(error.contains(word), "{first}: {error}");
        }
    };
    behind(
        "pass = \"prune_hidden\"\nratio = 0.25",
        &["`hidden` compares streams", "128 in the teacher"],
    );
    behind("pass = \"rotate\"", &["step[0] (rotate) has turned"]);
}
