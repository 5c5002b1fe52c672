//! GGUF through the command line: written, read back, refused, and laid out anew.

use std::{fs, path::Path};

use attar_formats::{
    Checkpoint, CorpusSource, corpus,
    gguf::{GgmlType, GgufFile},
};
use attar_ir::{BlockState, BlockStats, Needs, PassContext, Target};
use attar_model::{Decoder, Stream, embed, observe_block};
use attar_tensor::{BlockType, TensorSource, block_search};
use serde_json::Value;

use crate::{attar, compress, data, model, refusals::copy};

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn perplexity(path: &Path) -> f64 {
    let (val, path) = (text(&data("tinystories_val.txt")), text(path));
    let args = ["eval", &path, "--text", &val, "--context", "256", "--max-windows", "6", "--json"];
    let (code, stdout, error) = attar(&args);
    assert_eq!(code, 0, "{error}");
    serde_json::from_str::<Value>(&stdout).unwrap()["perplexity"].as_f64().unwrap()
}

/// The demo model's rows divide by 128, not by 256: the plan says what stands in.
#[test]
fn rows_that_blocks_do_not_divide_fall_back_loudly() {
    let (code, plan, error) = attar(&["plan", &model(), "--preset", "rtn", "--layout", "q4_k"]);
    assert_eq!(code, 0, "{error}");
    assert!(plan.contains("q4_k (gguf)"), "{plan}");
    assert!(plan.contains("rows of 384 are no multiple of the 256"), "{plan}");
    assert!(plan.contains("stored as q5_0"), "{plan}");
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let (code, said, error) = compress("rtn", &out, &["--layout", "q4_k"]);
    assert_eq!(code, 0, "{error}");
    assert!(said.contains("stored as q5_0"), "{said}");
    let file = GgufFile::open(&out.join("model.gguf")).unwrap();
    let tensors = &file.header().tensors;
    let down = tensors.iter().find(|t| t.name == "blk.1.ffn_down.weight").unwrap();
    assert_eq!((down.ty, down.dims.as_slice()), (GgmlType(6), &[384, 128][..]));
    // One file beside manifest and report, nothing of the source directory.
    let mut names: Vec<String> = fs::read_dir(&out)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["attar_manifest.json", "model.gguf", "report.html", "report.json"]);
}

#[test]
fn a_file_verifies_evaluates_runs_and_is_compressed_again() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("q8");
    let (code, _, error) = compress("rtn", &out, &["--layout", "q8_0"]);
    assert_eq!(code, 0, "{error}");
    let (code, said, error) = attar(&["verify", &text(&out), "--source", &model()]);
    assert_eq!(code, 0, "{said}{error}");
    for kernel in ["cpu-blocks", "cpu-scalar", "cpu-scalar-int8"] {
        assert!(said.contains(&format!("kernel {kernel} on q8_0 (14 linears)")), "{said}");
    }
    let file = out.join("model.gguf");
    let plain = perplexity(Path::new(&model()));
    assert!((perplexity(&file) / plain - 1.0).abs() < 2e-3);
    let (code, said, error) =
        attar(&["run", &text(&file), "--prompt", "Once upon a time", "--tokens", "8"]);
    assert_eq!(code, 0, "{error}");
    assert!(said.starts_with("Once upon a time"), "{said}");
    let (code, said, error) = attar(&["inspect", &text(&file)]);
    assert_eq!(code, 0, "{error}");
    assert!(said.contains("layout q8_0"), "{said}");
    // As a source: its numbers are the reference, and the plan says that they are rounded already.
    let again = dir.path().join("again");
    let args = ["compress", &text(&file), "--preset", "rtn-w4", "--out", &text(&again)];
    let (code, said, error) = attar(&args);
    assert_eq!(code, 0, "{error}");
    assert!(said.contains("the source is quantized itself (14 in q8_0)"), "{said}");
    assert!(again.join("tokenizer.json").exists() && again.join("config.json").exists());
    assert!(perplexity(&again) < 1.3 * plain);
    // A bit of a code flips: the manifest tells.
    let mut bytes = fs::read(&file).unwrap();
    let last = bytes.len() - 100;
    bytes[last] ^= 1;
    fs::write(&file, bytes).unwrap();
    assert_eq!(attar(&["verify", &text(&out)]).0, 1);
}

/// The chosen scales are never worse than none in awq's own metric, the output error `tr(ΔW H ΔWᵀ)` of all that read
/// the input after the search weighed by the diagonal of H; and what is packed loads.
#[test]
fn awq_prepares_for_block_types_without_harm() {
    let checkpoint = Checkpoint::open(Path::new(&model())).unwrap();
    let decoder = Decoder::read(checkpoint.config(), &checkpoint).unwrap();
    let source = CorpusSource::Text(vec![data("tinystories_calib.txt")]);
    let tokenizer = checkpoint.tokenizer().unwrap();
    let windows =
        corpus::calibration(&source, Some(&tokenizer), 256, 4, decoder.spec.vocab).unwrap().ids;
    let lengths: Vec<usize> = windows.iter().map(Vec::len).collect();
    let mut stream = Stream::new(&lengths, decoder.spec.hidden, None).unwrap();
    for (at, ids) in windows.iter().enumerate() {
        stream.write(at, &embed(&decoder, &checkpoint, ids).unwrap()).unwrap();
    }
    let block = decoder.block(0);
    let before = decoder.load_block(0, &checkpoint).unwrap();
    let needs = Needs::HESSIAN | Needs::ABS_MEAN;
    let (stats, _) =
        observe_block(&decoder, 0, &checkpoint, &before, &stream, needs, None).unwrap();
    let def = attar_quant::PASSES.iter().find(|def| def.name == "awq").unwrap();
    let awq = (def.build)(&toml::Table::new()).unwrap();
    let loss = |ty: BlockType, state: &BlockState, stats: &BlockStats, sites: &[usize]| -> f64 {
        let one = |site: usize| {
            let weight = state.linears[site].weight.as_dense().unwrap();
            let h = stats.input(block.input_of(site)).unwrap().hessian.as_ref().unwrap();
            let (rows, columns) = weight.dim();
            let values = weight.as_slice().unwrap();
            let weights = h.diag().to_vec();
            let found = block_search::search(ty, values, rows, columns, Some(&weights));
            let delta = &found.dequantize() - weight;
            (&delta.dot(h) * &delta).iter().map(|&v| f64::from(v)).sum::<f64>()
        };
        sites.iter().map(|&site| one(site)).sum()
    };
    let mut lowered = 0;
    for ty in [BlockType::Q40, BlockType::Q50, BlockType::Iq4Nl] {
        // One input at a time, so that no later fold rescales what was judged.
        for input in 0..block.inputs.len() {
            let sites = &block.inputs[input].sites;
            let targets: Vec<Target> =
                sites.iter().map(|&site| Target { site, scheme: Some(ty.scheme()) }).collect();
            let context = PassContext { block, seed: 0, survey: &[], original: &[], scratch: None };
            let (mut state, mut stats) = (before.clone(), stats.clone());
            let plain = loss(ty, &state, &stats, sites);
            awq.apply(&context, &targets, &mut state, &mut stats).unwrap();
            let scaled = loss(ty, &state, &stats, sites);
            assert!(scaled <= 1.001 * plain, "{ty} input {input}: {scaled} above {plain}");
            lowered += usize::from(scaled < 0.98 * plain);
        }
    }
    assert!(lowered > 0, "no scale was of use anywhere");
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let (code, _, error) = compress("awq-q4_k_m", &out, &[]);
    assert_eq!(code, 0, "{error}");
    let (code, said, error) = attar(&["verify", &text(&out), "--source", &model()]);
    assert_eq!(code, 0, "{said}{error}");
    let plain = perplexity(Path::new(&model()));
    assert!((perplexity(&out.join("model.gguf")) / plain - 1.0).abs() < 0.05);
}

/// A mixture stores the embedding in blocks too; calibration, measuring and later runs read it.
#[test]
fn a_mixture_is_calibrated_measured_and_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("mixture");
    let val = text(&data("tinystories_val.txt"));
    let measure = ["--eval-text", &val, "--eval-context", "256"];
    let (code, _, error) = compress("gptq-q4_k_m", &out, &measure);
    assert_eq!(code, 0, "{error}");
    let report: Value =
        serde_json::from_slice(&fs::read(out.join("report.json")).unwrap()).unwrap();
    assert!(report["eval"]["kl_mean"].as_f64().unwrap() < 0.05, "{}", report["eval"]);
    let file = out.join("model.gguf");
    let plain = perplexity(Path::new(&model()));
    assert!((perplexity(&file) / plain - 1.0).abs() < 0.05);
    // Every command reads blocks.
    let bench = ["bench", &text(&file), "--m", "1", "--rotate", "1MiB", "--seconds", "0"];
    let (code, said, error) = attar(&bench);
    assert!(code == 0 && said.contains("cpu-blocks"), "{said}{error}");
    let other = dir.path().join("searched");
    assert_eq!(compress("rtn-q4_k_m", &other, &[]).0, 0);
    let (code, said, error) = attar(&["diff", &text(&out), &text(&other), "--json"]);
    assert_eq!(code, 1, "{said}{error}");
    let diff: Value = serde_json::from_str(&said).unwrap();
    let lines = diff["tensors"].as_array().unwrap();
    assert!(
        lines.iter().any(|line| line["codes"].as_f64().is_some_and(|share| share > 0.0)),
        "{said}"
    );
    assert_eq!(attar(&["diff", &text(&out), &text(&file)]).0, 0);
    let (calib, path) = (text(&data("tinystories_calib.txt")), text(&file));
    let again = text(&dir.path().join("again"));
    let args = ["compress", &path, "--preset", "gptq-w4", "--out", &again, "--text", &calib];
    let (code, _, error) = attar(&[&args[..], &["--context", "256", "--samples", "4"]].concat());
    assert_eq!(code, 0, "{error}");
}

/// Symmetric 4-bit codes of gptq carry over to q4_0, whose scale is repeated within a group.
#[test]
fn affine_codes_carry_over_between_containers() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("both");
    let layouts = ["--layout", "gptq", "--layout", "q4_0"];
    let (code, _, error) = compress("gptq-w4", &out, &layouts);
    assert_eq!(code, 0, "{error}");
    let (a, b) = (perplexity(&out.join("gptq")), perplexity(&out.join("q4_0")));
    assert!((a / b - 1.0).abs() < 1e-6, "{a} {b}");
    let convert = |from: &Path, layout: &str, to: &str| {
        let to = dir.path().join(to);
        let args = ["convert", &text(from), "--layout", layout, "--out", &text(&to)];
        let (code, said, error) = attar(&args);
        assert_eq!(code, 0, "{error}");
        (to, said)
    };
    let (q4, said) = convert(&out.join("gptq"), "q4_0", "q4");
    assert!(said.contains("exact: all 14 quantized linears carry over"), "{said}");
    assert_eq!(
        fs::read(q4.join("model.gguf")).unwrap(),
        fs::read(out.join("q4_0/model.gguf")).unwrap()
    );
    let (back, said) = convert(&q4, "compressed-tensors", "back");
    assert!(said.contains("exact: all 14"), "{said}");
    assert!((perplexity(&back) / a - 1.0).abs() < 1e-6);
    let (_, said) = convert(&out.join("gptq"), "q8_0", "wide");
    assert!(said.contains("exact: all 14"), "{said}");
    let (_, said) = convert(&q4, "q4_k", "stand-in");
    assert!(said.contains("exact: all 14"), "q5_0 stands in and holds the codes of q4_0: {said}");
    let (_, said) = convert(&q4, "iq4_nl", "rounded");
    assert!(said.contains("not exact: 14 linears were rounded anew"), "{said}");
    // Asymmetric codes of 4 bits fit the 5 of q5_0, not those of q4_0.
    let awq = dir.path().join("awq");
    let (code, _, error) = compress("awq-w4", &awq, &["--layout", "awq"]);
    assert_eq!(code, 0, "{error}");
    let (_, said) = convert(&awq, "q5_0", "five");
    assert!(said.contains("exact: all 14"), "{said}");
    let (_, said) = convert(&awq, "q4_0", "four");
    assert!(said.contains("not exact: 14"), "{said}");
    // Plain numbers, both ways.
    let (plain, said) = convert(Path::new(&model()), "f32", "f32");
    assert!(said.contains("exact"), "{said}");
    let (a, b) = (Checkpoint::open(Path::new(&model())), Checkpoint::open(&plain));
    let (a, b) = (a.unwrap(), b.unwrap());
    for header in b.headers() {
        // The demo model has its tied embedding under the head's name.
        let there = if a.header(&header.name).is_some() { &header.name } else { "lm_head.weight" };
        let (a, b) = (a.read(there).unwrap(), b.read(&header.name).unwrap());
        assert_eq!(a.to_f32().unwrap(), b.to_f32().unwrap(), "{}", header.name);
    }
}

#[test]
fn what_a_file_cannot_hold_is_refused_before_any_work() {
    let dir = tempfile::tempdir().unwrap();
    let refuse = |args: &[&str], word: &str| {
        let model = model();
        let mut all = vec!["plan", &model];
        all.extend(args);
        let (code, _, error) = attar(&all);
        assert_eq!(code, 2, "{error}");
        assert!(error.contains(word), "wanted {word:?} in: {error}");
    };
    refuse(&["--preset", "rtn-w4", "--layout", "q4_k"], "leave `scheme` away");
    refuse(&["--preset", "awq-w4", "--layout", "q4_0"], "asymmetric codes need one bit more");
    refuse(&["--preset", "rtn", "--layout", "q4_k", "--layout", "gptq"], "scales of their own");
    refuse(&["--preset", "rtn", "--layout", "gptq"], "has no scheme");
    let recipe = dir.path().join("r.toml");
    let emit =
        "[[step]]\npass = \"rtn\"\n[[emit]]\nlayout = \"q4_0\"\ncontainer = \"safetensors\"\n";
    fs::write(&recipe, emit).unwrap();
    refuse(&["--recipe", &text(&recipe)], "lies in container gguf");
    // A tokenizer that GGUF has no name for.
    let other = dir.path().join("model");
    copy(&other);
    let path = other.join("tokenizer.json");
    let json = fs::read_to_string(&path).unwrap();
    fs::write(&path, json.replace("\"Prepend\"", "\"Append\"")).unwrap();
    let args = ["plan", &text(&other), "--preset", "rtn", "--layout", "q8_0"];
    let (code, _, error) = attar(&args);
    assert_eq!(code, 2);
    assert!(error.contains("no GGUF name is known for its normalizer"), "{error}");
    // A file that is cut off.
    let out = dir.path().join("out");
    assert_eq!(compress("rtn", &out, &["--layout", "q8_0"]).0, 0);
    let file = out.join("model.gguf");
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
    let (code, _, error) = attar(&["inspect", &text(&file)]);
    assert_eq!(code, 2);
    assert!(error.contains("cut off"), "{error}");
}

/// `gguf-rs` as a second reader, for the types that it sizes rightly.
#[test]
fn another_reader_finds_the_same() {
    let dir = tempfile::tempdir().unwrap();
    for layout in ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"] {
        let out = dir.path().join(layout);
        let (code, _, error) = compress("rtn", &out, &["--layout", layout]);
        assert_eq!(code, 0, "{error}");
        let path = out.join("model.gguf");
        let ours = GgufFile::open(&path).unwrap();
        let mut container = gguf_rs::get_gguf_container(&text(&path)).unwrap();
        let theirs = container.decode().unwrap();
        assert_eq!(theirs.num_tensor() as usize, ours.header().tensors.len());
        assert_eq!(theirs.metadata().len(), ours.header().metadata.0.len());
        let first = ours.header().tensors.iter().map(|tensor| tensor.start).min().unwrap();
        for (tensor, other) in ours.header().tensors.iter().zip(theirs.tensors()) {
            assert_eq!(tensor.name, other.name);
            assert_eq!(tensor.ty.0, other.kind);
            assert_eq!(tensor.length as u64, other.size, "{}", tensor.name);
            assert_eq!((tensor.start - first) as u64, other.offset);
            let dims: Vec<u64> = tensor.dims.iter().map(|&dim| dim as u64).collect();
            let shape = other.shape.iter().copied().take(dims.len()).collect::<Vec<u64>>();
            assert_eq!(shape, dims, "{}", tensor.name);
        }
    }
}
