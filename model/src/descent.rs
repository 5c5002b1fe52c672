//! The next-token loss of some text, and the gradient on every stream from the last block to the first, one block
//! resident: the text runs forward block by block and what enters each is kept (in memory or on scratch); then blocks are
//! taken from the last to the first, run again with a tape, and the gradient on what a block puts out becomes that on what
//! it read. The loss of a window is the mean over its tokens but the last, so its gradient is that window's own.
//!
//! One window is at work, products run on all threads, and sums have a fixed order: bits depend neither on threads nor on
//! where streams lie. Cost per token and weight: two forwards and a backward, 8 FLOPs.

use attar_ir::{BlockState, SlopeQuery};
use attar_tensor::TensorSource;
use rayon::prelude::*;

use crate::{
    BlockGradient, BlockOps, BlockWeights, Decoder, Differentiable, ModelError, Space, Spill,
    Stream, Tape, WeightSource, embed, lesson::probabilities, run_block,
};

/// Text on its way back through a model.
pub(crate) struct Descent<'a> {
    decoder: &'a Decoder,
    windows: &'a [Vec<u32>],
    blocks: Differentiable<'a>,
    /// What enters each block that is not done yet, and what leaves the last before its gradient takes its place.
    entering: Vec<Stream>,
    /// The gradient on what leaves the block that is next.
    gradient: Option<Stream>,
    tape: Tape,
    space: Space,
    again: Vec<f32>,
}

impl<'a> Descent<'a> {
    /// Runs the text forward. `spill` holds for all streams together ([`SlopeQuery::streams`]); `progress` is told of each
    /// block.
    ///
    /// # Errors
    /// When a tensor cannot be read or a scratch file fails.
    pub(crate) fn new(
        decoder: &'a Decoder,
        source: &dyn WeightSource,
        windows: &'a [Vec<u32>],
        spill: Option<&Spill>,
        progress: &dyn Fn(),
    ) -> Result<Self, ModelError> {
        let streams = SlopeQuery::streams(&decoder.graph);
        let spill = spill.map(|spill| Spill { limit: spill.limit / streams, ..spill.clone() });
        let lengths: Vec<usize> = windows.iter().map(Vec::len).collect();
        let stream = || Stream::new(&lengths, decoder.spec.hidden, spill.as_ref());
        let mut entering = vec![stream()?];
        for (window, ids) in windows.iter().enumerate() {
            entering[0].write(window, &embed(decoder, source.tensors(), ids)?)?;
        }
        let mut values = Vec::new();
        for index in 0..decoder.spec.layers {
            let mut next = stream()?;
            for window in 0..windows.len() {
                entering[index].read_into(window, &mut values)?;
                next.write(window, &values)?;
            }
            run_block(decoder, index, &BlockOps::load(decoder, index, source)?, &mut next)?;
            entering.push(next);
            progress();
        }
        let longest = lengths.iter().copied().max().unwrap_or(1);
        Ok(Self {
            decoder,
            windows,
            blocks: Differentiable::new(decoder, longest),
            entering,
            gradient: None,
            tape: Tape::default(),
            space: Space::default(),
            again: Vec::new(),
        })
    }

    /// The mean over windows of the mean loss of their tokens, nats. `visit` is given each window's gradient on the final norm's
    /// weight, and the weight, if `norm`.
    ///
    /// # Errors
    /// When a tensor cannot be read or a scratch file fails.
    pub(crate) fn head(
        &mut self,
        source: &dyn TensorSource,
        norm: bool,
        visit: &mut dyn FnMut(usize, &[f32], &[f32]),
    ) -> Result<f64, ModelError> {
        let (layers, hidden, vocab) =
            (self.decoder.spec.layers, self.decoder.spec.hidden, self.decoder.spec.vocab);
        let state = self.decoder.load_block(layers, source)?;
        let weights = BlockWeights::of(&state, &None).expect("a checkpoint's weights are dense");
        let mut stream = self.entering.pop().expect("what leaves the last block");
        let (mut x, mut d, mut of_norm) = (Vec::new(), Vec::new(), vec![0.0f32; hidden]);
        let (mut normed, mut logits) = (Vec::new(), Vec::new());
        let mut loss = 0.0;
        for (window, ids) in self.windows.iter().enumerate() {
            stream.read_into(window, &mut x)?;
            d.clear();
            d.resize(x.len(), 0.0);
            of_norm.fill(0.0);
            // The last token has no successor.
            let predicted = ids.len().saturating_sub(1);
            let scale = 1.0 / predicted.max(1) as f32;
            for first in (0..predicted).step_by(SlopeQuery::LOGIT_ROWS) {
                let end = (first + SlopeQuery::LOGIT_ROWS).min(predicted);
                let part = first * hidden..end * hidden;
                let x = &x[part.clone()];
                self.blocks.head_forward(&weights, x, &mut self.space, &mut normed, &mut logits);
                let losses: Vec<f64> = logits
                    .par_chunks_mut(vocab)
                    .zip(&ids[first + 1..=end])
                    .map(|(row, &next)| {
                        let own = f64::from(row[next as usize]);
                        let whole = probabilities(row);
                        row[next as usize] -= 1.0;
                        for v in row.iter_mut() {
                            *v *= scale;
                        }
                        whole - own
                    })
                    .collect();
                loss += losses.iter().sum::<f64>() * f64::from(scale);
                let mut places = BlockGradient {
                    norms: vec![norm.then_some(of_norm.as_mut_slice())],
                    ..BlockGradient::input_only(&self.decoder.graph.epilogue)
                };
                let (given, d) = ((x, normed.as_slice()), &mut d[part]);
                let space = &mut self.space;
                self.blocks.head_backward(&weights, given, &logits, &mut places, space, d);
            }
            stream.write(window, &d)?;
            if norm {
                visit(window, &state.norms[0], &of_norm);
            }
        }
        self.gradient = Some(stream);
        Ok(loss / self.windows.len().max(1) as f64)
    }

    /// The block that is next, from the last on, window by window: `each` is given the window and what makes its gradients
    /// in the places handed over. Places add up, and are the caller's to clear.
    ///
    /// # Errors
    /// When a tensor cannot be read or a scratch file fails.
    ///
    /// # Panics
    /// Before [`Descent::head`], and when `index` is not the next block.
    pub(crate) fn block(
        &mut self,
        index: usize,
        source: &dyn TensorSource,
        state: &BlockState,
        each: &mut dyn FnMut(usize, &mut dyn FnMut(&mut BlockGradient<'_>)),
    ) -> Result<(), ModelError> {
        assert_eq!(index + 1, self.entering.len(), "blocks come from the last to the first");
        let qk_norm = self.decoder.load_qk_norm(index, source)?;
        let weights = BlockWeights::of(state, &qk_norm).expect("a checkpoint's weights are dense");
        let d = self.gradient.as_mut().expect("the head comes first");
        let (mut x, mut pull) = (Vec::new(), Vec::new());
        for (window, ids) in self.windows.iter().enumerate() {
            self.entering[index].read_into(window, &mut x)?;
            d.read_into(window, &mut pull)?;
            let Self { blocks, tape, space, again, .. } = self;
            let lengths = [ids.len()];
            each(window, &mut |places| {
                blocks.forward(index, &weights, &lengths, &x, Some(&mut *tape), space, again);
                blocks.backward(index, &weights, &lengths, &x, tape, places, space, &mut pull);
            });
            d.write(window, &pull)?;
        }
        if index > 0 {
            self.entering.truncate(index);
        }
        Ok(())
    }

    /// What enters the first block and the gradient on it, window by window, once all blocks are done.
    ///
    /// # Errors
    /// When a scratch file fails.
    pub(crate) fn input(
        &self,
        visit: &mut dyn FnMut(usize, &[f32], &[f32]),
    ) -> Result<(), ModelError> {
        let d = self.gradient.as_ref().expect("the head comes first");
        let (mut x, mut of_input) = (Vec::new(), Vec::new());
        for window in 0..self.windows.len() {
            let x = self.entering[0].window(window, &mut x)?;
            visit(window, x, d.window(window, &mut of_input)?);
        }
        Ok(())
    }
}
