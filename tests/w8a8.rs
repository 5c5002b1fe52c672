//! Weights and activations in 8 bits: smoothing keeps the function, the artifact says what is done to
//! activations and is measured so, and what cannot be is refused before any work.

use std::{fs, path::Path};

use attar_formats::Checkpoint;
use attar_ir::{BlockState, Limits, PassContext, Target, Weight};
use attar_model::{BlockRun, Decoder, Stream, embed, observe_block};
use serde_json::Value;

use crate::{attar, compress, data, model};

/// What block 0 puts out for the tokens of a text.
fn output(decoder: &Decoder, source: &Checkpoint, state: &BlockState, ids: &[u32]) -> Vec<f32> {
    let mut stream = stream(decoder, source, ids);
    BlockRun::begin(decoder, 0, source, &mut stream, None).unwrap().finish(state).unwrap();
    stream.read(0).unwrap()
}

fn stream(decoder: &Decoder, source: &Checkpoint, ids: &[u32]) -> Stream {
    let mut stream = Stream::new(&[ids.len()], decoder.spec.hidden, None).unwrap();
    stream.write(0, &embed(decoder, source, ids).unwrap()).unwrap();
    stream
}

#[test]
fn smoothing_keeps_the_function_of_a_trained_block() {
    let source = Checkpoint::open(&data("tinystories-656k")).unwrap();
    let decoder = Decoder::read(source.config(), &source).unwrap();
    let text = fs::read_to_string(data("tinystories_val.txt")).unwrap();
    let ids = source.tokenizer().unwrap().encode(&text[..1200]).unwrap();
    let before = decoder.load_block(0, &source).unwrap();
    let want = output(&decoder, &source, &before, &ids);
    let block = decoder.block(0);
    let targets: Vec<Target> =
        (0..block.sites.len()).map(|site| Target { site, scheme: None }).collect();
    let def = attar_quant::PASSES.iter().find(|def| def.name == "smoothquant").unwrap();
    for options in ["alpha = 0.5", "alpha = 0.9", "folds = \"all\""] {
        let pass = (def.build)(&options.parse().unwrap()).unwrap();
        let needs = pass.contract().needs;
        let (mut stats, _) = observe_block(
            &decoder,
            0,
            &source,
            &before,
            &stream(&decoder, &source, &ids),
            needs,
            None,
        )
        .unwrap();
        let mut after = before.clone();
        let context = PassContext { block, seed: 0, survey: &[], original: &[], scratch: None };
        pass.apply(&context, &targets, &mut after, &mut stats).unwrap();
        assert!(after.norm_changed.iter().all(|changed| *changed));
        let moved = |site: usize| match (&before.linears[site].weight, &after.linears[site].weight)
        {
            (Weight::Dense(a), Weight::Dense(b)) => a != b,
            _ => panic!("both are floats"),
        };
        assert_eq!(moved(block.sites.len() - 1), options.contains("all"), "the down projection");
        let got = output(&decoder, &source, &after, &ids);
        let size = want.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let worst = want.iter().zip(&got).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(worst < 1e-5 * size, "{options}: {worst} of {size}");
        assert!(pass.cost(block, &targets, &Limits::unbounded(1)).flops > 0.0);
    }
}

#[test]
fn the_artifact_says_what_is_done_to_activations_and_is_measured_so() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let (code, _, error) = compress("w8a8", &out, &["--target", "vllm"]);
    assert_eq!(code, 0, "{error}");
    let path = out.display().to_string();
    let text = data("tinystories_val.txt").display().to_string();
    let (source, mut seen) = (model(), Vec::new());
    for (extra, activations, kernel) in [
        (&[][..], "int8_per_token", "-w8a8"),
        (&["--activations", "int8"][..], "int8_per_token", "-w8a8"),
        (&["--activations", "f32"][..], "f32", "cpu-"),
    ] {
        let mut args = vec!["eval", &path, "--text", &text, "--context", "256", "--json"];
        args.extend(["--max-windows", "16", "--reference", &source]);
        args.extend(extra);
        let (code, stdout, error) = attar(&args);
        assert_eq!(code, 0, "{error}");
        let json: Value = serde_json::from_str(&stdout).unwrap();
        assert_eq!(json["activations"], activations, "{stdout}");
        assert_eq!(json["layout"], "compressed-tensors-int");
        let kernels = json["kernels"].to_string();
        assert!(kernels.contains(kernel), "{kernels}");
        let ratio =
            json["perplexity"].as_f64().unwrap() / json["reference_perplexity"].as_f64().unwrap();
        assert!((0.99..1.01).contains(&ratio), "{ratio}");
        seen.push(json["kl_mean"].as_f64().unwrap());
    }
    assert!(
        seen[0].to_bits() == seen[1].to_bits() && seen[2] < seen[0],
        "rounded activations cost something: {seen:?}"
    );
    let (code, stdout, error) = attar(&["verify", &path, "--source", &source, "--target", "vllm"]);
    assert_eq!(code, 0, "{stdout}{error}");
    assert!(stdout.contains("-w8a8 on compressed-tensors-int (14 linears)"), "{stdout}");
    let (_, stdout, _) = attar(&["inspect", &path]);
    assert!(stdout.contains("w8a8 channel sym"), "{stdout}");
    let report = fs::read_to_string(out.join("report.json")).unwrap();
    assert!(report.contains("w8a8 channel sym, compressed-tensors-int"), "the ledger says it");
    let (code, _, error) = attar(&["run", &path, "--prompt", "Once upon a time", "--tokens", "4"]);
    assert!(code == 0 && error.contains("-w8a8") && error.contains("int8-per-token"), "{error}");
    let (code, stdout, error) = attar(&["diff", &path, &path]);
    assert_eq!(code, 0, "{stdout}{error}");
    let (code, _, error) = attar(&["emit", &path]);
    assert!(code == 2 && error.contains("rounds activations"), "{error}");
}

#[test]
fn what_w8a8_cannot_be_is_refused_before_work() {
    const W8A8: &str = "scheme = { bits = 8, group_size = -1, activations = \"int8\" }";
    let dir = tempfile::tempdir().unwrap();
    let recipe = dir.path().join("recipe.toml");
    let refused = |text: &str, extra: &[&str], parts: &[&str]| {
        fs::write(&recipe, text).unwrap();
        let out = dir.path().join("out");
        let (recipe, out_text) = (recipe.display().to_string(), out.display().to_string());
        let (model, calib) = (model(), data("tinystories_calib.txt").display().to_string());
        let mut args = vec!["compress", &model, "--recipe", &recipe, "--out", &out_text];
        args.extend(["--text", &calib]);
        args.extend(extra);
        let (code, _, error) = attar(&args);
        assert_eq!(code, 2, "{text}: {error}");
        for part in parts {
            assert!(error.contains(part), "wanted {part:?} in: {error}");
        }
        assert!(!Path::new(&out).exists(), "{error}");
    };
    let rtn = format!("[[step]]\npass = \"rtn\"\n{W8A8}\n");
    for layout in ["compressed-tensors", "gptq", "gptq_v2", "q8_0"] {
        refused(&rtn, &["--layout", layout], &[layout, "compressed-tensors-int"]);
    }
    refused(&rtn, &["--layout", "awq"], &["awq", "says nothing of activations"]);
    let step = |scheme: &str| format!("[[step]]\npass = \"rtn\"\nscheme = {{ {scheme} }}\n");
    refused(
        &step("bits = 8, group_size = 64, activations = \"int8\""),
        &[],
        &["w8a8 g64 sym", "group_size = -1"],
    );
    refused(&step("bits = 4, group_size = -1, activations = \"int8\""), &[], &["8 bits, not 4"]);
    refused(
        &step("bits = 8, group_size = -1, symmetric = false, activations = \"int8\""),
        &[],
        &["symmetric = true"],
    );
    refused(
        &step("bits = 8, activations = \"int4\""),
        &[],
        &["step[0].scheme.activations", "expected `float` or `int8`", "did you mean `int8`?"],
    );
    refused(&step("bits = 8, activation = \"int8\""), &[], &["did you mean `activations`?"]);
    let int = ["--layout", "compressed-tensors-int"];
    refused(&step("bits = 8, group_size = -1"), &int, &["activations = \"int8\""]);
    let smooth = "[[step]]\npass = \"smoothquant\"\n";
    refused(&format!("{smooth}alpha = 1.5\n{rtn}"), &[], &["step[0].alpha", "0 to 1", "1.5"]);
    refused(&format!("{rtn}{smooth}"), &[], &["step[1] (smoothquant)", "step[0] (rtn)"]);
    refused(&rtn, &["--kernels"], &["compressed-tensors-int", "rounds activations"]);
}
