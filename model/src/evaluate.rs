//! Running blocks on activations: the pieces that calibration, evaluation and generation share.

use std::cell::RefCell;

use attar_ir::{BlockState, Factors, Site, Weight};
use attar_tensor::{
    Mat, TensorSource,
    linalg::{PackedRows, first_non_finite, gemm_nt, rms_norm_row, silu_mul},
};
use rayon::prelude::*;

use crate::{
    Decoder, ModelError, Stream,
    attention::{QkNorm, attend, place_heads},
    decoder::read_finite,
    rope::RopeTable,
};

/// A linear that multiplies: `out [m, out_features] = x [m, in_features] · Wᵀ`.
pub trait LinearOp: Send + Sync {
    /// Multiplies `m` rows.
    fn matmul(&self, x: &[f32], m: usize, out: &mut [f32]);
}

impl LinearOp for Mat {
    fn matmul(&self, x: &[f32], m: usize, out: &mut [f32]) {
        let (n, k) = self.dim();
        let w = self.as_slice().expect("weights are in standard layout");
        gemm_nt((m, n, k), 1.0, (x, k), (w, k), false, (out, n));
    }
}

/// A weight that many windows are multiplied with.
struct PackedWeight(PackedRows);

impl PackedWeight {
    fn new(weight: &Mat) -> Self {
        let (n, k) = weight.dim();
        let rows = weight.as_slice().expect("weights are in standard layout");
        Self(PackedRows::new((rows, k), n, k))
    }
}

impl LinearOp for PackedWeight {
    fn matmul(&self, x: &[f32], m: usize, out: &mut [f32]) {
        let (k, n) = (x.len() / m.max(1), out.len() / m.max(1));
        self.0.gemm_nt(m, (x, k), (out, n));
    }
}

impl LinearOp for &Mat {
    fn matmul(&self, x: &[f32], m: usize, out: &mut [f32]) {
        (**self).matmul(x, m, out);
    }
}

/// A linear of low rank, alone or beside a full one: `out = base x + scale · up (down x)`.
pub struct LowRankOp<'a> {
    /// The full weight, where there is one.
    pub base: Option<Box<dyn LinearOp + 'a>>,
    /// `[rank, in_features]`.
    pub down: Box<dyn LinearOp + 'a>,
    /// `[out_features, rank]`.
    pub up: Box<dyn LinearOp + 'a>,
    /// Rows of `down`.
    pub rank: usize,
    /// What the product is multiplied with.
    pub scale: f32,
}

impl std::fmt::Debug for LowRankOp<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LowRankOp").field("rank", &self.rank).finish_non_exhaustive()
    }
}

impl LinearOp for LowRankOp<'_> {
    fn matmul(&self, x: &[f32], m: usize, out: &mut [f32]) {
        let mut inner = vec![0.0; m * self.rank];
        self.down.matmul(x, m, &mut inner);
        // One is exact, and by far the usual.
        if self.scale.to_bits() != 1.0f32.to_bits() {
            for value in &mut inner {
                *value *= self.scale;
            }
        }
        let Some(base) = &self.base else { return self.up.matmul(&inner, m, out) };
        let mut correction = vec![0.0; out.len()];
        self.up.matmul(&inner, m, &mut correction);
        base.matmul(x, m, out);
        out.iter_mut().zip(correction).for_each(|(out, more)| *out += more);
    }
}

/// A weight in flight, ready for many windows.
fn packed(weight: &Weight) -> Box<dyn LinearOp> {
    let low_rank = |base, factors: &Factors| LowRankOp {
        base,
        down: packed(&factors.down),
        up: packed(&factors.up),
        rank: factors.rank(),
        scale: 1.0,
    };
    match weight {
        Weight::Dense(weight) => Box::new(PackedWeight::new(weight)),
        Weight::Quantized(_) | Weight::Blocks(_) => Box::new(PackedWeight::new(&weight.values())),
        Weight::Factored(factors) => Box::new(low_rank(None, factors)),
        Weight::Corrected(weight) => {
            Box::new(low_rank(Some(packed(&weight.base)), &weight.correction))
        }
    }
}

/// Where the linears of a model come from: dense tensors, or packed bytes behind a kernel.
pub trait WeightSource: Send + Sync {
    /// Norms, biases and the embedding.
    fn tensors(&self) -> &dyn TensorSource;

    /// One linear, ready to multiply.
    ///
    /// # Errors
    /// When its tensors cannot be read.
    fn linear(&self, decoder: &Decoder, site: &Site) -> Result<Box<dyn LinearOp>, ModelError>;
}

/// Dense weights straight from a checkpoint.
impl<T: TensorSource> WeightSource for T {
    fn tensors(&self) -> &dyn TensorSource {
        self
    }

    fn linear(&self, decoder: &Decoder, site: &Site) -> Result<Box<dyn LinearOp>, ModelError> {
        let weight = read_finite(self, &decoder.weight_tensor(site))?;
        let weight = Mat::from_shape_vec((site.out_features, site.in_features), weight)
            .expect("shapes were checked when the graph was read");
        Ok(Box::new(weight))
    }
}

/// Linears of a block by site index; absent where a stage does not need them.
pub type Linears<'a> = Vec<Option<Box<dyn LinearOp + 'a>>>;

/// A block ready to run.
pub struct BlockOps<'a> {
    /// By site index.
    pub linears: Linears<'a>,
    /// By site index.
    pub biases: Vec<Option<Vec<f32>>>,
    /// By norm index.
    pub norms: Vec<Vec<f32>>,
    pub(crate) qk_norm: QkNorm,
}

impl std::fmt::Debug for BlockOps<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BlockOps").field("linears", &self.linears.len()).finish_non_exhaustive()
    }
}

impl BlockOps<'static> {
    /// Loads a block's linears from `source`.
    ///
    /// # Errors
    /// When a tensor cannot be read.
    pub fn load(
        decoder: &Decoder,
        index: usize,
        source: &dyn WeightSource,
    ) -> Result<Self, ModelError> {
        let block = decoder.block(index);
        let mut ops = Self {
            linears: Vec::new(),
            biases: Vec::new(),
            norms: decoder.load_norms(index, source.tensors())?,
            qk_norm: decoder.load_qk_norm(index, source.tensors())?,
        };
        for site in &block.sites {
            ops.linears.push(Some(source.linear(decoder, site)?));
            ops.biases.push(decoder.load_bias(site, source.tensors())?);
        }
        Ok(ops)
    }
}

impl<'a> BlockOps<'a> {
    /// The sites `wanted` of a block in flight; quantized weights are dequantized once.
    pub(crate) fn from_state(state: &'a BlockState, wanted: &[usize], qk_norm: &QkNorm) -> Self {
        let linears = state
            .linears
            .iter()
            .enumerate()
            .map(|(site, linear)| {
                wanted.contains(&site).then(|| packed(&linear.weight) as Box<dyn LinearOp + 'a>)
            })
            .collect();
        Self {
            linears,
            biases: state.linears.iter().map(|linear| linear.bias.clone()).collect(),
            norms: state.norms.clone(),
            qk_norm: qk_norm.clone(),
        }
    }

    pub(crate) fn apply(&self, site: usize, out_features: usize, x: &[f32], m: usize) -> Vec<f32> {
        let mut out = Vec::new();
        self.apply_into(site, out_features, x, m, &mut out);
        out
    }

    /// As `apply`, into a buffer whose memory is used again.
    pub(crate) fn apply_into(
        &self,
        site: usize,
        out_features: usize,
        x: &[f32],
        m: usize,
        out: &mut Vec<f32>,
    ) {
        out.resize(m * out_features, 0.0);
        self.linears[site].as_ref().expect("a stage names the sites it runs").matmul(x, m, out);
        if let Some(bias) = &self.biases[site] {
            for row in out.chunks_mut(out_features) {
                for (value, bias) in row.iter_mut().zip(bias) {
                    *value += bias;
                }
            }
        }
    }
}

thread_local! {
    /// Activations inside a block; windows come one after the other, and fresh memory costs page faults.
    static BUFFERS: RefCell<[Vec<f32>; 4]> = const { RefCell::new([const { Vec::new() }; 4]) };
}

/// Gives the memory of the activations inside a block back, on every thread.
pub(crate) fn release_buffers() {
    drop(BUFFERS.take());
    rayon::broadcast(|_| drop(BUFFERS.take()));
}

/// What runs one window through one block, step by step.
pub(crate) struct Walk<'a> {
    pub(crate) decoder: &'a Decoder,
    pub(crate) index: usize,
    pub(crate) rope: &'a RopeTable,
}

/// Sites that the transition out of stage `s` multiplies with.
pub(crate) const SITES_OF: [&[usize]; 4] = [&[0, 1, 2], &[3], &[4, 5], &[6]];

impl Walk<'_> {
    pub(crate) fn norm(&self, weight: &[f32], x: &[f32]) -> Vec<f32> {
        let mut out = Vec::new();
        self.norm_into(weight, x, &mut out);
        out
    }

    pub(crate) fn norm_into(&self, weight: &[f32], x: &[f32], out: &mut Vec<f32>) {
        let hidden = self.decoder.spec.hidden;
        out.resize(x.len(), 0.0);
        for (x, out) in x.chunks(hidden).zip(out.chunks_mut(hidden)) {
            rms_norm_row(x, weight, self.decoder.spec.rms_eps, out);
        }
    }

    /// From stage `stage` to the next: `x` is the residual stream, `mid` what lies beside it at stages
    /// 1 (attention output) and 3 (MLP activation); at 0 and 2 its content means nothing.
    pub(crate) fn step(&self, stage: usize, ops: &BlockOps<'_>, x: &mut [f32], mid: &mut Vec<f32>) {
        if stage.is_multiple_of(2) {
            self.transit(stage, ops, x, mid);
            return;
        }
        let mut buffers = BUFFERS.take();
        self.transit(stage, ops, mid, &mut buffers[1]);
        add(x, &buffers[1]);
        BUFFERS.set(buffers);
    }

    /// What the transition out of a stage makes: of the residual stream what lies beside it (stages 0 and 2), of
    /// what lies beside it what is added to it (1 and 3).
    pub(crate) fn transit(
        &self,
        stage: usize,
        ops: &BlockOps<'_>,
        input: &[f32],
        made: &mut Vec<f32>,
    ) {
        let spec = &self.decoder.spec;
        let out = |site: usize| self.decoder.block(self.index).sites[site].out_features;
        let m = input.len() / self.decoder.block(self.index).inputs[stage].width;
        let mut buffers = BUFFERS.take();
        let [h, a, b, c] = &mut buffers;
        match stage {
            0 => {
                self.norm_into(&ops.norms[0], input, h);
                ops.apply_into(0, out(0), h, m, a);
                ops.apply_into(1, out(1), h, m, b);
                ops.apply_into(2, out(2), h, m, c);
                let (qn, kn) = match &ops.qk_norm {
                    Some((q, k)) => (Some(q.as_slice()), Some(k.as_slice())),
                    None => (None, None),
                };
                place_heads(spec, self.rope, qn, 0, out(0), a);
                place_heads(spec, self.rope, kn, 0, out(1), b);
                made.resize(a.len(), 0.0);
                attend(spec, spec.window[self.index], 0, (a, b, c), made);
            }
            1 => ops.apply_into(3, out(3), input, m, made),
            2 => {
                self.norm_into(&ops.norms[1], input, h);
                ops.apply_into(4, out(4), h, m, made);
                ops.apply_into(5, out(5), h, m, a);
                silu_mul(made, a);
            }
            _ => ops.apply_into(6, out(6), input, m, made),
        }
        BUFFERS.set(buffers);
    }
}

/// `x += y`.
pub(crate) fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

/// Embeds tokens: `[tokens, hidden]`.
///
/// # Errors
/// When the embedding cannot be read, holds NaN or infinity in a row that is asked for, or has no row
/// for a token.
pub fn embed(
    decoder: &Decoder,
    source: &dyn TensorSource,
    tokens: &[u32],
) -> Result<Vec<f32>, ModelError> {
    let (hidden, vocab) = (decoder.spec.hidden, decoder.spec.vocab);
    let name = &decoder.graph.embedding;
    let fail = |reason: String| ModelError::Tensor { name: name.clone(), reason };
    let mut out = vec![0.0; tokens.len() * hidden];
    for (&token, row) in tokens.iter().zip(out.chunks_mut(hidden)) {
        let start = token as usize * hidden;
        if token as usize >= vocab {
            return Err(fail(format!(
                "has {vocab} rows, none for token {token}; use the checkpoint's own tokenizer"
            )));
        }
        let stored = source.read_row(name, token as usize)?;
        stored.copy_to_f32(0, row).map_err(|error| fail(error.to_string()))?;
        if let Some(at) = first_non_finite(row) {
            return Err(fail(format!(
                "holds {} at flat index {}; the checkpoint is damaged, download or export it again",
                row[at],
                start + at
            )));
        }
    }
    // Rows lie all over the table, and the system maps more than is touched.
    source.release(name);
    Ok(out)
}

/// Runs all windows through one block, in place.
///
/// # Errors
/// When spilled activations cannot be read or written.
pub fn run_block(
    decoder: &Decoder,
    index: usize,
    ops: &BlockOps<'_>,
    stream: &mut Stream,
) -> Result<(), ModelError> {
    let positions = stream.lengths().into_iter().max().unwrap_or(0);
    let rope = RopeTable::new(decoder.spec.rope, decoder.spec.head_dim, positions);
    let walk = Walk { decoder, index, rope: &rope };
    let batch = rayon::current_num_threads();
    for first in (0..stream.windows()).step_by(batch) {
        let last = (first + batch).min(stream.windows());
        let shared = &*stream;
        let done: Vec<Vec<f32>> = (first..last)
            .into_par_iter()
            .map(|window| {
                let (mut x, mut mid) = (shared.read(window)?, Vec::new());
                for stage in 0..4 {
                    walk.step(stage, ops, &mut x, &mut mid);
                }
                Ok(x)
            })
            .collect::<Result<_, std::io::Error>>()?;
        for (window, x) in (first..last).zip(done) {
            stream.write(window, &x)?;
        }
    }
    release_buffers();
    Ok(())
}

/// Final norm and output head of `x [tokens, hidden]`: logits `[tokens, vocab]`.
pub fn final_logits(decoder: &Decoder, head: &BlockOps<'_>, x: &[f32]) -> Mat {
    let m = x.len() / decoder.spec.hidden;
    let rope = RopeTable::new(decoder.spec.rope, decoder.spec.head_dim, 0);
    let walk = Walk { decoder, index: decoder.spec.layers, rope: &rope };
    let h = walk.norm(&head.norms[0], x);
    let logits = head.apply(0, decoder.spec.vocab, &h, m);
    Mat::from_shape_vec((m, decoder.spec.vocab), logits).expect("one logit per token and entry")
}
