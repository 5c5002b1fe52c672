//! One training step (forward, backward, AdamW) of a 4.95 M-parameter Llama on 8 windows of 256 tokens, by our code or by
//! candle: `attar-candle ours|candle [steps]`. Prints a line of JSON with the fastest step and the resident peak.
//! `RAYON_NUM_THREADS` sets the threads of both.

use std::time::Instant;

use attar_candle::{Block, Shape, Tables};
use attar_distill::{AdamW, Learner, Trained};
use attar_model::{Decoder, Differentiable, Objective, StepMemory, training_step};
use attar_tensor::{
    DType, SourceError, Tensor, TensorHeader, TensorSource, TensorView,
    linalg::softmax_row_in_place, rng::Rng,
};
use candle_core::{Device, Var};
use candle_nn::{AdamW as CandleAdamW, Optimizer, ParamsAdamW};
use rayon::prelude::*;
use serde_json::json;

const HIDDEN: usize = 256;
const INNER: usize = 704;
const HEADS: usize = 4;
const KV: usize = 2;
const DIM: usize = 64;
const VOCAB: usize = 2048;
const LAYERS: usize = 6;
const LENGTH: usize = 256;
const BATCH: usize = 8;

fn peak_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find(|line| line.starts_with("VmHWM")).expect("a peak");
    line.split_whitespace().nth(1).and_then(|n| n.parse::<f64>().ok()).expect("kB") / 1024.0
}

/// Names, shapes and values of every tensor, the same for both.
fn weights() -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let mut rng = Rng::new(1);
    let mut all = Vec::new();
    let mut put = |name: String, shape: Vec<usize>| {
        let n = shape.iter().product();
        let values = if shape.len() == 1 {
            vec![1.0; n]
        } else {
            rng.normals(n).iter().map(|v| 0.02 * v).collect()
        };
        all.push((name, shape, values));
    };
    put("model.embed_tokens.weight".into(), vec![VOCAB, HIDDEN]);
    put("model.norm.weight".into(), vec![HIDDEN]);
    for layer in 0..LAYERS {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        for (part, out, inner) in [
            ("self_attn.q_proj", HEADS * DIM, HIDDEN),
            ("self_attn.k_proj", KV * DIM, HIDDEN),
            ("self_attn.v_proj", KV * DIM, HIDDEN),
            ("self_attn.o_proj", HIDDEN, HEADS * DIM),
            ("mlp.gate_proj", INNER, HIDDEN),
            ("mlp.up_proj", INNER, HIDDEN),
            ("mlp.down_proj", HIDDEN, INNER),
        ] {
            put(name(part), vec![out, inner]);
        }
        put(name("input_layernorm"), vec![HIDDEN]);
        put(name("post_attention_layernorm"), vec![HIDDEN]);
    }
    all
}

fn data() -> (Vec<u32>, Vec<u32>) {
    let id = |x: usize| ((x as u64 * 2_654_435_761 >> 7) % VOCAB as u64) as u32;
    let ids: Vec<u32> = (0..BATCH * LENGTH).map(id).collect();
    let targets = ids.iter().map(|&x| (x * 3 + 1) % VOCAB as u32).collect();
    (ids, targets)
}

struct Memory(Vec<TensorHeader>, Vec<Tensor>);

impl TensorSource for Memory {
    fn headers(&self) -> &[TensorHeader] {
        &self.0
    }

    fn read(&self, name: &str) -> Result<TensorView<'_>, SourceError> {
        let at = self.0.iter().position(|header| header.name == name);
        at.map(|at| self.1[at].view())
            .ok_or_else(|| SourceError::Missing { name: name.into(), place: "memory".into() })
    }
}

/// Cross-entropy with given targets.
struct CrossEntropy<'a>(&'a [u32]);

impl Objective for CrossEntropy<'_> {
    fn logits(&mut self, first: usize, logits: &mut [f32]) -> f64 {
        let n = self.0.len() as f32;
        let targets = &self.0[first..first + logits.len() / VOCAB];
        let losses: Vec<f64> = logits
            .par_chunks_mut(VOCAB)
            .zip(targets)
            .map(|(row, &target)| {
                softmax_row_in_place(row);
                let loss = -f64::from(row[target as usize]).ln();
                row[target as usize] -= 1.0;
                row.iter_mut().for_each(|v| *v /= n);
                loss
            })
            .collect();
        losses.iter().sum::<f64>() / f64::from(n)
    }
}

fn ours(steps: usize) -> (Vec<f64>, Vec<f64>, usize) {
    let config = json!({
        "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_attention_heads": HEADS, "num_key_value_heads": KV, "head_dim": DIM,
        "num_hidden_layers": LAYERS, "vocab_size": VOCAB, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": LENGTH, "tie_word_embeddings": true,
    });
    let mut all = weights();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    let count = all.iter().map(|(_, _, values)| values.len()).sum();
    let (headers, tensors) = all
        .into_iter()
        .map(|(name, shape, values)| {
            let tensor = Tensor::from_f32(DType::F32, shape.clone(), &values).expect("it fits");
            (TensorHeader { name, dtype: DType::F32, shape }, tensor)
        })
        .unzip();
    let source = Memory(headers, tensors);
    let decoder = Decoder::read(&config, &source).expect("the config is whole");
    let mut learner =
        Learner::read(&decoder, &source, &|_| None, Trained::All, None, 0).expect("values are finite");
    drop(source);
    let (ids, targets) = data();
    let windows: Vec<&[u32]> = ids.chunks(LENGTH).collect();
    let blocks = Differentiable::new(&decoder, LENGTH);
    let mut memory = StepMemory::new(LAYERS);
    let adamw = AdamW { decay: 0.01, ..AdamW::default() };
    let (mut losses, mut times) = (Vec::new(), Vec::new());
    for step in 0..steps {
        let begun = Instant::now();
        learner.clear();
        let mut objective = CrossEntropy(&targets);
        losses.push(training_step(
            &decoder,
            &blocks,
            &mut learner,
            &windows,
            &mut objective,
            &mut memory,
        ));
        learner.step(step + 1, 1e-3, adamw, f64::INFINITY);
        times.push(begun.elapsed().as_secs_f64());
    }
    (losses, times, count)
}

fn candle(steps: usize) -> candle_core::Result<(Vec<f64>, Vec<f64>, usize)> {
    let shape = Shape {
        heads: HEADS,
        kv_heads: KV,
        head_dim: DIM,
        eps: 1e-5,
        theta: 10000.0,
        window: None,
    };
    let mut count = 0;
    let vars: Vec<(String, Var)> = weights()
        .into_iter()
        .map(|(name, shape, values)| {
            count += values.len();
            let tensor = candle_core::Tensor::from_vec(values, shape, &Device::Cpu)?;
            Ok((name, Var::from_tensor(&tensor)?))
        })
        .collect::<candle_core::Result<_>>()?;
    let of = |name: &str| {
        vars.iter().find(|(own, _)| own == name).map(|(_, var)| var.clone()).expect("it was made")
    };
    let sites = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ];
    let blocks: Vec<Block> = (0..LAYERS)
        .map(|layer| {
            let of = |part: &str| of(&format!("model.layers.{layer}.{part}.weight"));
            Block {
                linears: sites.iter().map(|site| of(site)).collect(),
                biases: vec![None; 7],
                norms: vec![of("input_layernorm"), of("post_attention_layernorm")],
                qk_norm: None,
            }
        })
        .collect();
    let (table, norm) = (of("model.embed_tokens.weight"), of("model.norm.weight"));
    let (ids, targets) = data();
    let ids = candle_core::Tensor::from_vec(ids, BATCH * LENGTH, &Device::Cpu)?;
    let targets = candle_core::Tensor::from_vec(targets, BATCH * LENGTH, &Device::Cpu)?;
    let tables = Tables::new(shape, LENGTH, candle_core::DType::F32)?;
    let params = ParamsAdamW { lr: 1e-3, weight_decay: 0.01, ..ParamsAdamW::default() };
    let mut optimizer =
        CandleAdamW::new(vars.iter().map(|(_, var)| var.clone()).collect(), params)?;
    let (mut losses, mut times) = (Vec::new(), Vec::new());
    for _ in 0..steps {
        let begun = Instant::now();
        let mut x = table.index_select(&ids, 0)?.reshape((BATCH, LENGTH, HIDDEN))?;
        for block in &blocks {
            x = block.forward(shape, &tables, &x)?;
        }
        let x =
            candle_nn::ops::rms_norm_slow(&x, &norm, 1e-5)?.reshape((BATCH * LENGTH, HIDDEN))?;
        let logits = x.matmul(&table.t()?)?;
        let loss = candle_nn::loss::cross_entropy(&logits, &targets)?;
        optimizer.backward_step(&loss)?;
        losses.push(f64::from(loss.to_scalar::<f32>()?));
        times.push(begun.elapsed().as_secs_f64());
    }
    Ok((losses, times, count))
}

fn main() {
    let mut args = std::env::args().skip(1);
    let who = args.next().unwrap_or_default();
    let steps = args.next().and_then(|n| n.parse().ok()).unwrap_or(6);
    let (losses, times, parameters) = match who.as_str() {
        "ours" => ours(steps),
        "candle" => candle(steps).expect("candle runs"),
        _ => panic!("usage: attar-candle ours|candle [steps]"),
    };
    let best = times.iter().copied().fold(f64::INFINITY, f64::min);
    println!(
        "{}",
        json!({
            "who": who, "threads": rayon::current_num_threads(), "parameters": parameters,
            "step_ms": (best * 1e4).round() / 10.0, "peak_mib": peak_mib().round(),
            "losses": losses.iter().map(|l| (l * 1e4).round() / 1e4).collect::<Vec<_>>(),
        })
    );
}
