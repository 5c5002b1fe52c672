//! `attar reproduce`: compress again from an artifact's manifest and compare every hash.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use attar_formats::{Checkpoint, CorpusSource, artifact, corpus};
use attar_tensor::linalg::{self, Level};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::{
    Error,
    args::{Promise, Reproduce, What},
    compile::{self, Job},
    measure,
    provenance::{Record, platform, short},
};

/// One file of the manifest.
#[derive(Debug, Serialize)]
struct FileLine {
    file: String,
    /// blake3 in the manifest.
    recorded: Option<String>,
    /// blake3 of what was made now.
    made: Option<String>,
    same: bool,
}

#[derive(Debug, Serialize)]
struct Reproduction {
    identical: bool,
    artifact: PathBuf,
    source: PathBuf,
    isa: &'static str,
    files: Vec<FileLine>,
    /// Facts of the manifest that differ.
    facts: Vec<String>,
    /// Where the new artifact was kept.
    out: Option<PathBuf>,
    seconds: f64,
    notes: Vec<String>,
}

/// The manifest with what cannot be done without.
struct Recorded {
    record: Record,
    recipe: String,
    sources: Map<String, Value>,
    files: Map<String, Value>,
}

impl Recorded {
    fn open(folder: &Path) -> Result<Self, Error> {
        let record = Record::open(folder)?;
        let lacks = |what: &str| {
            format!(
                "{}: has no {what}; only artifacts made by attar can be made again",
                folder.display()
            )
        };
        let manifest = record.manifest.as_ref().ok_or_else(|| lacks(artifact::MANIFEST))?;
        let table = |key: &str| manifest.get(key).and_then(Value::as_object).cloned();
        let recipe = record.fact("recipe").ok_or_else(|| lacks("`recipe` in its manifest"))?;
        let sources = table("sources").ok_or_else(|| lacks("`sources` in its manifest"))?;
        let files = table("files").ok_or_else(|| lacks("`files` in its manifest"))?;
        Ok(Self { recipe: recipe.to_owned(), sources, files, record })
    }

    /// Version and instruction set must be the recorded ones; pins the latter.
    fn check_tool(&self, asked: Option<Level>, notes: &mut Vec<String>) -> Result<(), Error> {
        let version = env!("CARGO_PKG_VERSION");
        match self.record.fact("attar") {
            Some(recorded) if recorded == version => {}
            recorded => {
                let recorded = recorded.unwrap_or("an unrecorded version");
                return Err(format!(
                    "made by attar {recorded}, this is {version}, and other versions may round differently; use attar {recorded}"
                )
                .into());
            }
        }
        match self.record.fact("isa") {
            Some(name) => {
                let isa: Level = name.parse()?;
                if let Some(asked) = asked.filter(|asked| *asked != isa) {
                    return Err(format!(
                        "made with {isa}, but --isa {asked} was given; leave --isa away"
                    )
                    .into());
                }
                linalg::pin(isa).map_err(|error| {
                    format!("made with {isa}: {error}; reproduce it on a CPU that has it, or compress again with --isa of a set that both have")
                })?;
            }
            None => notes.push(
                "the manifest records no instruction set; the best of this CPU is used".into(),
            ),
        }
        let here = platform();
        if let Some(recorded) = self.record.fact("platform").filter(|recorded| *recorded != here) {
            notes.push(format!("made on {recorded}, this is {here}: last digits may differ"));
        }
        Ok(())
    }

    /// Every file of the source must have the recorded hash.
    fn check_source(&self, folder: &Path) -> Result<(), Error> {
        let found = Checkpoint::open(folder)?.hashes()?;
        let names: BTreeSet<&String> = self.sources.keys().chain(found.keys()).collect();
        let wrong: Vec<String> = names
            .into_iter()
            .filter_map(|name| {
                match (self.sources.get(name).and_then(Value::as_str), found.get(name)) {
                    (Some(want), Some(have)) if want == have => None,
                    (Some(want), Some(have)) => {
                        Some(format!("{name} is {}, recorded is {}", short(have), short(want)))
                    }
                    (Some(_), None) => Some(format!("{name} is missing")),
                    (None, _) => Some(format!("{name} was not there")),
                }
            })
            .collect();
        if wrong.is_empty() {
            return Ok(());
        }
        Err(format!(
            "{}: not the checkpoint that this artifact was made from: {}; give the right one with --source",
            folder.display(),
            wrong.join("; ")
        )
        .into())
    }

    /// The calibration windows must have the recorded hash.
    fn check_calibration(&self, job: &Job) -> Result<(), Error> {
        let Some(recorded) = self.record.fact("calibration_blake3") else { return Ok(()) };
        let Some(source) = &job.corpus else {
            return Err("calibration data is needed; give --text or --ids".into());
        };
        let tokenizer = match source {
            CorpusSource::Text(_) => Some(job.checkpoint.tokenizer()?),
            CorpusSource::Ids(_) => None,
        };
        let settings = &job.recipe.calibration;
        let (context, vocab) =
            (settings.context.min(job.decoder.spec.context), job.decoder.spec.vocab);
        let windows =
            corpus::calibration(source, tokenizer.as_ref(), context, settings.samples, vocab)?;
        if windows.hash == recorded {
            return Ok(());
        }
        let tokens = |n: Option<u64>| n.map_or("an unknown number of".into(), |n| n.to_string());
        let manifest = self.record.manifest.as_ref();
        Err(format!(
            "calibration set is {} ({} tokens), recorded is {} ({} tokens); give the same text with --text, or the same ids with --ids, and the checkpoint's own tokenizer.json",
            short(&windows.hash),
            windows.tokens(),
            short(recorded),
            tokens(manifest.and_then(|m| m.get("calibration_tokens")?.as_u64()))
        )
        .into())
    }

    /// The importance matrix must have the recorded hash.
    fn check_imatrix(&self, job: &Job) -> Result<(), Error> {
        let Some(recorded) = self.record.fact("imatrix_blake3") else { return Ok(()) };
        match &job.imatrix {
            Some(own) if own.hash == recorded => Ok(()),
            Some(own) => Err(format!(
                "{} is {}, recorded is {}; give the right file with --imatrix",
                own.path().display(),
                short(&own.hash),
                short(recorded)
            )
            .into()),
            None => Err("an importance matrix is needed; give --imatrix".into()),
        }
    }

    /// Where the inputs are: what was typed, else the report's hints.
    fn what(&self, args: &Reproduce, recipe: PathBuf) -> Result<What, Error> {
        let hints = self.record.report.as_ref().map(|report| report.inputs.clone());
        let hints = hints.unwrap_or_default();
        let given = args.ids.is_some() || !args.text.is_empty();
        let (text, ids) =
            if given { (args.text.clone(), args.ids.clone()) } else { (hints.text, hints.ids) };
        let checkpoint = args.source.clone().unwrap_or(hints.source);
        if checkpoint.as_os_str().is_empty() {
            return Err("report.json does not say where the source is; give --source DIR".into());
        }
        if !checkpoint.exists() {
            return Err(format!(
                "{}: the source is not there; give --source DIR",
                checkpoint.display()
            )
            .into());
        }
        if self.record.fact("calibration_blake3").is_some() {
            if text.is_empty() && ids.is_none() {
                return Err(
                    "report.json does not say where the calibration data is; give --text or --ids"
                        .into(),
                );
            }
            if let Some(missing) = text.iter().chain(&ids).find(|path| !path.exists()) {
                return Err(format!(
                    "{}: the calibration data is not there; give --text or --ids",
                    missing.display()
                )
                .into());
            }
        }
        // The plan was accepted once; what it was held against changes no byte.
        let mut imatrix = args.imatrix.clone().or(hints.imatrix);
        if self.record.fact("imatrix_blake3").is_none() {
            imatrix = None;
        } else if let Some(missing) = imatrix.as_ref().filter(|path| !path.exists()) {
            return Err(format!(
                "{}: the importance matrix is not there; give --imatrix",
                missing.display()
            )
            .into());
        }
        let promise = Promise { allow_dense: true, ..Promise::default() };
        Ok(What {
            checkpoint,
            recipe: Some(recipe),
            base: hints.recipe,
            text,
            ids,
            imatrix,
            promise,
            ..What::default()
        })
    }
}

/// The folder of the artifact among those that the recipe emits.
fn made_in(job: &Job, recorded: &Recorded, root: &Path) -> Result<PathBuf, Error> {
    let dir = recorded.record.fact("emit");
    let layout = recorded.record.fact("layout");
    let emits: Vec<_> = job.variants.iter().flat_map(|(_, plan)| &plan.emits).collect();
    let found = emits
        .iter()
        .find(|emit| emit.dir.as_deref() == dir && layout.is_none_or(|l| l == emit.layout.0))
        // Manifests before `emit`: the layout tells.
        .or_else(|| emits.iter().find(|emit| layout == Some(emit.layout.0)))
        .ok_or("the recipe of the manifest does not emit this artifact")?;
    Ok(found.dir.as_ref().map_or_else(|| root.to_path_buf(), |dir| root.join(dir)))
}

fn compare(recorded: &Recorded, made: &Record) -> Result<(Vec<FileLine>, Vec<String>), Error> {
    let made = made.manifest.as_ref().ok_or("what was made has no manifest")?;
    let new_files = made.get("files").and_then(Value::as_object).cloned().unwrap_or_default();
    let names: BTreeSet<&String> = recorded.files.keys().chain(new_files.keys()).collect();
    let hash = |table: &Map<String, Value>, name: &str| {
        table.get(name).and_then(|file| file.get("blake3")?.as_str()).map(str::to_owned)
    };
    let files = names
        .into_iter()
        .map(|name| {
            let (old, new) = (hash(&recorded.files, name), hash(&new_files, name));
            FileLine {
                same: old.is_some() && old == new,
                file: name.clone(),
                recorded: old,
                made: new,
            }
        })
        .collect();
    let old = recorded.record.manifest.as_ref().ok_or("the artifact has a manifest")?;
    let facts: BTreeSet<&String> =
        old.keys().chain(made.keys()).filter(|k| *k != "files").collect();
    // A fact that older manifests lack says nothing about the bytes.
    let facts = facts
        .into_iter()
        .filter(|name| old.get(*name).is_some_and(|value| Some(value) != made.get(*name)))
        .cloned()
        .collect();
    Ok((files, facts))
}

fn run(args: &Reproduce, asked: Option<Level>) -> Result<Reproduction, Error> {
    let begun = std::time::Instant::now();
    let mut notes = Vec::new();
    let recorded = Recorded::open(&args.artifact)?;
    notes.extend(recorded.record.notes.iter().cloned());
    recorded.check_tool(asked, &mut notes)?;
    if let Some(out) = &args.out
        && fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some())
    {
        // A finished artifact there would be looked at instead of being made.
        return Err(
            format!("{}: exists and is not empty; choose another --out", out.display()).into()
        );
    }
    // Beside the artifact: the same disk, where there was room for one.
    let beside = std::path::absolute(args.out.as_ref().unwrap_or(&args.artifact))?;
    let parent = beside.parent().ok_or("an artifact lies in a directory")?;
    let name = args.artifact.file_name().unwrap_or_default().to_string_lossy();
    let scratch = tempfile::Builder::new()
        .prefix(&format!(".{name}.reproduce-"))
        .tempdir_in(parent)
        .map_err(|error| {
            format!("{}: {error}; choose another place with --out", parent.display())
        })?;
    let recipe = scratch.path().join("recipe.toml");
    fs::write(&recipe, &recorded.recipe)
        .map_err(|error| format!("{}: {error}", recipe.display()))?;
    let what = recorded.what(args, recipe)?;
    recorded.check_source(&what.checkpoint)?;
    let job = compile::prepare(&what, measure::threads(None), None)?;
    recorded.check_calibration(&job)?;
    recorded.check_imatrix(&job)?;
    let job = compile::settle(job, &what, measure::threads(None), None)?;
    let root = args.out.clone().unwrap_or_else(|| scratch.path().join("artifact"));
    let made_in = made_in(&job, &recorded, &root)?;
    compile::compile(&job, &compile::Options::new(&root))?;
    let (files, facts) = compare(&recorded, &Record::open(&made_in)?)?;
    let mut identical = files.iter().all(|file| file.same) && facts.is_empty();
    for problem in artifact::check_manifest(&args.artifact)? {
        identical = false;
        notes.push(format!("the artifact itself is not what its manifest says: {problem}"));
    }
    Ok(Reproduction {
        identical,
        artifact: args.artifact.clone(),
        source: what.checkpoint,
        isa: linalg::level().name(),
        files,
        facts,
        out: args.out.is_some().then_some(made_in),
        seconds: begun.elapsed().as_secs_f64(),
        notes,
    })
}

fn print(r: &Reproduction) {
    let width = r.files.iter().map(|file| file.file.len()).max().unwrap_or(4).max(4);
    say!("{:<width$}  {:<12}  {:<12}  ", "file", "recorded", "made");
    for line in &r.files {
        let hash = |hash: &Option<String>| hash.as_deref().map_or("-", short).to_owned();
        say!(
            "{:<width$}  {:<12}  {:<12}  {}",
            line.file,
            hash(&line.recorded),
            hash(&line.made),
            if line.same { "same" } else { "DIFFERS" }
        );
    }
    for fact in &r.facts {
        say!("fact `{fact}` of the manifest DIFFERS");
    }
    for note in &r.notes {
        say!("note: {note}");
    }
    if let Some(out) = &r.out {
        say!("kept in {}", out.display());
    }
    say!(
        "{} from {} with {} in {:.1} s",
        if r.identical { "identical" } else { "NOT identical" },
        r.source.display(),
        r.isa,
        r.seconds
    );
}

pub(crate) fn reproduce(args: &Reproduce, asked: Option<Level>) -> Result<bool, Error> {
    let reproduction = run(args, asked)
        .map_err(|error| format!("{}: cannot be reproduced: {error}", args.artifact.display()))?;
    if args.json {
        say!("{}", serde_json::to_string_pretty(&reproduction)?);
    } else {
        print(&reproduction);
    }
    Ok(reproduction.identical)
}
