//! Where an artifact comes from: what a run adds to the manifest and the report, and how both are read.
//!
//! The manifest holds what the bytes depend on, so that two runs with the same manifest have the same
//! bytes wherever they ran; paths and times stand in the report.

use std::path::Path;

use attar_eval::{Report, report::Inputs};
use attar_formats::{Adapter, Checkpoint, CorpusSource, artifact, quant_config};
use attar_ir::{
    plan::{Leaf, PlannedEmit},
    recipe::Recipe,
};
use attar_kernels::layout::{SUFFIXES, suffixes_of};
use attar_tensor::{TensorHeader, TensorSource, TensorView, linalg};
use serde_json::{Map, Value, json};

use crate::{Error, compile::Job, packed::Opened};

/// Facts of the manifest that the bytes depend on beside recipe, source and calibration: instruction set
/// and platform (whose libm computes a few sines and powers), and which emit of the recipe this is.
pub(crate) fn facts(emit: &PlannedEmit) -> Map<String, Value> {
    let mut facts = Map::new();
    facts.insert("isa".into(), json!(linalg::level().name()));
    facts.insert("platform".into(), json!(platform()));
    facts.insert("emit".into(), json!(emit.dir));
    facts
}

/// Architecture and operating system, e.g. `x86_64-linux`.
pub(crate) fn platform() -> String {
    format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS)
}

/// Where this run found its inputs, absolute.
pub(crate) fn inputs(job: &Job) -> Inputs {
    let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    let mut inputs = Inputs { source: absolute(job.checkpoint.place()), ..Inputs::default() };
    match &job.corpus {
        Some(CorpusSource::Text(paths)) => {
            inputs.text = paths.iter().map(|p| absolute(p)).collect();
        }
        Some(CorpusSource::Ids(path)) => inputs.ids = Some(absolute(path)),
        None => {}
    }
    // An empty folder is that of a preset, or the current one.
    inputs.recipe = Some(absolute(&job.folder.join("."))).filter(|_| job.reads_recipe_paths());
    inputs.imatrix = job.imatrix.as_ref().map(|own| absolute(own.path()));
    inputs
}

/// Manifest and report of an artifact, as far as it has them.
#[derive(Debug, Default)]
pub(crate) struct Record {
    pub(crate) manifest: Option<Map<String, Value>>,
    pub(crate) report: Option<Report>,
    /// What could not be read.
    pub(crate) notes: Vec<String>,
}

impl Record {
    /// Reads both; an artifact without a manifest has no provenance, which is no error.
    pub(crate) fn open(folder: &Path) -> Result<Self, Error> {
        let mut record = Self::default();
        let path = folder.join(artifact::MANIFEST);
        if path.exists() {
            let Value::Object(manifest) = attar_formats::read_json(&path)? else {
                return Err(format!("{}: is no JSON object", path.display()).into());
            };
            record.manifest = Some(manifest);
        }
        let path = folder.join(artifact::REPORT);
        if path.exists() {
            match serde_json::from_value(attar_formats::read_json(&path)?) {
                Ok(report) => record.report = Some(report),
                Err(error) => record.notes.push(format!(
                    "{} is not a report of this version and was not read: {error}",
                    path.display()
                )),
            }
        }
        Ok(record)
    }

    /// A text of the manifest.
    pub(crate) fn fact(&self, key: &str) -> Option<&str> {
        self.manifest.as_ref()?.get(key)?.as_str()
    }

    /// The recipe, when the manifest keeps one that this version reads.
    pub(crate) fn recipe(&self) -> Option<Recipe> {
        Recipe::parse(self.fact("recipe")?).ok()
    }

    /// `[[step]]` number `index` of the recipe, as the manifest keeps it.
    pub(crate) fn step_toml(&self, index: usize) -> Option<String> {
        let recipe: toml::Table = self.fact("recipe")?.parse().ok()?;
        let step = recipe.get("step")?.as_array()?.get(index)?.clone();
        let mut alone = toml::Table::new();
        alone.insert("step".into(), toml::Value::Array(vec![step]));
        toml::to_string(&alone).ok()
    }

    /// Index of the recipe step behind a report entry: by its label, else (reports before labels) the first
    /// step of that pass.
    pub(crate) fn step_index(&self, label: &str, pass: &str) -> Option<usize> {
        let number = label.strip_prefix("step[").and_then(|rest| rest.split_once(']'));
        if let Some(index) = number.and_then(|(index, _)| index.parse().ok()) {
            return Some(index);
        }
        self.recipe()?.steps.iter().position(|step| step.pass == pass)
    }
}

/// A directory with weights: a model whose parts are understood, or files only.
#[derive(Debug)]
pub(crate) enum Weights {
    /// Its architecture is known.
    Model(Box<Opened>),
    /// Headers and config.json are all that can be read, and why.
    Files(Box<Checkpoint>, String),
}

impl Weights {
    pub(crate) fn open(folder: &Path) -> Result<Self, Error> {
        match Opened::open(folder) {
            Ok(opened) => Ok(Self::Model(Box::new(opened))),
            Err(error) => Ok(Self::Files(Box::new(Checkpoint::open(folder)?), error.to_string())),
        }
    }

    pub(crate) fn checkpoint(&self) -> &Checkpoint {
        match self {
            Self::Model(opened) => &opened.checkpoint,
            Self::Files(checkpoint, _) => checkpoint,
        }
    }

    pub(crate) fn model(&self) -> Option<&Opened> {
        match self {
            Self::Model(opened) => Some(opened),
            Self::Files(..) => None,
        }
    }

    /// Name of the layout, when anything is packed.
    pub(crate) fn layout(&self) -> Option<&'static str> {
        match self {
            Self::Model(opened) => opened.layout(),
            Self::Files(checkpoint, _) => {
                quant_config::parse(checkpoint.config()).ok().flatten().map(|quant| quant.layout)
            }
        }
    }

    /// Every tensor of the checkpoint, then of the adapter.
    pub(crate) fn headers(&self) -> impl Iterator<Item = &TensorHeader> {
        let adapter = self.model().and_then(Opened::adapter);
        self.checkpoint().headers().iter().chain(adapter.into_iter().flat_map(Adapter::headers))
    }

    /// One tensor of either.
    pub(crate) fn read(&self, name: &str) -> Result<TensorView<'_>, Error> {
        let adapter = self.model().and_then(Opened::adapter);
        match adapter.and_then(|adapter| adapter.view(name)) {
            Some(view) => Ok(view),
            None => Ok(self.checkpoint().read(name)?),
        }
    }

    /// Tensors that a factored site is written as, and those of its correction; empty when it has none.
    pub(crate) fn thin(&self, site: &str) -> Vec<&TensorHeader> {
        let of = |name: &str| {
            let rest = name.strip_prefix(site);
            rest.is_some_and(|rest| rest.starts_with(".down.") || rest.starts_with(".up."))
        };
        let corrects = [Leaf::CorrectionDown, Leaf::CorrectionUp].map(|l| l.name(site, "weight"));
        let factored = self.model().is_some_and(|model| model.rank(site).is_some());
        self.headers().filter(|h| factored && of(&h.name) || corrects.contains(&h.name)).collect()
    }

    /// Tensors of the packed linear of this name; empty when there is none.
    pub(crate) fn parts(&self, site: &str) -> Vec<&TensorHeader> {
        let header = |part: &str| self.checkpoint().header(&format!("{site}.{part}"));
        suffixes_of(|part| header(part).is_some()).into_iter().filter_map(header).collect()
    }
}

/// The site of a packed part's name, e.g. `a.q_proj` of `a.q_proj.weight_packed`; a tensor `weight` alone
/// tells nothing.
pub(crate) fn site_of_part(name: &str) -> Option<&str> {
    let (site, part) = name.rsplit_once('.')?;
    (part != "weight" && SUFFIXES.contains(&part)).then_some(site)
}

/// Digits of a hash that people compare.
pub(crate) fn short(hash: &str) -> &str {
    hash.get(..12).unwrap_or(hash)
}
