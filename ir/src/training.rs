//! A block as a function that can be trained: what a pass gets that learns from the original block.

use std::fmt::Debug;

use attar_tensor::Mat;

use crate::{BlockState, PassError};

/// How a pass learns: what the plan counts on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Training {
    /// Windows that derivatives are taken of at once.
    pub batch: usize,
    /// Steps.
    pub steps: usize,
    /// True when biases and norms change.
    pub vectors: bool,
    /// True when the last block is taught by logits.
    pub logits: bool,
}

/// Which derivatives a step asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Those by the weights of linears.
    pub linears: bool,
    /// Those by biases and norms.
    pub vectors: bool,
}

/// One number for every number of a block: its weights, or derivatives by them.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockValues {
    /// `[out_features, in_features]`, by site.
    pub linears: Vec<Mat>,
    /// `[out_features]`, by site.
    pub biases: Vec<Option<Vec<f32>>>,
    /// `[width]`, by norm.
    pub norms: Vec<Vec<f32>>,
}

impl BlockValues {
    /// What the weights of a block stand for, f32.
    pub fn of(state: &BlockState) -> Self {
        Self {
            linears: state.linears.iter().map(|l| l.weight.values().into_owned()).collect(),
            biases: state.linears.iter().map(|linear| linear.bias.clone()).collect(),
            norms: state.norms.clone(),
        }
    }

    /// Zeros of the same shapes.
    pub fn zeros(&self) -> Self {
        Self {
            linears: self.linears.iter().map(|weight| Mat::zeros(weight.dim())).collect(),
            biases: self.biases.iter().map(|b| b.as_ref().map(|b| vec![0.0; b.len()])).collect(),
            norms: self.norms.iter().map(|norm| vec![0.0; norm.len()]).collect(),
        }
    }

    /// Every tensor, linears first.
    ///
    /// # Panics
    /// When a linear is not in standard layout.
    pub fn tensors_mut(&mut self) -> impl Iterator<Item = &mut [f32]> {
        let linears =
            self.linears.iter_mut().map(|weight| weight.as_slice_mut().expect("standard layout"));
        let vectors = self.biases.iter_mut().flatten().chain(&mut self.norms);
        linears.chain(vectors.map(Vec::as_mut_slice))
    }
}

/// A decoder block as a function of its weights, with the inputs and the teacher's outputs of every window.
///
/// The loss of some windows is a mean over their tokens: how far what the block puts out is from what the original
/// block put out on the original activations. Calls with the same arguments give the same bits on any number of
/// threads.
pub trait BlockFunction: Debug + Sync {
    /// Number of windows.
    fn windows(&self) -> usize;

    /// The loss of a block that would put out what enters it: what losses are compared with. 1 where the loss means
    /// something by itself, as that of the last block does, the divergence of logits in nats.
    ///
    /// # Errors
    /// When activations cannot be read.
    fn power(&self) -> Result<f64, PassError>;

    /// The loss of some windows.
    ///
    /// # Errors
    /// When activations cannot be read.
    fn loss(&self, weights: &BlockValues, windows: &[usize]) -> Result<f64, PassError>;

    /// The loss of some windows, and its derivatives by the weights, written to `gradient` (shaped as the weights);
    /// what is not wanted is left as it is.
    ///
    /// # Errors
    /// When activations cannot be read.
    fn gradient(
        &self,
        weights: &BlockValues,
        windows: &[usize],
        wanted: Wanted,
        gradient: &mut BlockValues,
    ) -> Result<f64, PassError>;
}

/// How far training is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// Steps done.
    pub step: usize,
    /// Steps in all.
    pub steps: usize,
    /// Loss of the last step, relative to [`BlockFunction::power`].
    pub loss: f64,
}

/// What a pass that learns gets beside statistics.
#[derive(Clone, Copy)]
pub struct Teacher<'a> {
    /// The block.
    pub function: &'a dyn BlockFunction,
    /// Told after every step.
    pub progress: &'a (dyn Fn(Progress) + Sync),
}

impl Debug for Teacher<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Teacher").field("function", &self.function).finish_non_exhaustive()
    }
}
