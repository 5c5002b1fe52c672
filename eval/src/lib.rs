//! What compression cost: perplexity, divergence from the original, reports, and gates over reports.

mod curve;
pub mod gate;
pub mod html;
pub mod metrics;
pub mod report;

pub use gate::{GateError, KERNEL_STATUS, Policy, Verdict};
pub use metrics::{Evaluation, Evaluator, Interval, Score};
pub use report::Report;
