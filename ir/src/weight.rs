//! The weight of a linear in flight, in each of its forms, and its way to the work directory and back.

use std::borrow::Cow;

use attar_tensor::{
    BlockQuantized, BlockType, DType, Mat, QuantScheme, QuantizedLinear, Tensor,
    linalg::lowrank::multiply,
};

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

/// The shape is the values' own.
pub(crate) const FITS: &str = "the shape is the values' own";

pub(crate) fn export_weight(stem: &str, weight: &Weight, put: &mut dyn FnMut(String, Tensor)) {
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

pub(crate) fn floats(name: &str, tensor: &Tensor, count: usize) -> Result<Vec<f32>, String> {
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
pub(crate) fn import_weight<'a>(
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
