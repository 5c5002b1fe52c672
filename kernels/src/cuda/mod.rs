//! CUDA: matmul kernels for NVIDIA GPUs, their packed form, and the machinery that launches them.
//!
//! | part | what it holds |
//! |---|---|
//! | `device/*.cuh`, `layout/*/repack.cuh` | the kernels; inline PTX stands in `ptx.cuh` alone |
//! | [`packed`] | the form that kernels eat, made on the host; on the device the repacking kernels make the same bytes |
//! | [`geometry`] | which kernel, which grid and how much workspace a product takes: a function of its shape alone |
//! | [`device`] | a device that holds buffers and launches kernels, and a linear that lives on one |
//!
//! Weights are the left operand of the tensor cores (16 rows of `W` by 16 columns) and tokens the right one, eight at a
//! time, so that few tokens waste little and one packed form serves every number of tokens.

pub mod bench;
pub mod describe;
pub mod device;
pub mod driver;
pub mod geometry;
pub mod images;
pub mod packed;
pub mod proof;
pub mod repack;
#[cfg(test)]
mod shim;

pub use describe::{Description, Status, describe};
pub use device::{Device, DeviceLinear};
pub use driver::{CudaError, Gpu};
pub use geometry::{Generation, Half, Launch, Problem};
pub use images::source;
pub use packed::CudaWeights;
