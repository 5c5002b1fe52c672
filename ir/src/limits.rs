//! What a memory budget means for a run: how many threads work at once, and what lies on scratch.

use serde::Serialize;

/// Residual or inner activations kept in memory when no budget is given, bytes.
pub const STREAM_IN_MEMORY: usize = 192 << 20;

/// How a run keeps to its budget. Results do not depend on it: neither threads nor where numbers lie change
/// bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Limits {
    /// Threads at work; each holds windows of activations, tiles of rows and strips of products.
    pub threads: usize,
    /// Largest residual stream kept in memory, bytes; a larger one lies on scratch as a whole.
    pub stream: usize,
    /// The same for what lies beside it inside a block (attention output, MLP activation).
    pub beside: usize,
    /// Sums of Hessians lie on scratch and pass through memory line by line.
    pub gram_on_scratch: bool,
    /// Factors of Hessians lie on scratch and pass through memory panel by panel.
    pub factor_on_scratch: bool,
}

impl Limits {
    /// Limits of a run without a budget.
    pub const fn unbounded(threads: usize) -> Self {
        Self {
            threads,
            stream: STREAM_IN_MEMORY,
            beside: STREAM_IN_MEMORY,
            gram_on_scratch: false,
            factor_on_scratch: false,
        }
    }

    /// All ways to save memory, from the fastest to the leanest.
    pub(crate) fn ladder(threads: usize) -> Vec<Self> {
        let place = |scratch: bool| if scratch { 0 } else { usize::MAX };
        let mut ladder = Vec::new();
        let mut now = threads.max(1);
        loop {
            for bits in 0..16u8 {
                let on = |bit: u8| bits & bit != 0;
                ladder.push(Self {
                    threads: now,
                    stream: place(on(2)),
                    beside: place(on(1)),
                    gram_on_scratch: on(8),
                    factor_on_scratch: on(4),
                });
            }
            if now == 1 {
                return ladder;
            }
            now = now.div_ceil(2);
        }
    }
}

/// What a plan is to keep to, and what it cannot know from the checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Resident peak allowed, bytes; `None` spills only what is large.
    pub memory: Option<usize>,
    /// Threads that could work.
    pub threads: usize,
    /// Bytes of tokenizer and text read before the first block.
    pub corpus: usize,
    /// Accuracy is measured afterwards.
    pub measured: Option<Measured>,
}

impl Default for Budget {
    fn default() -> Self {
        Self { memory: None, threads: 1, corpus: 0, measured: None }
    }
}

/// Shape of a measurement of accuracy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measured {
    /// Tokens per window.
    pub context: usize,
    /// Tokens at most (bytes of the text).
    pub tokens: usize,
    /// Bytes of tokenizer and text.
    pub corpus: usize,
}
