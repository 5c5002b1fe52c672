//! One block's weights in flight.

use std::borrow::Cow;

use attar_tensor::{
    BlockQuantized, BlockType, DType, Mat, QuantScheme, QuantizedLinear, Tensor,
    linalg::lowrank::multiply,
};

use crate::{Block, Producer};

/// The weight of one linear, in one of the forms of [`crate::Form`].
#[derive(Debug, Clone, PartialEq)]
pub enum Weight {
    /// `[out_features, in_features]`, f32.
    Dense(Mat),
    /// Codes, scales and zero points.
    Quantized(QuantizedLinear),
    /// Codes in blocks with two-level scales.
    Blocks(BlockQuantized),
    /// A product of two thin weights.
    Factored(Box<Factors>),
    /// A weight plus a product of two thin ones.
    Corrected(Box<Corrected>),
}

/// Two thin weights whose product `up · down` stands for one of `[out_features, in_features]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Factors {
    /// `[rank, in_features]`, dense or quantized.
    pub down: Weight,
    /// `[out_features, rank]`, dense or quantized.
    pub up: Weight,
}

impl Factors {
    /// Dense factors.
    pub const fn dense(down: Mat, up: Mat) -> Self {
        Self { down: Weight::Dense(down), up: Weight::Dense(up) }
    }

    /// Rows of `down`, columns of `up`.
    pub fn rank(&self) -> usize {
        self.down.shape().0
    }

    /// `up · down`, sums in f64.
    pub fn product(&self) -> Mat {
        multiply(&self.up.values(), &self.down.values())
    }
}

/// A full weight with a correction of low rank beside it.
#[derive(Debug, Clone, PartialEq)]
pub struct Corrected {
    /// The full weight, quantized.
    pub base: Weight,
    /// What is added to it.
    pub correction: Factors,
}

impl Weight {
    /// The float weight, when it is one of full rank.
    pub const fn as_dense(&self) -> Option<&Mat> {
        match self {
            Self::Dense(weight) => Some(weight),
            Self::Quantized(_) | Self::Blocks(_) | Self::Factored(_) | Self::Corrected(_) => None,
        }
    }

    /// The factors, when it is a product.
    pub const fn as_factored(&self) -> Option<&Factors> {
        match self {
            Self::Factored(factors) => Some(factors),
            Self::Dense(_) | Self::Quantized(_) | Self::Blocks(_) | Self::Corrected(_) => None,
        }
    }

    /// The scheme of a quantized weight; that of its type for blocks, of the factors, of what is corrected.
    pub const fn scheme(&self) -> Option<QuantScheme> {
        match self {
            Self::Dense(_) => None,
            Self::Quantized(weight) => Some(weight.scheme),
            Self::Blocks(weight) => Some(weight.block.scheme()),
            Self::Factored(factors) => factors.down.scheme(),
            Self::Corrected(weight) => weight.base.scheme(),
        }
    }

    /// Rows and columns.
    pub fn shape(&self) -> (usize, usize) {
        match self {
            Self::Dense(weight) => weight.dim(),
            Self::Quantized(weight) => (weight.out_features, weight.in_features),
            Self::Blocks(weight) => (weight.out_features, weight.in_features),
            Self::Factored(factors) => (factors.up.shape().0, factors.down.shape().1),
            Self::Corrected(weight) => weight.base.shape(),
        }
    }

    /// The float weight that this stands for.
    pub fn values(&self) -> Cow<'_, Mat> {
        match self {
            Self::Dense(weight) => Cow::Borrowed(weight),
            Self::Quantized(weight) => Cow::Owned(weight.dequantize()),
            Self::Blocks(weight) => Cow::Owned(weight.dequantize()),
            Self::Factored(factors) => Cow::Owned(factors.product()),
            Self::Corrected(weight) => {
                Cow::Owned(&*weight.base.values() + &weight.correction.product())
            }
        }
    }

    /// The affine quantized weight, when it is one.
    pub const fn as_quantized(&self) -> Option<&QuantizedLinear> {
        match self {
            Self::Quantized(weight) => Some(weight),
            Self::Dense(_) | Self::Blocks(_) | Self::Factored(_) | Self::Corrected(_) => None,
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

/// The shape is the values' own.
const FITS: &str = "the shape is the values' own";

fn export_weight(stem: &str, weight: &Weight, put: &mut dyn FnMut(String, Tensor)) {
    match weight {
        Weight::Dense(weight) => {
            let values = weight.as_slice().expect("weights are in standard layout");
            let shape = weight.shape().to_vec();
            let tensor = Tensor::from_f32(DType::F32, shape, values).expect(FITS);
            put(format!("{stem}.weight"), tensor);
        }
        Weight::Quantized(q) => {
            let codes = pack_bits(&q.codes, q.scheme.bits);
            let shape = vec![codes.len()];
            let codes = Tensor::new(DType::U8, shape, codes).expect(FITS);
            put(format!("{stem}.codes"), codes);
            let scales = Tensor::from_f32(DType::F32, vec![q.scales.len()], &q.scales);
            put(format!("{stem}.scales"), scales.expect(FITS));
            let mut integers = |what: &str, values: Vec<i32>| {
                let tensor = Tensor::from_i32(vec![values.len()], &values).expect(FITS);
                put(format!("{stem}.{what}"), tensor);
            };
            integers("zeros", q.zeros.iter().map(|&zero| i32::from(zero)).collect());
            if let Some(g_idx) = &q.g_idx {
                integers("g_idx", g_idx.iter().map(|&g| g as i32).collect());
            }
        }
        Weight::Blocks(q) => {
            for (what, bytes) in block_parts(q) {
                let shape = vec![bytes.len()];
                let tensor = Tensor::new(DType::U8, shape, bytes).expect(FITS);
                put(format!("{stem}.{what}"), tensor);
            }
        }
        Weight::Factored(factors) => export_factors(stem, factors, put),
        Weight::Corrected(weight) => {
            export_weight(&format!("{stem}.base"), &weight.base, put);
            export_factors(stem, &weight.correction, put);
        }
    }
}

fn export_factors(stem: &str, factors: &Factors, put: &mut dyn FnMut(String, Tensor)) {
    let rank = Tensor::from_i32(vec![1], &[factors.rank() as i32]).expect(FITS);
    put(format!("{stem}.rank"), rank);
    export_weight(&format!("{stem}.down"), &factors.down, put);
    export_weight(&format!("{stem}.up"), &factors.up, put);
}

fn floats(name: &str, tensor: &Tensor, count: usize) -> Result<Vec<f32>, String> {
    let values = tensor.view().to_f32().map_err(|error| format!("{name}: {error}"))?;
    if values.len() == count {
        Ok(values)
    } else {
        Err(format!("{name}: {} values, expected {count}", values.len()))
    }
}

fn integers(name: &str, tensor: Option<&Tensor>) -> Result<Vec<i32>, String> {
    let tensor = tensor.ok_or_else(|| format!("{name}: missing"))?;
    if tensor.dtype() != DType::I32 {
        return Err(format!("{name}: is {}, expected I32", tensor.dtype()));
    }
    let number = |b: &[u8]| i32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    Ok(tensor.bytes().chunks_exact(4).map(number).collect())
}

/// A weight under the names that [`export_weight`] gave it; `None` when there is none.
fn import_weight<'a>(
    stem: &str,
    (out, inner): (usize, usize),
    scheme: Option<QuantScheme>,
    part: &dyn Fn(&str) -> Option<&'a Tensor>,
) -> Result<Option<Weight>, String> {
    let name = |what: &str| format!("{stem}.{what}");
    if let Some(rank) = part(&name("rank")) {
        let rank = integers(&name("rank"), Some(rank))?.first().copied().unwrap_or(0);
        let rank = usize::try_from(rank).map_err(|_| format!("{}: {rank}", name("rank")))?;
        let thin = |what: &str, shape, scheme| -> Result<Weight, String> {
            let weight = import_weight(&name(what), shape, scheme, part)?;
            weight.ok_or_else(|| format!("{}: missing", name(what)))
        };
        let base = import_weight(&name("base"), (out, inner), scheme, part)?;
        // A correction is not quantized; the scheme is that of the weight it belongs to.
        let own = scheme.filter(|_| base.is_none());
        let factors =
            Factors { down: thin("down", (rank, inner), own)?, up: thin("up", (out, rank), own)? };
        return Ok(Some(match base {
            Some(base) => Weight::Corrected(Box::new(Corrected { base, correction: factors })),
            None => Weight::Factored(Box::new(factors)),
        }));
    }
    if let Some(tensor) = part(&name("weight")) {
        let values = floats(&name("weight"), tensor, out * inner)?;
        let weight = Mat::from_shape_vec((out, inner), values)
            .map_err(|error| format!("{}: {error}", name("weight")))?;
        return Ok(Some(Weight::Dense(weight)));
    }
    let Some(codes) = part(&name("codes")) else { return Ok(None) };
    let scheme = scheme.ok_or_else(|| format!("{}: no scheme", name("codes")))?;
    if let Some(block) = scheme.block() {
        let bytes = |what: &str| part(&name(what)).map_or(&[][..], Tensor::bytes);
        let weight = blocks_of(block, (out, inner), &bytes);
        let weight = weight.ok_or_else(|| format!("{}: blocks do not fit", name("codes")))?;
        return Ok(Some(Weight::Blocks(weight)));
    }
    let groups =
        scheme.groups(inner).ok_or_else(|| format!("{}: groups do not divide", name("codes")))?;
    let codes = unpack_bits(codes.bytes(), scheme.bits, out * inner)
        .ok_or_else(|| format!("{}: wrong length", name("codes")))?;
    let scales = part(&name("scales")).ok_or_else(|| format!("{}: missing", name("scales")))?;
    let scales = floats(&name("scales"), scales, out * groups)?;
    let zeros = integers(&name("zeros"), part(&name("zeros")))?;
    let zeros: Vec<u16> = zeros.into_iter().map(|zero| zero as u16).collect();
    if zeros.len() != out * groups {
        return Err(format!("{}: wrong length", name("zeros")));
    }
    let g_idx =
        part(&name("g_idx")).map(|list| integers(&name("g_idx"), Some(list))).transpose()?;
    let g_idx = g_idx.map(|list| list.into_iter().map(|g| g as u32).collect());
    Ok(Some(Weight::Quantized(QuantizedLinear {
        scheme,
        out_features: out,
        in_features: inner,
        codes,
        scales,
        zeros,
        g_idx,
    })))
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
