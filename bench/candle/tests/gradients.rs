//! Our gradients of a block against candle's automatic differentiation in f64: grouped heads, norms of queries and keys, a
//! sliding window, biases, two windows in a batch.

use attar_candle::{Block, Shape, Tables};
use attar_model::{BlockGradient, BlockWeights, Decoder, Differentiable, Space, Tape};
use attar_tensor::{
    DType, SourceError, TensorHeader, TensorSource, TensorView, compare::distance, rng::Rng,
};
use candle_core::{DType as CandleDType, Device, Var};
use serde_json::json;

/// Allowed relative error of a gradient: f32 sums against f64.
const ALLOWED: f64 = 1e-5;
const HIDDEN: usize = 48;
const INNER: usize = 80;
const VOCAB: usize = 8;
const DIM: usize = 12;
const LENGTH: usize = 150;

/// Headers of a model of one block; nothing is read.
struct Promised(Vec<TensorHeader>);

impl TensorSource for Promised {
    fn headers(&self) -> &[TensorHeader] {
        &self.0
    }

    fn read(&self, name: &str) -> Result<TensorView<'_>, SourceError> {
        Err(SourceError::Missing { name: name.into(), place: "nowhere".into() })
    }
}

fn check(heads: usize, kv: usize, qk_norm: bool, window: Option<usize>) {
    let config = json!({
        "model_type": if qk_norm { "qwen3" } else { "llama" }, "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_attention_heads": heads, "num_key_value_heads": kv,
        "head_dim": DIM, "num_hidden_layers": 1, "vocab_size": VOCAB, "rms_norm_eps": 1e-5,
        "rope_theta": 500.0, "max_position_embeddings": 256, "attention_bias": true,
        "mlp_bias": true, "tie_word_embeddings": true, "use_sliding_window": window.is_some(),
        "sliding_window": window, "max_window_layers": 0,
    });
    let mut rng = Rng::new(5);
    let mut random = |n: usize, mean: f32, deviation: f32| -> Vec<f32> {
        rng.normals(n).iter().map(|v| mean + deviation * v).collect()
    };
    let sites = [
        ("self_attn.q_proj", heads * DIM, HIDDEN),
        ("self_attn.k_proj", kv * DIM, HIDDEN),
        ("self_attn.v_proj", kv * DIM, HIDDEN),
        ("self_attn.o_proj", HIDDEN, heads * DIM),
        ("mlp.gate_proj", INNER, HIDDEN),
        ("mlp.up_proj", INNER, HIDDEN),
        ("mlp.down_proj", HIDDEN, INNER),
    ];
    // Tensors in the order of linears, biases, norms, norms of heads; then input and gradient on the output.
    let mut shapes: Vec<(String, Vec<usize>)> = Vec::new();
    let prefix = "model.layers.0.";
    for (name, out, inner) in sites {
        shapes.push((format!("{prefix}{name}.weight"), vec![out, inner]));
    }
    for (name, out, _) in sites {
        shapes.push((format!("{prefix}{name}.bias"), vec![out]));
    }
    for name in ["input_layernorm", "post_attention_layernorm"] {
        shapes.push((format!("{prefix}{name}.weight"), vec![HIDDEN]));
    }
    for name in ["self_attn.q_norm", "self_attn.k_norm"] {
        shapes.push((format!("{prefix}{name}.weight"), vec![DIM]));
    }
    let values: Vec<Vec<f32>> = shapes
        .iter()
        .map(|(name, shape)| {
            let n = shape.iter().product();
            match shape.len() {
                2 => random(n, 0.0, 0.25),
                _ if name.ends_with("bias") => random(n, 0.0, 0.2),
                _ => random(n, 1.0, 0.2),
            }
        })
        .collect();
    let (input, pull) =
        (random(2 * LENGTH * HIDDEN, 0.0, 1.0), random(2 * LENGTH * HIDDEN, 0.0, 1.0));

    // Ours.
    let mut headers: Vec<TensorHeader> = shapes
        .iter()
        .cloned()
        .chain([
            ("model.norm.weight".to_owned(), vec![HIDDEN]),
            ("model.embed_tokens.weight".to_owned(), vec![VOCAB, HIDDEN]),
        ])
        .map(|(name, shape)| TensorHeader { name, dtype: DType::F32, shape })
        .collect();
    headers.sort_by(|a, b| a.name.cmp(&b.name));
    let decoder = Decoder::read(&config, &Promised(headers)).unwrap();
    assert_eq!(decoder.spec.window[0], window);
    let biased = |site: usize| decoder.block(0).sites[site].bias;
    let weights = BlockWeights {
        linears: values[..7].iter().map(Vec::as_slice).collect(),
        biases: (0..7).map(|site| biased(site).then(|| values[7 + site].as_slice())).collect(),
        norms: values[14..16].iter().map(Vec::as_slice).collect(),
        qk_norm: qk_norm.then(|| (values[16].as_slice(), values[17].as_slice())),
    };
    let mut gradients: Vec<Vec<f32>> = values.iter().map(|v| vec![0.0; v.len()]).collect();
    let mut d = pull.clone();
    let mut output = Vec::new();
    {
        let mut places: Vec<Option<&mut [f32]>> =
            gradients.iter_mut().map(|g| Some(g.as_mut_slice())).collect();
        let mut take = |range: std::ops::Range<usize>| -> Vec<_> {
            range.map(|at| places[at].take()).collect()
        };
        let mut gradient = BlockGradient {
            linears: take(0..7),
            biases: take(7..14)
                .into_iter()
                .enumerate()
                .map(|(site, d)| d.filter(|_| biased(site)))
                .collect(),
            norms: take(14..16),
            qk_norm: match take(16..18).as_mut_slice() {
                [q, k] if qk_norm => q.take().zip(k.take()),
                _ => None,
            },
            input: true,
        };
        let block = Differentiable::new(&decoder, LENGTH);
        let (mut tape, mut space) = (Tape::default(), Space::default());
        let lengths = [LENGTH, LENGTH];
        block.forward(0, &weights, &lengths, &input, Some(&mut tape), &mut space, &mut output);
        let space = &mut space;
        block.backward(0, &weights, &lengths, &input, &mut tape, &mut gradient, space, &mut d);
    }

    // candle's.
    let shape =
        Shape { heads, kv_heads: kv, head_dim: DIM, eps: f64::from(1e-5f32), theta: 500.0, window };
    let var = |values: &[f32], shape: Vec<usize>| {
        let wide: Vec<f64> = values.iter().map(|&v| f64::from(v)).collect();
        Var::from_tensor(&candle_core::Tensor::from_vec(wide, shape, &Device::Cpu).unwrap())
            .unwrap()
    };
    let vars: Vec<Var> =
        values.iter().zip(&shapes).map(|(values, (_, shape))| var(values, shape.clone())).collect();
    let x = var(&input, vec![2, LENGTH, HIDDEN]);
    let pull = var(&pull, vec![2, LENGTH, HIDDEN]);
    let block = Block {
        linears: vars[..7].to_vec(),
        biases: (0..7).map(|site| biased(site).then(|| vars[7 + site].clone())).collect(),
        norms: vars[14..16].to_vec(),
        qk_norm: qk_norm.then(|| (vars[16].clone(), vars[17].clone())),
    };
    let tables = Tables::new(shape, LENGTH, CandleDType::F64).unwrap();
    let made = block.forward(shape, &tables, &x).unwrap();
    let narrow = |tensor: &candle_core::Tensor| -> Vec<f32> {
        let wide = tensor.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        wide.iter().map(|&v| v as f32).collect()
    };
    let error = distance(&output, &narrow(&made)).relative();
    assert!(error < ALLOWED, "output: {error:e}");
    let found = (made * pull.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
    let error = distance(&d, &narrow(found.get(&x).unwrap())).relative();
    assert!(error < ALLOWED, "input: {error:e}");
    let mut compared = 0;
    for ((var, gradient), (name, _)) in vars.iter().zip(&gradients).zip(&shapes) {
        let Some(want) = found.get(var) else {
            assert!(gradient.iter().all(|v| v.abs() < f32::MIN_POSITIVE), "{name} is not there");
            continue;
        };
        let want = narrow(want);
        let error = distance(gradient, &want).relative();
        assert!(error < ALLOWED, "{name}: {error:e}");
        compared += 1;
    }
    assert!(compared >= 9 + (0..7).filter(|&site| biased(site)).count());
}

#[test]
fn a_llama_block_has_the_gradients_that_candle_finds() {
    check(4, 2, false, None);
}

#[test]
fn norms_of_heads_a_window_and_one_key_head_have_them_too() {
    check(4, 1, true, Some(40));
}
