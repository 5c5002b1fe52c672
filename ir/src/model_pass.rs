//! Passes on the model as a whole: checkpoint in, checkpoint out, before any block is worked on.
//!
//! What such a pass changes is told beforehand by [`ModelPass::reshape`], so that everything behind it is
//! proven on the shapes that will be. Four kinds of work cover them: tensor by tensor, after a look at statistics or
//! without data ([`Transform`]), block by block with statistics ([`CutBlocks`]), one choice after all blocks
//! were seen ([`Choose`]), and training ([`Train`]).

use std::{collections::BTreeMap, fmt::Debug};

use serde::{Deserialize, Serialize};

use crate::{
    Block, BlockState, BlockStats, Cost, DimName, InputStats, ModelGraph, Needs, PassError, Sizes,
    SlopeQuery, Slopes, Train, TrainingReport, recipe::RecipeError,
};

/// What a pass on the whole model gets beside tensors.
#[derive(Debug, Clone, Copy)]
pub struct ModelContext<'a> {
    /// The model as it was read.
    pub graph: &'a ModelGraph,
    /// Seed of the run.
    pub seed: u64,
    /// What [`ModelPass::slopes`] asked for, of the model as it was read.
    pub slopes: &'a Slopes,
}

/// One step of a pass on the whole model, for the report.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct ModelEntry {
    /// The step, `step[i] (pass)`; the driver fills it in.
    #[serde(default)]
    pub step: String,
    /// What was worked on: a dimension, or `blocks`.
    pub what: String,
    /// Size before.
    pub before: usize,
    /// Size after.
    pub after: usize,
    /// Indices that were removed, rising.
    pub removed: Vec<usize>,
    /// Relative squared output error of the consumers of what was removed, on the calibration inputs.
    pub output_error: Option<f64>,
    /// Scores by index, where the pass ranked.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub scores: Vec<f64>,
    /// What training did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub training: Option<TrainingReport>,
}

/// Indices that stay, of one dimension.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    /// The dimension.
    pub dim: DimName,
    /// Rising indices.
    pub kept: Vec<usize>,
}

/// Values of the tensors of the checkpoint as f32, by name.
pub type ReadTensor<'a> = dyn Fn(&str) -> Result<Vec<f32>, PassError> + Sync + 'a;

/// Every tensor by itself, without data but what it was shown of the blocks before.
pub trait Transform: Sync {
    /// Statistics of what norms put out that it wants to see ([`Block::norm_of`]).
    fn needs(&self) -> Needs {
        Needs::empty()
    }

    /// Is shown what was seen of a block of the model as it was read; blocks come in order, the epilogue last, before any
    /// tensor is worked on.
    ///
    /// # Errors
    /// Numerics.
    fn see(
        &self,
        context: &ModelContext<'_>,
        block: &Block,
        survey: &Survey,
    ) -> Result<(), PassError> {
        let _ = (context, block, survey);
        Ok(())
    }

    /// What it does to the model, for the report.
    fn entries(&self, graph: &ModelGraph) -> Vec<ModelEntry>;

    /// True when rows of this tensor are mixed with each other, so that it must be held whole.
    fn mixes_rows(&self, context: &ModelContext<'_>, tensor: &str) -> bool;

    /// Transforms `values [rows, columns]`, some whole rows of `tensor` (all of them where
    /// [`Transform::mixes_rows`]); a vector is one row. `head` is true for the copy of a tied embedding that
    /// becomes the output head.
    ///
    /// # Errors
    /// When another tensor that is needed cannot be read.
    fn apply(
        &self,
        context: &ModelContext<'_>,
        tensor: &str,
        head: bool,
        columns: usize,
        values: &mut [f32],
        read: &ReadTensor<'_>,
    ) -> Result<(), PassError>;
}

/// Block by block, each seeing what the compressed former ones put out.
pub trait CutBlocks: Sync {
    /// Input groups to stop at, rising, with the statistics of their activations.
    fn stops(&self, block: &Block) -> Vec<(usize, Needs)>;

    /// Chooses what of a dimension stays. In `state` the columns of the consumers that are removed become
    /// zero and the others may be moved to make up for them; every shape stays.
    ///
    /// # Errors
    /// Numerics.
    fn cut(
        &self,
        context: &ModelContext<'_>,
        block: &Block,
        input: usize,
        state: &mut BlockState,
        stats: &mut InputStats,
    ) -> Result<(Cut, ModelEntry), PassError>;
}

/// What was seen of one block.
#[derive(Debug, Clone)]
pub struct Survey {
    /// Statistics of its inputs, as its norms put them out.
    pub stats: BlockStats,
    /// Weights of its norms.
    pub norms: Vec<Vec<f32>>,
    /// Mean cosine between what enters and what leaves it, over tokens; one for the epilogue.
    pub cosine: f64,
}

/// What stays of the model.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Selection {
    /// Blocks that stay, rising.
    pub layers: Vec<usize>,
    /// Other dimensions.
    pub cuts: Vec<Cut>,
    /// Vectors (weights of norms) that are multiplied by a number.
    pub scales: BTreeMap<String, f32>,
}

/// Mean negative log-likelihood per token, nats, of the calibration text under the blocks given.
pub type Loss<'a> = dyn FnMut(&[usize]) -> Result<f64, PassError> + 'a;

/// One choice after every block was seen on the original model.
pub trait Choose: Sync {
    /// Statistics of every input group.
    fn needs(&self) -> Needs;

    /// Chooses. `surveys` has one entry for each block, then one for the epilogue (final norm and head). `loss` runs
    /// the model with some of its blocks.
    ///
    /// # Errors
    /// Numerics.
    fn choose(
        &self,
        context: &ModelContext<'_>,
        surveys: &[Survey],
        loss: &mut Loss<'_>,
    ) -> Result<(Selection, Vec<ModelEntry>), PassError>;
}

/// The work of a pass on the whole model.
#[allow(missing_debug_implementations, reason = "views of a pass, which is Debug itself")]
pub enum Work<'a> {
    /// Tensor by tensor.
    Transform(&'a dyn Transform),
    /// Block by block.
    Blocks(&'a dyn CutBlocks),
    /// One choice.
    Choose(&'a dyn Choose),
    /// Training.
    Train(&'a dyn Train),
}

/// A pass on the model as a whole.
pub trait ModelPass: Debug + Send + Sync {
    /// The name as written in recipes.
    fn name(&self) -> &'static str;

    /// Sizes of the model afterwards.
    ///
    /// # Errors
    /// Why this model cannot be reshaped so, with the numbers and the remedy.
    fn reshape(&self, graph: &ModelGraph) -> Result<Sizes, String>;

    /// What it does, in words and numbers, e.g. `ffn 768 -> 576`.
    fn describe(&self, graph: &ModelGraph) -> String;

    /// What it costs, forward passes excluded.
    fn cost(&self, graph: &ModelGraph, tokens: usize) -> Cost;

    /// Slopes of the loss that its choices rest on: the calibration text runs forward and backward through the model before
    /// the pass does its work.
    fn slopes(&self, graph: &ModelGraph) -> Option<SlopeQuery> {
        let _ = graph;
        None
    }

    /// True when the stream between blocks comes out in another basis, the same for all of them.
    fn turns_stream(&self) -> bool {
        false
    }

    /// Its work.
    fn work(&self) -> Work<'_>;
}

/// An entry of a crate's list of passes on the whole model.
pub struct ModelPassDef {
    /// The name as written in recipes.
    pub name: &'static str,
    /// One line for `attar passes` and RECIPES.md.
    pub summary: &'static str,
    /// Source of the algorithm.
    pub paper: &'static str,
    /// A recipe that runs on any small model, for RECIPES.md. Calibration data comes from the command line.
    pub example: &'static str,
    /// Builds the pass from the step's own options; refuses unknown keys.
    pub build: fn(&toml::Table) -> Result<Box<dyn ModelPass>, RecipeError>,
    /// JSON Schema of the step's own options.
    pub schema: fn() -> schemars::Schema,
}

impl Debug for ModelPassDef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ModelPassDef").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Headers of the checkpoint that a pass makes of `source`, sorted by name: blocks beyond the new number of
/// layers are gone, every axis of the coupling table has its new size, and a head that is no longer tied
/// has a tensor of its own.
pub fn reshaped_headers(
    graph: &ModelGraph,
    source: &[attar_tensor::TensorHeader],
    sizes: &Sizes,
) -> Vec<attar_tensor::TensorHeader> {
    let gone: Vec<&str> =
        graph.blocks.iter().skip(sizes.layers).map(|block| block.prefix.as_str()).collect();
    let dims = graph.dims();
    let mut headers: Vec<attar_tensor::TensorHeader> = source
        .iter()
        .filter(|header| !gone.iter().any(|prefix| header.name.starts_with(prefix)))
        .cloned()
        .collect();
    for header in &mut headers {
        for dim in &dims {
            let size = sizes.of(dim.name, dim.size);
            for member in dim.members.iter().filter(|member| member.tensor == header.name) {
                // Two names of one axis (heads and their groups): the one that changes decides.
                if size != dim.size {
                    header.shape[member.axis] = member.outer * size * member.stride;
                }
            }
        }
    }
    if graph.tied && !sizes.tied {
        let (table, head) = ("model.embed_tokens.weight", "lm_head.weight");
        let found = headers.iter().find(|header| header.name == graph.embedding).cloned();
        headers.retain(|header| header.name != table && header.name != head);
        for name in [table, head] {
            headers.extend(
                found.iter().map(|from| attar_tensor::TensorHeader {
                    name: name.to_owned(),
                    ..from.clone()
                }),
            );
        }
    }
    if graph.tied && sizes.tied && sizes.hidden != graph.hidden {
        // A second copy of the tied table would keep the old width; nobody reads it.
        headers.retain(|header| header.name == graph.embedding || header.name != "lm_head.weight");
    }
    headers.sort_by(|a, b| a.name.cmp(&b.name));
    headers
}
