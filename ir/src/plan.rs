//! The typed pass graph and its proof.
//!
//! [`PassGraph::check`] follows the form of every site through the steps and either returns a [`Plan`],
//! which running can break only by I/O or numerics, or [`PlanErrors`], which lists everything that is
//! wrong at once. No weight is read.

mod check;
mod dense;
mod error;
mod graph;
mod predict;
mod rank;
mod render;
mod stored;
mod variant;
mod written;

use attar_tensor::{BlockType, DType, LayoutId, LayoutSpec, QuantScheme, TensorHeader};
use serde::Serialize;

pub use dense::{DENSE, Dense};
pub use error::{PlanError, PlanErrors};
pub use graph::{dot, text, to_json};
pub use predict::{Memory, Moment, PIECE_ELEMENTS, Work};
pub use rank::Leaf;
pub use stored::Stored;
pub use variant::{Variant, variants};

use crate::recipe::Recipe;
use crate::{
    Budget, Contract, Form, Given, Limits, ModelGraph, ModelPass, Needs, Pass, Role, Sizes, Target,
    Touches, Upstream,
};

/// Containers that artifacts can be written to.
pub const CONTAINERS: &[&str] = &["safetensors", GGUF];

/// The container of block types.
pub const GGUF: &str = "gguf";

/// A recipe, the model it is for, and everything known before weights are read.
#[derive(Debug)]
pub struct PassGraph<'a> {
    graph: ModelGraph,
    passes: Vec<Box<dyn Pass>>,
    recipe: &'a Recipe,
    /// Places of the steps and of the emits in the recipe that this is a variant of.
    numbers: (Vec<usize>, Vec<usize>),
    layouts: &'a [&'a dyn LayoutSpec],
    source: &'a [TensorHeader],
    calibration_tokens: usize,
    given: Option<Given>,
    budget: Budget,
    model: Vec<ModelStep>,
    last: Option<ModelStep>,
}

impl<'a> PassGraph<'a> {
    /// `passes[i]` belongs to `recipe.steps[i]` ([`Recipe::resolve`]); `layouts` are all that could be
    /// emitted; `source` are all tensors of the checkpoint; `calibration_tokens` is what calibration will
    /// provide, zero when there is none.
    ///
    /// # Panics
    /// When the number of passes is not the number of steps.
    pub fn new(
        graph: ModelGraph,
        passes: Vec<Box<dyn Pass>>,
        recipe: &'a Recipe,
        layouts: &'a [&'a dyn LayoutSpec],
        source: &'a [TensorHeader],
        calibration_tokens: usize,
    ) -> Self {
        assert_eq!(passes.len(), recipe.steps.len(), "one pass per step");
        let budget = Budget::default();
        let numbers = Default::default();
        let (model, given, last) = (Vec::new(), None, None);
        Self {
            graph,
            passes,
            recipe,
            numbers,
            layouts,
            source,
            calibration_tokens,
            given,
            budget,
            model,
            last,
        }
    }

    /// Puts passes on the whole model before the steps; the graph is that of their result.
    pub fn after(mut self, model: Vec<ModelStep>) -> Self {
        self.model = model;
        self
    }

    /// Puts a training of scales behind the steps.
    pub fn before(mut self, last: Option<ModelStep>) -> Self {
        self.last = last;
        self
    }

    /// Calls steps and emits by their places in the recipe that this is a variant of.
    pub fn numbered(mut self, variant: &Variant) -> Self {
        let steps = &variant.steps[self.model.len()..][..self.recipe.steps.len()];
        self.numbers = (steps.to_vec(), variant.emits.clone());
        self
    }

    /// Takes statistics from a file where it has all that a step needs and the step names no upstream.
    pub fn with_given(mut self, given: Option<Given>) -> Self {
        self.given = given;
        self
    }

    /// Sets the budget that the plan keeps to.
    pub fn with_budget(mut self, budget: Budget) -> Self {
        self.budget = budget;
        self
    }

    /// Proves the recipe on this model.
    ///
    /// # Errors
    /// Everything that is wrong.
    pub fn check(self) -> Result<Plan, PlanErrors> {
        check::check(self)
    }
}

/// A pass on the whole model as it will run, before all others (or, training scales, behind them).
#[derive(Debug, Serialize)]
pub struct ModelStep {
    /// `step[i] (pass)`.
    pub label: String,
    /// The same in the variant's own chain of steps, as manifests hold it.
    #[serde(skip)]
    pub of_chain: String,
    /// Place in the recipe.
    pub number: usize,
    /// What it does, in words and numbers.
    pub does: String,
    /// The pass.
    #[serde(skip)]
    pub pass: Box<dyn ModelPass>,
    /// Its own options, as written.
    #[serde(skip)]
    pub options: toml::Table,
    /// The model that it reads.
    #[serde(skip)]
    pub graph: ModelGraph,
    /// Tensors of that model.
    #[serde(skip)]
    pub source: Vec<TensorHeader>,
    /// Sizes of the model that it makes.
    pub sizes: Sizes,
    /// Directory of the model that it learns from, where that is not the original one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher: Option<String>,
    /// That model.
    #[serde(skip)]
    pub teacher_graph: Option<ModelGraph>,
}

impl ModelStep {
    /// Statistics of an input group of a block that it reads, and whether activations run at all.
    pub fn needs(&self, block: &crate::Block, input: usize) -> Needs {
        match self.pass.work() {
            crate::Work::Transform(transform) if block.norm_of(input).is_some() => {
                transform.needs()
            }
            crate::Work::Transform(_) | crate::Work::Train(_) => Needs::empty(),
            crate::Work::Blocks(blocks) => {
                let stops = blocks.stops(block);
                stops.iter().find(|stop| stop.0 == input).map_or(Needs::empty(), |stop| stop.1)
            }
            crate::Work::Choose(choose) => choose.needs(),
        }
    }

    /// Bytes of the model that it leaves, in f32 at most.
    pub fn made_bytes(&self) -> usize {
        let made = crate::model_pass::reshaped_headers(&self.graph, &self.source, &self.sizes);
        made.iter().map(|header| 4 * header.elements()).sum()
    }

    /// True when activations run through the model.
    pub fn calibrates(&self) -> bool {
        match self.pass.work() {
            crate::Work::Transform(transform) => !transform.needs().is_empty(),
            _ => true,
        }
    }
}

/// One step as it will run.
#[derive(Debug, Clone, Serialize)]
pub struct PlanStep {
    /// `step[i] (pass)`.
    pub label: String,
    /// Place in the recipe.
    pub number: usize,
    /// Name of the pass.
    pub pass: String,
    /// The pass's own options, as written.
    #[serde(skip)]
    pub options: toml::Table,
    /// What the pass promised, with the `upstream` that the step asks for.
    #[serde(skip)]
    pub contract: Contract,
    /// Targets per block, `targets[block.index]`; the epilogue comes last.
    #[serde(skip)]
    pub targets: Vec<Vec<Target>>,
    /// Number of sites over all blocks.
    pub sites: usize,
    /// The file of statistics that it reads.
    #[serde(skip)]
    pub given: Option<Given>,
}

/// Steps of one block that run on the same statistics.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Round {
    /// True: one step that needs the statistics of the whole block beforehand. False:
    /// steps that run stage by stage (input group by input group, in data order), each stage reading
    /// what the former compressed ones put out.
    pub whole: bool,
    /// Indices into [`Plan::steps`], in order.
    pub steps: Vec<usize>,
    /// Statistics to collect, one entry per [`crate::Block::inputs`].
    pub needs: Vec<Needs>,
    /// Which activations the statistics come from.
    pub upstream: Upstream,
    /// True when its step learns from the original block ([`crate::Pass::learn`]).
    pub learns: bool,
}

impl Round {
    /// True when activations have to enter the block.
    pub fn feeds(&self) -> bool {
        self.learns || self.observes()
    }

    /// True when a forward of the block has to be observed.
    pub fn observes(&self) -> bool {
        self.upstream != Upstream::Given && self.needs.iter().any(|needs| !needs.is_empty())
    }
}

/// What becomes of one site.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SitePlan {
    /// Full name without `.weight`.
    pub name: String,
    /// [`crate::Block::index`].
    pub block: usize,
    /// The part it plays.
    pub role: Role,
    /// Rows of the weight.
    pub out_features: usize,
    /// Columns of the weight.
    pub in_features: usize,
    /// Form in the checkpoint.
    pub before: Form,
    /// Form after the last step.
    pub after: Form,
    /// Indices into [`Plan::steps`] of the steps that select it.
    pub steps: Vec<usize>,
    /// The scheme it ends in; `None` stays float.
    pub scheme: Option<QuantScheme>,
    /// Fraction of the weights that are not zero, where a step prunes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub density: Option<f64>,
    /// Rank of its factors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank: Option<usize>,
    /// Rank of its correction.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub correction: Option<usize>,
    /// Bytes of the weight in the checkpoint.
    pub dense_bytes: usize,
    /// Bytes in each emit, in the order of [`Plan::emits`].
    pub emitted_bytes: Vec<usize>,
}

/// Where an output tensor comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// A tensor of the checkpoint under this name, in its dtype (values may have been changed by folds).
    Source(String),
    /// A tensor of the checkpoint in blocks, searched without statistics: the embedding of a mixture.
    Coded {
        /// Its name there.
        tensor: String,
        /// The type.
        block: BlockType,
    },
    /// A part of a packed linear.
    Part {
        /// Name of the site.
        site: String,
        /// Suffix of the part.
        suffix: &'static str,
    },
}

/// One tensor of an artifact.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OutputTensor {
    /// Full name.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Shape, outermost first.
    pub shape: Vec<usize>,
    /// Where it comes from.
    pub origin: Origin,
}

impl OutputTensor {
    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size()
    }

    /// Name, dtype and shape.
    pub fn header(&self) -> TensorHeader {
        TensorHeader { name: self.name.clone(), dtype: self.dtype, shape: self.shape.clone() }
    }
}

/// One artifact to write.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PlannedEmit {
    /// The layout of its quantized linears.
    pub layout: LayoutId,
    /// Kind of file.
    pub container: String,
    /// Subdirectory of the output; `None` is the output itself.
    pub dir: Option<String>,
    /// Runtimes that must accept it.
    pub target: Vec<String>,
    /// Block type of the embedding, where it is stored in one.
    pub embedding: Option<BlockType>,
    /// Every tensor, sorted by name.
    pub tensors: Vec<OutputTensor>,
    /// Tensors of the adapter beside it, sorted by name.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub adapter: Vec<OutputTensor>,
    /// True when factors are multiplied.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub merge: bool,
    /// Bytes of all tensors, headers of files excluded.
    pub tensor_bytes: usize,
    /// Bytes of the weights of linears, with scales, zero points and indices.
    pub linear_bytes: usize,
    /// `8 · linear_bytes / weights` over the linears of the decoder blocks, and the output head when it
    /// is quantized.
    pub bits_per_weight: f64,
}

/// A recipe proven for a model.
#[derive(Debug, Serialize)]
pub struct Plan {
    /// The model.
    #[serde(skip)]
    pub graph: ModelGraph,
    /// `passes[i]` runs `steps[i]`.
    #[serde(skip)]
    pub passes: Vec<Box<dyn Pass>>,
    /// Passes on the whole model, before the steps.
    pub model: Vec<ModelStep>,
    /// Training of the scales that the steps have made, behind them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last: Option<ModelStep>,
    /// Steps in order.
    pub steps: Vec<PlanStep>,
    /// Every site of the decoder blocks, then the output head.
    pub sites: Vec<SitePlan>,
    /// Artifacts to write.
    pub emits: Vec<PlannedEmit>,
    /// True when the output head was tied and no longer equals the embedding.
    pub untied: bool,
    /// Bytes of all tensors of the checkpoint.
    pub source_bytes: usize,
    /// Calibration tokens counted on; zero when no step needs statistics.
    pub calibration_tokens: usize,
    /// Tokens per calibration window, capped at what the model was trained for.
    pub context: usize,
    /// Predicted memory, bytes.
    pub memory: Memory,
    /// The budget, bytes.
    pub memory_budget: Option<usize>,
    /// What keeps the run within it.
    pub limits: Limits,
    /// Bytes on scratch at once.
    pub scratch_bytes: usize,
    /// Predicted work, floating-point operations.
    pub work: Work,
    /// What was narrowed so that all emits can carry the result, and why.
    pub notes: Vec<String>,
}

impl Plan {
    /// The rounds of one block, in order; steps without a target in the block are left out.
    pub fn rounds(&self, block: usize) -> Vec<Round> {
        rounds(&self.graph, &self.steps, block)
    }

    /// True when any step calibrates.
    pub fn calibrates(&self) -> bool {
        self.calibration_tokens > 0
    }

    /// What becomes of a site.
    pub fn site(&self, name: &str) -> Option<&SitePlan> {
        self.sites.iter().find(|site| site.name == name)
    }

    /// The linears of an emit with their schemes, as its files name them: the two factors where a site is factored.
    pub fn linears(&self, emit: &PlannedEmit) -> Vec<(String, Option<QuantScheme>)> {
        let mut linears = Vec::new();
        for site in &self.sites {
            match site.rank.filter(|_| !emit.merge) {
                Some(_) => {
                    linears.push((format!("{}.down", site.name), site.scheme));
                    linears.push((format!("{}.up", site.name), site.scheme));
                }
                None => linears.push((site.name.clone(), site.scheme)),
            }
        }
        linears
    }

    /// Sites that an emit writes as two linears, with their ranks.
    pub fn factored(&self, emit: &PlannedEmit) -> Vec<(&str, usize)> {
        let rank = |site: &SitePlan| site.rank.filter(|_| !emit.merge);
        self.sites.iter().filter_map(|site| Some((site.name.as_str(), rank(site)?))).collect()
    }

    /// The block type in which emit `emit` stores a quantized site; `None` for other layouts.
    pub fn block_of(&self, emit: usize, site: &str) -> Option<BlockType> {
        if site == "model.embed_tokens" {
            return self.emits.get(emit)?.embedding;
        }
        let own = self.site(site)?.scheme?.block();
        own.or_else(|| BlockType::from_name(self.emits.get(emit)?.layout.0))
    }

    /// The tables that `attar plan` prints.
    pub fn render(&self) -> String {
        render::render(self)
    }
}

impl std::fmt::Display for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.render())
    }
}

/// Splits a block's steps: each that needs the whole block alone, consecutive others of one upstream together.
fn rounds(graph: &ModelGraph, steps: &[PlanStep], block: usize) -> Vec<Round> {
    let shape = graph.all_blocks().nth(block).expect("a block of this graph");
    let mut rounds: Vec<Round> = Vec::new();
    for (index, step) in steps.iter().enumerate() {
        let targets = &step.targets[block];
        if targets.is_empty() {
            continue;
        }
        let whole = step.contract.touches != Touches::Sites;
        let upstream = step.contract.upstream;
        let joins =
            rounds.last().is_some_and(|last| !whole && !last.whole && last.upstream == upstream);
        if !joins {
            let needs = vec![Needs::empty(); shape.inputs.len()];
            rounds.push(Round { whole, steps: Vec::new(), needs, upstream, learns: false });
        }
        let round = rounds.last_mut().expect("one was just there or pushed");
        round.steps.push(index);
        // What the file does not know of the head is done without.
        let head = shape.attention.is_none();
        if head && step.given.is_some_and(|given| !given.head) {
            continue;
        }
        // Nothing follows the head that a teacher could compare.
        round.learns |= step.contract.needs.contains(Needs::TEACHER) && !head;
        for target in targets {
            round.needs[shape.input_of(target.site)] |= step.contract.needs - Needs::TEACHER;
        }
    }
    rounds
}

#[cfg(test)]
mod tests;
