//! A block of a value and an output projection, for tests of passes that touch folds.

use attar_ir::{
    Block, BlockState, ChannelMap, Fold, InputGroup, InputStats, LinearState, Norm, Producer, Role,
    Site, Weight,
};
use attar_tensor::{DType, Mat, linalg::matmul_nt, rng::Rng};

use crate::common::dense;

pub(crate) const HIDDEN: usize = 64;
pub(crate) const KV: usize = 32;
pub(crate) const TOKENS: usize = 200;
pub(crate) const MAP: ChannelMap = ChannelMap::GroupedHeads { head_dim: 16, repeat: 2 };

/// Values and attention output only: norm → v → (heads repeated) → o.
pub(crate) fn block() -> Block {
    let site = |name: &str, role, out_features, in_features| Site {
        name: name.into(),
        role,
        out_features,
        in_features,
        bias: true,
        dtype: DType::F32,
    };
    let input = |name, width, site| InputGroup { name, width, sites: vec![site] };
    Block {
        index: 0,
        prefix: String::new(),
        sites: vec![
            site("v", Role::Value, KV, HIDDEN),
            site("o", Role::AttentionOutput, HIDDEN, HIDDEN),
        ],
        norms: vec![Norm { tensor: "n".into(), width: HIDDEN }],
        inputs: vec![input("attention input", HIDDEN, 0), input("attention output", HIDDEN, 1)],
        folds: vec![
            Fold { producer: Producer::Norm(0), input: 0, map: ChannelMap::Identity },
            Fold { producer: Producer::Rows(0), input: 1, map: MAP },
        ],
        attention: None,
    }
}

pub(crate) fn state(rng: &mut Rng) -> BlockState {
    let mut linear = |out: usize| LinearState {
        weight: Weight::Dense(
            Mat::from_shape_vec((out, HIDDEN), rng.normals(out * HIDDEN)).unwrap(),
        ),
        bias: Some(rng.normals(out)),
    };
    let linears = vec![linear(KV), linear(HIDDEN)];
    BlockState::new(0, linears, vec![rng.normals(HIDDEN)])
}

/// Inputs of both sites and the output.
pub(crate) fn forward(state: &BlockState, x: &Mat) -> [Mat; 3] {
    let mut h = x.clone();
    for mut row in h.outer_iter_mut() {
        for (v, w) in row.iter_mut().zip(&state.norms[0]) {
            *v *= w;
        }
    }
    let linear = |site: usize, x: &Mat| {
        let mut y = matmul_nt(x, dense(state, site));
        for mut row in y.outer_iter_mut() {
            for (v, b) in row.iter_mut().zip(state.linears[site].bias.as_ref().unwrap()) {
                *v += b;
            }
        }
        y
    };
    let v = linear(0, &h);
    let a = Mat::from_shape_fn((x.nrows(), HIDDEN), |(t, c)| v[[t, MAP.producer_of(c)]]);
    let y = linear(1, &a);
    [h, a, y]
}

pub(crate) fn statistics(x: &Mat) -> Option<InputStats> {
    let n = x.nrows() as f32;
    let mean = x.columns().into_iter().map(|c| c.iter().map(|v| v.abs()).sum::<f32>() / n);
    let most = x.columns().into_iter().map(|c| c.iter().fold(0.0f32, |m, v| m.max(v.abs())));
    Some(InputStats {
        tokens: x.nrows(),
        abs_mean: Some(mean.collect()),
        abs_max: Some(most.collect()),
        hessian: Some(x.t().dot(x).as_standard_layout().to_owned() * (2.0 / n)),
        ..InputStats::default()
    })
}

pub(crate) fn inputs(rng: &mut Rng) -> Mat {
    Mat::from_shape_fn((TOKENS, HIDDEN), |(_, c)| {
        rng.normal() * if c % 9 == 0 { 12.0 } else { 0.4 }
    })
}
