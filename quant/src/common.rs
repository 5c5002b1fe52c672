//! What the quantizers share: reading options, errors in the Hessian's metric, assembling the result.

use attar_ir::{PassError, SiteReport, recipe::RecipeError};
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

/// Weights whose error is taken at once where a result is made row by row.
const PIECE: usize = 1 << 20;

/// As [`report`] for a result that `row` writes row by row, without a copy of the whole.
pub(crate) fn report_rows(
    pass: &str,
    site: &str,
    weight: &Mat,
    row: impl Fn(usize, &mut [f32]) + Sync,
    hessian: Option<&Mat>,
) -> SiteReport {
    let (out, n) = weight.dim();
    // [error, whole], plain and in the Hessian's metric.
    let (mut plain, mut weighed) = ([0.0f64; 2], [0.0f64; 2]);
    let rows = (PIECE / n.max(1)).max(1);
    let weight = weight.as_slice().expect("standard layout");
    for first in (0..out).step_by(rows) {
        let some = rows.min(out - first);
        let given = &weight[first * n..(first + some) * n];
        let mut delta = Mat::zeros((some, n));
        let all = delta.as_slice_mut().expect("a fresh matrix is in standard layout");
        all.par_chunks_mut(n).zip(given.par_chunks(n)).enumerate().for_each(|(at, (d, w))| {
            row(first + at, d);
            for (d, w) in d.iter_mut().zip(w) {
                *d -= w;
            }
        });
        let chunks = given.chunks(4096);
        plain[0] += squares(&delta);
        plain[1] += chunks.map(|x| f64::from(sum_sq(x))).sum::<f64>();
        if let Some(h) = hessian {
            weighed[0] += metric(&delta, h);
            let own = Mat::from_shape_vec((some, n), given.to_vec()).expect("as many as rows");
            weighed[1] += metric(&own, h);
        }
    }
    SiteReport {
        site: site.to_owned(),
        pass: pass.to_owned(),
        weight_error: relative(plain[0], plain[1]),
        output_error: hessian.map(|_| relative(weighed[0], weighed[1])),
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
