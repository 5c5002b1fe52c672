//! Layouts and their matmuls: where the bits of a quantized linear sit, and the code that eats them.
//!
//! [`mod@layout`] describes each layout once and packs and unpacks it. A [`Kernel`] prepares a
//! [`attar_tensor::PackedLinear`] for multiplication, and [`Prepared::matmul`] computes `x · Wᵀ`
//! from the packed codes; [`select`] takes the best kernel of this machine. [`fn@verify`] holds every
//! kernel to [`reference`](mod@reference). Nothing here knows a file or a model.

pub mod check;
pub mod cpu;
pub mod layout;
pub mod reference;
pub mod spec;
#[cfg(test)]
mod testing;
pub mod verify;

pub use check::{Defect, check_packed};
pub use layout::{LAYOUTS, Layout, layout, layout_of, unpack};
pub use spec::{Kernel, Prepared, select};
pub use verify::{KernelReport, verify};
