//! Distillation of the whole model on the logits of its teacher (Hinton et al. 2015, arXiv:1503.02531); the losses stand in
//! [`crate::loss`], what is trained in [`crate::learner`].
//!
//! Of the teacher the stream that leaves its last block is kept, for as many windows as memory allows: its blocks run one
//! after the other for all of them, and its logits are made of the stream row by row when the student is there, so they
//! are never rounded or cut and need no disk. Where memory does not hold all windows, they are made for the steps to come.
//! Cost per token: 6 FLOPs per weight of the student (8 where its tapes are made again), 2 per weight of the teacher.
//! Steps, windows and sums have a fixed order: the bits depend neither on threads nor on memory, and a run that is killed
//! goes on from its last state to the same bytes.

mod options;
mod teacher;

use attar_ir::{
    Block, Cost, ModelContext, ModelGraph, ModelPass, ModelPassDef, PassError, Sizes, Train,
    TrainProgress, TrainSession, TrainingReport, Work,
    limits::STREAM_IN_MEMORY,
    recipe::{RecipeError, options},
};
use attar_model::{
    BlockWeights, Decoder, Differentiable, Objective, Space, StepMemory, Tape, training_step,
};
use attar_tensor::QuantScheme;
use rayon::prelude::*;
use serde_json::json;

use crate::{
    AdamW, Learner, Order, Schedule, Trained,
    loss::{Divergence, Row, RowLoss},
};
use options::{At, Options, Rounding, What, Word};
use teacher::{Teacher, failed};

/// Bytes of tapes that are kept beside each other.
const TAPES: usize = 256 << 20;
/// Points of the loss curve.
const POINTS: usize = 100;
/// Rows of logits per task.
const ROWS: usize = 8;

/// Registration of `distill`.
pub(crate) const DEF: ModelPassDef = ModelPassDef {
    name: "distill",
    summary: "train the whole model to put out what the original does: all weights, norms alone, adapters, through rounding, or the scales of codes",
    paper: "Hinton et al. 2015, arXiv:1503.02531; Gu et al. 2023, arXiv:2306.08543; Agarwal et al. 2023, arXiv:2306.13649; \
            Hu et al. 2021, arXiv:2106.09685; Liu et al. 2023, arXiv:2305.17888; Kim et al. 2023, arXiv:2305.14152",
    example: "\
[[step]]\n\
pass = \"prune_ffn\"\n\
ratio = 0.25\n\
\n\
[[step]]\n\
pass = \"distill\"\n\
loss = \"forward_kl\"\n\
epochs = 2\n\
batch = 4\n\
rate = 5e-4\n\
",
    build: |table| Ok(Box::new(Distill::new(options(table)?)?)),
    schema: || schemars::schema_for!(Options),
};

#[derive(Debug)]
struct Distill {
    options: Options,
    scheme: Option<QuantScheme>,
}

impl Distill {
    fn new(options: Options) -> Result<Self, RecipeError> {
        options.check()?;
        let scheme = options.rounding.map(Rounding::scheme).transpose()?;
        Ok(Self { options, scheme })
    }

    fn trained(&self) -> Trained {
        match self.options.train {
            What::All => Trained::All,
            What::Norms => Trained::Norms,
            What::Scales => Trained::Scales,
            What::Adapters => {
                let rank = self.options.rank;
                Trained::Adapters { rank, alpha: self.options.alpha.unwrap_or(2.0 * rank as f32) }
            }
        }
    }

    fn rate(&self) -> f32 {
        let usual = if self.options.train == What::All { 5e-4 } else { 2e-3 };
        self.options.rate.unwrap_or(usual)
    }

    /// True when something of the loss comes from a teacher.
    fn learns(&self) -> bool {
        self.options.text < 1.0 || self.options.hidden > 0.0
    }

    fn loss(&self) -> String {
        let o = &self.options;
        let mut parts = Vec::new();
        if o.text < 1.0 {
            let share = 1.0 - o.text;
            let temperature = if (o.temperature - 1.0).abs() > 0.0 {
                format!(", temperature {}", o.temperature)
            } else {
                String::new()
            };
            let beta = if o.loss == Divergence::JensenShannon {
                format!(", beta {}", o.beta)
            } else {
                String::new()
            };
            let share = if o.text > 0.0 { format!("{share} ") } else { String::new() };
            parts.push(format!("{share}{}{temperature}{beta}", o.loss.name()));
        }
        if o.text > 0.0 {
            parts.push(format!("{} cross-entropy with the text", o.text));
        }
        if o.hidden > 0.0 {
            let at = match &o.hidden_at {
                At::Word(Word::Last) => "the last streams".to_owned(),
                At::Word(Word::All) => "the streams of all blocks".to_owned(),
                At::Blocks(blocks) => format!("the streams of blocks {blocks:?}"),
            };
            parts.push(format!("{} distance of {at}", o.hidden));
        }
        parts.join(" + ")
    }

    /// Steps on `windows` windows.
    fn steps(&self, windows: usize) -> usize {
        let each = self.options.batch * self.options.accumulate;
        let epochs = || (self.options.epochs * windows).div_ceil(each.min(windows.max(1)));
        self.options.steps.unwrap_or_else(epochs).max(1)
    }

    /// Blocks of the student at which streams are compared; none where they have no weight.
    fn compared(&self, layers: usize) -> Vec<usize> {
        if self.options.hidden > 0.0 {
            self.options.hidden_at.blocks(layers).unwrap_or_default()
        } else {
            Vec::new()
        }
    }

    /// Tapes that are kept.
    fn tapes(graph: &ModelGraph, tokens: usize, stream: usize) -> usize {
        let room = if stream == 0 { 0 } else { TAPES };
        let tape = graph.blocks.iter().map(|block| Tape::bytes(block, tokens)).max().unwrap_or(1);
        (room / tape.max(1)).min(graph.blocks.len())
    }
}

/// The block of a teacher of `theirs` that stands for block `index` of a student of `ours`: the last for the last, others
/// evenly.
fn counterpart(index: usize, ours: usize, theirs: usize) -> usize {
    ((index + 1) * theirs).div_ceil(ours.max(1)).max(1) - 1
}

/// Values of a model: all, those of block linears, those of norms and biases.
fn counts(graph: &ModelGraph) -> (usize, usize, usize) {
    let table = graph.vocab * graph.hidden;
    let (mut all, mut linears, mut vectors) = (table, 0, 0);
    for block in graph.all_blocks() {
        let weights: usize = block.sites.iter().map(attar_ir::Site::weights).sum();
        let norms: usize = block.norms.iter().map(|norm| norm.width).sum();
        let biases = block.sites.iter().filter(|site| site.bias).map(|site| site.out_features);
        let heads = block.attention.map_or(0, |attention| 2 * attention.head_dim);
        vectors += norms + biases.sum::<usize>() + heads;
        if block.index < graph.blocks.len() {
            linears += weights;
        } else if !graph.tied {
            all += weights;
        }
    }
    (all + linears + vectors, linears, vectors)
}

/// Values of adapters of a rank.
fn factors(graph: &ModelGraph, rank: usize) -> usize {
    let sites = graph.blocks.iter().flat_map(|block: &Block| &block.sites);
    sites.map(|site| rank * (site.in_features + site.out_features)).sum()
}

/// Scales of the linears of the blocks, in groups of 32 at most.
fn scales(graph: &ModelGraph) -> usize {
    let sites = graph.blocks.iter().flat_map(|block: &Block| &block.sites);
    sites.map(|site| site.out_features * site.in_features.div_ceil(32)).sum()
}

impl ModelPass for Distill {
    fn name(&self) -> &'static str {
        "distill"
    }

    fn reshape(&self, graph: &ModelGraph) -> Result<Sizes, String> {
        Train::check(self, graph)?;
        Ok(graph.sizes())
    }

    fn describe(&self, graph: &ModelGraph) -> String {
        let (all, _, vectors) = counts(graph);
        let what = match self.options.train {
            What::All => format!("all {all} values"),
            What::Norms => format!("{vectors} values of norms and biases"),
            What::Scales => "the scales of all codes".to_owned(),
            What::Adapters => {
                let rank = self.options.rank;
                format!("{} values of adapters of rank {rank}", factors(graph, rank))
            }
        };
        let through = self
            .scheme
            .map_or_else(String::new, |scheme| format!(" through rounding to {}", scheme.label()));
        format!("trains {what}{through} by {}", self.loss())
    }

    fn cost(&self, graph: &ModelGraph, tokens: usize) -> Cost {
        // Windows of the model's context, for want of others.
        let windows = tokens.div_ceil(graph.context.max(1));
        let each = self.options.batch * self.options.accumulate * graph.context;
        let seen = (self.steps(windows) * each) as f64;
        let (all, ..) = counts(graph);
        let teacher = if self.learns() { 2.0 * all as f64 } else { 0.0 };
        let flops = seen * (6.0 * all as f64 + teacher);
        Cost { flops, peak_bytes: 0, scratch_bytes: 0 }
    }

    fn work(&self) -> Work<'_> {
        Work::Train(self)
    }
}

/// The loss of one batch.
struct BatchLoss<'a> {
    row: RowLoss,
    vocab: usize,
    hidden: usize,
    /// Weight of the distance of streams, over their number.
    streams: f32,
    /// Blocks at which they are compared, and what leaves the teacher's; the last block's is `theirs`.
    compared: &'a [usize],
    layers: usize,
    left: Vec<Vec<f32>>,
    /// Each token's successor in its window.
    next: Vec<Option<u32>>,
    /// Of the teacher, for the tokens of the batch: what leaves its last block.
    theirs: Vec<f32>,
    teacher: Option<(&'a Differentiable<'a>, BlockWeights<'a>, usize)>,
    space: &'a mut Space,
    normed: &'a mut Vec<f32>,
    logits: &'a mut Vec<f32>,
    /// One over the tokens of a step.
    scale: f32,
}

impl Objective for BatchLoss<'_> {
    fn logits(&mut self, first: usize, logits: &mut [f32]) -> f64 {
        let (vocab, rows) = (self.vocab, logits.len() / self.vocab);
        if let (Some((model, weights, width)), true) = (&self.teacher, self.row.text < 1.0) {
            let x = &self.theirs[first * width..(first + rows) * width];
            model.head_forward(weights, x, self.space, self.normed, self.logits);
        } else {
            self.logits.clear();
        }
        let (of, scale, theirs) = (self.row, self.scale, &*self.logits);
        let next = &self.next[first..first + rows];
        let losses: Vec<f64> = logits
            .par_chunks_mut(ROWS * vocab)
            .zip(next.par_chunks(ROWS))
            .enumerate()
            .map_init(Row::default, |room, (task, (logits, next))| {
                let rows = logits.chunks_mut(vocab).zip(next).enumerate();
                rows.map(|(row, (z, &next))| {
                    let at = (task * ROWS + row) * vocab;
                    of.apply(z, theirs.get(at..at + vocab), next, scale, room)
                })
                .sum()
            })
            .collect();
        losses.iter().sum::<f64>() * f64::from(scale)
    }

    fn hidden(&mut self, index: usize, output: &[f32], d: &mut [f32]) -> f64 {
        let Some(place) = self.compared.iter().position(|&block| block == index) else {
            return 0.0;
        };
        let theirs = if index + 1 == self.layers { &self.theirs } else { &self.left[place] };
        let (width, weight) = (self.hidden, self.streams * self.scale);
        let losses: Vec<f64> = d
            .par_chunks_mut(width)
            .zip(output.par_chunks(width))
            .zip(theirs.par_chunks(width))
            .map(|((d, x), y)| {
                let size = y.iter().map(|y| y * y).sum::<f32>().max(f32::MIN_POSITIVE);
                let mut distance = 0.0f32;
                for ((d, x), y) in d.iter_mut().zip(x).zip(y) {
                    let off = x - y;
                    distance += off * off;
                    *d += 2.0 * weight * off / size;
                }
                f64::from(distance / size)
            })
            .collect();
        losses.iter().sum::<f64>() * f64::from(weight)
    }
}

impl Train for Distill {
    fn teacher(&self) -> Option<&str> {
        self.options.teacher.as_deref()
    }

    fn peak_bytes(
        &self,
        graph: &ModelGraph,
        original: &ModelGraph,
        (tokens, context): (usize, usize),
        stream: usize,
    ) -> usize {
        let (all, linears, vectors) = counts(graph);
        let adapters = match self.options.train {
            What::Scales => scales(graph),
            _ => factors(graph, self.options.rank),
        };
        let rounded = self.scheme.is_some();
        let model = Learner::bytes(all, linears, vectors, adapters, self.trained(), rounded);
        let batch = self.options.batch * context;
        let step = StepMemory::bytes(graph, batch, Self::tapes(graph, batch, stream));
        let windows = 4 * tokens;
        let mut teacher = 0;
        if self.learns() {
            let taps = self.compared(graph.blocks.len()).len().max(1);
            let row = 4 * original.hidden * taps;
            let largest = original
                .blocks
                .iter()
                .map(|block| block.sites.iter().map(attar_ir::Site::weights).sum::<usize>());
            let block = 4 * largest.max().unwrap_or(0);
            let each = batch * self.options.accumulate;
            let held = row * tokens.min((stream.min(STREAM_IN_MEMORY) / row).max(each));
            let head = 4 * original.vocab * original.hidden;
            // Its head, as it lies and packed for products; its logits; a block or a batch at work; the stream, held
            // twice while it is taken over.
            teacher = 3 * head + (16 << 20) + block.max(row * batch) + 2 * held;
        }
        model + step + windows + teacher
    }

    fn state_bytes(&self, graph: &ModelGraph) -> usize {
        let (all, _, vectors) = counts(graph);
        let values = match self.options.train {
            What::All => all,
            What::Norms => vectors,
            What::Scales => scales(graph),
            What::Adapters => factors(graph, self.options.rank),
        };
        // A value and its two moments.
        12 * values
    }

    fn check(&self, graph: &ModelGraph) -> Result<(), String> {
        self.options.hidden_at.blocks(graph.blocks.len())?;
        if let Some(scheme) = self.scheme {
            for site in graph.blocks.iter().flat_map(|block| &block.sites) {
                if scheme.groups(site.in_features).is_none() {
                    return Err(format!(
                        "rounding.group_size {} does not divide the {} inputs of {}; choose one that does, or -1",
                        scheme.group_size(site.in_features),
                        site.in_features,
                        site.name
                    ));
                }
            }
        }
        if self.options.train == What::Adapters {
            let rank = self.options.rank;
            let sites = graph.blocks.iter().flat_map(|block| &block.sites);
            let least = sites.min_by_key(|site| site.in_features.min(site.out_features));
            if let Some(site) = least.filter(|s| rank > s.in_features.min(s.out_features)) {
                let full = site.in_features.min(site.out_features);
                return Err(format!(
                    "rank {rank} is more than the {full} of {}; choose less",
                    site.name
                ));
            }
        }
        Ok(())
    }

    fn trains_scales(&self) -> bool {
        self.options.train == What::Scales
    }

    fn matches_streams(&self) -> bool {
        self.options.hidden > 0.0
    }

    fn changes(&self, graph: &ModelGraph, tensor: &str) -> bool {
        let all = self.options.train == What::All;
        let vectors = matches!(self.options.train, What::All | What::Norms);
        if self.options.train == What::Scales {
            return false;
        }
        let of_block = |block: &Block| {
            let inner = block.index < graph.blocks.len();
            let site = |site: &attar_ir::Site| {
                let name = &site.name;
                let weight = (all || (inner && !vectors)) && tensor == format!("{name}.weight");
                weight || (vectors && site.bias && tensor == format!("{name}.bias"))
            };
            let norm = |norm: &attar_ir::Norm| vectors && norm.tensor == tensor;
            let heads = vectors
                && inner
                && ["q", "k"]
                    .iter()
                    .any(|part| tensor == format!("{}self_attn.{part}_norm.weight", block.prefix));
            block.sites.iter().any(site) || block.norms.iter().any(norm) || heads
        };
        (all && tensor == graph.embedding) || graph.all_blocks().any(of_block)
    }

    fn train(
        &self,
        context: &ModelContext<'_>,
        session: &dyn TrainSession,
    ) -> Result<TrainingReport, PassError> {
        let o = &self.options;
        let windows = session.windows();
        let (config, source) = session.student();
        let decoder = Decoder::read(config, source).map_err(|error| failed("student", error))?;
        let mut learner = Learner::read(
            &decoder,
            source,
            &|name| session.codes(name),
            self.trained(),
            self.scheme,
            context.seed,
        )?;
        let mut teacher = None;
        let layers = decoder.spec.layers;
        let compared = self.compared(layers);
        // Which of the teacher's taps each of them reads; two may read one.
        let mut places = Vec::new();
        if self.learns() {
            let (config, source) = session.teacher();
            let mut read = Teacher::read(config, source)?;
            let theirs = read.decoder.spec.layers;
            let of = |&block: &usize| counterpart(block, layers, theirs);
            let mut taps: Vec<usize> =
                compared.iter().map(of).filter(|tap| tap + 1 < theirs).collect();
            taps.dedup();
            places = compared
                .iter()
                .map(|block| taps.iter().position(|tap| *tap == of(block)))
                .collect();
            read.taps = taps;
            teacher = Some(read);
        }
        let steps = self.steps(windows.len());
        let schedule = Schedule {
            steps,
            warmup: ((steps as f64 * o.warmup).ceil() as usize).min(steps),
            decay: o.decay,
            floor: o.floor,
        };
        let adamw = AdamW { decay: o.weight_decay, ..AdamW::default() };
        let mut order = Order::new(windows.len(), o.batch * o.accumulate, context.seed);
        let mut state = State { every: steps.div_ceil(POINTS), ..State::default() };
        if let Some(saved) = session.saved()? {
            state = State::from_facts(&saved.facts, state.every);
            learner.restore(&*saved.list).map_err(|name| {
                failed(
                    "training",
                    format!("the saved state lacks {name}; remove the work directory"),
                )
            })?;
        }
        let longest = windows.iter().map(Vec::len).max().unwrap_or(1);
        let limit = session.stream_bytes();
        let blocks = Differentiable::new(&decoder, longest);
        let kept = Self::tapes(&decoder.graph, o.batch * longest, limit);
        let mut memory = StepMemory::new(kept);
        // The teacher's head has no positions.
        let their_decoder = teacher.as_ref().map(|teacher| teacher.decoder.clone());
        let their_head = their_decoder.as_ref().map(|decoder| Differentiable::new(decoder, 0));
        let (mut space, mut normed, mut logits) = (Space::default(), Vec::new(), Vec::new());
        let (begun, first) = (state.tokens, state.step);
        while state.step < steps {
            let step = state.step;
            let batch = order.batch(step);
            if let Some(teacher) = &mut teacher
                && batch.iter().any(|at| !teacher.streams.contains_key(at))
            {
                let wanted = ahead(&mut order, (step, steps), windows, teacher, limit);
                teacher.follow(&wanted, windows)?;
            }
            let tokens: usize = batch.iter().map(|&at| windows[at].len()).sum();
            learner.clear();
            let mut loss = 0.0;
            for part in batch.chunks(o.batch) {
                let of: Vec<&[u32]> = part.iter().map(|&at| windows[at].as_slice()).collect();
                let mut objective = BatchLoss {
                    row: RowLoss {
                        divergence: o.loss,
                        beta: o.beta,
                        temperature: o.temperature,
                        text: o.text,
                    },
                    vocab: decoder.spec.vocab,
                    hidden: decoder.spec.hidden,
                    layers,
                    streams: o.hidden / compared.len().max(1) as f32,
                    compared: &compared,
                    left: teacher.as_ref().map_or_else(Vec::new, |teacher| {
                        let last = teacher.taps.len();
                        let of = |(place, &block): (&Option<usize>, &usize)| {
                            let at = place.unwrap_or(last);
                            if block + 1 == layers {
                                // It is there already.
                                return Vec::new();
                            }
                            part.iter().flat_map(|w| &teacher.streams[w][at]).copied().collect()
                        };
                        places.iter().zip(&compared).map(of).collect()
                    }),
                    next: of
                        .iter()
                        .flat_map(|w| w[1..].iter().map(|&id| Some(id)).chain([None]))
                        .collect(),
                    theirs: teacher.as_ref().map_or_else(Vec::new, |teacher| {
                        let last = teacher.taps.len();
                        part.iter().flat_map(|at| &teacher.streams[at][last]).copied().collect()
                    }),
                    teacher: teacher.as_ref().zip(their_head.as_ref()).map(|(teacher, head)| {
                        let weights = BlockWeights {
                            linears: vec![teacher.head.as_slice()],
                            biases: vec![None],
                            norms: vec![teacher.norm.as_slice()],
                            qk_norm: None,
                        };
                        (head, weights, teacher.decoder.spec.hidden)
                    }),
                    space: &mut space,
                    normed: &mut normed,
                    logits: &mut logits,
                    scale: 1.0 / tokens as f32,
                };
                loss += training_step(
                    &decoder,
                    &blocks,
                    &mut learner,
                    &of,
                    &mut objective,
                    &mut memory,
                );
            }
            let rate = self.rate() * schedule.factor(step);
            let norm = learner.step(step + 1, rate, adamw, o.clip);
            if !loss.is_finite() || !norm.is_finite() {
                return Err(failed(
                    "training",
                    format!(
                        "step {step}: the loss is {loss}, its gradient's norm {norm}; lower `rate`"
                    ),
                ));
            }
            state.add(loss, tokens, steps);
            session.progress(TrainProgress {
                step: state.step,
                steps,
                done: state.step - first,
                loss,
                tokens: state.tokens - begun,
            });
            if state.step < steps && session.due() {
                session.save(state.to_facts(), &learner.state())?;
            }
        }
        let names: Vec<String> = learner.names().map(str::to_owned).collect();
        for name in names {
            let value = learner.value(&name).expect("it was named");
            session.write(&name, &value)?;
        }
        Ok(TrainingReport {
            loss: self.loss(),
            steps,
            tokens: state.tokens,
            trained: learner.trained(),
            curve: state.curve,
        })
    }
}

/// Windows of the steps to come whose streams fit: all of them, where all fit.
fn ahead(
    order: &mut Order,
    (step, steps): (usize, usize),
    windows: &[Vec<u32>],
    teacher: &Teacher<'_>,
    limit: usize,
) -> Vec<usize> {
    let streams = teacher.taps.len() + 1;
    let bytes = |at: usize| 4 * windows[at].len() * teacher.decoder.spec.hidden * streams;
    let mut wanted = std::collections::BTreeSet::new();
    let mut total = 0;
    for step in step..steps {
        let new: Vec<usize> =
            order.batch(step).into_iter().filter(|at| !wanted.contains(at)).collect();
        let more: usize = new.iter().map(|&at| bytes(at)).sum();
        if !wanted.is_empty() && total + more > limit.min(STREAM_IN_MEMORY) {
            break;
        }
        total += more;
        wanted.extend(new);
        if wanted.len() == windows.len() {
            break;
        }
    }
    wanted.into_iter().collect()
}

/// How far training is, beside what the learner holds.
#[derive(Debug, Clone, Default, PartialEq)]
struct State {
    /// Steps done.
    step: usize,
    tokens: usize,
    /// Steps per point of the curve.
    every: usize,
    /// Sum of the losses since the last point, and their number.
    sum: f64,
    count: usize,
    curve: Vec<(usize, f64)>,
}

impl State {
    fn add(&mut self, loss: f64, tokens: usize, steps: usize) {
        self.step += 1;
        self.tokens += tokens;
        self.sum += loss;
        self.count += 1;
        if self.count == self.every || self.step == steps {
            // Six decimals come back from JSON as they were.
            let mean = (self.sum / self.count as f64 * 1e6).round() / 1e6;
            self.curve.push((self.step, mean));
            (self.sum, self.count) = (0.0, 0);
        }
    }

    fn to_facts(&self) -> serde_json::Value {
        json!({
            "step": self.step, "tokens": self.tokens, "sum": self.sum.to_bits(), "count": self.count,
            "curve": self.curve,
        })
    }

    fn from_facts(facts: &serde_json::Value, every: usize) -> Self {
        let number = |key: &str| facts[key].as_u64().unwrap_or(0);
        let curve = serde_json::from_value(facts["curve"].clone()).unwrap_or_default();
        Self {
            step: number("step") as usize,
            tokens: number("tokens") as usize,
            every,
            sum: f64::from_bits(number("sum")),
            count: number("count") as usize,
            curve,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::counterpart;

    #[test]
    fn blocks_of_a_shorter_student_stand_for_the_teachers_evenly() {
        let of = |ours: usize, theirs: usize| -> Vec<usize> {
            (0..ours).map(|index| counterpart(index, ours, theirs)).collect()
        };
        assert_eq!(of(4, 4), [0, 1, 2, 3]);
        assert_eq!(of(3, 4), [1, 2, 3]);
        assert_eq!(of(2, 6), [2, 5]);
        assert_eq!(of(4, 2), [0, 0, 1, 1]);
    }
}
