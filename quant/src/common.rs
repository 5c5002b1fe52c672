//! What the quantizers share: reading options, errors in the Hessian's metric, assembling the result.

use attar_ir::{
    Block, BlockState, Fold, PassError, Producer, SiteReport, Weight, recipe::RecipeError,
};
use attar_tensor::{
    Mat, QuantScheme, QuantizedLinear,
    grid::GroupGrid,
    linalg::{first_non_finite, gemm_nt, sum_sq},
};
use rayon::prelude::*;
use serde::de::DeserializeOwned;

/// Rows worked on by one task; fixed, so that threads do not change bits.
pub(crate) const ROW_TILE: usize = 128;

/// Reads a step's own options.
pub(crate) fn options<T: DeserializeOwned>(
    table: &toml::Table,
    known: &[&str],
) -> Result<T, RecipeError> {
    for key in table.keys() {
        if !known.contains(&key.as_str()) {
            let nearest = known
                .iter()
                .map(|name| (strsim::jaro_winkler(name, key), *name))
                .filter(|(score, _)| *score > 0.7)
                .max_by(|a, b| a.0.total_cmp(&b.0));
            return Err(RecipeError::UnknownKey {
                path: String::new(),
                key: key.clone(),
                suggestion: nearest.map(|(_, name)| name.to_owned()),
            });
        }
    }
    table.clone().try_into().map_err(|error| RecipeError::Invalid {
        path: String::new(),
        reason: error.message().to_owned(),
    })
}

/// Columns of H multiplied at once in [`metric`].
const STRIP: usize = 256;

/// `tr(D H Dᵀ)` for `d [out, in]` and a symmetric `h [in, in]`, of which the lower triangle is read;
/// products in f32, sum in f64. Cost out·in² FLOPs.
pub(crate) fn metric(d: &Mat, h: &Mat) -> f64 {
    let n = d.ncols();
    let (d, h) = (d.as_slice().expect("standard layout"), h.as_slice().expect("standard layout"));
    let tiles: Vec<f64> = d
        .par_chunks(2 * ROW_TILE * n)
        .map(|d| {
            let m = d.len() / n;
            let mut product = vec![0.0f32; m * STRIP];
            let mut total = 0.0;
            for first in (0..n).step_by(STRIP) {
                let width = STRIP.min(n - first);
                let end = first + width;
                // d H dᵀ = Σ over strips J of d_J (H_JJ d_Jᵀ + 2 H_J,<J d_<Jᵀ).
                for (columns, factor) in [(0..first, 2.0), (first..end, 1.0)] {
                    if columns.is_empty() {
                        continue;
                    }
                    let (shape, start) = ((m, width, columns.len()), columns.start);
                    let h = (&h[first * n + start..], n);
                    let out = (product.as_mut_slice(), width);
                    gemm_nt(shape, 1.0, (&d[start..], n), h, false, out);
                    let mut sum = 0.0f64;
                    for (d, p) in d.chunks(n).zip(product.chunks(width)) {
                        let d = &d[first..end];
                        sum += d
                            .iter()
                            .zip(p)
                            .map(|(a, b)| f64::from(*a) * f64::from(*b))
                            .sum::<f64>();
                    }
                    total += factor * sum;
                }
            }
            total
        })
        .collect();
    tiles.iter().sum()
}

/// `Σ x²`: f32 within a chunk, chunks in f64.
pub(crate) fn squares(x: &Mat) -> f64 {
    x.as_slice().expect("standard layout").chunks(4096).map(|x| f64::from(sum_sq(x))).sum()
}

/// An error relative to what it is an error of.
pub(crate) fn relative(error: f64, whole: f64) -> f64 {
    error.max(0.0) / whole.max(f64::MIN_POSITIVE)
}

/// Error of a result against the weight the pass was given.
pub(crate) fn report(
    pass: &str,
    site: &str,
    weight: &Mat,
    result: &Mat,
    hessian: Option<&Mat>,
) -> SiteReport {
    let delta = result - weight;
    let weight_error = relative(squares(&delta), squares(weight));
    let output_error = hessian.map(|h| relative(metric(&delta, h), metric(weight, h)));
    SiteReport {
        site: site.to_owned(),
        pass: pass.to_owned(),
        weight_error,
        output_error,
        events: Vec::new(),
    }
}

/// Builds a [`QuantizedLinear`] from codes and grids `[out, groups]`.
pub(crate) fn assemble(
    scheme: QuantScheme,
    (out_features, in_features): (usize, usize),
    codes: Vec<u8>,
    grids: &[GroupGrid],
) -> QuantizedLinear {
    QuantizedLinear {
        scheme,
        out_features,
        in_features,
        codes,
        scales: grids.iter().map(|grid| grid.scale).collect(),
        zeros: grids.iter().map(|grid| grid.zero).collect(),
        g_idx: None,
    }
}

/// The float weight of a site.
pub(crate) fn dense(state: &BlockState, site: usize) -> &Mat {
    state.linears[site].weight.as_dense().expect("the plan proved a float weight")
}

/// Divides the producer's channels by `scale` and multiplies the consumers' columns.
pub(crate) fn fold_scale(block: &Block, fold: &Fold, scale: &[f32], state: &mut BlockState) {
    match fold.producer {
        Producer::Norm(norm) => {
            state.norm_changed[norm] = true;
            for (w, s) in state.norms[norm].iter_mut().zip(scale) {
                *w /= s;
            }
        }
        Producer::Rows(site) => {
            state.weight_changed[site] = true;
            let linear = &mut state.linears[site];
            let Weight::Dense(weight) = &mut linear.weight else {
                unreachable!("the plan proved float producers")
            };
            for (mut row, s) in weight.outer_iter_mut().zip(scale) {
                row.map_inplace(|w| *w /= s);
            }
            if let Some(bias) = &mut linear.bias {
                state.bias_changed[site] = true;
                for (b, s) in bias.iter_mut().zip(scale) {
                    *b /= s;
                }
            }
        }
    }
    for &site in &block.inputs[fold.input].sites {
        state.weight_changed[site] = true;
        let Weight::Dense(weight) = &mut state.linears[site].weight else {
            unreachable!("the plan proved float consumers")
        };
        for mut row in weight.outer_iter_mut() {
            for (c, w) in row.iter_mut().enumerate() {
                *w *= scale[fold.map.producer_of(c)];
            }
        }
    }
}

/// NaN or infinity in a weight or Hessian.
pub(crate) fn check_finite(site: &str, what: &str, x: &Mat) -> Result<(), PassError> {
    match first_non_finite(x.as_slice().expect("standard layout")) {
        None => Ok(()),
        Some(index) => Err(PassError::Numeric {
            site: site.to_owned(),
            reason: format!(
                "{what} holds a NaN or infinity at flat index {index}; check the checkpoint and the \
                 calibration text"
            ),
        }),
    }
}
