//! Logits of small seeded models against transformers: tests/golden/families, see PROVENANCE.md there.

#![allow(clippy::unwrap_used, reason = "a test may stop anywhere")]

use std::{collections::BTreeMap, fs, path::Path};

use attar_ir::{InputStats, Needs, Weight};
use attar_model::{
    BlockOps, BlockRun, Decoder, Generator, ModelError, Sampling, Spill, Stream, embed,
    final_logits, observe_block, run_block,
};
use attar_tensor::{
    DType, Scratch, SourceError, Tensor, TensorHeader, TensorSource, TensorView, compare::distance,
};
use safetensors::SafeTensors;

struct Memory {
    headers: Vec<TensorHeader>,
    tensors: BTreeMap<String, Tensor>,
}

impl TensorSource for Memory {
    fn headers(&self) -> &[TensorHeader] {
        &self.headers
    }

    fn read(&self, name: &str) -> Result<TensorView<'_>, SourceError> {
        self.tensors
            .get(name)
            .map(Tensor::view)
            .ok_or_else(|| SourceError::Missing { name: name.into(), place: "memory".into() })
    }
}

fn load(files: &[std::path::PathBuf]) -> BTreeMap<String, Tensor> {
    let mut all = BTreeMap::new();
    for file in files {
        let bytes = fs::read(file).unwrap();
        for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let dtype = DType::from_safetensors_name(&view.dtype().to_string()).unwrap();
            let tensor = Tensor::new(dtype, view.shape().to_vec(), view.data().to_vec()).unwrap();
            all.insert(name, tensor);
        }
    }
    all
}

fn source(tensors: BTreeMap<String, Tensor>) -> Memory {
    let headers = tensors
        .iter()
        .map(|(name, t)| TensorHeader {
            name: name.clone(),
            dtype: t.dtype(),
            shape: t.shape().to_vec(),
        })
        .collect();
    Memory { headers, tensors }
}

struct Case {
    name: String,
    decoder: Decoder,
    source: Memory,
    ids: Vec<u32>,
    logits: Vec<f32>,
}

fn cases() -> Vec<Case> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/families");
    let mut folders: Vec<_> =
        fs::read_dir(&root).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir()).collect();
    folders.sort();
    let mut cases = Vec::new();
    for folder in folders {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let mut home = folder.clone();
        if !home.join("config.json").exists() {
            home = root.join("../../data").join(&name);
        }
        let config = serde_json::from_slice(&fs::read(home.join("config.json")).unwrap()).unwrap();
        let weights: Vec<_> = fs::read_dir(&home)
            .unwrap()
            .map(|e| e.unwrap().path())
            .filter(|p| {
                p.extension().is_some_and(|e| e == "safetensors")
                    && !p.ends_with("golden.safetensors")
            })
            .collect();
        let source = source(load(&weights));
        let golden = load(&[folder.join("golden.safetensors")]);
        cases.push(Case {
            decoder: Decoder::read(&config, &source).unwrap_or_else(|e| panic!("{name}: {e}")),
            ids: golden["input_ids"].view().to_i64().unwrap().iter().map(|&i| i as u32).collect(),
            logits: golden["logits"].view().to_f32().unwrap(),
            name,
            source,
        });
    }
    cases
}

fn hidden(case: &Case) -> Stream {
    let mut stream = Stream::new(&[case.ids.len()], case.decoder.spec.hidden, None).unwrap();
    stream.write(0, &embed(&case.decoder, &case.source, &case.ids).unwrap()).unwrap();
    stream
}

#[test]
fn logits_of_every_family_agree_with_transformers() {
    let cases = cases();
    assert!(cases.len() >= 10, "golden models are there");
    for case in cases {
        let mut stream = hidden(&case);
        let layers = case.decoder.spec.layers;
        for index in 0..layers {
            let ops = BlockOps::load(&case.decoder, index, &case.source).unwrap();
            run_block(&case.decoder, index, &ops, &mut stream).unwrap();
        }
        let head = BlockOps::load(&case.decoder, layers, &case.source).unwrap();
        let logits = final_logits(&case.decoder, &head, &stream.read(0).unwrap());
        let error = distance(logits.as_slice().unwrap(), &case.logits).relative();
        assert!(error < 1e-4, "{}: relative error {error:e}", case.name);
    }
}

#[test]
fn decoding_with_a_cache_gives_the_same_logits() {
    for case in cases() {
        let sampling = Sampling { temperature: 0.0, seed: 0 };
        let n = case.ids.len();
        let mut generator = Generator::new(&case.decoder, &case.source, n, sampling).unwrap();
        let split = n - 5;
        generator.forward(&case.ids[..split]).unwrap();
        let mut last = Vec::new();
        for &id in &case.ids[split..] {
            last = generator.forward(&[id]).unwrap();
        }
        let vocab = case.decoder.spec.vocab;
        let error = distance(&last, &case.logits[(n - 1) * vocab..]).relative();
        assert!(error < 1e-4, "{}: relative error {error:e}", case.name);
    }
}

#[test]
fn staged_observation_equals_whole_observation_and_the_forward() {
    for case in cases() {
        let state = case.decoder.load_block(0, &case.source).unwrap();
        let needs = Needs::HESSIAN | Needs::ABS_MEAN | Needs::ABS_MAX;
        let mut stream = hidden(&case);
        let (whole, _) =
            observe_block(&case.decoder, 0, &case.source, &state, &stream, needs, None).unwrap();
        let mut run = BlockRun::begin(&case.decoder, 0, &case.source, &mut stream, None).unwrap();
        for (stage, want) in whole.inputs.iter().enumerate() {
            let got = run.observe(stage, &state, needs).unwrap();
            let (got, want) =
                (got.hessian.unwrap(), want.as_ref().unwrap().hessian.clone().unwrap());
            let error = distance(got.as_slice().unwrap(), want.as_slice().unwrap()).relative();
            assert!(error < 1e-6, "{} stage {stage}: {error:e}", case.name);
        }
        run.finish(&state).unwrap();
        let mut plain = hidden(&case);
        let ops = BlockOps::load(&case.decoder, 0, &case.source).unwrap();
        run_block(&case.decoder, 0, &ops, &mut plain).unwrap();
        assert_eq!(stream.read(0).unwrap(), plain.read(0).unwrap(), "{}", case.name);
    }
}

/// Windows of three lengths through block 0, observed, on a pool of `threads`.
fn calibrate(case: &Case, threads: usize, spill: Option<Spill>) -> (Vec<InputStats>, Vec<f32>) {
    let needs = Needs::HESSIAN | Needs::ABS_MEAN | Needs::SQUARE_SUM;
    let state = case.decoder.load_block(0, &case.source).unwrap();
    let lengths = [case.ids.len(), case.ids.len() - 3, 2];
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| {
        let mut stream = Stream::new(&lengths, case.decoder.spec.hidden, spill.as_ref()).unwrap();
        for (window, &length) in lengths.iter().enumerate() {
            let x = embed(&case.decoder, &case.source, &case.ids[..length]).unwrap();
            stream.write(window, &x).unwrap();
        }
        let mut run = BlockRun::begin(&case.decoder, 0, &case.source, &mut stream, spill).unwrap();
        let stats = (0..4).map(|stage| run.observe(stage, &state, needs).unwrap()).collect();
        run.finish(&state).unwrap();
        (stats, (0..3).flat_map(|window| stream.read(window).unwrap()).collect())
    })
}

#[test]
fn threads_and_spilling_do_not_change_a_bit() {
    let mut spill = Spill::above(0, Scratch::new(tempfile::tempfile));
    spill.gram = true;
    for case in cases().iter().filter(|c| c.name == "qwen3" || c.name == "mistral-sliding") {
        let one = calibrate(case, 1, None);
        assert_eq!(one, calibrate(case, 2, None), "{}", case.name);
        assert_eq!(one, calibrate(case, 2, Some(spill.clone())), "{}", case.name);
        for stats in &one.0 {
            assert_eq!(stats.tokens, 2 * case.ids.len() - 1);
            // The diagonal of H is 2/n times the sum of squares.
            let diagonal = stats.hessian.as_ref().unwrap().diag().to_vec();
            let n = stats.tokens as f64;
            let squares = stats.square_sum.as_ref().unwrap();
            let want: Vec<f32> = squares.iter().map(|s| (2.0 * s / n) as f32).collect();
            assert!(distance(&diagonal, &want).relative() < 1e-5);
        }
    }
}

#[test]
fn a_later_stage_reads_what_the_changed_weights_put_out() {
    let case = cases().into_iter().find(|c| c.name == "llama-default").unwrap();
    let needs = Needs::ABS_MEAN;
    let original = case.decoder.load_block(0, &case.source).unwrap();
    let mut state = original.clone();
    let mut stream = hidden(&case);
    let mut run = BlockRun::begin(&case.decoder, 0, &case.source, &mut stream, None).unwrap();
    run.observe(0, &state, needs).unwrap();
    // Halved value rows halve the attention output, which is stage 1.
    let Weight::Dense(v) = &mut state.linears[2].weight else { panic!("loaded dense") };
    v.mapv_inplace(|w| w * 0.5);
    let got = run.observe(1, &state, needs).unwrap().abs_mean.unwrap();
    let (whole, _) =
        observe_block(&case.decoder, 0, &case.source, &original, &hidden(&case), needs, None)
            .unwrap();
    let whole = whole.input(1).unwrap().abs_mean.as_ref().unwrap();
    let want: Vec<f32> = whole.iter().map(|v| v * 0.5).collect();
    assert!(distance(&got, &want).relative() < 1e-6);
}

#[test]
fn tokens_and_embeddings_that_cannot_be_are_refused() {
    let mut case = cases().into_iter().find(|c| c.name == "llama-default").unwrap();
    let (vocab, width) = (case.decoder.spec.vocab as u32, case.decoder.spec.hidden);
    let error = embed(&case.decoder, &case.source, &[vocab]).unwrap_err().to_string();
    assert!(error.contains(&format!("token {vocab}")), "{error}");
    let name = case.decoder.graph.embedding.clone();
    let good = case.source.tensors[&name].clone();
    let mut values = good.view().to_f32().unwrap();
    values[2 * width + 1] = f32::INFINITY;
    let bad = Tensor::from_f32(DType::F32, good.shape().to_vec(), &values).unwrap();
    case.source.tensors.insert(name, bad);
    let error = embed(&case.decoder, &case.source, &[1, 2]).unwrap_err().to_string();
    assert!(error.contains(&format!("index {}", 2 * width + 1)), "{error}");
}

#[test]
fn bad_models_are_refused_by_name() {
    let case = cases().into_iter().find(|c| c.name == "llama-default").unwrap();
    let config = serde_json::json!({"model_type": "mamba"});
    let error = Decoder::read(&config, &case.source).unwrap_err().to_string();
    assert!(error.contains("mamba") && error.contains("llama"), "{error}");

    let name = "model.layers.1.mlp.up_proj.weight";
    let mut tensors = case.source.tensors.clone();
    let bad = tensors[name].clone();
    let mut values = bad.view().to_f32().unwrap();
    values[7] = f32::NAN;
    tensors
        .insert(name.into(), Tensor::from_f32(DType::F32, bad.shape().to_vec(), &values).unwrap());
    let error = case.decoder.load_block(1, &source(tensors.clone())).unwrap_err();
    assert!(
        matches!(&error, ModelError::Tensor { name: n, reason } if n == name && reason.contains('7'))
    );

    tensors.remove(name);
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/golden/families/llama-default/config.json");
    let config = serde_json::from_slice(&fs::read(root).unwrap()).unwrap();
    let error = Decoder::read(&config, &source(tensors)).unwrap_err().to_string();
    assert!(error.contains(name), "{error}");
}
