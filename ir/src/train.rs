//! Training of the model as a whole: what such a pass asks of whoever runs it. Passes do no I/O and read no clock, so
//! tensors, the place of the state and the moment to save it come through a [`TrainSession`].

use attar_tensor::{QuantizedLinear, TensorSource};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{ModelContext, ModelGraph, PassError};

/// What training did, for the report.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct TrainingReport {
    /// What is minimised.
    pub loss: String,
    /// Steps of the optimizer.
    pub steps: usize,
    /// Tokens that went through the student, every repetition counted.
    pub tokens: usize,
    /// Values that were trained.
    pub trained: usize,
    /// Mean loss over some steps up to a step: `(step, loss)`.
    pub curve: Vec<(usize, f64)>,
}

/// How far training is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrainProgress {
    /// Steps done.
    pub step: usize,
    /// All steps.
    pub steps: usize,
    /// Steps done in this run, since it was begun or taken up.
    pub done: usize,
    /// Loss of the newest step.
    pub loss: f64,
    /// Tokens that went through the student in those.
    pub tokens: usize,
}

/// A state that was saved: facts, and lists that are read one by one (all of them are as large as the training itself).
pub struct Saved {
    /// What was handed to [`TrainSession::save`].
    pub facts: Value,
    /// A list by its name.
    pub list: Box<dyn Fn(&str) -> Option<Vec<f32>>>,
}

/// What training gets from whoever runs it. Everything goes through shared references: tensors are read while states are
/// saved.
pub trait TrainSession {
    /// config.json and tensors of the model that is trained.
    fn student(&self) -> (&Value, &dyn TensorSource);

    /// config.json and tensors of the model that it learns from.
    fn teacher(&self) -> (&Value, &dyn TensorSource);

    /// The codes of a linear, by the name of its weight, where the student is quantized already.
    fn codes(&self, weight: &str) -> Option<QuantizedLinear> {
        let _ = weight;
        None
    }

    /// Token windows.
    fn windows(&self) -> &[Vec<u32>];

    /// Bytes that activations of the teacher may take.
    fn stream_bytes(&self) -> usize;

    /// The state of a run that was killed.
    ///
    /// # Errors
    /// When it is there and cannot be read.
    fn saved(&self) -> Result<Option<Saved>, PassError>;

    /// True when enough time has passed since the last save. No result may depend on it.
    fn due(&self) -> bool;

    /// Keeps a state in place of the former one.
    ///
    /// # Errors
    /// When the disk refuses.
    fn save(&self, facts: Value, lists: &[(String, &[f32])]) -> Result<(), PassError>;

    /// Tells how far training is.
    fn progress(&self, progress: TrainProgress);

    /// Writes a tensor of the result (of a linear with codes its scales), `values` in the order of its elements. Those not
    /// written stay as they were.
    ///
    /// # Errors
    /// When the disk refuses.
    fn write(&self, tensor: &str, values: &[f32]) -> Result<(), PassError>;
}

/// Training of the whole model.
pub trait Train: Sync {
    /// Directory of the teacher; the original checkpoint of the run when absent.
    fn teacher(&self) -> Option<&str>;

    /// True when it trains the scales of what the steps on blocks have quantized, behind all of them.
    fn trains_scales(&self) -> bool {
        false
    }

    /// True when streams of student and teacher are compared, which must have one width and one basis.
    fn matches_streams(&self) -> bool {
        false
    }

    /// Bytes of training a model, `original` being that of the teacher, on `windows` (tokens in all, tokens of one) when
    /// activations of the teacher may take `stream`.
    fn peak_bytes(
        &self,
        graph: &ModelGraph,
        original: &ModelGraph,
        windows: (usize, usize),
        stream: usize,
    ) -> usize;

    /// Bytes of a state that is saved.
    fn state_bytes(&self, graph: &ModelGraph) -> usize;

    /// What this model or these windows make impossible.
    ///
    /// # Errors
    /// Why, and the remedy.
    fn check(&self, graph: &ModelGraph) -> Result<(), String>;

    /// Whether this tensor may change.
    fn changes(&self, graph: &ModelGraph, tensor: &str) -> bool;

    /// Trains and writes every tensor that [`Train::changes`] names.
    ///
    /// # Errors
    /// Numerics (a loss that is no number, with its step), and whatever the session says.
    fn train(
        &self,
        context: &ModelContext<'_>,
        session: &dyn TrainSession,
    ) -> Result<TrainingReport, PassError>;
}
