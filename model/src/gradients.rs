//! Gradients of the next-token loss by the weights of every block, one block resident: a forward of all windows that
//! keeps what enters each block (in memory or on scratch), then a backward from the last block to the first.
//!
//! Windows go through a block one by one, since squares are of the gradient of each; products run on all threads and sums
//! have a fixed order, so bits depend neither on threads nor on where streams lie. Memory beside the streams: four times
//! the weights of a block (weights, gradient of a window, sum, squares), tape and room of one window. Cost per token and
//! weight: 8 FLOPs (forward, forward again, backward). `attar_ir` predicts both (`plan/predict/gradients.rs`).

use attar_ir::{Block, BlockGradients, BlockState, ModelGraph, SiteGradient};
use attar_tensor::{Mat, TensorSource};
use rayon::prelude::*;

use crate::{
    BlockGradient, BlockOps, BlockWeights, Decoder, Differentiable, ModelError, Space, Spill,
    Stream, Tape, embed, lesson::probabilities, run_block,
};

/// Rows of logits that exist at once.
const LOGIT_ROWS: usize = 128;
/// Elements of a gradient per task.
const PIECE: usize = 1 << 14;

/// Runs all `windows` forward and backward through the model of `source` and hands each block to `visit`, the last one
/// first, with its weights and what the loss says of them. Returns the mean loss of the windows, nats per token.
///
/// Windows of one token predict nothing and count as zeros.
///
/// # Errors
/// When a tensor cannot be read or a scratch file fails, and whatever `visit` says.
pub fn sweep_gradients<E: From<ModelError>>(
    decoder: &Decoder,
    source: &dyn TensorSource,
    windows: &[Vec<u32>],
    spill: Option<&Spill>,
    visit: &mut dyn FnMut(&Block, &BlockState, BlockGradients) -> Result<(), E>,
) -> Result<f64, E> {
    let spill =
        spill.map(|spill| Spill { limit: spill.limit / streams(&decoder.graph), ..spill.clone() });
    let mut entering = forward(decoder, source, windows, spill.as_ref())?;
    let longest = windows.iter().map(Vec::len).max().unwrap_or(0);
    let blocks = Differentiable::new(decoder, longest);
    let mut space = Space::default();
    let mut last = entering.pop().expect("the stream that leaves the last block");
    let loss = head(decoder, source, &blocks, windows, &mut last, &mut space)?;
    let mut d = last;
    let (mut input, mut pull, mut tape, mut output) =
        (Vec::new(), Vec::new(), Tape::default(), Vec::new());
    for block in decoder.graph.blocks.iter().rev() {
        let index = block.index;
        let stream = entering.pop().expect("one stream for each block");
        let state = decoder.load_block(index, source).map_err(E::from)?;
        let qk_norm = decoder.load_qk_norm(index, source).map_err(E::from)?;
        let weights = BlockWeights::of(&state, &qk_norm).expect("a checkpoint's weights are dense");
        let zeros = |site: &attar_ir::Site| Mat::zeros((site.out_features, site.in_features));
        let site = |site| SiteGradient { sum: zeros(site), squares: zeros(site) };
        let mut found = BlockGradients {
            windows: windows.len(),
            sites: block.sites.iter().map(site).collect(),
        };
        let mut own: Vec<Vec<f32>> =
            block.sites.iter().map(|site| vec![0.0; site.weights()]).collect();
        for (window, ids) in windows.iter().enumerate() {
            stream.read_into(window, &mut input).map_err(failed)?;
            d.read_into(window, &mut pull).map_err(failed)?;
            let lengths = [ids.len()];
            let taped = Some(&mut tape);
            blocks.forward(index, &weights, &lengths, &input, taped, &mut space, &mut output);
            let none = BlockGradient::input_only(block);
            let linears = own.iter_mut().map(|own| Some(own.as_mut_slice())).collect();
            let mut places = BlockGradient { linears, input: index > 0, ..none };
            let (tape, space) = (&mut tape, &mut space);
            blocks.backward(index, &weights, &lengths, &input, tape, &mut places, space, &mut pull);
            d.write(window, &pull).map_err(failed)?;
            for (own, site) in own.iter_mut().zip(&mut found.sites) {
                add(own, site);
            }
        }
        visit(block, &state, found)?;
    }
    Ok(loss)
}

/// Streams that exist at once: what enters each block, and what leaves the last.
const fn streams(graph: &ModelGraph) -> usize {
    graph.blocks.len() + 1
}

fn failed<E: From<ModelError>>(error: std::io::Error) -> E {
    ModelError::from(error).into()
}

/// What enters each block, and what leaves the last.
fn forward(
    decoder: &Decoder,
    source: &dyn TensorSource,
    windows: &[Vec<u32>],
    spill: Option<&Spill>,
) -> Result<Vec<Stream>, ModelError> {
    let lengths: Vec<usize> = windows.iter().map(Vec::len).collect();
    let mut all = vec![Stream::new(&lengths, decoder.spec.hidden, spill)?];
    for (window, ids) in windows.iter().enumerate() {
        all[0].write(window, &embed(decoder, source, ids)?)?;
    }
    let mut values = Vec::new();
    for block in &decoder.graph.blocks {
        let mut next = Stream::new(&lengths, decoder.spec.hidden, spill)?;
        for window in 0..windows.len() {
            all[block.index].read_into(window, &mut values)?;
            next.write(window, &values)?;
        }
        let state = decoder.load_block(block.index, source)?;
        let qk_norm = decoder.load_qk_norm(block.index, source)?;
        let sites: Vec<usize> = (0..block.sites.len()).collect();
        run_block(
            decoder,
            block.index,
            &BlockOps::from_state(&state, &sites, &qk_norm),
            &mut next,
        )?;
        all.push(next);
    }
    Ok(all)
}

/// The loss, and in place of what leaves the last block the gradient on it.
fn head(
    decoder: &Decoder,
    source: &dyn TensorSource,
    blocks: &Differentiable<'_>,
    windows: &[Vec<u32>],
    stream: &mut Stream,
    space: &mut Space,
) -> Result<f64, ModelError> {
    let (hidden, vocab) = (decoder.spec.hidden, decoder.spec.vocab);
    let state = decoder.load_block(decoder.spec.layers, source)?;
    let weights = BlockWeights::of(&state, &None).expect("a checkpoint's weights are dense");
    let mut nothing = BlockGradient::input_only(&decoder.graph.epilogue);
    let (mut x, mut d) = (Vec::new(), Vec::new());
    let (mut normed, mut logits) = (Vec::new(), Vec::new());
    let mut loss = 0.0;
    for (window, ids) in windows.iter().enumerate() {
        stream.read_into(window, &mut x)?;
        d.clear();
        d.resize(x.len(), 0.0);
        let predicted = ids.len().saturating_sub(1);
        let scale = 1.0 / predicted.max(1) as f32;
        // The last token has no successor.
        for first in (0..predicted).step_by(LOGIT_ROWS) {
            let end = (first + LOGIT_ROWS).min(predicted);
            let part = first * hidden..end * hidden;
            let x = &x[part.clone()];
            blocks.head_forward(&weights, x, space, &mut normed, &mut logits);
            let next = &ids[first + 1..=end];
            let losses: Vec<f64> = logits
                .par_chunks_mut(vocab)
                .zip(next)
                .map(|(row, &next)| {
                    let own = f64::from(row[next as usize]);
                    let whole = probabilities(row);
                    row[next as usize] -= 1.0;
                    row.iter_mut().for_each(|v| *v *= scale);
                    whole - own
                })
                .collect();
            loss += losses.iter().sum::<f64>() * f64::from(scale);
            let given = (x, normed.as_slice());
            blocks.head_backward(&weights, given, &logits, &mut nothing, space, &mut d[part]);
        }
        stream.write(window, &d)?;
    }
    Ok(loss / windows.len().max(1) as f64)
}

/// Adds the gradient of a window, and makes room for the next.
fn add(own: &mut [f32], site: &mut SiteGradient) {
    const LAYOUT: &str = "just made in standard layout";
    let sum = site.sum.as_slice_mut().expect(LAYOUT);
    let squares = site.squares.as_slice_mut().expect(LAYOUT);
    own.par_chunks_mut(PIECE)
        .zip(sum.par_chunks_mut(PIECE))
        .zip(squares.par_chunks_mut(PIECE))
        .for_each(|((own, sum), squares)| {
            for ((own, sum), square) in own.iter_mut().zip(sum).zip(squares) {
                *sum += *own;
                *square += *own * *own;
                *own = 0.0;
            }
        });
}
