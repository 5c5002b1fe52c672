//! One block's weights in flight.

use std::borrow::Cow;

use attar_tensor::{BlockQuantized, BlockType, DType, Mat, QuantScheme, QuantizedLinear, Tensor};

/// The weight of one linear, in one of the forms of [`crate::Form`].
#[derive(Debug, Clone, PartialEq)]
pub enum Weight {
    /// `[out_features, in_features]`, f32.
    Dense(Mat),
    /// Codes, scales and zero points.
    Quantized(QuantizedLinear),
    /// Codes in blocks with two-level scales.
    Blocks(BlockQuantized),
}

impl Weight {
    /// The float weight, when it is one.
    pub const fn as_dense(&self) -> Option<&Mat> {
        match self {
            Self::Dense(weight) => Some(weight),
            Self::Quantized(_) | Self::Blocks(_) => None,
        }
    }

    /// The scheme of a quantized weight; that of its type for blocks.
    pub const fn scheme(&self) -> Option<QuantScheme> {
        match self {
            Self::Dense(_) => None,
            Self::Quantized(weight) => Some(weight.scheme),
            Self::Blocks(weight) => Some(weight.block.scheme()),
        }
    }

    /// Rows and columns.
    pub fn shape(&self) -> (usize, usize) {
        match self {
            Self::Dense(weight) => weight.dim(),
            Self::Quantized(weight) => (weight.out_features, weight.in_features),
            Self::Blocks(weight) => (weight.out_features, weight.in_features),
        }
    }

    /// The float weight that this stands for.
    pub fn values(&self) -> Cow<'_, Mat> {
        match self {
            Self::Dense(weight) => Cow::Borrowed(weight),
            Self::Quantized(weight) => Cow::Owned(weight.dequantize()),
            Self::Blocks(weight) => Cow::Owned(weight.dequantize()),
        }
    }

    /// The affine quantized weight, when it is one.
    pub const fn as_quantized(&self) -> Option<&QuantizedLinear> {
        match self {
            Self::Dense(_) | Self::Blocks(_) => None,
            Self::Quantized(weight) => Some(weight),
        }
    }
}

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

    /// The linears at `sites`, and with `neighbours` every norm, bias and input scale that a fold
    /// changed, as named tensors: what [`BlockState::import`] takes back to the same bits.
    ///
    /// # Panics
    /// When a weight is not in standard layout.
    pub fn export(&self, sites: &[usize], neighbours: bool) -> Vec<(String, Tensor)> {
        const FITS: &str = "the shape is the values' own";
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
            match &linear.weight {
                Weight::Dense(weight) => {
                    let values = weight.as_slice().expect("weights are in standard layout");
                    let shape = weight.shape().to_vec();
                    put(
                        format!("linear.{at}.weight"),
                        Tensor::from_f32(DType::F32, shape, values).expect(FITS),
                    );
                }
                Weight::Quantized(q) => {
                    let codes = pack_bits(&q.codes, q.scheme.bits);
                    let shape = vec![codes.len()];
                    put(
                        format!("linear.{at}.codes"),
                        Tensor::new(DType::U8, shape, codes).expect(FITS),
                    );
                    put(format!("linear.{at}.scales"), floats(&q.scales));
                    let zeros: Vec<i32> = q.zeros.iter().map(|&zero| i32::from(zero)).collect();
                    put(
                        format!("linear.{at}.zeros"),
                        Tensor::from_i32(vec![zeros.len()], &zeros).expect(FITS),
                    );
                    if let Some(g_idx) = &q.g_idx {
                        let g_idx: Vec<i32> = g_idx.iter().map(|&g| g as i32).collect();
                        put(
                            format!("linear.{at}.g_idx"),
                            Tensor::from_i32(vec![g_idx.len()], &g_idx).expect(FITS),
                        );
                    }
                }
                Weight::Blocks(q) => {
                    for (what, bytes) in block_parts(q) {
                        let shape = vec![bytes.len()];
                        put(
                            format!("linear.{at}.{what}"),
                            Tensor::new(DType::U8, shape, bytes).expect(FITS),
                        );
                    }
                }
            }
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
        let floats = |name: &str, tensor: &Tensor, count: usize| -> Result<Vec<f32>, String> {
            let values = tensor.view().to_f32().map_err(|error| format!("{name}: {error}"))?;
            if values.len() == count {
                Ok(values)
            } else {
                Err(format!("{name}: {} values, expected {count}", values.len()))
            }
        };
        let integers = |name: &str| -> Result<Vec<i32>, String> {
            let tensor = part(name).ok_or_else(|| format!("{name}: missing"))?;
            if tensor.dtype() != DType::I32 {
                return Err(format!("{name}: is {}, expected I32", tensor.dtype()));
            }
            Ok(tensor
                .bytes()
                .chunks_exact(4)
                .map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect())
        };
        for (at, linear) in self.linears.iter_mut().enumerate() {
            let name = |what: &str| format!("linear.{at}.{what}");
            if let (Some(tensor), Some(bias)) = (part(&name("bias")), &mut linear.bias) {
                *bias = floats(&name("bias"), tensor, bias.len())?;
                self.bias_changed[at] = true;
            }
            let (out, inner) = linear.weight.shape();
            self.masked[at] |= part(&name("masked")).is_some();
            if let Some(tensor) = part(&name("weight")) {
                let values = floats(&name("weight"), tensor, out * inner)?;
                let weight = Mat::from_shape_vec((out, inner), values)
                    .map_err(|error| format!("{}: {error}", name("weight")))?;
                linear.weight = Weight::Dense(weight);
                self.weight_changed[at] = true;
            } else if let Some(codes) = part(&name("codes")) {
                let scheme = schemes
                    .get(at)
                    .copied()
                    .flatten()
                    .ok_or_else(|| format!("{}: no scheme", name("codes")))?;
                if let Some(block) = scheme.block() {
                    let bytes = |what: &str| {
                        let tensor = part(&name(what));
                        tensor.map_or(&[][..], Tensor::bytes)
                    };
                    linear.weight = Weight::Blocks(
                        blocks_of(block, (out, inner), &bytes)
                            .ok_or_else(|| format!("{}: blocks do not fit", name("codes")))?,
                    );
                    continue;
                }
                let groups = scheme
                    .groups(inner)
                    .ok_or_else(|| format!("{}: groups do not divide", name("codes")))?;
                let codes = unpack_bits(codes.bytes(), scheme.bits, out * inner)
                    .ok_or_else(|| format!("{}: wrong length", name("codes")))?;
                let scales =
                    part(&name("scales")).ok_or_else(|| format!("{}: missing", name("scales")))?;
                let scales = floats(&name("scales"), scales, out * groups)?;
                let zeros: Vec<u16> =
                    integers(&name("zeros"))?.into_iter().map(|zero| zero as u16).collect();
                if zeros.len() != out * groups {
                    return Err(format!("{}: wrong length", name("zeros")));
                }
                let g_idx = match part(&name("g_idx")) {
                    Some(_) => {
                        Some(integers(&name("g_idx"))?.into_iter().map(|g| g as u32).collect())
                    }
                    None => None,
                };
                linear.weight = Weight::Quantized(QuantizedLinear {
                    scheme,
                    out_features: out,
                    in_features: inner,
                    codes,
                    scales,
                    zeros,
                    g_idx,
                });
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

/// The lists of a weight in blocks, as bytes.
fn block_parts(q: &BlockQuantized) -> Vec<(&'static str, Vec<u8>)> {
    let halves = |list: &[half::f16]| list.iter().flat_map(|h| h.to_le_bytes()).collect();
    let all = [
        ("codes", pack_bits(&q.codes, q.block.bits())),
        ("d", halves(&q.d)),
        ("dmin", halves(&q.dmin)),
        ("sub_scales", q.sub_scales.iter().map(|&s| s as u8).collect()),
        ("sub_mins", q.sub_mins.clone()),
    ];
    all.into_iter().filter(|(_, bytes): &(_, Vec<u8>)| !bytes.is_empty()).collect()
}

/// The inverse of [`block_parts`]; `None` when lengths or ranges are not those of the type.
fn blocks_of<'a>(
    block: BlockType,
    (out_features, in_features): (usize, usize),
    bytes: &dyn Fn(&str) -> &'a [u8],
) -> Option<BlockQuantized> {
    let halves = |bytes: &[u8]| {
        bytes.chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]])).collect()
    };
    let weight = BlockQuantized {
        block,
        out_features,
        in_features,
        codes: unpack_bits(bytes("codes"), block.bits(), out_features * in_features)?,
        d: halves(bytes("d")),
        dmin: halves(bytes("dmin")),
        sub_scales: bytes("sub_scales").iter().map(|&s| s as i8).collect(),
        sub_mins: bytes("sub_mins").to_vec(),
    };
    weight.check().ok()?;
    Some(weight)
}

/// Codes of `bits` bits each, densely, least significant bit first.
fn pack_bits(codes: &[u8], bits: u8) -> Vec<u8> {
    let mut out = Vec::with_capacity((codes.len() * usize::from(bits)).div_ceil(8));
    let (mut word, mut filled) = (0u32, 0u8);
    for &code in codes {
        word |= u32::from(code) << filled;
        filled += bits;
        while filled >= 8 {
            out.push(word as u8);
            word >>= 8;
            filled -= 8;
        }
    }
    if filled > 0 {
        out.push(word as u8);
    }
    out
}

/// The inverse of [`pack_bits`]; `None` when the length is not that of `count` codes.
fn unpack_bits(bytes: &[u8], bits: u8, count: usize) -> Option<Vec<u8>> {
    if bytes.len() != (count * usize::from(bits)).div_ceil(8) {
        return None;
    }
    let (mut word, mut filled) = (0u32, 0u8);
    let mask = (1u32 << bits) - 1;
    let mut bytes = bytes.iter();
    let mut out = Vec::with_capacity(count);
    for _ in 0..count {
        while filled < bits {
            word |= u32::from(*bytes.next()?) << filled;
            filled += 8;
        }
        out.push((word & mask) as u8);
        word >>= bits;
        filled -= bits;
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use attar_tensor::{Granularity, ScaleGrid};

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
