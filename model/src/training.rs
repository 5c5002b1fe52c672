//! One step of training a whole decoder: forward, loss on the logits and on what blocks put out, backward.
//!
//! What enters each block is kept for all tokens of the batch; tapes are kept for the last blocks, as many as
//! memory allows, and made again for the others by a second forward of the block. Logits exist for some rows at a
//! time. The bits depend neither on the number of threads nor on how many tapes are kept.

use attar_ir::ModelGraph;

use crate::{BlockGradient, BlockWeights, Decoder, Differentiable, Space, Tape, embed_backward};

/// Bytes of the logits that exist at once, unless fewer than [`LEAST_ROWS`] rows fit.
const LOGIT_BYTES: usize = 16 << 20;
/// Rows of logits made at once at least.
const LEAST_ROWS: usize = 16;

/// A model that is trained: its values, and where gradients on them go.
pub trait Student {
    /// Values of a block as the forward sees them; of the epilogue those of the final norm and the head.
    fn weights(&self, index: usize) -> BlockWeights<'_>;

    /// The embedding `[vocab, hidden]`.
    fn embedding(&self) -> &[f32];

    /// Values of a block, and where gradients are added; [`BlockGradient::input`] is true when something is trained
    /// before the block.
    fn with_gradient(&mut self, index: usize) -> (BlockWeights<'_>, BlockGradient<'_>);

    /// Where the gradient on the embedding is added, when it is trained.
    fn embedding_gradient(&mut self) -> Option<&mut [f32]>;

    /// Everything of the batch was added to the gradient of a block.
    fn finished(&mut self, index: usize) {
        let _ = index;
    }
}

/// What is minimised over a batch.
pub trait Objective {
    /// Turns the logits `[rows, vocab]` of the tokens from `first` on (counted over the whole batch) into the gradient
    /// on them; returns their share of the loss.
    fn logits(&mut self, first: usize, logits: &mut [f32]) -> f64;

    /// Adds to `d` the gradient on what block `index` put out; returns its share of the loss.
    fn hidden(&mut self, index: usize, output: &[f32], d: &mut [f32]) -> f64 {
        let _ = (index, output, d);
        0.0
    }
}

/// Memory of training steps, used again from step to step.
#[derive(Debug, Default)]
pub struct StepMemory {
    /// What enters each block, and what leaves the last.
    inputs: Vec<Vec<f32>>,
    /// Of the last blocks.
    tapes: Vec<Tape>,
    /// Of the block at work, where none is kept.
    tape: Tape,
    space: Space,
    normed: Vec<f32>,
    logits: Vec<f32>,
    again: Vec<f32>,
    d: Vec<f32>,
}

impl StepMemory {
    /// Keeps the tapes of the last `tapes` blocks.
    pub fn new(tapes: usize) -> Self {
        let tapes = (0..tapes).map(|_| Tape::default()).collect();
        Self { tapes, ..Self::default() }
    }

    /// Bytes of a step on `tokens` tokens when `tapes` tapes are kept, weights and gradients not counted.
    pub fn bytes(graph: &ModelGraph, tokens: usize, tapes: usize) -> usize {
        let tape = graph.blocks.iter().map(|block| Tape::bytes(block, tokens)).max().unwrap_or(0);
        let space = graph.blocks.iter().map(|block| Space::bytes(block, tokens)).max().unwrap_or(0);
        let row = 4 * graph.hidden;
        let rows = logit_rows(graph.vocab, tokens);
        // Of the head: its logits and, packed, the weight.
        let head = 4 * graph.vocab * (rows + 2 * graph.hidden) + 2 * row * rows;
        let kept = tapes.min(graph.blocks.len());
        let spare = usize::from(kept < graph.blocks.len());
        (graph.blocks.len() + 2 + spare) * row * tokens + (kept + spare) * tape + space + head
    }
}

/// Rows of logits that are made at once.
fn logit_rows(vocab: usize, tokens: usize) -> usize {
    (LOGIT_BYTES / (4 * vocab.max(1))).max(LEAST_ROWS).min(tokens.max(1))
}

impl Decoder {
    /// Embeds the windows one after the other out of a table in memory: `[tokens, hidden]`.
    ///
    /// # Panics
    /// When the table has no row for a token.
    pub fn embed_from(&self, table: &[f32], windows: &[&[u32]], out: &mut Vec<f32>) {
        let hidden = self.spec.hidden;
        out.clear();
        for &token in windows.iter().copied().flatten() {
            out.extend_from_slice(&table[token as usize * hidden..][..hidden]);
        }
    }
}

/// Runs `windows` forward and backward; adds to the student's gradients and returns the loss.
///
/// # Panics
/// When a window is longer than `blocks` was made for, or a token is beyond the vocabulary.
pub fn training_step(
    decoder: &Decoder,
    blocks: &Differentiable<'_>,
    student: &mut dyn Student,
    windows: &[&[u32]],
    objective: &mut dyn Objective,
    memory: &mut StepMemory,
) -> f64 {
    let (layers, hidden, vocab) = (decoder.spec.layers, decoder.spec.hidden, decoder.spec.vocab);
    let lengths: Vec<usize> = windows.iter().map(|window| window.len()).collect();
    let tokens: usize = lengths.iter().sum();
    let StepMemory { inputs, tapes, tape, space, normed, logits, again, d } = memory;
    inputs.resize_with(layers + 1, Vec::new);
    // Blocks from here on have their own tape.
    let first_kept = layers.saturating_sub(tapes.len());

    decoder.embed_from(student.embedding(), windows, &mut inputs[0]);
    for index in 0..layers {
        let (before, after) = inputs.split_at_mut(index + 1);
        let kept = index.checked_sub(first_kept).map(|at| &mut tapes[at]);
        let weights = student.weights(index);
        blocks.forward(index, &weights, &lengths, &before[index], kept, space, &mut after[0]);
    }

    let mut loss = 0.0;
    d.clear();
    d.resize(tokens * hidden, 0.0);
    let mut below = false;
    let rows = logit_rows(vocab, tokens);
    for first in (0..tokens).step_by(rows) {
        let part = first * hidden..(first + rows).min(tokens) * hidden;
        let x = &inputs[layers][part.clone()];
        let (weights, mut gradient) = student.with_gradient(layers);
        below = gradient.input;
        blocks.head_forward(&weights, x, space, normed, logits);
        loss += objective.logits(first, logits);
        blocks.head_backward(&weights, (x, normed), logits, &mut gradient, space, &mut d[part]);
    }
    student.finished(layers);

    for index in (0..layers).rev() {
        loss += objective.hidden(index, &inputs[index + 1], d);
        if !below {
            continue;
        }
        let (weights, mut gradient) = student.with_gradient(index);
        let tape = if let Some(at) = index.checked_sub(first_kept) {
            &mut tapes[at]
        } else {
            let (tape, input) = (&mut *tape, &inputs[index]);
            blocks.forward(index, &weights, &lengths, input, Some(&mut *tape), space, again);
            tape
        };
        let input = &inputs[index];
        blocks.backward(index, &weights, &lengths, input, tape, &mut gradient, space, d);
        below = gradient.input;
        student.finished(index);
    }
    if let Some(table) = student.embedding_gradient().filter(|_| below) {
        let mut start = 0;
        for &window in windows {
            let end = start + window.len();
            embed_backward(window, &d[start * hidden..end * hidden], table);
            start = end;
        }
    }
    loss
}
