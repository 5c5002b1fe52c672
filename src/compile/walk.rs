//! One variant's walk over the blocks. What lies in the work directory is taken from there; what does not is
//! computed, stored, and can be taken up again after a kill. Activations are brought to a block only when a
//! statistic of it (or of a later one) has to be computed: from the stored stream nearest to it, through the
//! blocks between as they are now known to be.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use attar_eval::report::{Phase, SiteEntry, Timings};
use attar_formats::{Checkpoint, Windows, stage::Stage};
use attar_ir::{
    Block, BlockState, BlockStats, BlockValues, InputStats, Needs, PassContext, Teacher, Upstream,
    plan::Plan, recipe::Recipe,
};
use attar_model::{
    BlockRun, Decoder, Lesson, Spill, Stream, embed, observe_block, sweep_gradients,
};
use attar_tensor::{DType, Mat, QuantScheme, Tensor, TensorHeader};
use serde_json::json;

use super::{
    keys::{BlockKeys, Ground, RoundKeys, Statistic, Unit},
    scratch_of,
};
use crate::{Error, importance::Importances, measure, progress, trace::Trace};

/// Activations on their way through the blocks.
#[derive(Default)]
struct Lane {
    /// Block that the stream enters next.
    at: usize,
    stream: Option<Stream>,
    /// Key of the stored stream that a killed run would begin from.
    saved: Option<String>,
}

pub(super) struct Walk<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) decoder: &'a Decoder,
    pub(super) imatrix: Option<&'a Importances>,
    pub(super) seed: u64,
    /// Passes on the whole model before the steps.
    pub(super) first: usize,
    pub(super) plan: &'a Plan,
    /// The variant's own chain of steps on blocks.
    pub(super) recipe: &'a Recipe,
    pub(super) windows: Option<&'a Windows>,
    pub(super) stage: Option<&'a Stage>,
    pub(super) ground: &'a Ground,
    pub(super) blocks: &'a [BlockKeys],
    /// Streams are stored once per so much time.
    pub(super) checkpoint_every: Duration,
    pub(super) trace: &'a Trace,
    pub(super) time: &'a mut Timings,
    pub(super) sites: Vec<SiteEntry>,
    lanes: [Lane; 2],
    stored: Instant,
    /// Where activations and sums go that do not fit.
    spill: Spill,
    /// What steps found in all blocks before any was worked on, by step.
    surveys: BTreeMap<usize, Vec<Vec<f64>>>,
}

const fn lane_of(upstream: Upstream) -> usize {
    match upstream {
        // A file of statistics is of the original model too; no activations belong to it.
        Upstream::Original | Upstream::Given => 0,
        Upstream::Compressed => 1,
    }
}

/// What tells the walk from its surroundings.
pub(super) struct Surroundings<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) decoder: &'a Decoder,
    pub(super) imatrix: Option<&'a Importances>,
    pub(super) seed: u64,
    pub(super) first: usize,
    pub(super) plan: &'a Plan,
    pub(super) recipe: &'a Recipe,
    pub(super) windows: Option<&'a Windows>,
    pub(super) stage: Option<&'a Stage>,
    pub(super) ground: &'a Ground,
    pub(super) blocks: &'a [BlockKeys],
    pub(super) checkpoint_every: Duration,
}

impl<'a> Walk<'a> {
    pub(super) fn new(around: Surroundings<'a>, trace: &'a Trace, time: &'a mut Timings) -> Self {
        let Surroundings {
            checkpoint,
            decoder,
            imatrix,
            seed,
            first,
            plan,
            recipe,
            windows,
            stage,
            ground,
            blocks,
            checkpoint_every,
        } = around;
        Self {
            checkpoint,
            decoder,
            imatrix,
            seed,
            first,
            plan,
            recipe,
            windows,
            stage,
            ground,
            blocks,
            checkpoint_every,
            trace,
            time,
            sites: Vec::new(),
            lanes: Default::default(),
            stored: Instant::now(),
            spill: measure::spill(&plan.limits, &scratch_of(stage)),
            surveys: BTreeMap::new(),
        }
    }

    /// Takes the numbers of all blocks that steps with work to do ask for: one forward of the original model, and a sweep
    /// back through it where gradients are asked for.
    pub(super) fn survey(&mut self) -> Result<(), Error> {
        let (decoder, checkpoint, plan) = (self.decoder, self.checkpoint, self.plan);
        let works = |step: usize| {
            let mut units =
                self.blocks.iter().flat_map(|block| &block.rounds).flat_map(|round| &round.units);
            units.any(|unit| unit.step == step && !unit.cached)
        };
        let steps: Vec<(usize, Needs)> = (0..plan.steps.len())
            .filter_map(|step| Some((step, plan.passes[step].surveys()?)))
            .filter(|(step, _)| works(*step))
            .collect();
        let (back, steps): (Vec<_>, Vec<_>) =
            steps.into_iter().partition(|(_, needs)| needs.contains(Needs::GRADIENTS));
        if !back.is_empty() {
            let windows = self.windows.ok_or("the plan counted on data")?;
            let begun = self.trace.begin(Phase::Calibrate, "gradients");
            sweep(decoder, checkpoint, windows, &self.spill, &mut |block, state, stats| {
                for &(step, _) in &back {
                    let targets = &plan.steps[step].targets[block.index];
                    let numbers = plan.passes[step].survey(block, targets, state, stats);
                    let all = self.surveys.entry(step).or_default();
                    all.resize(decoder.graph.blocks.len(), Vec::new());
                    all[block.index] = numbers;
                }
                Ok(())
            })?;
            self.time.statistics += self.trace.end(Phase::Calibrate, "gradients", begun);
        }
        if steps.is_empty() {
            return Ok(());
        }
        let needs = steps.iter().fold(Needs::empty(), |all, (_, needs)| all | *needs);
        let lane = lane_of(Upstream::Original);
        for block in &decoder.graph.blocks {
            self.bring(Upstream::Original, block.index)?;
            let state = self.load(block)?;
            let mut stream = self.lanes[lane].stream.take().ok_or("the plan counted on data")?;
            let spill = Some(self.spill.clone());
            let mut run = BlockRun::begin(decoder, block.index, checkpoint, &mut stream, spill)?;
            let mut stats = BlockStats::empty(block.inputs.len());
            for input in 0..block.inputs.len() {
                let observing = || run.observe(input, &state, needs);
                let found = self.trace.run(Phase::Calibrate, name_of(block), observing).0?;
                stats.inputs[input] = Some(found);
            }
            let timing =
                self.trace.run(Phase::Calibrate, name_of(block), || run.finish(&state)).0?;
            self.time.forward += timing.forward.as_secs_f64();
            self.time.statistics += timing.statistics.as_secs_f64();
            self.lanes[lane].stream = Some(stream);
            self.lanes[lane].at = block.index + 1;
            for &(step, _) in &steps {
                let targets = &plan.steps[step].targets[block.index];
                let number = plan.passes[step].survey(block, targets, &state, &stats);
                self.surveys.entry(step).or_default().push(number);
            }
        }
        self.lanes[lane] = Lane::default();
        Ok(())
    }

    /// The block after all its steps.
    pub(super) fn run_block(&mut self, block: &Block) -> Result<BlockState, Error> {
        let keys = &self.blocks[block.index];
        if keys.observes(Upstream::Original) {
            self.observe_original(block)?;
        }
        let mut state = self.load(block)?;
        for round in &keys.rounds {
            self.run_round(block, round, &mut state)?;
        }
        Ok(state)
    }

    fn load(&mut self, block: &Block) -> Result<BlockState, Error> {
        let what = name_of(block);
        let (decoder, checkpoint) = (self.decoder, self.checkpoint);
        let (state, seconds) =
            self.trace.run(Phase::Read, what, || decoder.load_block(block.index, checkpoint));
        self.time.read += seconds;
        Ok(state?)
    }

    fn run_round(
        &mut self,
        block: &Block,
        round: &RoundKeys,
        state: &mut BlockState,
    ) -> Result<(), Error> {
        if round.staged && round.observes_any() {
            return self.run_staged(block, round, state);
        }
        let mut observed = BlockStats::empty(block.inputs.len());
        if round.upstream == Upstream::Compressed && round.observes_any() {
            self.bring(Upstream::Compressed, block.index)?;
            observed = self.observe_whole(block, round, state)?;
        }
        let streams = if round.teaches() { Some(self.streams(block, round)?) } else { None };
        // One group of units after the other: those of one input read the same statistic.
        let groups: Vec<Option<usize>> =
            if round.whole { vec![None] } else { (0..block.inputs.len()).map(Some).collect() };
        for group in groups {
            let mut stats = BlockStats::empty(block.inputs.len());
            for (input, statistic) in round.statistics.iter().enumerate() {
                let Some(statistic) = statistic else { continue };
                if group.is_some_and(|own| own != input) || !round.reads(input) {
                    continue;
                }
                stats.inputs[input] = Some(match observed.inputs[input].take() {
                    Some(stats) => stats,
                    None => self.load_statistic(block, input, statistic, round, state)?,
                });
            }
            for unit in round.units.iter().filter(|unit| unit.input == group) {
                if unit.cached {
                    self.take_back(block, unit, state)?;
                } else {
                    self.apply(block, round, unit, state, &mut stats, streams.as_ref())?;
                }
            }
        }
        if let Some((inputs, targets)) = streams {
            self.put_back(Upstream::Original, block.index + 1, targets)?;
            if round.upstream == Upstream::Compressed {
                self.put_back(Upstream::Compressed, block.index, inputs)?;
            }
        }
        Ok(())
    }

    /// What enters a block that is to learn, and what the original block makes of the original activations.
    fn streams(&mut self, block: &Block, round: &RoundKeys) -> Result<(Stream, Stream), Error> {
        const COUNTED: &str = "the plan counted on calibration data";
        let lane = lane_of(Upstream::Original);
        // Behind the block is where targets are; inputs are before it.
        let farthest = block.index + usize::from(round.upstream == Upstream::Compressed);
        if self.lanes[lane].at > farthest {
            // Statistics of the original block were taken first, or another step learned.
            self.lanes[lane] = Lane::default();
        }
        let inputs = if round.upstream == Upstream::Compressed {
            self.bring(Upstream::Compressed, block.index)?;
            self.lanes[lane_of(Upstream::Compressed)].stream.take()
        } else {
            self.bring(Upstream::Original, block.index)?;
            let stream = self.lanes[lane].stream.as_ref();
            stream.map(|stream| stream.copy(&self.spill)).transpose()?
        };
        self.bring(Upstream::Original, block.index + 1)?;
        let targets = self.lanes[lane].stream.take();
        Ok((inputs.ok_or(COUNTED)?, targets.ok_or(COUNTED)?))
    }

    /// Statistics of every input with the weights as they stand; kept where a later run can use them.
    fn observe_whole(
        &mut self,
        block: &Block,
        round: &RoundKeys,
        state: &BlockState,
    ) -> Result<BlockStats, Error> {
        let needs = round
            .statistics
            .iter()
            .flatten()
            .fold(Needs::empty(), |all, statistic| all | statistic.needs);
        let (decoder, checkpoint) = (self.decoder, self.checkpoint);
        let stream = self.lanes[lane_of(Upstream::Compressed)]
            .stream
            .as_ref()
            .ok_or("the plan counted on calibration data")?;
        let spill = self.spill.clone();
        let what = name_of(block);
        let (found, _) = self.trace.run(Phase::Calibrate, what, || {
            observe_block(decoder, block.index, checkpoint, state, stream, needs, Some(&spill))
        });
        let (stats, timing) = found?;
        self.time.forward += timing.forward.as_secs_f64();
        self.time.statistics += timing.statistics.as_secs_f64();
        for (input, statistic) in round.statistics.iter().enumerate() {
            if let (Some(statistic), Some(stats)) = (statistic, &stats.inputs[input]) {
                self.keep_statistic(block, input, statistic, stats)?;
            }
        }
        Ok(stats)
    }

    /// Stage by stage: each stage's statistics are those of what the former ones put out.
    fn run_staged(
        &mut self,
        block: &Block,
        round: &RoundKeys,
        state: &mut BlockState,
    ) -> Result<(), Error> {
        self.bring(Upstream::Compressed, block.index)?;
        let lane = lane_of(Upstream::Compressed);
        let (decoder, checkpoint) = (self.decoder, self.checkpoint);
        let what = name_of(block);
        let mut stream = self.lanes[lane].stream.take().ok_or("the plan counted on data")?;
        let mut run = BlockRun::begin(
            decoder,
            block.index,
            checkpoint,
            &mut stream,
            Some(self.spill.clone()),
        )?;
        for input in 0..block.inputs.len() {
            let mut stats = BlockStats::empty(block.inputs.len());
            if let (true, Some(statistic)) = (round.reads(input), &round.statistics[input]) {
                stats.inputs[input] = Some(if statistic.cached {
                    self.load_statistic(block, input, statistic, round, state)?
                } else {
                    let observing = || run.observe(input, state, statistic.needs);
                    let stats = self.trace.run(Phase::Calibrate, what, observing).0?;
                    self.keep_statistic(block, input, statistic, &stats)?;
                    stats
                });
            }
            for unit in round.units.iter().filter(|unit| unit.input == Some(input)) {
                if unit.cached {
                    self.take_back(block, unit, state)?;
                } else {
                    self.apply(block, round, unit, state, &mut stats, None)?;
                }
            }
        }
        if self.end(Upstream::Compressed, block, run, state)? {
            self.put_back(Upstream::Compressed, block.index + 1, stream)?;
        }
        Ok(())
    }

    /// Ends a run through a block: when a later block reads what this one puts out, the stream is carried
    /// there, and true is returned; else it stands somewhere inside the block, of no use to anybody.
    fn end(
        &mut self,
        upstream: Upstream,
        block: &Block,
        run: BlockRun<'_>,
        state: &BlockState,
    ) -> Result<bool, Error> {
        let read = self.later(upstream, block.index);
        let timing = if read {
            self.trace.run(Phase::Calibrate, name_of(block), || run.finish(state)).0?
        } else {
            run.timing
        };
        self.time.forward += timing.forward.as_secs_f64();
        self.time.statistics += timing.statistics.as_secs_f64();
        Ok(read)
    }

    /// Gives a lane its stream back, at the entrance of block `at`.
    fn put_back(&mut self, upstream: Upstream, at: usize, stream: Stream) -> Result<(), Error> {
        let lane = &mut self.lanes[lane_of(upstream)];
        lane.stream = Some(stream);
        lane.at = at;
        self.keep_stream(upstream)
    }

    /// True when a block after this one needs activations of this upstream.
    fn later(&self, upstream: Upstream, block: usize) -> bool {
        self.blocks[block + 1..].iter().any(|keys| keys.needs(upstream))
    }

    /// Statistics of the original block, one input after the other into the work directory.
    fn observe_original(&mut self, block: &Block) -> Result<(), Error> {
        self.bring(Upstream::Original, block.index)?;
        let keys = &self.blocks[block.index];
        let state = self.load(block)?;
        let (decoder, checkpoint) = (self.decoder, self.checkpoint);
        let lane = lane_of(Upstream::Original);
        let what = name_of(block);
        let mut stream = self.lanes[lane].stream.take().ok_or("the plan counted on data")?;
        let mut run = BlockRun::begin(
            decoder,
            block.index,
            checkpoint,
            &mut stream,
            Some(self.spill.clone()),
        )?;
        for input in 0..block.inputs.len() {
            let wanted = keys
                .rounds
                .iter()
                .filter(|round| round.upstream == Upstream::Original && round.observes(input))
                .find_map(|round| round.statistics[input].as_ref());
            if let Some(statistic) = wanted {
                let observing = || run.observe(input, &state, statistic.needs);
                let stats = self.trace.run(Phase::Calibrate, what, observing).0?;
                self.keep_statistic(block, input, statistic, &stats)?;
            }
        }
        if self.end(Upstream::Original, block, run, &state)? {
            self.put_back(Upstream::Original, block.index + 1, stream)?;
        }
        Ok(())
    }

    /// Brings a stream to the entrance of a block.
    fn bring(&mut self, upstream: Upstream, to: usize) -> Result<(), Error> {
        let lane = lane_of(upstream);
        if self.lanes[lane].stream.is_none() {
            self.begin(upstream, to)?;
        }
        while self.lanes[lane].at < to {
            let (decoder, checkpoint) = (self.decoder, self.checkpoint);
            let at = self.lanes[lane].at;
            let block = decoder.block(at);
            let mut state = self.load(block)?;
            if upstream == Upstream::Compressed {
                for round in &self.blocks[at].rounds {
                    for unit in &round.units {
                        self.import(block, unit, &mut state)?;
                    }
                }
            }
            let spill = self.spill.clone();
            let Some(stream) = &mut self.lanes[lane].stream else { break };
            let forward =
                || BlockRun::begin(decoder, at, checkpoint, stream, Some(spill))?.finish(&state);
            let timing = self.trace.run(Phase::Calibrate, name_of(block), forward).0?;
            self.time.forward += timing.forward.as_secs_f64();
            self.lanes[lane].at = at + 1;
        }
        Ok(())
    }

    /// The stored stream nearest before a block, else the embedded windows.
    fn begin(&mut self, upstream: Upstream, to: usize) -> Result<(), Error> {
        let (decoder, checkpoint) = (self.decoder, self.checkpoint);
        let lane = lane_of(upstream);
        let windows = self.windows.ok_or("the plan counted on calibration data")?;
        let lengths: Vec<usize> = windows.ids.iter().map(Vec::len).collect();
        let spill = self.spill.clone();
        let mut stream = Stream::new(&lengths, decoder.spec.hidden, Some(&spill))?;
        if let Some(stage) = self.stage {
            for at in (1..=to).rev() {
                let key = self.ground.stream(self.entering(upstream, at));
                if !stage.contains(&key) {
                    continue;
                }
                let Some((_, file)) = stage.open_object(&key)? else { continue };
                let begun = self.trace.begin(Phase::Store, "activations");
                let mut row = vec![0.0f32; 0];
                for (window, &length) in lengths.iter().enumerate() {
                    let name = format!("window.{window}");
                    let view = file.view(&name).ok_or_else(|| format!("{name} is missing"))?;
                    row.resize(length * decoder.spec.hidden, 0.0);
                    view.copy_to_f32(0, &mut row)?;
                    file.release(&name);
                    stream.write(window, &row)?;
                }
                self.time.store += self.trace.end(Phase::Store, "activations", begun);
                self.lanes[lane] = Lane { at, stream: Some(stream), saved: Some(key) };
                return Ok(());
            }
        }
        let begun = self.trace.begin(Phase::Read, "embedding");
        for (at, ids) in windows.ids.iter().enumerate() {
            stream.write(at, &embed(decoder, checkpoint, ids)?)?;
        }
        attar_tensor::TensorSource::release(checkpoint, &decoder.graph.embedding);
        self.time.read += self.trace.end(Phase::Read, "embedding", begun);
        self.lanes[lane] = Lane { at: 0, stream: Some(stream), saved: None };
        Ok(())
    }

    /// Key of the activations that enter a block.
    fn entering(&self, upstream: Upstream, block: usize) -> &str {
        match upstream {
            Upstream::Original | Upstream::Given => &self.blocks[block].original,
            Upstream::Compressed => &self.blocks[block].compressed,
        }
    }

    /// Stores the stream when enough work would be lost with it, and takes the former one away.
    fn keep_stream(&mut self, upstream: Upstream) -> Result<(), Error> {
        let Some(stage) = self.stage else { return Ok(()) };
        if self.stored.elapsed() < self.checkpoint_every {
            return Ok(());
        }
        let lane = lane_of(upstream);
        let at = self.lanes[lane].at;
        let key = self.ground.stream(self.entering(upstream, at));
        let Some(stream) = &self.lanes[lane].stream else { return Ok(()) };
        let width = stream.width();
        let headers = stream
            .lengths()
            .iter()
            .enumerate()
            .map(|(window, &length)| TensorHeader {
                name: format!("window.{window}"),
                dtype: DType::F32,
                shape: vec![length, width],
            })
            .collect();
        let begun = self.trace.begin(Phase::Store, "activations");
        stage.put_with(
            &key,
            "stream",
            &format!("activations that enter block {at}"),
            json!(null),
            headers,
            |writer| {
                let mut values = Vec::new();
                for window in 0..stream.windows() {
                    stream.read_into(window, &mut values).map_err(|error| error.to_string())?;
                    writer
                        .write_part(&format!("window.{window}"), 0, bytemuck::cast_slice(&values))
                        .map_err(|error| error.to_string())?;
                }
                Ok(())
            },
        )?;
        if let Some(old) = self.lanes[lane].saved.replace(key) {
            stage.remove(&old)?;
        }
        self.time.store += self.trace.end(Phase::Store, "activations", begun);
        self.stored = Instant::now();
        Ok(())
    }

    /// Gives back the memory of all streams; nothing more is observed.
    pub(super) fn drop_streams(&mut self) {
        for lane in &mut self.lanes {
            lane.stream = None;
        }
    }

    /// Takes the stored streams away: the walk is over.
    pub(super) fn finish(mut self) -> Result<Vec<SiteEntry>, Error> {
        if let Some(stage) = self.stage {
            for lane in &mut self.lanes {
                if let Some(key) = lane.saved.take() {
                    stage.remove(&key)?;
                }
            }
        }
        Ok(self.sites)
    }

    fn keep_statistic(
        &mut self,
        block: &Block,
        input: usize,
        statistic: &Statistic,
        stats: &InputStats,
    ) -> Result<(), Error> {
        let (Some(stage), true) = (self.stage, statistic.keep) else { return Ok(()) };
        let label = format!("{}, {}", name_of(block), block.inputs[input].name);
        let begun = self.trace.begin(Phase::Store, name_of(block));
        put_statistic(stage, &statistic.key, &label, stats)?;
        self.time.store += self.trace.end(Phase::Store, name_of(block), begun);
        Ok(())
    }

    fn load_statistic(
        &mut self,
        block: &Block,
        input: usize,
        statistic: &Statistic,
        round: &RoundKeys,
        state: &BlockState,
    ) -> Result<InputStats, Error> {
        let mut stats = if round.upstream == Upstream::Given {
            let imatrix = self.imatrix.ok_or("the plan counted on importances")?;
            imatrix.stats(block, input)?
        } else {
            let begun = self.trace.begin(Phase::Store, name_of(block));
            let stage = self.stage.ok_or("statistics are read from a work directory")?;
            let stats = get_statistic(stage, &statistic.key)?;
            self.time.store += self.trace.end(Phase::Store, name_of(block), begun);
            stats
        };
        // The original's statistics follow what earlier steps folded into its neighbours.
        if round.upstream != Upstream::Compressed
            && let Some(Some(scale)) = state.input_scale.get(input)
        {
            stats.fold(scale);
        }
        Ok(stats)
    }

    /// Applies one step to one stage (or the whole block), and stores what came out.
    fn apply(
        &mut self,
        block: &Block,
        round: &RoundKeys,
        unit: &Unit,
        state: &mut BlockState,
        stats: &mut BlockStats,
        streams: Option<&(Stream, Stream)>,
    ) -> Result<(), Error> {
        let (decoder, checkpoint) = (self.decoder, self.checkpoint);
        let logits = self.plan.passes[unit.step].training().logits;
        let last = block.index + 1 == decoder.spec.layers;
        let head = if streams.is_some() && last && logits {
            Some(BlockValues::of(&self.load(&decoder.graph.epilogue)?))
        } else {
            None
        };
        let scratch = scratch_of(self.stage);
        let original = if self.plan.passes[unit.step].reads_original() {
            self.originals(block, unit, state)?
        } else {
            Vec::new()
        };
        let context = PassContext {
            block,
            original: &original,
            seed: self.seed,
            survey: self.surveys.get(&unit.step).map_or(&[], Vec::as_slice),
            scratch: self.plan.limits.factor_on_scratch.then_some(&scratch),
        };
        let what = name_of(block);
        let pass = &self.plan.passes[unit.step];
        let lesson = streams
            .map(|(inputs, targets)| {
                Lesson::new(decoder, block.index, checkpoint, inputs, targets, head)
            })
            .transpose()?;
        let trace = self.trace;
        let (report, seconds) = trace.run(Phase::Solve, what, || match &lesson {
            Some(lesson) => {
                let progress = |progress| trace.progress(what, progress);
                let teacher = Teacher { function: lesson, progress: &progress };
                pass.learn(&context, &unit.targets, state, stats, &teacher)
            }
            None => pass.apply(&context, &unit.targets, state, stats),
        });
        self.time.solve += seconds;
        let mut entries = Vec::new();
        for result in report?.sites {
            let at = block.sites.iter().position(|site| site.name == result.site);
            let scheme = at.and_then(|at| state.linears[at].weight.scheme());
            let statistic = at.and_then(|at| round.statistics[block.input_of(at)].as_ref());
            entries.push(SiteEntry {
                result,
                scheme: scheme.map(QuantScheme::label),
                bits: scheme.map(|scheme| scheme.bits),
                seconds,
                step: self.recipe.steps[unit.step].label(self.first + unit.step),
                statistics: statistic.map(|statistic| statistic.key.clone()),
            });
        }
        if let Some(stage) = self.stage {
            let sites: Vec<usize> = unit.targets.iter().map(|target| target.site).collect();
            let whole = unit.input.is_none();
            let all: Vec<usize> = (0..block.sites.len())
                .filter(|at| state.weight_changed[*at] || sites.contains(at))
                .collect();
            let begun = self.trace.begin(Phase::Store, what);
            let schemes: Vec<Option<QuantScheme>> =
                state.linears.iter().map(|linear| linear.weight.scheme()).collect();
            let label = format!("{what}, {}", self.plan.steps[unit.step].pass);
            stage.put(
                &unit.key,
                "result",
                &label,
                json!({"sites": entries, "schemes": schemes}),
                &state.export(if whole { &all } else { &sites }, whole),
            )?;
            self.time.store += self.trace.end(Phase::Store, what, begun);
        }
        self.sites.extend(entries);
        Ok(())
    }

    /// The float weights that a unit's targets had in the checkpoint, with the scales that were folded around them.
    fn originals(
        &mut self,
        block: &Block,
        unit: &Unit,
        state: &BlockState,
    ) -> Result<Vec<Option<Mat>>, Error> {
        let begun = self.trace.begin(Phase::Read, name_of(block));
        let mut found = vec![None; block.sites.len()];
        for target in &unit.targets {
            let mut weight =
                self.decoder.load_weight(&block.sites[target.site], self.checkpoint)?;
            state.follow_folds(block, target.site, &mut weight);
            found[target.site] = Some(weight);
        }
        self.time.read += self.trace.end(Phase::Read, name_of(block), begun);
        Ok(found)
    }

    /// Takes a stored result back, and its lines of the report.
    fn take_back(
        &mut self,
        block: &Block,
        unit: &Unit,
        state: &mut BlockState,
    ) -> Result<(), Error> {
        let facts = self.import(block, unit, state)?;
        let mut entries: Vec<SiteEntry> = serde_json::from_value(facts["sites"].clone())?;
        for entry in &mut entries {
            // The same work may stand elsewhere in another recipe.
            entry.step = self.recipe.steps[unit.step].label(self.first + unit.step);
        }
        self.sites.extend(entries);
        Ok(())
    }

    fn import(
        &mut self,
        block: &Block,
        unit: &Unit,
        state: &mut BlockState,
    ) -> Result<serde_json::Value, Error> {
        let begun = self.trace.begin(Phase::Store, name_of(block));
        let stage = self.stage.ok_or("results are read from a work directory")?;
        let object = stage.get(&unit.key)?.ok_or_else(|| {
            format!("{}: object {} has just gone; run again", stage.root().display(), unit.key)
        })?;
        let schemes: Vec<Option<QuantScheme>> =
            serde_json::from_value(object.info.facts["schemes"].clone())?;
        state.import(&object.tensors, &schemes).map_err(|reason| {
            format!("{}: object {}: {reason}", stage.root().display(), unit.key)
        })?;
        self.time.store += self.trace.end(Phase::Store, name_of(block), begun);
        Ok(object.info.facts)
    }
}

/// Hands every decoder block, the last one first, to `visit` with what the next-token loss says of its weights
/// ([`BlockStats::gradients`]).
pub(super) fn sweep(
    decoder: &Decoder,
    checkpoint: &Checkpoint,
    windows: &Windows,
    spill: &Spill,
    visit: &mut dyn FnMut(&Block, &BlockState, &BlockStats) -> Result<(), Error>,
) -> Result<(), Error> {
    let bar = progress::bar(decoder.graph.blocks.len(), "gradients");
    sweep_gradients(decoder, checkpoint, &windows.ids, Some(spill), &mut |block, state, found| {
        let stats = BlockStats { gradients: Some(found), ..BlockStats::empty(block.inputs.len()) };
        bar.inc(1);
        visit(block, state, &stats)
    })?;
    bar.finish_and_clear();
    Ok(())
}

/// `model.layers.3`, or `head`.
pub(super) fn name_of(block: &Block) -> &str {
    if block.attention.is_none() { "head" } else { block.prefix.trim_end_matches('.') }
}

/// Stores a statistic: the Hessian as its lower triangle, row by row.
fn put_statistic(stage: &Stage, key: &str, label: &str, stats: &InputStats) -> Result<(), Error> {
    let vector =
        |name: &str, dtype, count| TensorHeader { name: name.into(), dtype, shape: vec![count] };
    let mut headers = Vec::new();
    if let Some(h) = &stats.hessian {
        let n = h.nrows();
        headers.push(vector("hessian", DType::F32, n * (n + 1) / 2));
    }
    for (name, values) in [("abs_max", &stats.abs_max), ("abs_mean", &stats.abs_mean)] {
        if let Some(values) = values {
            headers.push(vector(name, DType::F32, values.len()));
        }
    }
    if let Some(values) = &stats.square_sum {
        headers.push(vector("square_sum", DType::F64, values.len()));
    }
    let facts = json!({"tokens": stats.tokens, "width": stats.hessian.as_ref().map(Mat::nrows)});
    stage.put_with(key, "statistic", label, facts, headers, |writer| {
        let mut put = |name: &str, offset: u64, bytes: &[u8]| {
            writer.write_part(name, offset, bytes).map_err(|error| error.to_string())
        };
        if let Some(h) = &stats.hessian {
            let values = h.as_slice().ok_or("the Hessian is in standard layout")?;
            let mut offset = 0;
            for (i, row) in values.chunks(h.ncols()).enumerate() {
                put("hessian", offset, bytemuck::cast_slice(&row[..=i]))?;
                offset += 4 * (i as u64 + 1);
            }
        }
        for (name, values) in [("abs_max", &stats.abs_max), ("abs_mean", &stats.abs_mean)] {
            if let Some(values) = values {
                put(name, 0, bytemuck::cast_slice(values))?;
            }
        }
        if let Some(values) = &stats.square_sum {
            put("square_sum", 0, bytemuck::cast_slice(values))?;
        }
        Ok(())
    })?;
    Ok(())
}

fn get_statistic(stage: &Stage, key: &str) -> Result<InputStats, Error> {
    let gone = || format!("{}: object {key} has just gone; run again", stage.root().display());
    let (info, file) = stage.open_object(key)?.ok_or_else(gone)?;
    let tokens = info.facts["tokens"].as_u64().ok_or_else(gone)? as usize;
    let mut stats = InputStats { tokens, ..InputStats::default() };
    let floats = |name: &str| -> Result<Option<Vec<f32>>, Error> {
        file.view(name).map(|view| Ok(view.to_f32()?)).transpose()
    };
    if let (Some(view), Some(n)) = (file.view("hessian"), info.facts["width"].as_u64()) {
        let n = n as usize;
        let mut h = Mat::zeros((n, n));
        let values = h.as_slice_mut().ok_or("a fresh matrix is in standard layout")?;
        let mut start = 0;
        for i in 0..n {
            view.copy_to_f32(start, &mut values[i * n..=i * n + i])?;
            start += i + 1;
        }
        for i in 0..n {
            for j in 0..i {
                values[j * n + i] = values[i * n + j];
            }
        }
        file.release("hessian");
        stats.hessian = Some(h);
    }
    stats.abs_max = floats("abs_max")?;
    stats.abs_mean = floats("abs_mean")?;
    if let Some(view) = file.view("square_sum") {
        let tensor: Tensor = view.to_tensor();
        let number = |b: &[u8]| f64::from_le_bytes(b.try_into().unwrap_or_default());
        stats.square_sum = Some(tensor.bytes().chunks_exact(8).map(number).collect());
    }
    Ok(stats)
}
