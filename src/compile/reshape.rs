//! Passes on the whole model: each reads a checkpoint and leaves the next one in the work directory, weights in
//! the dtype of the source where they are only moved, in f32 where they were computed. What comes behind
//! (further such passes, the walk over the blocks, the artifact) reads that one. Its name is the hash of
//! everything it depends on, so it is found again by a run that was killed later, and by variants.

use std::{collections::BTreeSet, path::Path, time::Duration};

use attar_eval::{
    Evaluator, Score,
    report::{Phase, Timings},
};
use attar_formats::{Checkpoint, Windows, safetensors::SafetensorsWriter, stage::Stage};
use attar_ir::{
    Block, BlockState, BlockStats, Choose, Cut, CutBlocks, Dim, Limits, Member, ModelContext,
    ModelEntry, PassError, Selection, Side, Slopes, Survey, Transform, Work,
    model_pass::reshaped_headers,
    plan::{ModelStep, PIECE_ELEMENTS, PlanError},
    recipe::{AnyPass, Recipe},
};
use attar_model::{
    BlockOps, BlockRun, Decoder, Spill, Stream, embed, final_logits, loss_slopes, run_block,
    spec::resized,
};
use attar_tensor::{
    DType, Mat, SourceError, Tensor, TensorHeader, TensorSource, TensorView, linalg::dot,
};
use serde_json::{Value, json};

use super::{keys, scratch_of, train};
use crate::{Error, measure, progress, trace::Trace};

/// A model that is not there yet: the headers of its tensors.
#[derive(Debug)]
struct Promised(Vec<TensorHeader>);

impl TensorSource for Promised {
    fn headers(&self) -> &[TensorHeader] {
        &self.0
    }

    fn read(&self, name: &str) -> Result<TensorView<'_>, SourceError> {
        let place = "a model that is still to be made".to_owned();
        Err(SourceError::Missing { name: name.to_owned(), place })
    }
}

/// What the steps on blocks of a variant begin from.
#[derive(Debug, Clone)]
pub(crate) struct Base {
    /// The model that the steps on blocks read; dtypes are those of the source.
    pub(crate) decoder: Decoder,
    /// Its config.json, where it can be told beforehand.
    pub(crate) config: Value,
    /// Its tensors, in the dtypes in which artifacts keep them.
    pub(crate) headers: Vec<TensorHeader>,
    /// The steps on blocks, as a recipe of their own.
    pub(crate) recipe: Recipe,
}

impl Base {
    /// Follows the sizes of the model through the passes on it as a whole, up to the steps on blocks.
    ///
    /// # Errors
    /// Those of the plan: what cannot be reshaped, and passes on the whole model behind others. The outer
    /// error is a config.json that cannot say what is left.
    pub(super) fn of(
        checkpoint: &Checkpoint,
        decoder: &Decoder,
        (recipe, numbers): (&Recipe, &[usize]),
        passes: Vec<AnyPass>,
        folder: &Path,
    ) -> Result<Result<Steps, Vec<PlanError>>, Error> {
        let (mut model, mut blocks, mut errors) = (Vec::new(), Vec::new(), Vec::new());
        let mut last = None;
        let mut base = Self {
            decoder: decoder.clone(),
            config: checkpoint.config().clone(),
            headers: checkpoint.headers().to_vec(),
            recipe: Recipe { steps: Vec::new(), ..recipe.clone() },
        };
        let steps = recipe.steps.iter().zip(numbers).enumerate();
        for (pass, (at, (step, &number))) in passes.into_iter().zip(steps) {
            let label = step.label(number);
            let pass = match pass {
                AnyPass::Block(pass) => {
                    blocks.push(pass);
                    base.recipe.steps.push(step.clone());
                    continue;
                }
                AnyPass::Model(pass) => pass,
            };
            let scales = matches!(pass.work(), Work::Train(train) if train.trains_scales());
            if scales && (blocks.is_empty() || at + 1 < recipe.steps.len()) {
                let reason = "trains the scales of what was quantized before it: it is the last step, behind one that \
                              quantizes";
                errors.push(PlanError::Reshape { step: label, reason: reason.to_owned() });
                continue;
            }
            if let Some(first) = base.recipe.steps.first().filter(|_| !scales) {
                let at = recipe.steps.iter().position(|step| step == first).unwrap_or(0);
                let after = first.label(numbers.get(at).copied().unwrap_or(at));
                errors.push(PlanError::ModelLate { step: label, after });
                continue;
            }
            if checkpoint.gguf().is_some() {
                let reason = "needs a Hugging Face directory; the source is a GGUF file".to_owned();
                errors.push(PlanError::Reshape { step: label, reason });
                continue;
            }
            let graph = base.decoder.graph.clone();
            let sizes = match pass.reshape(&graph) {
                Ok(sizes) => sizes,
                Err(reason) => {
                    errors.push(PlanError::Reshape { step: label, reason });
                    continue;
                }
            };
            let teacher = match pass.work() {
                Work::Train(train) => train.teacher().map(|teacher| folder.join(teacher)),
                _ => None,
            };
            let found = teacher.as_ref().map(|teacher| train::check_teacher(teacher, checkpoint));
            let teacher_graph = match found.transpose() {
                Ok(found) => found.map(|(_, decoder)| decoder.graph),
                Err(reason) => {
                    errors.push(PlanError::Reshape { step: label, reason });
                    continue;
                }
            };
            if let Work::Train(train) = pass.work()
                && train.matches_streams()
                && let Err(reason) = one_stream(&graph, teacher_graph.as_ref(), &model)
            {
                errors.push(PlanError::Reshape { step: label, reason });
                continue;
            }
            let headers = reshaped_headers(&graph, &base.headers, &sizes);
            // Which layers stay is not known yet; where their windows differ the config is made anew later.
            let kept: Vec<usize> = (0..sizes.layers).collect();
            let config = resized(&base.config, &base.decoder.spec, &sizes, &kept)?;
            let next = Decoder::read(&config, &Promised(headers.clone()))?;
            let step = ModelStep {
                label,
                of_chain: step.label(at),
                number,
                does: pass.describe(&graph),
                pass,
                options: step.options.clone(),
                graph,
                source: std::mem::replace(&mut base.headers, headers),
                sizes,
                teacher: teacher.map(|teacher| teacher.display().to_string()),
                teacher_graph,
            };
            if scales {
                last = Some(step);
                continue;
            }
            model.push(step);
            (base.decoder, base.config) = (next, config);
        }
        let steps = Steps { base, model, blocks, last };
        Ok(if errors.is_empty() { Ok(steps) } else { Err(errors) })
    }
}

/// The steps of a variant by the time at which they run.
pub(super) struct Steps {
    pub(super) base: Base,
    pub(super) model: Vec<ModelStep>,
    pub(super) blocks: Vec<Box<dyn attar_ir::Pass>>,
    /// Training of scales, behind all others.
    pub(super) last: Option<ModelStep>,
}

/// Why streams of student and teacher cannot be compared number by number.
fn one_stream(
    student: &attar_ir::ModelGraph,
    teacher: Option<&attar_ir::ModelGraph>,
    before: &[ModelStep],
) -> Result<(), String> {
    let original = before.first().map_or(student, |step| &step.graph);
    let width = teacher.unwrap_or(original).hidden;
    if width != student.hidden {
        return Err(format!(
            "`hidden` compares streams, of {} numbers in the student and {width} in the teacher; leave it 0",
            student.hidden
        ));
    }
    if let Some(turned) = before.iter().find(|step| step.pass.turns_stream()) {
        return Err(format!(
            "`hidden` compares streams, and {} has turned the student's; leave it 0",
            turned.label
        ));
    }
    Ok(())
}

/// What passes on the whole model read beside the checkpoint.
pub(super) struct Around<'a> {
    pub(super) windows: Option<&'a Windows>,
    pub(super) stage: &'a Stage,
    pub(super) limits: &'a Limits,
    pub(super) seed: u64,
    /// Binary and instruction set.
    pub(super) salt: &'a str,
    /// States of trainings are stored once per so much time.
    pub(super) checkpoint_every: Duration,
}

/// A model that was made, and what made it.
#[derive(Debug)]
pub(super) struct Made {
    pub(super) checkpoint: Checkpoint,
    pub(super) entries: Vec<ModelEntry>,
    /// Hash of everything in it.
    pub(super) hash: String,
    /// Models that lay in the work directory, and all.
    pub(super) reused: (usize, usize),
}

/// Runs the passes on the whole model; the last one's result is what the steps on blocks read.
pub(super) fn run(
    steps: &[ModelStep],
    source: &Checkpoint,
    hashes: &str,
    around: &Around<'_>,
    trace: &Trace,
    time: &mut Timings,
) -> Result<Option<Made>, Error> {
    let mut made: Option<Made> = None;
    for step in steps {
        let (checkpoint, hash) = match &made {
            Some(made) => (&made.checkpoint, made.hash.as_str()),
            None => (source, hashes),
        };
        let decoder = Decoder::read(checkpoint.config(), checkpoint)?;
        let (options, seed) = (keys::toml_text(&step.options), around.seed.to_string());
        let windows = around.windows.filter(|_| step.calibrates());
        let windows = windows.map_or("", |windows| windows.hash.as_str());
        let teacher = match (step.pass.work(), &step.teacher) {
            (Work::Train(_), Some(folder)) => train::teacher_hash(folder)?,
            (Work::Train(_), None) => hashes.to_owned(),
            _ => String::new(),
        };
        let key = keys::hash(&[
            keys::VERSION,
            "model",
            around.salt,
            hash,
            step.pass.name(),
            &options,
            &seed,
            windows,
            &teacher,
        ]);
        let stage = around.stage;
        let known = stage.contains(&key);
        // Its bytes are hashed here; what is damaged goes.
        let mut object = stage.open_object(&key)?;
        let there = object.is_some();
        if known && !there {
            trace.note(&format!(
                "object {key} of the work directory is damaged; {} is done again",
                step.label
            ));
        }
        if !there {
            let begun = trace.begin(Phase::Solve, &step.label);
            let work = Making { step, source, checkpoint, decoder: &decoder, around };
            stage.put_found(&key, "model", &step.label, work.headers(), |writer| {
                work.fill(&key, trace, writer).map_err(|error| error.to_string())
            })?;
            if let Work::Train(_) = step.pass.work() {
                train::forget(stage, &key)?;
            }
            time.solve += trace.end(Phase::Solve, &step.label, begun);
            object = stage.open_object(&key)?;
        }
        let begun = trace.begin(Phase::Store, &step.label);
        let Some((info, file)) = object else {
            return Err(format!(
                "{}: object {key} was damaged and is gone; run again",
                stage.root().display()
            )
            .into());
        };
        let mut entries: Vec<ModelEntry> = serde_json::from_value(info.facts["entries"].clone())?;
        for entry in &mut entries {
            entry.step.clone_from(&step.of_chain);
        }
        let checkpoint = Checkpoint::made_of(source, info.facts["config"].clone(), file)?;
        time.store += trace.end(Phase::Store, &step.label, begun);
        let (mut all, reused) =
            made.map_or((Vec::new(), (0, 0)), |made| (made.entries, made.reused));
        all.extend(entries);
        let reused = (reused.0 + usize::from(there), reused.1 + 1);
        // The config is not in the tensors: which layers stay is said by both.
        let hash = keys::hash(&[&info.blake3, &info.facts["config"].to_string()]);
        made = Some(Made { checkpoint, entries: all, hash, reused });
    }
    Ok(made)
}

/// One pass at work.
pub(super) struct Making<'a> {
    pub(super) step: &'a ModelStep,
    /// The original model.
    pub(super) source: &'a Checkpoint,
    /// The model that it reads.
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) decoder: &'a Decoder,
    pub(super) around: &'a Around<'a>,
}

impl Making<'_> {
    /// What will be written: as the plan promised, in f32 where values are computed.
    pub(super) fn headers(&self) -> Vec<TensorHeader> {
        let dims = self.decoder.graph.dims();
        let source = self.checkpoint.headers();
        let mut headers = reshaped_headers(&self.decoder.graph, source, &self.step.sizes);
        let changed = |name: &str| match self.step.pass.work() {
            Work::Transform(_) => {
                name == "lm_head.weight"
                    || dims.iter().flat_map(|dim| &dim.members).any(|m| m.tensor == name)
            }
            // Readers of what is cut may make up for it.
            Work::Blocks(_) => dims
                .iter()
                .filter(|dim| dim.name.block().is_some())
                .any(|dim| dim.members.iter().any(|m| m.side == Side::Reads && m.tensor == name)),
            Work::Choose(_) => false,
            Work::Train(train) => train.changes(&self.decoder.graph, &self.origin(name)),
        };
        for header in &mut headers {
            if changed(&header.name)
                || header.name == "model.embed_tokens.weight"
                    && changed(&self.decoder.graph.embedding)
            {
                header.dtype = DType::F32;
            }
        }
        headers
    }

    pub(super) fn context<'b>(&'b self, slopes: &'b Slopes) -> ModelContext<'b> {
        ModelContext { graph: &self.decoder.graph, seed: self.around.seed, slopes }
    }

    /// Slopes of the loss that the pass asks for.
    fn slopes(&self) -> Result<Slopes, Error> {
        let graph = &self.decoder.graph;
        let Some(query) = self.step.pass.slopes(graph) else { return Ok(Slopes::new()) };
        let windows = self.around.windows.ok_or("the plan counted on calibration data")?;
        let spill = self.spill();
        let bar = progress::bar(2 * graph.blocks.len(), "slopes of the loss");
        let source = self.checkpoint;
        let (_, slopes) =
            loss_slopes(self.decoder, source, &windows.ids, &query, &spill, &|| bar.inc(1))?;
        bar.finish_and_clear();
        Ok(slopes)
    }

    /// Writes every tensor; returns the facts of the object.
    fn fill(
        &self,
        key: &str,
        trace: &Trace,
        writer: &mut SafetensorsWriter,
    ) -> Result<Value, Error> {
        let layers: Vec<usize> = (0..self.decoder.spec.layers).collect();
        let (kept, entries) = match self.step.pass.work() {
            Work::Transform(transform) => (layers, self.transform(transform, writer)?),
            Work::Blocks(blocks) => (layers, self.blocks(blocks, writer)?),
            Work::Choose(choose) => self.choose(choose, writer)?,
            Work::Train(train) => (layers, train::run(self, train, key, trace, writer)?),
        };
        let spec = &self.decoder.spec;
        let config = resized(self.checkpoint.config(), spec, &self.step.sizes, &kept)?;
        Ok(json!({"config": config, "entries": entries}))
    }

    /// The tensor of the source that a written one comes from.
    pub(super) fn origin(&self, name: &str) -> String {
        let graph = &self.decoder.graph;
        let shared = graph.tied && ["model.embed_tokens.weight", "lm_head.weight"].contains(&name);
        if shared { graph.embedding.clone() } else { name.to_owned() }
    }

    fn read(&self, name: &str) -> Result<Vec<f32>, PassError> {
        let fail = |reason: String| PassError::Numeric { site: name.to_owned(), reason };
        let view = self.checkpoint.read(name).map_err(|error| fail(error.to_string()))?;
        let values = view.to_f32().map_err(|error| fail(error.to_string()))?;
        self.checkpoint.release(name);
        if let Some(at) = attar_tensor::linalg::first_non_finite(&values) {
            return Err(fail(format!(
                "holds {} at flat index {at}; the checkpoint is damaged, download or export it again",
                values[at]
            )));
        }
        Ok(values)
    }

    fn transform(
        &self,
        transform: &dyn Transform,
        writer: &mut SafetensorsWriter,
    ) -> Result<Vec<ModelEntry>, Error> {
        let none = Slopes::new();
        let context = self.context(&none);
        if self.step.calibrates() {
            self.survey(&mut |block, survey| Ok(transform.see(&context, block, &survey)?))?;
        }
        let read = |name: &str| self.read(name);
        let headers = self.headers();
        let bar = progress::bar(headers.len(), self.step.pass.name());
        for header in &headers {
            bar.inc(1);
            let name = self.origin(&header.name);
            if header.dtype != DType::F32 || header.shape.is_empty() {
                writer.write_view(&header.name, &self.checkpoint.read(&name)?)?;
                self.checkpoint.release(&name);
                continue;
            }
            let head = header.name == "lm_head.weight";
            let columns = header.shape[header.shape.len() - 1].max(1);
            let rows = header.elements() / columns;
            let whole = transform.mixes_rows(&context, &name);
            let piece = if whole { rows } else { (PIECE_ELEMENTS / columns).clamp(1, rows.max(1)) };
            for first in (0..rows).step_by(piece.max(1)) {
                let count = piece.min(rows - first);
                let mut values = vec![0.0f32; count * columns];
                self.checkpoint.read(&name)?.copy_to_f32(first * columns, &mut values)?;
                if let Some(at) = attar_tensor::linalg::first_non_finite(&values) {
                    return Err(format!(
                        "tensor {name}: holds {} at flat index {}; the checkpoint is damaged, download or \
                         export it again",
                        values[at],
                        first * columns + at
                    )
                    .into());
                }
                transform.apply(&context, &name, head, columns, &mut values, &read)?;
                let offset = 4 * (first * columns) as u64;
                writer.write_part(&header.name, offset, bytemuck::cast_slice(&values))?;
                self.checkpoint.release(&name);
            }
        }
        bar.finish_and_clear();
        Ok(transform.entries(&self.decoder.graph))
    }

    fn spill(&self) -> Spill {
        measure::spill(self.around.limits, &scratch_of(Some(self.around.stage)))
    }

    /// All windows as they enter block 0.
    fn embedded(&self, spill: &Spill) -> Result<Stream, Error> {
        let windows = self.around.windows.ok_or("the plan counted on calibration data")?;
        let lengths: Vec<usize> = windows.ids.iter().map(Vec::len).collect();
        let mut stream = Stream::new(&lengths, self.decoder.spec.hidden, Some(spill))?;
        for (at, ids) in windows.ids.iter().enumerate() {
            stream.write(at, &embed(self.decoder, self.checkpoint, ids)?)?;
        }
        self.checkpoint.release(&self.decoder.graph.embedding);
        Ok(stream)
    }

    fn blocks(
        &self,
        pass: &dyn CutBlocks,
        writer: &mut SafetensorsWriter,
    ) -> Result<Vec<ModelEntry>, Error> {
        let slopes = self.slopes()?;
        let spill = self.spill();
        let mut stream = self.embedded(&spill)?;
        let graph = &self.decoder.graph;
        let (dims, headers) = (graph.dims(), self.headers());
        let mut entries = Vec::new();
        let mut written = BTreeSet::new();
        let bar = progress::bar(graph.blocks.len(), self.step.pass.name());
        for block in &graph.blocks {
            bar.set_message(block.prefix.trim_end_matches('.').to_owned());
            let mut state = self.decoder.load_block(block.index, self.checkpoint)?;
            let mut run = BlockRun::begin(
                self.decoder,
                block.index,
                self.checkpoint,
                &mut stream,
                Some(spill.clone()),
            )?;
            let mut cuts = Vec::new();
            for (input, needs) in pass.stops(block) {
                let mut stats = run.observe(input, &state, needs)?;
                let (cut, entry) =
                    pass.cut(&self.context(&slopes), block, input, &mut state, &mut stats)?;
                cuts.push(cut);
                entries.push(entry);
            }
            if block.index + 1 < graph.blocks.len() {
                run.finish(&state)?;
            }
            self.write_block((&dims, &cuts, &headers), block, &state, writer, &mut written)?;
            bar.inc(1);
        }
        bar.finish_and_clear();
        for header in headers.iter().filter(|header| !written.contains(&header.name)) {
            let name = self.origin(&header.name);
            writer.write_view(&header.name, &self.checkpoint.read(&name)?)?;
            self.checkpoint.release(&name);
        }
        Ok(entries)
    }

    /// Writes the linears of a block, cut.
    fn write_block(
        &self,
        (dims, cuts, headers): (&[Dim], &[Cut], &[TensorHeader]),
        block: &Block,
        state: &BlockState,
        writer: &mut SafetensorsWriter,
        written: &mut BTreeSet<String>,
    ) -> Result<(), Error> {
        for (site, linear) in block.sites.iter().zip(&state.linears) {
            let weight = linear.weight.as_dense().ok_or("passes on the whole model see floats")?;
            let weight = weight.as_slice().ok_or("weights are in standard layout")?;
            let shape = [site.out_features, site.in_features];
            let bias = linear.bias.as_deref().map(|bias| (format!("{}.bias", site.name), bias));
            let weight = (format!("{}.weight", site.name), weight);
            for ((name, values), shape) in std::iter::once(weight)
                .map(|tensor| (tensor, shape.to_vec()))
                .chain(bias.map(|tensor| (tensor, vec![site.out_features])))
            {
                let values = Slice::new(dims, cuts, &name, &shape)?.of(values);
                let at = headers.binary_search_by(|header| header.name.cmp(&name));
                let header = &headers[at.map_err(|_| "the plan lists every tensor")?];
                let tensor = Tensor::from_f32(header.dtype, header.shape.clone(), &values)?;
                writer.write_view(&name, &tensor.view())?;
                written.insert(name);
            }
        }
        Ok(())
    }

    fn choose(
        &self,
        pass: &dyn Choose,
        writer: &mut SafetensorsWriter,
    ) -> Result<(Vec<usize>, Vec<ModelEntry>), Error> {
        let slopes = self.slopes()?;
        let mut surveys = Vec::new();
        self.survey(&mut |_, survey| {
            surveys.push(survey);
            Ok(())
        })?;
        let mut failed = None;
        let mut loss = |kept: &[usize]| {
            self.loss(kept).map_err(|error| {
                let reason = error.to_string();
                failed = Some(error);
                PassError::Numeric { site: "the model".into(), reason }
            })
        };
        let chosen = pass.choose(&self.context(&slopes), &surveys, &mut loss);
        let (Selection { layers, cuts, scales }, entries) = match (chosen, failed) {
            (Ok(chosen), _) => chosen,
            (Err(_), Some(error)) => return Err(error),
            (Err(error), None) => return Err(error.into()),
        };
        let dims = self.decoder.graph.dims();
        let blocks = &self.decoder.graph.blocks;
        for header in self.headers() {
            let to = blocks.iter().find(|block| header.name.starts_with(&block.prefix));
            let name = match to {
                Some(to) => {
                    let from =
                        *layers.get(to.index).ok_or("as many layers stay as were promised")?;
                    format!("{}{}", blocks[from].prefix, &header.name[to.prefix.len()..])
                }
                None => self.origin(&header.name),
            };
            let view = self.checkpoint.read(&name)?;
            let scale = scales.get(&name).copied();
            if view.shape() == header.shape && scale.is_none() {
                writer.write_view(&header.name, &view)?;
            } else {
                // Some rows at a time: a vocabulary is large.
                let slice = Slice::new(&dims, &cuts, &name, view.shape())?;
                let mut line = vec![0.0f32; slice.columns];
                let (mut values, mut offset) = (Vec::new(), 0);
                for rows in slice.of_rows.chunks((PIECE_ELEMENTS / slice.columns.max(1)).max(1)) {
                    values.clear();
                    for &row in rows {
                        view.copy_to_f32(row * slice.columns, &mut line)?;
                        slice.push(&line, &mut values);
                    }
                    for value in &mut values {
                        *value *= scale.unwrap_or(1.0);
                    }
                    let piece = Tensor::from_f32(header.dtype, vec![values.len()], &values)?;
                    writer.write_part(&header.name, offset, piece.bytes())?;
                    offset += piece.bytes().len() as u64;
                }
            }
            self.checkpoint.release(&name);
        }
        Ok((layers, entries))
    }

    /// Every block of the model as it is read, the epilogue last: its statistics, and how little it turns the stream.
    fn survey(
        &self,
        visit: &mut dyn FnMut(&Block, Survey) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let spill = self.spill();
        let mut stream = self.embedded(&spill)?;
        let mut before = Stream::new(&stream.lengths(), stream.width(), Some(&spill))?;
        let graph = &self.decoder.graph;
        let bar = progress::bar(graph.blocks.len(), self.step.pass.name());
        for block in &graph.blocks {
            for window in 0..stream.windows() {
                before.write(window, &stream.read(window)?)?;
            }
            let state = self.decoder.load_block(block.index, self.checkpoint)?;
            let mut run = BlockRun::begin(
                self.decoder,
                block.index,
                self.checkpoint,
                &mut stream,
                Some(spill.clone()),
            )?;
            let mut stats = BlockStats::empty(block.inputs.len());
            for input in 0..block.inputs.len() {
                let needs = self.step.needs(block, input);
                if !needs.is_empty() {
                    stats.inputs[input] = Some(run.observe(input, &state, needs)?);
                }
            }
            run.finish(&state)?;
            let width = stream.width();
            let (mut sum, mut tokens) = (0.0f64, 0usize);
            for window in 0..stream.windows() {
                let (x, y) = (before.read(window)?, stream.read(window)?);
                for (x, y) in x.chunks(width).zip(y.chunks(width)) {
                    let size = f64::from(dot(x, x)).sqrt() * f64::from(dot(y, y)).sqrt();
                    sum += if size > 0.0 { f64::from(dot(x, y)) / size } else { 1.0 };
                    tokens += 1;
                }
            }
            let cosine = sum / tokens.max(1) as f64;
            visit(block, Survey { stats, norms: state.norms, cosine })?;
            bar.inc(1);
        }
        bar.finish_and_clear();
        // The final norm; the head itself is not run.
        let last = &graph.epilogue;
        let norms: Vec<Vec<f32>> =
            last.norms.iter().map(|norm| self.read(&norm.tensor)).collect::<Result<_, _>>()?;
        let state = BlockState::new(last.index, Vec::new(), norms);
        let mut stats = BlockStats::empty(last.inputs.len());
        let needs = self.step.needs(last, 0);
        if !needs.is_empty() {
            let (decoder, spill) = (self.decoder, Some(spill));
            let mut run =
                BlockRun::begin(decoder, last.index, self.checkpoint, &mut stream, spill)?;
            stats.inputs[0] = Some(run.observe(0, &state, needs)?);
        }
        visit(last, Survey { stats, norms: state.norms, cosine: 1.0 })
    }

    /// Mean negative log-likelihood of the calibration windows under some of the blocks, nats.
    fn loss(&self, kept: &[usize]) -> Result<f64, Error> {
        let spill = self.spill();
        let windows = self.around.windows.ok_or("the plan counted on calibration data")?;
        let mut stream = self.embedded(&spill)?;
        for &index in kept {
            let ops = BlockOps::load(self.decoder, index, self.checkpoint)?;
            run_block(self.decoder, index, &ops, &mut stream)?;
        }
        let head = BlockOps::load(self.decoder, self.decoder.spec.layers, self.checkpoint)?;
        let context = windows.ids.iter().map(Vec::len).max().unwrap_or(1);
        let mut evaluator = Evaluator::new(context, Score::All);
        for (at, ids) in windows.ids.iter().enumerate() {
            let logits: Mat = final_logits(self.decoder, &head, &stream.read(at)?);
            evaluator.add(&logits, None, ids);
        }
        Ok(evaluator.finish(0).perplexity.ln())
    }
}

/// What the cuts keep of a tensor.
struct Slice {
    columns: usize,
    of_rows: Vec<usize>,
    of_columns: Option<Vec<usize>>,
}

impl Slice {
    fn new(dims: &[Dim], cuts: &[Cut], name: &str, shape: &[usize]) -> Result<Self, Error> {
        let (rows, columns) = match shape {
            [n] => (*n, 1),
            [rows, columns] => (*rows, *columns),
            _ => {
                let axes = shape.len();
                return Err(format!("tensor {name}: has {axes} axes, one or two expected").into());
            }
        };
        let places = |axis: usize| {
            cuts.iter().find_map(|cut| {
                let dim = dims.iter().find(|dim| dim.name == cut.dim)?;
                let of = |member: &&Member| member.tensor == name && member.axis == axis;
                Some(dim.members.iter().find(of)?.places(dim.size, &cut.kept))
            })
        };
        let of_rows = places(0).unwrap_or_else(|| (0..rows).collect());
        Ok(Self { columns, of_rows, of_columns: places(1) })
    }

    /// Appends what is kept of a row.
    fn push(&self, line: &[f32], out: &mut Vec<f32>) {
        match &self.of_columns {
            Some(kept) => out.extend(kept.iter().map(|&column| line[column])),
            None => out.extend_from_slice(line),
        }
    }

    /// What is kept of the whole.
    fn of(&self, values: &[f32]) -> Vec<f32> {
        let mut out = Vec::with_capacity(self.of_rows.len() * self.columns);
        for &row in &self.of_rows {
            self.push(&values[row * self.columns..(row + 1) * self.columns], &mut out);
        }
        out
    }
}
