//! What a walk back through the model costs (`attar_model`'s `sweep_gradients` and `loss_slopes`): a forward of all windows, then
//! a backward from the last block to the first.

use attar_tensor::linalg::Packing;

use super::{Facts, ModelStep, Moment, QUERY_ROWS, Walk, corpus_bytes};
use crate::{
    ModelGraph,
    slopes::{SlopeQuery, space_bytes, tape_bytes},
};

/// Floating-point operations of a sweep: forward, forward again and backward of the blocks, the head's forward and backward
/// (its weight has no gradient).
pub(super) fn work(facts: &Facts<'_>) -> f64 {
    let Facts { graph, tokens, context, .. } = *facts;
    SlopeQuery::flops(graph, tokens, context)
}

impl Walk<'_> {
    /// Adds the moments of a sweep over the model; `for_what` stands for its reader.
    pub(super) fn sweep(&mut self, for_what: &str) {
        self.add(Moment {
            what: "read corpus".into(),
            tensors: corpus_bytes(self.facts.budget.corpus),
            ..Moment::default()
        });
        // The gradient of a window, the sum and the sum of squares.
        let scratch = self.back(self.facts.graph, ("gradients", for_what), 3, 0);
        self.scratch = self.scratch.max(scratch);
    }

    /// Adds the moments of the slopes of the loss that a pass on the whole model asks for; returns the bytes of the streams
    /// on scratch.
    pub(super) fn slopes(&mut self, step: &ModelStep, piece: usize) -> usize {
        if step.pass.slopes(&step.graph).is_none() {
            return 0;
        }
        self.back(&step.graph, ("slopes", &step.label), 1, piece)
    }

    /// A walk back through a model that holds so many copies of a block's weights as gradients, with so many bytes of tensors
    /// in transit. Streams enter every block and leave the last, each where it fits; returns the bytes of those that do
    /// not.
    fn back(
        &mut self,
        graph: &ModelGraph,
        (what, place): (&str, &str),
        copies: usize,
        tensors: usize,
    ) -> usize {
        let tokens = self.facts.tokens;
        let context = self.facts.context.min(tokens.max(1));
        let (each, streams) = (4 * tokens * graph.hidden, SlopeQuery::streams(graph));
        let stream = if each <= self.limits.stream / streams { each * streams } else { 0 };
        let rows = 4 * 4 * context * graph.hidden;
        for block in &graph.blocks {
            let weights: usize = block.sites.iter().map(crate::Site::weights).sum();
            let scores = self.limits.threads * 2 * QUERY_ROWS.min(context) * context;
            self.add(Moment {
                what: what.into(),
                place: place.into(),
                block_index: Some(block.index),
                block: self.weights(block, &vec![false; block.sites.len()]),
                statistics: 4 * copies * weights,
                stream,
                activations: tape_bytes(block, context)
                    + space_bytes(block, context)
                    + 4 * scores
                    + rows,
                tensors,
                ..Moment::default()
            });
        }
        let logits = SlopeQuery::LOGIT_ROWS.min(context) * (graph.vocab + 2 * graph.hidden);
        self.add(Moment {
            what: format!("{what} of the head"),
            place: place.into(),
            // As it lies in the file, in f32, and packed.
            block: 8 * graph.vocab * graph.hidden + Packing::bytes(graph.vocab, graph.hidden),
            stream,
            activations: 4 * logits + rows,
            tensors,
            ..Moment::default()
        });
        each * streams - stream
    }
}
