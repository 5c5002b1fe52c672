//! What a plan costs: memory, scratch space and work, from shapes alone.
//!
//! Memory is followed through the run: each [`Moment`] is a state in which much is held at once (a stage
//! observed, a step applied, activations carried on, an artifact written and read back), worst block first,
//! and the peak is the largest of them. A block holds f32 for linears not yet quantized and codes for the
//! others; forwards hold packed copies of the linears they run; each thread holds one window of activations;
//! a Hessian of n channels is `4 n²` bytes of sums in f64, then `4 n²` bytes in f32. [`within`] takes the
//! fastest [`Limits`] whose peak keeps to the budget.
//!
//! Work, floating-point operations: forwards of blocks, `n² · tokens` per symmetric Hessian update, and
//! what the passes say of themselves.

mod gradients;

use attar_tensor::{
    TensorHeader,
    linalg::{GramAccumulator, PackedRows, Packing},
};
use serde::Serialize;

use super::{ModelStep, PlanError, PlanErrors, PlanStep, Round, rounds};
use crate::{
    Block, Budget, Fold, Limits, ModelGraph, Needs, Numeric, Pass, Producer, Rank, SlopeQuery,
    Target, Touches, Training, Upstream,
};

/// Bytes while `corpus` bytes of tokenizer and text are read; token ids need no tokenizer.
const fn corpus_bytes(corpus: usize) -> usize {
    if corpus == 0 { 0 } else { CORPUS_FACTOR * corpus + TOKENIZE_BYTES }
}

/// Code, allocator, config and reports of any run, bytes.
const BASE_BYTES: usize = 16 << 20;
/// Stack, packing space and allocator of one thread, bytes.
const THREAD_BYTES: usize = 4 << 20;
/// What the tokenizer library takes for the piece of text that it is given at once.
const TOKENIZE_BYTES: usize = 4 << 20;
/// What stays with the process when a text has been read: pages of code, caches, holes between what lives.
const TOKENIZED_BYTES: usize = 12 << 20;
/// Resident bytes per byte of tokenizer and text while they are read.
const CORPUS_FACTOR: usize = 12;
/// What the system maps around a touched row of the embedding, bytes.
const FAULT_BYTES: usize = 64 << 10;
/// Query rows whose scores are held at once (`attar_model`'s attention).
const QUERY_ROWS: usize = 128;

/// Parts of a step of training, and windows of each part when only the loss is taken (`attar_model`'s lesson).
const LEARNING_LANES: usize = 2;
const LOSS_WINDOWS: usize = 2;

/// Elements of a tensor that a pass on the whole model holds at once where it works row by row.
pub const PIECE_ELEMENTS: usize = 4 << 20;

/// One state of the run, bytes by cause.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Moment {
    /// What happens: `observe`, the label of a step, `forward`, `load`, `write`, `verify`, ...
    pub what: String,
    /// The input group, where there is one.
    pub place: String,
    /// The block in which it is largest; the number of blocks is the epilogue.
    pub block_index: Option<usize>,
    /// Weights of the block: f32, codes, and copies packed for forwards.
    pub block: usize,
    /// Hessians and channel statistics, with the sums they come from.
    pub statistics: usize,
    /// Scratch of the pass.
    pub solver: usize,
    /// Activations of all windows that stay in memory.
    pub stream: usize,
    /// Activations of the windows at work.
    pub activations: usize,
    /// Tensors in transit and pages of mapped files.
    pub tensors: usize,
    /// Everything else.
    pub base: usize,
}

impl Moment {
    /// All of it.
    pub const fn total(&self) -> usize {
        self.block
            + self.statistics
            + self.solver
            + self.stream
            + self.activations
            + self.tensors
            + self.base
    }

    /// `what` and `place` for people.
    pub fn name(&self) -> String {
        if self.place.is_empty() {
            self.what.clone()
        } else {
            format!("{}, {}", self.what, self.place)
        }
    }
}

/// Predicted resident memory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// The largest total of a moment.
    pub peak_bytes: usize,
    /// In the order of the run; of moments that repeat in every block, the largest.
    pub moments: Vec<Moment>,
}

impl Memory {
    /// The predicted peak, bytes.
    pub const fn peak(&self) -> usize {
        self.peak_bytes
    }

    /// The moment of the peak.
    pub fn worst(&self) -> Option<&Moment> {
        // The first of equals.
        self.moments.iter().rev().max_by_key(|moment| moment.total())
    }

    fn add(&mut self, moment: Moment) {
        self.peak_bytes = self.peak_bytes.max(moment.total());
        let same = |m: &&mut Moment| m.what == moment.what && m.place == moment.place;
        match self.moments.iter_mut().find(same) {
            Some(old) if old.total() >= moment.total() => {}
            Some(old) => *old = moment,
            None => self.moments.push(moment),
        }
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
#[derive(Clone, Copy)]
pub(super) struct Facts<'a> {
    pub(super) graph: &'a ModelGraph,
    pub(super) model: &'a [ModelStep],
    pub(super) last: Option<&'a ModelStep>,
    pub(super) steps: &'a [PlanStep],
    pub(super) passes: &'a [Box<dyn Pass>],
    pub(super) source: &'a [TensorHeader],
    pub(super) tokens: usize,
    pub(super) context: usize,
    pub(super) budget: Budget,
}

/// What was predicted, and for which limits.
pub(super) struct Prediction {
    pub(super) limits: Limits,
    pub(super) memory: Memory,
    pub(super) scratch_bytes: usize,
    pub(super) work: Work,
}

/// The prediction for the fastest limits that keep to the budget.
///
/// # Errors
/// [`PlanError::Memory`] when none do.
pub(super) fn within(facts: &Facts<'_>) -> Result<Prediction, PlanErrors> {
    let free = Limits::unbounded(facts.budget.threads);
    let predict = |limits: Limits| {
        let (mut memory, mut scratch_bytes) = (Memory::default(), 0);
        let mut made = 0;
        for step in facts.model {
            let of = Facts { graph: &step.graph, source: &step.source, ..*facts };
            let (own, scratch) = Walk::new(&of, limits).model(step);
            own.moments.into_iter().for_each(|moment| memory.add(moment));
            // What the passes before have made stays beside it, in f32 at most.
            made += step.made_bytes();
            scratch_bytes = scratch_bytes.max(made + scratch);
        }
        let (own, scratch) = Walk::new(facts, limits).run();
        let waiting = Walk::new(facts, limits).waiting();
        for moment in own.moments {
            memory.add(Moment { block: moment.block + waiting, ..moment });
        }
        scratch_bytes = scratch_bytes.max(made + scratch);
        if let Some(step) = facts.last {
            let (own, scratch) = Walk::new(facts, limits).model(step);
            own.moments.into_iter().for_each(|moment| memory.add(moment));
            scratch_bytes = scratch_bytes.max(made + scratch);
        }
        (limits, memory, scratch_bytes)
    };
    let (limits, memory, scratch_bytes) = match facts.budget.memory {
        None => predict(free),
        Some(budget) => {
            let mut smallest: Option<Memory> = None;
            let mut found = None;
            for limits in Limits::ladder(facts.budget.threads) {
                let prediction = predict(limits);
                if prediction.1.peak() <= budget {
                    found = Some(prediction);
                    break;
                }
                if smallest.as_ref().is_none_or(|least| prediction.1.peak() < least.peak()) {
                    smallest = Some(prediction.1);
                }
            }
            found.ok_or_else(|| {
                let smallest = smallest.unwrap_or_default();
                PlanErrors(vec![PlanError::Memory {
                    budget,
                    wanted: predict(free).1.peak(),
                    smallest: smallest.peak(),
                    at: smallest.worst().map(Moment::name).unwrap_or_default(),
                }])
            })?
        }
    };
    let work = work(facts, limits);
    Ok(Prediction { limits, memory, scratch_bytes, work })
}

/// Which rounds run on which block, and the last block that is observed.
fn schedule(facts: &Facts<'_>) -> (Vec<Vec<Round>>, Option<usize>) {
    let all = facts.graph.all_blocks();
    let rounds: Vec<_> = all.map(|block| rounds(facts.graph, facts.steps, block.index)).collect();
    let last = rounds.iter().rposition(|r: &Vec<Round>| r.iter().any(Round::feeds));
    (rounds, last)
}

fn work(facts: &Facts<'_>, limits: Limits) -> Work {
    let Facts { graph, steps, passes, tokens, context, .. } = *facts;
    let mut work = Work::default();
    for step in facts.model.iter().chain(facts.last) {
        work.solve += step.pass.cost(&step.graph, tokens).flops;
        if step.pass.slopes(&step.graph).is_some() {
            work.solve += SlopeQuery::flops(&step.graph, tokens, context);
        }
        for block in step.graph.blocks.iter().filter(|_| step.calibrates()) {
            if let crate::Work::Train(_) = step.pass.work() {
                break;
            }
            work.forward += block.forward_flops(tokens, context);
            for (at, input) in block.inputs.iter().enumerate() {
                if step.needs(block, at).contains(Needs::HESSIAN) {
                    work.hessian += (input.width * input.width) as f64 * tokens as f64;
                }
            }
        }
    }
    let chosen = passes.iter().filter_map(|pass| pass.chooses_ranks());
    let surveyed: Vec<Needs> =
        chosen.chain(passes.iter().filter_map(|pass| pass.surveys())).collect();
    if surveyed.contains(&Needs::GRADIENTS) {
        work.forward += gradients::work(facts);
    }
    if surveyed.iter().any(|needs| !(*needs - Needs::GRADIENTS).is_empty()) {
        let each = graph.blocks.iter().map(|block| block.forward_flops(tokens, context));
        work.forward += each.sum::<f64>();
    }
    let (block_rounds, last_observed) = schedule(facts);
    let mut original = false;
    for (block, rounds) in graph.all_blocks().zip(&block_rounds) {
        for round in rounds {
            for (input, needs) in block.inputs.iter().zip(&round.needs) {
                if needs.contains(Needs::HESSIAN) {
                    work.hessian += (input.width * input.width) as f64 * tokens as f64;
                }
            }
            for &step in &round.steps {
                let targets = &steps[step].targets[block.index];
                work.solve += passes[step].cost(block, targets, &limits).flops;
                if round.learns {
                    // Forward, backward, and the loss of all windows before and after.
                    let Training { batch, steps, .. } = passes[step].training();
                    work.solve += 3.0 * block.forward_flops(batch * steps * context, context);
                    work.solve += 2.0 * block.forward_flops(tokens, context);
                }
            }
            original |= round.observes() && round.upstream == Upstream::Original || round.learns;
        }
    }
    let Some(last_observed) = last_observed else { return work };
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
    work
}

/// The run, followed for one set of limits.
struct Walk<'a> {
    facts: &'a Facts<'a>,
    limits: Limits,
    memory: Memory,
    /// Streams of residual activations in memory, and on scratch.
    stream: usize,
    scratch_stream: usize,
    /// The most that lies on scratch beside them.
    scratch: usize,
    /// The block before, which is packed and written while this one is computed.
    behind: usize,
    base: usize,
}

/// Sites of `block` whose input group is one of `inputs`.
fn sites_of(block: &Block, inputs: std::ops::Range<usize>) -> impl Iterator<Item = usize> {
    block.inputs[inputs].iter().flat_map(|input| &input.sites).copied()
}

impl<'a> Walk<'a> {
    fn new(facts: &'a Facts<'a>, limits: Limits) -> Self {
        let measured = facts.budget.measured.map_or(0, |measured| measured.corpus);
        let reads_text = facts.budget.corpus + measured > 0;
        let left = if reads_text { TOKENIZED_BYTES } else { 0 };
        let base = BASE_BYTES + left + limits.threads * THREAD_BYTES;
        let memory = Memory::default();
        Self { facts, limits, memory, stream: 0, scratch_stream: 0, scratch: 0, behind: 0, base }
    }

    fn add(&mut self, moment: Moment) {
        let (base, stream) = (self.base, self.stream + moment.stream);
        let tensors = moment.tensors + self.behind;
        self.memory.add(Moment { stream, tensors, base, ..moment });
    }

    /// Windows run at once.
    fn windows(&self) -> usize {
        self.limits.threads.min(self.facts.tokens.div_ceil(self.facts.context.max(1)).max(1))
    }

    /// Activations of the windows at work inside a block, `context` tokens each.
    fn activations(&self, block: &Block, windows: usize, context: usize, whole: bool) -> usize {
        let hidden = self.facts.graph.hidden;
        let widths: usize = block.inputs.iter().map(|input| input.width).sum();
        let inner = block.inputs.iter().map(|input| input.width).max().unwrap_or(hidden);
        let Some(attention) = block.attention else {
            return 4 * context * hidden * (windows + 1);
        };
        let keys = attention.kv_heads * attention.head_dim;
        // The residual stream and what lies beside it, then the buffers of a thread: a normed input, the
        // widest product, keys, values and scores.
        let window = 2 * hidden + 2 * inner + 2 * keys + QUERY_ROWS.min(context);
        let inputs = if whole { windows * widths } else { hidden };
        4 * context * (windows * window + inputs)
    }

    /// Weights of a block where `quantized` says which linears are codes.
    fn weights(&self, block: &Block, quantized: &[bool]) -> usize {
        let norms: usize = block.norms.iter().map(|norm| 4 * norm.width).sum();
        let site = |(site, &quantized): (&crate::Site, &bool)| {
            // Codes are bytes; scales and zero points of groups of 32 are the finest that is usual.
            let weight =
                if quantized { site.weights() + site.weights() / 5 } else { 4 * site.weights() };
            weight + 4 * site.out_features
        };
        norms + block.sites.iter().zip(quantized).map(site).sum::<usize>() + self.corrections(block)
    }

    /// Blocks that wait, done, until scales are trained behind all of them.
    fn waiting(&self) -> usize {
        let graph = self.facts.graph;
        let of = |block: &Block| {
            let is_made = |site: usize| {
                let targets = |step: &PlanStep| {
                    step.contract.produces.numeric == Some(Numeric::Quantized)
                        && step.targets[block.index].iter().any(|target| target.site == site)
                };
                self.facts.steps.iter().any(targets)
            };
            let quantized: Vec<bool> = (0..block.sites.len()).map(is_made).collect();
            self.weights(block, &quantized)
        };
        self.facts.last.map_or(0, |_| graph.blocks.iter().map(of).sum())
    }

    /// Corrections beside the weights of a block, f32. Factors are smaller than the weight that they stand for.
    fn corrections(&self, block: &Block) -> usize {
        let Facts { steps, passes, .. } = *self.facts;
        let corrects = |at: &usize| {
            steps[*at].contract.produces.rank == Some(Rank::FullPlusLowRank)
                && steps[*at].targets.len() > block.index
        };
        let bytes = |(at, target): (usize, &Target)| {
            let site = &block.sites[target.site];
            let rank = passes[at].rank(site).ok().flatten().unwrap_or(0);
            4 * rank * (site.out_features + site.in_features)
        };
        let of = |at: usize| steps[at].targets[block.index].iter().map(move |target| (at, target));
        (0..steps.len()).filter(corrects).flat_map(of).map(bytes).sum()
    }

    /// Packed copies of the sites that a forward runs, and the largest of them that is dequantized on the way,
    /// before any window is at work.
    fn packed(
        block: &Block,
        sites: impl Iterator<Item = usize>,
        quantized: &[bool],
    ) -> (usize, usize) {
        let (mut packed, mut transit) = (0, 0);
        for site in sites {
            let crate::Site { out_features, in_features, .. } = block.sites[site];
            packed += PackedRows::bytes(out_features, in_features);
            if quantized[site] {
                transit = transit.max(4 * block.sites[site].weights());
            }
        }
        (packed, transit)
    }

    /// What an input group's statistics are made in: sums, products, and rows packed for them.
    fn sums(&self, width: usize, needs: Needs) -> usize {
        if !needs.contains(Needs::HESSIAN) {
            return channel_bytes(width, needs);
        }
        let Limits { threads, gram_on_scratch, .. } = self.limits;
        GramAccumulator::bytes(width, self.facts.tokens, threads, gram_on_scratch)
            + channel_bytes(width, needs)
    }

    /// Bytes in memory of what lies beside the residual stream while input group `at` is next.
    fn beside(&mut self, block: &Block, at: usize) -> usize {
        // What a linear feeds on without a norm between.
        let no_norm = |fold: &Fold| fold.input == at && matches!(fold.producer, Producer::Rows(_));
        if !block.folds.iter().any(no_norm) {
            return 0;
        }
        let bytes = 4 * self.facts.tokens * block.inputs[at].width;
        if bytes <= self.limits.beside { bytes } else { 0 }
    }

    fn spilled_beside(&self, block: &Block) -> usize {
        let widest = block.inputs.iter().map(|input| input.width).max().unwrap_or(0);
        let bytes = 4 * self.facts.tokens * widest;
        if block.attention.is_some() && bytes > self.limits.beside { bytes } else { 0 }
    }

    /// A pass on the whole model: blocks with their activations, tensors on their way to the work directory.
    fn model(mut self, step: &ModelStep) -> (Memory, usize) {
        let Facts { source, tokens, context, .. } = *self.facts;
        let cost = step.pass.cost(&step.graph, tokens);
        let largest = source.iter().map(|header| 4 * header.elements()).max().unwrap_or(0);
        // Tables are worked on in pieces of rows, in f32, beside the pages of the file.
        let pages = source.iter().map(TensorHeader::bytes).max().unwrap_or(0);
        let piece = pages + 2 * largest.min(4 * PIECE_ELEMENTS);
        if let crate::Work::Transform(_) = step.pass.work() {
            let widest = step.graph.blocks.iter().flat_map(|block| &block.sites);
            let widest = widest.map(|site| 4 * site.weights()).max().unwrap_or(0);
            self.add(Moment {
                what: step.label.clone(),
                tensors: piece.max(2 * widest),
                solver: cost.peak_bytes,
                ..Moment::default()
            });
        }
        if !step.calibrates() {
            return (self.memory, 0);
        }
        let corpus = corpus_bytes(self.facts.budget.corpus);
        self.add(Moment { what: "read corpus".into(), tensors: corpus, ..Moment::default() });
        if let crate::Work::Train(train) = step.pass.work() {
            let original = self.facts.model.first().map_or(&step.graph, |first| &first.graph);
            let original = step.teacher_graph.as_ref().unwrap_or(original);
            let solver =
                train.peak_bytes(&step.graph, original, (tokens, context), self.limits.stream);
            self.add(Moment {
                what: step.label.clone(),
                solver,
                tensors: piece,
                ..Moment::default()
            });
            // The next state is written before the former one goes.
            return (self.memory, 2 * train.state_bytes(&step.graph));
        }
        let slopes_on_scratch = self.slopes(step, piece);
        // The stream, and a copy of it where blocks are compared with what enters them.
        let stream = 8 * tokens * step.graph.hidden;
        let kept = if stream / 2 <= self.limits.stream { stream } else { 0 };
        for block in &step.graph.blocks {
            let dense = vec![false; block.sites.len()];
            let inputs = 0..block.inputs.len();
            let (packed, _) = Self::packed(block, sites_of(block, inputs.clone()), &dense);
            let sums = inputs.map(|at| self.sums(block.inputs[at].width, step.needs(block, at)));
            let statistics = sums.max().unwrap_or(0);
            let beside = (0..block.inputs.len()).map(|at| self.beside(block, at)).max();
            self.add(Moment {
                what: step.label.clone(),
                block_index: Some(block.index),
                block: self.weights(block, &dense) + packed,
                statistics,
                solver: cost.peak_bytes,
                stream: kept + beside.unwrap_or(0),
                activations: self.activations(block, self.windows(), context, false),
                tensors: piece,
                ..Moment::default()
            });
            self.scratch_beside(block, 0);
        }
        (self.memory, slopes_on_scratch.max(self.scratch + stream - kept))
    }

    fn run(mut self) -> (Memory, usize) {
        let Facts { graph, source, tokens, context, budget, .. } = *self.facts;
        let (block_rounds, last_observed) = schedule(self.facts);
        let transit = |name: &str| {
            let header = source.iter().find(|header| header.name.starts_with(name));
            header.map_or(0, TensorHeader::bytes)
        };
        let any = |what: &dyn Fn(&Round) -> bool| block_rounds.iter().flatten().any(what);
        // A block that learns on original activations has a copy of what enters it.
        let streams = [
            any(&|r| r.learns || r.observes() && r.upstream == Upstream::Original),
            any(&|r| r.feeds() && r.upstream == Upstream::Compressed),
            any(&|r| r.learns && r.upstream == Upstream::Original),
        ];
        let streams = streams.iter().filter(|stream| **stream).count();
        if last_observed.is_some() {
            self.add(Moment {
                what: "read corpus".into(),
                tensors: corpus_bytes(budget.corpus),
                ..Moment::default()
            });
            let stream = 4 * tokens * graph.hidden;
            if stream <= self.limits.stream {
                self.stream = streams * stream;
            } else {
                self.scratch_stream = streams * stream;
            }
            let pages = transit(&graph.embedding).min(context * FAULT_BYTES);
            self.add(Moment {
                what: "embed".into(),
                activations: 4 * context * graph.hidden,
                tensors: pages,
                ..Moment::default()
            });
        }
        for (step, pass) in self.facts.steps.iter().zip(self.facts.passes) {
            if pass.surveys().is_some_and(|needs| needs.contains(Needs::GRADIENTS)) {
                self.sweep(&step.label);
            }
        }
        self.choose();
        for (block, rounds) in graph.all_blocks().zip(&block_rounds) {
            let feeds = |later: &Vec<Round>| later.iter().any(Round::feeds);
            let streams = last_observed.is_some();
            let advance = streams && block_rounds.iter().skip(block.index + 1).any(feeds);
            let runs = streams && last_observed.is_some_and(|last| block.index <= last);
            if rounds.is_empty() && !runs {
                continue;
            }
            self.block(block, rounds, advance, streams);
        }
        let scratch = self.scratch_stream + self.scratch;
        (self.stream, self.behind) = (0, 0);
        self.after();
        (self.memory, scratch)
    }

    /// Ranks that are chosen before any block is worked on: a forward of the original model, and singular values.
    fn choose(&mut self) {
        let Facts { graph, steps, passes, .. } = *self.facts;
        for (step, pass) in steps.iter().zip(passes) {
            let Some(needs) = pass.chooses_ranks() else { continue };
            // Of gradients only what a survey keeps of them is there.
            let needs = needs - Needs::GRADIENTS;
            for block in &graph.blocks {
                if !needs.is_empty() {
                    self.observe_original(block, &vec![needs; block.inputs.len()]);
                }
                let dense = vec![false; block.sites.len()];
                let held = block.inputs.iter().map(|input| hessian_bytes(input.width, needs)).max();
                let cost = pass.cost(block, &step.targets[block.index], &self.limits);
                self.add(Moment {
                    what: "choose ranks".into(),
                    block_index: Some(block.index),
                    block: self.weights(block, &dense),
                    statistics: held.unwrap_or(0),
                    solver: cost.peak_bytes,
                    ..Moment::default()
                });
            }
        }
    }

    fn block(&mut self, block: &Block, rounds: &[Round], advance: bool, streams: bool) {
        let Facts { steps, passes, .. } = *self.facts;
        let prefix = |name: &str| self.facts.source.iter().find(|h| h.name == name);
        let mapped = block.sites.iter().filter_map(|s| prefix(&format!("{}.weight", s.name)));
        let tensors = mapped.map(TensorHeader::bytes).max().unwrap_or(0);
        let mut quantized = vec![false; block.sites.len()];
        let inputs = block.inputs.len();
        let windows = self.windows();
        let context = self.facts.context.min(self.facts.tokens.max(1));
        let index = Some(block.index);
        self.add(Moment {
            what: "load".into(),
            block_index: index,
            block: self.weights(block, &quantized),
            tensors,
            ..Moment::default()
        });
        let quantize = |step: usize, quantized: &mut [bool], stage: Option<usize>| {
            if steps[step].contract.produces.numeric == Some(Numeric::Quantized) {
                for target in &steps[step].targets[block.index] {
                    if stage.is_none_or(|stage| block.input_of(target.site) == stage) {
                        quantized[target.site] = true;
                    }
                }
            }
        };
        let mut advanced = false;
        for (at, round) in rounds.iter().enumerate() {
            let compressed = round.upstream == Upstream::Compressed;
            let staged = !round.whole && at + 1 == rounds.len() && streams && compressed;
            if staged {
                let mut reached = 0;
                for stage in 0..inputs {
                    let needs = round.needs[stage];
                    let place = block.inputs[stage].name.to_owned();
                    let width = block.inputs[stage].width;
                    if !needs.is_empty() {
                        let old = if reached == stage { 0 } else { self.beside(block, reached) };
                        let stream = old + self.beside(block, stage);
                        let run = sites_of(block, reached..stage);
                        let weights = self.weights(block, &quantized);
                        let (packed, transit) = Self::packed(block, run, &quantized);
                        self.add(Moment {
                            what: "observe".into(),
                            place: place.clone(),
                            block_index: index,
                            block: weights + packed,
                            statistics: self.sums(width, needs),
                            stream,
                            activations: self
                                .activations(block, windows, context, false)
                                .max(transit),
                            ..Moment::default()
                        });
                        reached = stage;
                    }
                    let stream = self.beside(block, reached);
                    for &step in &round.steps {
                        let targets = steps[step].targets[block.index].iter().copied();
                        let targets: Vec<_> =
                            targets.filter(|t| block.input_of(t.site) == stage).collect();
                        if targets.is_empty() {
                            continue;
                        }
                        let weights = self.weights(block, &quantized);
                        let cost = passes[step].cost(block, &targets, &self.limits);
                        let stored = Self::stored(block, &targets, &steps[step]);
                        self.add(Moment {
                            what: steps[step].label.clone(),
                            place: place.clone(),
                            block_index: index,
                            block: weights,
                            statistics: hessian_bytes(width, needs),
                            solver: cost.peak_bytes.max(stored),
                            stream,
                            ..Moment::default()
                        });
                        self.scratch_beside(block, cost.scratch_bytes);
                        quantize(step, &mut quantized, Some(stage));
                    }
                    if self.limits.gram_on_scratch && needs.contains(Needs::HESSIAN) {
                        let sums = GramAccumulator::bytes(width, 0, 0, false);
                        self.scratch_beside(block, sums);
                    }
                }
                if advance {
                    let stream = self.beside(block, reached);
                    let run = sites_of(block, reached..inputs);
                    let weights = self.weights(block, &quantized);
                    let (packed, transit) = Self::packed(block, run, &quantized);
                    self.add(Moment {
                        what: "forward".into(),
                        block_index: index,
                        block: weights + packed,
                        stream,
                        activations: self.activations(block, windows, context, false).max(transit),
                        ..Moment::default()
                    });
                }
                advanced = true;
                continue;
            }
            let needs = round.needs.iter().fold(Needs::empty(), |a, b| a | *b);
            if round.observes() && streams && !compressed {
                self.observe_original(block, &round.needs);
            } else if round.observes() && streams {
                let weights = self.weights(block, &quantized);
                let (packed, transit) = Self::packed(block, sites_of(block, 0..inputs), &quantized);
                self.add(Moment {
                    what: "observe".into(),
                    place: "whole block".into(),
                    block_index: index,
                    block: weights + packed,
                    statistics: block.inputs.iter().map(|i| self.sums(i.width, needs)).sum(),
                    activations: self.activations(block, windows, context, true).max(transit),
                    ..Moment::default()
                });
                if self.limits.gram_on_scratch && needs.contains(Needs::HESSIAN) {
                    let sums = |i: &crate::InputGroup| GramAccumulator::bytes(i.width, 0, 0, false);
                    let sums = block.inputs.iter().map(sums).sum();
                    self.scratch_beside(block, sums);
                }
            }
            for &step in &round.steps {
                let targets = &steps[step].targets[block.index];
                let cost = passes[step].cost(block, targets, &self.limits);
                let held = block.inputs.iter().map(|i| hessian_bytes(i.width, needs));
                // Of the original's statistics, those of one input at a time are read from scratch, beside
                // their pages.
                let statistics = match (round.observes(), compressed || round.whole) {
                    (false, _) => 0,
                    (true, true) => held.sum(),
                    (true, false) => held.max().map_or(0, |bytes| bytes + bytes / 2),
                };
                let weights = self.weights(block, &quantized);
                let stored = Self::stored(block, targets, &steps[step]);
                let learning =
                    if round.learns { self.learning(block, passes[step].training()) } else { 0 };
                self.add(Moment {
                    what: steps[step].label.clone(),
                    activations: learning,
                    place: if steps[step].contract.touches == Touches::Sites {
                        String::new()
                    } else {
                        "whole block".into()
                    },
                    block_index: index,
                    block: weights,
                    statistics,
                    solver: cost.peak_bytes.max(stored),
                    ..Moment::default()
                });
                self.scratch_beside(block, cost.scratch_bytes);
                quantize(step, &mut quantized, None);
            }
        }
        if streams && block.attention.is_some() && (advance || !advanced) {
            // Also a run that goes on after a kill: its stream is carried through blocks that are done.
            let weights = self.weights(block, &quantized);
            let (packed, transit) = Self::packed(block, sites_of(block, 0..inputs), &quantized);
            self.add(Moment {
                what: "carry on".into(),
                block_index: index,
                block: weights + packed,
                activations: self.activations(block, windows, context, false).max(transit),
                ..Moment::default()
            });
        }
        let largest = block.sites.iter().map(crate::Site::weights).max().unwrap_or(0);
        // Packed words, and the rows they are made from.
        let (made, packing) = (self.weights(block, &quantized), 2 * largest);
        self.behind = 0;
        self.add(Moment {
            what: "write".into(),
            block_index: index,
            block: made,
            tensors: packing,
            ..Moment::default()
        });
        self.behind = made + packing;
    }

    /// Activations, and what derivatives are made in, of the windows that a step of training works on.
    fn learning(&self, block: &Block, training: Training) -> usize {
        let out = |site: usize| block.sites[site].out_features;
        let (hidden, wide, keys) = (self.facts.graph.hidden, out(4), out(1) + out(2));
        let context = self.facts.context.min(self.facts.tokens.max(1));
        let part = training.batch.div_ceil(LEARNING_LANES).max(LOSS_WINDOWS) * context;
        // What linears put out and the stream between; then norms, gradients, inputs, targets and outputs.
        let tape = 2 * out(0) + keys + hidden + 2 * wide;
        let space = 5 * hidden + wide + 2 * out(0) + 2 * keys;
        let packed = Packing::bytes(wide, hidden.max(part)) / 4;
        let scores = self.limits.threads * 2 * QUERY_ROWS.min(context) * context;
        let graph = self.facts.graph;
        let last = training.logits && block.index + 1 == graph.blocks.len();
        // The head, packed by each part, and the logits of both sides.
        let table = Packing::bytes(graph.vocab, hidden) / 4;
        let head = if last {
            table * (1 + LEARNING_LANES) + LEARNING_LANES * 2 * QUERY_ROWS * graph.vocab
        } else {
            0
        };
        4 * (LEARNING_LANES * (part * (tape + space) + packed) + scores + head)
    }

    /// Copies of what a step made, on their way to the work directory.
    fn stored(block: &Block, targets: &[Target], step: &PlanStep) -> usize {
        let quantizes = step.contract.produces.numeric == Some(Numeric::Quantized);
        let bytes = |site: usize| {
            let weights = block.sites[site].weights();
            if quantizes { weights + weights / 5 } else { 4 * weights }
        };
        targets.iter().map(|target| bytes(target.site)).sum()
    }

    /// The stages of the original block, whose statistics go to scratch one after the other.
    fn observe_original(&mut self, block: &Block, needs: &[Needs]) {
        let dense = vec![false; block.sites.len()];
        let windows = self.windows();
        let context = self.facts.context.min(self.facts.tokens.max(1));
        let mut reached = 0;
        for (stage, &needs) in needs.iter().enumerate() {
            if needs.is_empty() {
                continue;
            }
            let old = if reached == stage { 0 } else { self.beside(block, reached) };
            let stream = old + self.beside(block, stage);
            let run = sites_of(block, reached..stage);
            let (packed, transit) = Self::packed(block, run, &dense);
            self.add(Moment {
                what: "observe original".into(),
                place: block.inputs[stage].name.to_owned(),
                block_index: Some(block.index),
                block: self.weights(block, &dense) + packed,
                statistics: self.sums(block.inputs[stage].width, needs),
                stream,
                activations: self.activations(block, windows, context, false).max(transit),
                ..Moment::default()
            });
            let sums = GramAccumulator::bytes(block.inputs[stage].width, 0, 0, false);
            let kept = 2 * block.inputs[stage].width * block.inputs[stage].width;
            self.scratch_beside(block, kept + if self.limits.gram_on_scratch { sums } else { 0 });
            reached = stage;
        }
    }

    fn scratch_beside(&mut self, block: &Block, bytes: usize) {
        self.scratch = self.scratch.max(bytes + self.spilled_beside(block));
    }

    /// What comes after the blocks: the rest is copied, the artifact read back and measured.
    fn after(&mut self) {
        let Facts { graph, source, budget, .. } = *self.facts;
        let largest = source.iter().map(TensorHeader::bytes).max().unwrap_or(0);
        // Pages of what passes on the whole model have made, in f32 at most, beside those of the artifact.
        let wide = source.iter().map(|header| 4 * header.elements()).max().unwrap_or(0);
        let made = if self.facts.model.is_empty() { 0 } else { wide + largest };
        self.add(Moment { what: "copy".into(), tensors: largest + made, ..Moment::default() });
        let widest = graph.blocks.iter().flat_map(|b| &b.sites).map(crate::Site::weights).max();
        self.add(Moment {
            what: "verify".into(),
            // Codes unpacked and packed again; one dense tensor's pages.
            tensors: largest.max(3 * widest.unwrap_or(0)) + made,
            ..Moment::default()
        });
        let Some(measured) = budget.measured else { return };
        self.add(Moment {
            what: "read corpus to measure".into(),
            tensors: corpus_bytes(measured.corpus),
            ..Moment::default()
        });
        let context = measured.context.min(graph.context);
        let tokens = measured.tokens.max(1);
        let one = 4 * tokens * graph.hidden;
        let stream = if one <= self.limits.stream { 2 * one } else { 0 };
        if stream == 0 {
            self.scratch = self.scratch.max(2 * one);
        }
        let windows = self.limits.threads.min(tokens.div_ceil(context.max(1)));
        let heads = 4 * graph.vocab * graph.hidden;
        // The original that it is measured against may be larger.
        let original = self.facts.model.first().map_or(&[][..], |step| &step.graph.blocks);
        for block in graph.blocks.iter().chain(original) {
            let weights = self.weights(block, &vec![false; block.sites.len()]);
            let mapped = block.sites.iter().map(|site| site.weights() * site.dtype.size());
            self.add(Moment {
                what: "measure, blocks".into(),
                block_index: Some(block.index),
                // The head of the model measured first is kept.
                block: weights + heads,
                stream,
                activations: self.activations(block, windows, context, true),
                tensors: mapped.max().unwrap_or(0),
                ..Moment::default()
            });
        }
        self.add(Moment {
            what: "measure, logits".into(),
            block: 2 * heads,
            stream,
            // Logits of both models, those of the first window, and rows at work.
            activations: 4 * context * (3 * graph.vocab + 4 * graph.hidden),
            tensors: largest,
            ..Moment::default()
        });
    }
}

fn channel_bytes(width: usize, needs: Needs) -> usize {
    // Maxima and two sums in f64 are kept whatever is asked for.
    if needs.is_empty() { 0 } else { 20 * width }
}

fn hessian_bytes(width: usize, needs: Needs) -> usize {
    let hessian = if needs.contains(Needs::HESSIAN) { 4 * width * width } else { 0 };
    hessian + channel_bytes(width, needs)
}
