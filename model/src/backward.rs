//! Forward and backward of one block for training: `x [tokens, hidden]` of several windows goes in, and a gradient
//! on what comes out becomes gradients on weights, biases, norms and the input. Weights are plain slices, so that
//! a caller may put others (fake-quantized, adapted) in their place and receives the gradient with respect to those.
//!
//! A [`Tape`] keeps what the linears put out and the stream between attention and MLP: per token
//! `2 hidden + q + 2 kv + 2 intermediate` floats. Norms, rotations, probabilities and the MLP's product are made
//! again, chunk by chunk. Products are f32 with sums in a fixed order: an element of a gradient has one owner, and
//! sums over tokens run in fixed pieces of rows, so bits do not depend on the number of threads.
//! Cost: forward 2 FLOPs per token and weight, backward 4.

use std::ops::Range;

use attar_ir::{
    Block, BlockState, Weight,
    slopes::{space_bytes, tape_bytes},
};
use attar_tensor::linalg::{
    Packing, add_in_place, rms_norm_row, rms_norm_row_backward, silu_mul, silu_mul_backward,
};
use rayon::prelude::*;

use crate::{
    Decoder,
    attention::{QkNorm, attend, attend_backward, place_heads, place_heads_backward},
    rope::RopeTable,
};

/// Rows of element-wise work per task; sums over rows are made of the sums of such pieces, in their order.
const ROWS: usize = 64;

/// Values of one block, or of the epilogue, by place.
#[derive(Debug, Clone)]
pub struct BlockWeights<'a> {
    /// By site index: `[out_features, in_features]`, row-major.
    pub linears: Vec<&'a [f32]>,
    /// By site index: `[out_features]`.
    pub biases: Vec<Option<&'a [f32]>>,
    /// By norm index: `[hidden]`.
    pub norms: Vec<&'a [f32]>,
    /// Of queries and keys, `[head_dim]` each.
    pub qk_norm: Option<(&'a [f32], &'a [f32])>,
}

impl<'a> BlockWeights<'a> {
    /// The values of a block in flight; `None` when a weight is not dense.
    ///
    /// # Panics
    /// When a weight is not in standard layout.
    pub fn of(state: &'a BlockState, qk_norm: &'a QkNorm) -> Option<Self> {
        let linear = |weight: &'a Weight| {
            weight.as_dense().map(|w| w.as_slice().expect("weights are in standard layout"))
        };
        Some(Self {
            linears: state.linears.iter().map(|l| linear(&l.weight)).collect::<Option<_>>()?,
            biases: state.linears.iter().map(|l| l.bias.as_deref()).collect(),
            norms: state.norms.iter().map(Vec::as_slice).collect(),
            qk_norm: qk_norm.as_ref().map(|(q, k)| (q.as_slice(), k.as_slice())),
        })
    }
}

/// Where gradients of a block are added, of the shapes of [`BlockWeights`]; `None` where none is wanted, and what
/// only that would need is not computed.
#[derive(Debug, Default)]
pub struct BlockGradient<'a> {
    /// By site index.
    pub linears: Vec<Option<&'a mut [f32]>>,
    /// By site index.
    pub biases: Vec<Option<&'a mut [f32]>>,
    /// By norm index.
    pub norms: Vec<Option<&'a mut [f32]>>,
    /// Of queries and keys.
    pub qk_norm: Option<(&'a mut [f32], &'a mut [f32])>,
    /// True when the gradient on the block's input is wanted.
    pub input: bool,
}

impl BlockGradient<'_> {
    /// No gradient but that of the input: the places of `block`, all empty.
    pub fn input_only(block: &Block) -> Self {
        let none = |n: usize| (0..n).map(|_| None).collect();
        Self {
            linears: none(block.sites.len()),
            biases: none(block.sites.len()),
            norms: none(block.norms.len()),
            qk_norm: None,
            input: true,
        }
    }

    fn wants(&self, sites: &[usize]) -> bool {
        sites.iter().any(|&site| self.linears[site].is_some() || self.biases[site].is_some())
    }
}

/// What a forward leaves for the backward. Its memory is used again by the next forward.
#[derive(Debug, Default)]
pub struct Tape {
    /// Queries, keys and values as their linears put them out, before norm and rotation.
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    /// What attention put out.
    attended: Vec<f32>,
    /// The stream between attention and MLP.
    middle: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
}

impl Tape {
    /// Bytes that a tape of `tokens` tokens of such a block takes.
    pub fn bytes(block: &Block, tokens: usize) -> usize {
        tape_bytes(block, tokens)
    }
}

/// Memory that forwards and backwards work in, used again.
#[derive(Debug, Default)]
pub struct Space {
    packing: Packing,
    tape: Tape,
    /// `[tokens, hidden]`: what norms put out, and the gradient on it.
    normed: Vec<f32>,
    d_normed: Vec<f32>,
    /// `[tokens, intermediate]`.
    wide: Vec<f32>,
    /// Rotated queries and keys; gradients on queries, keys and values.
    q: Vec<f32>,
    k: Vec<f32>,
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
}

impl Space {
    /// Bytes taken at most by work on `tokens` tokens of such a block, tape excluded.
    pub fn bytes(block: &Block, tokens: usize) -> usize {
        space_bytes(block, tokens)
    }
}

/// `values` with exactly `n` elements of any content.
fn sized(values: &mut Vec<f32>, n: usize) -> &mut [f32] {
    values.resize(n, 0.0);
    values
}

/// The blocks of a decoder as functions with a derivative.
#[derive(Debug)]
pub struct Differentiable<'a> {
    decoder: &'a Decoder,
    rope: RopeTable,
}

impl<'a> Differentiable<'a> {
    /// For windows of up to `positions` tokens.
    pub fn new(decoder: &'a Decoder, positions: usize) -> Self {
        let spec = &decoder.spec;
        Self { decoder, rope: RopeTable::new(spec.rope, spec.head_dim, positions) }
    }

    /// What block `index` makes of `input [tokens, hidden]`, the windows of `lengths` tokens one after the other.
    /// With a tape, [`Differentiable::backward`] may follow.
    ///
    /// # Panics
    /// When shapes disagree or a window is longer than was said.
    pub fn forward(
        &self,
        index: usize,
        weights: &BlockWeights<'_>,
        lengths: &[usize],
        input: &[f32],
        tape: Option<&mut Tape>,
        space: &mut Space,
        output: &mut Vec<f32>,
    ) {
        let (spec, block) = (&self.decoder.spec, self.decoder.block(index));
        let (tokens, out) = self.check(lengths, input.len(), block);
        let Space { packing, tape: own, normed, wide, q, k, .. } = space;
        let Tape { q: raw_q, k: raw_k, v, attended, middle, gate, up } = tape.unwrap_or(own);
        let hidden = spec.hidden;

        self.norm(weights.norms[0], input, normed);
        for (site, made) in [(0, &mut *raw_q), (1, &mut *raw_k), (2, &mut *v)] {
            linear(packing, weights, site, normed, (tokens, out(site)), false, made);
        }
        self.place(lengths, weights, (raw_q, q), (raw_k, k));
        sized(attended, tokens * out(0));
        let window = spec.window[index];
        let windows = pieces(lengths, out(0), attended);
        windows.into_par_iter().for_each(|(tokens, made)| {
            let of = |width: usize| tokens.start * width..tokens.end * width;
            let (q, k, v) = (&q[of(out(0))], &k[of(out(1))], &v[of(out(2))]);
            attend(spec, window, 0, (q, k, v), made);
        });
        sized(middle, tokens * hidden).copy_from_slice(input);
        linear(packing, weights, 3, attended, (tokens, hidden), true, middle);
        self.norm(weights.norms[1], middle, normed);
        linear(packing, weights, 4, normed, (tokens, out(4)), false, gate);
        linear(packing, weights, 5, normed, (tokens, out(5)), false, up);
        sized(wide, gate.len());
        let chunk = ROWS * out(4);
        wide.par_chunks_mut(chunk).zip(gate.par_chunks(chunk)).zip(up.par_chunks(chunk)).for_each(
            |((wide, gate), up)| {
                wide.copy_from_slice(gate);
                silu_mul(wide, up);
            },
        );
        sized(output, tokens * hidden).copy_from_slice(middle);
        linear(packing, weights, 6, wide, (tokens, hidden), true, output);
    }

    /// From the gradient `d` on what [`Differentiable::forward`] put out for `input` and `tape`: adds to `gradient`,
    /// and makes `d` the gradient on the input (of any content when that is not wanted). The tape is used up.
    ///
    /// # Panics
    /// When shapes disagree.
    pub fn backward(
        &self,
        index: usize,
        weights: &BlockWeights<'_>,
        lengths: &[usize],
        input: &[f32],
        tape: &mut Tape,
        gradient: &mut BlockGradient<'_>,
        space: &mut Space,
        d: &mut [f32],
    ) {
        let (spec, block) = (&self.decoder.spec, self.decoder.block(index));
        let (tokens, out) = self.check(lengths, input.len(), block);
        assert_eq!(d.len(), input.len(), "one gradient for each element of the output");
        let first = gradient.input || gradient.norms[0].is_some();
        let attention = first || gradient.wants(&[0, 1, 2]) || gradient.qk_norm.is_some();
        let half = attention || gradient.wants(&[3]);
        let normed_too = half || gradient.norms[1].is_some();
        let mlp = normed_too || gradient.wants(&[4, 5]);
        let hidden = spec.hidden;
        let Space { packing, normed, d_normed, wide, q, k, dq, dk, dv, .. } = space;
        let Tape { q: raw_q, k: raw_k, v, attended, middle, gate, up } = tape;

        // The MLP.
        let chunk = ROWS * out(4);
        sized(wide, tokens * out(4));
        if mlp {
            let shape = (tokens, out(4), hidden);
            packing.nn(shape, (d, hidden), (weights.linears[6], out(4)), false, (wide, out(4)));
            wide.par_chunks_mut(chunk)
                .zip(gate.par_chunks_mut(chunk))
                .zip(up.par_chunks_mut(chunk))
                .for_each(|((wide, gate), up)| silu_mul_backward(gate, up, wide));
        } else {
            wide.par_chunks_mut(chunk)
                .zip(gate.par_chunks(chunk))
                .zip(up.par_chunks(chunk))
                .for_each(|((wide, gate), up)| {
                    wide.copy_from_slice(gate);
                    silu_mul(wide, up);
                });
        }
        linear_gradient(packing, gradient, 6, wide, d, hidden);
        if !mlp {
            return;
        }
        self.norm(weights.norms[1], middle, normed);
        linear_gradient(packing, gradient, 4, normed, gate, out(4));
        linear_gradient(packing, gradient, 5, normed, up, out(5));
        if !normed_too {
            return;
        }
        sized(d_normed, tokens * hidden);
        let shape = (tokens, hidden, out(4));
        packing.nn(shape, (gate, out(4)), (weights.linears[4], hidden), false, (d_normed, hidden));
        packing.nn(shape, (up, out(5)), (weights.linears[5], hidden), true, (d_normed, hidden));
        let d_norm = gradient.norms[1].as_deref_mut();
        self.norm_backward(weights.norms[1], middle, d_normed, d, d_norm);
        if !half {
            return;
        }

        // Attention.
        linear_gradient(packing, gradient, 3, attended, d, hidden);
        if !attention {
            return;
        }
        let shape = (tokens, out(0), hidden);
        // `attended` is no longer needed and takes the gradient on itself.
        packing.nn(shape, (d, hidden), (weights.linears[3], out(0)), false, (attended, out(0)));
        self.place(lengths, weights, (raw_q, q), (raw_k, k));
        for (d, site) in [(&mut *dq, 0), (&mut *dk, 1), (&mut *dv, 2)] {
            sized(d, tokens * out(site));
        }
        let window = spec.window[index];
        pieces(lengths, out(0), dq)
            .into_par_iter()
            .zip(pieces(lengths, out(1), dk))
            .zip(pieces(lengths, out(2), dv))
            .for_each(|(((tokens, dq), (_, dk)), (_, dv))| {
                let of = |width: usize| tokens.start * width..tokens.end * width;
                let (q, k, v) = (&q[of(out(0))], &k[of(out(1))], &v[of(out(2))]);
                attend_backward(spec, window, (q, k, v), &attended[of(out(0))], (dq, dk, dv));
            });
        self.place_backward(lengths, weights, (raw_q, dq), (raw_k, dk), gradient);
        self.norm(weights.norms[0], input, normed);
        for (site, d) in [(0, &*dq), (1, &*dk), (2, &*dv)] {
            linear_gradient(packing, gradient, site, normed, d, out(site));
        }
        if !first {
            return;
        }
        for (site, of) in [(0, &*dq), (1, &*dk), (2, &*dv)] {
            let (shape, width) = ((tokens, hidden, out(site)), out(site));
            let weight = (weights.linears[site], hidden);
            packing.nn(shape, (of, width), weight, site > 0, (d_normed, hidden));
        }
        let d_norm = gradient.norms[0].as_deref_mut();
        self.norm_backward(weights.norms[0], input, d_normed, d, d_norm);
    }

    /// Final norm and output head of `x [tokens, hidden]`: what the norm puts out, and logits `[tokens, vocab]`.
    pub fn head_forward(
        &self,
        weights: &BlockWeights<'_>,
        x: &[f32],
        space: &mut Space,
        normed: &mut Vec<f32>,
        logits: &mut Vec<f32>,
    ) {
        let tokens = x.len() / self.decoder.spec.hidden;
        self.norm(weights.norms[0], x, normed);
        let shape = (tokens, self.decoder.spec.vocab);
        linear(&mut space.packing, weights, 0, normed, shape, false, logits);
    }

    /// Backward of [`Differentiable::head_forward`] for `d_logits`: adds to `gradient`, and to `d` the gradient on `x`
    /// when that is wanted.
    pub fn head_backward(
        &self,
        weights: &BlockWeights<'_>,
        (x, normed): (&[f32], &[f32]),
        d_logits: &[f32],
        gradient: &mut BlockGradient<'_>,
        space: &mut Space,
        d: &mut [f32],
    ) {
        let (hidden, vocab) = (self.decoder.spec.hidden, self.decoder.spec.vocab);
        let Space { packing, d_normed, .. } = space;
        linear_gradient(packing, gradient, 0, normed, d_logits, vocab);
        if gradient.input || gradient.norms[0].is_some() {
            sized(d_normed, x.len());
            let (shape, weight) = ((x.len() / hidden, hidden, vocab), (weights.linears[0], hidden));
            packing.nn(shape, (d_logits, vocab), weight, false, (d_normed, hidden));
            let d_norm = gradient.norms[0].as_deref_mut();
            self.norm_backward(weights.norms[0], x, d_normed, d, d_norm);
        }
    }

    /// Tokens, and the widths of the sites.
    fn check<'b>(
        &self,
        lengths: &[usize],
        elements: usize,
        block: &'b Block,
    ) -> (usize, impl Fn(usize) -> usize + Sync + use<'b>) {
        let tokens = lengths.iter().sum::<usize>();
        assert_eq!(elements, tokens * self.decoder.spec.hidden, "one row for each token");
        let longest = lengths.iter().max().copied().unwrap_or(0);
        assert!(longest <= self.rope.positions(), "windows are as long as was said");
        (tokens, |site: usize| block.sites[site].out_features)
    }

    fn norm(&self, weight: &[f32], x: &[f32], out: &mut Vec<f32>) {
        let (hidden, eps) = (self.decoder.spec.hidden, self.decoder.spec.rms_eps);
        sized(out, x.len());
        let chunk = ROWS * hidden;
        out.par_chunks_mut(chunk).zip(x.par_chunks(chunk)).for_each(|(out, x)| {
            for (out, x) in out.chunks_mut(hidden).zip(x.chunks(hidden)) {
                rms_norm_row(x, weight, eps, out);
            }
        });
    }

    fn norm_backward(
        &self,
        weight: &[f32],
        x: &[f32],
        d_out: &[f32],
        d_x: &mut [f32],
        d_weight: Option<&mut [f32]>,
    ) {
        let (hidden, eps) = (self.decoder.spec.hidden, self.decoder.spec.rms_eps);
        let (chunk, wanted) = (ROWS * hidden, d_weight.is_some());
        let parts: Vec<Vec<f32>> = d_x
            .par_chunks_mut(chunk)
            .zip(x.par_chunks(chunk))
            .zip(d_out.par_chunks(chunk))
            .map(|((d_x, x), d_out)| {
                let mut part = vec![0.0; if wanted { hidden } else { 0 }];
                let rows = d_x.chunks_mut(hidden).zip(x.chunks(hidden)).zip(d_out.chunks(hidden));
                for ((d_x, x), d_out) in rows {
                    let part = wanted.then_some(part.as_mut_slice());
                    rms_norm_row_backward(x, weight, eps, d_out, d_x, part);
                }
                part
            })
            .collect();
        if let Some(d_weight) = d_weight {
            sum(&parts, d_weight);
        }
    }

    /// Normalises and rotates copies of queries and keys; see [`place_heads`].
    fn place(
        &self,
        lengths: &[usize],
        weights: &BlockWeights<'_>,
        q: (&[f32], &mut Vec<f32>),
        k: (&[f32], &mut Vec<f32>),
    ) {
        let spec = &self.decoder.spec;
        let (qn, kn) = weights.qk_norm.unzip();
        for ((raw, placed), heads, norm) in [(q, spec.heads, qn), (k, spec.kv_heads, kn)] {
            let width = heads * spec.head_dim;
            sized(placed, raw.len());
            pieces(lengths, width, placed).into_par_iter().for_each(|(tokens, placed)| {
                placed.copy_from_slice(&raw[tokens.start * width..tokens.end * width]);
                place_heads(spec, &self.rope, norm, 0, width, placed);
            });
        }
    }

    /// Takes gradients on rotated queries and keys back to what the linears put out.
    fn place_backward(
        &self,
        lengths: &[usize],
        weights: &BlockWeights<'_>,
        q: (&[f32], &mut [f32]),
        k: (&[f32], &mut [f32]),
        gradient: &mut BlockGradient<'_>,
    ) {
        let spec = &self.decoder.spec;
        let (qn, kn) = weights.qk_norm.unzip();
        let (d_qn, d_kn) = match &mut gradient.qk_norm {
            Some((q, k)) => (Some(&mut **q), Some(&mut **k)),
            None => (None, None),
        };
        for ((raw, d), heads, norm, d_norm) in
            [(q, spec.heads, qn, d_qn), (k, spec.kv_heads, kn, d_kn)]
        {
            let (width, wanted) = (heads * spec.head_dim, d_norm.is_some());
            let parts: Vec<Vec<f32>> = pieces(lengths, width, d)
                .into_par_iter()
                .map(|(tokens, d)| {
                    let raw = &raw[tokens.start * width..tokens.end * width];
                    let mut part = vec![0.0; if wanted { spec.head_dim } else { 0 }];
                    let d_norm = wanted.then_some(part.as_mut_slice());
                    place_heads_backward(spec, &self.rope, norm, width, raw, d, d_norm);
                    part
                })
                .collect();
            if let Some(d_norm) = d_norm {
                sum(&parts, d_norm);
            }
        }
    }
}

/// The windows' parts of `values [tokens, width]`, with their tokens.
fn pieces<'a>(
    lengths: &[usize],
    width: usize,
    mut values: &'a mut [f32],
) -> Vec<(Range<usize>, &'a mut [f32])> {
    let mut start = 0;
    let split = |&length: &usize| {
        let (piece, rest) = std::mem::take(&mut values).split_at_mut(length * width);
        values = rest;
        start += length;
        (start - length..start, piece)
    };
    lengths.iter().map(split).collect()
}

/// Adds the parts of a sum, in their order.
fn sum(parts: &[Vec<f32>], to: &mut [f32]) {
    for part in parts {
        add_in_place(part, to);
    }
}

/// Backward of [`crate::embed`]: adds `d [tokens, hidden]` to the rows of `table [vocab, hidden]`, token by token.
///
/// # Panics
/// When the table has no row for a token.
pub fn embed_backward(tokens: &[u32], d: &[f32], table: &mut [f32]) {
    let hidden = d.len() / tokens.len().max(1);
    for (&token, d) in tokens.iter().zip(d.chunks(hidden.max(1))) {
        add_in_place(d, &mut table[token as usize * hidden..][..hidden]);
    }
}

/// `made [tokens, out] (+)= x · Wᵀ + bias`.
fn linear(
    packing: &mut Packing,
    weights: &BlockWeights<'_>,
    site: usize,
    x: &[f32],
    (tokens, out): (usize, usize),
    add: bool,
    made: &mut Vec<f32>,
) {
    sized(made, tokens * out);
    if tokens == 0 {
        return;
    }
    let inner = x.len() / tokens;
    let shape = (tokens, out, inner);
    packing.nt(shape, (x, inner), (weights.linears[site], inner), add, (made, out));
    if let Some(bias) = weights.biases[site] {
        made.par_chunks_mut(ROWS * out).for_each(|rows| {
            rows.chunks_mut(out).for_each(|row| add_in_place(bias, row));
        });
    }
}

/// Adds `dᵀ · x` to the gradient of a site's weight and the sum of `d [tokens, out]` to that of its bias.
fn linear_gradient(
    packing: &mut Packing,
    gradient: &mut BlockGradient<'_>,
    site: usize,
    x: &[f32],
    d: &[f32],
    out: usize,
) {
    let tokens = d.len() / out;
    if tokens == 0 {
        return;
    }
    if let Some(weight) = &mut gradient.linears[site] {
        let inner = x.len() / tokens;
        packing.tn((out, inner, tokens), (d, out), (x, inner), true, (weight, inner));
    }
    if let Some(bias) = &mut gradient.biases[site] {
        let of = |rows: &[f32]| {
            let mut part = vec![0.0; out];
            rows.chunks(out).for_each(|row| add_in_place(row, &mut part));
            part
        };
        let parts: Vec<Vec<f32>> = d.par_chunks(ROWS * out).map(of).collect();
        sum(&parts, bias);
    }
}
