//! SmoothQuant: moves the range of activations into the weights before both are rounded to bytes (Xiao et
//! al. 2022, arXiv:2211.10438, eq. 4).
//!
//! Along a fold, input channel j is divided by `s_j = max|X_j|^α / max|W_j|^(1−α)` in the producer, and
//! the consumers' columns are multiplied by it; `max|W_j|` is over all linears that read the input. The
//! function of the block stays what it was.
//!
//! Differs from the authors' code (and llm-compressor's): the largest magnitude takes the place of the
//! range; channels that were always zero, or whose weights are, keep their scale of 1; scales have the
//! geometric mean 1, which changes no rounding (scales per token and per row follow) and keeps norms in the
//! range of f16; `folds = "all"` smooths the inputs of o (through v, one scale per key/value channel
//! shared by its query heads) and of down (through up), too. An exponent for each fold, chosen by the expected
//! error in the metric of the Hessian with the step of the largest token, was tried and was no better than
//! 0.5 (`bench/results/2026-11-26-w8a8`). Cost O(out · in).

use attar_ir::{
    Block, BlockState, BlockStats, ChannelMap, Contract, Cost, Event, Fold, FormChange, FormSet,
    Limits, Needs, Pass, PassContext, PassDef, PassError, PassReport, Producer, Target, Touches,
    Upstream, recipe::RecipeError,
};
use attar_tensor::Mat;
use serde::Deserialize;

use crate::common::{check_finite, dense, fold_scale, options, report};

/// Registration of `smoothquant`.
pub(crate) const DEF: PassDef = PassDef {
    name: "smoothquant",
    summary: "move the range of activations into the weights, for schemes that round both",
    paper: "Xiao et al. 2022, arXiv:2211.10438",
    example: "\
[[step]]
pass = \"smoothquant\"
alpha = 0.5

[[step]]
pass = \"rtn\"
scheme = { bits = 8, group_size = -1, activations = \"int8\" }

[[emit]]
layout = \"compressed-tensors-int\"
",
    takes_scheme: false,
    symmetric_by_default: false,
    build: |table| Ok(Box::new(SmoothQuant(checked(options(table)?)?))),
    schema: || schemars::schema_for!(Options),
};

/// Which inputs are smoothed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Folds {
    /// Those that a norm makes, as in the paper.
    #[default]
    Norms,
    /// Those of the attention's output and of the down projection, too.
    All,
}

#[derive(Debug, Clone, Copy, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct Options {
    /// How much of the range goes from activations to weights, 0 to 1.
    #[schemars(range(min = 0.0, max = 1.0))]
    alpha: f64,
    folds: Folds,
}

impl Default for Options {
    fn default() -> Self {
        Self { alpha: 0.5, folds: Folds::Norms }
    }
}

fn checked(options: Options) -> Result<Options, RecipeError> {
    let alpha = options.alpha;
    if (0.0..=1.0).contains(&alpha) {
        return Ok(options);
    }
    Err(RecipeError::invalid("alpha", format!("expected a number of 0 to 1, got {alpha}")))
}

#[derive(Debug)]
struct SmoothQuant(Options);

/// Largest magnitude of each column over all weights.
fn column_max(weights: &[&Mat]) -> Vec<f32> {
    let mut largest = vec![0.0f32; weights[0].ncols()];
    for row in weights.iter().flat_map(|weight| weight.outer_iter()) {
        for (largest, w) in largest.iter_mut().zip(row) {
            *largest = largest.max(w.abs());
        }
    }
    largest
}

/// Largest value per producer channel.
fn per_producer(map: ChannelMap, values: &[f32]) -> Vec<f32> {
    let mut largest = vec![0.0f32; map.producers(values.len())];
    for (c, v) in values.iter().enumerate() {
        let to = &mut largest[map.producer_of(c)];
        *to = to.max(*v);
    }
    largest
}

/// `x^α / w^(1−α)` with the geometric mean 1 over channels where neither is zero; 1 elsewhere.
fn scales(x: &[f32], w: &[f32], alpha: f64) -> Vec<f32> {
    let log = |(x, w): (&f32, &f32)| {
        let live = *x > 0.0 && *w > 0.0;
        live.then(|| alpha * f64::from(*x).ln() - (1.0 - alpha) * f64::from(*w).ln())
    };
    let logs: Vec<Option<f64>> = x.iter().zip(w).map(log).collect();
    let live = logs.iter().flatten().count().max(1);
    let mean = logs.iter().flatten().sum::<f64>() / live as f64;
    // Beyond this a norm leaves the range of f16.
    let scale = |log: &Option<f64>| log.map_or(1.0, |log| (log - mean).exp().clamp(1e-4, 1e4));
    logs.iter().map(|log| scale(log) as f32).collect()
}

impl SmoothQuant {
    /// Folds that the options name.
    fn folds<'a>(&self, block: &'a Block) -> impl Iterator<Item = &'a Fold> {
        let all = self.0.folds == Folds::All;
        block.folds.iter().filter(move |fold| all || matches!(fold.producer, Producer::Norm(_)))
    }

    /// Scale per producer channel of a fold, from the largest magnitudes of its input.
    fn scale(&self, fold: &Fold, weights: &[&Mat], x: &[f32]) -> Vec<f32> {
        let of = |values: &[f32]| per_producer(fold.map, values);
        scales(&of(x), &of(&column_max(weights)), self.0.alpha)
    }
}

impl Pass for SmoothQuant {
    fn name(&self) -> &'static str {
        "smoothquant"
    }

    fn contract(&self) -> Contract {
        Contract {
            // A scale leaves zeros what they are.
            accepts: FormSet::FLOAT_ANY_ZEROS,
            produces: FormChange::NONE,
            needs: Needs::ABS_MAX,
            upstream: Upstream::Compressed,
            touches: Touches::Folds,
            looks_ahead: false,
        }
    }

    fn cost(&self, block: &Block, targets: &[Target], _: &Limits) -> Cost {
        let weights = |target: &Target| block.sites[target.site].weights() as f64;
        Cost { flops: 2.0 * targets.iter().map(weights).sum::<f64>(), ..Cost::default() }
    }

    fn apply(
        &self,
        context: &PassContext<'_>,
        targets: &[Target],
        state: &mut BlockState,
        stats: &mut BlockStats,
    ) -> Result<PassReport, PassError> {
        let block = context.block;
        let mut events = vec![Vec::new(); block.sites.len()];
        for fold in self.folds(block) {
            let consumers = &block.inputs[fold.input].sites;
            // A fold is used only when every consumer is to be smoothed.
            if consumers.iter().any(|site| !targets.iter().any(|target| target.site == *site)) {
                continue;
            }
            let input = stats.inputs[fold.input].as_ref().expect("the plan provides statistics");
            let x = input.abs_max.as_ref().expect("the contract asks for it");
            let first = &block.sites[consumers[0]].name;
            if let Some(at) = x.iter().position(|x| !x.is_finite()) {
                let reason = format!(
                    "input channel {at} reached {}; check the checkpoint and the calibration text",
                    x[at]
                );
                return Err(PassError::Numeric { site: first.clone(), reason });
            }
            let weights: Vec<&Mat> = consumers.iter().map(|&site| dense(state, site)).collect();
            for (&site, weight) in consumers.iter().zip(&weights) {
                check_finite(&block.sites[site].name, "the weight", weight)?;
            }
            let dead = x.iter().filter(|x| **x == 0.0).count();
            let scale = self.scale(fold, &weights, x);
            let width = x.len();
            fold_scale(block, fold, &scale, state);
            let columns: Vec<f32> = (0..width).map(|c| scale[fold.map.producer_of(c)]).collect();
            stats.inputs[fold.input].as_mut().expect("present above").fold(&columns);
            state.scale_input(fold.input, &columns);
            for &site in consumers {
                let event = Event::Chosen { name: "alpha".into(), value: self.0.alpha };
                events[site].push(event);
            }
            for &site in consumers.iter().filter(|_| dead > 0) {
                events[site].push(Event::DeadColumns { count: dead });
            }
        }
        let entry = |target: &Target| {
            // Scales were moved, nothing was rounded.
            let weight = dense(state, target.site);
            let mut entry =
                report("smoothquant", &block.sites[target.site].name, weight, weight, None);
            entry.events = std::mem::take(&mut events[target.site]);
            entry
        };
        Ok(PassReport { sites: targets.iter().map(entry).collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rtn::round_to_nearest;
    use crate::testing::{HIDDEN, KV, block, forward, inputs, state, statistics};
    use attar_ir::Weight;
    use attar_tensor::{
        ActivationScheme, Granularity, QuantScheme, ScaleGrid, grid::Clip, rng::Rng,
    };

    fn scheme() -> QuantScheme {
        QuantScheme {
            bits: 8,
            granularity: Granularity::Channel,
            symmetric: true,
            scale_grid: ScaleGrid::F32,
            zero_min: 0,
            activations: ActivationScheme::Int8PerToken,
        }
    }

    fn pass(options: &str) -> Box<dyn Pass> {
        (DEF.build)(&options.parse().unwrap()).unwrap()
    }

    fn apply(
        options: &str,
        targets: &[usize],
        state: &mut BlockState,
        stats: &mut BlockStats,
    ) -> Result<PassReport, PassError> {
        let block = block();
        let targets: Vec<Target> =
            targets.iter().map(|&site| Target { site, scheme: Some(scheme()) }).collect();
        let context =
            PassContext { block: &block, seed: 0, survey: &[], original: &[], scratch: None };
        pass(options).apply(&context, &targets, state, stats)
    }

    /// Squared error of rounding inputs and weights of the first site as W8A8 does.
    fn rounded_error(x: &Mat, weight: &Mat) -> f64 {
        let rounded = round_to_nearest(weight, scheme(), Clip::MinMax).0.dequantize();
        let mut q = x.clone();
        for mut row in q.outer_iter_mut() {
            let step = row.iter().fold(0.0f32, |m, v| m.max(v.abs())) / 127.0;
            row.map_inplace(|v| *v = (*v / step).round_ties_even() * step);
        }
        let error = q.dot(&rounded.t()) - x.dot(&weight.t());
        error.iter().map(|e| f64::from(*e).powi(2)).sum()
    }

    #[test]
    fn smoothing_keeps_the_output_and_follows_the_statistics() {
        for options in ["", "folds = \"all\"", "alpha = 1", "alpha = 0.8\nfolds = \"all\""] {
            let mut rng = Rng::new(41);
            let (before, x) = (state(&mut rng), inputs(&mut rng));
            let [h, a, y] = forward(&before, &x);
            let mut stats =
                BlockStats { inputs: vec![statistics(&h), statistics(&a)], gradients: None };
            let mut after = before.clone();
            let report = apply(options, &[0, 1], &mut after, &mut stats).unwrap();
            assert_eq!(report.sites.len(), 2);
            assert!(!report.sites[0].events.is_empty(), "{options}");
            assert!(report.sites.iter().all(|site| site.weight_error == 0.0));
            assert!(after.norm_changed[0] && after.weight_changed[0]);
            let all = options.contains("all");
            assert_eq!(after.weight_changed[1] && after.bias_changed[0], all, "{options}");
            let [h2, a2, y2] = forward(&after, &x);
            let size = y.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            assert!(y.iter().zip(&y2).all(|(a, b)| (a - b).abs() < 1e-5 * size), "{options}");
            for (site, x) in [h2, a2].iter().enumerate() {
                let followed = stats.inputs[site].as_ref().unwrap().abs_max.as_ref().unwrap();
                let again = statistics(x).unwrap().abs_max.unwrap();
                assert!(followed.iter().zip(&again).all(|(a, b)| (a - b).abs() <= 1e-4 * b));
            }
        }
    }

    #[test]
    fn the_formula_of_the_paper_and_less_error_with_outliers() {
        let mut rng = Rng::new(42);
        let (before, x) = (state(&mut rng), inputs(&mut rng));
        let [h, a, _] = forward(&before, &x);
        let error = rounded_error(&h, dense(&before, 0));
        let mut stats =
            BlockStats { inputs: vec![statistics(&h), statistics(&a)], gradients: None };
        let x_max = stats.inputs[0].as_ref().unwrap().abs_max.clone().unwrap();
        let w_max = column_max(&[dense(&before, 0)]);
        let mut after = before.clone();
        apply("alpha = 0.5", &[0, 1], &mut after, &mut stats).unwrap();
        let [h2, ..] = forward(&after, &x);
        let smoothed = rounded_error(&h2, dense(&after, 0));
        assert!(smoothed < 0.5 * error, "{smoothed} {error}");
        // Both ranges end at the square root of their product, up to the common factor.
        let ratio =
            |c: usize| before.norms[0][c] / after.norms[0][c] / (x_max[c] / w_max[c]).sqrt();
        for c in 0..HIDDEN {
            assert!((ratio(c) / ratio(0) - 1.0).abs() < 1e-4, "{c}");
        }
    }

    #[test]
    fn heads_share_the_scale_of_their_values() {
        let mut rng = Rng::new(43);
        let (before, x) = (state(&mut rng), inputs(&mut rng));
        let [h, a, _] = forward(&before, &x);
        let mut stats =
            BlockStats { inputs: vec![statistics(&h), statistics(&a)], gradients: None };
        let mut after = before.clone();
        apply("folds = \"all\"", &[0, 1], &mut after, &mut stats).unwrap();
        let scale = after.input_scale[1].clone().unwrap();
        let map = block().folds[1].map;
        let mut of = vec![None; KV];
        for (c, s) in scale.iter().enumerate() {
            let shared: &mut f32 = of[map.producer_of(c)].get_or_insert(*s);
            assert_eq!(shared.to_bits(), s.to_bits());
        }
        assert!(of.iter().flatten().any(|s| (s - 1.0).abs() > 0.01));
    }

    #[test]
    fn channels_without_input_or_weights_keep_their_scale() {
        let mut rng = Rng::new(44);
        let (mut before, x) = (state(&mut rng), inputs(&mut rng));
        before.norms[0][3] = 0.0;
        let Weight::Dense(weight) = &mut before.linears[0].weight else { panic!("a float") };
        weight.column_mut(5).fill(0.0);
        let [h, a, y] = forward(&before, &x);
        let mut stats =
            BlockStats { inputs: vec![statistics(&h), statistics(&a)], gradients: None };
        let mut after = before.clone();
        let report = apply("", &[0, 1], &mut after, &mut stats).unwrap();
        assert!(report.sites[0].events.contains(&Event::DeadColumns { count: 1 }));
        let scale = after.input_scale[0].as_ref().unwrap();
        assert_eq!([scale[3], scale[5]].map(f32::to_bits), [1.0f32.to_bits(); 2]);
        assert!(scale.iter().all(|s| s.is_finite()));
        let [.., y2] = forward(&after, &x);
        let size = y.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        assert!(y.iter().zip(&y2).all(|(a, b)| (a - b).abs() < 1e-5 * size));
    }

    #[test]
    fn a_fold_needs_all_its_consumers_and_finite_numbers() {
        let mut rng = Rng::new(45);
        let (before, x) = (state(&mut rng), inputs(&mut rng));
        let [h, a, _] = forward(&before, &x);
        let fresh = || BlockStats { inputs: vec![statistics(&h), statistics(&a)], gradients: None };
        let mut after = before.clone();
        apply("", &[1], &mut after, &mut fresh()).unwrap();
        assert_eq!(after, before, "only the value projection reads the norm, and it was kept");
        let mut stats = fresh();
        stats.inputs[0].as_mut().unwrap().abs_max.as_mut().unwrap()[7] = f32::INFINITY;
        let error = apply("", &[0, 1], &mut after, &mut stats).unwrap_err().to_string();
        assert!(error.contains("input channel 7") && error.contains("inf"), "{error}");
    }

    #[test]
    fn what_options_say_is_what_is_asked_for() {
        let contract = pass("alpha = 0.8").contract();
        assert!(contract.needs == Needs::ABS_MAX && !contract.looks_ahead);
        let refused = |options: &str, part: &str| {
            let error = (DEF.build)(&options.parse().unwrap()).unwrap_err().to_string();
            assert!(error.contains(part), "{options}: {error}");
        };
        refused("alpha = 1.5", "expected a number of 0 to 1, got 1.5");
        refused("alpha = -0.1", "got -0.1");
        refused("alpha = nan", "NaN");
        refused("alpha = \"auto\"", "f64");
        refused("alhpa = 0.5", "did you mean `alpha`?");
        refused("folds = \"norm\"", "norms");
    }
}
