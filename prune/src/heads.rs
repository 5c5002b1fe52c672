//! Attention heads: `prune_kv_groups` takes key/value heads away, each with the query heads that read it;
//! `prune_heads` takes query heads, equally many of every group, so that grouped-query attention stays uniform.
//!
//! A head's cost is the output error of `o_proj` when the other heads have made up for it (see `cut`: optimal
//! brain surgeon on groups, ZipLM, Kurtic et al. 2023, arXiv:2302.04089), one head after the other; or how the loss
//! answers to scaling all that belongs to it (first-order Taylor, see [`attar_ir::slopes`]).
//! `o_proj [hidden, heads · head_dim]`.

use attar_ir::{
    Block, BlockState, Cost, Cut, CutBlocks, DimName, InputStats, ModelContext, ModelEntry,
    ModelGraph, ModelPass, ModelPassDef, Needs, PassError, Side, Sizes, SlopeQuery, Weight, Work,
    recipe::{RecipeError, options},
};
use serde::Deserialize;

use crate::cut::{self, Asked, Importance};

/// Registration of `prune_kv_groups`.
pub(crate) const GROUPS: ModelPassDef = ModelPassDef {
    name: "prune_kv_groups",
    summary: "take key/value heads away with their query heads, equally many in every block",
    paper: "Kurtic et al. 2023, arXiv:2302.04089",
    example: "\
[[step]]\n\
pass = \"prune_kv_groups\"\n\
ratio = 0.25\n\
",
    build: |table| build(table, true),
    schema: || schemars::schema_for!(Options),
};

/// Registration of `prune_heads`.
pub(crate) const HEADS: ModelPassDef = ModelPassDef {
    name: "prune_heads",
    summary: "take query heads away, equally many of every key/value head",
    paper: "Kurtic et al. 2023, arXiv:2302.04089",
    example: "\
[[step]]\n\
pass = \"prune_heads\"\n\
ratio = 0.5\n\
",
    build: |table| build(table, false),
    schema: || schemars::schema_for!(Options),
};

#[derive(Debug, Clone, Copy, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct Options {
    /// Fraction of the heads that goes.
    ratio: f64,
    /// How heads are ranked: `output` (error after the update), `activation`, `magnitude`, or by slopes of the loss:
    /// `taylor`, `taylor_elements`.
    importance: Importance,
    /// Moves what is left of `o_proj` to make up for what goes.
    update: bool,
    /// Dampening as a fraction of the Hessian's mean diagonal.
    percdamp: f64,
}

impl Default for Options {
    fn default() -> Self {
        Self { ratio: 0.25, importance: Importance::Output, update: true, percdamp: 0.01 }
    }
}

fn build(table: &toml::Table, groups: bool) -> Result<Box<dyn ModelPass>, RecipeError> {
    let options: Options = options(table)?;
    cut::check_percdamp(options.percdamp)?;
    Ok(Box::new(Heads { groups, options }))
}

#[derive(Debug)]
struct Heads {
    /// Key/value heads with their query heads, not query heads alone.
    groups: bool,
    options: Options,
}

impl Heads {
    /// Heads of its kind that stay.
    fn keep(&self, graph: &ModelGraph) -> Result<usize, String> {
        let sizes = graph.sizes();
        if self.groups {
            return cut::keep(sizes.kv_heads, self.options.ratio, 1, "key/value heads");
        }
        let repeat = sizes.heads / sizes.kv_heads;
        if repeat == 1 {
            return Err(
                "every key/value head has one query head: use prune_kv_groups, which takes both"
                    .into(),
            );
        }
        cut::keep(sizes.heads, self.options.ratio, sizes.kv_heads, "query heads").map_err(
            |reason| {
                format!("{reason} (equally many of each of {} key/value heads)", sizes.kv_heads)
            },
        )
    }
}

fn output(block: &Block) -> usize {
    block.reader_of(DimName::Head(block.index)).expect("decoder blocks have attention")
}

impl CutBlocks for Heads {
    fn stops(&self, block: &Block) -> Vec<(usize, Needs)> {
        vec![(block.input_of(output(block)), Needs::HESSIAN)]
    }

    fn cut(
        &self,
        context: &ModelContext<'_>,
        block: &Block,
        _: usize,
        state: &mut BlockState,
        stats: &mut InputStats,
    ) -> Result<(Cut, ModelEntry), PassError> {
        let site = output(block);
        let keep = self.keep(context.graph).expect("the plan checked the ratio");
        let dim =
            if self.groups { DimName::KvGroup(block.index) } else { DimName::Head(block.index) };
        let table = context.graph.dim(dim).expect("decoder blocks have heads");
        let member = table.members.iter().find(|member| member.side == Side::Reads);
        let member = member.expect("the attention output reads every head");
        let places: Vec<Vec<usize>> =
            (0..table.size).map(|index| member.places(table.size, &[index])).collect();
        let Weight::Dense(weight) = &mut state.linears[site].weight else {
            unreachable!("passes on the whole model see floats")
        };
        let magnitude = |places: &Vec<usize>| {
            let squares = places.iter().flat_map(|&j| weight.column(j).to_vec());
            squares.map(|v| f64::from(v) * f64::from(v)).sum::<f64>().sqrt()
        };
        let slopes = context.slopes.get(&dim).cloned();
        let given = slopes.unwrap_or_else(|| places.iter().map(magnitude).collect());
        let asked = Asked {
            places: &places,
            keep,
            classes: if self.groups { 1 } else { context.graph.sizes().kv_heads },
            importance: self.options.importance,
            given: &given,
            update: self.options.update,
            percdamp: self.options.percdamp,
        };
        let found = cut::remove(&block.sites[site].name, weight, stats, asked)?;
        let entry = ModelEntry {
            step: String::new(),
            what: dim.to_string(),
            before: table.size,
            after: keep,
            removed: (0..table.size).filter(|index| !found.kept.contains(index)).collect(),
            output_error: Some(found.error),
            scores: found.scores,
            training: None,
        };
        Ok((Cut { dim, kept: found.kept }, entry))
    }
}

impl ModelPass for Heads {
    fn name(&self) -> &'static str {
        if self.groups { "prune_kv_groups" } else { "prune_heads" }
    }

    fn reshape(&self, graph: &ModelGraph) -> Result<Sizes, String> {
        let (sizes, keep) = (graph.sizes(), self.keep(graph)?);
        Ok(if self.groups {
            let heads = sizes.heads / sizes.kv_heads * keep;
            Sizes { heads, kv_heads: keep, ..sizes }
        } else {
            Sizes { heads: keep, ..sizes }
        })
    }

    fn describe(&self, graph: &ModelGraph) -> String {
        let (sizes, kept) = (graph.sizes(), self.keep(graph).unwrap_or(0));
        let words = self.options.importance.words();
        if self.groups {
            format!(
                "{} -> {kept} key/value heads in every block, with their query heads{}",
                sizes.kv_heads, words
            )
        } else {
            format!("{} -> {kept} query heads in every block{words}", sizes.heads)
        }
    }

    fn cost(&self, graph: &ModelGraph, _: usize) -> Cost {
        let sizes = graph.sizes();
        let width = graph.blocks.first().map_or(0, |block| block.sites[output(block)].in_features);
        let of = if self.groups { sizes.kv_heads } else { sizes.heads };
        let removed = width - self.keep(graph).map_or(width, |kept| width / of.max(1) * kept);
        let one = cut::cost(sizes.hidden, width, removed);
        Cost { flops: one.flops * sizes.layers as f64, ..one }
    }

    fn slopes(&self, graph: &ModelGraph) -> Option<SlopeQuery> {
        let dim = if self.groups { DimName::KvGroup } else { DimName::Head };
        self.options.importance.slopes(graph, dim)
    }

    fn work(&self) -> Work<'_> {
        Work::Blocks(self)
    }
}
