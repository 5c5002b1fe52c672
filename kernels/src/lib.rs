//! Layouts and their matmuls: where the bits of a quantized linear sit, and the code that eats them.
//!
//! [`mod@layout`] describes each layout once and packs and unpacks it. A [`Kernel`] prepares a
//! [`attar_tensor::PackedLinear`] for multiplication, and [`Prepared::matmul`] computes `x · Wᵀ`
//! from the packed codes; [`select`] takes the best exact kernel of this machine, [`select_kernel`] the
//! best one of a kind of [`Activations`]. [`fn@verify`] holds every kernel to the reference in f64, and
//! [`cases`] lists what every kernel of every backend must get right. Nothing here knows a file or a
//! model.

pub mod cases;
pub mod check;
pub mod cpu;
pub mod cuda;
pub mod layout;
pub mod reference;
pub mod spec;
#[cfg(test)]
mod testing;
pub mod verify;

pub use check::{Defect, check_packed};
pub use layout::{LAYOUTS, Layout, layout, layout_of, unpack};
pub use spec::{Activations, Backend, Kernel, Prepared, choose, select, select_kernel};
pub use verify::{KernelReport, verify};
