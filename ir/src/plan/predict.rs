//! What a plan costs: memory, scratch space and work, from shapes alone.
//!
//! Memory with calibration, bytes:
//! `block f32 weights + the stage with the largest (statistics + solver scratch + activations beside the
//! residual stream) + stream in memory + activations of one window + largest tensor + base`, where a Hessian
//! of n channels is counted once as the lower triangle in f64 and once in full in f32 (8 n²), and a stream
//! larger than the limit lies on disk. Without calibration one linear at a time is
//! read and written: `2 · largest tensor + base`.
//!
//! Work, floating-point operations: forwards of blocks, `n² · tokens` per symmetric Hessian update, and
//! what the passes say of themselves.

use attar_tensor::TensorHeader;
use serde::Serialize;

use super::{PlanStep, rounds};
use crate::{Block, Fold, ModelGraph, Needs, Pass, Producer, Upstream};

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

/// What one stage of a round holds, bytes.
#[derive(Debug, Clone, Copy, Default)]
struct Stage {
    statistics: usize,
    solver: usize,
    beside: usize,
}

impl Stage {
    fn worse(self, other: Self) -> Self {
        let sum = |stage: Self| stage.statistics + stage.solver + stage.beside;
        if sum(other) > sum(self) { other } else { self }
    }
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
    let (mut original, mut worst) = (false, Stage::default());
    for (block, rounds) in all.iter().zip(&block_rounds) {
        for round in rounds {
            let mut whole = Stage::default();
            for (at, (input, needs)) in block.inputs.iter().zip(&round.needs).enumerate() {
                let mut stage =
                    Stage { statistics: statistics_bytes(input.width, *needs), ..Stage::default() };
                if needs.contains(Needs::HESSIAN) {
                    work.hessian += (input.width * input.width) as f64 * tokens as f64;
                }
                if round.whole {
                    whole.statistics += stage.statistics;
                    continue;
                }
                for &step in &round.steps {
                    let targets: Vec<_> = steps[step].targets[block.index]
                        .iter()
                        .copied()
                        .filter(|target| block.input_of(target.site) == at)
                        .collect();
                    if !targets.is_empty() {
                        let cost = passes[step].cost(block, &targets);
                        work.solve += cost.flops;
                        stage.solver = stage.solver.max(cost.peak_bytes);
                    }
                }
                // What a linear feeds on without a norm between lies beside the residual stream.
                let beside = 4 * tokens * input.width;
                let no_norm =
                    |fold: &Fold| fold.input == at && matches!(fold.producer, Producer::Rows(_));
                if beside <= stream_in_memory && block.folds.iter().any(no_norm) {
                    stage.beside = beside;
                }
                worst = worst.worse(stage);
            }
            if round.whole {
                for &step in &round.steps {
                    let cost = passes[step].cost(block, &steps[step].targets[block.index]);
                    work.solve += cost.flops;
                    whole.solver = whole.solver.max(cost.peak_bytes);
                }
                worst = worst.worse(whole);
            }
            original |= round.observes() && round.upstream == Upstream::Original;
        }
    }
    memory.statistics = worst.statistics;
    memory.solver = worst.solver;
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
        let reads = block.inputs.len() - 1;
        if advances && block.index == last_observed {
            // Nobody reads what the last observed block puts out.
            let last =
                block.sites.iter().enumerate().filter(|(at, _)| block.input_of(*at) == reads);
            let weights: usize = last.map(|(_, site)| site.weights()).sum();
            work.forward -= 2.0 * weights as f64 * tokens as f64;
        }
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
    // A stream lies in memory or on disk as a whole.
    let spills = 4 * tokens * graph.hidden > stream_in_memory;
    memory.stream = worst.beside + if spills { 0 } else { stream };
    let beside = 4 * tokens * widest;
    let scratch =
        if spills { stream } else { 0 } + if beside > stream_in_memory { beside } else { 0 };
    (memory, scratch, work)
}

fn statistics_bytes(width: usize, needs: Needs) -> usize {
    let per_channel = [(Needs::ABS_MAX, 4), (Needs::ABS_MEAN, 4), (Needs::SQUARE_SUM, 8)];
    let channels: usize =
        per_channel.iter().filter(|(need, _)| needs.contains(*need)).map(|(_, b)| b * width).sum();
    let hessian = if needs.contains(Needs::HESSIAN) { 8 * width * width } else { 0 };
    channels + hessian
}
