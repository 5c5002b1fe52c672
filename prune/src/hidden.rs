//! Hidden width: channels of the residual stream that normed activations use least, over all blocks and tokens
//! (Minitron's width pruning, Muralidharan et al. 2024, arXiv:2407.14679): the score of channel j is the sum over
//! norms of `E |norm(x)_j|`, or how the loss answers to scaling all that belongs to the channel ([`attar_ir::slopes`]).
//! Heads keep their width, so stock runtimes load the result.
//!
//! Beyond the paper: an RMS norm divides by the mean square of the channels that are there. With
//! `r² = n Σ_kept E[(x_j/rms)²] / (|kept| Σ_all E[(x_j/rms)²])` known from calibration, each norm's weight is
//! multiplied by r, so that what is left keeps its size.

use std::collections::BTreeMap;

use attar_ir::{
    Choose, Cost, Cut, DimName, Loss, ModelContext, ModelEntry, ModelGraph, ModelPass,
    ModelPassDef, Needs, PassError, Selection, Sizes, SlopeBy, SlopeQuery, Survey, Work,
    recipe::options,
};
use serde::Deserialize;

use crate::cut;

/// Registration of `prune_hidden`.
pub(crate) const DEF: ModelPassDef = ModelPassDef {
    name: "prune_hidden",
    summary: "take channels of the residual stream away in the whole model",
    paper: "Muralidharan et al. 2024, arXiv:2407.14679",
    example: "\
[[step]]\n\
pass = \"prune_hidden\"\n\
ratio = 0.25\n\
",
    build: |table| Ok(Box::new(Hidden(options(table)?))),
    schema: || schemars::schema_for!(Options),
};

/// How channels of the stream are ranked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Ranking {
    /// Mean absolute value of what the norms put out.
    #[default]
    Activation,
    /// First-order Taylor: what scaling all weights that make, scale or read a channel does to the loss of the calibration
    /// text, root mean square over windows (Molchanov et al. 2019, arXiv:1906.10771).
    Taylor,
}

#[derive(Debug, Clone, Copy, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct Options {
    /// Fraction of the channels that goes.
    ratio: f64,
    /// How channels are ranked: `activation`, or `taylor` by slopes of the loss.
    importance: Ranking,
    /// The width that is left is a multiple of this.
    multiple_of: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { ratio: 0.125, importance: Ranking::Activation, multiple_of: 32 }
    }
}

#[derive(Debug)]
struct Hidden(Options);

impl Hidden {
    fn keep(&self, graph: &ModelGraph) -> Result<usize, String> {
        cut::keep(graph.hidden, self.0.ratio, self.0.multiple_of, "channels")
    }
}

impl Choose for Hidden {
    fn needs(&self) -> Needs {
        Needs::ABS_MEAN | Needs::SQUARE_SUM
    }

    fn choose(
        &self,
        context: &ModelContext<'_>,
        surveys: &[Survey],
        _: &mut Loss<'_>,
    ) -> Result<(Selection, Vec<ModelEntry>), PassError> {
        let graph = context.graph;
        let n = graph.hidden;
        let mut scores = vec![0.0f64; n];
        // Statistics of what each norm puts out.
        let mut normed: Vec<(String, Vec<f64>)> = Vec::new();
        for (block, survey) in graph.all_blocks().zip(surveys) {
            let inputs = 0..block.inputs.len();
            let norms = inputs.filter_map(|input| Some((block.norm_of(input)?, input)));
            for (norm, input) in norms {
                let Some(stats) = survey.stats.input(input) else { continue };
                let mean = stats.abs_mean.as_ref().expect("the pass asks for it");
                scores.iter_mut().zip(mean).for_each(|(score, &mean)| *score += f64::from(mean));
                // `(x_j / rms)²`: without the norm's own weight.
                let squares = stats.square_sum.as_ref().expect("the pass asks for it");
                let plain = squares.iter().zip(&survey.norms[norm]).map(|(square, &g)| {
                    let g = f64::from(g);
                    if g == 0.0 { 0.0 } else { square / (g * g) }
                });
                normed.push((block.norms[norm].tensor.clone(), plain.collect()));
            }
        }
        if let Some(slopes) = context.slopes.get(&DimName::Hidden) {
            scores.clone_from(slopes);
        }
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
        let mut kept = order[..self.keep(graph).expect("the plan checked the ratio")].to_vec();
        kept.sort_unstable();
        let mut scales: BTreeMap<String, f32> = BTreeMap::new();
        for (tensor, squares) in normed {
            let all: f64 = squares.iter().sum();
            let left: f64 = kept.iter().map(|&j| squares[j]).sum();
            let ratio = (left * n as f64 / (kept.len() as f64 * all.max(f64::MIN_POSITIVE))).sqrt();
            scales.insert(tensor, if ratio > 0.0 { ratio as f32 } else { 1.0 });
        }
        let entry = ModelEntry {
            step: String::new(),
            what: DimName::Hidden.to_string(),
            before: n,
            after: kept.len(),
            removed: (0..n).filter(|channel| !kept.contains(channel)).collect(),
            output_error: None,
            scores: Vec::new(),
            training: None,
        };
        let layers = (0..graph.blocks.len()).collect();
        let cuts = vec![Cut { dim: DimName::Hidden, kept }];
        Ok((Selection { layers, cuts, scales }, vec![entry]))
    }
}

impl ModelPass for Hidden {
    fn name(&self) -> &'static str {
        "prune_hidden"
    }

    fn reshape(&self, graph: &ModelGraph) -> Result<Sizes, String> {
        Ok(Sizes { hidden: self.keep(graph)?, ..graph.sizes() })
    }

    fn describe(&self, graph: &ModelGraph) -> String {
        let words = match self.0.importance {
            Ranking::Activation => "",
            Ranking::Taylor => ", ranked by slopes of the loss",
        };
        format!("hidden {} -> {} channels{words}", graph.hidden, self.keep(graph).unwrap_or(0))
    }

    fn cost(&self, graph: &ModelGraph, _: usize) -> Cost {
        Cost { flops: (graph.hidden * graph.blocks.len()) as f64, ..Cost::default() }
    }

    fn slopes(&self, _: &ModelGraph) -> Option<SlopeQuery> {
        let query = SlopeQuery { dims: vec![DimName::Hidden], by: SlopeBy::Groups };
        (self.0.importance == Ranking::Taylor).then_some(query)
    }

    fn work(&self) -> Work<'_> {
        Work::Choose(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use attar_ir::{
        AttentionShape, Block, BlockStats, ChannelMap, Fold, InputGroup, InputStats, Norm, Producer,
    };

    fn block(index: usize, attention: bool) -> Block {
        Block {
            index,
            prefix: format!("model.layers.{index}."),
            sites: Vec::new(),
            norms: vec![Norm { tensor: format!("norm.{index}"), width: 4 }],
            inputs: vec![InputGroup { name: "input", width: 4, sites: Vec::new() }],
            // A tied head has no fold, and its norm is one all the same.
            folds: attention
                .then_some(Fold {
                    producer: Producer::Norm(0),
                    input: 0,
                    map: ChannelMap::Identity,
                })
                .into_iter()
                .collect(),
            attention: attention.then_some(AttentionShape { heads: 1, kv_heads: 1, head_dim: 4 }),
        }
    }

    /// `x / rms(x)` of two tokens, times the norm's weight.
    fn survey(g: [f32; 4]) -> Survey {
        let x = [[4.0f32, 1.0, 0.5, 2.0], [-3.0, 2.0, 1.0, -1.0]];
        let mut stats = InputStats {
            tokens: 2,
            abs_mean: Some(vec![0.0; 4]),
            square_sum: Some(vec![0.0; 4]),
            ..InputStats::default()
        };
        for row in &x {
            let rms = (row.iter().map(|v| v * v).sum::<f32>() / 4.0).sqrt();
            for j in 0..4 {
                let y = row[j] / rms * g[j];
                stats.abs_mean.as_mut().unwrap()[j] += y.abs() / 2.0;
                stats.square_sum.as_mut().unwrap()[j] += f64::from(y * y);
            }
        }
        Survey {
            stats: BlockStats { inputs: vec![Some(stats)], gradients: None },
            norms: vec![g.to_vec()],
            cosine: 1.0,
        }
    }

    #[test]
    fn a_loud_channel_that_nobody_hears_goes_and_norms_keep_their_size() {
        let graph = ModelGraph {
            family: "llama".into(),
            hidden: 4,
            vocab: 8,
            context: 8,
            blocks: vec![block(0, true)],
            epilogue: block(1, false),
            embedding: "embed".into(),
            tied: true,
        };
        let context = ModelContext { graph: &graph, seed: 0, slopes: &attar_ir::Slopes::new() };
        // Channel 0 has most of the energy, and its weight in the norms is small.
        let surveys = [survey([0.01, 1.0, 1.0, 1.0]), survey([0.02, 2.0, 2.0, 2.0])];
        let pass = Hidden(Options { ratio: 0.25, multiple_of: 1, ..Options::default() });
        let mut loss = |_: &[usize]| Ok(0.0);
        let (found, entries) = pass.choose(&context, &surveys, &mut loss).unwrap();
        assert_eq!((&found.cuts[0].kept[..], &entries[0].removed[..]), (&[1, 2, 3][..], &[0][..]));
        // What is left of both tokens has the mean square r² of what was there: the norm divides by r less.
        let (all, left) = (4.0f64, 3.0f64);
        let mut energy = 0.0;
        for row in [[4.0f64, 1.0, 0.5, 2.0], [-3.0, 2.0, 1.0, -1.0]] {
            let square = row.iter().map(|v| v * v).sum::<f64>() / all;
            energy += row[1..].iter().map(|v| v * v / square).sum::<f64>();
        }
        let r = (energy * all / (left * 2.0 * all)).sqrt();
        assert!(r < 0.7, "most of the energy went: {r}");
        for tensor in ["norm.0", "norm.1"] {
            let scale = f64::from(found.scales[tensor]);
            assert!((scale - r).abs() < 1e-6, "{tensor}: {scale} {r}");
        }
    }
}
