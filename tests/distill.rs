//! Passes that learn, on the demo model: losses fall, the model gets nearer to the original, nothing depends on
//! threads, memory or kills, and what was promised stands in the bytes.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
};

use attar_formats::{Checkpoint, CorpusSource, corpus};
use attar_ir::{BlockFunction, BlockValues, Wanted};
use attar_model::{BlockOps, Decoder, Lesson, Stream, embed, run_block};
use serde_json::Value;

use super::{attar, data, model};

const ROUND: &str = "pass = \"autoround\"\niterations = 24\nscheme = { bits = 2, group_size = 64 }";

fn step(lines: &str) -> String {
    format!("[[step]]\n{lines}\n")
}

fn arguments(recipe: &str, out: &Path, extra: &[&str]) -> Vec<String> {
    let file = out.with_extension("toml");
    fs::write(&file, recipe).unwrap();
    let mut args = vec!["compress".to_owned(), model()];
    let text = data("tinystories_calib.txt").display().to_string();
    args.extend(["--recipe".to_owned(), file.display().to_string(), "--text".to_owned(), text]);
    args.extend(["--out".to_owned(), out.display().to_string()]);
    args.extend(["--context", "128", "--samples", "16"].map(str::to_owned));
    args.extend(extra.iter().map(|&more| more.to_owned()));
    args
}

fn compress(recipe: &str, out: &Path, extra: &[&str]) -> (i32, String, String) {
    let args = arguments(recipe, out, extra);
    attar(&args.iter().map(String::as_str).collect::<Vec<_>>())
}

fn report(out: &Path) -> Value {
    serde_json::from_slice(&fs::read(out.join("report.json")).unwrap()).unwrap()
}

fn bytes(out: &Path) -> [Vec<u8>; 2] {
    ["model.safetensors", "attar_manifest.json"].map(|name| fs::read(out.join(name)).unwrap())
}

/// Loss before and after in each block.
fn losses(report: &Value) -> Vec<(f64, f64)> {
    let sites = report["sites"].as_array().unwrap();
    let events = sites.iter().flat_map(|site| site["events"].as_array().unwrap());
    let mut all: Vec<(f64, f64)> = events
        .filter(|event| event["event"] == "learned")
        .map(|event| (event["before"].as_f64().unwrap(), event["after"].as_f64().unwrap()))
        .collect();
    all.dedup();
    all
}

#[test]
fn derivatives_of_both_losses_are_those_of_differences() {
    let checkpoint = Checkpoint::open(&data("tinystories-656k")).unwrap();
    let decoder = Decoder::read(checkpoint.config(), &checkpoint).unwrap();
    let source = CorpusSource::Text(vec![data("tinystories_calib.txt")]);
    let tokenizer = checkpoint.tokenizer().unwrap();
    let windows =
        corpus::calibration(&source, Some(&tokenizer), 48, 3, decoder.spec.vocab).unwrap().ids;
    let lengths: Vec<usize> = windows.iter().map(Vec::len).collect();
    let mut stream = Stream::new(&lengths, decoder.spec.hidden, None).unwrap();
    for (at, ids) in windows.iter().enumerate() {
        stream.write(at, &embed(&decoder, &checkpoint, ids).unwrap()).unwrap();
    }
    let head = BlockValues::of(&decoder.load_block(decoder.spec.layers, &checkpoint).unwrap());
    for (index, head) in [(0, None), (decoder.spec.layers - 1, Some(head))] {
        let logits = head.is_some();
        let mut inputs = Stream::new(&lengths, decoder.spec.hidden, None).unwrap();
        for window in 0..windows.len() {
            inputs.write(window, &stream.read(window).unwrap()).unwrap();
        }
        run_block(
            &decoder,
            index,
            &BlockOps::load(&decoder, index, &checkpoint).unwrap(),
            &mut stream,
        )
        .unwrap();
        let lesson = Lesson::new(&decoder, index, &checkpoint, &inputs, &stream, head).unwrap();
        let exact = BlockValues::of(&decoder.load_block(index, &checkpoint).unwrap());
        let all = [0, 1, 2];
        assert!(lesson.loss(&exact, &all).unwrap().abs() < 1e-6);
        let mut values = exact.clone();
        for tensor in values.tensors_mut() {
            tensor.iter_mut().enumerate().for_each(|(i, v)| *v *= 1.0 + 0.2 * (i as f32).sin());
        }
        let wanted = Wanted { linears: true, vectors: true };
        let mut gradient = values.zeros();
        let loss = lesson.gradient(&values, &all, wanted, &mut gradient).unwrap();
        assert!((loss - lesson.loss(&values, &all).unwrap()).abs() < 1e-4 * loss);
        // Along the derivative of every tensor of its own.
        let tensors = gradient.clone().tensors_mut().count();
        for at in 0..tensors {
            let along: Vec<f32> = gradient.tensors_mut().nth(at).unwrap().to_vec();
            let length = along.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
            assert!(length > 0.0, "tensor {at}");
            let size = values.tensors_mut().nth(at).unwrap().len() as f64;
            let step = 2e-3 * size.sqrt().min(30.0) / 10.0;
            let moved = |by: f64| {
                let mut values = values.clone();
                let tensor = values.tensors_mut().nth(at).unwrap();
                for (v, g) in tensor.iter_mut().zip(&along) {
                    *v += (by * f64::from(*g) / length) as f32;
                }
                lesson.loss(&values, &all).unwrap()
            };
            let slope = (moved(step) - moved(-step)) / (2.0 * step);
            assert!((slope - length).abs() < 0.03 * length, "{logits} {at}: {slope} {length}");
        }
    }
}

#[test]
fn learned_rounding_is_nearer_to_the_original_than_gptq() {
    let dir = tempfile::tempdir().unwrap();
    let text = data("tinystories_val.txt").display().to_string();
    let eval = ["--eval-text", &text, "--eval-context", "128"];
    let gptq = "pass = \"gptq\"\nscheme = { bits = 2, group_size = 64 }";
    let kl = |name: &str, recipe: &str| {
        let out = dir.path().join(name);
        let (code, _, error) = compress(recipe, &out, &eval);
        assert_eq!(code, 0, "{error}");
        let report = report(&out);
        let (measured, predicted) =
            (&report["measured_peak_bytes"], &report["predicted_peak_bytes"]);
        assert!(measured.as_u64() <= predicted.as_u64(), "{name}: {measured} {predicted}");
        (report["eval"]["kl_mean"].as_f64().unwrap(), losses(&report))
    };
    let (plain, none) = kl("gptq", &step(gptq));
    let (learned, blocks) = kl("learned", &step(ROUND));
    assert!(none.is_empty() && blocks.len() == 2, "{blocks:?}");
    assert!(blocks.iter().all(|(before, after)| *after < 0.9 * before), "{blocks:?}");
    assert!(learned < 0.9 * plain, "{learned} {plain}");
    // Scales and norms behind gptq, whose codes stay.
    let behind = step(gptq) + &step("pass = \"reconstruct\"\niterations = 24");
    let (scales, blocks) = kl("scales", &behind);
    assert!(blocks.len() == 2 && scales < 0.97 * plain, "{scales} {plain} {blocks:?}");
    for name in ["learned", "scales"] {
        let place = dir.path().join(name).display().to_string();
        let (code, stdout, error) = attar(&["verify", &place, "--source", &model()]);
        assert_eq!(code, 0, "{stdout}{error}");
        let norm = "model.layers.0.input_layernorm.weight";
        let (code, stdout, error) = attar(&["explain", &place, norm]);
        assert!(code == 0 && stdout.contains("trained by"), "{stdout}{error}");
    }
}

#[test]
fn pruned_weights_learn_and_their_zeros_stay() {
    let dir = tempfile::tempdir().unwrap();
    let text = data("tinystories_val.txt").display().to_string();
    let eval = ["--eval-text", &text, "--eval-context", "128", "--layout", "dense"];
    let prune = step("pass = \"magnitude\"\npattern = \"2:4\"");
    let run = |name: &str, recipe: &str| {
        let out = dir.path().join(name);
        let (code, _, error) = compress(recipe, &out, &eval);
        assert_eq!(code, 0, "{error}");
        let report = report(&out);
        for site in report["sparsity"].as_array().unwrap() {
            assert_eq!(site["pattern"], "2:4");
        }
        report["eval"]["kl_mean"].as_f64().unwrap()
    };
    let pruned = run("pruned", &prune);
    let all = "pass = \"reconstruct\"\niterations = 24";
    let learned = run("learned", &(prune.clone() + &step(all)));
    let vectors = run("vectors", &(prune + &step(&format!("{all}\nlearn = \"vectors\""))));
    assert!(learned < 0.7 * vectors && vectors < pruned, "{pruned} {vectors} {learned}");
}

#[test]
fn threads_budgets_and_upstreams_change_what_they_should() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = step(ROUND);
    let place = |name: &str| dir.path().join(name);
    for (name, extra) in [("one", ["--threads", "1"]), ("two", ["--threads", "2"])] {
        let (code, _, error) = compress(&recipe, &place(name), &extra);
        assert_eq!(code, 0, "{error}");
    }
    assert!(bytes(&place("one")) == bytes(&place("two")));
    let (code, _, error) = compress(&recipe, &place("none"), &["--memory", "1MiB"]);
    assert!(code == 2 && !place("none").exists(), "{error}");
    let least = error.split("give --memory ").nth(1).unwrap().split("MiB").next().unwrap();
    let least = format!("{}MiB", least.trim());
    let (code, _, error) = compress(&recipe, &place("least"), &["--memory", &least]);
    assert_eq!(code, 0, "{least}: {error}");
    assert!(bytes(&place("one")) == bytes(&place("least")));
    let original = format!("{ROUND}\nupstream = \"original\"");
    let (code, _, error) = compress(&step(&original), &place("original"), &[]);
    assert_eq!(code, 0, "{error}");
    assert!(bytes(&place("one"))[0] != bytes(&place("original"))[0]);
    // Without data there is nothing to learn from.
    let out = place("nothing").display().to_string();
    let file = place("one.toml").display().to_string();
    let (code, _, error) = attar(&["compress", &model(), "--recipe", &file, "--out", &out]);
    assert!(code == 2 && error.contains("teacher"), "{error}");
}

#[test]
fn a_killed_run_learns_one_block_again_and_ends_in_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, out) = (dir.path().join("whole"), dir.path().join("out"));
    let recipe = step(ROUND);
    let extra = ["--progress", "json", "--checkpoint-every", "0"];
    let (code, _, error) = compress(&recipe, &whole, &extra);
    assert_eq!(code, 0, "{error}");
    let begins = |line: &str, block: usize| {
        let event: Value = serde_json::from_str(line).unwrap_or_default();
        event["event"] == "progress" && event["what"] == format!("model.layers.{block}")
    };
    assert!(error.lines().any(|line| begins(line, 1)), "{error}");
    let mut child = Command::new(assert_cmd::cargo::cargo_bin("attar"))
        .args(arguments(&recipe, &out, &extra))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let reached = lines.map_while(Result::ok).any(|line| begins(&line, 1));
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(reached && !out.exists());
    let (code, _, error) = compress(&recipe, &out, &extra);
    assert_eq!(code, 0, "{error}");
    assert!(!error.lines().any(|line| begins(line, 0)), "block 0 is there already");
    assert!(bytes(&whole) == bytes(&out));
}
