//! FFN channels: the rows of gate and up and the columns of down that belong together, equally many in every block.
//!
//! A channel's cost is the output error of `down` when the others have made up for it (see `cut`; OSSCAR, Meng et
//! al. 2024, arXiv:2403.12983, states the same problem); or `‖W_down,j‖ ‖X_j‖`; or the product of the norms of its
//! three weight vectors; or how the loss answers to scaling them (first-order Taylor on LLM-Pruner's coupled group, Ma et al.
//! 2023, arXiv:2305.11627; slopes of the model as it was read, see [`attar_ir::slopes`]). Each block sees what the
//! pruned former ones put out. `down [hidden, ffn]`.

use attar_ir::{
    Block, BlockState, Cost, Cut, CutBlocks, DimName, InputStats, ModelContext, ModelEntry,
    ModelGraph, ModelPass, ModelPassDef, Needs, PassError, Sizes, SlopeQuery, Weight, Work,
    recipe::options,
};
use serde::Deserialize;

use crate::cut::{self, Asked, Importance};

/// Registration of `prune_ffn`.
pub(crate) const DEF: ModelPassDef = ModelPassDef {
    name: "prune_ffn",
    summary: "take whole FFN channels away, equally many in every block",
    paper: "Ling et al. 2024, arXiv:2412.18110; Meng et al. 2024, arXiv:2403.12983; Ma et al. 2023, arXiv:2305.11627",
    example: "\
[[step]]\n\
pass = \"prune_ffn\"\n\
ratio = 0.25\n\
\n\
[[step]]\n\
pass = \"gptq\"\n\
scheme = { bits = 4, group_size = 32 }\n\
",
    build: |table| {
        let options: Options = options(table)?;
        cut::check_percdamp(options.percdamp)?;
        Ok(Box::new(Ffn(options)))
    },
    schema: || schemars::schema_for!(Options),
};

#[derive(Debug, Clone, Copy, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct Options {
    /// Fraction of the channels that goes.
    ratio: f64,
    /// How channels are ranked: `output` (error after the update), `activation`, `magnitude`, or by slopes of the loss:
    /// `taylor`, `taylor_elements`.
    importance: Importance,
    /// Moves what is left of `down` to make up for what goes.
    update: bool,
    /// The width that is left is a multiple of this.
    multiple_of: usize,
    /// Dampening as a fraction of the Hessian's mean diagonal.
    percdamp: f64,
}

impl Default for Options {
    fn default() -> Self {
        let importance = Importance::Output;
        Self { ratio: 0.25, importance, update: true, multiple_of: 64, percdamp: 0.01 }
    }
}

#[derive(Debug)]
struct Ffn(Options);

impl Ffn {
    fn keep(&self, graph: &ModelGraph) -> Result<usize, String> {
        cut::keep(graph.sizes().ffn, self.0.ratio, self.0.multiple_of, "FFN channels")
    }
}

/// The linear that reads the channels.
fn down(block: &Block) -> usize {
    block.reader_of(DimName::Ffn(block.index)).expect("decoder blocks have an MLP")
}

impl CutBlocks for Ffn {
    fn stops(&self, block: &Block) -> Vec<(usize, Needs)> {
        vec![(block.input_of(down(block)), Needs::HESSIAN)]
    }

    fn cut(
        &self,
        context: &ModelContext<'_>,
        block: &Block,
        _: usize,
        state: &mut BlockState,
        stats: &mut InputStats,
    ) -> Result<(Cut, ModelEntry), PassError> {
        let down = down(block);
        let n = block.sites[down].in_features;
        let keep = self.keep(context.graph).expect("the plan checked the ratio");
        let places: Vec<Vec<usize>> = (0..n).map(|channel| vec![channel]).collect();
        let dim = DimName::Ffn(block.index);
        let given = if self.0.importance == Importance::Magnitude {
            magnitudes(block, state)
        } else {
            context.slopes.get(&dim).cloned().unwrap_or_default()
        };
        let asked = Asked {
            places: &places,
            keep,
            classes: 1,
            importance: self.0.importance,
            given: &given,
            update: self.0.update,
            percdamp: self.0.percdamp,
        };
        let Weight::Dense(weight) = &mut state.linears[down].weight else {
            unreachable!("passes on the whole model see floats")
        };
        let found = cut::remove(&block.sites[down].name, weight, stats, asked)?;
        let entry = ModelEntry {
            step: String::new(),
            what: dim.to_string(),
            before: n,
            after: keep,
            removed: (0..n).filter(|channel| !found.kept.contains(channel)).collect(),
            output_error: Some(found.error),
            scores: Vec::new(),
            training: None,
        };
        Ok((Cut { dim, kept: found.kept }, entry))
    }
}

/// Product of the norms of each channel's rows of gate and up and column of down.
fn magnitudes(block: &Block, state: &BlockState) -> Vec<f64> {
    let weight = |site: usize| state.linears[site].weight.values();
    let norm = |values: &mut dyn Iterator<Item = f32>| {
        values.map(|v| f64::from(v) * f64::from(v)).sum::<f64>().sqrt()
    };
    let down = weight(down(block));
    let mut products: Vec<f64> =
        (0..down.ncols()).map(|j| norm(&mut down.column(j).iter().copied())).collect();
    for site in block.makers_of(DimName::Ffn(block.index)) {
        let made = weight(site);
        for (product, row) in products.iter_mut().zip(made.rows()) {
            *product *= norm(&mut row.iter().copied());
        }
    }
    products
}

impl ModelPass for Ffn {
    fn name(&self) -> &'static str {
        "prune_ffn"
    }

    fn reshape(&self, graph: &ModelGraph) -> Result<Sizes, String> {
        Ok(Sizes { ffn: self.keep(graph)?, ..graph.sizes() })
    }

    fn describe(&self, graph: &ModelGraph) -> String {
        let kept = self.keep(graph).unwrap_or(0);
        format!(
            "ffn {} -> {kept} channels in every block{}",
            graph.sizes().ffn,
            self.0.importance.words()
        )
    }

    fn cost(&self, graph: &ModelGraph, _: usize) -> Cost {
        let sizes = graph.sizes();
        let removed = sizes.ffn - self.keep(graph).unwrap_or(sizes.ffn);
        let one = cut::cost(sizes.hidden, sizes.ffn, removed);
        Cost { flops: one.flops * sizes.layers as f64, ..one }
    }

    fn slopes(&self, graph: &ModelGraph) -> Option<SlopeQuery> {
        self.0.importance.slopes(graph, DimName::Ffn)
    }

    fn work(&self) -> Work<'_> {
        Work::Blocks(self)
    }
}
