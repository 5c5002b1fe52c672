//! GPTQ: column-by-column rounding with error feedback (Frantar et al. 2022, arXiv:2210.17323, Alg. 1).
//!
//! Minimises `‖WX − ŴX‖² ∝ tr(ΔW H ΔWᵀ)` per output row given `H = 2/n XᵀX`. With `H⁻¹ = UᵀU`, column i is
//! rounded and its error `e = (w_i − ŵ_i) / U_ii` is subtracted from the columns behind it, `w_j −= e U_ij`.
//! `weight [out, in]`, `hessian [in, in]`, f32 with the factor in f64. Cost O(in³ + out·in²).
//!
//! Deliberate differences from the authors' code: scales are searched in the metric of H's diagonal and
//! fixed before the sweep (static groups, so act-order needs no permuted groups); after the sweep the
//! scales are refitted and the codes descended coordinate-wise in the full metric (as QuantEase, Behdin
//! et al. 2023, arXiv:2309.01885), each move accepted only when it lowers the objective; dead columns are
//! rounded to nearest instead of zeroed; failed factorizations raise the dampening and are reported.

use attar_ir::{
    Block, BlockState, BlockStats, Contract, Cost, Event, FormChange, FormSet, Needs, Pass,
    PassContext, PassDef, PassError, PassReport, Target, Touches, Upstream, Weight,
};
use attar_tensor::{
    Mat, QuantScheme, QuantizedLinear,
    grid::{Clip, GroupGrid, choose_grid},
    linalg::{gemm_nn, inverse_cholesky_upper},
};
use pulp::Arch;
use rayon::prelude::*;
use serde::Deserialize;

use crate::common::{ROW_TILE, assemble, check_finite, options, report};

/// Registration of `gptq`.
pub(crate) const DEF: PassDef = PassDef {
    name: "gptq",
    summary: "round column by column and carry the error to the columns not yet rounded",
    paper: "Frantar et al. 2022, arXiv:2210.17323",
    takes_scheme: true,
    symmetric_by_default: true,
    build: |table| {
        Ok(Box::new(Gptq(options(table, &["percdamp", "actorder", "block_size", "refine"])?)))
    },
    schema: || schemars::schema_for!(Options),
};

#[derive(Debug, Clone, Copy, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct Options {
    /// Dampening as a fraction of the Hessian's mean diagonal.
    percdamp: f64,
    /// Solve columns in order of falling Hessian diagonal (groups stay where they are).
    actorder: bool,
    /// Columns swept before the rest is updated.
    block_size: usize,
    /// Rounds of scale refit and coordinate descent after the sweep.
    refine: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { percdamp: 0.01, actorder: true, block_size: 128, refine: 2 }
    }
}

#[derive(Debug)]
struct Gptq(Options);

/// What all sites with the same input share.
struct Factor {
    /// Order in which columns are solved.
    order: Vec<usize>,
    /// `U [in, in]` of the permuted, damped Hessian, f32.
    upper: Vec<f32>,
    /// Damped Hessian in the original order, f32.
    hessian: Mat,
    events: Vec<Event>,
}

fn factorize(hessian: &Mat, options: &Options, site: &str) -> Result<Factor, PassError> {
    let n = hessian.nrows();
    let mut events = Vec::new();
    let mut diagonal: Vec<f64> = hessian.diag().iter().map(|&v| f64::from(v)).collect();
    let live = diagonal.iter().filter(|&&d| d > 0.0).count();
    let mean = diagonal.iter().sum::<f64>() / n as f64;
    if live == 0 {
        return Err(PassError::Numeric {
            site: site.to_owned(),
            reason: "all inputs are zero on the calibration set; use other calibration text".into(),
        });
    }
    if live < n {
        events.push(Event::DeadColumns { count: n - live });
    }
    for d in &mut diagonal {
        if *d <= 0.0 {
            *d = mean;
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    if options.actorder {
        order.sort_by(|&a, &b| diagonal[b].total_cmp(&diagonal[a]).then(a.cmp(&b)));
    }
    let (mut percdamp, mut failures) = (options.percdamp, 0);
    let upper = loop {
        let mut a = vec![0.0f64; n * n];
        for (i, &ri) in order.iter().enumerate() {
            for (j, &rj) in order.iter().enumerate() {
                a[i * n + j] = f64::from(hessian[[ri, rj]]);
            }
            a[i * n + i] = diagonal[ri] + percdamp * mean;
        }
        match inverse_cholesky_upper(a, n) {
            Ok(upper) => break upper,
            Err(error) if failures < 8 => {
                failures += 1;
                percdamp = (percdamp * 10.0).max(1e-4);
                let _ = error;
            }
            Err(error) => {
                return Err(PassError::Numeric {
                    site: site.to_owned(),
                    reason: format!("{error} even with dampening {percdamp}"),
                });
            }
        }
    };
    if failures > 0 {
        events.push(Event::DampeningRaised { percdamp, failures });
    }
    let mut damped = hessian.clone();
    for (i, &d) in diagonal.iter().enumerate() {
        damped[[i, i]] = d as f32;
    }
    Ok(Factor { order, upper: upper.iter().map(|&v| v as f32).collect(), hessian: damped, events })
}

#[inline(always)]
fn subtract_scaled(y: &mut [f32], a: f32, x: &[f32]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y -= a * x;
    }
}

/// Quantizes one tile of rows.
struct Tile<'a> {
    weight: &'a [f32],
    codes: &'a mut [u8],
    grids: &'a mut [GroupGrid],
}

impl Tile<'_> {
    fn solve(&mut self, factor: &Factor, scheme: QuantScheme, options: &Options) {
        let n = factor.order.len();
        let (size, rows) = (scheme.group_size(n), self.weight.len() / n);
        let groups = n / size;
        let importance: Vec<f32> = factor.hessian.diag().to_vec();
        for (row, grids) in self.weight.chunks(n).zip(self.grids.chunks_mut(groups)) {
            for (g, grid) in grids.iter_mut().enumerate() {
                let span = g * size..(g + 1) * size;
                *grid = choose_grid(
                    &row[span.clone()],
                    Some(&importance[span]),
                    scheme,
                    Clip::Search(70),
                );
            }
        }
        let mut work = vec![0.0f32; rows * n];
        for (row, work) in self.weight.chunks(n).zip(work.chunks_mut(n)) {
            for (to, &from) in work.iter_mut().zip(&factor.order) {
                *to = row[from];
            }
        }
        self.sweep(&mut work, factor, scheme, options.block_size);
        for _ in 0..options.refine {
            let mut residual = self.residual(factor, scheme);
            self.refit_scales(&mut residual, factor, scheme);
            self.descend(&mut residual, factor, scheme);
        }
    }

    fn sweep(&mut self, work: &mut [f32], factor: &Factor, scheme: QuantScheme, block: usize) {
        let n = factor.order.len();
        let (size, rows) = (scheme.group_size(n), work.len() / n);
        let (groups, top) = (n / size, f32::from(scheme.max_code()));
        let upper = &factor.upper;
        for start in (0..n).step_by(block) {
            let end = (start + block).min(n);
            let width = end - start;
            let mut errors = vec![0.0f32; rows * width];
            let rows_of = work.chunks_mut(n).zip(errors.chunks_mut(width)).enumerate();
            for (r, (work, errors)) in rows_of {
                let (codes, grids) = (&mut self.codes[r * n..], &self.grids[r * groups..]);
                Arch::new().dispatch(
                    #[inline(always)]
                    || {
                        for i in start..end {
                            let column = factor.order[i];
                            let grid = grids[column / size];
                            let w = work[i];
                            let code = grid.code(w, top);
                            codes[column] = code as u8;
                            let e = (w - grid.value(code)) / upper[i * n + i];
                            errors[i - start] = e;
                            subtract_scaled(
                                &mut work[i + 1..end],
                                e,
                                &upper[i * n + i + 1..i * n + end],
                            );
                        }
                    },
                );
            }
            if end < n {
                gemm_nn(
                    (rows, n - end, width),
                    -1.0,
                    (&errors, width),
                    (&upper[start * n + end..], n),
                    true,
                    (&mut work[end..], n),
                );
            }
        }
    }

    /// `(W − Ŵ) H`, `[rows, in]`.
    fn residual(&self, factor: &Factor, scheme: QuantScheme) -> Vec<f32> {
        let n = factor.order.len();
        let (size, rows) = (scheme.group_size(n), self.weight.len() / n);
        let mut delta = vec![0.0f32; rows * n];
        let groups = delta.chunks_mut(size).zip(self.weight.chunks(size));
        for ((delta, weight), (codes, grid)) in
            groups.zip(self.codes.chunks(size).zip(self.grids.iter()))
        {
            for ((d, &w), &code) in delta.iter_mut().zip(weight).zip(codes) {
                *d = w - grid.value(f32::from(code));
            }
        }
        let mut out = vec![0.0f32; rows * n];
        let h = factor.hessian.as_slice().expect("standard layout");
        gemm_nn((rows, n, n), 1.0, (&delta, n), (h, n), false, (&mut out, n));
        out
    }

    /// Moves each group's scale to the minimum of the objective along it, projected onto the grid.
    fn refit_scales(&mut self, residual: &mut [f32], factor: &Factor, scheme: QuantScheme) {
        let n = factor.order.len();
        let (size, rows) = (scheme.group_size(n), self.weight.len() / n);
        let groups = n / size;
        let h = factor.hessian.as_slice().expect("standard layout");
        let mut levels = vec![0.0f32; rows * size];
        let mut product = vec![0.0f32; rows * n];
        for g in 0..groups {
            let first = g * size;
            for (r, levels) in levels.chunks_mut(size).enumerate() {
                let zero = f32::from(self.grids[r * groups + g].zero);
                for (level, &code) in levels.iter_mut().zip(&self.codes[r * n + first..]) {
                    *level = f32::from(code) - zero;
                }
            }
            let rows_of_h = &h[first * n..(first + size) * n];
            gemm_nn(
                (rows, n, size),
                1.0,
                (&levels, size),
                (rows_of_h, n),
                false,
                (&mut product, n),
            );
            for r in 0..rows {
                let levels = &levels[r * size..(r + 1) * size];
                let at = r * n + first;
                let dot = |x: &[f32]| -> f64 {
                    levels.iter().zip(x).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
                };
                let (slope, curve) = (dot(&residual[at..at + size]), dot(&product[at..at + size]));
                if curve <= 0.0 {
                    continue;
                }
                let grid = &mut self.grids[r * groups + g];
                let wanted = f64::from(grid.scale) + slope / curve;
                if wanted <= 0.0 {
                    continue;
                }
                let scale = scheme.scale_grid.project(wanted as f32);
                let step = f64::from(scale) - f64::from(grid.scale);
                // f(s + step) − f(s) = step² curve − 2 step slope
                if step * step * curve - 2.0 * step * slope < 0.0 {
                    grid.scale = scale;
                    let row = r * n..(r + 1) * n;
                    subtract_scaled(&mut residual[row.clone()], step as f32, &product[row]);
                }
            }
        }
    }

    /// One sweep over the columns: each code moves to the minimum of the objective along it.
    fn descend(&mut self, residual: &mut [f32], factor: &Factor, scheme: QuantScheme) {
        let n = factor.order.len();
        let size = scheme.group_size(n);
        let (groups, top) = (n / size, f32::from(scheme.max_code()));
        let h = factor.hessian.as_slice().expect("standard layout");
        let rows = residual.chunks_mut(n).zip(self.codes.chunks_mut(n));
        for ((residual, codes), grids) in rows.zip(self.grids.chunks(groups)) {
            Arch::new().dispatch(
                #[inline(always)]
                || {
                    for &j in &factor.order {
                        let grid = grids[j / size];
                        let code = f32::from(codes[j]);
                        let ideal = code + residual[j] / (h[j * n + j] * grid.scale);
                        let moved = ideal.round_ties_even().clamp(0.0, top);
                        let change = (moved - code) * grid.scale;
                        if change != 0.0 {
                            codes[j] = moved as u8;
                            subtract_scaled(residual, change, &h[j * n..(j + 1) * n]);
                        }
                    }
                },
            );
        }
    }
}

fn quantize(
    weight: &Mat,
    factor: &Factor,
    scheme: QuantScheme,
    options: &Options,
) -> QuantizedLinear {
    let (out, n) = weight.dim();
    let groups = n / scheme.group_size(n);
    let mut codes = vec![0u8; out * n];
    let mut grids = vec![GroupGrid { scale: 1.0, zero: 0 }; out * groups];
    weight
        .as_slice()
        .expect("standard layout")
        .par_chunks(ROW_TILE * n)
        .zip(codes.par_chunks_mut(ROW_TILE * n))
        .zip(grids.par_chunks_mut(ROW_TILE * groups))
        .for_each(|((weight, codes), grids)| {
            Tile { weight, codes, grids }.solve(factor, scheme, options);
        });
    assemble(scheme, (out, n), codes, &grids)
}

impl Pass for Gptq {
    fn name(&self) -> &'static str {
        "gptq"
    }

    fn contract(&self) -> Contract {
        Contract {
            accepts: FormSet::DENSE_FLOAT,
            produces: FormChange::QUANTIZE,
            needs: Needs::HESSIAN,
            upstream: Upstream::Compressed,
            touches: Touches::Sites,
            looks_ahead: false,
        }
    }

    fn cost(&self, block: &Block, targets: &[Target]) -> Cost {
        let mut cost = Cost::default();
        let mut seen = Vec::new();
        for target in targets {
            let site = &block.sites[target.site];
            let (o, n) = (site.out_features as f64, site.in_features as f64);
            // Sweep, and per round of refinement one residual and one refit of the same size.
            cost.flops += o * n * n * (1.0 + 4.0 * self.0.refine as f64) + o * n * 700.0;
            let input = block.input_of(target.site);
            if !seen.contains(&input) {
                seen.push(input);
                cost.flops += n * n * n * 2.0 / 3.0;
            }
            let factor = site.in_features * site.in_features;
            cost.peak_bytes = cost.peak_bytes.max(factor * 24 + site.weights() * 5);
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
        let mut shared: Option<(usize, Factor)> = None;
        for target in targets {
            let site = &context.block.sites[target.site];
            let scheme = target.scheme.expect("the plan gives quantizing steps a scheme");
            let input = context.block.input_of(target.site);
            let hessian = stats
                .input(input)
                .and_then(|input| input.hessian.as_ref())
                .expect("the plan provides what the contract needs");
            let linear = &mut state.linears[target.site];
            let weight = linear.weight.as_dense().expect("the plan proved a float weight");
            check_finite(&site.name, "the weight", weight)?;
            let factor = match shared.take() {
                Some((of, factor)) if of == input => factor,
                _ => {
                    check_finite(&site.name, "the Hessian", hessian)?;
                    factorize(hessian, &self.0, &site.name)?
                }
            };
            let quantized = quantize(weight, &factor, scheme, &self.0);
            let mut entry =
                report("gptq", &site.name, weight, &quantized.dequantize(), Some(hessian));
            entry.events.clone_from(&factor.events);
            sites.push(entry);
            linear.weight = Weight::Quantized(quantized);
            shared = Some((input, factor));
        }
        Ok(PassReport { sites })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{common::metric, rtn::round_to_nearest};
    use attar_tensor::{Granularity, ScaleGrid, linalg::GramAccumulator, rng::Rng};

    fn correlated(n: usize, tokens: usize, seed: u64) -> Mat {
        let mut rng = Rng::new(seed);
        let mix = Mat::from_shape_fn((n, n), |(i, j)| {
            rng.normal() * (1.0 / (1.0 + (i as f32 - j as f32).abs())) * (1.0 + (j % 7) as f32)
        });
        let x = Mat::from_shape_vec((tokens, n), rng.normals(tokens * n)).unwrap().dot(&mix);
        let mut gram = GramAccumulator::new(n);
        gram.add(x.as_standard_layout().as_slice().unwrap());
        gram.finish(2.0 / tokens as f64)
    }

    fn scheme(bits: u8, group: usize, symmetric: bool) -> QuantScheme {
        QuantScheme {
            bits,
            granularity: Granularity::Group(group),
            symmetric,
            scale_grid: ScaleGrid::F16,
            zero_min: 1,
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
                let rtn = loss(&w, &round_to_nearest(&w, s, Clip::MinMax), &h);
                let mut last = f64::INFINITY;
                for refine in [0, 1, 3] {
                    let options = Options { refine, ..Options::default() };
                    let factor = factorize(&h, &options, "test").unwrap();
                    let q = quantize(&w, &factor, s, &options);
                    let found = loss(&w, &q, &h);
                    assert!(found < rtn && found <= last * 1.0001, "{bits} {found} {rtn} {last}");
                    assert!(q.codes.iter().all(|&c| c <= s.max_code()));
                    last = found;
                }
            }
        }
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
        let factor = factorize(&h, &options, "test").unwrap();
        assert!(factor.events.contains(&Event::DeadColumns { count: n / 2 }));
        assert!(matches!(
            factor.events.last(),
            Some(Event::DampeningRaised { failures, .. }) if *failures > 0
        ));
        let zero = Mat::zeros((n, n));
        assert!(factorize(&zero, &options, "test").is_err());
    }

    #[test]
    fn bits_do_not_depend_on_threads() {
        let (out, n) = (300, 128);
        let h = correlated(n, 300, 2);
        let w = Mat::from_shape_vec((out, n), Rng::new(3).normals(out * n)).unwrap();
        let options = Options::default();
        let run = |threads| {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
                let factor = factorize(&h, &options, "test").unwrap();
                quantize(&w, &factor, scheme(3, 32, true), &options)
            })
        };
        assert_eq!(run(1), run(2));
    }

    #[test]
    fn unknown_options_name_the_nearest() {
        let table: toml::Table = "percdmp = 0.1".parse().unwrap();
        let error = (DEF.build)(&table).unwrap_err().to_string();
        assert!(error.contains("percdmp") && error.contains("percdamp"), "{error}");
    }
}
