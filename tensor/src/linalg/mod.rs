//! Dense linear algebra: one place for GEMM, the symmetric rank-k update, Cholesky and the vectorised
//! element-wise functions. A call gives the same bits each time. Calls are single-threaded, and callers
//! parallelise over a partition that does not depend on the number of threads; `par_gemm_nt`, `Packing`
//! and `GramAccumulator::add` do so themselves on rayon's current pool.

pub mod cholesky;
pub mod double;
pub mod eigen;
pub mod factor;
pub mod gemm;
mod isa;
pub mod lowrank;
mod metric;
mod microkernel;
pub mod orthogonal;
pub mod simd;
pub mod syrk;
mod thin;
#[cfg(target_arch = "x86_64")]
mod tiles;

pub use cholesky::{LinalgError, cholesky_lower, solve_spd};
pub use eigen::{Eigen, eigen_symmetric, eigenvalues};
pub use factor::{InverseFactor, UpperPanels};
pub use gemm::{
    PackedRows, Packing, gemm_nn, gemm_nt, gemm_tn, matmul_nn, matmul_nn_into, matmul_nt,
    matmul_nt_into, matmul_tn, matmul_tn_into, par_gemm_nt,
};
pub use isa::{Isa, IsaError, Level, amx, arch, isa, level, pin};
pub use metric::{metric, squares};
pub use orthogonal::Orthogonal;
pub use simd::{
    abs_max, add_in_place, axpy, dot, exp_in_place, first_non_finite, rms_norm_row,
    rms_norm_row_backward, silu_mul, silu_mul_backward, softmax_row_backward, softmax_row_in_place,
    softmax_row_log_sum, sum_sq, vectorize,
};
pub use syrk::GramAccumulator;
