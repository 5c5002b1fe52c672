//! Where learning of codes begins: the column sweep with error feedback and its refinement in the Hessian's metric
//! (`attar_tensor::column_solver`, as in GPTQ, arXiv:2210.17323), or rounding to nearest on searched scales.

use std::sync::Mutex;

use attar_ir::{Event, PassError};
use attar_tensor::{
    Mat, QuantScheme, QuantizedLinear, Scratch,
    column_solver::{
        Errors, Factor, FactorOptions, SolverError, TILE, factorize,
        rounding::{Mask, RoundingOptions, Space, Tile},
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
    factorize(hessian, options, scratch).map_err(|error| match error {
        SolverError::Scratch(source) => PassError::Scratch { site: site.to_owned(), source },
        other => PassError::Numeric { site: site.to_owned(), reason: other.to_string() },
    })
}

/// What is worth telling of a factor.
pub(crate) fn events(factor: &Factor) -> Vec<Event> {
    let mut events = Vec::new();
    if factor.dead > 0 {
        events.push(Event::DeadColumns { count: factor.dead });
    }
    if let Some((percdamp, failures)) = factor.raised {
        events.push(Event::DampeningRaised { percdamp, failures });
    }
    events
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
    let (out, n) = weight.dim();
    let groups = n / scheme.group_size(n);
    let hessian = hessian.as_slice().expect("standard layout");
    let mut codes = vec![0u8; out * n];
    let mut grids = vec![GroupGrid { scale: 1.0, zero: 0 }; out * groups];
    let spaces = Mutex::new(Vec::<Space>::new());
    weight
        .as_slice()
        .expect("standard layout")
        .par_chunks(TILE * n)
        .zip(codes.par_chunks_mut(TILE * n))
        .zip(grids.par_chunks_mut(TILE * groups))
        .map(|((weight, codes), grids)| {
            let spare = spaces.lock().expect("nobody panics with it").pop();
            let mut space = spare.unwrap_or_default();
            let tile = Tile { weight, target: None, codes, grids };
            let errors = tile.solve(hessian, factor, &rounding, &mut space)?;
            spaces.lock().expect("nobody panics with it").push(space);
            Ok(errors)
        })
        .collect::<std::io::Result<Vec<Errors>>>()
        .map_err(|source| PassError::Scratch { site: site.to_owned(), source })?;
    Ok(assemble(scheme, (out, n), codes, &grids))
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
    assemble(scheme, (out, n), codes, &grids)
}

fn assemble(
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
