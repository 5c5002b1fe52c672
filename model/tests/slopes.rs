//! Slopes of the loss against finite differences: everything that belongs to an index is scaled in the checkpoint.

#![allow(clippy::unwrap_used, reason = "a test may stop anywhere")]

use attar_ir::{Dim, DimName, SlopeBy, SlopeQuery, Slopes};
use attar_model::{Decoder, Spill, loss_slopes};
use attar_tensor::{
    DType, Scratch, SourceError, Tensor, TensorHeader, TensorSource, TensorView, rng::Rng,
};
use serde_json::{Value, json};

#[derive(Clone)]
struct Memory(Vec<(TensorHeader, Vec<f32>)>, Vec<TensorHeader>, Vec<Tensor>);

impl Memory {
    fn new(values: Vec<(TensorHeader, Vec<f32>)>) -> Self {
        let tensor = |(header, values): &(TensorHeader, Vec<f32>)| {
            Tensor::from_f32(DType::F32, header.shape.clone(), values).unwrap()
        };
        let headers = values.iter().map(|(header, _)| header.clone()).collect();
        let tensors = values.iter().map(tensor).collect();
        Self(values, headers, tensors)
    }
}

impl TensorSource for Memory {
    fn headers(&self) -> &[TensorHeader] {
        &self.1
    }

    fn read(&self, name: &str) -> Result<TensorView<'_>, SourceError> {
        let at = self.1.iter().position(|header| header.name == name);
        at.map(|at| self.2[at].view())
            .ok_or_else(|| SourceError::Missing { name: name.into(), place: "memory".into() })
    }
}

/// Two blocks with biases; the head is tied or not.
fn model(tied: bool) -> (Decoder, Memory) {
    let config: Value = json!({
        "model_type": "llama", "hidden_size": 20, "intermediate_size": 24, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 6, "num_hidden_layers": 2, "vocab_size": 40,
        "rms_norm_eps": 1e-5, "rope_theta": 100.0, "max_position_embeddings": 64,
        "attention_bias": true, "mlp_bias": true, "tie_word_embeddings": tied,
    });
    let mut rng = Rng::new(5);
    let mut all = Vec::new();
    let mut put = |name: String, shape: &[usize], mean: f32, deviation: f32| {
        let values: Vec<f32> =
            rng.normals(shape.iter().product()).iter().map(|v| mean + deviation * v).collect();
        all.push((TensorHeader { name, dtype: DType::F32, shape: shape.to_vec() }, values));
    };
    for layer in 0..2 {
        for (site, out, inner) in [
            ("self_attn.q_proj", 24, 20),
            ("self_attn.k_proj", 12, 20),
            ("self_attn.v_proj", 12, 20),
            ("self_attn.o_proj", 20, 24),
            ("mlp.gate_proj", 24, 20),
            ("mlp.up_proj", 24, 20),
            ("mlp.down_proj", 20, 24),
        ] {
            let name = format!("model.layers.{layer}.{site}");
            put(format!("{name}.weight"), &[out, inner], 0.0, 0.25);
            put(format!("{name}.bias"), &[out], 0.0, 0.2);
        }
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            put(format!("model.layers.{layer}.{norm}.weight"), &[20], 1.0, 0.2);
        }
    }
    put("model.norm.weight".into(), &[20], 1.0, 0.2);
    put("model.embed_tokens.weight".into(), &[40, 20], 0.0, 1.0);
    if !tied {
        put("lm_head.weight".into(), &[40, 20], 0.0, 0.4);
    }
    all.sort_by(|(a, _), (b, _)| a.name.cmp(&b.name));
    let source = Memory::new(all);
    (Decoder::read(&config, &source).unwrap(), source)
}

fn windows() -> Vec<Vec<u32>> {
    [11usize, 7]
        .iter()
        .map(|&length| (0..length).map(|at| (at * at * 7 + 3 * length) as u32 % 40).collect())
        .collect()
}

fn run(model: &(Decoder, Memory), ids: &[Vec<u32>], query: &SlopeQuery) -> (f64, Slopes) {
    let spill = Spill::above(usize::MAX, Scratch::new(tempfile::tempfile));
    loss_slopes(&model.0, &model.1, ids, query, &spill, &|| {}).unwrap()
}

/// The checkpoint after `change` of the elements (tensor, flat index) that belong to an index of a dimension.
fn scaled(source: &Memory, dim: &Dim, index: usize, only: Option<usize>, by: f32) -> Memory {
    let mut values = source.0.clone();
    let mut seen = 0;
    for member in &dim.members {
        let (header, values) = values.iter_mut().find(|(h, _)| h.name == member.tensor).unwrap();
        let columns = if header.shape.len() == 2 { header.shape[1] } else { 1 };
        for (at, value) in values.iter_mut().enumerate() {
            let place = if member.axis == 0 { at / columns } else { at % columns };
            if member.index(place, dim.size) == index {
                if only.is_none_or(|only| only == seen) {
                    *value *= by;
                }
                seen += 1;
            }
        }
    }
    Memory::new(values)
}

/// Central difference of the loss of `ids`, per unit of scale.
fn difference(
    model: &(Decoder, Memory),
    ids: &[Vec<u32>],
    (dim, index, only): (&Dim, usize, Option<usize>),
) -> f64 {
    let none = SlopeQuery { dims: Vec::new(), by: SlopeBy::Groups };
    let step = 4e-3f32;
    let at = |by: f32| {
        let changed = scaled(&model.1, dim, index, only, by);
        run(&(model.0.clone(), changed), ids, &none).0
    };
    (at(1.0 + step) - at(1.0 - step)) / (2.0 * f64::from(step))
}

#[test]
fn a_slope_is_what_scaling_all_coupled_weights_does_to_the_loss() {
    for tied in [true, false] {
        let model = model(tied);
        let ids = windows();
        let dims = vec![DimName::Ffn(0), DimName::KvGroup(1), DimName::Head(0), DimName::Hidden];
        let query = SlopeQuery { dims: dims.clone(), by: SlopeBy::Groups };
        let (one, both) = (run(&model, &ids[..1], &query).1, run(&model, &ids, &query).1);
        for name in dims {
            let dim = model.0.graph.dim(name).unwrap();
            assert_eq!(one[&name].len(), dim.size);
            let largest = one[&name].iter().fold(0.0f64, |m, v| m.max(*v));
            assert!(largest > 1e-3, "{name}: {largest}");
            for index in (0..dim.size).step_by(1 + dim.size / 6) {
                let of: Vec<f64> = (0..2)
                    .map(|at| difference(&model, &ids[at..=at], (&dim, index, None)))
                    .collect();
                let mean = f64::midpoint(of[0] * of[0], of[1] * of[1]).sqrt();
                let (first, all) = (one[&name][index], both[&name][index]);
                let close = |a: f64, b: f64| (a - b).abs() < 2e-3 * largest + 1e-4;
                assert!(close(first, of[0].abs()), "{tied} {name} {index}: {first} {}", of[0]);
                assert!(close(all, mean), "{tied} {name} {index}: {all} {mean}");
            }
        }
    }
}

#[test]
fn slopes_by_element_are_the_sum_of_what_each_weight_alone_does() {
    let model = model(true);
    let ids = windows();
    let query = SlopeQuery { dims: vec![DimName::Ffn(1)], by: SlopeBy::Elements };
    let found = run(&model, &ids, &query).1;
    let dim = model.0.graph.dim(DimName::Ffn(1)).unwrap();
    // Rows of gate and up with their biases, a column of down.
    let elements = 21 + 21 + 20;
    for index in [0, 5] {
        let each = |at: usize| {
            let of: f64 =
                ids.chunks(1).map(|ids| difference(&model, ids, (&dim, index, Some(at)))).sum();
            (of / 2.0).abs()
        };
        let sum: f64 = (0..elements).map(each).sum();
        let slope = found[&DimName::Ffn(1)][index];
        assert!((slope - sum).abs() < 0.02 * sum + 1e-3, "{index}: {slope} {sum}");
    }
}

#[test]
fn slopes_depend_neither_on_threads_nor_on_where_streams_lie() {
    let model = model(true);
    let dims = vec![DimName::Ffn(0), DimName::KvGroup(0), DimName::Hidden];
    let query = SlopeQuery { dims, by: SlopeBy::Groups };
    let with = |threads: usize, limit: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let spill = Spill::above(limit, Scratch::new(tempfile::tempfile));
        let ids = windows();
        pool.install(|| loss_slopes(&model.0, &model.1, &ids, &query, &spill, &|| {}).unwrap())
    };
    let one = with(1, usize::MAX);
    assert!(one == with(2, usize::MAX) && one == with(2, 0));
}
