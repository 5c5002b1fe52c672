//! Everything a plan can refuse.

use attar_tensor::{LayoutError, LayoutId};

use crate::Form;

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// A pattern is misspelt or meant for another model.
    #[error("{step}: {key} pattern `{pattern}` matches no site; the nearest are {}", .nearest.join(", "))]
    NoMatch {
        /// The step.
        step: String,
        /// `sites` or `keep`.
        key: &'static str,
        /// The pattern.
        pattern: String,
        /// Names of sites spelt most like it.
        nearest: Vec<String>,
    },
    /// Whatever a pattern selects is held by `keep`.
    #[error(
        "{step}: all that pattern `{pattern}` selects is held by `keep`; take it out of one of them"
    )]
    AllKept {
        /// The step.
        step: String,
        /// The pattern.
        pattern: String,
    },
    /// A quantizing step without numbers.
    #[error(
        "{step}: quantizes but has no scheme; add `scheme = {{ bits = 4 }}`, or emit a block type (q4_k, ...)"
    )]
    SchemeMissing {
        /// The step.
        step: String,
    },
    /// Numbers on a step that does not quantize.
    #[error(
        "{step}: does not quantize, so its scheme would be ignored; put it on the step that does"
    )]
    SchemeUnused {
        /// The step.
        step: String,
    },
    /// Groups that do not fill the rows.
    #[error(
        "{step}: group_size {group_size} does not divide in_features of {}; choose a divisor, \
         -1 (per row), or `keep` them{}",
        .sites.iter().map(|(site, n)| format!("{site} ({n})")).collect::<Vec<_>>().join(", "),
        .chosen.as_ref().map_or_else(String::new, |by| format!(
            "; or give {by}, which chose these ranks, `multiple_of = {group_size}`"
        ))
    )]
    GroupSize {
        /// The step.
        step: String,
        /// Columns per scale asked for.
        group_size: usize,
        /// All such sites with their `in_features`.
        sites: Vec<(String, usize)>,
        /// The step that chose the rank of a site's factors, where that is what is not divided.
        chosen: Option<String>,
    },
    /// Groups of n:m that do not fill the rows.
    #[error(
        "{step}: {n}:{m} needs in_features that {m} divides, but {}; choose another m, or `keep` them",
        .sites.iter().map(|(site, n)| format!("{site} has {n}")).collect::<Vec<_>>().join(", ")
    )]
    Pattern {
        /// The step.
        step: String,
        /// Weights that stay.
        n: u8,
        /// Weights of a group.
        m: u8,
        /// All such sites with their `in_features`.
        sites: Vec<(String, usize)>,
    },
    /// A layout of codes without codes.
    #[error(
        "emit[{emit}]: layout {layout} stores quantized linears, but no step quantizes; emit layout `dense`,          or add a step such as rtn or gptq"
    )]
    NothingQuantized {
        /// Index of the emit.
        emit: usize,
        /// Its layout.
        layout: LayoutId,
    },
    /// A pass finds a form that it cannot take.
    #[error("{step}: cannot take weights that are {form} (made so by {made_by}): {}", shorten(.sites))]
    Form {
        /// The step.
        step: String,
        /// What the sites are at this point.
        form: Form,
        /// The step that made them so, or the checkpoint.
        made_by: String,
        /// The sites.
        sites: Vec<String>,
    },
    /// A pass that prepares for quantization which does not come.
    #[error("{step}: prepares for a quantizing step, but none follows on {}; add one, e.g. rtn", shorten(.sites))]
    NothingAhead {
        /// The step.
        step: String,
        /// The sites.
        sites: Vec<String>,
    },
    /// Scales cannot be folded into codes.
    #[error("{step}: would fold scales into {}, already quantized by {by}; put it before that step", shorten(.sites))]
    FoldQuantized {
        /// The step.
        step: String,
        /// The quantizing step.
        by: String,
        /// The sites.
        sites: Vec<String>,
    },
    /// Statistics without data.
    #[error("{step}: needs calibration data ({needs}); give text or token ids")]
    CalibrationMissing {
        /// The step.
        step: String,
        /// The statistics, for people.
        needs: String,
    },
    /// A pass on the whole model behind one on blocks.
    #[error(
        "{step}: works on the whole model (its shapes or its basis) and would spoil what {after} has made; \
         move it before that step"
    )]
    ModelLate {
        /// The step.
        step: String,
        /// The first step on blocks.
        after: String,
    },
    /// The model cannot be reshaped so.
    #[error("{step}: {reason}")]
    Reshape {
        /// The step.
        step: String,
        /// Why, with the numbers and the remedy.
        reason: String,
    },
    /// A file of statistics that no step reads.
    #[error(
        "an importance matrix is given, but no step reads it: it knows sums of squares, which rtn with \
         `importance = true` (preset imatrix-q4_k_m, ...) needs and no more; the steps are {steps}"
    )]
    GivenUnused {
        /// The steps.
        steps: String,
    },
    /// Two steps of one name.
    #[error("step[{index}].id: `{id}` is already the id of step[{first}]")]
    DuplicateId {
        /// The later step.
        index: usize,
        /// The id.
        id: String,
        /// The earlier step.
        first: usize,
    },
    /// A name that no step (or no earlier one) has.
    #[error("{path}: no {which} has the id `{id}`{hint}")]
    UnknownStep {
        /// Key path.
        path: String,
        /// `step` or `earlier step`.
        which: &'static str,
        /// The id.
        id: String,
        /// The nearest id.
        hint: String,
    },
    /// The checkpoint's name on a step.
    #[error("step[{index}].id: `source` means the checkpoint; choose another id")]
    ReservedId {
        /// The step.
        index: usize,
    },
    /// An upstream on a step that reads no statistics.
    #[error("{step}: reads no statistics, so its `upstream` would be ignored; take it away")]
    UpstreamUnused {
        /// The step.
        step: String,
    },
    /// Work for nothing.
    #[error("the result of {steps} is never emitted; add an [[emit]] with a layout")]
    NeverEmitted {
        /// The steps.
        steps: String,
    },
    /// Nothing to do.
    #[error("the recipe has no [[step]]")]
    NoSteps,
    /// A layout that does not exist.
    #[error("emit[{emit}].layout: unknown layout `{layout}`; {hint}")]
    UnknownLayout {
        /// Index of the emit.
        emit: usize,
        /// The name.
        layout: String,
        /// The nearest, or all.
        hint: String,
    },
    /// A container that does not exist.
    #[error("emit[{emit}].container: unknown container `{container}`; known: {}", super::CONTAINERS.join(", "))]
    UnknownContainer {
        /// Index of the emit.
        emit: usize,
        /// The name.
        container: String,
    },
    /// Two artifacts in one place.
    #[error("emit[{first}] and emit[{second}] both write to {dir}; give them different `dir`s")]
    SameDir {
        /// The earlier emit.
        first: usize,
        /// The later emit.
        second: usize,
        /// The directory.
        dir: String,
    },
    /// A layout cannot carry what the steps make.
    #[error("emit[{emit}]: {error} ({} {}: {})", .sites.len(), if .sites.len() == 1 { "site" } else { "sites" }, shorten(.sites))]
    Layout {
        /// Index of the emit.
        emit: usize,
        /// Its layout.
        layout: LayoutId,
        /// Why.
        error: LayoutError,
        /// The sites.
        sites: Vec<String>,
    },
    /// A budget that cannot be kept.
    #[error(
        "memory {}: the run needs {} without a limit and {} with everything on scratch and one \
         thread (at {at}); give --memory {} or more",
        mib(*.budget), mib(*.wanted), mib(*.smallest), mib(*.smallest)
    )]
    Memory {
        /// Bytes allowed.
        budget: usize,
        /// Predicted peak without a budget.
        wanted: usize,
        /// The smallest budget that can be kept.
        smallest: usize,
        /// Where its peak lies.
        at: String,
    },
    /// A layout in a container that does not hold it.
    #[error("emit[{emit}]: layout {layout} lies in container {right}, not in {container}")]
    ContainerLayout {
        /// Index of the emit.
        emit: usize,
        /// Its layout.
        layout: LayoutId,
        /// The container asked for.
        container: String,
        /// The one that holds it.
        right: &'static str,
    },
    /// Several artifacts of one result whose scales have nothing in common.
    #[error(
        "the emits {layouts} have scales of their own, so that one result cannot become both; give each \
         its own step (`id`, `after`, `of`)"
    )]
    BlockGrids {
        /// The layouts.
        layouts: String,
    },
    /// A pass that cannot make a scheme.
    #[error("{step}: cannot make {scheme}: {reason} ({})", shorten(.sites))]
    PassScheme {
        /// The step.
        step: String,
        /// The scheme.
        scheme: String,
        /// Why, and what to do.
        reason: &'static str,
        /// The sites.
        sites: Vec<String>,
    },
    /// A rank that a site cannot have.
    #[error("{step}: {reason} ({})", shorten(.sites))]
    Rank {
        /// The step.
        step: String,
        /// Why, with the numbers and the remedy.
        reason: String,
        /// The sites.
        sites: Vec<String>,
    },
    /// Scales cannot be folded into factors.
    #[error("{step}: would fold scales into {}, factored by {by}; put it before that step", shorten(.sites))]
    FoldFactored {
        /// The step.
        step: String,
        /// The step that factors.
        by: String,
        /// The sites.
        sites: Vec<String>,
    },
    /// Factors that nobody makes.
    #[error("emit[{emit}]: `merge` multiplies factors, but no step makes any; take it away")]
    MergeUnused {
        /// Index of the emit.
        emit: usize,
    },
    /// Siblings that runtimes fuse differ.
    #[error(
        "runtimes of {layouts} fuse the sites that read the {input}, so they need one scheme, but {}",
        .sites.iter().map(|(site, scheme)| format!("{site} is {scheme}")).collect::<Vec<_>>().join(", ")
    )]
    FusedSiblings {
        /// The layouts.
        layouts: String,
        /// Name of the input group.
        input: String,
        /// The sites and their schemes.
        sites: Vec<(String, String)>,
    },
}

/// Bytes as `--memory` takes them, rounded up.
fn mib(bytes: usize) -> String {
    format!("{}MiB", bytes.div_ceil(1 << 20))
}

/// A list for people: at most six names, then how many more.
fn shorten(sites: &[String]) -> String {
    const SHOWN: usize = 6;
    let shown = sites.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
    if sites.len() > SHOWN { format!("{shown} and {} more", sites.len() - SHOWN) } else { shown }
}

/// Everything that is wrong with a recipe for a model.
#[derive(Debug, Clone, PartialEq)]
pub struct PlanErrors(pub Vec<PlanError>);

impl std::fmt::Display for PlanErrors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let [only] = self.0.as_slice() {
            return write!(f, "{only}");
        }
        write!(f, "{} problems:", self.0.len())?;
        for error in &self.0 {
            write!(f, "\n- {error}")?;
        }
        Ok(())
    }
}

impl std::error::Error for PlanErrors {}
