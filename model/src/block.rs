//! Staged calibration: ONE forward per block serves statistics and propagation. The inputs of a block
//! are visited in data order (q/k/v, o, gate/up, down); between two visits the caller may change the
//! weights, and the next stage reads what the changed ones put out.

use std::time::{Duration, Instant};

use attar_ir::{BlockState, BlockStats, InputGroup, InputStats, Needs};
use attar_tensor::{TensorSource, linalg::GramAccumulator};
use rayon::prelude::*;

use crate::{
    Decoder, ModelError, Spill, Stream,
    attention::QkNorm,
    evaluate::{BlockOps, SITES_OF, Walk, add, release_buffers},
    rope::RopeTable,
};

/// Where the time of a block run went.
#[derive(Debug, Clone, Copy, Default)]
pub struct Timing {
    /// Linears, attention, norms.
    pub forward: Duration,
    /// Gram matrices and channel statistics.
    pub statistics: Duration,
}

/// Running sums of one input's statistics.
struct Observer {
    width: usize,
    needs: Needs,
    tokens: usize,
    gram: Option<GramAccumulator>,
    abs_max: Vec<f32>,
    abs_sum: Vec<f64>,
    square_sum: Vec<f64>,
}

impl Observer {
    fn new(width: usize, needs: Needs, spill: Option<&Spill>) -> Result<Self, ModelError> {
        let hessian = needs.contains(Needs::HESSIAN);
        let scratch = spill.filter(|spill| spill.gram).map(|spill| &spill.scratch);
        let gram = hessian.then(|| GramAccumulator::with_scratch(width, scratch)).transpose()?;
        Ok(Self {
            width,
            needs,
            tokens: 0,
            gram,
            abs_max: vec![0.0; width],
            abs_sum: vec![0.0; width],
            square_sum: vec![0.0; width],
        })
    }

    fn add(&mut self, x: &[f32]) -> Result<(), ModelError> {
        self.tokens += x.len() / self.width;
        if let Some(gram) = &mut self.gram {
            gram.add(x)?;
        }
        if self.needs.intersects(Needs::ABS_MAX | Needs::ABS_MEAN | Needs::SQUARE_SUM) {
            for row in x.chunks(self.width) {
                for (c, &v) in row.iter().enumerate() {
                    self.abs_max[c] = self.abs_max[c].max(v.abs());
                    self.abs_sum[c] += f64::from(v.abs());
                    self.square_sum[c] += f64::from(v) * f64::from(v);
                }
            }
        }
        Ok(())
    }

    fn finish(self) -> Result<InputStats, ModelError> {
        let n = self.tokens.max(1) as f64;
        Ok(InputStats {
            tokens: self.tokens,
            abs_max: self.needs.contains(Needs::ABS_MAX).then_some(self.abs_max),
            abs_mean: self
                .needs
                .contains(Needs::ABS_MEAN)
                .then(|| self.abs_sum.iter().map(|sum| (sum / n) as f32).collect()),
            square_sum: self.needs.contains(Needs::SQUARE_SUM).then_some(self.square_sum),
            hessian: self.gram.map(|gram| gram.finish(2.0 / n)).transpose()?,
        })
    }
}

/// One block being calibrated; the stream advances through it.
pub struct BlockRun<'a> {
    decoder: &'a Decoder,
    index: usize,
    stream: &'a mut Stream,
    /// Attention output at stage 1, MLP activation at stage 3.
    mid: Option<Stream>,
    stage: usize,
    rope: RopeTable,
    qk_norm: QkNorm,
    spill: Option<Spill>,
    /// Where the time went so far.
    pub timing: Timing,
}

impl std::fmt::Debug for BlockRun<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BlockRun").field("index", &self.index).field("stage", &self.stage).finish()
    }
}

impl<'a> BlockRun<'a> {
    /// Begins a block (or the epilogue) at its input.
    ///
    /// # Errors
    /// When the norms of queries and keys cannot be read.
    pub fn begin(
        decoder: &'a Decoder,
        index: usize,
        source: &dyn TensorSource,
        stream: &'a mut Stream,
        spill: Option<Spill>,
    ) -> Result<Self, ModelError> {
        let positions = stream.lengths().into_iter().max().unwrap_or(0);
        Ok(Self {
            rope: RopeTable::new(decoder.spec.rope, decoder.spec.head_dim, positions),
            qk_norm: decoder.load_qk_norm(index, source)?,
            decoder,
            index,
            stream,
            mid: None,
            stage: 0,
            spill,
            timing: Timing::default(),
        })
    }

    /// Statistics of input group `stage`, computed with the weights as they stand in `state`. Stages
    /// must be visited in order; those left out are run on the way.
    ///
    /// # Errors
    /// When spilled activations cannot be read or written.
    ///
    /// # Panics
    /// When a stage is visited after a later one.
    pub fn observe(
        &mut self,
        stage: usize,
        state: &BlockState,
        needs: Needs,
    ) -> Result<InputStats, ModelError> {
        let width = self.decoder.block(self.index).inputs[stage].width;
        let mut observer = Observer::new(width, needs, self.spill.as_ref())?;
        self.advance(stage, state, Some(&mut observer))?;
        observer.finish()
    }

    /// Runs what remains, so that the stream holds the block's output.
    ///
    /// # Errors
    /// When spilled activations cannot be read or written.
    pub fn finish(mut self, state: &BlockState) -> Result<Timing, ModelError> {
        if self.index < self.decoder.spec.layers {
            self.advance(4, state, None)?;
        }
        Ok(self.timing)
    }

    fn advance(
        &mut self,
        to: usize,
        state: &BlockState,
        mut observer: Option<&mut Observer>,
    ) -> Result<(), ModelError> {
        let from = self.stage;
        assert!(from <= to, "stages are visited in data order");
        if from == to && observer.is_none() {
            return Ok(());
        }
        let started = Instant::now();
        let wanted: Vec<usize> = SITES_OF[from..to].concat();
        let ops = BlockOps::from_state(state, &wanted, &self.qk_norm);
        let walk = Walk { decoder: self.decoder, index: self.index, rope: &self.rope };
        let has_mid = |stage: usize| stage == 1 || stage == 3;
        let old_mid = self.mid.take();
        let width = |stage: usize| self.decoder.block(self.index).inputs[stage].width;
        let mut new_mid = if from != to && to < 4 && has_mid(to) {
            Some(self.stream.beside(width(to), self.spill.as_ref())?)
        } else {
            None
        };
        self.timing.forward += started.elapsed();
        let batch = rayon::current_num_threads().min(self.stream.windows());
        // Of each window at work: room for it where it is not borrowed, and what is made of it.
        let mut slots = vec![(Vec::new(), Vec::new()); batch];
        let mut normed = Vec::new();
        for first in (0..self.stream.windows()).step_by(batch.max(1)) {
            let started = Instant::now();
            let last = (first + batch).min(self.stream.windows());
            let (stream, mid) = (&*self.stream, &old_mid);
            let slots = &mut slots[..last - first];
            slots.par_iter_mut().enumerate().try_for_each(|(at, (buffer, made))| {
                let window = first + at;
                if to == from + 1 {
                    let input = mid.as_ref().unwrap_or(stream).window(window, buffer)?;
                    walk.transit(from, &ops, input, made);
                    return Ok(());
                }
                if let Some(mid) = mid {
                    mid.read_into(window, made)?;
                }
                if from < to {
                    stream.read_into(window, buffer)?;
                }
                for stage in from..to {
                    walk.step(stage, &ops, buffer, made);
                }
                Ok::<_, std::io::Error>(())
            })?;
            for (window, (buffer, made)) in (first..last).zip(&mut *slots) {
                // Only the transitions out of stages 1 and 3 add to the residual stream.
                if to == from + 1 && from % 2 == 1 {
                    self.stream.update(window, buffer, |x| add(x, made))?;
                } else if to > from + 1 {
                    self.stream.write(window, buffer)?;
                }
                if let Some(mid) = &mut new_mid {
                    mid.write(window, made)?;
                }
            }
            self.timing.forward += started.elapsed();
            let started = Instant::now();
            if let Some(observer) = &mut observer {
                for (window, (buffer, made)) in (first..last).zip(&mut *slots) {
                    match to {
                        0 | 2 => {
                            let x = self.stream.window(window, buffer)?;
                            walk.norm_into(&ops.norms[to / 2], x, &mut normed);
                            observer.add(&normed)?;
                        }
                        _ => observer.add(made)?,
                    }
                }
            }
            self.timing.statistics += started.elapsed();
        }
        release_buffers();
        self.mid = if from == to {
            old_mid
        } else {
            if let Some(old) = old_mid {
                old.end(self.spill.as_ref());
            }
            new_mid
        };
        self.stage = to;
        Ok(())
    }
}

/// Statistics of every input of a block with the weights as they stand; the stream is left alone.
///
/// # Errors
/// When activations cannot be read.
pub fn observe_block(
    decoder: &Decoder,
    index: usize,
    source: &dyn TensorSource,
    state: &BlockState,
    stream: &Stream,
    needs: Needs,
    spill: Option<&Spill>,
) -> Result<(BlockStats, Timing), ModelError> {
    let mut timing = Timing::default();
    let block = decoder.block(index);
    let qk_norm = decoder.load_qk_norm(index, source)?;
    let positions = stream.lengths().into_iter().max().unwrap_or(0);
    let rope = RopeTable::new(decoder.spec.rope, decoder.spec.head_dim, positions);
    let walk = Walk { decoder, index, rope: &rope };
    let stages = block.inputs.len();
    let wanted: Vec<usize> = (0..block.sites.len()).collect();
    let ops = BlockOps::from_state(state, &wanted, &qk_norm);
    let observer = |input: &InputGroup| Observer::new(input.width, needs, spill);
    let mut observers: Vec<_> =
        block.inputs.iter().map(observer).collect::<Result<_, ModelError>>()?;
    let batch = rayon::current_num_threads();
    for first in (0..stream.windows()).step_by(batch) {
        let started = Instant::now();
        let last = (first + batch).min(stream.windows());
        let inputs: Vec<Vec<Vec<f32>>> = (first..last)
            .into_par_iter()
            .map(|window| {
                let (mut x, mut mid) = (stream.read(window)?, Vec::new());
                let mut inputs = Vec::with_capacity(stages);
                for stage in 0..stages {
                    inputs.push(match stage {
                        0 | 2 => walk.norm(&ops.norms[stage / 2], &x),
                        _ => mid.clone(),
                    });
                    if stage + 1 < stages {
                        walk.step(stage, &ops, &mut x, &mut mid);
                    }
                }
                Ok(inputs)
            })
            .collect::<Result<_, std::io::Error>>()?;
        timing.forward += started.elapsed();
        let started = Instant::now();
        for inputs in &inputs {
            for (observer, x) in observers.iter_mut().zip(inputs) {
                observer.add(x)?;
            }
        }
        timing.statistics += started.elapsed();
    }
    release_buffers();
    let inputs =
        observers.into_iter().map(|o| o.finish().map(Some)).collect::<Result<_, ModelError>>()?;
    Ok((BlockStats { inputs, gradients: None }, timing))
}
