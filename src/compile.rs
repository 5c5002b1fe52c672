//! The walk: what do we have, what will we do, do it, write it, read it back.

mod keys;
mod output;
mod prepare;
mod reshape;
mod scales;
mod settle;
mod shim;
mod train;
mod walk;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::mpsc,
    time::Duration,
};

use attar_eval::{
    Report, Score,
    report::{Phase, SiteEntry, Timings},
};
use attar_formats::{
    Checkpoint, CorpusSource, Windows,
    adapter::AdapterWriter,
    artifact::{self, ArtifactRoot, ArtifactWriter},
    corpus,
    gguf::Gguf,
    quant_config,
    stage::Stage,
};
use attar_ir::{
    BlockState, Limits, ModelEntry, Needs, Work,
    plan::{self, Plan, Variant},
    recipe::Recipe,
    target::Violation,
};
use attar_model::{Decoder, DecoderSpec};
use attar_tensor::{BlockType, Scratch, TensorHeader, linalg};
use serde_json::{Map, Value, json};

use self::{
    keys::Ground,
    output::Output,
    reshape::{Base, Made},
    walk::{Surroundings, Walk},
};
pub(crate) use self::{prepare::prepare, settle::settle};
use crate::{
    Error, args::Promise, bundle, contract, importance::Importances, measure, packed::Opened,
    progress, provenance, trace::Trace, verify,
};

/// A proven plan with everything it was proven on.
pub(crate) struct Job {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) decoder: Decoder,
    /// The recipe as a whole, every default filled in.
    pub(crate) recipe: Recipe,
    /// What its paths are relative to.
    pub(crate) folder: PathBuf,
    /// Its variants, each with its proof; one when the recipe is a chain. A variant's recipe holds its steps on
    /// blocks; passes on the whole model stand in the plan.
    pub(crate) variants: Vec<(Variant, Plan)>,
    /// What the steps on blocks of each variant begin from, and its whole recipe.
    pub(crate) bases: Vec<(Base, Recipe)>,
    pub(crate) corpus: Option<CorpusSource>,
    /// Statistics that are not taken by calibrating.
    pub(crate) imatrix: Option<Importances>,
    /// What the artifacts must be good for.
    promise: Promise,
    /// What the targets warn of.
    pub(crate) warnings: Vec<Violation>,
}

impl Job {
    /// Threads that work: all variants keep to the budget.
    pub(crate) fn threads(&self) -> usize {
        self.variants.iter().map(|(_, plan)| plan.limits.threads).min().unwrap_or(1)
    }

    /// True when a path of the recipe (that of a teacher) is read and not recorded elsewhere.
    pub(crate) fn reads_recipe_paths(&self) -> bool {
        let mut steps =
            self.variants.iter().flat_map(|(_, plan)| plan.model.iter().chain(&plan.last));
        steps.any(|step| step.teacher.is_some())
    }

    /// True when a run leaves something in the work directory.
    fn stores(&self) -> bool {
        self.calibrates() || self.variants.iter().any(|(_, plan)| !plan.model.is_empty())
    }

    /// True when any variant reads statistics.
    pub(crate) fn calibrates(&self) -> bool {
        self.variants.iter().any(|(_, plan)| plan.calibrates())
    }
}

/// Opens scratch files in the work directory, else in the system's temporary one.
fn scratch_of(stage: Option<&Stage>) -> Scratch {
    match stage {
        Some(stage) => {
            let place = stage.scratch();
            Scratch::new(move || tempfile::tempfile_in(&place))
        }
        None => measure::scratch(),
    }
}

/// How a compression is run.
#[derive(Debug, Clone)]
pub(crate) struct Options<'a> {
    /// Where the artifacts appear.
    pub(crate) out: &'a Path,
    pub(crate) measure: Option<Measure>,
    /// Work directory that is kept; `<out>.scratch` until the end when absent.
    pub(crate) scratch: Option<&'a Path>,
    /// Activations are stored once per so much time.
    pub(crate) checkpoint_every: Duration,
    /// Bytes that a kept work directory may hold afterwards.
    pub(crate) cache_limit: Option<u64>,
    /// Progress as JSON lines.
    pub(crate) json_progress: bool,
    /// The kernel bundle is wanted.
    pub(crate) kernels: bool,
    /// Where its library lies when not beside this program.
    pub(crate) library: Option<&'a Path>,
}

impl<'a> Options<'a> {
    /// Nothing but the place.
    pub(crate) fn new(out: &'a Path) -> Self {
        Self {
            out,
            measure: None,
            scratch: None,
            checkpoint_every: Duration::from_secs(30),
            cache_limit: None,
            json_progress: false,
            kernels: false,
            library: None,
        }
    }
}

/// An accuracy measurement asked for with the compression.
#[derive(Debug, Clone)]
pub(crate) struct Measure {
    pub(crate) text: PathBuf,
    pub(crate) context: usize,
}

/// Everything that the bytes of one artifact depend on, for its manifest.
fn facts(
    (recipe, plan): (&Recipe, &Plan),
    emit: &plan::PlannedEmit,
    sources: &BTreeMap<String, String>,
    (windows, imatrix): (Option<&Windows>, Option<&Importances>),
) -> Result<Map<String, Value>, Error> {
    let recipe = recipe.to_toml();
    // A variant that reads no statistics does not depend on what its siblings were calibrated on.
    let windows = windows.filter(|_| plan.calibrates());
    let mut facts = Map::new();
    facts.insert("attar".into(), json!(env!("CARGO_PKG_VERSION")));
    facts.insert("layout".into(), json!(emit.layout.0));
    facts.extend(provenance::facts(emit));
    facts.insert("sources".into(), json!(sources));
    facts.insert("recipe_blake3".into(), json!(attar_formats::hash_bytes(recipe.as_bytes())));
    facts.insert("recipe".into(), json!(recipe));
    facts.insert("calibration_blake3".into(), json!(windows.map(|w| &w.hash)));
    if let Some(imatrix) = imatrix.filter(|_| plan.steps.iter().any(|step| step.given.is_some())) {
        facts.insert("imatrix_blake3".into(), json!(imatrix.hash));
    }
    facts.insert("calibration_tokens".into(), json!(windows.map(Windows::tokens)));
    let mut teachers = Map::new();
    for step in plan.model.iter().chain(&plan.last) {
        if let Some(folder) = &step.teacher {
            teachers.insert(step.of_chain.clone(), json!(train::teacher_hash(folder)?));
        }
    }
    if !teachers.is_empty() {
        facts.insert("teacher_blake3".into(), Value::Object(teachers));
    }
    Ok(facts)
}

fn read_windows(job: &Job) -> Result<Option<Windows>, Error> {
    let Some(source) = job.corpus.as_ref().filter(|_| job.calibrates()) else { return Ok(None) };
    let tokenizer = match source {
        CorpusSource::Text(_) => Some(job.checkpoint.tokenizer()?),
        CorpusSource::Ids(_) => None,
    };
    let config = &job.recipe.calibration;
    let (context, vocab) = (config.context.min(job.decoder.spec.context), job.decoder.spec.vocab);
    let windows = corpus::calibration(source, tokenizer.as_ref(), context, config.samples, vocab)?;
    drop(tokenizer);
    attar_formats::give_freed_pieces_back();
    Ok(Some(windows))
}

/// `<out>.scratch`, beside the output.
fn default_scratch(out: &Path) -> PathBuf {
    let mut name = out.file_name().unwrap_or_default().to_os_string();
    name.push(".scratch");
    out.with_file_name(name)
}

/// Compresses and writes every artifact; returns one report per emit with the folder it lies in. Run
/// again after a kill or an error, it goes on where it stopped; run again after it has finished, it checks
/// what lies there.
pub(crate) fn compile(job: &Job, options: &Options<'_>) -> Result<Vec<(PathBuf, Report)>, Error> {
    let trace = Trace::new(options.json_progress);
    let scratch = options.scratch.map_or_else(|| default_scratch(options.out), Path::to_path_buf);
    if options.kernels {
        let emits = job.variants.iter().flat_map(|(_, plan)| &plan.emits);
        bundle::check_plan(options.library, emits.map(|emit| emit.layout))?;
    }
    if let Some(reports) = finished(job, options, &trace)? {
        if options.scratch.is_none() && scratch.exists() {
            // A run that was killed between its last two acts.
            Stage::open(&scratch)?.destroy()?;
        }
        return Ok(reports);
    }
    // The places are tried before any work is done.
    let root = ArtifactRoot::create(options.out)?;
    let stage = job.stores().then(|| Stage::open(&scratch)).transpose()?;
    let reports =
        produce(job, options, &root, stage.as_ref(), &trace).map_err(|error| match &stage {
            Some(stage) => Error::from(format!(
                "{error}\n  what is done so far lies in {}; the same command goes on from there",
                stage.root().display()
            )),
            None => error,
        })?;
    let begun = trace.begin(Phase::Seal, "rename");
    root.seal()?;
    if let Some(stage) = stage {
        match (options.scratch, options.cache_limit) {
            (None, _) => stage.destroy()?,
            (Some(_), Some(limit)) => {
                let gone = stage.prune(limit)?;
                if !gone.is_empty() {
                    trace.note(&format!("{} objects of the work directory pruned", gone.len()));
                }
            }
            (Some(_), None) => {}
        }
    }
    trace.end(Phase::Seal, "rename", begun);
    Ok(reports)
}

/// The reports of artifacts that this very job has made already, after a look at their hashes.
fn finished(
    job: &Job,
    options: &Options<'_>,
    trace: &Trace,
) -> Result<Option<Vec<(PathBuf, Report)>>, Error> {
    let out = options.out;
    let emits = || {
        let all = job.variants.iter().zip(&job.bases);
        all.flat_map(|((_, plan), (_, recipe))| plan.emits.iter().map(move |e| (recipe, plan, e)))
    };
    let folder = |dir: &Option<String>| out.join(dir.as_deref().unwrap_or(""));
    if !emits().all(|(.., emit)| folder(&emit.dir).join(artifact::REPORT).is_file()) {
        return Ok(None);
    }
    let sources = trace.run(Phase::Read, "hashes", || job.checkpoint.hashes()).0?;
    let windows = read_windows(job)?;
    let mut reports = Vec::new();
    for (recipe, plan, emit) in emits() {
        let folder = folder(&emit.dir);
        let manifest = attar_formats::read_json(&folder.join(artifact::MANIFEST))?;
        let facts =
            facts((recipe, plan), emit, &sources, (windows.as_ref(), job.imatrix.as_ref()))?;
        if facts.iter().any(|(name, value)| manifest.get(name) != Some(value)) {
            return Ok(None);
        }
        let wrong = trace.run(Phase::Verify, emit.layout.0, || artifact::check_manifest(&folder));
        if let Some(wrong) = wrong.0?.first() {
            return Err(format!(
                "{}: was made by this command, but {wrong}; remove it or choose another --out",
                folder.display()
            )
            .into());
        }
        let report = attar_formats::read_json(&folder.join(artifact::REPORT))?;
        let report: Report = serde_json::from_value(report)?;
        if options.measure.is_some() && report.eval.is_none() {
            return Ok(None);
        }
        if options.kernels && !bundle::exists(&folder) {
            trace.run(Phase::Seal, "kernels", || bundle::write(&folder, options.library)).0?;
        }
        reports.push((folder, report));
    }
    ArtifactRoot::clear_marker(out)?;
    trace.note("the artifact is there already, made from the same inputs; its hashes are right");
    Ok(Some(reports))
}

fn produce(
    job: &Job,
    options: &Options<'_>,
    root: &ArtifactRoot,
    stage: Option<&Stage>,
    trace: &Trace,
) -> Result<Vec<(PathBuf, Report)>, Error> {
    let mut time = Timings::default();
    let windows = read_windows(job)?;
    let (sources, seconds) = trace.run(Phase::Read, "hashes", || job.checkpoint.hashes());
    let sources = sources?;
    time.read += seconds;
    let salt = salt()?;
    let mut made = Vec::new();
    for (at, (variant, plan)) in job.variants.iter().enumerate() {
        // Passes on the whole model come first; what they make is the checkpoint of the rest.
        let around = stage.map(|stage| reshape::Around {
            windows: windows.as_ref(),
            stage,
            limits: &plan.limits,
            seed: job.recipe.calibration.seed,
            salt: &salt,
            checkpoint_every: options.checkpoint_every,
        });
        let reshaped = match &around {
            Some(around) if !plan.model.is_empty() => {
                let hashes = json!(sources).to_string();
                reshape::run(&plan.model, &job.checkpoint, &hashes, around, trace, &mut time)?
            }
            _ => None,
        };
        let ground = Ground {
            salt: match &reshaped {
                Some(made) => format!("{salt} {}", made.hash),
                None => format!("{salt} {}", sources.get("config.json").map_or("", String::as_str)),
            },
            windows: windows.as_ref().map(|w| w.hash.clone()).unwrap_or_default(),
            imatrix: job.imatrix.as_ref().map(|own| own.hash.clone()).unwrap_or_default(),
            seed: job.recipe.calibration.seed,
        };
        // One set of original statistics serves all variants that begin from one model.
        let numbers =
            |plan: &Plan| plan.model.iter().map(|step| step.number).collect::<Vec<usize>>();
        let same = |other: &&(Variant, Plan)| numbers(&other.1) == numbers(plan);
        let original = keys::original_needs(job.variants.iter().filter(same).map(|(_, plan)| plan));
        let start = Start::new(job, at, reshaped)?;
        let walked = walk_variant(
            job,
            &start,
            options,
            root,
            stage,
            (variant, plan),
            (&ground, &original, &sources, windows.as_ref()),
            around.as_ref(),
            trace,
            &mut time,
        )?;
        made.push((plan, start, walked));
    }
    let mut reports = Vec::new();
    for (plan, start, (folders, sites, reused, trained)) in made {
        for (at, (emit, folder)) in folders.into_iter().enumerate() {
            let what = emit.dir.as_deref().unwrap_or(emit.layout.0);
            let begun = trace.begin(Phase::Verify, what);
            let source = start.checkpoint(job);
            let mut checked = verify::verify(&folder, Some(source), false)?;
            let opened = Opened::open(&folder)?;
            let ledger = contract::lines(plan, &job.checkpoint, start.headers, at);
            let targets = contract::targets(&job.promise, emit)?;
            let kept = contract::kept(&ledger, source, &opened, &targets)?;
            checked.problems.extend(kept.broken);
            if !checked.problems.is_empty() {
                return Err(format!(
                    "what was written does not verify: {}",
                    checked.problems.join("; ")
                )
                .into());
            }
            time.verify += trace.end(Phase::Verify, what, begun);
            let mut eval = None;
            if let Some(measure) = &options.measure {
                let measuring = || accuracy(job, &opened, measure, &plan.limits, stage);
                let (found, seconds) = trace.run(Phase::Eval, what, measuring);
                eval = Some(found?);
                time.eval += seconds;
            }
            time.total = trace.total();
            // Variants run one after the other in one process.
            let peak = job.variants.iter().map(|(_, plan)| plan.memory.peak()).max();
            let peak = peak.unwrap_or(0) as u64;
            let report = Report {
                attar: env!("CARGO_PKG_VERSION").into(),
                layout: emit.layout.0.into(),
                isa: linalg::level().name().into(),
                inputs: provenance::inputs(job),
                file_bytes: opened.file_bytes()?,
                source_bytes: job.checkpoint.file_bytes()?,
                bits_per_weight: opened.bits_per_weight(),
                model: start
                    .made
                    .iter()
                    .flat_map(|made| &made.entries)
                    .chain(&trained)
                    .cloned()
                    .collect(),
                sites: sites.clone(),
                sparsity: checked.sparsity,
                eval,
                notes: [plan.notes.clone(), kept.warnings].concat(),
                ledger,
                predicted_peak_bytes: peak,
                measured_peak_bytes: peak_memory(),
                timings: time,
                timeline: trace.spans(),
                reused,
            };
            let begun = trace.begin(Phase::Seal, what);
            artifact::put_json(&folder.join(artifact::REPORT), &serde_json::to_value(&report)?)?;
            let page = folder.join(artifact::REPORT_PAGE);
            std::fs::write(&page, attar_eval::html::page(&report))
                .map_err(|error| format!("{}: {error}", page.display()))?;
            trace.end(Phase::Seal, what, begun);
            if options.kernels {
                trace.run(Phase::Seal, "kernels", || bundle::write(&folder, options.library)).0?;
            }
            reports.push((options.out.join(emit.dir.as_deref().unwrap_or("")), report));
        }
    }
    Ok(reports)
}

/// What makes results of one build differ from those of another: the binary itself and the instruction set in
/// use.
fn salt() -> Result<String, Error> {
    let binary = std::env::current_exe().map_err(|error| format!("the running binary: {error}"))?;
    Ok(format!("{} {}", attar_formats::hash_file(&binary)?, linalg::level()))
}

/// The model that a variant's steps on blocks begin from.
struct Start<'a> {
    /// Made by passes on the whole model; `None` is the checkpoint itself.
    made: Option<Made>,
    /// Dtypes are those in which artifacts keep tensors.
    decoder: Decoder,
    headers: &'a [TensorHeader],
    /// The variant's whole recipe.
    recipe: &'a Recipe,
}

impl<'a> Start<'a> {
    fn new(job: &'a Job, at: usize, made: Option<Made>) -> Result<Self, Error> {
        let (base, recipe) = &job.bases[at];
        let mut decoder = base.decoder.clone();
        if let Some(made) = &made {
            // Which layers stayed is known now, and with them their windows.
            decoder.spec = DecoderSpec::read(made.checkpoint.config())?;
        }
        Ok(Self { made, decoder, headers: &base.headers, recipe })
    }

    fn checkpoint<'b>(&'b self, job: &'b Job) -> &'b Checkpoint {
        self.made.as_ref().map_or(&job.checkpoint, |made| &made.checkpoint)
    }
}

/// Folders with their emits, lines of the report, results reused and all, and what training scales did.
type Walked<'a> =
    (Vec<(&'a plan::PlannedEmit, PathBuf)>, Vec<SiteEntry>, (usize, usize), Option<ModelEntry>);

fn walk_variant<'a>(
    job: &'a Job,
    start: &Start<'_>,
    options: &Options<'_>,
    root: &ArtifactRoot,
    stage: Option<&Stage>,
    (variant, plan): (&'a Variant, &'a Plan),
    (ground, original, sources, windows): (
        &Ground,
        &[Vec<Needs>],
        &BTreeMap<String, String>,
        Option<&Windows>,
    ),
    behind: Option<&reshape::Around<'_>>,
    trace: &Trace,
    time: &mut Timings,
) -> Result<Walked<'a>, Error> {
    let (checkpoint, decoder) = (start.checkpoint(job), &start.decoder);
    let mut damaged = Vec::new();
    let file = |name: &str| -> String {
        if let Some(made) = &start.made {
            return made.hash.clone();
        }
        let file = job.checkpoint.file_of(name).and_then(Path::file_name);
        let hash = file.and_then(|file| sources.get(file.to_string_lossy().as_ref()));
        hash.cloned().unwrap_or_default()
    };
    let begun = trace.begin(Phase::Store, "what is there");
    let has = |key: &str| stage.is_some_and(|stage| keys::whole(stage, key, &mut damaged));
    let blocks = keys::blocks(ground, plan, original, &file, has);
    time.store += trace.end(Phase::Store, "what is there", begun);
    for key in damaged {
        trace.note(&format!(
            "object {key} of the work directory is damaged; its work is done again"
        ));
    }
    let units = || blocks.iter().flat_map(|b| &b.rounds).flat_map(|round| &round.units);
    let (here, models) = start.made.as_ref().map_or((0, 0), |made| made.reused);
    let reused = (here + units().filter(|unit| unit.cached).count(), models + units().count());
    let mut outputs = Vec::new();
    for (at, emit) in plan.emits.iter().enumerate() {
        let folder = match &emit.dir {
            Some(dir) => root.partial().join(dir),
            None => root.partial().to_path_buf(),
        };
        let headers: Vec<_> = emit.tensors.iter().map(plan::OutputTensor::header).collect();
        let writer = if emit.container == plan::GGUF {
            let most = BlockType::from_name(emit.layout.0);
            let described = crate::gguf::describe(checkpoint, &decoder.spec, most)?;
            let of = |site: &str| plan.block_of(at, site);
            ArtifactWriter::create_gguf(&folder, crate::gguf::plan(described, headers, of))?
        } else {
            ArtifactWriter::create(&folder, headers)?
        };
        let headers: Vec<_> = emit.adapter.iter().map(plan::OutputTensor::header).collect();
        let adapter = (!headers.is_empty()).then(|| AdapterWriter::create(&folder, headers));
        let adapter = adapter.transpose()?;
        outputs.push(Output { emit, writer, adapter, written: BTreeSet::new() });
    }
    let bar = progress::bar(decoder.spec.layers + 1, "compressing");
    let around = Surroundings {
        checkpoint,
        decoder,
        imatrix: job.imatrix.as_ref(),
        seed: job.recipe.calibration.seed,
        first: plan.model.len(),
        plan,
        recipe: &variant.recipe,
        windows,
        stage,
        ground,
        blocks: &blocks,
        checkpoint_every: options.checkpoint_every,
    };
    let mut walk = Walk::new(around, trace, time);
    let mut trained = None;
    // Blocks are packed and written while the next one is worked on; one at most waits.
    let (sender, receiver) = mpsc::sync_channel::<(usize, BlockState)>(0);
    let writing = &mut outputs;
    std::thread::scope(|scope| {
        let writer = scope.spawn(move || -> Result<(), String> {
            for (index, state) in receiver {
                let block = decoder.block(index);
                let begun = trace.begin(Phase::Emit, walk::name_of(block));
                for output in &mut *writing {
                    output
                        .put_block(block, &state, checkpoint)
                        .map_err(|error| error.to_string())?;
                }
                trace.end(Phase::Emit, walk::name_of(block), begun);
            }
            Ok(())
        });
        let mut walking = || -> Result<bool, Error> {
            walk.survey()?;
            let mut waiting = Vec::new();
            for block in decoder.graph.all_blocks() {
                if blocks[block.index].rounds.is_empty() && plan.last.is_none() {
                    bar.inc(1);
                    continue;
                }
                bar.set_message(walk::name_of(block).to_owned());
                if let Some(next) = decoder.graph.blocks.get(block.index + 1) {
                    checkpoint.prefetch(&next.prefix);
                }
                let state = walk.run_block(block)?;
                if plan.last.is_some() {
                    waiting.push(state);
                    bar.inc(1);
                    continue;
                }
                if sender.send((block.index, state)).is_err() {
                    return Ok(false);
                }
                bar.inc(1);
            }
            if let (Some(step), Some(around)) = (&plan.last, behind)
                && let Work::Train(train) = step.pass.work()
            {
                walk.drop_streams();
                bar.finish_and_clear();
                let key = last_key(step, ground, &blocks, sources)?;
                let models = (&job.checkpoint, checkpoint, decoder);
                let training =
                    || scales::run(step, train, models, &mut waiting, (&key, around), trace);
                trained = Some(trace.run(Phase::Solve, &step.label, training).0?);
                for state in waiting {
                    let index = state.index;
                    if !blocks[index].rounds.is_empty() && sender.send((index, state)).is_err() {
                        return Ok(false);
                    }
                }
            }
            Ok(true)
        };
        let walked = walking();
        drop(sender);
        match writer.join() {
            Ok(Ok(())) => walked.map(drop),
            Ok(Err(error)) => Err(error.into()),
            Err(_) => Err("the writer has panicked".into()),
        }
    })?;
    bar.finish_and_clear();
    let sites = walk.finish()?;
    let begun = trace.begin(Phase::Emit, "files");
    let mut folders = Vec::new();
    for mut output in outputs {
        output.put_rest(checkpoint)?;
        if output.emit.container != plan::GGUF {
            for file in checkpoint.auxiliary_files()? {
                output.writer.copy_file(&file)?;
            }
            for (name, json) in checkpoint.gguf().map(Gguf::generated_files).unwrap_or_default() {
                output.writer.put_json(name, &json)?;
            }
            output.writer.put_json("config.json", &config_json(checkpoint, plan, output.emit)?)?;
            if !plan.factored(output.emit).is_empty() {
                output.writer.put_text(shim::FILE, &shim::text(checkpoint.config())?)?;
            }
        }
        if let Some(adapter) = output.adapter {
            let rank = |site: &plan::SitePlan| Some((site.name.clone(), site.correction?));
            adapter.finish(&plan.sites.iter().filter_map(rank).collect::<Vec<_>>())?;
        }
        let folder = output.writer.finish()?;
        artifact::write_manifest(
            &folder,
            facts((start.recipe, plan), output.emit, sources, (windows, job.imatrix.as_ref()))?,
        )?;
        folders.push((output.emit, folder));
    }
    trace.end(Phase::Emit, "files", begun);
    time.write = trace.seconds(Phase::Emit);
    Ok((folders, sites, reused, trained))
}

/// Name of the scales that a training behind all steps makes.
fn last_key(
    step: &plan::ModelStep,
    ground: &Ground,
    blocks: &[keys::BlockKeys],
    sources: &BTreeMap<String, String>,
) -> Result<String, Error> {
    let teacher = match &step.teacher {
        Some(folder) => train::teacher_hash(folder)?,
        None => json!(sources).to_string(),
    };
    let units = blocks.iter().flat_map(|b| &b.rounds).flat_map(|round| &round.units);
    let units: Vec<&str> = units.map(|unit| unit.key.as_str()).collect();
    let (units, options) = (units.join(" "), keys::toml_text(&step.options));
    let seed = ground.seed.to_string();
    let own = [step.pass.name(), &options, &seed, &ground.windows, &teacher];
    Ok(keys::hash(&[&[keys::VERSION, "scales", &ground.salt, &units], &own[..]].concat()))
}

fn accuracy(
    job: &Job,
    artifact: &Opened,
    measure: &Measure,
    limits: &Limits,
    stage: Option<&Stage>,
) -> Result<attar_eval::Evaluation, Error> {
    let reference = Opened::open(job.checkpoint.place())?;
    let tokenizer = job.checkpoint.tokenizer()?;
    let context = measure.context.min(job.decoder.spec.context);
    let source = CorpusSource::Text(vec![measure.text.clone()]);
    let vocab = job.decoder.spec.vocab;
    let windows = corpus::evaluation(&source, Some(&tokenizer), context, None, vocab)?;
    drop(tokenizer);
    attar_formats::give_freed_pieces_back();
    let spill = measure::spill(limits, &scratch_of(stage));
    let found =
        measure::evaluate(artifact, Some(&reference), &windows, None, context, Score::All, &spill)?;
    Ok(found.0)
}

fn config_json(
    checkpoint: &Checkpoint,
    plan: &Plan,
    emit: &plan::PlannedEmit,
) -> Result<Value, Error> {
    let mut config = checkpoint.config().clone();
    let (mut quantized, mut dense) = (Vec::new(), Vec::new());
    for (name, scheme) in plan.linears(emit) {
        match scheme {
            Some(scheme) => quantized.push((name, scheme)),
            None => dense.push(name),
        }
    }
    let layout = emit.layout.0;
    let factored = plan.factored(emit);
    if !factored.is_empty() {
        shim::declare(&mut config, &factored);
    }
    if layout != plan::DENSE.0 {
        config["quantization_config"] = quant_config::write(layout, &quantized, &dense)?;
    }
    if plan.untied {
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
