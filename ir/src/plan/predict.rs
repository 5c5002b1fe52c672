//! What a plan costs: memory, scratch space and work, from shapes alone.
//!
//! Memory with calibration, bytes:
//! `block f32 weights + statistics of the widest observation + largest solver scratch + stream in memory
//! + activations of one window + largest tensor + base`, where a Hessian of n channels is counted once as
//! the lower triangle in f64 and once in full in f32 (8 n²). Without calibration one linear at a time is
//! read and written: `2 · largest tensor + base`.
//!
//! Work, floating-point operations: forwards of blocks, `n² · tokens` per symmetric Hessian update, and
//! what the passes say of themselves.

use attar_tensor::TensorHeader;
use serde::Serialize;

use super::{PlanStep, rounds};
use crate::{Block, ModelGraph, Needs, Pass, Upstream};

/// Code, allocator, tokenizer and buffers of files.
const BASE_BYTES: usize = 64 << 20;

/// Predicted resident memory by cause, bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// The largest block in f32.
    pub block: usize,
    /// Statistics of the widest observation.
    pub statistics: usize,
    /// The largest scratch of a pass.
    pub solver: usize,
    /// Activations between blocks that stay in memory.
    pub stream: usize,
    /// Activations inside a block for one window.
    pub activations: usize,
    /// Tensors in transit.
    pub tensors: usize,
    /// Everything else.
    pub base: usize,
}

impl Memory {
    /// The predicted peak.
    pub const fn peak(&self) -> usize {
        self.block
            + self.statistics
            + self.solver
            + self.stream
            + self.activations
            + self.tensors
            + self.base
    }
}

/// Predicted work by cause, floating-point operations.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Work {
    /// Forwards of blocks.
    pub forward: f64,
    /// Hessians.
    pub hessian: f64,
    /// The passes.
    pub solve: f64,
}

impl Work {
    /// All of it.
    pub fn total(&self) -> f64 {
        self.forward + self.hessian + self.solve
    }
}

/// What predictions are made from.
pub(super) struct Facts<'a> {
    pub(super) graph: &'a ModelGraph,
    pub(super) steps: &'a [PlanStep],
    pub(super) passes: &'a [Box<dyn Pass>],
    pub(super) source: &'a [TensorHeader],
    pub(super) tokens: usize,
    pub(super) context: usize,
    pub(super) stream_in_memory: usize,
}

/// Memory, bytes of scratch on disk, work.
pub(super) fn predict(facts: &Facts<'_>) -> (Memory, usize, Work) {
    let Facts { graph, steps, passes, source, tokens, context, stream_in_memory } = *facts;
    let largest = source.iter().map(TensorHeader::bytes).max().unwrap_or(0);
    let mut memory = Memory { base: BASE_BYTES, ..Memory::default() };
    let mut work = Work::default();
    let all: Vec<&Block> = graph.all_blocks().collect();
    let block_rounds: Vec<_> = all.iter().map(|block| rounds(graph, steps, block.index)).collect();
    let last_observed = block_rounds.iter().rposition(|r| r.iter().any(super::Round::observes));
    let mut original = false;
    for (block, rounds) in all.iter().zip(&block_rounds) {
        for round in rounds {
            let mut widest = 0;
            for (input, needs) in block.inputs.iter().zip(&round.needs) {
                let bytes = statistics_bytes(input.width, *needs);
                widest = if round.whole { widest + bytes } else { widest.max(bytes) };
                if needs.contains(Needs::HESSIAN) {
                    work.hessian += (input.width * input.width) as f64 * tokens as f64;
                }
            }
            memory.statistics = memory.statistics.max(widest);
            original |= round.observes() && round.upstream == Upstream::Original;
            for &step in &round.steps {
                let cost = passes[step].cost(block, &steps[step].targets[block.index]);
                work.solve += cost.flops;
                memory.solver = memory.solver.max(cost.peak_bytes);
            }
        }
    }
    let Some(last_observed) = last_observed else {
        memory.tensors = 2 * largest;
        memory.solver = 0;
        return (memory, 0, work);
    };
    // The epilogue's input is what the last block put out: its own forward is never needed.
    for (block, rounds) in graph.blocks.iter().zip(&block_rounds).take(last_observed + 1) {
        let observed = rounds.iter().filter(|round| round.observes()).count();
        let advances = rounds.last().is_some_and(|round| !round.whole && round.observes());
        let advance = usize::from(!advances && block.index < last_observed);
        let forwards = observed + advance + usize::from(original);
        work.forward += forwards as f64 * block.forward_flops(tokens, context);
    }
    let block_bytes = |block: &&Block| {
        let sites: usize = block.sites.iter().map(|site| site.weights() + site.out_features).sum();
        let norms: usize = block.norms.iter().map(|norm| norm.width).sum();
        4 * (sites + norms)
    };
    memory.block = graph.blocks.iter().map(|block| block_bytes(&block)).max().unwrap_or(0);
    if last_observed == graph.blocks.len() {
        memory.block = memory.block.max(block_bytes(&&graph.epilogue));
    }
    let widest = graph.blocks.iter().flat_map(|b| &b.inputs).map(|i| i.width).max().unwrap_or(0);
    memory.activations = 4 * context * (4 * graph.hidden + 3 * widest);
    memory.tensors = largest;
    let streams = 1 + usize::from(original);
    let stream = 4 * tokens * graph.hidden * streams;
    memory.stream = stream.min(stream_in_memory);
    (memory, stream.saturating_sub(stream_in_memory), work)
}

fn statistics_bytes(width: usize, needs: Needs) -> usize {
    let per_channel = [(Needs::ABS_MAX, 4), (Needs::ABS_MEAN, 4), (Needs::SQUARE_SUM, 8)];
    let channels: usize =
        per_channel.iter().filter(|(need, _)| needs.contains(*need)).map(|(_, b)| b * width).sum();
    let hessian = if needs.contains(Needs::HESSIAN) { 8 * width * width } else { 0 };
    channels + hessian
}
