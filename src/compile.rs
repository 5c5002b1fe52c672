//! The walk: what do we have, what will we do, do it, write it, read it back.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    time::Instant,
};

use attar_eval::{
    Report, Score,
    report::{SiteEntry, Timings},
};
use attar_formats::{
    Checkpoint, CorpusSource, Tokenizer, Windows,
    artifact::{self, ArtifactRoot, ArtifactWriter},
    corpus, quant_config,
};
use attar_ir::{
    Block, BlockState, BlockStats, PassContext, Weight,
    plan::{Origin, PassGraph, Plan, PlannedEmit, Round},
    recipe::{Emit, Recipe},
};
use attar_model::{BlockRun, Decoder, Stream, embed, observe_block};
use attar_tensor::{DType, Tensor, TensorSource};
use serde_json::{Map, Value, json};

use crate::{Error, args::What, measure, packed::Opened, progress, registry, verify};

/// A proven plan with everything it was proven on.
pub(crate) struct Job {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) decoder: Decoder,
    pub(crate) recipe: Recipe,
    pub(crate) plan: Plan,
    corpus: Option<CorpusSource>,
}

/// An accuracy measurement asked for with the compression.
#[derive(Debug, Clone)]
pub(crate) struct Measure {
    pub(crate) text: PathBuf,
    pub(crate) context: usize,
}

fn recipe_of(what: &What) -> Result<(Recipe, PathBuf), Error> {
    let mut base = PathBuf::new();
    let mut recipe = if let Some(path) = &what.recipe {
        let text = std::fs::read_to_string(path)
            .map_err(|error| format!("{}: {error}", path.display()))?;
        base = path.parent().map(Path::to_path_buf).unwrap_or_default();
        Recipe::parse(&text).map_err(|error| format!("{}: {error}", path.display()))?
    } else {
        Recipe::preset(what.preset.as_deref().unwrap_or_default(), what.group)?
    };
    if !what.layout.is_empty() {
        if !recipe.emits.is_empty() {
            return Err(
                "the recipe has [[emit]] already; leave --layout away or change the recipe".into(),
            );
        }
        recipe.emits = what.layout.iter().map(|layout| Emit::new(layout)).collect();
    }
    if recipe.emits.is_empty() {
        recipe.emits.push(Emit::new("compressed-tensors"));
    }
    let calibration = &mut recipe.calibration;
    calibration.samples = what.samples.unwrap_or(calibration.samples);
    calibration.context = what.context.unwrap_or(calibration.context);
    calibration.seed = what.seed.unwrap_or(calibration.seed);
    Ok((recipe, base))
}

/// Reads recipe and headers and proves the plan; no weight is read.
pub(crate) fn prepare(what: &What) -> Result<Job, Error> {
    let checkpoint = Checkpoint::open(&what.checkpoint)?;
    if let Some(parsed) = quant_config::parse(checkpoint.config())? {
        return Err(format!(
            "{} is quantized already ({}); give the original checkpoint",
            what.checkpoint.display(),
            parsed.layout
        )
        .into());
    }
    let decoder = Decoder::read(checkpoint.config(), &checkpoint)
        .map_err(|error| format!("{}: {error}", what.checkpoint.display()))?;
    let (mut recipe, base) = recipe_of(what)?;
    let passes = recipe.resolve(&registry::passes())?;
    let calibration = &recipe.calibration;
    let corpus = if let Some(ids) = &what.ids {
        Some(CorpusSource::Ids(ids.clone()))
    } else if !what.text.is_empty() {
        Some(CorpusSource::Text(what.text.clone()))
    } else if let Some(ids) = &calibration.ids {
        Some(CorpusSource::Ids(base.join(ids)))
    } else if calibration.text.is_empty() {
        None
    } else {
        Some(CorpusSource::Text(calibration.text.iter().map(|t| base.join(t)).collect()))
    };
    let context = calibration.context.min(decoder.spec.context);
    let tokens = if corpus.is_some() { calibration.samples * context } else { 0 };
    let layouts = registry::layouts();
    let plan = PassGraph::new(
        decoder.graph.clone(),
        passes,
        &recipe,
        &layouts,
        checkpoint.headers(),
        tokens,
    )
    .with_stream_in_memory(measure::STREAM_LIMIT)
    .check()?;
    Ok(Job { checkpoint, decoder, recipe, plan, corpus })
}

/// One artifact while it is written.
struct Output<'a> {
    emit: &'a PlannedEmit,
    writer: ArtifactWriter,
    written: BTreeSet<String>,
}

impl Output<'_> {
    fn put(&mut self, name: &str, tensor: &Tensor) -> Result<(), Error> {
        self.writer.put(name, &tensor.view())?;
        self.written.insert(name.to_owned());
        Ok(())
    }

    /// Writes what a block's passes made or changed.
    fn put_block(
        &mut self,
        block: &Block,
        state: &BlockState,
        source: &Checkpoint,
    ) -> Result<(), Error> {
        let layout = attar_kernels::layout(self.emit.layout.0).ok_or("the plan checked layouts")?;
        let stored = |name: &str| source.header(name).map_or(DType::F32, |h| h.dtype);
        for (at, (site, linear)) in block.sites.iter().zip(&state.linears).enumerate() {
            let weight = format!("{}.weight", site.name);
            match &linear.weight {
                Weight::Quantized(quantized) => {
                    let packed = layout
                        .pack(quantized, site.dtype)
                        .map_err(|error| format!("{}: {error}", site.name))?;
                    for (suffix, tensor) in &packed.parts {
                        self.put(&format!("{}.{suffix}", site.name), tensor)?;
                    }
                }
                Weight::Dense(values) if state.weight_changed[at] => {
                    let shape = vec![site.out_features, site.in_features];
                    let values = values.as_slice().ok_or("weights are in standard layout")?;
                    self.put(&weight, &Tensor::from_f32(stored(&weight), shape, values)?)?;
                }
                Weight::Dense(_) => {}
            }
            if let (true, Some(bias)) = (state.bias_changed[at], &linear.bias) {
                let name = format!("{}.bias", site.name);
                self.put(&name, &Tensor::from_f32(stored(&name), vec![bias.len()], bias)?)?;
            }
        }
        for (at, (norm, values)) in block.norms.iter().zip(&state.norms).enumerate() {
            if state.norm_changed[at] {
                let dtype = stored(&norm.tensor);
                self.put(&norm.tensor, &Tensor::from_f32(dtype, vec![values.len()], values)?)?;
            }
        }
        Ok(())
    }

    /// Copies every tensor that no pass changed.
    fn put_rest(&mut self, source: &Checkpoint) -> Result<(), Error> {
        for tensor in &self.emit.tensors {
            if self.written.contains(&tensor.name) {
                continue;
            }
            if let Origin::Source(name) = &tensor.origin {
                self.writer.put(&tensor.name, &source.read(name)?)?;
                source.release(name);
            }
        }
        Ok(())
    }
}

/// Applies one step's targets and files what it reports.
fn apply(
    job: &Job,
    index: usize,
    stage: Option<usize>,
    block: &Block,
    state: &mut BlockState,
    stats: &mut BlockStats,
    sites: &mut Vec<SiteEntry>,
) -> Result<f64, Error> {
    let targets: Vec<_> = job.plan.steps[index].targets[block.index]
        .iter()
        .copied()
        .filter(|target| stage.is_none_or(|stage| block.input_of(target.site) == stage))
        .collect();
    if targets.is_empty() {
        return Ok(0.0);
    }
    let started = Instant::now();
    let context = PassContext { block, seed: job.recipe.calibration.seed };
    let report = job.plan.passes[index].apply(&context, &targets, state, stats)?;
    let seconds = started.elapsed().as_secs_f64();
    for result in report.sites {
        let scheme = block
            .sites
            .iter()
            .zip(&state.linears)
            .find(|(site, _)| site.name == result.site)
            .and_then(|(_, linear)| linear.weight.as_quantized())
            .map(|quantized| quantized.scheme);
        sites.push(SiteEntry {
            result,
            scheme: scheme.map(attar_tensor::QuantScheme::label),
            bits: scheme.map(|scheme| scheme.bits),
            seconds,
        });
    }
    Ok(seconds)
}

/// Runs every round of one block and leaves the stream behind it.
fn run_rounds(
    job: &Job,
    block: &Block,
    state: &mut BlockState,
    mut stream: Option<&mut Stream>,
    sites: &mut Vec<SiteEntry>,
    time: &mut Timings,
) -> Result<(), Error> {
    // What the last observed block puts out is read by nobody.
    let feeds = |block: &Block| job.plan.rounds(block.index).iter().any(Round::observes);
    let advance = job.decoder.graph.all_blocks().skip(block.index + 1).any(feeds);
    let rounds = job.plan.rounds(block.index);
    let inputs = block.inputs.len();
    let add = |time: &mut Timings, timing: attar_model::Timing| {
        time.forward += timing.forward.as_secs_f64();
        time.statistics += timing.statistics.as_secs_f64();
    };
    let mut advanced = false;
    for (at, round) in rounds.iter().enumerate() {
        let staged = !round.whole && at + 1 == rounds.len();
        if let (true, Some(stream)) = (staged, stream.as_deref_mut()) {
            let mut run = BlockRun::begin(
                &job.decoder,
                block.index,
                &job.checkpoint,
                stream,
                Some(measure::spill()),
            )?;
            for stage in 0..inputs {
                let mut stats = BlockStats::empty(inputs);
                if !round.needs[stage].is_empty() {
                    stats.inputs[stage] = Some(run.observe(stage, state, round.needs[stage])?);
                }
                for &step in &round.steps {
                    time.solve += apply(job, step, Some(stage), block, state, &mut stats, sites)?;
                }
            }
            if advance {
                add(time, run.finish(state)?);
            } else {
                add(time, run.timing);
            }
            advanced = true;
            continue;
        }
        let mut stats = BlockStats::empty(inputs);
        if let (true, Some(stream)) = (round.observes(), stream.as_deref()) {
            let needs = round.needs.iter().fold(attar_ir::Needs::empty(), |a, b| a | *b);
            let (found, timing) =
                observe_block(&job.decoder, block.index, &job.checkpoint, state, stream, needs)?;
            stats = found;
            add(time, timing);
        }
        for &step in &round.steps {
            time.solve += apply(job, step, None, block, state, &mut stats, sites)?;
        }
    }
    if let (false, true, Some(stream)) = (advanced, advance, stream) {
        let run = BlockRun::begin(
            &job.decoder,
            block.index,
            &job.checkpoint,
            stream,
            Some(measure::spill()),
        )?;
        add(time, run.finish(state)?);
    }
    Ok(())
}

/// Compresses and writes every artifact; returns one report per emit with the folder it lies in.
pub(crate) fn compile(
    job: &Job,
    out: &Path,
    measure: Option<&Measure>,
) -> Result<Vec<(PathBuf, Report)>, Error> {
    let begun = Instant::now();
    let mut time = Timings::default();
    let plan = &job.plan;
    // The place is tried before any work is done.
    let root = ArtifactRoot::create(out)?;
    let config = &job.recipe.calibration;
    let windows: Option<Windows> = match &job.corpus {
        Some(corpus) if plan.calibrates() => {
            let tokenizer = match corpus {
                CorpusSource::Text(_) => Some(Tokenizer::open(job.checkpoint.folder())?),
                CorpusSource::Ids(_) => None,
            };
            let context = config.context.min(job.decoder.spec.context);
            let vocab = job.decoder.spec.vocab;
            Some(corpus::calibration(corpus, tokenizer.as_ref(), context, config.samples, vocab)?)
        }
        _ => None,
    };
    let mut outputs = Vec::new();
    for emit in &plan.emits {
        let folder = match &emit.dir {
            Some(dir) => root.partial().join(dir),
            None => root.partial().to_path_buf(),
        };
        let headers = emit.tensors.iter().map(attar_ir::plan::OutputTensor::header).collect();
        let writer = ArtifactWriter::create(&folder, headers)?;
        outputs.push(Output { emit, writer, written: BTreeSet::new() });
    }
    let started = Instant::now();
    let sources = job.checkpoint.hashes()?;
    let mut stream = match &windows {
        Some(windows) => {
            let lengths: Vec<usize> = windows.ids.iter().map(Vec::len).collect();
            let mut stream =
                Stream::new(&lengths, job.decoder.spec.hidden, Some(&measure::spill()))?;
            for (at, ids) in windows.ids.iter().enumerate() {
                stream.write(at, &embed(&job.decoder, &job.checkpoint, ids)?)?;
            }
            job.checkpoint.release(&job.decoder.graph.embedding);
            Some(stream)
        }
        None => None,
    };
    time.read += started.elapsed().as_secs_f64();
    let mut sites = Vec::new();
    let bar = progress::bar(job.decoder.spec.layers + 1, "compressing");
    for block in job.decoder.graph.all_blocks() {
        let rounds = plan.rounds(block.index);
        let epilogue = block.attention.is_none();
        if rounds.is_empty() && (epilogue || stream.is_none()) {
            continue;
        }
        bar.set_message(block.prefix.trim_end_matches('.').to_owned());
        let started = Instant::now();
        let mut state = job.decoder.load_block(block.index, &job.checkpoint)?;
        time.read += started.elapsed().as_secs_f64();
        run_rounds(job, block, &mut state, stream.as_mut(), &mut sites, &mut time)?;
        let started = Instant::now();
        for output in &mut outputs {
            output.put_block(block, &state, &job.checkpoint)?;
        }
        time.write += started.elapsed().as_secs_f64();
        bar.inc(1);
    }
    bar.finish_and_clear();
    drop(stream);
    let mut folders = Vec::new();
    for mut output in outputs {
        let started = Instant::now();
        output.put_rest(&job.checkpoint)?;
        let layout = output.emit.layout.0;
        for file in job.checkpoint.auxiliary_files()? {
            output.writer.copy_file(&file)?;
        }
        output.writer.put_json("config.json", &config_json(job, layout)?)?;
        let folder = output.writer.finish()?;
        let mut facts = Map::new();
        let recipe = job.recipe.to_toml();
        facts.insert("attar".into(), json!(env!("CARGO_PKG_VERSION")));
        facts.insert("layout".into(), json!(layout));
        facts.insert("sources".into(), json!(sources));
        facts.insert("recipe_blake3".into(), json!(attar_formats::hash_bytes(recipe.as_bytes())));
        facts.insert("recipe".into(), json!(recipe));
        facts.insert("calibration_blake3".into(), json!(windows.as_ref().map(|w| &w.hash)));
        facts.insert("calibration_tokens".into(), json!(windows.as_ref().map(Windows::tokens)));
        artifact::write_manifest(&folder, facts)?;
        time.write += started.elapsed().as_secs_f64();
        folders.push((output.emit, folder));
    }
    let mut reports = Vec::new();
    for (emit, folder) in folders {
        let started = Instant::now();
        let checked = verify::verify(&folder, Some(&job.checkpoint), false)?;
        if !checked.problems.is_empty() {
            return Err(format!(
                "what was written does not verify: {}",
                checked.problems.join("; ")
            )
            .into());
        }
        time.verify += started.elapsed().as_secs_f64();
        let opened = Opened::open(&folder)?;
        let started = Instant::now();
        let eval = measure.map(|measure| accuracy(job, &opened, measure)).transpose()?;
        time.eval += started.elapsed().as_secs_f64();
        time.total = begun.elapsed().as_secs_f64();
        let report = Report {
            attar: env!("CARGO_PKG_VERSION").into(),
            layout: emit.layout.0.into(),
            file_bytes: opened.checkpoint.file_bytes()?,
            source_bytes: job.checkpoint.file_bytes()?,
            bits_per_weight: opened.bits_per_weight(),
            sites: sites.clone(),
            eval,
            notes: plan.notes.clone(),
            predicted_peak_bytes: plan.memory.peak() as u64,
            measured_peak_bytes: peak_memory(),
            timings: time,
        };
        artifact::put_json(&folder.join(artifact::REPORT), &serde_json::to_value(&report)?)?;
        let page = folder.join(artifact::REPORT_PAGE);
        std::fs::write(&page, attar_eval::html::page(&report))
            .map_err(|error| format!("{}: {error}", page.display()))?;
        reports.push((out.join(emit.dir.as_deref().unwrap_or("")), report));
    }
    root.seal()?;
    Ok(reports)
}

fn accuracy(
    job: &Job,
    artifact: &Opened,
    measure: &Measure,
) -> Result<attar_eval::Evaluation, Error> {
    let reference = Opened::open(job.checkpoint.folder())?;
    let tokenizer = Tokenizer::open(job.checkpoint.folder())?;
    let context = measure.context.min(job.decoder.spec.context);
    let source = CorpusSource::Text(vec![measure.text.clone()]);
    let vocab = job.decoder.spec.vocab;
    let windows = corpus::evaluation(&source, Some(&tokenizer), context, None, vocab)?;
    let found = measure::evaluate(artifact, Some(&reference), &windows, None, context, Score::All)?;
    Ok(found.0)
}

fn config_json(job: &Job, layout: &str) -> Result<Value, Error> {
    let mut config = job.checkpoint.config().clone();
    let (mut quantized, mut dense) = (Vec::new(), Vec::new());
    for site in &job.plan.sites {
        match site.scheme {
            Some(scheme) => quantized.push((site.name.clone(), scheme)),
            None => dense.push(site.name.clone()),
        }
    }
    config["quantization_config"] = quant_config::write(layout, &quantized, &dense)?;
    if job.plan.untied {
        config["tie_word_embeddings"] = json!(false);
    }
    Ok(config)
}

/// Peak resident memory of this process, bytes.
pub(crate) fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}
