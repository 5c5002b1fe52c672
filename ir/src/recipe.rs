//! The file the user writes: TOML, unknown keys refused, every default visible in [`Recipe::to_toml`].

mod mixture;
mod pattern;
mod preset;
mod read;
mod schema;

use attar_tensor::{ActivationScheme, BlockType, Granularity};
use serde::{Deserialize, Serialize};

pub use mixture::{MIXTURES, Mixture};
pub use pattern::{matches, nearest, selects};
pub use preset::PRESETS;
pub use schema::json_schema;

use crate::{ModelPass, ModelPassDef, Pass, PassDef, Upstream};

/// Keys of a `[[step]]` that are read here; all others are options of the pass.
pub const STEP_KEYS: &[&str] = &["pass", "id", "after", "sites", "keep", "scheme", "upstream"];

/// What `after` names to begin at the checkpoint.
pub const SOURCE: &str = "source";

/// Sites that a step leaves alone unless it says otherwise.
pub const DEFAULT_KEEP: &[&str] = &["lm_head", "embed_tokens"];

/// Why a recipe could not be read.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RecipeError {
    /// The TOML is not well-formed or a value has the wrong type.
    #[error("{path}: {reason}")]
    Invalid {
        /// Key path, e.g. `step[1].scheme.bits`.
        path: String,
        /// What is wrong and what is expected.
        reason: String,
    },
    /// A key that nobody reads.
    #[error("{path}: unknown key `{key}`{}", suggestion.as_ref().map_or_else(String::new, |s| format!("; did you mean `{s}`?")))]
    UnknownKey {
        /// Path of the table.
        path: String,
        /// The key.
        key: String,
        /// The nearest known key.
        suggestion: Option<String>,
    },
}

impl RecipeError {
    /// A value that cannot be used.
    pub fn invalid(path: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Invalid { path: path.into(), reason: reason.into() }
    }

    /// A key that is none of `known`, with the nearest of them suggested.
    pub fn unknown_key(path: impl Into<String>, key: &str, known: &[&str]) -> Self {
        Self::UnknownKey {
            path: path.into(),
            key: key.to_owned(),
            suggestion: nearest(key, known.iter().copied()).map(str::to_owned),
        }
    }
}

/// Where calibration tokens come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Calibration {
    /// Text files, concatenated in order.
    pub text: Vec<String>,
    /// A file of token ids, one `{"input_ids": [...]}` a line; instead of text.
    pub ids: Option<String>,
    /// Number of windows.
    pub samples: usize,
    /// Tokens per window.
    pub context: usize,
    /// Seed of everything random in the run.
    pub seed: u64,
}

impl Default for Calibration {
    fn default() -> Self {
        Self { text: Vec::new(), ids: None, samples: 128, context: 2048, seed: 0 }
    }
}

/// The numbers of a quantization as written; the plan adds what the layouts demand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct SchemeSpec {
    /// Bits per code: 2, 3, 4 or 8.
    pub bits: u8,
    /// `group_size`; -1 in the file is one scale per row.
    pub granularity: Granularity,
    /// `None` until [`Recipe::resolve`] fills in what the pass prefers.
    pub symmetric: Option<bool>,
    /// What runtimes do to the inputs: `int8` in the file is signed bytes with a scale per token.
    #[serde(skip_serializing_if = "ActivationScheme::is_float")]
    pub activations: ActivationScheme,
}

/// The pass of a step.
#[derive(Debug)]
pub enum AnyPass {
    /// On the model as a whole.
    Model(Box<dyn ModelPass>),
    /// On one block after the other.
    Block(Box<dyn Pass>),
}

/// Every pass that a recipe may name.
#[derive(Debug, Clone, Copy)]
pub struct Known<'a> {
    /// Those on one block after the other.
    pub block: &'a [&'a PassDef],
    /// Those on the model as a whole.
    pub model: &'a [&'a ModelPassDef],
}

/// One `[[step]]`: a pass on some sites.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Step {
    /// Name of the pass.
    pub pass: String,
    /// Name of this step, for `after` and `of`.
    pub id: Option<String>,
    /// The step that this one follows, or [`SOURCE`]; the one before it when absent.
    pub after: Option<String>,
    /// Patterns of the sites to work on, see [`selects`].
    pub sites: Vec<String>,
    /// Patterns of sites to leave alone.
    pub keep: Vec<String>,
    /// Quantization numbers, for steps that quantize.
    pub scheme: Option<SchemeSpec>,
    /// Block types by the name of a mixture, in the place of the scheme.
    pub types: Option<Mixture>,
    /// Which activations the statistics come from; the pass chooses when absent.
    pub upstream: Option<Upstream>,
    /// The pass's own options, read by [`PassDef::build`].
    pub options: toml::Table,
}

impl Step {
    /// A step of `pass` on every site but the kept ones.
    pub fn new(pass: &str) -> Self {
        Self {
            pass: pass.to_owned(),
            id: None,
            after: None,
            sites: vec!["*".to_owned()],
            keep: DEFAULT_KEEP.iter().map(|&k| k.to_owned()).collect(),
            scheme: None,
            types: None,
            upstream: None,
            options: toml::Table::new(),
        }
    }

    /// Refuses keys that mean nothing to a pass on the whole model.
    fn only_model_keys(&self, path: &str) -> Result<(), RecipeError> {
        let plain = Self::new(&self.pass);
        let set = [
            ("sites", self.sites != plain.sites),
            ("keep", self.keep != plain.keep),
            ("scheme", self.scheme.is_some() || self.types.is_some()),
            ("upstream", self.upstream.is_some()),
        ];
        match set.iter().find(|(_, set)| *set) {
            None => Ok(()),
            Some((key, _)) => Err(RecipeError::invalid(
                format!("{path}.{key}"),
                format!("pass {} works on the whole model; leave `{key}` away", self.pass),
            )),
        }
    }

    /// `step[i] (pass)`, as errors write it.
    pub fn label(&self, index: usize) -> String {
        match &self.id {
            Some(id) => format!("step[{index}] ({}, id {id})", self.pass),
            None => format!("step[{index}] ({})", self.pass),
        }
    }
}

/// One `[[emit]]`: an artifact to write.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Emit {
    /// Name of the layout.
    pub layout: String,
    /// Kind of file: `gguf` for block types, else `safetensors`.
    pub container: String,
    /// Subdirectory of the output; the plan chooses when absent.
    pub dir: Option<String>,
    /// The step whose result is written; every step that no other follows when absent.
    pub of: Option<String>,
    /// Runtimes that must accept it, each as `--target` takes it: `vllm`, `vllm,tp=2`.
    pub target: Vec<String>,
    /// Whether float factors are multiplied, so that linears are written whole.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub merge: bool,
}

impl Emit {
    /// An artifact in this layout with everything else left to defaults.
    pub fn new(layout: &str) -> Self {
        Self {
            layout: layout.to_owned(),
            container: match BlockType::from_name(layout) {
                Some(_) => "gguf",
                None => "safetensors",
            }
            .to_owned(),
            dir: None,
            of: None,
            target: Vec::new(),
            merge: false,
        }
    }
}

/// `[gate]`: limits that a report must keep. A limit that is absent is not checked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GateSpec {
    /// Largest perplexity relative to the baseline's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_perplexity_ratio: Option<f64>,
    /// Largest mean KL divergence, nats.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_kl_mean: Option<f64>,
    /// Smallest fraction of positions with the same most likely token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_top1_agreement: Option<f64>,
    /// Largest size relative to the baseline's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bytes_ratio: Option<f64>,
}

/// What the user wants: calibration data, steps in order, artifacts to write, limits to keep.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Recipe {
    /// Calibration data.
    pub calibration: Calibration,
    /// Steps in order.
    pub steps: Vec<Step>,
    /// Artifacts to write.
    pub emits: Vec<Emit>,
    /// Limits.
    pub gate: Option<GateSpec>,
}

impl Recipe {
    /// Reads a recipe. Names of passes and their own options are checked by [`Recipe::resolve`].
    ///
    /// # Errors
    /// [`RecipeError::Invalid`] for malformed TOML, wrong types and values out of range,
    /// [`RecipeError::UnknownKey`] for keys that nobody reads.
    pub fn parse(text: &str) -> Result<Self, RecipeError> {
        read::recipe(text)
    }

    /// Builds the pass of each step and fills in the defaults that depend on the pass.
    ///
    /// # Errors
    /// [`RecipeError::Invalid`] for an unknown pass and for keys that a pass on the whole model does not
    /// read, whatever [`PassDef::build`] refuses otherwise; the path names the step.
    pub fn resolve(&mut self, known: Known<'_>) -> Result<Vec<AnyPass>, RecipeError> {
        let mut passes = Vec::with_capacity(self.steps.len());
        for (index, step) in self.steps.iter_mut().enumerate() {
            let path = format!("step[{index}]");
            if let Some(def) = known.model.iter().find(|def| def.name == step.pass) {
                step.only_model_keys(&path)?;
                let pass = (def.build)(&step.options).map_err(|error| place(error, &path))?;
                passes.push(AnyPass::Model(pass));
                continue;
            }
            let Some(def) = known.block.iter().find(|def| def.name == step.pass) else {
                let names = known.block.iter().map(|def| def.name);
                let names: Vec<_> = names.chain(known.model.iter().map(|def| def.name)).collect();
                let hint = nearest(&step.pass, names.iter().copied()).map_or_else(
                    || format!("known passes: {}", names.join(", ")),
                    |name| format!("did you mean `{name}`?"),
                );
                let reason = format!("unknown pass `{}`; {hint}", step.pass);
                return Err(RecipeError::invalid(format!("{path}.pass"), reason));
            };
            if let Some(scheme) = &mut step.scheme {
                scheme.symmetric.get_or_insert(def.symmetric_by_default);
            }
            let pass = (def.build)(&step.options).map_err(|error| place(error, &path))?;
            passes.push(AnyPass::Block(pass));
        }
        Ok(passes)
    }

    /// Layout of the artifact that is written where none is asked for: `dense` where no step has a scheme.
    pub fn default_layout(&self) -> &'static str {
        if let Some(mixture) = self.steps.iter().find_map(|step| step.types) {
            return mixture.base().name();
        }
        let rounds = |step: &Step| step.scheme.is_some_and(|s| !s.activations.is_float());
        if self.steps.iter().any(rounds) {
            return "compressed-tensors-int";
        }
        let quantizes = self.steps.iter().any(|step| step.scheme.is_some());
        if quantizes { "compressed-tensors" } else { crate::plan::DENSE.0 }
    }

    /// The recipe with every default written out and keys in a fixed order: what manifests keep and
    /// hashes are taken of. [`Recipe::parse`] reads it back to the same recipe.
    pub fn to_toml(&self) -> String {
        read::write(self)
    }

    /// A recipe by name, see [`PRESETS`]; `group_size` is columns per scale, -1 for one per row. It has
    /// no emits.
    ///
    /// # Errors
    /// [`RecipeError::Invalid`] for an unknown name or group size.
    pub fn preset(name: &str, group_size: i64) -> Result<Self, RecipeError> {
        preset::recipe(name, group_size)
    }
}

/// Reads a step's own options; its keys are those of the schema that documents them.
///
/// # Errors
/// [`RecipeError::UnknownKey`] with the nearest known key, [`RecipeError::Invalid`] for wrong types.
pub fn options<T: serde::de::DeserializeOwned + schemars::JsonSchema>(
    table: &toml::Table,
) -> Result<T, RecipeError> {
    let schema = schemars::schema_for!(T);
    let properties = schema.get("properties").and_then(serde_json::Value::as_object);
    let known: Vec<&str> = properties.into_iter().flatten().map(|(key, _)| key.as_str()).collect();
    if let Some(key) = table.keys().find(|key| !known.contains(&key.as_str())) {
        return Err(RecipeError::unknown_key("", key, &known));
    }
    table.clone().try_into().map_err(|error| RecipeError::invalid("", error.message()))
}

/// Puts the step's path in front of an error of a pass, and lets an unknown option also be a misspelt
/// key of the step itself.
fn place(error: RecipeError, step: &str) -> RecipeError {
    let join = |path: String| {
        if path.is_empty() { step.to_owned() } else { format!("{step}.{path}") }
    };
    match error {
        RecipeError::Invalid { path, reason } => RecipeError::Invalid { path: join(path), reason },
        RecipeError::UnknownKey { path, key, suggestion } => {
            let suggestion = if path.is_empty() {
                let known = STEP_KEYS.iter().copied().chain(suggestion.as_deref());
                nearest(&key, known).map(str::to_owned)
            } else {
                suggestion
            };
            RecipeError::UnknownKey { path: join(path), key, suggestion }
        }
    }
}
