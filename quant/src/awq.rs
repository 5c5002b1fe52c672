//! AWQ: activation-aware scaling before rounding (Lin et al. 2023, arXiv:2306.00978), in the Hessian's
//! metric.
//!
//! Along a fold, input channels are divided by `s` in the producer and the consumers' columns multiplied
//! by it; `s = m_x^α / m_w^(1−α)` with `m_x` the mean absolute activation and `m_w` the mean relative
//! weight, α on a grid. The loss of a candidate is the output error of ALL consumers of the input,
//! `Σ tr(ΔW H ΔWᵀ)` with `ΔW = Q(W diag s) diag s⁻¹ − W`; `s = 1` is a candidate, so the choice is never
//! worse in this metric. Then each group's range is clipped in the metric of its own diagonal block of H.
//! Differs from the authors' code: exact second-order loss instead of sampled forward passes; v/o also
//! under grouped-query attention, one scale per key/value channel shared by its query heads.
//! Cost O(grid · out · in²) per fold.

use attar_ir::{
    Block, BlockState, BlockStats, ChannelMap, Contract, Cost, Event, Fold, FormChange, FormSet,
    Limits, Needs, Pass, PassContext, PassDef, PassError, PassReport, Target, Touches, Upstream,
    Weight,
};
use attar_tensor::{
    Mat, QuantScheme, block_search,
    grid::{Clip, choose_grid},
    linalg::gemm_nn,
};
use rayon::prelude::*;
use serde::Deserialize;

use crate::common::{ROW_TILE, check_finite, dense, fold_scale, metric, options, report};
use crate::rtn::round_to_nearest;

/// Registration of `awq`.
pub(crate) const DEF: PassDef = PassDef {
    name: "awq",
    summary: "scale salient channels up before a later step rounds them, and clip ranges",
    paper: "Lin et al. 2023, arXiv:2306.00978",
    example: "\
[[step]]
pass = \"awq\"

[[step]]
pass = \"gptq\"
scheme = { bits = 4, group_size = 64, symmetric = false }
",
    takes_scheme: false,
    symmetric_by_default: false,
    build: |table| Ok(Box::new(Awq(options(table)?))),
    schema: || schemars::schema_for!(Options),
};

#[derive(Debug, Clone, Copy, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct Options {
    /// Steps of the scale exponent between 0 and 1.
    grid: usize,
    /// Search clipping ranges too.
    clip: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { grid: 20, clip: true }
    }
}

#[derive(Debug)]
struct Awq(Options);

/// Loss of one candidate scale (per consumer column).
fn candidate_loss(weights: &[(&Mat, QuantScheme)], scale: &[f32], h: &Mat) -> f64 {
    weights
        .iter()
        .map(|(weight, scheme)| {
            let mut scaled = (*weight).clone();
            for mut row in scaled.outer_iter_mut() {
                for (w, s) in row.iter_mut().zip(scale) {
                    *w *= s;
                }
            }
            let mut delta = match scheme.block() {
                None => round_to_nearest(&scaled, *scheme, Clip::MinMax).0.dequantize(),
                Some(block) => {
                    // The importance of a column whose input was divided by its scale.
                    let importance: Vec<f32> =
                        h.diag().iter().zip(scale).map(|(h, s)| h / (s * s)).collect();
                    let (out, n) = scaled.dim();
                    let values = scaled.as_slice().expect("standard layout");
                    block_search::search(block, values, out, n, Some(&importance)).dequantize()
                }
            };
            for (mut row, weight) in delta.outer_iter_mut().zip(weight.outer_iter()) {
                for ((d, s), w) in row.iter_mut().zip(scale).zip(weight) {
                    *d = *d / s - w;
                }
            }
            metric(&delta, h)
        })
        .sum()
}

/// Mean over rows of |w| relative to its group's largest, per column.
fn relative_weight(weights: &[(&Mat, QuantScheme)]) -> Vec<f64> {
    let n = weights[0].0.ncols();
    let mut mean = vec![0.0f64; n];
    let mut rows = 0;
    for (weight, scheme) in weights {
        let size = scheme.group_size(n);
        for row in weight.outer_iter() {
            rows += 1;
            let row = row.to_slice().expect("standard layout");
            for (g, group) in row.chunks(size).enumerate() {
                let top = group.iter().fold(1e-12f32, |m, v| m.max(v.abs()));
                for (i, v) in group.iter().enumerate() {
                    mean[g * size + i] += f64::from(v.abs() / top);
                }
            }
        }
    }
    mean.iter().map(|m| (m / f64::from(rows.max(1))).max(1e-4)).collect()
}

fn per_producer(map: ChannelMap, values: &[f64]) -> Vec<f64> {
    let mut sum = vec![0.0; map.producers(values.len())];
    let share = sum.len() as f64 / values.len() as f64;
    for (c, v) in values.iter().enumerate() {
        sum[map.producer_of(c)] += v * share;
    }
    sum
}

impl Awq {
    /// Best scale per producer channel, and its exponent.
    fn search(
        &self,
        fold: &Fold,
        weights: &[(&Mat, QuantScheme)],
        mean: &[f32],
        h: &Mat,
    ) -> (Vec<f32>, Option<f64>) {
        let n = mean.len();
        let x: Vec<f64> = mean.iter().map(|&m| f64::from(m).max(1e-8)).collect();
        let (x, w) =
            (per_producer(fold.map, &x), per_producer(fold.map, &relative_weight(weights)));
        let expand =
            |s: &[f32]| -> Vec<f32> { (0..n).map(|c| s[fold.map.producer_of(c)]).collect() };
        let ones = vec![1.0f32; x.len()];
        let mut best = (candidate_loss(weights, &expand(&ones), h), ones, None);
        for duo in [true, false] {
            for step in 1..=self.0.grid {
                let alpha = step as f64 / self.0.grid as f64;
                let raw: Vec<f64> = x
                    .iter()
                    .zip(&w)
                    .map(|(x, w)| {
                        let s =
                            if duo { x.powf(alpha) / w.powf(1.0 - alpha) } else { x.powf(alpha) };
                        s.clamp(1e-4, 1e4)
                    })
                    .collect();
                let (low, high) =
                    raw.iter().fold((f64::INFINITY, 0.0f64), |(l, h), &s| (l.min(s), h.max(s)));
                let unit = (low * high).sqrt();
                let scale: Vec<f32> = raw.iter().map(|s| (s / unit) as f32).collect();
                let loss = candidate_loss(weights, &expand(&scale), h);
                if loss < best.0 {
                    best = (loss, scale, Some(if duo { alpha } else { -alpha }));
                }
            }
        }
        (best.1, best.2)
    }
}

/// Clamps each group's weights to the range with the least `δ H_gg δᵀ`.
fn clip_groups(weight: &mut Mat, scheme: QuantScheme, h: &Mat) {
    let n = weight.ncols();
    let size = scheme.group_size(n);
    let top = f32::from(scheme.max_code());
    let h = h.as_slice().expect("standard layout");
    let all = weight.as_slice_mut().expect("standard layout");
    all.par_chunks_mut(ROW_TILE * n).for_each(|rows_of| {
        let rows = rows_of.len() / n;
        let mut delta = vec![0.0f32; rows * size];
        let mut product = vec![0.0f32; rows * size];
        for first in (0..n).step_by(size) {
            let mut least = vec![f64::INFINITY; rows];
            let mut keep = vec![1.0f32; rows];
            for step in 0..12 {
                let ratio = 1.0 - 0.05 * step as f32;
                for (row, delta) in rows_of.chunks(n).zip(delta.chunks_mut(size)) {
                    let w = &row[first..first + size];
                    let (low, high) = range(w, ratio);
                    let clamped: Vec<f32> = w.iter().map(|v| v.clamp(low, high)).collect();
                    let grid = choose_grid(&clamped, None, scheme, Clip::MinMax);
                    for ((d, &c), &w) in delta.iter_mut().zip(&clamped).zip(w) {
                        *d = grid.value(grid.code(c, top)) - w;
                    }
                }
                let block = (&h[first * n + first..], n);
                let out = (product.as_mut_slice(), size);
                gemm_nn((rows, size, size), 1.0, (&delta, size), block, false, out);
                for r in 0..rows {
                    let span = r * size..(r + 1) * size;
                    let loss: f64 = delta[span.clone()]
                        .iter()
                        .zip(&product[span])
                        .map(|(a, b)| f64::from(*a) * f64::from(*b))
                        .sum();
                    if loss < least[r] {
                        (least[r], keep[r]) = (loss, ratio);
                    }
                }
            }
            for (row, &ratio) in rows_of.chunks_mut(n).zip(&keep) {
                let w = &mut row[first..first + size];
                let (low, high) = range(w, ratio);
                for v in w {
                    *v = v.clamp(low, high);
                }
            }
        }
    });
}

fn range(w: &[f32], ratio: f32) -> (f32, f32) {
    let (low, high) = w.iter().fold((0.0f32, 0.0f32), |(l, h), &v| (l.min(v), h.max(v)));
    (low * ratio, high * ratio)
}

impl Pass for Awq {
    fn name(&self) -> &'static str {
        "awq"
    }

    fn contract(&self) -> Contract {
        Contract {
            accepts: FormSet::FLOAT_ANY_ZEROS,
            produces: FormChange::NONE,
            needs: Needs::ABS_MEAN.union(Needs::HESSIAN),
            upstream: Upstream::Compressed,
            touches: Touches::Folds,
            looks_ahead: true,
        }
    }

    fn takes(&self, _: QuantScheme) -> Result<(), &'static str> {
        Ok(())
    }

    fn cost(&self, block: &Block, targets: &[Target], _: &Limits) -> Cost {
        let mut cost = Cost::default();
        for target in targets {
            let site = &block.sites[target.site];
            let (o, n) = (site.out_features as f64, site.in_features as f64);
            // A scaled copy, its codes, and their error.
            cost.flops += 2.0 * o * n * n * (2.0 * self.0.grid as f64 + 1.0);
            cost.peak_bytes = cost.peak_bytes.max(site.weights() * 10);
        }
        cost
    }

    fn apply(
        &self,
        context: &PassContext<'_>,
        targets: &[Target],
        state: &mut BlockState,
        stats: &mut BlockStats,
    ) -> Result<PassReport, PassError> {
        let block = context.block;
        let scheme_of = |site: usize| {
            targets
                .iter()
                .find(|target| target.site == site)
                .map(|target| target.scheme.expect("the plan looks ahead for awq"))
        };
        let mut events = vec![Vec::new(); block.sites.len()];
        for fold in &block.folds {
            let consumers = &block.inputs[fold.input].sites;
            let schemes: Option<Vec<_>> = consumers.iter().map(|&site| scheme_of(site)).collect();
            // A fold is used only when every consumer is to be rounded.
            let Some(schemes) = schemes else { continue };
            let input = stats.inputs[fold.input].as_ref().expect("the plan provides statistics");
            let h = input.hessian.as_ref().expect("the contract asks for it");
            let mean = input.abs_mean.as_ref().expect("the contract asks for it");
            let weights: Vec<_> =
                consumers.iter().zip(&schemes).map(|(&site, &s)| (dense(state, site), s)).collect();
            for (&site, (weight, _)) in consumers.iter().zip(&weights) {
                check_finite(&block.sites[site].name, "the weight", weight)?;
                check_finite(&block.sites[site].name, "the Hessian", h)?;
            }
            let (scale, alpha) = self.search(fold, &weights, mean, h);
            if let Some(alpha) = alpha {
                fold_scale(block, fold, &scale, state);
                let columns: Vec<f32> =
                    (0..mean.len()).map(|c| scale[fold.map.producer_of(c)]).collect();
                stats.inputs[fold.input].as_mut().expect("present above").fold(&columns);
                state.scale_input(fold.input, &columns);
                for &site in consumers {
                    events[site].push(Event::Chosen { name: "alpha".into(), value: alpha });
                }
            }
        }
        let mut sites = Vec::new();
        for target in targets {
            let scheme = target.scheme.expect("the plan looks ahead for awq");
            let input = block.input_of(target.site);
            let h = stats.input(input).and_then(|i| i.hessian.as_ref()).expect("as above");
            let before = dense(state, target.site).clone();
            // Block types choose their ranges in a search of their own.
            if self.0.clip && scheme.block().is_none() {
                let Weight::Dense(weight) = &mut state.linears[target.site].weight else {
                    unreachable!("the plan proved float weights")
                };
                clip_groups(weight, scheme, h);
                state.weight_changed[target.site] = true;
            }
            let name = &block.sites[target.site].name;
            let mut entry = report("awq", name, &before, dense(state, target.site), Some(h));
            entry.events = std::mem::take(&mut events[target.site]);
            sites.push(entry);
        }
        Ok(PassReport { sites })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{block, forward, inputs, state, statistics};
    use attar_tensor::{Granularity, ScaleGrid, rng::Rng};

    fn scheme() -> QuantScheme {
        QuantScheme {
            bits: 3,
            granularity: Granularity::Group(32),
            symmetric: false,
            scale_grid: ScaleGrid::F16,
            zero_min: 1,
            activations: attar_tensor::ActivationScheme::Float,
        }
    }

    fn rounded_loss(state: &BlockState, stats: &BlockStats, site: usize) -> f64 {
        let weight = dense(state, site);
        let rounded = round_to_nearest(weight, scheme(), Clip::MinMax).0.dequantize();
        metric(&(&rounded - weight), stats.inputs[site].as_ref().unwrap().hessian.as_ref().unwrap())
    }

    fn apply(clip: bool, state: &mut BlockState, stats: &mut BlockStats) -> PassReport {
        let block = block();
        let targets = [0, 1].map(|site| Target { site, scheme: Some(scheme()) });
        let context =
            PassContext { block: &block, seed: 0, survey: &[], original: &[], scratch: None };
        Awq(Options { grid: 20, clip }).apply(&context, &targets, state, stats).unwrap()
    }

    #[test]
    fn folding_keeps_the_output_and_never_raises_the_rounding_error() {
        let mut rng = Rng::new(31);
        let (before, x) = (state(&mut rng), inputs(&mut rng));
        let [h, a, y] = forward(&before, &x);
        let mut stats =
            BlockStats { inputs: vec![statistics(&h), statistics(&a)], gradients: None };
        let loss = rounded_loss(&before, &stats, 1);
        let mut after = before.clone();
        let report = apply(false, &mut after, &mut stats);
        assert!(report.sites.iter().any(|site| !site.events.is_empty()), "a scale was chosen");
        assert!(after.norm_changed[0] && after.weight_changed[0]);
        let [h2, a2, y2] = forward(&after, &x);
        let size = y.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        assert!(y.iter().zip(&y2).all(|(a, b)| (a - b).abs() < 1e-5 * size));
        for (site, x) in [h2, a2].iter().enumerate() {
            let followed = stats.inputs[site].as_ref().unwrap();
            let again = statistics(x).unwrap();
            let top = again.hessian.as_ref().unwrap().iter().fold(0.0f32, |m, v| m.max(v.abs()));
            for (a, b) in followed.hessian.iter().flatten().zip(again.hessian.iter().flatten()) {
                assert!((a - b).abs() < 1e-4 * top, "{a} {b}");
            }
        }
        // Of `o` only: the rows of `v` were rescaled by the second fold, so its absolute error moved.
        let found = rounded_loss(&after, &stats, 1);
        assert!(found <= loss * 1.001, "{found} {loss}");
    }

    #[test]
    fn clipping_lowers_the_error_in_the_groups_own_metric() {
        let mut rng = Rng::new(32);
        let (before, x) = (state(&mut rng), inputs(&mut rng));
        let [h, ..] = forward(&before, &x);
        let hessian = statistics(&h).unwrap().hessian.unwrap();
        let weight = dense(&before, 0);
        let mut clipped = weight.clone();
        clip_groups(&mut clipped, scheme(), &hessian);
        // Only the group's own block of H is looked at, so compare in that metric.
        let mut blocks = hessian.clone();
        for ((i, j), v) in blocks.indexed_iter_mut() {
            if i / 32 != j / 32 {
                *v = 0.0;
            }
        }
        let loss = |from: &Mat| {
            let rounded = round_to_nearest(from, scheme(), Clip::MinMax).0.dequantize();
            metric(&(&rounded - weight), &blocks)
        };
        assert!(loss(&clipped) < loss(weight));
    }

    #[test]
    fn unknown_options_name_the_nearest() {
        let table: toml::Table = "gird = 4".parse().unwrap();
        let error = (DEF.build)(&table).unwrap_err().to_string();
        assert!(error.contains("gird") && error.contains("grid"), "{error}");
    }
}
