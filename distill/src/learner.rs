//! A whole model that learns: its values in f32, which of them are trained and how, and what the forward sees.
//!
//! Trained are all values, norms and biases alone, the scales of codes that stay (PEQA), or low-rank adapters
//! `W + (alpha / rank) B A` beside frozen linears (LoRA, Hu et al. 2021, arXiv:2106.09685), which [`Learner::value`] merges. With a quantization scheme the
//! forward sees every block linear rounded to it, and the gradient goes through the rounding as if it were not there
//! (straight-through estimator, Bengio et al. 2013, arXiv:1308.3432; LLM-QAT, Liu et al. 2023, arXiv:2305.17888).
//! Memory, bytes per weight: 16 where a weight is trained itself, 4 where it is frozen, and 4 more where the forward
//! sees something else than the weight. Adapters need the gradient of one block's linears at a time.

use std::borrow::Cow;

use attar_ir::PassError;
use attar_model::{BlockGradient, BlockWeights, Decoder, Student};
use attar_tensor::{
    QuantScheme, QuantizedLinear, TensorSource,
    grid::{Clip, choose_grid},
    linalg::{axpy, first_non_finite, gemm_nn, gemm_nt, gemm_tn, vectorize},
    rng::Rng,
};
use rayon::prelude::*;

use crate::{AdamW, Moments, clip_norm, norm};

/// Rows of a weight per task.
const ROWS: usize = 64;

/// Which values are trained.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Trained {
    /// Every value of the model.
    All,
    /// Weights of norms, and biases.
    Norms,
    /// Scales of the linears that are quantized already; their codes stay (PEQA, Kim et al. 2023, arXiv:2305.14152).
    Scales,
    /// Low-rank adapters beside the linears of the blocks.
    Adapters {
        /// Rows of A and columns of B.
        rank: usize,
        /// The product of the factors is multiplied by `alpha / rank`.
        alpha: f32,
    },
}

/// Values with their gradient and its running means.
#[derive(Debug, Clone)]
struct Free {
    values: Vec<f32>,
    gradient: Vec<f32>,
    moments: Moments,
}

impl Free {
    fn new(values: Vec<f32>) -> Self {
        let n = values.len();
        Self { values, gradient: vec![0.0; n], moments: Moments::new(n) }
    }
}

/// `scale · b [out, rank] · a [rank, in]`.
#[derive(Debug, Clone)]
struct Adapter {
    rank: usize,
    scale: f32,
    a: Free,
    b: Free,
}

#[derive(Debug, Clone)]
enum Value {
    Frozen(Vec<f32>),
    Trained(Free),
    /// Frozen codes with a trained factor on each scale; the gradient on what the forward sees exists while its block is
    /// at work.
    Scaled(Box<Scaled>),
    /// Frozen, with an adapter; the gradient on what the forward sees exists while its block is at work.
    Adapted(Vec<f32>, Adapter, Vec<f32>),
}

/// Codes whose scales are trained: `(code − zero) · scale · factor`.
#[derive(Debug, Clone)]
struct Scaled {
    codes: QuantizedLinear,
    /// One for each scale, on its grid once multiplied.
    factors: Free,
    gradient: Vec<f32>,
}

impl Scaled {
    /// The scales as they stand, on their grid.
    fn scales(&self) -> Vec<f32> {
        let grid = self.codes.scheme.scale_grid;
        let scaled = self.codes.scales.iter().zip(&self.factors.values);
        scaled.map(|(scale, factor)| grid.project(scale * factor)).collect()
    }

    /// Writes the weight.
    fn values(&self, out: &mut Vec<f32>) {
        let (rows, inner) = (self.codes.out_features, self.codes.in_features);
        out.resize(rows * inner, 0.0);
        let (scales, groups) = (self.scales(), self.codes.groups());
        out.par_chunks_mut(inner).enumerate().for_each(|(row, out)| {
            let scales = &scales[row * groups..(row + 1) * groups];
            self.each(row, |column, group, level| out[column] = level * scales[group]);
        });
    }

    /// Each weight of a row: column, group, and code less zero point.
    #[inline]
    fn each(&self, row: usize, mut visit: impl FnMut(usize, usize, f32)) {
        let QuantizedLinear { codes, zeros, g_idx, scheme, in_features: inner, .. } = &self.codes;
        let zeros = &zeros[row * self.codes.groups()..][..self.codes.groups()];
        let size = scheme.group_size(*inner);
        for (column, &code) in codes[row * inner..(row + 1) * inner].iter().enumerate() {
            let group = g_idx.as_ref().map_or(column / size, |g_idx| g_idx[column] as usize);
            visit(column, group, f32::from(code) - f32::from(zeros[group]));
        }
    }

    /// Takes the gradient on the weight to the factors: `Σ (code − zero) · scale · d` over a group.
    fn factor_gradients(&mut self) {
        let inner = self.codes.in_features;
        let groups = self.codes.groups();
        let gradient = std::mem::take(&mut self.gradient);
        let mut sums = std::mem::take(&mut self.factors.gradient);
        sums.par_chunks_mut(groups).zip(gradient.par_chunks(inner)).enumerate().for_each(
            |(row, (sums, d))| {
                let scales = &self.codes.scales[row * groups..(row + 1) * groups];
                self.each(row, |column, group, level| {
                    sums[group] += level * scales[group] * d[column];
                });
            },
        );
        self.factors.gradient = sums;
    }
}

/// One tensor of the model.
#[derive(Debug, Clone)]
struct Part {
    name: String,
    shape: Vec<usize>,
    value: Value,
    /// What the forward sees, where it is not the value itself.
    seen: Option<Vec<f32>>,
    /// Rounded to the scheme before the forward sees it.
    rounded: bool,
}

impl Part {
    fn own(&self) -> &[f32] {
        match &self.value {
            Value::Frozen(values) | Value::Adapted(values, ..) => values,
            Value::Trained(free) => &free.values,
            // Seen only.
            Value::Scaled(_) => &[],
        }
    }

    fn seen(&self) -> &[f32] {
        self.seen.as_deref().unwrap_or_else(|| self.own())
    }

    /// What the forward sees, and where the gradient on it goes.
    fn split(&mut self) -> (&[f32], Option<&mut [f32]>) {
        let (own, gradient) = match &mut self.value {
            Value::Frozen(values) => (values.as_slice(), None),
            Value::Trained(free) => (free.values.as_slice(), Some(free.gradient.as_mut_slice())),
            Value::Adapted(values, _, gradient) => {
                // As long as a block is at work.
                gradient.resize(values.len(), 0.0);
                (values.as_slice(), Some(gradient.as_mut_slice()))
            }
            Value::Scaled(scaled) => {
                scaled.gradient.resize(scaled.codes.codes.len(), 0.0);
                (&[][..], Some(scaled.gradient.as_mut_slice()))
            }
        };
        (self.seen.as_deref().unwrap_or(own), gradient)
    }

    /// The value with its adapter merged; of codes the scales.
    fn merged(&self) -> Cow<'_, [f32]> {
        if let Value::Scaled(scaled) = &self.value {
            return Cow::Owned(scaled.scales());
        }
        if !matches!(self.value, Value::Adapted(..)) {
            return Cow::Borrowed(self.own());
        }
        let mut out = Vec::new();
        self.merge_into(&mut out);
        Cow::Owned(out)
    }

    /// The value with its adapter merged, into memory that is used again.
    fn merge_into(&self, out: &mut Vec<f32>) {
        out.clear();
        out.extend_from_slice(self.own());
        let Value::Adapted(_, adapter, _) = &self.value else { return };
        let (rank, inner) = (adapter.rank, self.shape[1]);
        out.par_chunks_mut(ROWS * inner).zip(adapter.b.values.par_chunks(ROWS * rank)).for_each(
            |(out, b)| {
                let shape = (b.len() / rank, inner, rank);
                let a = (adapter.a.values.as_slice(), inner);
                gemm_nn(shape, adapter.scale, (b, rank), a, true, (out, inner));
            },
        );
    }

    /// The trained lists.
    fn free(&mut self) -> Vec<&mut Free> {
        match &mut self.value {
            Value::Frozen(_) => Vec::new(),
            Value::Trained(free) => vec![free],
            Value::Scaled(scaled) => vec![&mut scaled.factors],
            Value::Adapted(_, adapter, _) => vec![&mut adapter.a, &mut adapter.b],
        }
    }

    /// Takes the gradient on the linear to its factors: `dA += s Bᵀ dW`, `dB += s dW Aᵀ`.
    fn factor_gradients(&mut self) {
        if let Value::Scaled(scaled) = &mut self.value {
            return scaled.factor_gradients();
        }
        let Value::Adapted(values, adapter, gradient) = &mut self.value else { return };
        let (out, inner, rank) = (self.shape[0], self.shape[1], adapter.rank);
        debug_assert_eq!(values.len(), out * inner);
        let Adapter { scale, a, b, .. } = adapter;
        let (values_b, dw) = ((b.values.as_slice(), rank), (gradient.as_slice(), inner));
        gemm_tn((rank, inner, out), *scale, values_b, dw, true, (&mut a.gradient, inner));
        let values_a = (a.values.as_slice(), inner);
        gemm_nt((out, rank, inner), *scale, dw, values_a, true, (&mut b.gradient, rank));
        *gradient = Vec::new();
    }
}

/// Where the values of a block lie among the parts.
#[derive(Debug, Clone, Default)]
struct Places {
    linears: Vec<usize>,
    biases: Vec<Option<usize>>,
    norms: Vec<usize>,
    qk_norm: Option<(usize, usize)>,
}

/// A model that learns.
#[derive(Debug, Clone)]
pub struct Learner {
    parts: Vec<Part>,
    /// By block, then the epilogue.
    places: Vec<Places>,
    scheme: Option<QuantScheme>,
    /// By block, then the epilogue: something that lies before it is trained.
    trained_before: Vec<bool>,
}

impl Learner {
    /// Reads every tensor of a model, `codes` giving by the name of a weight what is quantized already. Adapters begin as
    /// zero: A is random by `seed`, B is zero.
    ///
    /// # Errors
    /// A tensor that cannot be read or holds NaN or infinity.
    pub fn read(
        decoder: &Decoder,
        source: &dyn TensorSource,
        codes: &dyn Fn(&str) -> Option<QuantizedLinear>,
        trained: Trained,
        scheme: Option<QuantScheme>,
        seed: u64,
    ) -> Result<Self, PassError> {
        let (mut parts, mut places) = (Vec::new(), Vec::new());
        let mut rng = Rng::new(seed ^ 0x1f83_d9ab_fb41_bd6b);
        let mut add = |name: String, shape: Vec<usize>, linear: bool| -> Result<usize, PassError> {
            let fail = |reason: String| PassError::Numeric { site: name.clone(), reason };
            if let Some(codes) = codes(&name) {
                let factors = Free::new(vec![1.0; codes.scales.len()]);
                let value =
                    Value::Scaled(Box::new(Scaled { codes, factors, gradient: Vec::new() }));
                parts.push(Part { name, shape, value, seen: None, rounded: false });
                return Ok(parts.len() - 1);
            }
            let view = source.read(&name).map_err(|error| fail(error.to_string()))?;
            let values = view.to_f32().map_err(|error| fail(error.to_string()))?;
            source.release(&name);
            if let Some(at) = first_non_finite(&values) {
                return Err(fail(format!(
                    "holds {} at flat index {at}; the checkpoint is damaged, download or export it again",
                    values[at]
                )));
            }
            let value = match trained {
                Trained::All => Value::Trained(Free::new(values)),
                Trained::Norms if shape.len() == 1 => Value::Trained(Free::new(values)),
                Trained::Adapters { rank, alpha } if linear => {
                    let deviation = 1.0 / (shape[1] as f32).sqrt();
                    let mut a = rng.normals(rank * shape[1]);
                    for a in &mut a {
                        *a *= deviation;
                    }
                    let (a, b) = (Free::new(a), Free::new(vec![0.0; shape[0] * rank]));
                    let scale = alpha / rank as f32;
                    Value::Adapted(values, Adapter { rank, scale, a, b }, Vec::new())
                }
                Trained::Norms | Trained::Scales | Trained::Adapters { .. } => {
                    Value::Frozen(values)
                }
            };
            let rounded = linear && scheme.is_some();
            parts.push(Part { name, shape, value, seen: None, rounded });
            Ok(parts.len() - 1)
        };
        let graph = &decoder.graph;
        let table = add(graph.embedding.clone(), vec![graph.vocab, graph.hidden], false)?;
        for block in graph.all_blocks() {
            let mut at = Places::default();
            let epilogue = block.index == graph.blocks.len();
            for site in &block.sites {
                let shape = vec![site.out_features, site.in_features];
                let tied = epilogue && graph.tied;
                at.linears.push(if tied {
                    table
                } else {
                    add(decoder.weight_tensor(site), shape, !epilogue)?
                });
                let bias = format!("{}.bias", site.name);
                let bias = site.bias.then(|| add(bias, vec![site.out_features], false));
                at.biases.push(bias.transpose()?);
            }
            for norm in &block.norms {
                at.norms.push(add(norm.tensor.clone(), vec![norm.width], false)?);
            }
            if decoder.spec.qk_norm && !epilogue {
                let mut norm = |part: &str| {
                    let name = format!("{}self_attn.{part}_norm.weight", block.prefix);
                    add(name, vec![decoder.spec.head_dim], false)
                };
                at.qk_norm = Some((norm("q")?, norm("k")?));
            }
            places.push(at);
        }
        let is_trained = |part: &Part| !matches!(part.value, Value::Frozen(_));
        let mut before = is_trained(&parts[table]);
        let mut trained_before = Vec::new();
        for at in &places {
            trained_before.push(before);
            let mut own: Vec<usize> = at.linears.iter().chain(&at.norms).copied().collect();
            own.extend(at.biases.iter().flatten());
            own.extend(at.qk_norm.iter().flat_map(|&(q, k)| [q, k]));
            before |= own.iter().any(|&part| is_trained(&parts[part]));
        }
        let mut learner = Self { parts, places, scheme, trained_before };
        learner.refresh();
        Ok(learner)
    }

    /// Bytes of a learner of `weights` values, of which `linears` are weights of block linears.
    pub fn bytes(
        weights: usize,
        linears: usize,
        vectors: usize,
        factors: usize,
        trained: Trained,
        rounded: bool,
    ) -> usize {
        let seen = if rounded { 4 * linears } else { 0 };
        seen + match trained {
            Trained::All => 16 * weights,
            Trained::Norms => 4 * weights + 12 * vectors,
            // Codes, here and in the blocks, and the gradient of a block; factors, their gradients and means.
            Trained::Scales => 4 * weights + 7 * linears + 20 * factors,
            Trained::Adapters { .. } => {
                4 * weights + if rounded { 0 } else { 4 * linears } + 16 * factors
            }
        }
    }

    /// Makes anew what the forward sees.
    fn refresh(&mut self) {
        let scheme = self.scheme;
        for part in &mut self.parts {
            if let Value::Scaled(scaled) = &part.value {
                let mut seen = part.seen.take().unwrap_or_default();
                scaled.values(&mut seen);
                part.seen = Some(seen);
                continue;
            }
            let adapted = matches!(part.value, Value::Adapted(..));
            if !adapted && !part.rounded {
                continue;
            }
            let mut seen = part.seen.take().unwrap_or_default();
            part.merge_into(&mut seen);
            if let Some(scheme) = scheme.filter(|_| part.rounded) {
                fake_quantize(&mut seen, part.shape[1], scheme);
            }
            part.seen = Some(seen);
        }
    }

    /// Sets all gradients to zero.
    pub fn clear(&mut self) {
        for part in &mut self.parts {
            for free in part.free() {
                free.gradient.fill(0.0);
            }
        }
    }

    /// Step `t` (the first is 1) at learning rate `rate`, the gradient shortened to norm `limit`; returns the norm that
    /// it had. Weight decay is for matrices only.
    pub fn step(&mut self, t: usize, rate: f32, adamw: AdamW, limit: f64) -> f64 {
        let mut free: Vec<(bool, &mut Free)> = Vec::new();
        for part in &mut self.parts {
            let matrix = part.shape.len() > 1 && !matches!(part.value, Value::Scaled(_));
            free.extend(part.free().into_iter().map(|free| (matrix, free)));
        }
        let mut gradients: Vec<&mut [f32]> =
            free.iter_mut().map(|(_, free)| free.gradient.as_mut_slice()).collect();
        let norm = clip_norm(&mut gradients, limit);
        for (matrix, Free { values, gradient, moments }) in free {
            let adamw = if matrix { adamw } else { AdamW { decay: 0.0, ..adamw } };
            adamw.step(t, rate, moments, values, gradient);
        }
        self.refresh();
        norm
    }

    /// Squared norm of the gradient on everything that is trained.
    pub fn gradient_square(&mut self) -> f64 {
        let free = self.parts.iter_mut().flat_map(Part::free);
        norm(free.map(|free| free.gradient.as_slice())).powi(2)
    }

    /// A plain step against the gradient.
    pub fn descend(&mut self, rate: f32) {
        for Free { values, gradient, .. } in self.parts.iter_mut().flat_map(Part::free) {
            axpy(-rate, gradient, values);
        }
        self.refresh();
    }

    /// Tensors of the model that training may have changed.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let changed = |part: &&Part| !matches!(part.value, Value::Frozen(_));
        self.parts.iter().filter(changed).map(|part| part.name.as_str())
    }

    /// The value of a tensor with its adapter merged, not rounded; of codes their scales.
    pub fn value(&self, name: &str) -> Option<Cow<'_, [f32]>> {
        self.parts.iter().find(|part| part.name == name).map(Part::merged)
    }

    /// Number of values that are trained.
    pub fn trained(&self) -> usize {
        let one = |part: &Part| match &part.value {
            Value::Frozen(_) => 0,
            Value::Trained(free) => free.values.len(),
            Value::Scaled(scaled) => scaled.factors.values.len(),
            Value::Adapted(_, adapter, _) => adapter.a.values.len() + adapter.b.values.len(),
        };
        self.parts.iter().map(one).sum()
    }

    /// Everything that a step changes, by name: values and the means of their gradients.
    pub fn state(&self) -> Vec<(String, &[f32])> {
        let mut state = Vec::new();
        for part in &self.parts {
            let lists: Vec<(&str, &Free)> = match &part.value {
                Value::Frozen(_) => Vec::new(),
                Value::Trained(free) => vec![("", free)],
                Value::Scaled(scaled) => vec![(".factors", &scaled.factors)],
                Value::Adapted(_, adapter, _) => vec![(".a", &adapter.a), (".b", &adapter.b)],
            };
            for (suffix, free) in lists {
                for (what, list) in [
                    ("value", &free.values),
                    ("first", &free.moments.first),
                    ("second", &free.moments.second),
                ] {
                    state.push((format!("{}{suffix}.{what}", part.name), list.as_slice()));
                }
            }
        }
        state
    }

    /// Takes back what [`Learner::state`] gave.
    ///
    /// # Errors
    /// The name of a list that is missing or has another length.
    pub fn restore(&mut self, read: &dyn Fn(&str) -> Option<Vec<f32>>) -> Result<(), String> {
        for part in &mut self.parts {
            let name = part.name.clone();
            let lists: Vec<(&str, &mut Free)> = match &mut part.value {
                Value::Frozen(_) => Vec::new(),
                Value::Trained(free) => vec![("", free)],
                Value::Scaled(scaled) => vec![(".factors", &mut scaled.factors)],
                Value::Adapted(_, adapter, _) => {
                    vec![(".a", &mut adapter.a), (".b", &mut adapter.b)]
                }
            };
            for (suffix, free) in lists {
                for (what, list) in [
                    ("value", &mut free.values),
                    ("first", &mut free.moments.first),
                    ("second", &mut free.moments.second),
                ] {
                    let full = format!("{name}{suffix}.{what}");
                    *list = read(&full).filter(|found| found.len() == list.len()).ok_or(full)?;
                }
            }
        }
        self.refresh();
        Ok(())
    }

    fn view(&self, at: &Places) -> BlockWeights<'_> {
        let seen = |part: usize| self.parts[part].seen();
        BlockWeights {
            linears: at.linears.iter().map(|&part| seen(part)).collect(),
            biases: at.biases.iter().map(|bias| bias.map(seen)).collect(),
            norms: at.norms.iter().map(|&part| seen(part)).collect(),
            qk_norm: at.qk_norm.map(|(q, k)| (seen(q), seen(k))),
        }
    }
}

impl Student for Learner {
    fn weights(&self, index: usize) -> BlockWeights<'_> {
        self.view(&self.places[index])
    }

    fn embedding(&self) -> &[f32] {
        self.parts[0].seen()
    }

    fn with_gradient(&mut self, index: usize) -> (BlockWeights<'_>, BlockGradient<'_>) {
        let Places { linears, biases, norms, qk_norm } = &self.places[index];
        let mut used: Vec<usize> = linears.iter().chain(norms).copied().collect();
        used.extend(biases.iter().flatten());
        used.extend(qk_norm.iter().flat_map(|&(q, k)| [q, k]));
        let mut split: Vec<Option<(&[f32], Option<&mut [f32]>)>> = self
            .parts
            .iter_mut()
            .enumerate()
            .map(|(at, part)| used.contains(&at).then(|| part.split()))
            .collect();
        let mut take = |at: usize| split[at].take().expect("each part has one place in a block");
        let (linears, d_linears) = linears.iter().map(|&at| take(at)).unzip();
        let (biases, d_biases) = biases
            .iter()
            .map(|at| {
                at.map_or((None, None), |at| {
                    let (bias, d) = take(at);
                    (Some(bias), d)
                })
            })
            .unzip();
        let (norms, d_norms) = norms.iter().map(|&at| take(at)).unzip();
        let (qk_norm, d_qk_norm) = match qk_norm {
            Some((q, k)) => {
                let ((q, dq), (k, dk)) = (take(*q), take(*k));
                (Some((q, k)), dq.zip(dk))
            }
            None => (None, None),
        };
        let input = self.trained_before[index];
        (
            BlockWeights { linears, biases, norms, qk_norm },
            BlockGradient {
                linears: d_linears,
                biases: d_biases,
                norms: d_norms,
                qk_norm: d_qk_norm,
                input,
            },
        )
    }

    fn embedding_gradient(&mut self) -> Option<&mut [f32]> {
        self.parts[0].split().1
    }

    fn finished(&mut self, index: usize) {
        let at = &self.places[index];
        let parts = &mut self.parts;
        for &part in &at.linears {
            parts[part].factor_gradients();
        }
    }
}

/// Rounds `weight [rows, inner]` to the nearest values of a scheme, the range of each group being that of its weights:
/// what `rtn` with its default options makes of it.
pub fn fake_quantize(weight: &mut [f32], inner: usize, scheme: QuantScheme) {
    let size = scheme.group_size(inner);
    let top = f32::from(scheme.max_code());
    weight.par_chunks_mut(ROWS * inner).for_each(|rows| {
        vectorize(
            #[inline(always)]
            || {
                for group in rows.chunks_mut(size) {
                    let grid = choose_grid(group, None, scheme, Clip::MinMax);
                    let (inverse, zero) = (1.0 / grid.scale, f32::from(grid.zero));
                    for w in group {
                        // 1.5 · 2²³ plus a small number rounds it to even.
                        const SHIFT: f32 = 12_582_912.0;
                        let code = (*w * inverse).clamp(-zero, top - zero) + SHIFT - SHIFT;
                        *w = code * grid.scale;
                    }
                }
            },
        );
    });
}
