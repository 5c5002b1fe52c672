//! Passes: what they promise before any tensor is read, and what they do to one block.

use std::fmt::Debug;

use attar_tensor::{
    Mat, QuantScheme, Scratch,
    column_solver::{Factor, SolverError},
    linalg::first_non_finite,
};
use serde::{Deserialize, Serialize};

use crate::{
    Block, BlockState, BlockStats, FormChange, FormSet, Limits, Needs, Site, Teacher, Training,
    recipe::RecipeError,
};

/// Which activations the statistics come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Upstream {
    /// What the original model computes.
    Original,
    /// What the already compressed blocks (and sites of this block) put out.
    Compressed,
    /// A file of statistics, taken of the original model; no recipe says so, but the plan where one is given.
    #[serde(skip)]
    #[schemars(skip)]
    Given,
}

/// What a pass reads and changes beside the weights of its own sites.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Touches {
    /// One site at a time: may run stage by stage, each stage reading what the compressed former stage
    /// puts out.
    Sites,
    /// One site at a time, on the statistics of the whole block as it was before any of its sites changed.
    Block,
    /// Producers along folds too: needs the statistics of the whole block before any site of it is
    /// quantized.
    Folds,
}

/// What a pass promises, declared before any tensor is read.
#[derive(Debug, Clone, Copy)]
pub struct Contract {
    /// Forms it can take; anything else is a plan error naming the site and the step that made it so.
    pub accepts: FormSet,
    /// The axes it writes.
    pub produces: FormChange,
    /// Statistics of each site's input that it reads.
    pub needs: Needs,
    /// Where these come from.
    pub upstream: Upstream,
    /// Sites alone, or neighbours too.
    pub touches: Touches,
    /// True when the pass must know the scheme of the next quantizing step on its sites (awq).
    pub looks_ahead: bool,
}

/// What a pass costs on one block: what `attar plan` prints.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Cost {
    /// Floating-point operations.
    pub flops: f64,
    /// Peak bytes beyond the block's weights and statistics.
    pub peak_bytes: usize,
    /// Bytes on scratch.
    pub scratch_bytes: usize,
}

/// A site to work on, with the scheme that applies to it: its own when the pass quantizes, the next
/// quantizing step's when the pass looks ahead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// Index into [`Block::sites`].
    pub site: usize,
    /// `None` when the pass neither quantizes nor looks ahead.
    pub scheme: Option<QuantScheme>,
}

/// What a pass gets beside the block: no clock, no files but scratch.
#[derive(Debug, Clone, Copy)]
pub struct PassContext<'a> {
    /// The block's description.
    pub block: &'a Block,
    /// Seed of the run.
    pub seed: u64,
    /// What [`Pass::survey`] found in each decoder block, in order; empty for passes that survey nothing.
    pub survey: &'a [Vec<f64>],
    /// The original float weights of the targets by site, with the scales that earlier steps folded around them, for
    /// passes that read them ([`Pass::reads_original`]); empty for others.
    pub original: &'a [Option<Mat>],
    /// Where the large parts of a factorization lie; `None` is memory. Bits do not depend on it.
    pub scratch: Option<&'a Scratch>,
}

/// Something worth telling that is not an error.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The Hessian was not positive definite at the asked dampening, which was raised.
    DampeningRaised {
        /// Final dampening as a fraction of the mean diagonal.
        percdamp: f64,
        /// Number of attempts that failed.
        failures: u32,
    },
    /// Input channels that were zero on all calibration tokens.
    DeadColumns {
        /// How many.
        count: usize,
    },
    /// A block was trained: its loss before and after over all windows, relative to what it adds to its input.
    Learned {
        /// Steps of training.
        steps: usize,
        /// Before the first.
        before: f64,
        /// Of what was kept.
        after: f64,
    },
    /// The site stayed as it was, and why.
    LeftAlone {
        /// In words.
        reason: String,
    },
    /// A chosen hyperparameter, e.g. the scale exponent of awq.
    Chosen {
        /// Its name.
        name: String,
        /// Its value.
        value: f64,
    },
}

impl Event {
    /// What is worth telling of a factor.
    pub fn of_factor(factor: &Factor) -> Vec<Self> {
        let dead = (factor.dead > 0).then_some(Self::DeadColumns { count: factor.dead });
        let raised =
            factor.raised.map(|(percdamp, failures)| Self::DampeningRaised { percdamp, failures });
        dead.into_iter().chain(raised).collect()
    }
}

/// What was done to one site.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SiteReport {
    /// Site name.
    pub site: String,
    /// Pass name.
    pub pass: String,
    /// `‖W − Ŵ‖² / ‖W‖²`, relative to the weight the pass was given.
    pub weight_error: f64,
    /// `tr(ΔW H ΔWᵀ) / tr(W H Wᵀ)`: relative squared output error on the calibration inputs; `None`
    /// without a Hessian.
    pub output_error: Option<f64>,
    /// Events.
    pub events: Vec<Event>,
}

/// What a pass did to a block.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PassReport {
    /// One entry per site worked on.
    pub sites: Vec<SiteReport>,
}

/// Why a pass failed. A mismatch of forms or missing statistics is a bug of the plan and panics instead.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PassError {
    /// Numerics failed.
    #[error("site {site}: {reason}")]
    Numeric {
        /// Where.
        site: String,
        /// What failed, with the index, and what can be done.
        reason: String,
    },
    /// The scratch file failed.
    #[error("site {site}: scratch file: {source}; free space there or raise the memory limit")]
    Scratch {
        /// Where.
        site: String,
        /// The operating system's word.
        source: std::io::Error,
    },
    /// Activations of a block that learns could not be read.
    #[error("activations: {0}; free space for scratch files or raise the memory limit")]
    Activations(std::io::Error),
}

impl PassError {
    /// Why a Hessian could not be factorized.
    pub fn of_solver(site: &str, error: SolverError) -> Self {
        let site = site.to_owned();
        match error {
            SolverError::Scratch(source) => Self::Scratch { site, source },
            other => Self::Numeric { site, reason: other.to_string() },
        }
    }
}

/// A transformation of one block.
pub trait Pass: Debug + Send + Sync {
    /// The name as written in recipes.
    fn name(&self) -> &'static str;

    /// What it promises.
    fn contract(&self) -> Contract;

    /// What it promises when its step carries a scheme: the same, except for passes that then do more.
    fn contract_with_scheme(&self) -> Contract {
        self.contract()
    }

    /// Fraction of a site's weights that it leaves, for passes that prune.
    fn density(&self) -> Option<f64> {
        None
    }

    /// Rank of the factors (or of the correction) that it gives a site, for passes that write the rank axis.
    ///
    /// # Errors
    /// Why the site can have none such, with the largest rank that it can have.
    fn rank(&self, _: &Site) -> Result<Option<usize>, String> {
        Ok(None)
    }

    /// Statistics of the original model that it chooses the ranks of all its sites from, together and before any block is
    /// worked on; `None` where a site's rank follows from its shape. [`Pass::rank`] is then the largest that can come out.
    fn chooses_ranks(&self) -> Option<Needs> {
        None
    }

    /// What each rank of a site is worth, falling: squared singular values in the pass's metric. `stats` holds what
    /// [`Pass::chooses_ranks`] asks for.
    ///
    /// # Errors
    /// [`PassError::Numeric`] when numbers cannot be worked with.
    fn spectrum(
        &self,
        _: &Block,
        _: usize,
        _: &Mat,
        _: &BlockStats,
    ) -> Result<Vec<f64>, PassError> {
        Ok(Vec::new())
    }

    /// The same pass with the ranks that follow from the spectra of all its sites.
    ///
    /// # Errors
    /// Why there are none.
    fn with_ranks(&self, _: &[(Site, Vec<f64>)]) -> Result<Box<dyn Pass>, String> {
        Err("it chooses no ranks".to_owned())
    }

    /// Whether it reads the original float weight beside what earlier steps made of it.
    fn reads_original(&self) -> bool {
        false
    }

    /// Whether weights that were pruned before come out exactly zero.
    ///
    /// # Errors
    /// Why not, and what to use instead.
    fn keeps_zeros(&self, scheme: QuantScheme) -> Result<(), &'static str> {
        match scheme.block() {
            Some(block) if !block.has_zero() => {
                Err("weights that were pruned would not stay zero; emit a type with an exact zero")
            }
            _ => Ok(()),
        }
    }

    /// Whether it can make (or, for passes that look ahead, work towards) this scheme: any affine one, and
    /// the block types of ggml for passes that say so.
    ///
    /// # Errors
    /// Why not, and what to use instead.
    fn takes(&self, scheme: QuantScheme) -> Result<(), &'static str> {
        match scheme.block() {
            None => Ok(()),
            Some(_) => Err(
                "it knows affine schemes only; use pass rtn for block types, or give an affine \
                            `scheme` that the layout carries",
            ),
        }
    }

    /// Statistics of the original model that [`Pass::survey`] reads; `None` for passes that work on a block without
    /// knowing the others.
    fn surveys(&self) -> Option<Needs> {
        None
    }

    /// A few numbers of a decoder block as it is in the checkpoint, taken of all blocks (one forward of the original
    /// model, and one backward where gradients are asked for) before any is worked on, and given back in
    /// [`PassContext::survey`]. `stats` holds what [`Pass::surveys`] asks for, for every input.
    fn survey(&self, _: &Block, _: &[Target], _: &BlockState, _: &BlockStats) -> Vec<f64> {
        Vec::new()
    }

    /// What it costs on `targets` of a block, statistics excluded, within `limits`.
    fn cost(&self, block: &Block, targets: &[Target], limits: &Limits) -> Cost;

    /// Transforms the targets. `stats` holds what the contract asked for, for the inputs of all targets.
    /// A pass that touches folds updates `stats` analytically ([`crate::InputStats::fold`]) so that
    /// passes of the same round stay true.
    ///
    /// # Errors
    /// [`PassError::Numeric`] when numbers cannot be worked with.
    fn apply(
        &self,
        context: &PassContext<'_>,
        targets: &[Target],
        state: &mut BlockState,
        stats: &mut BlockStats,
    ) -> Result<PassReport, PassError>;

    /// How a pass learns whose contract needs [`Needs::TEACHER`].
    fn training(&self) -> Training {
        Training::default()
    }

    /// As [`Pass::apply`], for passes whose contract needs [`Needs::TEACHER`]. The head has no teacher and goes through
    /// `apply`.
    ///
    /// # Errors
    /// As [`Pass::apply`], and when activations cannot be read.
    fn learn(
        &self,
        context: &PassContext<'_>,
        targets: &[Target],
        state: &mut BlockState,
        stats: &mut BlockStats,
        _: &Teacher<'_>,
    ) -> Result<PassReport, PassError> {
        self.apply(context, targets, state, stats)
    }
}

/// An entry of a crate's list of passes.
pub struct PassDef {
    /// The name as written in recipes.
    pub name: &'static str,
    /// One line for `attar passes` and RECIPES.md.
    pub summary: &'static str,
    /// Source of the algorithm.
    pub paper: &'static str,
    /// A recipe that runs on any small model, for RECIPES.md. Calibration data comes from the command line.
    pub example: &'static str,
    /// True when the step must or may carry a `scheme`.
    pub takes_scheme: bool,
    /// Whether presets and recipes without `symmetric` get a symmetric scheme.
    pub symmetric_by_default: bool,
    /// Builds the pass from the step's own options (keys that [`crate::recipe::Step`] does not know);
    /// refuses unknown keys.
    pub build: fn(&toml::Table) -> Result<Box<dyn Pass>, RecipeError>,
    /// JSON Schema of the step's own options.
    pub schema: fn() -> schemars::Schema,
}

impl Debug for PassDef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PassDef").field("name", &self.name).finish_non_exhaustive()
    }
}

/// An error relative to what it is an error of.
pub fn relative(error: f64, whole: f64) -> f64 {
    error.max(0.0) / whole.max(f64::MIN_POSITIVE)
}

/// Refuses NaN and infinity in a weight or Hessian.
///
/// # Errors
/// [`PassError::Numeric`] with the index of the first.
///
/// # Panics
/// When the matrix is not in standard layout.
pub fn check_finite(site: &str, what: &str, x: &Mat) -> Result<(), PassError> {
    match first_non_finite(x.as_slice().expect("standard layout")) {
        None => Ok(()),
        Some(index) => Err(PassError::Numeric {
            site: site.to_owned(),
            reason: format!(
                "{what} holds a NaN or infinity at flat index {index}; check the checkpoint and the \
                 calibration text"
            ),
        }),
    }
}
