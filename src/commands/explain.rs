//! `attar explain`: what was done to one tensor, from manifest, report and headers.

use std::{collections::BTreeMap, path::Path};

use attar_formats::Checkpoint;
use attar_ir::{
    Block, Event, FormChange, FormSet, Needs, Producer, Site, Touches, Upstream,
    ledger::{Fate, Line},
    pass::Contract,
    recipe::{AnyPass, Recipe, nearest},
};
use attar_tensor::{DType, TensorHeader, TensorSource};
use serde::Serialize;

use crate::{
    Error,
    args::Explain,
    provenance::{Record, Weights, short, site_of_part},
    registry,
};

/// Name, dtype, shape, bytes.
#[derive(Debug, Clone, Serialize)]
struct Stored {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
    bytes: usize,
}

impl Stored {
    fn new(header: &TensorHeader) -> Self {
        Self {
            name: header.name.clone(),
            dtype: header.dtype.safetensors_name(),
            shape: header.shape.clone(),
            bytes: header.bytes(),
        }
    }

    fn line(&self) -> String {
        format!("{}  {} {:?}  {} bytes", self.name, self.dtype, self.shape, self.bytes)
    }
}

/// The source tensor and how it is known.
#[derive(Debug, Serialize)]
struct Source {
    #[serde(flatten)]
    stored: Stored,
    /// `headers of <folder>`, or what it was inferred from.
    known_from: String,
}

/// What a step read.
#[derive(Debug, Serialize)]
struct Statistics {
    kinds: Vec<String>,
    upstream: Option<Upstream>,
    calibration_blake3: Option<String>,
    calibration_tokens: Option<u64>,
    key: Option<String>,
}

/// One recipe step on this tensor.
#[derive(Debug, Serialize)]
struct StepLine {
    step: String,
    pass: String,
    recipe: Option<String>,
    scheme: Option<String>,
    statistics: Option<Statistics>,
    weight_error: f64,
    output_error: Option<f64>,
    events: Vec<Event>,
    seconds: f64,
}

/// Everything that is known.
#[derive(Debug, Serialize)]
struct Explanation {
    artifact: String,
    tensor: String,
    /// One sentence: quantized, copied, changed, tied, dropped.
    fate: String,
    source: Option<Source>,
    written: Vec<Stored>,
    layout: Option<String>,
    scheme: Option<String>,
    bits_per_weight: Option<f64>,
    /// Zeros that pruning left, as they were read back.
    #[serde(skip_serializing_if = "Option::is_none")]
    zeros: Option<attar_eval::report::Zeros>,
    /// The line of the report's ledger for the source tensor.
    ledger: Option<Line>,
    steps: Vec<StepLine>,
    /// Steps that folded scales into it.
    folded_by: Vec<String>,
    /// True when the artifact carries a manifest of ours.
    provenance: bool,
    attar: Option<String>,
    isa: Option<String>,
    seed: Option<u64>,
    recipe_blake3: Option<String>,
    sources: BTreeMap<String, String>,
    notes: Vec<String>,
}

/// What a name stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Subject {
    /// A linear, dense or packed.
    Site(String),
    /// Any other tensor, in the artifact or only in the source.
    Tensor(String),
}

/// Every name by which tensors of the artifact and its source are known.
fn names(
    weights: &Weights,
    source: Option<&Checkpoint>,
    ledger: &[Line],
) -> BTreeMap<String, Subject> {
    let mut names = BTreeMap::new();
    let site = |names: &mut BTreeMap<String, Subject>, site: &str| {
        let subject = Subject::Site(site.to_owned());
        names.insert(site.to_owned(), subject.clone());
        names.insert(format!("{site}.weight"), subject.clone());
        for part in weights.parts(site).into_iter().chain(weights.thin(site)) {
            names.insert(part.name.clone(), subject.clone());
        }
    };
    if let Some(model) = weights.model() {
        for found in model.decoder.graph.all_blocks().flat_map(|block| &block.sites) {
            site(&mut names, &found.name);
        }
    }
    let headers: Vec<_> = weights.headers().collect();
    for header in &headers {
        if let Some(found) = site_of_part(&header.name)
            && !names.contains_key(&header.name)
        {
            site(&mut names, found);
        }
    }
    let source = source.map(Checkpoint::headers).unwrap_or_default();
    for header in headers.into_iter().chain(source) {
        let tensor = || Subject::Tensor(header.name.clone());
        names.entry(header.name.clone()).or_insert_with(tensor);
    }
    for line in ledger {
        let tensor = || Subject::Tensor(line.tensor.clone());
        names.entry(line.tensor.clone()).or_insert_with(tensor);
    }
    names
}

/// Names spelt most like `asked`: compared with as many segments from the end as were typed, else by the
/// last segment alone, those that share other segments first.
fn suggest<'a>(asked: &str, names: &'a BTreeMap<String, Subject>) -> Vec<&'a str> {
    let asked: Vec<&str> = asked.split('.').collect();
    for count in [asked.len(), 1] {
        let tail = |name: &str| -> String {
            let all: Vec<&str> = name.split('.').collect();
            all[all.len().saturating_sub(count)..].join(".")
        };
        let typed = asked[asked.len() - count..].join(".");
        let tails: Vec<String> = names.keys().map(|name| tail(name)).collect();
        let Some(near) = nearest(&typed, tails.iter().map(String::as_str)) else { continue };
        let mut found: Vec<&str> =
            names.keys().map(String::as_str).filter(|name| tail(name) == near).collect();
        let strange = |name: &str| {
            asked.iter().filter(|part| !name.split('.').any(|have| have == **part)).count()
        };
        found.sort_by_key(|name| strange(name));
        let least = found.first().map_or(0, |name| strange(name));
        found.retain(|name| strange(name) == least);
        return found;
    }
    Vec::new()
}

/// The subject that `asked` names: exactly, or as the end of the names of one subject only.
fn resolve(asked: &str, names: &BTreeMap<String, Subject>, place: &Path) -> Result<Subject, Error> {
    if let Some(subject) = names.get(asked) {
        return Ok(subject.clone());
    }
    let ending = format!(".{}", asked.trim_start_matches('.'));
    let mut subjects: Vec<(&String, &Subject)> = Vec::new();
    for (name, subject) in names.iter().filter(|(name, _)| name.ends_with(&ending)) {
        if subjects.iter().all(|(_, seen)| *seen != subject) {
            subjects.push((name, subject));
        }
    }
    let list = |found: &[&str]| {
        let more = if found.len() > 4 { ", ..." } else { "" };
        format!("{}{more}", found[..found.len().min(4)].join(", "))
    };
    match subjects.as_slice() {
        [(_, subject)] => Ok((*subject).clone()),
        [] => {
            let found = suggest(asked, names);
            let hint = if found.is_empty() {
                "`attar inspect` lists what there is".to_owned()
            } else {
                format!("did you mean {}?", list(&found))
            };
            Err(format!("{}: no tensor or site `{asked}`; {hint}", place.display()).into())
        }
        several => {
            let found: Vec<&str> = several.iter().map(|(name, _)| name.as_str()).collect();
            Err(format!(
                "{}: `{asked}` is the end of {} names ({}); give more of the name",
                place.display(),
                several.len(),
                list(&found)
            )
            .into())
        }
    }
}

/// What the recipe's passes promise, by step; empty when this version cannot build them. With an importance matrix
/// it stands for sums of squares.
fn contracts(recipe: Option<Recipe>, imatrix: bool) -> Vec<Contract> {
    let Some(mut recipe) = recipe else { return Vec::new() };
    let Ok(passes) = recipe.resolve(registry::known().as_known()) else { return Vec::new() };
    // Passes on the whole model touch no site by itself.
    let none = Contract {
        accepts: FormSet::DENSE_FLOAT,
        produces: FormChange::NONE,
        needs: Needs::empty(),
        upstream: Upstream::Original,
        touches: Touches::Sites,
        looks_ahead: false,
    };
    let own = passes.iter().zip(&recipe.steps).map(|(pass, step)| {
        let AnyPass::Block(pass) = pass else { return none };
        let schemed = step.scheme.is_some() || step.types.is_some();
        if schemed { pass.contract_with_scheme() } else { pass.contract() }
    });
    own.zip(&recipe.steps)
        .map(|(own, step)| {
            let given = imatrix && own.needs == Needs::SQUARE_SUM;
            let usual = if given { Upstream::Given } else { own.upstream };
            Contract { upstream: step.upstream.unwrap_or(usual), ..own }
        })
        .collect()
}

/// The block and site of this name.
fn place<'a>(weights: &'a Weights, site: &str) -> Option<(&'a Block, usize)> {
    weights.model()?.decoder.graph.all_blocks().find_map(|block| {
        block.sites.iter().position(|found| found.name == site).map(|at| (block, at))
    })
}

/// Labels of the steps that folded scales into a tensor: those that touch folds and worked on a consumer of
/// a fold whose producer the tensor is.
fn folded_by(
    weights: &Weights,
    record: &Record,
    contracts: &[Contract],
    tensor: &str,
) -> Vec<String> {
    let mut labels: Vec<String> = Vec::new();
    let (Some(model), Some(report)) = (weights.model(), &record.report) else { return labels };
    for block in model.decoder.graph.all_blocks() {
        for fold in &block.folds {
            let made_by = match fold.producer {
                Producer::Norm(at) => block.norms[at].tensor == tensor,
                Producer::Rows(at) => tensor
                    .strip_prefix(&block.sites[at].name)
                    .is_some_and(|rest| rest.is_empty() || rest == ".weight" || rest == ".bias"),
            };
            if !made_by {
                continue;
            }
            let consumers = &block.inputs[fold.input].sites;
            for entry in &report.sites {
                let consumes =
                    consumers.iter().any(|&site| block.sites[site].name == entry.result.site);
                let index = record.step_index(&entry.step, &entry.result.pass);
                let folds = index
                    .and_then(|index| contracts.get(index))
                    .is_some_and(|contract| contract.touches == Touches::Folds);
                let label = label(&entry.step, index, &entry.result.pass);
                if consumes && folds && !labels.contains(&label) {
                    labels.push(label);
                }
            }
        }
    }
    labels
}

fn label(written: &str, index: Option<usize>, pass: &str) -> String {
    match (written, index) {
        ("", Some(index)) => format!("step[{index}] ({pass})"),
        ("", None) => pass.to_owned(),
        (written, _) => written.to_owned(),
    }
}

/// Every report entry of a site, in the order in which steps ran.
fn steps(record: &Record, contracts: &[Contract], site: &str) -> Vec<StepLine> {
    let Some(report) = &record.report else { return Vec::new() };
    let manifest = record.manifest.as_ref();
    let line = |entry: &attar_eval::report::SiteEntry| {
        let index = record.step_index(&entry.step, &entry.result.pass);
        let contract = index.and_then(|index| contracts.get(index));
        let reads = contract.is_none_or(|contract| contract.needs != Needs::empty());
        let given = contract.is_some_and(|contract| contract.upstream == Upstream::Given);
        let from = if given { "imatrix_blake3" } else { "calibration_blake3" };
        let calibration_blake3 = record.fact(from).map(str::to_owned);
        let statistics = (reads && calibration_blake3.is_some()).then(|| Statistics {
            kinds: contract
                .map(|c| c.needs.iter_names().map(|(name, _)| name.to_lowercase()).collect())
                .unwrap_or_default(),
            upstream: contract.map(|contract| contract.upstream),
            calibration_blake3,
            calibration_tokens: manifest
                .filter(|_| !given)
                .and_then(|m| m.get("calibration_tokens")?.as_u64()),
            key: entry.statistics.clone(),
        });
        StepLine {
            step: label(&entry.step, index, &entry.result.pass),
            pass: entry.result.pass.clone(),
            recipe: index.and_then(|index| record.step_toml(index)),
            scheme: entry.scheme.clone(),
            statistics,
            weight_error: entry.result.weight_error,
            output_error: entry.result.output_error,
            events: entry.result.events.clone(),
            seconds: entry.seconds,
        }
    };
    report.sites.iter().filter(|entry| entry.result.site == site).map(line).collect()
}

/// The dtype that config.json names for the weights.
fn config_dtype(weights: &Weights) -> Option<DType> {
    let config = weights.checkpoint().config();
    match config.get("dtype").or_else(|| config.get("torch_dtype"))?.as_str()? {
        "float32" => Some(DType::F32),
        "float16" => Some(DType::F16),
        "bfloat16" => Some(DType::BF16),
        _ => None,
    }
}

fn source_of(
    weights: &Weights,
    source: Option<&Checkpoint>,
    name: &str,
    site: Option<&Site>,
) -> Option<Source> {
    if let Some(source) = source {
        let stored = Stored::new(source.header(name_in(source, name, weights))?);
        let known_from = format!("headers of {}", source.folder().display());
        return Some(Source { stored, known_from });
    }
    let (site, dtype) = (site?, config_dtype(weights)?);
    let header = TensorHeader {
        name: name.to_owned(),
        dtype,
        shape: vec![site.out_features, site.in_features],
    };
    let known_from = "config.json; the source is not at hand".to_owned();
    Some(Source { stored: Stored::new(&header), known_from })
}

/// Name under which the source keeps what the artifact calls `name`: a tied checkpoint may store its one
/// matrix as the head's.
fn name_in<'a>(source: &Checkpoint, name: &'a str, weights: &Weights) -> &'a str {
    const HEAD: &str = "lm_head.weight";
    let graph = weights.model().map(|model| &model.decoder.graph);
    let tied = graph.is_some_and(|graph| graph.tied && graph.embedding == name);
    if tied && source.header(name).is_none() && source.header(HEAD).is_some() { HEAD } else { name }
}

/// Labels of the passes on the whole model, and a line of what each did.
fn whole_model(record: &Record) -> (Vec<String>, Vec<String>) {
    let entries = record.report.as_ref().map(|report| report.model.as_slice()).unwrap_or_default();
    let (mut labels, mut lines): (Vec<String>, Vec<String>) = (Vec::new(), Vec::new());
    for entry in entries {
        if !labels.contains(&entry.step) {
            labels.push(entry.step.clone());
            // One block stands for all of a kind.
            let (what, before, after) = (&entry.what, entry.before, entry.after);
            let did = match &entry.training {
                Some(training) => {
                    let ends = (training.curve.first(), training.curve.last());
                    let loss = match ends {
                        (Some((_, from)), Some((_, to))) => format!(", loss {from:.4} -> {to:.4}"),
                        _ => String::new(),
                    };
                    format!(
                        "{} values trained by {} in {} steps{loss}",
                        training.trained, training.loss, training.steps
                    )
                }
                None => format!("{what} {before} -> {after}"),
            };
            let when = if entry.what == "scales" { "behind" } else { "before" };
            lines.push(format!("{}, {when} all steps on blocks: {did}", entry.step));
        }
    }
    (labels, lines)
}

/// The name that a tensor of a block had before passes on the whole model took blocks away.
fn source_block(record: &Record, name: &str) -> String {
    const PREFIX: &str = "model.layers.";
    let entries = record.report.as_ref().map(|report| report.model.as_slice()).unwrap_or_default();
    let mut name = name.to_owned();
    for entry in entries.iter().rev().filter(|entry| entry.what == "blocks") {
        let Some((index, rest)) = name.strip_prefix(PREFIX).and_then(|n| n.split_once('.')) else {
            break;
        };
        let Ok(index) = index.parse::<usize>() else { break };
        let kept = (0..entry.before).filter(|block| !entry.removed.contains(block)).nth(index);
        let Some(kept) = kept else { break };
        name = format!("{PREFIX}{kept}.{rest}");
    }
    name
}

/// True when both hold the same bytes under these names.
fn same_bytes(artifact: (&Checkpoint, &str), source: (&Checkpoint, &str)) -> Result<bool, Error> {
    let (a, b) = (artifact.0.read(artifact.1)?, source.0.read(source.1)?);
    let same = a.dtype() == b.dtype() && a.shape() == b.shape() && a.bytes() == b.bytes();
    artifact.0.release(artifact.1);
    source.0.release(source.1);
    Ok(same)
}

/// The source, when it was given or is where the report says; a hint that leads nowhere is a note.
fn open_source(args: &Explain, record: &mut Record) -> Result<Option<Checkpoint>, Error> {
    if let Some(folder) = &args.source {
        return Ok(Some(Checkpoint::open(folder)?));
    }
    let hint = record.report.as_ref().map(|report| report.inputs.source.clone());
    let Some(folder) = hint.filter(|folder| !folder.as_os_str().is_empty()) else {
        return Ok(None);
    };
    match Checkpoint::open(&folder) {
        Ok(source) => Ok(Some(source)),
        Err(error) => {
            record.notes.push(format!("the source is not at hand ({error}); give --source"));
            Ok(None)
        }
    }
}

fn find(args: &Explain) -> Result<Explanation, Error> {
    let mut record = Record::open(&args.artifact)?;
    let weights = Weights::open(&args.artifact)?;
    let source = open_source(args, &mut record)?;
    let ledger = record.report.as_ref().map(|report| report.ledger.as_slice()).unwrap_or_default();
    let names = names(&weights, source.as_ref(), ledger);
    let subject = resolve(&args.tensor, &names, &args.artifact)?;
    let contracts = contracts(record.recipe(), record.fact("imatrix_blake3").is_some());
    let checkpoint = weights.checkpoint();
    let mut notes = record.notes.clone();
    if let Weights::Files(_, why) = &weights {
        notes.push(format!("only headers and config.json were read: {why}"));
    }
    let provenance = record.manifest.is_some();
    if !provenance {
        notes.push(
            "no attar_manifest.json: where this came from is not known; this is what headers and config.json say"
                .into(),
        );
    } else if record.report.is_none() {
        notes.push("no report.json: steps, errors and events are not known".into());
    }
    let (name, site) = match &subject {
        Subject::Site(site) => (format!("{site}.weight"), Some(site.as_str())),
        Subject::Tensor(name) => (name.clone(), None),
    };
    let found = site.and_then(|site| place(&weights, site));
    let mut parts = site.map(|site| weights.parts(site)).unwrap_or_default();
    let rank = site.and_then(|site| weights.model()?.rank(site));
    parts.extend(site.map(|site| weights.thin(site)).unwrap_or_default());
    let steps = site.map(|site| steps(&record, &contracts, site)).unwrap_or_default();
    let folded = folded_by(&weights, &record, &contracts, site.unwrap_or(&name));
    let mut written: Vec<Stored> = parts.iter().map(|header| Stored::new(header)).collect();
    let mut scheme = steps.iter().rev().find_map(|step| step.scheme.clone());
    if let (None, Some(model), Some((block, at))) = (&scheme, weights.model(), found) {
        scheme = model.scheme_of(&block.sites[at]).map(attar_tensor::QuantScheme::label);
    }
    let bytes: usize = written.iter().map(|part| part.bytes).sum();
    let quantized = !parts.is_empty();
    let bits_per_weight = found
        .filter(|_| quantized)
        .map(|(block, at)| 8.0 * bytes as f64 / block.sites[at].weights().max(1) as f64);
    let layout = weights.layout().filter(|_| quantized).map(str::to_owned);
    let layout = layout.or_else(|| (quantized && rank.is_none()).then(|| "unknown".to_owned()));

    let (whole, lines) = whole_model(&record);
    notes.extend(lines);
    let graph = weights.model().map(|model| &model.decoder.graph);
    let tied = graph
        .is_some_and(|graph| graph.tied && name == "lm_head.weight" && graph.embedding != name);
    let changed = |by: &[String]| format!("changed by {}, kept in its dtype", by.join(", "));
    let by: Vec<String> =
        steps.iter().map(|step| step.step.clone()).chain(folded.clone()).collect();
    let fate = if let Some(rank) = rank {
        let by = if by.is_empty() { String::new() } else { format!(" by {}", by.join(", ")) };
        let scheme = scheme.as_ref().map(|scheme| format!(", factors quantized as {scheme}"));
        format!("factored to rank {rank}{}{by}", scheme.unwrap_or_default())
    } else if quantized {
        let scheme = scheme.as_deref().unwrap_or("an unknown scheme");
        let by = if steps.is_empty() { "" } else { " by " };
        let last = steps.last().map_or("", |step| step.step.as_str());
        format!("quantized as {scheme}{by}{last}")
    } else if let (true, Some(graph)) = (tied, graph) {
        written.extend(checkpoint.header(&graph.embedding).map(Stored::new));
        format!("tied to {}", graph.embedding)
    } else if let Some(header) = checkpoint.header(&name) {
        written.push(Stored::new(header));
        // Blocks may have been taken away before this one.
        let before = source_block(&record, &name);
        let stored = source.as_ref().map(|source| (source, name_in(source, &before, &weights)));
        match stored.filter(|(source, stored)| source.header(stored).is_some()) {
            Some((source, stored)) if same_bytes((checkpoint, &name), (source, stored))? => {
                if by.is_empty() {
                    "copied, byte for byte as in the source".into()
                } else {
                    format!("left as it was by {}: byte for byte as in the source", by.join(", "))
                }
            }
            Some(_) if by.is_empty() && !whole.is_empty() => changed(&whole),
            Some(_) if by.is_empty() => {
                "kept in its dtype, but its bytes are not the source's and no step is recorded for it"
                    .into()
            }
            Some(_) => changed(&by),
            None if !provenance => "stored unquantized".into(),
            None if by.is_empty() => {
                "copied from the source (no step is recorded for it)".into()
            }
            None => changed(&by),
        }
    } else if source.as_ref().is_some_and(|source| source.header(&name).is_some())
        || ledger.iter().any(|line| line.tensor == name && line.fate == Fate::Dropped)
    {
        "dropped: in the source, but not in the artifact".into()
    } else {
        "not stored in the artifact".into()
    };
    let source_name = if tied { graph.map_or(name.clone(), |g| g.embedding.clone()) } else { name };
    let line = ledger.iter().find(|line| line.tensor == source_name).cloned();
    let origin = source_of(
        &weights,
        source.as_ref().filter(|_| provenance || args.source.is_some()),
        &source_name,
        found.map(|(block, at)| &block.sites[at]).filter(|_| provenance),
    );
    let sources = record
        .manifest
        .as_ref()
        .and_then(|manifest| manifest.get("sources")?.as_object())
        .map(|sources| {
            let text = |hash: &serde_json::Value| hash.as_str().unwrap_or_default().to_owned();
            sources.iter().map(|(file, hash)| (file.clone(), text(hash))).collect()
        })
        .unwrap_or_default();
    let text = |key: &str| record.fact(key).map(str::to_owned);
    Ok(Explanation {
        artifact: args.artifact.display().to_string(),
        tensor: site.map_or(source_name, str::to_owned),
        fate,
        source: origin,
        written,
        layout,
        scheme,
        bits_per_weight,
        zeros: record.report.as_ref().and_then(|report| {
            report.sparsity.iter().find(|zeros| Some(zeros.site.as_str()) == site).cloned()
        }),
        ledger: line,
        steps,
        folded_by: folded,
        provenance,
        attar: text("attar"),
        isa: text("isa"),
        seed: record.recipe().map(|recipe| recipe.calibration.seed),
        recipe_blake3: text("recipe_blake3"),
        sources,
        notes,
    })
}

fn event(event: &Event) -> String {
    match event {
        Event::DampeningRaised { percdamp, failures } => {
            format!("dampening raised to {percdamp} after {failures} failed factorizations")
        }
        Event::DeadColumns { count } => format!("{count} dead columns"),
        Event::LeftAlone { reason } => format!("left as it was: {reason}"),
        Event::Learned { steps, before, after } => {
            format!("loss of the block from {before:.4} to {after:.4} in {steps} steps")
        }
        Event::Chosen { name, value } => format!("{name} = {value} chosen"),
    }
}

fn print(e: &Explanation) {
    say!("{}: {}", e.tensor, e.fate);
    if let Some(source) = &e.source {
        say!("  source   {}  ({})", source.stored.line(), source.known_from);
    }
    for (at, stored) in e.written.iter().enumerate() {
        say!("  {:<7}  {}", if at == 0 { "written" } else { "" }, stored.line());
    }
    if let (Some(layout), Some(bits)) = (&e.layout, e.bits_per_weight) {
        say!("  layout   {layout}, {bits:.3} bits per weight");
    }
    if let Some(zeros) = &e.zeros {
        let pattern = zeros.pattern.as_ref().map(|pattern| format!(", {pattern}"));
        say!("  zeros    {:.2} %{}", 100.0 * zeros.zeros, pattern.unwrap_or_default());
    }
    if let Some(line) = &e.ledger {
        say!("  ledger   {}: {}, {}", line.tensor, line.fate, line.detail);
    }
    for step in &e.steps {
        say!("{}", step.step);
        for line in step.recipe.iter().flat_map(|recipe| recipe.lines()).filter(|l| !l.is_empty()) {
            say!("    {line}");
        }
        if let Some(statistics) = &step.statistics {
            let upstream = match statistics.upstream {
                Some(Upstream::Original) => ", original upstream",
                Some(Upstream::Compressed) => ", compressed upstream",
                Some(Upstream::Given) => ", from an importance matrix",
                None => "",
            };
            let key = statistics.key.as_ref().map(|key| format!(", statistic {key}"));
            say!(
                "  statistics  {} {} {}{upstream}{}",
                statistics.kinds.join(", "),
                match statistics.calibration_tokens {
                    Some(tokens) => format!("over {tokens} tokens of calibration set"),
                    None => "of file".to_owned(),
                },
                short(statistics.calibration_blake3.as_deref().unwrap_or("unknown")),
                key.unwrap_or_default()
            );
        }
        let output = match step.output_error {
            Some(error) => format!(", output {error:.3e}"),
            None => String::new(),
        };
        say!("  errors      weight {:.3e}{output} (squared, relative)", step.weight_error);
        if !step.events.is_empty() {
            let events: Vec<String> = step.events.iter().map(event).collect();
            say!("  events      {}", events.join("; "));
        }
        say!("  time        {:.3} s (all sites of its stage)", step.seconds);
    }
    if !e.folded_by.is_empty() {
        say!("  scales were folded into it by {}", e.folded_by.join(", "));
    }
    if e.provenance {
        let sources: Vec<String> =
            e.sources.iter().map(|(file, hash)| format!("{file} {}", short(hash))).collect();
        say!(
            "made by attar {} with {}, seed {}, recipe {}, from {}",
            e.attar.as_deref().unwrap_or("of an unknown version"),
            e.isa.as_deref().unwrap_or("an unrecorded instruction set"),
            e.seed.unwrap_or_default(),
            short(e.recipe_blake3.as_deref().unwrap_or("unknown")),
            if sources.is_empty() { "unknown sources".to_owned() } else { sources.join(", ") }
        );
    }
    for note in &e.notes {
        say!("note: {note}");
    }
}

pub(crate) fn explain(args: &Explain) -> Result<bool, Error> {
    let explanation = find(args)?;
    if args.json {
        say!("{}", serde_json::to_string_pretty(&explanation)?);
    } else {
        print(&explanation);
    }
    Ok(true)
}
