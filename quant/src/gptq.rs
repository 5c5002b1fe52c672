//! GPTQ: column-by-column rounding with error feedback (Frantar et al. 2022, arXiv:2210.17323, Alg. 1).
//!
//! Minimises `‖WX − ŴX‖² ∝ tr(ΔW H ΔWᵀ)` per output row given `H = 2/n XᵀX`. With `H⁻¹ = UᵀU`, column i is
//! rounded and its error `e = (w_i − ŵ_i) / U_ii` is subtracted from the columns behind it, `w_j −= e U_ij`.
//! `weight [out, in]`, `hessian [in, in]`, f32 with the factor in f64. Cost O(in³ + out·in²).
//!
//! Deliberate differences from the authors' code: scales are searched in the metric of H's diagonal and
//! fixed before the sweep (static groups, so act-order needs no permuted groups); after the sweep the
//! scales are refitted and the codes descended coordinate-wise in the full metric (as QuantEase, Behdin
//! et al. 2023, arXiv:2309.01885; `column_solver::rounding`), each move accepted only when it lowers the objective; dead columns are
//! rounded to nearest instead of zeroed; failed factorizations raise the dampening and are reported.

use std::io;

use attar_ir::{
    Block, BlockState, BlockStats, Contract, Cost, Event, Factors, FormChange, FormSet, Limits,
    Needs, Pass, PassContext, PassDef, PassError, PassReport, SiteReport, Target, Touches,
    Upstream, Weight,
};
use attar_tensor::{
    BlockQuantized, BlockType, Mat, QuantScheme, QuantizedLinear, Scratch,
    blocks::SUPER,
    column_solver::{
        self, Errors, Factor, FactorOptions, TILE,
        rounding::{Mask, RoundingOptions},
    },
    linalg::{
        InverseFactor, LinalgError,
        lowrank::{follow_down, inner_metric, product_error},
    },
};
use rayon::prelude::*;
use serde::Deserialize;

use crate::common::{check_finite, metric, options, relative, squares};

mod blocks;

/// Registration of `gptq`.
pub(crate) const DEF: PassDef = PassDef {
    name: "gptq",
    summary: "round column by column and carry the error to the columns not yet rounded",
    paper: "Frantar et al. 2022, arXiv:2210.17323",
    example: "\
[[step]]
pass = \"gptq\"
scheme = { bits = 4, group_size = 64 }
",
    takes_scheme: true,
    symmetric_by_default: true,
    build: |table| Ok(Box::new(Gptq(options(table)?))),
    schema: || schemars::schema_for!(Options),
};

#[derive(Debug, Clone, Copy, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct Options {
    /// Dampening as a fraction of the Hessian's mean diagonal.
    percdamp: f64,
    /// Solve columns in order of falling Hessian diagonal (groups stay where they are). Block types (q4_k, ...)
    /// keep their order, since a block is a run of columns.
    actorder: bool,
    /// Columns swept before the rest is updated.
    block_size: usize,
    /// Rounds of refinement (scale refit and coordinate descent) after the sweep.
    refine: usize,
    /// Repetitions inside each block of a round.
    inner: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { percdamp: 0.01, actorder: true, block_size: 128, refine: 1, inner: 2 }
    }
}

impl Options {
    /// Rows of a panel of the factor: whole blocks where there are any.
    const fn panel(&self, blocks: bool) -> usize {
        if blocks { self.block_size.next_multiple_of(SUPER) } else { self.block_size }
    }
}

#[derive(Debug)]
struct Gptq(Options);

fn factorize(
    hessian: &Mat,
    options: &Options,
    blocks: bool,
    site: &str,
    scratch: Option<&Scratch>,
) -> Result<Factor, PassError> {
    let options = FactorOptions {
        percdamp: options.percdamp,
        // A block is a run of columns: it can be solved in their order only.
        by_diagonal: options.actorder && !blocks,
        panel: options.panel(blocks),
    };
    column_solver::factorize(hessian, options, scratch)
        .map_err(|error| PassError::of_solver(site, error))
}

/// `hessian` is that of the factor, dead columns filled.
fn quantize(
    weight: &Mat,
    hessian: &Mat,
    factor: &Factor,
    scheme: QuantScheme,
    mask: Mask,
    options: &Options,
) -> io::Result<(QuantizedLinear, Errors)> {
    let rounding = RoundingOptions { scheme, refine: options.refine, inner: options.inner, mask };
    column_solver::sweep(weight, hessian, factor, &rounding)
}

/// The same for a block type; the factor's panels are whole blocks.
fn quantize_blocks(
    weight: &Mat,
    hessian: &Mat,
    factor: &Factor,
    block: BlockType,
    options: &Options,
) -> io::Result<(BlockQuantized, Errors)> {
    let (out, n) = weight.dim();
    let hessian = hessian.as_slice().expect("standard layout");
    let tiles: Vec<(BlockQuantized, Errors)> = weight
        .as_slice()
        .expect("standard layout")
        .par_chunks(TILE * n)
        .map(|weight| blocks::solve(weight, hessian, factor, block, options))
        .collect::<io::Result<_>>()?;
    let mut whole = BlockQuantized::zeros(block, 0, n);
    whole.out_features = out;
    let mut total = Errors::default();
    for (tile, errors) in tiles {
        whole.codes.extend(tile.codes);
        whole.d.extend(tile.d);
        whole.dmin.extend(tile.dmin);
        whole.sub_scales.extend(tile.sub_scales);
        whole.sub_mins.extend(tile.sub_mins);
        total.weight += errors.weight;
        total.output += errors.output;
    }
    Ok((whole, total))
}

/// Quantizes the factors of a weight: `down` against H, then `up`, fitted to the quantized `d̂` in closed form, against
/// what is left of H behind it, `d̂ H d̂ᵀ`.
fn factored(
    factors: &Factors,
    hessian: &mut Mat,
    scheme: QuantScheme,
    options: &Options,
    (site, scratch): (&str, Option<&Scratch>),
) -> Result<(Factors, SiteReport), PassError> {
    let dense = |weight: &Weight| weight.values().into_owned();
    let (down, up) = (dense(&factors.down), dense(&factors.up));
    check_finite(site, "the factor down", &down)?;
    check_finite(site, "the factor up", &up)?;
    check_finite(site, "the Hessian", hessian)?;
    let mut told = Vec::new();
    let mut one = |weight: &Mat, hessian: &mut Mat| {
        let factor = factorize(hessian, options, false, site, scratch)?;
        factor.fill(hessian, true);
        let result = quantize(weight, hessian, &factor, scheme, Mask::None, options);
        factor.fill(hessian, false);
        told.extend(Event::of_factor(&factor));
        result
            .map(|(quantized, _)| quantized)
            .map_err(|source| PassError::Scratch { site: site.to_owned(), source })
    };
    let numeric = |error: LinalgError| PassError::Numeric {
        site: site.to_owned(),
        reason: format!("{error}; check the checkpoint and the calibration text"),
    };
    let new_down = one(&down, hessian)?;
    let rounded = new_down.dequantize();
    let followed = follow_down(&up, &down, &rounded, hessian).map_err(numeric)?;
    let mut inner = inner_metric(&rounded, hessian);
    let new_up = one(&followed, &mut inner)?;
    let made = (&new_up.dequantize(), &rounded);
    let [error, whole] = product_error((&up, &down), made, None);
    let [output, all] = product_error((&up, &down), made, Some(hessian));
    let report = SiteReport {
        site: site.to_owned(),
        pass: "gptq".into(),
        weight_error: relative(error, whole),
        output_error: Some(relative(output, all)),
        events: told,
    };
    let quantized = Weight::Quantized;
    Ok((Factors { down: quantized(new_down), up: quantized(new_up) }, report))
}

impl Pass for Gptq {
    fn name(&self) -> &'static str {
        "gptq"
    }

    fn contract(&self) -> Contract {
        Contract {
            accepts: FormSet::FLOAT_ANY_RANK,
            produces: FormChange::QUANTIZE,
            needs: Needs::HESSIAN,
            upstream: Upstream::Compressed,
            touches: Touches::Sites,
            looks_ahead: false,
        }
    }

    fn takes(&self, _: QuantScheme) -> Result<(), &'static str> {
        Ok(())
    }

    fn keeps_zeros(&self, scheme: QuantScheme) -> Result<(), &'static str> {
        match scheme.block() {
            Some(_) => Err(
                "in blocks its feedback would fill weights that were pruned; use pass rtn for a type with an exact \
                 zero, or an affine `scheme`",
            ),
            None => Ok(()),
        }
    }

    fn cost(&self, block: &Block, targets: &[Target], limits: &Limits) -> Cost {
        let mut cost = Cost::default();
        let mut seen = Vec::new();
        for target in targets {
            let site = &block.sites[target.site];
            let (o, n) = (site.out_features as f64, site.in_features as f64);
            // Sweep (1), residual (2), one product per round (2).
            let inner = 4.0 * 128.0 * (self.0.refine * self.0.inner) as f64;
            cost.flops += o * n * n * (3.0 + 2.0 * self.0.refine as f64) + o * n * (700.0 + inner);
            let input = block.input_of(target.site);
            if !seen.contains(&input) {
                seen.push(input);
                cost.flops += n * n * n * 2.0 / 3.0;
            }
            let n = site.in_features;
            let (factorizing, factor) = InverseFactor::bytes(n, limits.factor_on_scratch);
            // Weights in the factor's order, errors, codes as floats; then the residual in the place of
            // the weights. A panel of U where it lies on scratch.
            let blocks = target.scheme.is_some_and(|scheme| scheme.block().is_some());
            let width = self.0.panel(blocks).min(n);
            // Integers and factors of blocks come beside them.
            let lines = 3 * n + 2 * width + if blocks { n / 2 } else { n / 8 };
            let panel = if limits.factor_on_scratch { width * n } else { 0 };
            let tile = 4 * (TILE.min(site.out_features).next_multiple_of(16) * lines + panel);
            let tiles = limits.threads.min(site.out_features.div_ceil(TILE)) * tile;
            // Codes, scales and zero points.
            let solving = factor + tiles + site.weights() + site.weights() / 5;
            cost.peak_bytes = cost.peak_bytes.max(factorizing.max(solving));
            if limits.factor_on_scratch {
                cost.scratch_bytes = cost.scratch_bytes.max(6 * n * n);
            }
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
        let mut sites = Vec::new();
        let mut shared: Option<((usize, bool), Factor)> = None;
        for target in targets {
            let site = &context.block.sites[target.site];
            let scheme = target.scheme.expect("the plan gives quantizing steps a scheme");
            let input = context.block.input_of(target.site);
            let key = (input, scheme.block().is_some());
            let hessian = stats
                .inputs
                .get_mut(input)
                .and_then(|input| input.as_mut()?.hessian.as_mut())
                .expect("the plan provides what the contract needs");
            let mask = if state.masked[target.site] { Mask::Fixed } else { Mask::None };
            let linear = &mut state.linears[target.site];
            if let Some(factors) = linear.weight.as_factored() {
                let (name, scratch) = (site.name.as_str(), context.scratch);
                let (made, report) = factored(factors, hessian, scheme, &self.0, (name, scratch))?;
                sites.push(report);
                linear.weight = Weight::Factored(Box::new(made));
                continue;
            }
            let weight = linear.weight.as_dense().expect("the plan proved a float weight");
            check_finite(&site.name, "the weight", weight)?;
            let factor = match shared.take() {
                Some((of, factor)) if of == key => factor,
                old => {
                    // Two factors are never held at once.
                    drop(old);
                    check_finite(&site.name, "the Hessian", hessian)?;
                    factorize(hessian, &self.0, key.1, &site.name, context.scratch)?
                }
            };
            factor.fill(hessian, true);
            let result = match scheme.block() {
                Some(block) => quantize_blocks(weight, hessian, &factor, block, &self.0)
                    .map(|(weight, errors)| (Weight::Blocks(weight), errors)),
                None => quantize(weight, hessian, &factor, scheme, mask, &self.0)
                    .map(|(weight, errors)| (Weight::Quantized(weight), errors)),
            };
            factor.fill(hessian, false);
            let (quantized, errors) =
                result.map_err(|source| PassError::Scratch { site: site.name.clone(), source })?;
            sites.push(SiteReport {
                site: site.name.clone(),
                pass: "gptq".into(),
                weight_error: relative(errors.weight, squares(weight)),
                output_error: Some(relative(errors.output, metric(weight, hessian))),
                events: Event::of_factor(&factor),
            });
            linear.weight = quantized;
            shared = Some((key, factor));
        }
        Ok(PassReport { sites })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rtn::round_to_nearest;
    use attar_tensor::{
        Granularity, ScaleGrid, block_search, grid::Clip, linalg::GramAccumulator, rng::Rng,
    };

    fn correlated(n: usize, tokens: usize, seed: u64) -> Mat {
        let mut rng = Rng::new(seed);
        let mix = Mat::from_shape_fn((n, n), |(i, j)| {
            rng.normal() * (1.0 / (1.0 + (i as f32 - j as f32).abs())) * (1.0 + (j % 7) as f32)
        });
        let x = Mat::from_shape_vec((tokens, n), rng.normals(tokens * n)).unwrap().dot(&mix);
        let mut gram = GramAccumulator::new(n);
        gram.add(x.as_standard_layout().as_slice().unwrap()).unwrap();
        gram.finish(2.0 / tokens as f64).unwrap()
    }

    fn scheme(bits: u8, group: usize, symmetric: bool) -> QuantScheme {
        QuantScheme {
            bits,
            granularity: Granularity::Group(group),
            symmetric,
            scale_grid: ScaleGrid::F16,
            zero_min: 1,
            activations: attar_tensor::ActivationScheme::Float,
        }
    }

    fn loss(weight: &Mat, q: &QuantizedLinear, h: &Mat) -> f64 {
        metric(&(&q.dequantize() - weight), h)
    }

    #[test]
    fn gptq_beats_rtn_and_refinement_never_hurts() {
        let (out, n) = (150, 128);
        let h = correlated(n, 400, 4);
        let w = Mat::from_shape_vec((out, n), Rng::new(8).normals(out * n)).unwrap();
        for bits in [2, 3, 4] {
            for symmetric in [true, false] {
                let s = scheme(bits, 64, symmetric);
                let rtn = loss(&w, &round_to_nearest(&w, s, Clip::MinMax).0, &h);
                let mut last = f64::INFINITY;
                for refine in [0, 1, 3] {
                    let options = Options { refine, ..Options::default() };
                    let factor = factorize(&h, &options, false, "test", None).unwrap();
                    let (q, errors) = quantize(&w, &h, &factor, s, Mask::None, &options).unwrap();
                    let found = loss(&w, &q, &h);
                    assert!((errors.output / found - 1.0).abs() < 1e-3);
                    assert!(found < rtn && found <= last * 1.0001, "{bits} {found} {rtn} {last}");
                    assert!(q.codes.iter().all(|&c| c <= s.max_code()));
                    last = found;
                }
            }
        }
    }

    #[test]
    fn every_width_of_group_is_refined() {
        for (n, granularity) in [
            (640, Granularity::Channel),
            (1280, Granularity::Group(640)),
            (96, Granularity::Group(24)),
            (384, Granularity::Group(192)),
        ] {
            let h = correlated(n, 2 * n, 7);
            let w = Mat::from_shape_vec((21, n), Rng::new(5).normals(21 * n)).unwrap();
            let s = QuantScheme { granularity, ..scheme(3, 64, true) };
            let mut last = f64::INFINITY;
            for refine in [0, 1, 2] {
                let options = Options { refine, ..Options::default() };
                let factor = factorize(&h, &options, false, "test", None).unwrap();
                let (q, errors) = quantize(&w, &h, &factor, s, Mask::None, &options).unwrap();
                let found = loss(&w, &q, &h);
                assert!((errors.output / found - 1.0).abs() < 1e-3, "{n} {errors:?} {found}");
                assert!(found < last, "{n} {refine}: {found} {last}");
                last = found;
            }
        }
    }

    #[test]
    fn blocks_beat_the_weighed_search_and_refinement_never_hurts() {
        for block in BlockType::ALL {
            let n = if block.size() == 32 { 96 } else { 512 };
            let h = correlated(n, 3 * n, 6);
            let w = Mat::from_shape_vec((37, n), Rng::new(8).normals(37 * n)).unwrap();
            let diagonal: Vec<f32> = h.diag().to_vec();
            let values = w.as_slice().unwrap();
            let searched = block_search::search(block, values, 37, n, Some(&diagonal));
            let mut last = metric(&(&searched.dequantize() - &w), &h);
            for refine in [0, 1, 3] {
                let options = Options { refine, ..Options::default() };
                let factor = factorize(&h, &options, true, "test", None).unwrap();
                let (q, errors) = quantize_blocks(&w, &h, &factor, block, &options).unwrap();
                q.check().unwrap();
                let found = metric(&(&q.dequantize() - &w), &h);
                assert!((errors.output / found - 1.0).abs() < 1e-3, "{block} {errors:?} {found}");
                assert!(found < last, "{block} {refine}: {found} {last}");
                last = found;
            }
        }
    }

    #[test]
    fn blocks_depend_neither_on_threads_nor_on_scratch() {
        let (out, n) = (300, 512);
        let h = correlated(n, 600, 2);
        let w = Mat::from_shape_vec((out, n), Rng::new(3).normals(out * n)).unwrap();
        let options = Options::default();
        let scratch = Scratch::new(tempfile::tempfile);
        let run = |threads, scratch: Option<&Scratch>| {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
                let factor = factorize(&h, &options, true, "test", scratch).unwrap();
                quantize_blocks(&w, &h, &factor, BlockType::Q3K, &options).unwrap().0
            })
        };
        assert_eq!(run(1, None), run(2, None));
        assert_eq!(run(1, None), run(2, Some(&scratch)));
    }

    #[test]
    fn dead_columns_and_singular_hessians_are_events() {
        let n = 64;
        let mut h = Mat::zeros((n, n));
        // Rank one: only dampening makes it definite.
        for i in 0..n / 2 {
            for j in 0..n / 2 {
                h[[i, j]] = 1.0;
            }
        }
        let options = Options { percdamp: 0.0, ..Options::default() };
        let factor = factorize(&h, &options, false, "test", None).unwrap();
        assert!(Event::of_factor(&factor).contains(&Event::DeadColumns { count: n / 2 }));
        assert!(matches!(
            Event::of_factor(&factor).last(),
            Some(Event::DampeningRaised { failures, .. }) if *failures > 0
        ));
        let zero = Mat::zeros((n, n));
        assert!(factorize(&zero, &options, false, "test", None).is_err());
    }

    #[test]
    fn bits_depend_neither_on_threads_nor_on_scratch() {
        let (out, n) = (300, 128);
        let h = correlated(n, 300, 2);
        let w = Mat::from_shape_vec((out, n), Rng::new(3).normals(out * n)).unwrap();
        let options = Options::default();
        let scratch = Scratch::new(tempfile::tempfile);
        let run = |threads, scratch: Option<&Scratch>| {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
                let factor = factorize(&h, &options, false, "test", scratch).unwrap();
                quantize(&w, &h, &factor, scheme(3, 32, true), Mask::None, &options).unwrap().0
            })
        };
        assert_eq!(run(1, None), run(2, None));
        assert_eq!(run(1, None), run(2, Some(&scratch)));
    }

    #[test]
    fn unknown_options_name_the_nearest() {
        let table: toml::Table = "percdmp = 0.1".parse().unwrap();
        let error = (DEF.build)(&table).unwrap_err().to_string();
        assert!(error.contains("percdmp") && error.contains("percdamp"), "{error}");
    }
}
