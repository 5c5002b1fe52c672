//! All rows of a weight, tile by tile.

use std::{io, sync::Mutex};

use rayon::prelude::*;

use super::{
    Errors, Factor, TILE,
    rounding::{RoundingOptions, Space, Tile},
};
use crate::{Mat, QuantizedLinear, grid::GroupGrid};

/// Codes, scales and zero points of `weight [out, in]` by sweep and refinement; `hessian [in, in]` is that of the factor, dead
/// columns filled.
///
/// # Errors
/// When the scratch file of the factor cannot be read.
///
/// # Panics
/// When a matrix is not in standard layout.
pub fn sweep(
    weight: &Mat,
    hessian: &Mat,
    factor: &Factor,
    options: &RoundingOptions,
) -> io::Result<(QuantizedLinear, Errors)> {
    let (out, n) = weight.dim();
    let groups = n / options.scheme.group_size(n);
    let hessian = hessian.as_slice().expect("standard layout");
    let mut codes = vec![0u8; out * n];
    let mut grids = vec![GroupGrid { scale: 1.0, zero: 0 }; out * groups];
    let spaces = Mutex::new(Vec::<Space>::new());
    let errors: Vec<Errors> = weight
        .as_slice()
        .expect("standard layout")
        .par_chunks(TILE * n)
        .zip(codes.par_chunks_mut(TILE * n))
        .zip(grids.par_chunks_mut(TILE * groups))
        .map(|((weight, codes), grids)| {
            let spare = spaces.lock().expect("nobody panics with it").pop();
            let mut space = spare.unwrap_or_default();
            let tile = Tile { weight, target: None, codes, grids };
            let errors = tile.solve(hessian, factor, options, &mut space)?;
            spaces.lock().expect("nobody panics with it").push(space);
            Ok(errors)
        })
        .collect::<io::Result<_>>()?;
    let weight = QuantizedLinear::of_grids(options.scheme, (out, n), codes, &grids);
    Ok((weight, errors.into_iter().sum()))
}
