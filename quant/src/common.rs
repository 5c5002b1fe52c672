//! What the quantizers share: reading options, errors in the Hessian's metric, assembling the result.

use attar_ir::{Block, BlockState, Fold, Producer, SiteReport, Weight};
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
