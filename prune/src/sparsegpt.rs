//! SparseGPT: pruning with error feedback (Frantar & Alistarh 2023, arXiv:2301.00774, Alg. 1), alone or jointly with
//! rounding.
//!
//! Minimises `‖WX − ŴX‖² ∝ tr(ΔW H ΔWᵀ)` given `H = 2/n XᵀX`: in each block of columns the weights with the least
//! `w² / [H⁻¹]_jj` become zero (with n:m, of each m columns when the sweep reaches them), and what they lose is
//! carried to the columns behind. `weight [out, in]`, `hessian [in, in]`, f32 with the factor in f64; cost
//! O(in³ + out·in²). The sweep is `attar_tensor::column_solver::masking`.
//!
//! With a `scheme` the kept weights become codes in the same step: the grid is searched on what pruning left, a second
//! sweep rounds kept weights and keeps pruned ones at the code of zero, both errors are fed forward, and refinement
//! lowers the error against the original weight, by moving scales, codes and, pair by pair, the mask.
//!
//! Deliberate differences from the authors' code: the threshold of a block is that of 256 rows instead of all; after
//! the sweep kept weights are descended to their least error for the mask and pruned weights are exchanged for kept
//! ones, each move only where it lowers the objective; dead columns get the mean diagonal instead of being zeroed;
//! failed factorizations raise the dampening and are reported.

use std::{io, sync::Mutex};

use attar_ir::{
    Block, BlockState, BlockStats, Contract, Cost, Event, FormChange, FormSet, Limits, Needs,
    Numeric, Pass, PassContext, PassDef, PassError, PassReport, SiteReport, Sparsity, Target,
    Touches, Upstream, Weight, check_finite,
    recipe::{self, RecipeError},
    relative,
};
use attar_tensor::{
    Mat, Pattern, QuantScheme, QuantizedLinear,
    column_solver::{
        self, Errors, Factor, FactorOptions, Group, TILE, masking,
        rounding::{self, Mask},
    },
    grid::GroupGrid,
    linalg::{InverseFactor, metric, squares},
};
use rayon::prelude::*;
use serde::Deserialize;

use crate::{
    magnitude::finish,
    options::pattern,
    owl::{NEEDS, Owl, Ratios, chosen},
};

/// Registration of `sparsegpt`.
pub(crate) const DEF: PassDef = PassDef {
    name: "sparsegpt",
    summary: "set weights to zero and carry the error to the others; with a scheme, round in the same step",
    paper: "Frantar & Alistarh 2023, arXiv:2301.00774",
    example: "\
[[step]]
pass = \"sparsegpt\"
pattern = \"2:4\"
scheme = { bits = 4, group_size = 64 }
",
    takes_scheme: true,
    symmetric_by_default: true,
    build: |table| {
        let options: Options = recipe::options(table)?;
        let pattern = pattern(options.sparsity, options.pattern.as_deref())?;
        if options.block_size == 0 {
            return Err(RecipeError::invalid("block_size", "expected at least 1 column"));
        }
        let owl = Owl::new(options.ratios, options.lambda, options.outlier, pattern)?;
        Ok(Box::new(SparseGpt { pattern, owl, options }))
    },
    schema: || schemars::schema_for!(Options),
};

#[derive(Debug, Clone, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct Options {
    /// Fraction of the weights that become zero; 0.5 when there is no pattern either.
    sparsity: Option<f64>,
    /// `n:m`: n of every m consecutive weights of a row stay, e.g. `2:4`.
    pattern: Option<String>,
    /// `owl` gives blocks whose scores have few outliers more zeros (arXiv:2310.05175); not with a pattern.
    ratios: Ratios,
    /// OWL: half of the largest difference between the sparsities of two blocks.
    lambda: f64,
    /// OWL: what is an outlier, in units of the mean score.
    outlier: f64,
    /// Dampening as a fraction of the Hessian's mean diagonal.
    percdamp: f64,
    /// Columns whose mask is chosen at once, and that are swept before the rest is updated.
    block_size: usize,
    /// Rounds of refinement after the sweep; 2, or 4 with a scheme, which stands for two passes.
    refine: Option<usize>,
    /// Repetitions inside each block of a round.
    inner: usize,
    /// Whether refinement may exchange pruned weights for kept ones.
    exchange: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            sparsity: None,
            pattern: None,
            ratios: Ratios::Uniform,
            lambda: 0.08,
            outlier: 5.0,
            percdamp: 0.01,
            block_size: 128,
            refine: None,
            inner: 2,
            exchange: true,
        }
    }
}

#[derive(Debug)]
struct SparseGpt {
    pattern: Pattern,
    owl: Option<Owl>,
    options: Options,
}

/// Memory that one tile after the other works in.
#[derive(Debug, Default)]
struct Space {
    masking: masking::Space,
    rounding: rounding::Space,
    /// What masking left, where rounding follows.
    pruned: Vec<f32>,
}

/// What came out for one linear.
#[derive(Debug)]
struct Solved {
    weight: Weight,
    errors: Errors,
}

impl SparseGpt {
    /// Rounds of refinement, with a scheme or without.
    fn rounds(&self, schemed: bool) -> usize {
        self.options.refine.unwrap_or(if schemed { 4 } else { 2 })
    }

    fn masking(&self, pattern: Pattern, schemed: bool) -> masking::MaskingOptions {
        let Options { inner, exchange, .. } = self.options;
        let refine = self.rounds(schemed);
        masking::MaskingOptions { pattern, refine, inner, exchange }
    }

    fn rounding(&self, scheme: QuantScheme) -> rounding::RoundingOptions {
        let Options { inner, exchange, .. } = self.options;
        let refine = self.rounds(true);
        let mask = match self.pattern {
            _ if !exchange => Mask::Fixed,
            Pattern::Fraction(_) => Mask::Free(Group::Block),
            Pattern::NM { m, .. } => Mask::Free(Group::Columns(usize::from(m))),
        };
        rounding::RoundingOptions { scheme, refine, inner, mask }
    }

    fn factorize(
        &self,
        hessian: &Mat,
        context: &PassContext<'_>,
        site: &str,
    ) -> Result<Factor, PassError> {
        let options = FactorOptions {
            percdamp: self.options.percdamp,
            by_diagonal: false,
            panel: masking::panel(self.pattern, self.options.block_size),
        };
        column_solver::factorize(hessian, options, context.scratch)
            .map_err(|error| PassError::of_solver(site, error))
    }

    /// `hessian` has dead columns filled.
    fn prune(
        &self,
        weight: &Mat,
        hessian: &Mat,
        factor: &Factor,
        pattern: Pattern,
    ) -> io::Result<Solved> {
        let n = weight.ncols();
        let mut pruned = Mat::zeros(weight.dim());
        let errors = tiles(
            weight,
            pruned.as_slice_mut().expect("standard layout"),
            |_, w, out, space| {
                let tile = masking::Tile { weight: w, out };
                let hessian = hessian.as_slice().expect("standard layout");
                tile.solve(hessian, factor, &self.masking(pattern, false), &mut space.masking)
            },
            n,
        )?;
        Ok(Solved { weight: Weight::Dense(pruned), errors })
    }

    /// The same, and codes for what stays.
    fn prune_and_round(
        &self,
        weight: &Mat,
        hessian: &Mat,
        factor: &Factor,
        pattern: Pattern,
        scheme: QuantScheme,
    ) -> io::Result<Solved> {
        let (out, n) = weight.dim();
        let groups = n / scheme.group_size(n);
        let hessian = hessian.as_slice().expect("standard layout");
        let grids = Mutex::new(vec![GroupGrid { scale: 1.0, zero: 0 }; out * groups]);
        let mut codes = vec![0u8; out * n];
        let (masking, rounding) = (self.masking(pattern, true), self.rounding(scheme));
        let errors = tiles(
            weight,
            &mut codes,
            |at, w, codes, space| {
                space.pruned.resize(w.len(), 0.0);
                let tile = masking::Tile { weight: w, out: &mut space.pruned[..w.len()] };
                tile.solve(hessian, factor, &masking, &mut space.masking)?;
                let first = at * TILE * groups;
                let mut own = vec![GroupGrid { scale: 1.0, zero: 0 }; w.len() / n * groups];
                let pruned = &space.pruned[..w.len()];
                let tile =
                    rounding::Tile { weight: pruned, target: Some(w), codes, grids: &mut own };
                let errors = tile.solve(hessian, factor, &rounding, &mut space.rounding)?;
                let mut all = grids.lock().expect("nobody panics with it");
                all[first..first + own.len()].copy_from_slice(&own);
                Ok(errors)
            },
            n,
        )?;
        let grids = grids.into_inner().expect("nobody panics with it");
        let weight = Weight::Quantized(QuantizedLinear {
            scheme,
            out_features: out,
            in_features: n,
            codes,
            scales: grids.iter().map(|grid| grid.scale).collect(),
            zeros: grids.iter().map(|grid| grid.zero).collect(),
            g_idx: None,
        });
        Ok(Solved { weight, errors })
    }
}

/// Works on tiles of [`TILE`] rows, `solve(tile, weight, out, space)`, on any number of threads with the same bits.
fn tiles<T: Send>(
    weight: &Mat,
    out: &mut [T],
    solve: impl Fn(usize, &[f32], &mut [T], &mut Space) -> io::Result<Errors> + Sync,
    n: usize,
) -> io::Result<Errors> {
    let spaces = Mutex::new(Vec::<Space>::new());
    let errors: Vec<Errors> = weight
        .as_slice()
        .expect("standard layout")
        .par_chunks(TILE * n)
        .zip(out.par_chunks_mut(TILE * n))
        .enumerate()
        .map(|(at, (weight, out))| {
            let mut space = spaces.lock().expect("nobody panics with it").pop().unwrap_or_default();
            let errors = solve(at, weight, out, &mut space)?;
            spaces.lock().expect("nobody panics with it").push(space);
            Ok(errors)
        })
        .collect::<io::Result<_>>()?;
    Ok(errors.into_iter().sum())
}

impl Pass for SparseGpt {
    fn name(&self) -> &'static str {
        "sparsegpt"
    }

    fn contract(&self) -> Contract {
        let sparsity = Some(Sparsity::from(self.pattern));
        Contract {
            accepts: FormSet::DENSE_FLOAT,
            produces: FormChange { sparsity, ..FormChange::NONE },
            needs: Needs::HESSIAN,
            upstream: Upstream::Compressed,
            touches: Touches::Sites,
            looks_ahead: false,
        }
    }

    fn contract_with_scheme(&self) -> Contract {
        let own = self.contract();
        let numeric = Some(Numeric::Quantized);
        Contract { produces: FormChange { numeric, ..own.produces }, ..own }
    }

    fn density(&self) -> Option<f64> {
        Some(self.pattern.density())
    }

    fn surveys(&self) -> Option<Needs> {
        self.owl.map(|_| NEEDS)
    }

    fn survey(
        &self,
        block: &Block,
        targets: &[Target],
        state: &BlockState,
        stats: &BlockStats,
    ) -> Vec<f64> {
        vec![self.owl.map_or(f64::NAN, |owl| owl.survey(block, targets, state, stats))]
    }

    fn cost(&self, block: &Block, targets: &[Target], limits: &Limits) -> Cost {
        let mut cost = Cost::default();
        let mut seen = Vec::new();
        for target in targets {
            let site = &block.sites[target.site];
            let (o, n) = (site.out_features as f64, site.in_features as f64);
            // Sweep (1), residual (2), one product per round (2); inside a block 128 columns each time.
            let solves = if target.scheme.is_some() { 2.0 } else { 1.0 };
            let refine = self.rounds(target.scheme.is_some());
            let inner = 4.0 * 128.0 * (refine * self.options.inner) as f64;
            let rounds = 3.0 + 2.0 * refine as f64;
            cost.flops += solves * (o * n * n * rounds + o * n * (300.0 + inner));
            let input = block.input_of(target.site);
            if !seen.contains(&input) {
                seen.push(input);
                cost.flops += n * n * n * 2.0 / 3.0;
            }
            let n = site.in_features;
            let (factorizing, factor) = InverseFactor::bytes(n, limits.factor_on_scratch);
            let width = masking::panel(self.pattern, self.options.block_size).min(n);
            // Values, mask, errors and weights of a tile, then scores and their order; with a scheme the pruned
            // weights, and codes, mask, errors and weights again.
            let mut lines = 4 * n + 4 * width;
            if target.scheme.is_some() {
                lines += 5 * n + n / 8 + 2 * width;
            }
            let panel = if limits.factor_on_scratch { width * n } else { 0 };
            let tile = 4 * (TILE.min(site.out_features).next_multiple_of(16) * lines + panel);
            let tiles = limits.threads.min(site.out_features.div_ceil(TILE)) * tile;
            // Codes, scales and zero points, or floats.
            let result = match target.scheme {
                Some(_) => site.weights() + site.weights() / 5,
                None => 4 * site.weights(),
            };
            cost.peak_bytes = cost.peak_bytes.max(factorizing.max(factor + tiles + result));
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
        let pattern = self.owl.map_or(self.pattern, |owl| {
            owl.pattern(context.survey, context.block.index, self.pattern)
        });
        let mut sites = Vec::new();
        let mut shared: Option<(usize, Factor)> = None;
        for target in targets {
            let site = &context.block.sites[target.site];
            let input = context.block.input_of(target.site);
            let hessian = stats
                .inputs
                .get_mut(input)
                .and_then(|input| input.as_mut()?.hessian.as_mut())
                .expect("the plan provides what the contract needs");
            let weight = state.linears[target.site].weight.as_dense();
            let weight = weight.expect("the plan proved a float weight");
            check_finite(&site.name, "the weight", weight)?;
            let factor = match shared.take() {
                Some((of, factor)) if of == input => factor,
                old => {
                    // Two factors are never held at once.
                    drop(old);
                    check_finite(&site.name, "the Hessian", hessian)?;
                    self.factorize(hessian, context, &site.name)?
                }
            };
            factor.fill(hessian, true);
            let solved = match target.scheme {
                None => self.prune(weight, hessian, &factor, pattern),
                Some(scheme) => self.prune_and_round(weight, hessian, &factor, pattern, scheme),
            };
            factor.fill(hessian, false);
            let solved =
                solved.map_err(|source| PassError::Scratch { site: site.name.clone(), source })?;
            let mut events = chosen(self.owl, pattern);
            events.extend(Event::of_factor(&factor));
            sites.push(SiteReport {
                site: site.name.clone(),
                pass: "sparsegpt".into(),
                weight_error: relative(solved.errors.weight, squares(weight)),
                output_error: Some(relative(solved.errors.output, metric(weight, hessian))),
                events,
            });
            match solved.weight {
                Weight::Dense(pruned) => finish(state, target.site, pruned),
                quantized => {
                    state.linears[target.site].weight = quantized;
                    state.masked[target.site] = true;
                }
            }
            shared = Some((input, factor));
        }
        Ok(PassReport { sites })
    }
}
