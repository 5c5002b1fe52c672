//! Slopes of the next-token loss of some text along the indices of dimensions of the model ([`attar_ir::slopes`]): the
//! text runs forward block by block and what enters each block is kept; then blocks are taken from the last to the first,
//! run again with a tape, and the gradient on what they put out becomes that on what they read. One block and its
//! gradient are in memory, one window is at work. The loss of a window is the mean over its tokens but the last.
//!
//! What the head reads of a channel and what the norm before it puts there have the same slope, since only their product
//! enters; so the gradient on the head, a table as large as the vocabulary, is never made.
//! Cost per token and weight: two forwards and a backward, 8 FLOPs. Sums have a fixed order on any number of threads.

use attar_ir::{Block, BlockState, BlockValues, Dim, DimName, SlopeBy, SlopeQuery, Slopes};
use attar_tensor::{TensorSource, linalg::softmax_row_log_sum};
use rayon::prelude::*;

use crate::{
    BlockGradient, BlockOps, BlockWeights, Decoder, Differentiable, ModelError, Space, Spill,
    Stream, Tape, WeightSource, embed, run_block,
};

/// Products of one dimension: a row of sums for each window, or one for all.
struct Sums {
    dim: Dim,
    by: SlopeBy,
    windows: usize,
    rows: Vec<Vec<f64>>,
}

impl Sums {
    fn new(dim: Dim, by: SlopeBy, windows: usize) -> Self {
        let rows = if by == SlopeBy::Groups { windows } else { 1 };
        Self { rows: vec![vec![0.0; dim.size]; rows], by, windows, dim }
    }

    /// Adds the products of the tensors of a block that belong to the dimension.
    fn add(&mut self, row: usize, block: &Block, state: &BlockState, gradient: &BlockValues) {
        let Self { dim, by, rows, .. } = self;
        let absolute = *by == SlopeBy::Elements;
        for member in &dim.members {
            let mut add = |columns: usize, values: &[f32], gradient: &[f32]| {
                dim.add_products(member, columns, (values, gradient), absolute, &mut rows[row]);
            };
            for (at, site) in block.sites.iter().enumerate() {
                let Some(part) = member.tensor.strip_prefix(&site.name) else { continue };
                match (part, &state.linears[at].bias, &gradient.biases[at]) {
                    (".weight", ..) => {
                        let weight = state.linears[at].weight.values();
                        let values = weight.as_slice().expect("standard layout");
                        let slopes = gradient.linears[at].as_slice().expect("standard layout");
                        add(site.in_features, values, slopes);
                    }
                    (".bias", Some(bias), Some(slopes)) => add(1, bias, slopes),
                    _ => {}
                }
            }
            for (at, norm) in block.norms.iter().enumerate() {
                if member.tensor == norm.tensor {
                    add(1, &state.norms[at], &gradient.norms[at]);
                }
            }
        }
    }

    /// Adds the products of activations `[tokens, size]` and the gradient on them: what scaling their channels does.
    fn add_channels(&mut self, row: usize, (x, d): (&[f32], &[f32])) {
        let size = self.dim.size;
        for (x, d) in x.chunks(size).zip(d.chunks(size)) {
            let products = x.iter().zip(d).map(|(&x, &d)| f64::from(x) * f64::from(d));
            self.rows[row].iter_mut().zip(products).for_each(|(sum, product)| *sum += product);
        }
    }

    fn finish(self) -> (DimName, Vec<f64>) {
        let all = self.windows.max(1) as f64;
        let of = |index: usize| match self.by {
            SlopeBy::Groups => {
                let squares = self.rows.iter().map(|row| row[index] * row[index]);
                (squares.sum::<f64>() / all).sqrt()
            }
            SlopeBy::Elements => self.rows[0][index] / all,
        };
        (self.dim.name, (0..self.dim.size).map(of).collect())
    }
}

/// The mean loss of the windows, nats per token, and the slopes that `query` asks for. `spill` says where streams lie, of
/// which there are [`SlopeQuery::streams`]; `progress` is told of each block that is done.
///
/// # Errors
/// Tensors that cannot be read, streams that cannot be stored, and a loss or a slope that is no number.
///
/// # Panics
/// When `query` names a dimension that the model does not have, or the elements of one that embedding and head belong to.
pub fn loss_slopes(
    decoder: &Decoder,
    source: &dyn WeightSource,
    windows: &[Vec<u32>],
    query: &SlopeQuery,
    spill: &Spill,
    progress: &dyn Fn(),
) -> Result<(f64, Slopes), ModelError> {
    let (layers, hidden) = (decoder.spec.layers, decoder.spec.hidden);
    let whole = query.dims.contains(&DimName::Hidden);
    assert!(!whole || query.by == SlopeBy::Groups, "embeddings have no gradient by element");
    let lengths: Vec<usize> = windows.iter().map(Vec::len).collect();
    let tensors = source.tensors();
    let longest = lengths.iter().copied().max().unwrap_or(1);
    let mut inputs = vec![Stream::new(&lengths, hidden, Some(spill))?];
    for (at, ids) in windows.iter().enumerate() {
        inputs[0].write(at, &embed(decoder, tensors, ids)?)?;
    }
    for index in 0..layers {
        let mut next = inputs[index].copy(spill)?;
        run_block(decoder, index, &BlockOps::load(decoder, index, source)?, &mut next)?;
        inputs.push(next);
        progress();
    }

    let dims = decoder.graph.dims();
    let sums = |of: &dyn Fn(DimName) -> bool| -> Vec<Sums> {
        let wanted = dims.iter().filter(|dim| query.dims.contains(&dim.name) && of(dim.name));
        wanted.map(|dim| Sums::new(dim.clone(), query.by, windows.len())).collect()
    };
    let mut over_all = sums(&|name| name == DimName::Hidden);
    let mut walk = Backward {
        decoder,
        blocks: Differentiable::new(decoder, longest),
        tape: Tape::default(),
        space: Space::default(),
        again: Vec::new(),
    };
    let mut slopes = Slopes::new();
    let mut d = Stream::new(&lengths, hidden, Some(spill))?;
    let loss = walk.head(tensors, windows, &inputs[layers], &mut d, &mut over_all)?;
    for index in (0..layers).rev() {
        let mut own = sums(&|name| name.block() == Some(index));
        walk.block(index, tensors, &inputs[index], &mut d, query.by, (&mut own, &mut over_all))?;
        slopes.extend(own.into_iter().map(Sums::finish));
        inputs.truncate(index + 1);
        progress();
    }
    // Scaling a column of the embedding scales what enters the first block.
    let (mut x, mut of_input) = (Vec::new(), Vec::new());
    for window in (0..windows.len()).filter(|_| whole) {
        let pair = (inputs[0].window(window, &mut x)?, d.window(window, &mut of_input)?);
        for sums in &mut over_all {
            sums.add_channels(window, pair);
        }
    }
    slopes.extend(over_all.into_iter().map(Sums::finish));
    if !loss.is_finite() || slopes.values().flatten().any(|slope| !slope.is_finite()) {
        let reason =
            format!("the loss of the calibration text is {loss}, or its gradient no number");
        return Err(ModelError::Tensor { name: "of the model".into(), reason });
    }
    Ok((loss, slopes))
}

/// Blocks from the last to the first.
struct Backward<'a> {
    decoder: &'a Decoder,
    blocks: Differentiable<'a>,
    tape: Tape,
    space: Space,
    again: Vec<f32>,
}

impl Backward<'_> {
    /// Mean loss of the windows; `d` becomes the gradient of each window's own on what leaves the last block.
    fn head(
        &mut self,
        source: &dyn TensorSource,
        windows: &[Vec<u32>],
        outputs: &Stream,
        d: &mut Stream,
        over_all: &mut [Sums],
    ) -> Result<f64, ModelError> {
        let (layers, hidden, vocab) =
            (self.decoder.spec.layers, self.decoder.spec.hidden, self.decoder.spec.vocab);
        let state = self.decoder.load_block(layers, source)?;
        let weights = BlockWeights::of(&state, &None).expect("checkpoints are dense");
        let (mut x, mut normed, mut logits) = (Vec::new(), Vec::new(), Vec::new());
        let (mut loss, mut counted) = (0.0, 0usize);
        for (window, ids) in windows.iter().enumerate() {
            outputs.read_into(window, &mut x)?;
            let mut on_x = vec![0.0f32; x.len()];
            let mut of_norm = vec![0.0f32; hidden];
            let scale = 1.0 / ids.len().saturating_sub(1).max(1) as f32;
            for first in (0..ids.len()).step_by(SlopeQuery::LOGIT_ROWS) {
                let last = (first + SlopeQuery::LOGIT_ROWS).min(ids.len());
                let part = first * hidden..last * hidden;
                let next = ids.get(first + 1..ids.len().min(last + 1)).unwrap_or_default();
                let x = &x[part.clone()];
                self.blocks.head_forward(&weights, x, &mut self.space, &mut normed, &mut logits);
                loss += next_token(&mut logits, next, vocab, scale);
                let mut gradient = BlockGradient {
                    norms: vec![(!over_all.is_empty()).then_some(&mut of_norm)],
                    ..BlockGradient::input_only(&self.decoder.graph.epilogue)
                };
                let (space, on_x) = (&mut self.space, &mut on_x[part]);
                self.blocks.head_backward(
                    &weights,
                    (x, &normed),
                    &logits,
                    &mut gradient,
                    space,
                    on_x,
                );
            }
            counted += ids.len().saturating_sub(1);
            for sums in &mut *over_all {
                // The norm's weight, and the columns of the head.
                let products = state.norms[0].iter().zip(&of_norm);
                let products = products.map(|(&w, &g)| 2.0 * f64::from(w) * f64::from(g));
                sums.rows[window].iter_mut().zip(products).for_each(|(sum, of)| *sum += of);
            }
            d.write(window, &on_x)?;
        }
        Ok(loss / counted.max(1) as f64)
    }

    /// One block: sums of its products, and `d` from the gradient on its output to that on its input.
    fn block(
        &mut self,
        index: usize,
        source: &dyn TensorSource,
        inputs: &Stream,
        d: &mut Stream,
        by: SlopeBy,
        (own, over_all): (&mut [Sums], &mut [Sums]),
    ) -> Result<(), ModelError> {
        let block = self.decoder.block(index);
        let state = self.decoder.load_block(index, source)?;
        let qk_norm = self.decoder.load_qk_norm(index, source)?;
        let weights = BlockWeights::of(&state, &qk_norm).expect("checkpoints are dense");
        let of_dims = |tensor: &str| {
            let all = own.iter().chain(&*over_all).flat_map(|sums| &sums.dim.members);
            all.into_iter().any(|member| member.tensor == tensor)
        };
        let name = |site: usize, part: &str| format!("{}.{part}", block.sites[site].name);
        let sites = 0..block.sites.len();
        let linears: Vec<bool> = sites.clone().map(|at| of_dims(&name(at, "weight"))).collect();
        let biases: Vec<bool> = sites.map(|at| of_dims(&name(at, "bias"))).collect();
        let norms: Vec<bool> = block.norms.iter().map(|norm| of_dims(&norm.tensor)).collect();
        let mut gradient = BlockValues::of(&state).zeros();
        let (mut x, mut on_x) = (Vec::new(), Vec::new());
        let lengths = inputs.lengths();
        for (window, &length) in lengths.iter().enumerate() {
            inputs.read_into(window, &mut x)?;
            d.read_into(window, &mut on_x)?;
            let Self { blocks, tape, space, again, .. } = self;
            blocks.forward(index, &weights, &[length], &x, Some(&mut *tape), space, again);
            if by == SlopeBy::Groups {
                gradient.tensors_mut().for_each(|tensor| tensor.fill(0.0));
            }
            let chosen = |wanted: &bool, values| wanted.then_some(values);
            let mut places = BlockGradient {
                linears: linears
                    .iter()
                    .zip(&mut gradient.linears)
                    .map(|(wanted, g)| wanted.then(|| g.as_slice_mut().expect("standard layout")))
                    .collect(),
                biases: biases
                    .iter()
                    .zip(&mut gradient.biases)
                    .map(|(wanted, g)| g.as_deref_mut().and_then(|g| chosen(wanted, g)))
                    .collect(),
                norms: norms
                    .iter()
                    .zip(&mut gradient.norms)
                    .map(|(wanted, g)| chosen(wanted, g.as_mut_slice()))
                    .collect(),
                qk_norm: None,
                input: true,
            };
            blocks.backward(index, &weights, &[length], &x, tape, &mut places, space, &mut on_x);
            d.write(window, &on_x)?;
            if by == SlopeBy::Groups {
                let all = own.iter_mut().chain(&mut *over_all);
                all.for_each(|sums| sums.add(window, block, &state, &gradient));
            }
        }
        if by == SlopeBy::Elements {
            for sums in own {
                sums.add(0, block, &state, &gradient);
            }
        }
        Ok(())
    }
}

/// Sum of the losses of the rows that have a next token; logits become the gradient on them times `scale`.
fn next_token(logits: &mut [f32], next: &[u32], vocab: usize, scale: f32) -> f64 {
    let losses: Vec<f64> = logits
        .par_chunks_mut(vocab)
        .enumerate()
        .map(|(row, z)| {
            let Some(&next) = next.get(row) else {
                z.fill(0.0);
                return 0.0;
            };
            let logit = z[next as usize];
            let log_sum = softmax_row_log_sum(z);
            z[next as usize] -= 1.0;
            for z in z.iter_mut() {
                *z *= scale;
            }
            f64::from(log_sum) - f64::from(logit)
        })
        .collect();
    losses.iter().sum()
}
