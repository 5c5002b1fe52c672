//! The damped, permuted inverse factor that a sweep reads, and what had to be done to get it.

use std::io;

use crate::{
    Mat, Scratch,
    linalg::{InverseFactor, LinalgError, UpperPanels},
};

/// How a Hessian is factorized.
#[derive(Debug, Clone, Copy)]
pub struct FactorOptions {
    /// Dampening as a fraction of the mean diagonal.
    pub percdamp: f64,
    /// Columns in order of falling diagonal instead of their own.
    pub by_diagonal: bool,
    /// Rows of a panel of U: the columns of one block of the sweep.
    pub panel: usize,
}

/// What all linears with the same input share.
#[derive(Debug)]
pub struct Factor {
    /// Order in which columns are solved.
    pub order: Vec<usize>,
    /// `U [in, in]` of the permuted, damped Hessian, f32, in panels of rows.
    pub upper: UpperPanels,
    /// Diagonal of the Hessian; dead columns have one too.
    pub diagonal: Vec<f32>,
    /// What was added to the diagonal of each column.
    pub added: Vec<f32>,
    /// Input channels that were zero on all calibration tokens.
    pub dead: usize,
    /// Final dampening and the number of attempts that failed, where the one asked for was too small.
    pub raised: Option<(f64, u32)>,
}

/// Why a Hessian has no factor.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SolverError {
    /// Nothing was ever put in.
    #[error("all inputs are zero on the calibration set; use other calibration text")]
    Dead,
    /// Not positive definite.
    #[error("{error} even with dampening {percdamp}")]
    Indefinite {
        /// What failed.
        error: LinalgError,
        /// As a fraction of the mean diagonal.
        percdamp: f64,
    },
    /// The scratch file failed.
    #[error("scratch file: {0}")]
    Scratch(#[from] io::Error),
}

impl Factor {
    /// Gives dead columns of the Hessian their diagonal, or takes it away again.
    pub fn fill(&self, hessian: &mut Mat, fill: bool) {
        for (i, value) in hessian.diag_mut().iter_mut().enumerate() {
            if self.added[i] > 0.0 {
                *value = if fill { self.diagonal[i] } else { self.diagonal[i] - self.added[i] };
            }
        }
    }
}

/// Factorizes `hessian [in, in]`, standard layout. Dead columns get the mean diagonal; dampening is raised where it
/// is too small. Cost `2/3 in³`.
///
/// # Errors
/// [`SolverError`].
///
/// # Panics
/// When the matrix is not in standard layout.
pub fn factorize(
    hessian: &Mat,
    options: FactorOptions,
    scratch: Option<&Scratch>,
) -> Result<Factor, SolverError> {
    let n = hessian.nrows();
    let mut diagonal: Vec<f64> = hessian.diag().iter().map(|&v| f64::from(v)).collect();
    let live = diagonal.iter().filter(|&&d| d > 0.0).count();
    let mean = diagonal.iter().sum::<f64>() / n as f64;
    if live == 0 {
        return Err(SolverError::Dead);
    }
    for d in &mut diagonal {
        if *d <= 0.0 {
            *d = mean;
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    if options.by_diagonal {
        order.sort_by(|&a, &b| diagonal[b].total_cmp(&diagonal[a]).then(a.cmp(&b)));
    }
    let values = hessian.as_slice().expect("standard layout");
    let (mut percdamp, mut failures) = (options.percdamp, 0);
    let inverse = loop {
        let row = |i: usize, out: &mut [f64]| {
            let from = &values[order[i] * n..][..n];
            for (to, &column) in out.iter_mut().zip(&order[i..]) {
                *to = f64::from(from[column]);
            }
            out[0] = diagonal[order[i]] + percdamp * mean;
        };
        match InverseFactor::new(n, row, scratch) {
            Ok(inverse) => break inverse,
            Err(LinalgError::Scratch(source)) => return Err(SolverError::Scratch(source)),
            Err(_) if failures < 8 => {
                failures += 1;
                percdamp = (percdamp * 10.0).max(1e-4);
            }
            Err(error) => return Err(SolverError::Indefinite { error, percdamp }),
        }
    };
    let upper = inverse.into_upper(options.panel.clamp(1, n), scratch)?;
    let diagonal: Vec<f32> = diagonal.iter().map(|&d| d as f32).collect();
    let added = diagonal.iter().zip(hessian.diag()).map(|(d, h)| d - h).collect();
    Ok(Factor {
        order,
        upper,
        diagonal,
        added,
        dead: n - live,
        raised: (failures > 0).then_some((percdamp, failures)),
    })
}
