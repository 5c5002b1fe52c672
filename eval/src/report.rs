//! The report of one compression, `report.json`.

use attar_ir::{ModelEntry, SiteReport, ledger::Line};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::Evaluation;

/// One site: what was done, in which scheme, at which error.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SiteEntry {
    /// What the pass measured.
    #[serde(flatten)]
    pub result: SiteReport,
    /// Scheme, e.g. `w4 g128 sym`; absent for passes that do not quantize.
    pub scheme: Option<String>,
    /// Bits per code.
    pub bits: Option<u8>,
    /// Wall time of the pass on the sites of this stage, seconds.
    pub seconds: f64,
    /// The step of the recipe, `step[i] (pass)`.
    #[serde(default)]
    pub step: String,
    /// Name of the statistic that was read, by content.
    #[serde(default)]
    pub statistics: Option<String>,
}

/// Where a run found its inputs. A hint for the next run, never hashed: what they held stands in the
/// manifest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inputs {
    /// Directory of the checkpoint.
    pub source: PathBuf,
    /// Calibration text files, in order.
    #[serde(default)]
    pub text: Vec<PathBuf>,
    /// Calibration token ids.
    #[serde(default)]
    pub ids: Option<PathBuf>,
    /// Importance matrix.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub imatrix: Option<PathBuf>,
    /// Directory that paths in the recipe are relative to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recipe: Option<PathBuf>,
}

/// Where the wall time went, seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Timings {
    /// Opening, hashing and loading the checkpoint.
    pub read: f64,
    /// Forward passes of calibration.
    pub forward: f64,
    /// Hessians and channel statistics.
    pub statistics: f64,
    /// Passes.
    pub solve: f64,
    /// Results into the work directory, and back.
    #[serde(default)]
    pub store: f64,
    /// Packing, writing, hashing.
    pub write: f64,
    /// Reading back and checking.
    pub verify: f64,
    /// Measuring accuracy.
    #[serde(default)]
    pub eval: f64,
    /// Everything.
    pub total: f64,
}

/// What a part of the run was for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Hashing and loading.
    Read,
    /// Forwards and statistics.
    Calibrate,
    /// Passes.
    Solve,
    /// Results, statistics and activations into the work directory, and back.
    Store,
    /// Packing and writing artifacts.
    Emit,
    /// Reading back and checking.
    Verify,
    /// Measuring accuracy.
    Eval,
    /// Report, and the rename that makes the artifact exist.
    Seal,
}

/// A stretch of the time line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Span {
    /// What for.
    pub phase: Phase,
    /// Block, or whatever else tells it from others.
    pub what: String,
    /// Seconds after the beginning.
    pub start: f64,
    /// Seconds after the beginning.
    pub end: f64,
}

/// Zeros of a site that was pruned, counted in the artifact as it is read back.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Zeros {
    /// Site name.
    pub site: String,
    /// Fraction of the weights.
    pub zeros: f64,
    /// The pattern that was found to hold, `2:4`.
    pub pattern: Option<String>,
}

/// The report of one artifact.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Version of the tool.
    pub attar: String,
    /// Layout of the artifact.
    pub layout: String,
    /// Instruction set of the run, e.g. `avx512`.
    #[serde(default)]
    pub isa: String,
    /// Where the run found its inputs.
    #[serde(default)]
    pub inputs: Inputs,
    /// Bytes of the artifact's weight files.
    pub file_bytes: u64,
    /// Bytes of the source's weight files.
    pub source_bytes: u64,
    /// Bits per weight over the linears of the decoder blocks, scales and zero points included.
    pub bits_per_weight: f64,
    /// What passes on the whole model did, before all others.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub model: Vec<ModelEntry>,
    /// Per site and pass.
    pub sites: Vec<SiteEntry>,
    /// Zeros per pruned site.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub sparsity: Vec<Zeros>,
    /// Accuracy, when an evaluation text was given.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub eval: Option<Evaluation>,
    /// What the plan narrowed.
    pub notes: Vec<String>,
    /// What became of every tensor of the checkpoint.
    #[serde(default)]
    pub ledger: Vec<Line>,
    /// Predicted peak memory, bytes.
    pub predicted_peak_bytes: u64,
    /// Measured peak resident memory (VmHWM), bytes; absent where the system does not say.
    pub measured_peak_bytes: Option<u64>,
    /// Wall time.
    pub timings: Timings,
    /// What happened when.
    #[serde(default)]
    pub timeline: Vec<Span>,
    /// Results taken from the work directory instead of being computed, and all of them.
    #[serde(default)]
    pub reused: (usize, usize),
}
