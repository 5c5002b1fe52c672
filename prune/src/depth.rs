//! Whole blocks: by ShortGPT's block influence `BI = 1 − E cos(x_in, x_out)` over tokens (Men et al. 2024,
//! arXiv:2403.03853), or by what the calibration text loses when a block is left out, one block after the other
//! (as Sleb, Song et al. 2024, arXiv:2402.09025). Influence costs one forward of the model, loss up to
//! `blocks · removed` of them.

use attar_ir::{
    Choose, Cost, Loss, ModelContext, ModelEntry, ModelGraph, ModelPass, ModelPassDef, Needs,
    PassError, Selection, Sizes, Survey, Work, recipe::options,
};
use serde::Deserialize;

/// Registration of `prune_depth`.
pub(crate) const DEF: ModelPassDef = ModelPassDef {
    name: "prune_depth",
    summary: "take whole blocks away, those that change the stream or the loss least",
    paper: "Men et al. 2024, arXiv:2403.03853; Song et al. 2024, arXiv:2402.09025",
    example: "\
[[step]]\n\
pass = \"prune_depth\"\n\
blocks = 1\n\
by = \"loss\"\n\
",
    build: |table| Ok(Box::new(Depth(options(table)?))),
    schema: || schemars::schema_for!(Options),
};

/// How blocks are ranked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
enum By {
    /// Mean cosine between what enters and what leaves a block.
    Influence,
    /// Loss of the calibration text without the block.
    Loss,
}

#[derive(Debug, Clone, Copy, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct Options {
    /// How many blocks go.
    blocks: usize,
    /// How they are ranked.
    by: By,
}

impl Default for Options {
    fn default() -> Self {
        Self { blocks: 1, by: By::Influence }
    }
}

#[derive(Debug)]
struct Depth(Options);

impl Choose for Depth {
    fn needs(&self) -> Needs {
        Needs::empty()
    }

    fn choose(
        &self,
        context: &ModelContext<'_>,
        surveys: &[Survey],
        loss: &mut Loss<'_>,
    ) -> Result<(Selection, Vec<ModelEntry>), PassError> {
        let count = context.graph.blocks.len();
        let mut kept: Vec<usize> = (0..count).collect();
        let mut scores: Vec<f64> =
            surveys.iter().take(count).map(|survey| 1.0 - survey.cosine).collect();
        match self.0.by {
            By::Influence => {
                kept.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
                kept.truncate(count - self.0.blocks);
                kept.sort_unstable();
            }
            By::Loss => {
                for round in 0..self.0.blocks {
                    let mut best: Option<(f64, usize)> = None;
                    for at in 0..kept.len() {
                        let mut without = kept.clone();
                        let block = without.remove(at);
                        let found = loss(&without)?;
                        if !found.is_finite() {
                            let site = context.graph.blocks[block].prefix.clone();
                            let reason = format!("without this block the loss is {found}");
                            return Err(PassError::Numeric { site, reason });
                        }
                        if round == 0 {
                            scores[block] = found;
                        }
                        if best.is_none_or(|(least, _)| found < least) {
                            best = Some((found, at));
                        }
                    }
                    kept.remove(best.map_or(0, |(_, at)| at));
                }
            }
        }
        let entry = ModelEntry {
            step: String::new(),
            what: "blocks".into(),
            before: count,
            after: kept.len(),
            removed: (0..count).filter(|block| !kept.contains(block)).collect(),
            output_error: None,
            scores,
            training: None,
        };
        Ok((Selection { layers: kept, ..Selection::default() }, vec![entry]))
    }
}

impl ModelPass for Depth {
    fn name(&self) -> &'static str {
        "prune_depth"
    }

    fn reshape(&self, graph: &ModelGraph) -> Result<Sizes, String> {
        let (sizes, gone) = (graph.sizes(), self.0.blocks);
        if gone == 0 || gone >= sizes.layers {
            return Err(format!(
                "blocks: expected 1 to {} of the model's {} blocks, got {gone}",
                sizes.layers.saturating_sub(1),
                sizes.layers
            ));
        }
        Ok(Sizes { layers: sizes.layers - gone, ..sizes })
    }

    fn describe(&self, graph: &ModelGraph) -> String {
        let layers = graph.sizes().layers;
        format!("{layers} -> {} blocks", layers.saturating_sub(self.0.blocks))
    }

    fn cost(&self, graph: &ModelGraph, tokens: usize) -> Cost {
        let forwards = match self.0.by {
            By::Influence => 0,
            By::Loss => graph.blocks.len() * self.0.blocks,
        };
        let one: f64 =
            graph.blocks.iter().map(|block| block.forward_flops(tokens, graph.context)).sum();
        let head = 2.0 * (graph.vocab * graph.hidden * tokens) as f64;
        Cost {
            flops: forwards as f64 * (one + head),
            peak_bytes: if forwards > 0 {
                4 * graph.vocab * (graph.hidden + graph.context)
            } else {
                0
            },
            scratch_bytes: 0,
        }
    }

    fn work(&self) -> Work<'_> {
        Work::Choose(self)
    }
}
