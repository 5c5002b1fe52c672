//! What the quantizers share: reading options, errors in the Hessian's metric.

use attar_ir::{Block, BlockState, Fold, Producer, SiteReport, Weight};
pub(crate) use attar_ir::{check_finite, recipe::options, relative};
pub(crate) use attar_tensor::linalg::{metric, squares};
use attar_tensor::{Mat, linalg::sum_sq};
use rayon::prelude::*;

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
