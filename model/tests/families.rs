//! Logits of small seeded models against transformers: tests/golden/families, see PROVENANCE.md there.

#![allow(clippy::unwrap_used, reason = "a test may stop anywhere")]

use std::{collections::BTreeMap, fs, path::Path};

use attar_ir::Needs;
use attar_model::{
    BlockOps, BlockRun, Decoder, Generator, ModelError, Sampling, Stream, embed, final_logits,
    observe_block, run_block,
};
use attar_tensor::{
    DType, SourceError, Tensor, TensorHeader, TensorSource, TensorView, compare::distance,
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
            observe_block(&case.decoder, 0, &case.source, &state, &stream, needs).unwrap();
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
