//! A whole model's gradient against central differences, for every way of training; what a learner keeps and gives back.

#![allow(clippy::unwrap_used, reason = "a test may stop anywhere")]

use attar_distill::{AdamW, Learner, Trained, fake_quantize};
use attar_model::{Decoder, Differentiable, Objective, StepMemory, training_step};
use attar_tensor::{
    ActivationScheme, DType, Granularity, QuantScheme, ScaleGrid, SourceError, Tensor,
    TensorHeader, TensorSource, TensorView, rng::Rng,
};
use serde_json::json;

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

const VOCAB: usize = 24;

fn model(tied: bool) -> (Decoder, Memory) {
    let (hidden, inner, layers, dim) = (16, 24, 3, 4);
    let config = json!({
        "model_type": "qwen3", "hidden_size": hidden, "intermediate_size": inner,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": dim,
        "num_hidden_layers": layers, "vocab_size": VOCAB, "rms_norm_eps": 1e-4,
        "max_position_embeddings": 64, "tie_word_embeddings": tied, "attention_bias": true,
    });
    let mut rng = Rng::new(21);
    let mut all = Vec::new();
    let mut put = |name: String, shape: Vec<usize>| {
        let n = shape.iter().product();
        let (mean, deviation) = match (shape.len(), name.ends_with("bias")) {
            (2, _) => (0.0, 0.3),
            (_, true) => (0.0, 0.1),
            _ => (1.0, 0.1),
        };
        let values: Vec<f32> = rng.normals(n).iter().map(|v| mean + deviation * v).collect();
        let tensor = Tensor::from_f32(DType::F32, shape.clone(), &values).unwrap();
        all.push((TensorHeader { name, dtype: DType::F32, shape }, tensor));
    };
    put("model.embed_tokens.weight".into(), vec![VOCAB, hidden]);
    if !tied {
        put("lm_head.weight".into(), vec![VOCAB, hidden]);
    }
    put("model.norm.weight".into(), vec![hidden]);
    for layer in 0..layers {
        for (site, out, inner, bias) in [
            ("self_attn.q_proj", 4 * dim, hidden, true),
            ("self_attn.k_proj", 2 * dim, hidden, true),
            ("self_attn.v_proj", 2 * dim, hidden, true),
            ("self_attn.o_proj", hidden, 4 * dim, true),
            ("mlp.gate_proj", inner, hidden, false),
            ("mlp.up_proj", inner, hidden, false),
            ("mlp.down_proj", hidden, inner, false),
        ] {
            put(format!("model.layers.{layer}.{site}.weight"), vec![out, inner]);
            if bias {
                put(format!("model.layers.{layer}.{site}.bias"), vec![out]);
            }
        }
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            put(format!("model.layers.{layer}.{norm}.weight"), vec![hidden]);
        }
        for norm in ["self_attn.q_norm", "self_attn.k_norm"] {
            put(format!("model.layers.{layer}.{norm}.weight"), vec![dim]);
        }
    }
    all.sort_by(|(a, _), (b, _)| a.name.cmp(&b.name));
    let (headers, tensors) = all.into_iter().unzip();
    let source = Memory(headers, tensors);
    (Decoder::read(&config, &source).unwrap(), source)
}

/// `Σ pull · logits + ½ Σ h²` with h what the first block puts out.
struct Pull(Vec<f32>);

impl Objective for Pull {
    fn logits(&mut self, first: usize, logits: &mut [f32]) -> f64 {
        let pull = &self.0[first * VOCAB..][..logits.len()];
        let sum = logits.iter().zip(pull).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        logits.copy_from_slice(pull);
        sum
    }

    fn hidden(&mut self, index: usize, output: &[f32], d: &mut [f32]) -> f64 {
        if index != 0 {
            return 0.0;
        }
        for (d, x) in d.iter_mut().zip(output) {
            *d += x;
        }
        output.iter().map(|&x| f64::from(x) * f64::from(x) / 2.0).sum()
    }
}

fn windows() -> Vec<Vec<u32>> {
    let mut rng = Rng::new(8);
    [9, 5].iter().map(|&n| (0..n).map(|_| rng.below(VOCAB) as u32).collect()).collect()
}

fn loss(decoder: &Decoder, learner: &mut Learner, tapes: usize) -> f64 {
    let windows = windows();
    let windows: Vec<&[u32]> = windows.iter().map(Vec::as_slice).collect();
    let mut pull = Pull(Rng::new(9).normals(14 * VOCAB));
    let blocks = Differentiable::new(decoder, 9);
    let mut memory = StepMemory::new(tapes);
    training_step(decoder, &blocks, learner, &windows, &mut pull, &mut memory)
}

/// The derivative along a step of gradient descent is minus the squared norm of the gradient, whatever is trained: this
/// holds only when every part of the gradient has the right value.
fn check_descent(decoder: &Decoder, learner: &Learner, name: &str) {
    let mut learner = learner.clone();
    learner.clear();
    loss(decoder, &mut learner, 3);
    let square = learner.gradient_square();
    assert!(square > 1.0, "{name}: there is a gradient");
    let rate = 1e-3 / square.sqrt();
    let moved = |by: f64| {
        let mut learner = learner.clone();
        learner.descend(by as f32);
        loss(decoder, &mut learner, 3)
    };
    let slope = (moved(-rate) - moved(rate)) / (2.0 * rate);
    assert!((slope / square - 1.0).abs() < 2e-2, "{name}: {slope} along, {square} squared");
}

#[test]
fn the_slope_along_the_gradient_is_its_square() {
    for tied in [true, false] {
        let (decoder, source) = model(tied);
        for (trained, name) in [
            (Trained::All, "all"),
            (Trained::Norms, "norms"),
            (Trained::Adapters { rank: 3, alpha: 6.0 }, "adapters"),
        ] {
            let mut learner =
                Learner::read(&decoder, &source, &|_| None, trained, None, 1).unwrap();
            if name == "adapters" {
                // From zero B has a gradient and A has none.
                loss(&decoder, &mut learner, 3);
                learner.step(1, 0.05, AdamW::default(), f64::INFINITY);
            }
            check_descent(&decoder, &learner, name);
        }
    }
}

#[test]
fn neither_kept_tapes_nor_threads_change_bits_and_a_state_comes_back() {
    let (decoder, source) = model(true);
    let train = |threads: usize, tapes: usize, cut: bool| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let fresh =
                || Learner::read(&decoder, &source, &|_| None, Trained::All, None, 1).unwrap();
            let mut learner = fresh();
            for t in 1..=4 {
                if cut && t == 3 {
                    let state: Vec<(String, Vec<f32>)> =
                        learner.state().into_iter().map(|(n, v)| (n, v.to_vec())).collect();
                    learner = fresh();
                    let read = |name: &str| {
                        state.iter().find(|(own, _)| own == name).map(|(_, v)| v.clone())
                    };
                    learner.restore(&read).unwrap();
                }
                learner.clear();
                loss(&decoder, &mut learner, tapes);
                learner.step(t, 1e-2, AdamW::default(), 1.0);
            }
            let names: Vec<String> = learner.names().map(str::to_owned).collect();
            names
                .iter()
                .flat_map(|name| learner.value(name).unwrap().into_owned())
                .collect::<Vec<f32>>()
        })
    };
    let want = train(1, 3, false);
    for (threads, tapes, cut) in [(2, 3, false), (1, 0, false), (2, 1, true)] {
        assert!(want == train(threads, tapes, cut), "{threads} threads, {tapes} tapes, cut: {cut}");
    }
    let mut learner = Learner::read(&decoder, &source, &|_| None, Trained::All, None, 1).unwrap();
    let missing = learner.restore(&|_| None).unwrap_err();
    assert_eq!(missing, "model.embed_tokens.weight.value");
}

#[test]
fn adapters_begin_as_nothing_and_are_merged_into_their_linears_alone() {
    let (decoder, source) = model(false);
    let trained = Trained::Adapters { rank: 2, alpha: 4.0 };
    let mut learner = Learner::read(&decoder, &source, &|_| None, trained, None, 1).unwrap();
    let name = "model.layers.1.mlp.up_proj.weight";
    let before = source.read(name).unwrap().to_f32().unwrap();
    assert_eq!(learner.value(name).unwrap().as_ref(), before);
    loss(&decoder, &mut learner, 3);
    learner.step(1, 0.1, AdamW::default(), f64::INFINITY);
    let after = learner.value(name).unwrap().into_owned();
    // B moved from zero by 0.1 in every element, A is random: a change of rank two.
    assert!(before.iter().zip(&after).filter(|(a, b)| (*a - *b).abs() > 1e-4).count() > 300);
    let norm = "model.layers.1.input_layernorm.weight";
    assert_eq!(learner.value(norm).unwrap().as_ref(), source.read(norm).unwrap().to_f32().unwrap());
    assert!(learner.names().all(|name| name.contains("_proj.weight")));
    assert_eq!(learner.trained(), 3 * 2 * (32 + 24 + 24 + 32 + 3 * 40));
}

#[test]
fn the_forward_sees_rounded_linears_and_their_values_stay_free() {
    let (decoder, source) = model(true);
    let scheme = QuantScheme {
        bits: 3,
        granularity: Granularity::Group(8),
        symmetric: true,
        scale_grid: ScaleGrid::F16,
        zero_min: 1,
        activations: ActivationScheme::Float,
    };
    let (mut plain, mut rounded) = (
        Learner::read(&decoder, &source, &|_| None, Trained::All, None, 1).unwrap(),
        Learner::read(&decoder, &source, &|_| None, Trained::All, Some(scheme), 1).unwrap(),
    );
    let (a, b) = (loss(&decoder, &mut plain, 3), loss(&decoder, &mut rounded, 3));
    assert!((a - b).abs() > 1e-3, "{a} {b}");
    // A model whose linears are rounded already is seen as it is.
    let name = "model.layers.0.mlp.down_proj.weight";
    let mut values = rounded.value(name).unwrap().into_owned();
    assert_eq!(values, source.read(name).unwrap().to_f32().unwrap());
    fake_quantize(&mut values, 24, scheme);
    let levels: std::collections::BTreeSet<u32> =
        values[..8].iter().map(|v| v.abs().to_bits()).collect();
    assert!(levels.len() <= 5, "{levels:?}");
    // Symmetric, the largest weight is 3.5 steps from zero: nothing is further than half a step from its value.
    let before = source.read(name).unwrap().to_f32().unwrap();
    for (before, after) in before.chunks(8).zip(values.chunks(8)) {
        let step = before.iter().fold(0.0f32, |m, v| m.max(v.abs())) / 3.5;
        let worst = before.iter().zip(after).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(worst <= 0.501 * step && worst > 0.0, "{worst} {step}");
    }
    rounded.step(1, 0.01, AdamW::default(), f64::INFINITY);
    let moved = rounded.value(name).unwrap().into_owned();
    assert!(moved.iter().zip(&before).all(|(a, b)| (a - b).abs() < 0.011));
}
