//! What a sweep of gradients costs (`attar_model::sweep_gradients`): a forward of all windows, then a backward from the last
//! block to the first.

use super::{Facts, Moment, QUERY_ROWS, Walk, corpus_bytes};
use crate::Block;

/// Rows of logits that exist at once (`attar_model`'s sweep).
const LOGIT_ROWS: usize = 128;

/// Floating-point operations of a sweep: forward, forward again and backward of the blocks, the head's forward and backward
/// (its weight has no gradient).
pub(super) fn work(facts: &Facts<'_>) -> f64 {
    let Facts { graph, tokens, context, .. } = *facts;
    let block = |block: &Block| 4.0 * block.forward_flops(tokens, context);
    let head = 4.0 * (graph.vocab * graph.hidden) as f64 * tokens as f64;
    graph.blocks.iter().map(block).sum::<f64>() + head
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
        let (each, streams) = (4 * tokens * graph.hidden, graph.blocks.len() + 1);
        let (mut stream, mut scratch) = (each * streams, 0);
        if each > self.limits.stream / streams {
            (stream, scratch) = (0, stream);
        }
        self.scratch = self.scratch.max(scratch);
        let rows = 4 * 4 * context * graph.hidden;
        for block in &graph.blocks {
            let out = |site: usize| block.sites[site].out_features;
            let (hidden, wide, keys) = (graph.hidden, out(4), out(1) + out(2));
            let weights: usize = block.sites.iter().map(crate::Site::weights).sum();
            let tape = 2 * out(0) + keys + hidden + 2 * wide;
            let space = 2 * hidden + wide + 2 * out(0) + 2 * keys;
            let packed = wide.next_multiple_of(16) * hidden.max(context);
            let scores = self.limits.threads * 2 * QUERY_ROWS.min(context) * context;
            self.add(Moment {
                what: "gradients".into(),
                place: place.clone(),
                block_index: Some(block.index),
                block: self.weights(block, &vec![false; block.sites.len()]),
                // The gradient of a window, the sum and the sum of squares.
                statistics: 12 * weights,
                stream,
                activations: 4 * (context * (tape + space) + packed + scores) + rows,
                ..Moment::default()
            });
        }
        let table = graph.vocab.next_multiple_of(16) * graph.hidden;
        let logits = LOGIT_ROWS.min(context) * (graph.vocab + 2 * graph.hidden);
        self.add(Moment {
            what: "gradients of the head".into(),
            place,
            // As it lies in the file, in f32, and packed.
            block: 4 * 3 * table,
            stream,
            activations: 4 * logits + rows,
            ..Moment::default()
        });
    }
}
