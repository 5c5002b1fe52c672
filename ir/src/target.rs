//! What runtimes accept, as data: one profile per runtime (`ir/targets/*.toml`), and the check of a
//! planned or written artifact against it.
//!
//! A profile is a list of rules. Each rule has an `id`, a reason, the place in the runtime's
//! documentation, sources or issues that says so, and one [`Check`] with its numbers. What could not be
//! made sure of is marked `unverified` with why. [`check`] reads a [`Subject`] (made of a [`Plan`] before
//! any weight is read, or of the files of any artifact afterwards) and lists everything a rule is broken
//! by, with the names and numbers of the tensors.

mod check;

use attar_tensor::{DType, QuantScheme};
use serde::{Deserialize, Serialize};

pub use check::check;

use crate::{
    AttentionShape, Plan, Role,
    recipe::{RecipeError, nearest},
};

/// The profiles that this build knows, by name.
const PROFILES: &[(&str, &str)] = &[
    ("vllm", include_str!("../targets/vllm.toml")),
    ("transformers", include_str!("../targets/transformers.toml")),
    ("sglang", include_str!("../targets/sglang.toml")),
    ("tensorrt-llm", include_str!("../targets/tensorrt-llm.toml")),
    ("llama.cpp", include_str!("../targets/llama.cpp.toml")),
];

/// Why a target cannot be used.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum TargetError {
    /// No profile of this name.
    #[error("unknown target `{name}`; {hint}")]
    Unknown {
        /// The name.
        name: String,
        /// The nearest, or all.
        hint: String,
    },
    /// Something behind the name that cannot be read.
    #[error("target `{text}`: {reason}; write e.g. `vllm` or `vllm,tp=2`")]
    Option {
        /// What was written.
        text: String,
        /// What is wrong.
        reason: String,
    },
    /// A profile that cannot be read.
    #[error("profile {name}: {source}")]
    Profile {
        /// Name of the profile.
        name: String,
        /// Where and what.
        source: RecipeError,
    },
}

/// A runtime to write for, with the number of ranks that tensors are split over: `vllm`, `vllm,tp=2`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TargetSpec {
    /// Name of the profile.
    pub name: String,
    /// Tensor-parallel ranks, at least 1.
    pub tp: usize,
}

impl std::str::FromStr for TargetSpec {
    type Err = TargetError;

    fn from_str(text: &str) -> Result<Self, TargetError> {
        let fail = |reason: String| TargetError::Option { text: text.to_owned(), reason };
        let mut parts = text.split(',').map(str::trim);
        let name = parts.next().unwrap_or_default();
        let names = || PROFILES.iter().map(|(name, _)| *name);
        if !names().any(|known| known == name) {
            let hint = nearest(name, names()).map_or_else(
                || format!("known: {}", names().collect::<Vec<_>>().join(", ")),
                |name| format!("did you mean `{name}`?"),
            );
            return Err(TargetError::Unknown { name: name.to_owned(), hint });
        }
        let mut tp = None;
        for part in parts {
            let Some(("tp", value)) = part.split_once('=') else {
                return Err(fail(format!("unknown option `{part}`, only `tp=N` is known")));
            };
            if tp.is_some() {
                return Err(fail("`tp` is given twice".into()));
            }
            match value.parse::<usize>() {
                Ok(ranks) if (1..=MAX_RANKS).contains(&ranks) => tp = Some(ranks),
                _ => return Err(fail(format!("tp `{value}` is not a number of 1 to {MAX_RANKS}"))),
            }
        }
        Ok(Self { name: name.to_owned(), tp: tp.unwrap_or(1) })
    }
}

impl std::fmt::Display for TargetSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.tp == 1 {
            f.write_str(&self.name)
        } else {
            write!(f, "{},tp={}", self.name, self.tp)
        }
    }
}

/// More ranks than any runtime splits one layer over.
const MAX_RANKS: usize = 1024;

/// What one runtime accepts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// Name as `--target` takes it.
    pub name: String,
    /// What the runtime is, in a line.
    pub about: String,
    /// Versions that the rules were checked against.
    pub versions: Vec<String>,
    /// Day on which they were checked.
    pub checked: String,
    /// The rules.
    #[serde(rename = "rule")]
    pub rules: Vec<Rule>,
}

/// How much it matters that a rule is broken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// The runtime refuses the artifact, or computes something else.
    #[default]
    Refuse,
    /// It runs, but slower, or only with something extra.
    Warn,
}

/// One thing that a runtime demands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Name of the rule in its profile.
    pub id: String,
    /// What happens when it is broken.
    #[serde(default)]
    pub level: Level,
    /// Why, in a line.
    pub reason: String,
    /// What to do instead.
    pub remedy: String,
    /// Where the runtime says so: paths in its repository, documentation pages, issues.
    pub source: Vec<String>,
    /// What of it could not be made sure of, and why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unverified: Option<String>,
    /// What is looked at.
    pub check: Check,
}

/// Which axis of a linear.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Axis {
    /// Columns of the weight.
    Input,
    /// Rows of the weight.
    Output,
}

/// What keeps a runtime from cutting the scales of a split input: it repeats them on every rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Repeat {
    /// One scale per row.
    Channel,
    /// Columns in an order of their own (`g_idx`).
    ColumnOrder,
}

/// What a rule looks at. Lists that are absent ask for nothing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Check {
    /// Layouts and containers that can be read at all.
    Layouts(Layouts),
    /// Bits, groups, symmetry and dtype of scales.
    Scheme(Scheme),
    /// Columns in an order of their own.
    ColumnOrder(ColumnOrder),
    /// Linears that are fused into one need one scheme.
    Fused(Fused),
    /// Attention heads are dealt out to the ranks.
    Heads(Nothing),
    /// Every linear of a block splits evenly.
    Even(Nothing),
    /// No group of columns is cut by a split of the input.
    SplitGroups(SplitGroups),
    /// No packed word is cut by a split.
    SplitPacking(SplitPacking),
    /// A kernel's tile fills each rank's part.
    Align(Align),
    /// Whether the output head may be quantized.
    Head(Head),
    /// Whether the embedding may be quantized.
    Embedding(Embedding),
    /// Files that must lie beside the weights.
    Files(Files),
    /// Keys that `quantization_config` must have.
    Config(Config),
    /// `quantization_config` and the tensors say the same of every linear.
    Declared(Declared),
    /// The largest number of ranks.
    TensorParallel(TensorParallel),
    /// Model families.
    Families(Families),
    /// Linears written as two thin ones.
    Factors(Nothing),
    /// Corrections of low rank in an adapter.
    Corrections(Nothing),
}

/// Nothing to set.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nothing {}

/// See [`Check::Layouts`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layouts {
    /// Layouts of packed linears.
    pub accepted: Vec<String>,
    /// Kinds of file.
    pub containers: Vec<String>,
}

/// See [`Check::Scheme`].
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scheme {
    /// Layouts it holds for.
    pub layouts: Vec<String>,
    /// Only linears of these bits are looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub when_bits: Option<Vec<u8>>,
    /// Bits per code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits: Option<Vec<u8>>,
    /// Columns per scale; -1 is one scale per row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group_sizes: Option<Vec<i64>>,
    /// Columns per scale are a multiple of this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group_multiple: Option<usize>,
    /// Symmetric, asymmetric, or both.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub symmetric: Option<Vec<bool>>,
    /// Element types of scales.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scales: Option<Vec<DType>>,
}

/// See [`Check::ColumnOrder`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ColumnOrder {
    /// Layouts it holds for.
    pub layouts: Vec<String>,
    /// False: the runtime has no place for it.
    pub accepted: bool,
    /// Key of `quantization_config` that must be true then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub declared_by: Option<String>,
}

/// See [`Check::Fused`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fused {
    /// Layouts it holds for.
    pub layouts: Vec<String>,
    /// Roles that are fused.
    pub together: Vec<Vec<Role>>,
}

/// See [`Check::SplitGroups`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SplitGroups {
    /// Layouts it holds for.
    pub layouts: Vec<String>,
    /// Where scales are repeated on every rank instead of being cut.
    pub repeated: Vec<Repeat>,
}

/// See [`Check::SplitPacking`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SplitPacking {
    /// Layouts it holds for.
    pub layouts: Vec<String>,
    /// The axis that codes or zero points are packed along.
    pub axis: Axis,
    /// Only asymmetric linears are looked at (zero points are packed, codes are not).
    #[serde(default)]
    pub asymmetric_only: bool,
}

/// See [`Check::Align`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Align {
    /// Layouts it holds for.
    pub layouts: Vec<String>,
    /// Only linears of these bits are looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits: Option<Vec<u8>>,
    /// Columns on each rank are a multiple of this.
    pub in_multiple: usize,
    /// Rows on each rank, fused linears together, are a multiple of this.
    pub out_multiple: usize,
    /// Roles that are fused into one.
    pub together: Vec<Vec<Role>>,
}

/// See [`Check::Head`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Head {
    /// Layouts it holds for.
    pub layouts: Vec<String>,
    /// False: it must be dense.
    pub quantized: bool,
    /// Key of `quantization_config` that must be true when it is quantized.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub declared_by: Option<String>,
}

/// See [`Check::Embedding`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Embedding {
    /// Layouts it holds for.
    pub layouts: Vec<String>,
    /// False: it must be dense.
    pub quantized: bool,
}

/// See [`Check::Files`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Files {
    /// One of each list must be there.
    pub one_of: Vec<Vec<String>>,
}

/// See [`Check::Config`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Layouts it holds for.
    pub layouts: Vec<String>,
    /// One key of each list must be there.
    pub one_of: Vec<Vec<String>>,
}

/// See [`Check::Declared`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Declared {
    /// Layouts it holds for.
    pub layouts: Vec<String>,
}

/// See [`Check::TensorParallel`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorParallel {
    /// Ranks at most.
    pub max: usize,
}

/// See [`Check::Families`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Families {
    /// `model_type`s of config.json.
    pub accepted: Vec<String>,
}

impl Profile {
    /// Reads a profile; keys that nobody reads are refused.
    ///
    /// # Errors
    /// [`TargetError::Profile`] naming the key.
    pub fn parse(name: &str, text: &str) -> Result<Self, TargetError> {
        let fail = |path: String, reason: String| TargetError::Profile {
            name: name.to_owned(),
            source: RecipeError::invalid(path, reason),
        };
        let value = toml::Deserializer::parse(text)
            .map_err(|error| fail("file".into(), error.message().to_owned()))?;
        serde_path_to_error::deserialize(value)
            .map_err(|error| fail(error.path().to_string(), error.inner().message().to_owned()))
    }

    /// Every profile of this build.
    ///
    /// # Errors
    /// [`TargetError::Profile`]; the tests of this crate read them all.
    pub fn all() -> Result<Vec<Self>, TargetError> {
        PROFILES.iter().map(|(name, text)| Self::parse(name, text)).collect()
    }

    /// The profile of a target.
    ///
    /// # Errors
    /// [`TargetError::Unknown`] and [`TargetError::Profile`].
    pub fn of(target: &TargetSpec) -> Result<Self, TargetError> {
        match PROFILES.iter().find(|(name, _)| *name == target.name) {
            Some((name, text)) => Self::parse(name, text),
            None => {
                Err(TargetError::Unknown { name: target.name.clone(), hint: "no profile".into() })
            }
        }
    }
}

/// One linear as a runtime finds it.
#[derive(Debug, Clone, PartialEq)]
pub struct Linear {
    /// Full name without `.weight`.
    pub name: String,
    /// Index of its block; the epilogue comes last.
    pub block: usize,
    /// The part it plays.
    pub role: Role,
    /// Rows of the weight.
    pub out_features: usize,
    /// Columns of the weight.
    pub in_features: usize,
    /// The scheme of its packed weight; `None` is dense.
    pub scheme: Option<QuantScheme>,
    /// Element type of its stored scales.
    pub scales: Option<DType>,
    /// True when its columns are in an order of their own; `None` when nobody knows yet.
    pub column_order: Option<bool>,
    /// Whether `quantization_config` calls it quantized; `None` when there is no config yet.
    pub declared: Option<bool>,
}

/// An artifact, planned or written, as the rules see it.
#[derive(Debug, Clone, PartialEq)]
pub struct Subject {
    /// What to call it in messages, e.g. `emit gptq` or its folder.
    pub name: String,
    /// Layout of the packed linears; `None` when nothing is quantized.
    pub layout: Option<String>,
    /// Kind of file.
    pub container: String,
    /// `model_type` of config.json.
    pub family: String,
    /// Attention of the decoder blocks.
    pub attention: Option<AttentionShape>,
    /// Every linear of the decoder blocks, and the output head.
    pub linears: Vec<Linear>,
    /// True when the embedding is packed.
    pub embedding_quantized: bool,
    /// Linears of the model that are written as two.
    pub factored: Vec<String>,
    /// Linears that an adapter corrects.
    pub corrected: Vec<String>,
    /// Names of the files beside the weights; `None` when they are not known.
    pub files: Option<Vec<String>>,
    /// `quantization_config`; `None` when there is none yet, or none at all.
    pub config: Option<serde_json::Value>,
}

impl Subject {
    /// What an emit of a plan will be. Files and `quantization_config` are not known to a plan: set
    /// [`Subject::files`] and [`Subject::config`] when they are.
    ///
    /// # Panics
    /// When the plan has no such emit.
    pub fn of_plan(plan: &Plan, emit: usize) -> Self {
        let planned = &plan.emits[emit];
        let scales = |site: &str| {
            planned
                .tensors
                .iter()
                .find(|tensor| {
                    matches!(&tensor.origin, crate::plan::Origin::Part { site: of, suffix }
                        if of == site && suffix.contains("scale"))
                })
                .map(|tensor| tensor.dtype)
        };
        let mut linears = Vec::new();
        for site in &plan.sites {
            let linear = |name: String, out_features, in_features| Linear {
                name,
                block: site.block,
                role: site.role,
                out_features,
                in_features,
                scheme: site.scheme,
                scales: site.scheme.and_then(|_| scales(&site.name)),
                column_order: None,
                declared: None,
            };
            let (name, out, inner) = (&site.name, site.out_features, site.in_features);
            match site.rank.filter(|_| !planned.merge) {
                Some(rank) => {
                    linears.push(linear(format!("{name}.down"), rank, inner));
                    linears.push(linear(format!("{name}.up"), out, rank));
                }
                None => linears.push(linear(name.clone(), out, inner)),
            }
        }
        let factored = plan.factored(planned).into_iter().map(|(name, _)| name.to_owned());
        let corrected = plan.sites.iter().filter(|site| site.correction.is_some());
        let quantized = linears.iter().any(|linear| linear.scheme.is_some());
        Self {
            name: match &planned.dir {
                Some(dir) if dir != planned.layout.0 => format!("emit {} in {dir}", planned.layout),
                _ => format!("emit {}", planned.layout),
            },
            layout: quantized.then(|| planned.layout.0.to_owned()),
            container: planned.container.clone(),
            family: plan.graph.family.clone(),
            attention: plan.graph.blocks.first().and_then(|block| block.attention),
            linears,
            embedding_quantized: false,
            factored: factored.collect(),
            corrected: corrected.map(|site| site.name.clone()).collect(),
            files: None,
            config: None,
        }
    }
}

/// A rule that is broken.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Violation {
    /// The runtime with its ranks, `vllm,tp=2`.
    pub target: String,
    /// What breaks it: the name of the [`Subject`].
    pub subject: String,
    /// [`Rule::id`].
    pub rule: String,
    /// How much it matters.
    pub level: Level,
    /// Tensors (or files, or keys) with their numbers, all of them.
    pub places: Vec<Place>,
    /// [`Rule::reason`].
    pub reason: String,
    /// [`Rule::remedy`].
    pub remedy: String,
    /// [`Rule::source`].
    pub source: Vec<String>,
    /// [`Rule::unverified`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unverified: Option<String>,
}

/// A place where a rule is broken.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Place {
    /// Name of the linear, file or key.
    pub name: String,
    /// What it is, in numbers.
    pub what: String,
}

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const SHOWN: usize = 8;
        write!(f, "{}: rule {}, {}: {}", self.target, self.rule, self.subject, self.reason)?;
        // Places that say the same are told once.
        let mut told: Vec<(&str, Vec<&str>)> = Vec::new();
        for place in &self.places {
            match told.iter_mut().find(|(what, _)| *what == place.what) {
                Some((_, names)) => names.push(&place.name),
                None => told.push((&place.what, vec![&place.name])),
            }
        }
        for (what, names) in told {
            let shown = names.iter().take(SHOWN).copied().collect::<Vec<_>>().join(", ");
            write!(f, "\n    {shown}")?;
            if names.len() > SHOWN {
                write!(f, " and {} more", names.len() - SHOWN)?;
            }
            write!(f, ": {what}")?;
        }
        write!(f, "\n    remedy: {}\n    source: {}", self.remedy, self.source.join("; "))?;
        if let Some(unverified) = &self.unverified {
            write!(f, "\n    not verified: {unverified}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
