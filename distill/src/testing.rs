//! A block of a norm, a linear and a bias with a teacher, for tests of passes that learn: `y = (x ⊙ g) Wᵀ + b`.

use attar_ir::{
    Block, BlockFunction, BlockState, BlockStats, BlockValues, InputGroup, InputStats, LinearState,
    Norm, PassContext, PassError, PassReport, Role, Site, Target, Teacher, Wanted, Weight,
};
use attar_tensor::{
    DType, Granularity, Mat, QuantScheme, ScaleGrid, linalg::GramAccumulator, rng::Rng,
};

pub(crate) const IN: usize = 64;
pub(crate) const OUT: usize = 24;
const TOKENS: usize = 40;
const WINDOWS: usize = 12;

/// The teacher's outputs and the inputs, window by window.
#[derive(Debug)]
pub(crate) struct Linear {
    inputs: Vec<Mat>,
    targets: Vec<Mat>,
}

fn forward(values: &BlockValues, x: &Mat) -> Mat {
    let scaled = x * &ndarray_row(&values.norms[0]);
    let mut y = scaled.dot(&values.linears[0].t());
    y += &ndarray_row(values.biases[0].as_ref().unwrap());
    y
}

fn ndarray_row(values: &[f32]) -> Mat {
    Mat::from_shape_vec((1, values.len()), values.to_vec()).unwrap()
}

impl Linear {
    /// Inputs whose channels depend on each other.
    pub(crate) fn new(state: &BlockState, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let mix = Mat::from_shape_fn((IN, IN), |(i, j)| {
            rng.normal() / (1.0 + (i as f32 - j as f32).abs())
        });
        let values = BlockValues::of(state);
        let inputs: Vec<Mat> = (0..WINDOWS)
            .map(|_| {
                let x = Mat::from_shape_vec((TOKENS, IN), rng.normals(TOKENS * IN)).unwrap();
                x.dot(&mix)
            })
            .collect();
        let targets = inputs.iter().map(|x| forward(&values, x)).collect();
        Self { inputs, targets }
    }

    /// Statistics of the input of the linear.
    pub(crate) fn stats(&self, state: &BlockState) -> BlockStats {
        let mut gram = GramAccumulator::new(IN);
        for x in &self.inputs {
            let x = x * &ndarray_row(&state.norms[0]);
            gram.add(x.as_standard_layout().as_slice().unwrap()).unwrap();
        }
        let tokens = TOKENS * WINDOWS;
        let hessian = Some(gram.finish(2.0 / tokens as f64).unwrap());
        BlockStats {
            inputs: vec![Some(InputStats { tokens, hessian, ..InputStats::default() })],
            gradients: None,
        }
    }
}

impl BlockFunction for Linear {
    fn windows(&self) -> usize {
        WINDOWS
    }

    fn power(&self) -> Result<f64, PassError> {
        Ok(1.0)
    }

    fn loss(&self, weights: &BlockValues, windows: &[usize]) -> Result<f64, PassError> {
        let one = |&window: &usize| -> f64 {
            let d = forward(weights, &self.inputs[window]) - &self.targets[window];
            d.iter().map(|&d| f64::from(d) * f64::from(d)).sum::<f64>()
        };
        Ok(windows.iter().map(one).sum::<f64>() / (windows.len() * TOKENS) as f64)
    }

    fn gradient(
        &self,
        weights: &BlockValues,
        windows: &[usize],
        wanted: Wanted,
        gradient: &mut BlockValues,
    ) -> Result<f64, PassError> {
        gradient.tensors_mut().for_each(|tensor| tensor.fill(0.0));
        let scale = 2.0 / (windows.len() * TOKENS) as f32;
        for &window in windows {
            let x = &self.inputs[window];
            let d = (forward(weights, x) - &self.targets[window]) * scale;
            let scaled = x * &ndarray_row(&weights.norms[0]);
            if wanted.linears {
                gradient.linears[0] += &d.t().dot(&scaled);
            }
            if wanted.vectors {
                let bias = gradient.biases[0].as_mut().unwrap();
                for (bias, column) in bias.iter_mut().zip(d.columns()) {
                    *bias += column.sum();
                }
                let by_norm = d.dot(&weights.linears[0]) * x;
                for (norm, column) in gradient.norms[0].iter_mut().zip(by_norm.columns()) {
                    *norm += column.sum();
                }
            }
        }
        self.loss(weights, windows)
    }
}

pub(crate) fn block() -> Block {
    Block {
        index: 0,
        prefix: "b.".into(),
        sites: vec![Site {
            name: "b.l".into(),
            role: Role::Value,
            out_features: OUT,
            in_features: IN,
            bias: true,
            dtype: DType::F32,
        }],
        norms: vec![Norm { tensor: "b.n".into(), width: IN }],
        inputs: vec![InputGroup { name: "input", width: IN, sites: vec![0] }],
        folds: Vec::new(),
        attention: None,
    }
}

pub(crate) fn state(seed: u64) -> BlockState {
    let mut rng = Rng::new(seed);
    let weight = Mat::from_shape_vec((OUT, IN), rng.normals(OUT * IN)).unwrap();
    let norm = (0..IN).map(|_| 1.0 + 0.2 * rng.normal()).collect();
    let linear = LinearState { weight: Weight::Dense(weight), bias: Some(rng.normals(OUT)) };
    BlockState::new(0, vec![linear], vec![norm])
}

pub(crate) fn scheme(bits: u8, symmetric: bool) -> QuantScheme {
    QuantScheme {
        bits,
        granularity: Granularity::Group(32),
        symmetric,
        scale_grid: ScaleGrid::F16,
        zero_min: 1,
        activations: attar_tensor::ActivationScheme::Float,
    }
}

/// Runs a pass of these options on a block that learns from `linear`.
pub(crate) fn learn(
    def: &attar_ir::PassDef,
    options: &str,
    scheme: Option<QuantScheme>,
    linear: &Linear,
    state: &mut BlockState,
) -> PassReport {
    let pass = (def.build)(&options.parse().unwrap()).unwrap();
    let block = block();
    let context = PassContext { block: &block, seed: 3, survey: &[], scratch: None, original: &[] };
    let mut stats = linear.stats(state);
    let teacher = Teacher { function: linear, progress: &|_| {} };
    let targets = [Target { site: 0, scheme }];
    pass.learn(&context, &targets, state, &mut stats, &teacher).unwrap()
}

/// Loss of a block over all windows.
pub(crate) fn loss(linear: &Linear, state: &BlockState) -> f64 {
    let all: Vec<usize> = (0..WINDOWS).collect();
    linear.loss(&BlockValues::of(state), &all).unwrap()
}
