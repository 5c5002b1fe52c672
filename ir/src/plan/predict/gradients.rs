//! What a sweep of gradients costs (`attar_model::sweep_gradients`): a forward of all windows, then a backward from the last
//! block to the first.

use attar_tensor::linalg::Packing;

use super::{Facts, Moment, QUERY_ROWS, Walk, corpus_bytes};
use crate::slopes::{SlopeQuery, space_bytes, tape_bytes};

/// Floating-point operations of a sweep: forward, forward again and backward of the blocks, the head's forward and backward
/// (its weight has no gradient).
pub(super) fn work(facts: &Facts<'_>) -> f64 {
    let Facts { graph, tokens, context, .. } = *facts;
    SlopeQuery::flops(graph, tokens, context)
}

impl Walk<'_> {
    /// Adds the moments of a sweep over the model; `for_what` stands for its reader. Streams enter every block and leave the
    /// last, each where it fits.
    pub(super) fn sweep(&mut self, for_what: &str) {
        let Facts { graph, tokens, budget, .. } = *self.facts;
        let place = for_what.to_owned();
        self.add(Moment {
            what: "read corpus".into(),
            tensors: corpus_bytes(budget.corpus),
            ..Moment::default()
        });
        let context = self.facts.context.min(tokens.max(1));
        let (each, streams) = (4 * tokens * graph.hidden, SlopeQuery::streams(graph));
        let (mut stream, mut scratch) = (each * streams, 0);
        if each > self.limits.stream / streams {
            (stream, scratch) = (0, stream);
        }
        self.scratch = self.scratch.max(scratch);
        let rows = 4 * 4 * context * graph.hidden;
        for block in &graph.blocks {
            let weights: usize = block.sites.iter().map(crate::Site::weights).sum();
            let scores = self.limits.threads * 2 * QUERY_ROWS.min(context) * context;
            self.add(Moment {
                what: "gradients".into(),
                place: place.clone(),
                block_index: Some(block.index),
                block: self.weights(block, &vec![false; block.sites.len()]),
                // The gradient of a window, the sum and the sum of squares.
                statistics: 12 * weights,
                stream,
                activations: tape_bytes(block, context)
                    + space_bytes(block, context)
                    + 4 * scores
                    + rows,
                ..Moment::default()
            });
        }
        let table = graph.vocab * graph.hidden;
        let logits = SlopeQuery::LOGIT_ROWS.min(context) * (graph.vocab + 2 * graph.hidden);
        self.add(Moment {
            what: "gradients of the head".into(),
            place,
            // As it lies in the file, in f32, and packed.
            block: 8 * table + Packing::bytes(graph.vocab, graph.hidden),
            stream,
            activations: 4 * logits + rows,
            ..Moment::default()
        });
    }
}
