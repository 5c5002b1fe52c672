//! What the quantizers share: reading options, errors in the Hessian's metric, assembling the result.

use attar_ir::SiteReport;
pub(crate) use attar_ir::{check_finite, recipe::options, relative};
pub(crate) use attar_tensor::linalg::{metric, squares};
use attar_tensor::{Mat, QuantScheme, QuantizedLinear, grid::GroupGrid};

/// Rows worked on by one task; fixed, so that threads do not change bits.
pub(crate) const ROW_TILE: usize = 128;

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
