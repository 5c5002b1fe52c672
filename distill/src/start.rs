//! Where learning of codes begins: the column sweep with error feedback and its refinement in the Hessian's metric
//! (`attar_tensor::column_solver`, as in GPTQ, arXiv:2210.17323), or rounding to nearest on searched scales.

use attar_ir::PassError;
use attar_tensor::{
    Mat, QuantScheme, QuantizedLinear, Scratch,
    column_solver::{
        self, Factor, FactorOptions, factorize,
        rounding::{Mask, RoundingOptions},
    },
    grid::{Clip, GroupGrid, choose_grid},
};
use rayon::prelude::*;

/// Columns swept before the rest is updated.
const BLOCK: usize = 128;
/// Dampening as a fraction of the mean diagonal.
const PERCDAMP: f64 = 0.01;
/// Repetitions inside each block of a round of refinement.
const INNER: usize = 2;

/// The factor that all linears with one input share.
pub(crate) fn factor(
    site: &str,
    hessian: &Mat,
    scratch: Option<&Scratch>,
) -> Result<Factor, PassError> {
    let options = FactorOptions { percdamp: PERCDAMP, by_diagonal: true, panel: BLOCK };
    factorize(hessian, options, scratch).map_err(|error| PassError::of_solver(site, error))
}

/// Sweep and `refine` rounds of refinement; `hessian` is that of the factor, dead columns filled.
pub(crate) fn sweep(
    site: &str,
    weight: &Mat,
    hessian: &Mat,
    factor: &Factor,
    scheme: QuantScheme,
    masked: bool,
    refine: usize,
) -> Result<QuantizedLinear, PassError> {
    let mask = if masked { Mask::Fixed } else { Mask::None };
    let rounding = RoundingOptions { scheme, refine, inner: INNER, mask };
    let (made, _) = column_solver::sweep(weight, hessian, factor, &rounding)
        .map_err(|source| PassError::Scratch { site: site.to_owned(), source })?;
    Ok(made)
}

/// Rounds to nearest on scales searched with the weights of the columns.
pub(crate) fn nearest(weight: &Mat, diagonal: &[f32], scheme: QuantScheme) -> QuantizedLinear {
    let (out, n) = weight.dim();
    let size = scheme.group_size(n);
    let top = f32::from(scheme.max_code());
    let mut codes = vec![0u8; out * n];
    let mut grids = vec![GroupGrid { scale: 1.0, zero: 0 }; out * (n / size)];
    let rows = weight.as_slice().expect("standard layout").par_chunks(n);
    rows.zip(codes.par_chunks_mut(n)).zip(grids.par_chunks_mut(n / size)).for_each(
        |((row, codes), grids)| {
            let groups = row.chunks(size).zip(codes.chunks_mut(size)).zip(diagonal.chunks(size));
            for (((row, codes), importance), grid) in groups.zip(grids) {
                *grid = choose_grid(row, Some(importance), scheme, Clip::Search(35));
                for (&w, code) in row.iter().zip(codes) {
                    *code = grid.code(w, top) as u8;
                }
            }
        },
    );
    QuantizedLinear::of_grids(scheme, (out, n), codes, &grids)
}
