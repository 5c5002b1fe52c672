//! What the quantizers share: reading options, errors in the Hessian's metric, assembling the result.

use attar_ir::{PassError, SiteReport, recipe::RecipeError};
use attar_tensor::{Mat, QuantScheme, QuantizedLinear, grid::GroupGrid, linalg::gemm_nn};
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

/// `tr(D H Dᵀ)` for `d [out, in]`, `h [in, in]`; products in f32, sum in f64.
pub(crate) fn metric(d: &Mat, h: &Mat) -> f64 {
    let (out, n) = d.dim();
    let (d, h) = (d.as_slice().expect("standard layout"), h.as_slice().expect("standard layout"));
    let tiles: Vec<f64> = d
        .par_chunks(ROW_TILE * n)
        .map(|d| {
            let m = d.len() / n;
            let mut dh = vec![0.0f32; d.len()];
            gemm_nn((m, n, n), 1.0, (d, n), (h, n), false, (&mut dh, n));
            d.iter().zip(&dh).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>()
        })
        .collect();
    debug_assert!(out > 0);
    tiles.iter().sum()
}

fn square(x: impl Iterator<Item = f32>) -> f64 {
    x.map(|v| f64::from(v) * f64::from(v)).sum()
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
    let weight_error =
        square(delta.iter().copied()) / square(weight.iter().copied()).max(f64::MIN_POSITIVE);
    let output_error =
        hessian.map(|h| (metric(&delta, h).max(0.0)) / metric(weight, h).max(f64::MIN_POSITIVE));
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

/// NaN or infinity in a weight or Hessian.
pub(crate) fn check_finite(site: &str, what: &str, x: &Mat) -> Result<(), PassError> {
    match x.iter().position(|v| !v.is_finite()) {
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
