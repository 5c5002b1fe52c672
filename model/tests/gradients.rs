//! Backward of blocks and of the output head against central differences of an f64 forward written out in loops.

#![allow(clippy::unwrap_used, reason = "a test may stop anywhere")]

use attar_ir::{Block, BlockGradients, BlockState};
use attar_model::{
    BlockGradient, BlockOps, BlockWeights, Decoder, Differentiable, ModelError, Space,
};
use attar_model::{
    Spill, Stream, Tape, embed, embed_backward, final_logits, run_block, sweep_gradients,
};
use attar_tensor::{
    DType, SourceError, Tensor, TensorHeader, TensorSource, TensorView, compare::distance, rng::Rng,
};
use serde_json::{Value, json};

const ATTENTION_FACTOR: f64 = 1.25;

/// A checkpoint in memory.
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

/// Values of a block by name of their role; f32 numbers, held as f64.
#[derive(Clone)]
struct Values {
    linears: Vec<Vec<f64>>,
    biases: Vec<Vec<f64>>,
    norms: Vec<Vec<f64>>,
    qk: Vec<Vec<f64>>,
    input: Vec<f64>,
}

struct Case {
    name: &'static str,
    decoder: Decoder,
    source: Memory,
    lengths: Vec<usize>,
    values: Values,
    /// Gradient on the output.
    pull: Vec<f64>,
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&v| f64::from(v)).collect()
}

fn narrow(x: &[f64]) -> Vec<f32> {
    x.iter().map(|&v| v as f32).collect()
}

fn case(name: &'static str, config: &Value, lengths: &[usize]) -> Case {
    let size = |key: &str| config[key].as_u64().unwrap() as usize;
    let (hidden, inner, vocab) =
        (size("hidden_size"), size("intermediate_size"), size("vocab_size"));
    let (q, kv) = (
        size("num_attention_heads") * size("head_dim"),
        size("num_key_value_heads") * size("head_dim"),
    );
    let mut rng = Rng::new(11);
    let (mut headers, mut tensors) = (Vec::new(), Vec::new());
    let mut put = |name: String, shape: &[usize], mean: f32, deviation: f32| {
        let values: Vec<f32> =
            rng.normals(shape.iter().product()).iter().map(|v| mean + deviation * v).collect();
        headers.push(TensorHeader { name, dtype: DType::F32, shape: shape.to_vec() });
        tensors.push(Tensor::from_f32(DType::F32, shape.to_vec(), &values).unwrap());
        wide(&values)
    };
    let (mut linears, mut biases, mut qk) = (Vec::new(), Vec::new(), Vec::new());
    let sites = [
        ("self_attn.q_proj", q, hidden),
        ("self_attn.k_proj", kv, hidden),
        ("self_attn.v_proj", kv, hidden),
        ("self_attn.o_proj", hidden, q),
        ("mlp.gate_proj", inner, hidden),
        ("mlp.up_proj", inner, hidden),
        ("mlp.down_proj", hidden, inner),
    ];
    for (site, out, inner) in sites {
        let site = format!("model.layers.0.{site}");
        linears.push(put(format!("{site}.weight"), &[out, inner], 0.0, 0.3));
        biases.push(put(format!("{site}.bias"), &[out], 0.0, 0.2));
    }
    let mut norms = Vec::new();
    for norm in ["input_layernorm", "post_attention_layernorm"] {
        norms.push(put(format!("model.layers.0.{norm}.weight"), &[hidden], 1.0, 0.2));
    }
    for norm in ["q_norm", "k_norm"] {
        let name = format!("model.layers.0.self_attn.{norm}.weight");
        qk.push(put(name, &[size("head_dim")], 1.0, 0.2));
    }
    put("model.norm.weight".into(), &[hidden], 1.0, 0.2);
    put("model.embed_tokens.weight".into(), &[vocab, hidden], 0.0, 1.0);
    put("lm_head.weight".into(), &[vocab, hidden], 0.0, 0.3);
    let tokens: usize = lengths.iter().sum();
    let input = put("input".into(), &[tokens, hidden], 0.0, 1.0);
    let pull = put("pull".into(), &[tokens, hidden], 0.0, 1.0);
    let mut all: Vec<_> = headers.into_iter().zip(tensors).collect();
    all.sort_by(|(a, _), (b, _)| a.name.cmp(&b.name));
    let (headers, tensors) = all.into_iter().unzip();
    let source = Memory(headers, tensors);
    let decoder = Decoder::read(config, &source).unwrap();
    if !decoder.spec.qk_norm {
        qk.clear();
    }
    for (site, bias) in biases.iter_mut().enumerate() {
        if !decoder.block(0).sites[site].bias {
            bias.clear();
        }
    }
    let values = Values { linears, biases, norms, qk, input };
    Case { name, decoder, source, lengths: lengths.to_vec(), values, pull }
}

fn cases() -> Vec<Case> {
    let base = json!({
        "hidden_size": 20, "intermediate_size": 36, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 6, "num_hidden_layers": 1, "vocab_size": 40,
        "rms_norm_eps": 1e-3, "rope_theta": 100.0, "max_position_embeddings": 256,
    });
    let with = |extra: Value| {
        let mut config = base.clone();
        let table = config.as_object_mut().unwrap();
        table.extend(extra.as_object().unwrap().clone());
        config
    };
    let yarn = json!({"rope_type": "yarn", "factor": 1.0, "attention_factor": ATTENTION_FACTOR});
    vec![
        case("llama", &with(json!({"model_type": "llama"})), &[9, 1, 140]),
        case(
            "everything",
            &with(json!({
                "model_type": "qwen3", "attention_bias": true, "mlp_bias": true,
                "use_sliding_window": true, "sliding_window": 50, "max_window_layers": 0,
                "rope_scaling": yarn,
            })),
            &[150, 7],
        ),
        case(
            "one key head",
            &with(json!({"model_type": "qwen2", "num_key_value_heads": 1})),
            &[33],
        ),
    ]
}

fn norm64(x: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    let scale = 1.0 / (x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64 + eps).sqrt();
    x.iter().zip(weight).map(|(x, w)| x * scale * w).collect()
}

fn linear64(x: &[f64], weight: &[f64], bias: &[f64]) -> Vec<f64> {
    weight
        .chunks(x.len())
        .enumerate()
        .map(|(o, w)| {
            w.iter().zip(x).map(|(a, b)| a * b).sum::<f64>() + bias.get(o).copied().unwrap_or(0.0)
        })
        .collect()
}

/// The block in f64, token by token.
fn forward64(case: &Case, v: &Values) -> Vec<f64> {
    let spec = &case.decoder.spec;
    let (eps, d) = (f64::from(spec.rms_eps), spec.head_dim);
    let repeat = spec.heads / spec.kv_heads;
    let turn = |head: &[f64], position: usize| -> Vec<f64> {
        let mut out = head.to_vec();
        for i in 0..d / 2 {
            let (c, s) = rotation(case, i, position);
            out[i] = head[i] * c - head[i + d / 2] * s;
            out[i + d / 2] = head[i + d / 2] * c + head[i] * s;
        }
        out
    };
    let mut out = Vec::new();
    let mut start = 0;
    for &length in &case.lengths {
        let rows: Vec<&[f64]> = v.input.chunks(spec.hidden).skip(start).take(length).collect();
        start += length;
        let heads = |x: &[f64], at: usize, norm: Option<&Vec<f64>>| -> Vec<Vec<f64>> {
            x.chunks(d)
                .map(|head| match norm {
                    Some(norm) => turn(&norm64(head, norm, eps), at),
                    None => turn(head, at),
                })
                .collect()
        };
        let (mut q, mut k, mut val) = (Vec::new(), Vec::new(), Vec::new());
        for (at, x) in rows.iter().enumerate() {
            let h = norm64(x, &v.norms[0], eps);
            q.push(heads(&linear64(&h, &v.linears[0], &v.biases[0]), at, v.qk.first()));
            k.push(heads(&linear64(&h, &v.linears[1], &v.biases[1]), at, v.qk.get(1)));
            val.push(linear64(&h, &v.linears[2], &v.biases[2]));
        }
        for (at, x) in rows.iter().enumerate() {
            let from = spec.window[0].map_or(0, |w| (at + 1).saturating_sub(w));
            let mut attended = Vec::new();
            for head in 0..spec.heads {
                let group = head / repeat;
                let scores: Vec<f64> = (from..=at)
                    .map(|to| {
                        let dot: f64 =
                            q[at][head].iter().zip(&k[to][group]).map(|(a, b)| a * b).sum();
                        (dot / (d as f64).sqrt()).exp()
                    })
                    .collect();
                let sum: f64 = scores.iter().sum();
                for i in 0..d {
                    let mixed = |(score, to): (&f64, usize)| score / sum * val[to][group * d + i];
                    attended.push(scores.iter().zip(from..=at).map(mixed).sum::<f64>());
                }
            }
            let add = |x: &[f64], y: Vec<f64>| -> Vec<f64> {
                x.iter().zip(y).map(|(a, b)| a + b).collect()
            };
            let middle = add(x, linear64(&attended, &v.linears[3], &v.biases[3]));
            let h = norm64(&middle, &v.norms[1], eps);
            let gate = linear64(&h, &v.linears[4], &v.biases[4]);
            let up = linear64(&h, &v.linears[5], &v.biases[5]);
            let inner: Vec<f64> =
                gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            out.extend(add(&middle, linear64(&inner, &v.linears[6], &v.biases[6])));
        }
    }
    out
}

/// Cosine and sine of channel `i` at a position. The case with YaRN has factor 1: its frequencies are the plain
/// ones, and its attention factor makes rotations that change lengths.
fn rotation(case: &Case, i: usize, position: usize) -> (f64, f64) {
    let spec = &case.decoder.spec;
    let frequency = spec.rope.theta.powf(-2.0 * i as f64 / spec.head_dim as f64);
    let angle = position as f64 * frequency;
    let factor = if spec.qk_norm { ATTENTION_FACTOR } else { 1.0 };
    (angle.cos() * factor, angle.sin() * factor)
}

/// Gradients of everything, by the code that is tested, and the output.
fn backward(case: &Case, threads: usize, only: Option<usize>) -> (Values, Vec<f32>) {
    let narrow_all = |x: &[Vec<f64>]| -> Vec<Vec<f32>> { x.iter().map(|x| narrow(x)).collect() };
    let (linears, biases) = (narrow_all(&case.values.linears), narrow_all(&case.values.biases));
    let (norms, qk) = (narrow_all(&case.values.norms), narrow_all(&case.values.qk));
    let input = narrow(&case.values.input);
    let weights = BlockWeights {
        linears: linears.iter().map(Vec::as_slice).collect(),
        biases: biases.iter().map(|b| (!b.is_empty()).then_some(b.as_slice())).collect(),
        norms: norms.iter().map(Vec::as_slice).collect(),
        qk_norm: (!qk.is_empty()).then(|| (qk[0].as_slice(), qk[1].as_slice())),
    };
    let zeros =
        |x: &[Vec<f32>]| -> Vec<Vec<f32>> { x.iter().map(|x| vec![0.0; x.len()]).collect() };
    let (mut d_linears, mut d_biases) = (zeros(&linears), zeros(&biases));
    let (mut d_norms, mut d_qk) = (zeros(&norms), zeros(&qk));
    let mut d = narrow(&case.pull);
    let mut output = Vec::new();
    // Places by number: seven linears, seven biases, two norms, norms of heads, the input.
    let asked = |place: usize| only.is_none_or(|only| only == place);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| {
        let (mut tape, mut space) = (Tape::default(), Space::default());
        let longest = case.lengths.iter().max().copied().unwrap();
        let block = Differentiable::new(&case.decoder, longest);
        block.forward(0, &weights, &case.lengths, &input, Some(&mut tape), &mut space, &mut output);
        let mut gradient = BlockGradient {
            linears: d_linears
                .iter_mut()
                .enumerate()
                .map(|(at, d)| asked(at).then_some(d.as_mut_slice()))
                .collect(),
            biases: d_biases
                .iter_mut()
                .enumerate()
                .map(|(at, d)| (asked(7 + at) && !d.is_empty()).then_some(d.as_mut_slice()))
                .collect(),
            norms: d_norms
                .iter_mut()
                .enumerate()
                .map(|(at, d)| asked(14 + at).then_some(d.as_mut_slice()))
                .collect(),
            qk_norm: match d_qk.as_mut_slice() {
                [q, k] if asked(16) => Some((q, k)),
                _ => None,
            },
            input: asked(17),
        };
        let space = &mut space;
        block.backward(0, &weights, &case.lengths, &input, &mut tape, &mut gradient, space, &mut d);
    });
    let all = |x: Vec<Vec<f32>>| x.iter().map(|x| wide(x)).collect::<Vec<_>>();
    let values = Values {
        linears: all(d_linears),
        biases: all(d_biases),
        norms: all(d_norms),
        qk: all(d_qk),
        input: wide(&d),
    };
    (values, output)
}

impl Values {
    fn places(&mut self) -> Vec<&mut Vec<f64>> {
        let Self { linears, biases, norms, qk, input } = self;
        let all = linears.iter_mut().chain(biases).chain(norms).chain(qk);
        all.chain(std::iter::once(input)).collect()
    }
}

/// Allowed relative error of sampled elements: f32 sums over up to 150 tokens against f64.
const ALLOWED: f64 = 1e-5;

#[test]
fn gradients_agree_with_central_differences_in_f64() {
    for case in cases() {
        let (mut gradient, output) = backward(&case, 2, None);
        let want = forward64(&case, &case.values);
        let error = distance(&output, &narrow(&want)).relative();
        assert!(error < ALLOWED, "{}: output {error:e}", case.name);
        let mut rng = Rng::new(2);
        let mut values = case.values.clone();
        let count = values.places().len();
        for place in 0..count {
            let n = values.places()[place].len();
            let (mut got, mut want) = (Vec::new(), Vec::new());
            for _ in 0..12.min(n) {
                let at = rng.below(n);
                let mut moved = |by: f64| {
                    let before = values.places()[place][at];
                    values.places()[place][at] = before + by;
                    let out = forward64(&case, &values);
                    values.places()[place][at] = before;
                    out.iter().zip(&case.pull).map(|(a, b)| a * b).sum::<f64>()
                };
                want.push(((moved(1e-5) - moved(-1e-5)) / 2e-5) as f32);
                got.push(gradient.places()[place][at] as f32);
            }
            if n > 0 {
                let error = distance(&got, &want).relative();
                assert!(
                    error < ALLOWED,
                    "{}: place {place}: {error:e}\n{got:?}\n{want:?}",
                    case.name
                );
            }
        }
    }
}

#[test]
fn threads_and_what_else_is_asked_for_do_not_change_bits() {
    for case in cases() {
        let (mut all, output) = backward(&case, 2, None);
        let (mut one, again) = backward(&case, 1, None);
        assert_eq!(output, again);
        assert!(all.places() == one.places(), "{}: threads", case.name);
        // Place 16 is two vectors, 17 the input.
        for only in 0..=17 {
            let (mut alone, _) = backward(&case, 1, Some(only));
            let (all, mut alone) = (all.places(), alone.places());
            let last = all.len() - 1;
            let range = match only {
                16 => 16..last,
                17 => last..last + 1,
                place => place..place + 1,
            };
            assert!(all[range.clone()] == alone[range.clone()], "{}: {only} alone", case.name);
            for (at, values) in alone.iter_mut().enumerate().take(last) {
                let zero = values.iter().all(|v| v.abs() < f64::MIN_POSITIVE);
                assert!(range.contains(&at) || zero, "{}: {only} leaves {at} alone", case.name);
            }
        }
    }
}

#[test]
fn the_forward_is_that_of_calibration() {
    for case in cases() {
        let (_, output) = backward(&case, 1, None);
        let hidden = case.decoder.spec.hidden;
        let mut stream = Stream::new(&case.lengths, hidden, None).unwrap();
        let input = narrow(&case.values.input);
        let mut start = 0;
        for (window, &length) in case.lengths.iter().enumerate() {
            stream.write(window, &input[start * hidden..(start + length) * hidden]).unwrap();
            start += length;
        }
        let ops = BlockOps::load(&case.decoder, 0, &case.source).unwrap();
        run_block(&case.decoder, 0, &ops, &mut stream).unwrap();
        let want: Vec<f32> =
            (0..case.lengths.len()).flat_map(|window| stream.read(window).unwrap()).collect();
        assert!(distance(&output, &want).relative() < 1e-6, "{}", case.name);
    }
}

#[test]
fn the_head_has_the_gradient_of_its_f64_forward() {
    let case = cases().swap_remove(0);
    let spec = &case.decoder.spec;
    let read = |name: &str| case.source.read(name).unwrap().to_f32().unwrap();
    let (norm, head) = (read("model.norm.weight"), read("lm_head.weight"));
    let tokens = case.values.input.len() / spec.hidden;
    let pull = Rng::new(3).normals(tokens * spec.vocab);
    let x = narrow(&case.values.input);
    let weights = BlockWeights {
        linears: vec![&head],
        biases: vec![None],
        norms: vec![&norm],
        qk_norm: None,
    };
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut space = Space::default();
            let (mut normed, mut logits) = (Vec::new(), Vec::new());
            let (mut d_head, mut d_norm) = (vec![0.0; head.len()], vec![0.0; norm.len()]);
            let mut d = vec![0.0; x.len()];
            let block = Differentiable::new(&case.decoder, 0);
            block.head_forward(&weights, &x, &mut space, &mut normed, &mut logits);
            let mut gradient = BlockGradient {
                linears: vec![Some(&mut d_head)],
                biases: vec![None],
                norms: vec![Some(&mut d_norm)],
                qk_norm: None,
                input: true,
            };
            let space = &mut space;
            block.head_backward(&weights, (&x, &normed), &pull, &mut gradient, space, &mut d);
            [d_head, d_norm, d]
        })
    };
    let got = run(2);
    assert_eq!(got, run(1));
    let mut values = [wide(&head), wide(&norm), wide(&x)];
    let pull = wide(&pull);
    let mut rng = Rng::new(4);
    for place in 0..3 {
        let (mut sampled, mut want) = (Vec::new(), Vec::new());
        for _ in 0..12 {
            let at = rng.below(values[place].len());
            let mut moved = |by: f64| {
                let before = values[place][at];
                values[place][at] = before + by;
                let [head, norm, x] = &values;
                let logits = x
                    .chunks(spec.hidden)
                    .flat_map(|x| linear64(&norm64(x, norm, f64::from(spec.rms_eps)), head, &[]));
                let sum = logits.zip(&pull).map(|(a, b)| a * b).sum::<f64>();
                values[place][at] = before;
                sum
            };
            want.push(((moved(1e-5) - moved(-1e-5)) / 2e-5) as f32);
            sampled.push(got[place][at]);
        }
        let error = distance(&sampled, &want).relative();
        assert!(error < ALLOWED, "place {place}: {error:e}");
    }
}

#[test]
fn rows_of_the_embedding_receive_the_sum_of_their_tokens() {
    let mut table = vec![1.0; 8];
    embed_backward(&[3, 0, 3], &[1.0, 2.0, 10.0, 20.0, 0.5, 0.25], &mut table);
    assert_eq!(table, [11.0, 21.0, 1.0, 1.0, 1.0, 1.0, 2.5, 3.25]);
}

/// Two blocks, and windows of which one predicts nothing.
fn whole_model() -> (Decoder, Memory, Vec<Vec<u32>>) {
    let config = json!({
        "model_type": "qwen3", "hidden_size": 20, "intermediate_size": 36, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 6, "num_hidden_layers": 2, "vocab_size": 40,
        "rms_norm_eps": 1e-3, "rope_theta": 100.0, "max_position_embeddings": 256,
    });
    let mut all: Vec<(TensorHeader, Tensor)> = Vec::new();
    for layer in 0..2 {
        let case = case(
            "a block",
            &{
                let mut c = config.clone();
                c["num_hidden_layers"] = json!(1);
                c
            },
            &[3],
        );
        for (header, tensor) in case.source.0.into_iter().zip(case.source.1) {
            let block = header.name.contains("layers.0.");
            if !block && (layer > 0 || ["input", "pull"].contains(&header.name.as_str())) {
                continue;
            }
            let name = header.name.replace("layers.0.", &format!("layers.{layer}."));
            all.push((TensorHeader { name, ..header }, tensor));
        }
    }
    all.sort_by(|(a, _), (b, _)| a.name.cmp(&b.name));
    let (headers, tensors) = all.into_iter().unzip();
    let source = Memory(headers, tensors);
    let decoder = Decoder::read(&config, &source).unwrap();
    let mut rng = Rng::new(8);
    let windows = [150, 1, 40].map(|n| (0..n).map(|_| rng.below(40) as u32).collect());
    (decoder, source, windows.to_vec())
}

type Found = Vec<(usize, BlockGradients)>;

fn sweep(
    (decoder, source): (&Decoder, &Memory),
    windows: &[Vec<u32>],
    spill: Option<&Spill>,
    threads: usize,
) -> (f64, Found) {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| {
        let mut found = Vec::new();
        let mut keep = |block: &Block, _: &BlockState, own: BlockGradients| {
            found.push((block.index, own));
            Ok::<_, ModelError>(())
        };
        let loss = sweep_gradients(decoder, source, windows, spill, &mut keep).unwrap();
        (loss, found)
    })
}

/// Mean loss by the forward of calibration and evaluation, softmax in f64.
fn loss(decoder: &Decoder, source: &Memory, windows: &[Vec<u32>]) -> f64 {
    let lengths: Vec<usize> = windows.iter().map(Vec::len).collect();
    let mut stream = Stream::new(&lengths, decoder.spec.hidden, None).unwrap();
    for (at, ids) in windows.iter().enumerate() {
        stream.write(at, &embed(decoder, source, ids).unwrap()).unwrap();
    }
    for index in 0..decoder.spec.layers {
        let ops = BlockOps::load(decoder, index, source).unwrap();
        run_block(decoder, index, &ops, &mut stream).unwrap();
    }
    let head = BlockOps::load(decoder, decoder.spec.layers, source).unwrap();
    let mut sum = 0.0;
    for (at, ids) in windows.iter().enumerate().filter(|(_, ids)| ids.len() > 1) {
        let logits = final_logits(decoder, &head, &stream.read(at).unwrap());
        let of = |(row, &next): (ndarray::ArrayView1<'_, f32>, &u32)| {
            let whole: f64 = row.iter().map(|&z| f64::from(z).exp()).sum();
            whole.ln() - f64::from(row[next as usize])
        };
        let own: f64 = logits.outer_iter().zip(&ids[1..]).map(of).sum();
        sum += own / (ids.len() - 1) as f64;
    }
    sum / windows.len() as f64
}

#[test]
fn a_sweep_gives_the_slope_of_the_loss_along_every_linear() {
    let (decoder, mut source, windows) = whole_model();
    let (mean, found) = sweep((&decoder, &source), &windows, None, 2);
    assert!((mean - loss(&decoder, &source, &windows)).abs() < 1e-5 * mean, "{mean}");
    assert_eq!(found.iter().map(|(index, _)| *index).collect::<Vec<_>>(), [1, 0]);
    for (index, gradients) in &found {
        for (site, own) in decoder.block(*index).sites.iter().zip(&gradients.sites) {
            // Along the gradient itself the slope is its norm: far enough for f32 forwards to tell.
            let norm = own.sum.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
            let name = format!("{}.weight", site.name);
            let at = source.0.iter().position(|header| header.name == name).unwrap();
            let before = source.1[at].clone();
            let values = before.view().to_f32().unwrap();
            let step = 2e-3;
            let mut moved = |by: f64| {
                let values: Vec<f32> = values
                    .iter()
                    .zip(&own.sum)
                    .map(|(w, g)| (f64::from(*w) + by * f64::from(*g) / norm) as f32)
                    .collect();
                let shape = vec![site.out_features, site.in_features];
                source.1[at] = Tensor::from_f32(DType::F32, shape, &values).unwrap();
                loss(&decoder, &source, &windows) * windows.len() as f64
            };
            let slope = (moved(step) - moved(-step)) / (2.0 * step);
            source.1[at] = before;
            assert!((slope / norm - 1.0).abs() < 5e-3, "{}: {slope} {norm}", site.name);
        }
    }
}

#[test]
fn squares_are_of_each_window_and_neither_threads_nor_scratch_change_bits() {
    let (decoder, source, windows) = whole_model();
    let model = (&decoder, &source);
    let all = sweep(model, &windows, None, 2);
    assert_eq!(all, sweep(model, &windows, None, 1));
    let spill = Spill::above(64, attar_tensor::Scratch::new(tempfile::tempfile));
    assert_eq!(all, sweep(model, &windows, Some(&spill), 2));
    let alone: Vec<Found> =
        windows.iter().map(|one| sweep(model, std::slice::from_ref(one), None, 1).1).collect();
    for (block, (_, found)) in all.1.iter().enumerate() {
        assert_eq!(found.windows, 3);
        for (site, own) in found.sites.iter().enumerate() {
            let of = |window: usize| &alone[window][block].1.sites[site].sum;
            assert!(
                of(1).iter().all(|g| g.abs() < f32::MIN_POSITIVE),
                "one token predicts nothing"
            );
            let (a, b) = (of(0), of(2));
            assert!(own.sum == a + b);
            assert!(own.squares == &(a * a) + &(b * b));
        }
    }
}
