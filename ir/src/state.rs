//! One block's weights in flight.

use attar_tensor::{DType, Mat, QuantScheme, Tensor};

use crate::{
    Block, Producer, Weight,
    weight::{FITS, export_weight, floats, import_weight},
};

/// One linear in flight.
#[derive(Debug, Clone, PartialEq)]
pub struct LinearState {
    /// Its weight.
    pub weight: Weight,
    /// `[out_features]`.
    pub bias: Option<Vec<f32>>,
}

/// One block in flight. `linears[i]` belongs to `block.sites[i]`, `norms[i]` to `block.norms[i]`.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockState {
    /// [`crate::Block::index`].
    pub index: usize,
    /// Weights and biases of the sites.
    pub linears: Vec<LinearState>,
    /// Weights of the norms, `[width]` each.
    pub norms: Vec<Vec<f32>>,
    /// True for linears and norms that a pass changed and that must be written anew: bit i for
    /// `linears[i]`'s bias, see [`BlockState::norm_changed`].
    pub bias_changed: Vec<bool>,
    /// Norms that a fold changed.
    pub norm_changed: Vec<bool>,
    /// Dense linears whose values a pass changed.
    pub weight_changed: Vec<bool>,
    /// Linears whose zeros were pruned and stay zero.
    pub masked: Vec<bool>,
    /// Per input group, what its activations were divided by `[width]`, when folds changed them:
    /// statistics of the original model follow it ([`crate::InputStats::fold`]).
    pub input_scale: Vec<Option<Vec<f32>>>,
}

impl BlockState {
    /// A block as loaded, nothing changed yet.
    pub fn new(index: usize, linears: Vec<LinearState>, norms: Vec<Vec<f32>>) -> Self {
        let (l, n) = (linears.len(), norms.len());
        Self {
            index,
            linears,
            norms,
            bias_changed: vec![false; l],
            norm_changed: vec![false; n],
            weight_changed: vec![false; l],
            masked: vec![false; l],
            input_scale: Vec::new(),
        }
    }

    /// Gives the block other biases and norms.
    pub fn put_vectors(&mut self, biases: Vec<Option<Vec<f32>>>, norms: Vec<Vec<f32>>) {
        for (at, bias) in biases.into_iter().enumerate().filter(|(_, bias)| bias.is_some()) {
            self.linears[at].bias = bias;
            self.bias_changed[at] = true;
        }
        self.norms = norms;
        self.norm_changed.fill(true);
    }

    /// Notes that the activations of input group `input` are now divided by `scale [width]` once more.
    pub fn scale_input(&mut self, input: usize, scale: &[f32]) {
        if self.input_scale.len() <= input {
            self.input_scale.resize(input + 1, None);
        }
        match &mut self.input_scale[input] {
            Some(all) => all.iter_mut().zip(scale).for_each(|(all, s)| *all *= s),
            none => *none = Some(scale.to_vec()),
        }
    }

    /// Does to the checkpoint's weight of a linear what folds did to it: its columns were multiplied by what its input
    /// was divided by, and its rows divided where they make the input of others.
    pub fn follow_folds(&self, block: &Block, site: usize, weight: &mut Mat) {
        let scale = |input: usize| self.input_scale.get(input).and_then(Option::as_deref);
        if let Some(scale) = scale(block.input_of(site)) {
            for mut row in weight.outer_iter_mut() {
                row.iter_mut().zip(scale).for_each(|(w, s)| *w *= s);
            }
        }
        for fold in block.folds.iter().filter(|fold| fold.producer == Producer::Rows(site)) {
            let Some(scale) = scale(fold.input) else { continue };
            let mut divided = vec![false; weight.nrows()];
            for (consumer, s) in scale.iter().enumerate() {
                let producer = fold.map.producer_of(consumer);
                if !std::mem::replace(&mut divided[producer], true) {
                    weight.row_mut(producer).map_inplace(|w| *w /= s);
                }
            }
        }
    }

    /// The linears at `sites`, and with `neighbours` every norm, bias and input scale that a fold
    /// changed, as named tensors: what [`BlockState::import`] takes back to the same bits.
    ///
    /// # Panics
    /// When a weight is not in standard layout.
    pub fn export(&self, sites: &[usize], neighbours: bool) -> Vec<(String, Tensor)> {
        let mut parts = Vec::new();
        let mut put = |name: String, tensor| parts.push((name, tensor));
        let floats =
            |values: &[f32]| Tensor::from_f32(DType::F32, vec![values.len()], values).expect(FITS);
        for (at, linear) in self.linears.iter().enumerate() {
            if neighbours && self.bias_changed[at] {
                let bias = linear.bias.as_deref().unwrap_or_default();
                put(format!("linear.{at}.bias"), floats(bias));
            }
            if !sites.contains(&at) {
                continue;
            }
            if self.masked[at] {
                let flag = Tensor::new(DType::U8, vec![1], vec![1]).expect(FITS);
                put(format!("linear.{at}.masked"), flag);
            }
            export_weight(&format!("linear.{at}"), &linear.weight, &mut put);
        }
        if neighbours {
            for (at, norm) in self.norms.iter().enumerate().filter(|(at, _)| self.norm_changed[*at])
            {
                put(format!("norm.{at}"), floats(norm));
            }
            for (at, scale) in self.input_scale.iter().enumerate() {
                if let Some(scale) = scale {
                    put(format!("input.{at}.scale"), floats(scale));
                }
            }
        }
        parts
    }

    /// Takes exported tensors back. `schemes[i]` is the scheme of linear i when it is quantized.
    ///
    /// # Errors
    /// The name of a tensor that does not fit this block.
    pub fn import(
        &mut self,
        parts: &[(String, Tensor)],
        schemes: &[Option<QuantScheme>],
    ) -> Result<(), String> {
        let part = |name: &str| parts.iter().find(|(n, _)| n == name).map(|(_, tensor)| tensor);
        for (at, linear) in self.linears.iter_mut().enumerate() {
            let name = |what: &str| format!("linear.{at}.{what}");
            if let (Some(tensor), Some(bias)) = (part(&name("bias")), &mut linear.bias) {
                *bias = floats(&name("bias"), tensor, bias.len())?;
                self.bias_changed[at] = true;
            }
            let (out, inner) = linear.weight.shape();
            self.masked[at] |= part(&name("masked")).is_some();
            let scheme = schemes.get(at).copied().flatten();
            let stem = format!("linear.{at}");
            if let Some(weight) = import_weight(&stem, (out, inner), scheme, &part)? {
                // Codes are written from what they are; floats only where they are said to have changed.
                self.weight_changed[at] |= matches!(weight, Weight::Dense(_) | Weight::Factored(_));
                linear.weight = weight;
            }
        }
        for (at, norm) in self.norms.iter_mut().enumerate() {
            let name = format!("norm.{at}");
            if let Some(tensor) = part(&name) {
                *norm = floats(&name, tensor, norm.len())?;
                self.norm_changed[at] = true;
            }
        }
        for (name, tensor) in parts {
            let at = name.strip_prefix("input.").and_then(|n| n.strip_suffix(".scale"));
            if let Some(at) = at.and_then(|at| at.parse::<usize>().ok()) {
                let values = tensor.view().to_f32().map_err(|error| format!("{name}: {error}"))?;
                if self.input_scale.len() <= at {
                    self.input_scale.resize(at + 1, None);
                }
                self.input_scale[at] = Some(values);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Corrected, Factors};
    use attar_tensor::{BlockType, Granularity, QuantizedLinear, ScaleGrid};

    #[test]
    fn an_exported_block_comes_back_to_the_bit() {
        let dense = |seed: usize| LinearState {
            weight: Weight::Dense(Mat::from_shape_fn((3, 8), |(i, j)| {
                ((seed + i * 8 + j) as f32).sin() / 3.0
            })),
            bias: Some(vec![0.1, 0.2, 0.3]),
        };
        let fresh =
            || BlockState::new(4, vec![dense(0), dense(1), dense(2)], vec![vec![1.0; 8]; 2]);
        for bits in [2u8, 3, 4, 8] {
            let scheme = QuantScheme {
                bits,
                granularity: Granularity::Group(4),
                symmetric: false,
                scale_grid: ScaleGrid::F16,
                zero_min: 0,
                activations: attar_tensor::ActivationScheme::Float,
            };
            let mut state = fresh();
            let top = u32::from(scheme.max_code());
            state.linears[1].weight = Weight::Quantized(QuantizedLinear {
                scheme,
                out_features: 3,
                in_features: 8,
                codes: (0..24u32).map(|i| (i * 37 % (top + 1)) as u8).collect(),
                scales: (0..6).map(|i| 0.1 + i as f32).collect(),
                zeros: vec![0, 1, 2, 3, 0, 1],
                g_idx: (bits == 4).then(|| vec![0, 1, 0, 1, 0, 1, 0, 1]),
            });
            if let Weight::Dense(weight) = &mut state.linears[2].weight {
                weight[[1, 1]] = f32::MIN_POSITIVE;
            }
            state.weight_changed[2] = true;
            state.masked[2] = true;
            state.norms[1][3] = 0.3;
            state.norm_changed[1] = true;
            state.linears[0].bias = Some(vec![1.5, -0.0, 3.0]);
            state.bias_changed[0] = true;
            state.scale_input(1, &[2.0; 8]);
            state.scale_input(1, &[1.5; 8]);
            let mut again = fresh();
            again
                .import(&state.export(&[1, 2], true), &[None, Some(scheme), None])
                .expect("what was exported fits");
            assert_eq!(again.input_scale[1], Some(vec![3.0; 8]));
            assert_eq!(again, state);
            // What does not fit is named.
            let mut parts = state.export(&[1], true);
            parts.retain(|(name, _)| !name.ends_with("scales"));
            let error = fresh().import(&parts, &[None, Some(scheme), None]).unwrap_err();
            assert!(error.contains("linear.1.scales"), "{error}");
        }
    }

    #[test]
    fn originals_follow_what_was_folded() {
        use crate::{ChannelMap, Fold, InputGroup, Role, Site};
        let site = |name: &str, role| Site {
            name: name.into(),
            role,
            out_features: 2,
            in_features: 2,
            bias: false,
            dtype: DType::F32,
        };
        let input = |name, sites: &[usize]| InputGroup { name, width: 2, sites: sites.into() };
        let (producer, map) = (Producer::Rows(0), ChannelMap::Identity);
        let block = Block {
            index: 0,
            prefix: String::new(),
            sites: vec![site("up", Role::Up), site("down", Role::Down)],
            norms: Vec::new(),
            inputs: vec![input("in", &[0]), input("between", &[1])],
            folds: vec![Fold { producer, input: 1, map }],
            attention: None,
        };
        let weight = |values: [f32; 4]| Mat::from_shape_vec((2, 2), values.to_vec()).unwrap();
        let linear = || LinearState { weight: Weight::Dense(weight([1.0; 4])), bias: None };
        let mut state = BlockState::new(0, vec![linear(), linear()], Vec::new());
        state.scale_input(0, &[2.0, 4.0]);
        state.scale_input(1, &[8.0, 0.5]);
        let (mut up, mut down) = (weight([1.0; 4]), weight([1.0; 4]));
        state.follow_folds(&block, 0, &mut up);
        state.follow_folds(&block, 1, &mut down);
        assert_eq!(up, weight([0.25, 0.5, 4.0, 8.0]));
        assert_eq!(down, weight([8.0, 0.5, 8.0, 0.5]));
    }

    #[test]
    fn factors_and_corrections_come_back_to_the_bit() {
        let mat = |rows: usize, columns: usize| {
            Mat::from_shape_fn((rows, columns), |(i, j)| ((3 + i * columns + j) as f32).sin())
        };
        let scheme = QuantScheme {
            bits: 4,
            granularity: Granularity::Channel,
            symmetric: true,
            scale_grid: ScaleGrid::F32,
            zero_min: 0,
            activations: attar_tensor::ActivationScheme::Float,
        };
        let codes = |out: usize, inner: usize| {
            Weight::Quantized(QuantizedLinear {
                scheme,
                out_features: out,
                in_features: inner,
                codes: (0..out * inner).map(|i| (i % 16) as u8).collect(),
                scales: (0..out).map(|i| 0.1 + i as f32).collect(),
                zeros: vec![8; out],
                g_idx: None,
            })
        };
        let fresh = || {
            let linear = LinearState { weight: Weight::Dense(mat(3, 8)), bias: None };
            BlockState::new(0, vec![linear], Vec::new())
        };
        let corrected =
            Corrected { base: codes(3, 8), correction: Factors::dense(mat(2, 8), mat(3, 2)) };
        for (weight, changed) in [
            (Weight::Factored(Box::new(Factors::dense(mat(2, 8), mat(3, 2)))), true),
            (Weight::Factored(Box::new(Factors { down: codes(2, 8), up: codes(3, 2) })), true),
            (Weight::Corrected(Box::new(corrected)), false),
        ] {
            let mut state = fresh();
            assert_eq!(weight.shape(), (3, 8));
            state.linears[0].weight = weight;
            state.weight_changed[0] = changed;
            let scheme = state.linears[0].weight.scheme();
            let mut again = fresh();
            again.import(&state.export(&[0], false), &[scheme]).unwrap();
            assert_eq!(again, state);
            let mut parts = state.export(&[0], false);
            parts.retain(|(name, _)| !name.contains(".up."));
            let error = fresh().import(&parts, &[scheme]).unwrap_err();
            assert!(error.contains("linear.0.up"), "{error}");
        }
    }

    #[test]
    fn blocks_come_back_to_the_bit() {
        for block in BlockType::ALL {
            let x: Vec<f32> = (0..3 * 256).map(|i| (i as f32 * 0.7).sin()).collect();
            let weight = attar_tensor::block_search::quantize(block, &x, 3, 256);
            let fresh = || LinearState { weight: Weight::Dense(Mat::zeros((3, 256))), bias: None };
            let mut state = BlockState::new(0, vec![fresh()], Vec::new());
            state.linears[0].weight = Weight::Blocks(weight);
            let scheme = state.linears[0].weight.scheme();
            assert_eq!(scheme, Some(block.scheme()));
            let mut again = BlockState::new(0, vec![fresh()], Vec::new());
            again.import(&state.export(&[0], false), &[scheme]).unwrap();
            assert_eq!(again, state);
            let mut parts = state.export(&[0], false);
            parts.retain(|(name, _)| !name.ends_with(".d"));
            assert!(again.import(&parts, &[scheme]).unwrap_err().contains("do not fit"));
        }
    }
}
