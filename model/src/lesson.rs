//! A block with what it is to learn from: inputs of every window, and what the original block made of the original
//! ones. The loss of some windows is a mean over their tokens. Of a block between others it is `‖y − t‖² / ‖t‖²`:
//! a norm follows on every path, so that only the relative error of a token goes on, and the few tokens whose stream
//! is a hundred times longer than the others' do not decide alone. Of the last block it is the divergence of what
//! the output head makes of both, `Σ p (log p − log q)`. f32 differences, sums in f64. Windows of a step are cut into [`LANES`] fixed parts, whose derivatives are added in their order, so that the
//! number of threads does not change bits.

use std::sync::Mutex;

use attar_ir::{BlockFunction, BlockValues, PassError, Wanted};
use attar_tensor::{
    Mat, TensorSource,
    linalg::{axpy, dot, exp_in_place, sum_sq},
};
use rayon::prelude::*;

use crate::{
    BlockGradient, BlockWeights, Decoder, Differentiable, ModelError, QkNorm, Space, Stream, Tape,
};

/// Parts of a step; each holds derivatives of its own.
pub const LANES: usize = 2;

/// Tokens whose logits are held at once.
const LOGIT_ROWS: usize = 128;

/// Memory of one part, used again.
#[derive(Debug, Default)]
struct Room {
    input: Vec<f32>,
    target: Vec<f32>,
    output: Vec<f32>,
    lengths: Vec<usize>,
    buffer: Vec<f32>,
    normed: Vec<f32>,
    logits: Vec<f32>,
    wanted: Vec<f32>,
    tape: Tape,
    space: Space,
    gradient: Option<BlockValues>,
}

/// A block, its inputs, and its teacher's outputs.
#[derive(Debug)]
pub struct Lesson<'a> {
    index: usize,
    blocks: Differentiable<'a>,
    qk_norm: QkNorm,
    inputs: &'a Stream,
    targets: &'a Stream,
    head: Option<BlockValues>,
    rooms: Mutex<Vec<Room>>,
}

impl<'a> Lesson<'a> {
    /// Block `index`, to which `inputs` come and which is to put out `targets`; `head` is given with the last block, where
    /// logits are to be compared.
    ///
    /// # Errors
    /// When the norms of queries and keys cannot be read.
    pub fn new(
        decoder: &'a Decoder,
        index: usize,
        source: &dyn TensorSource,
        inputs: &'a Stream,
        targets: &'a Stream,
        head: Option<BlockValues>,
    ) -> Result<Self, ModelError> {
        let positions = inputs.lengths().into_iter().max().unwrap_or(0);
        Ok(Self {
            index,
            blocks: Differentiable::new(decoder, positions),
            qk_norm: decoder.load_qk_norm(index, source)?,
            inputs,
            targets,
            head,
            rooms: Mutex::default(),
        })
    }

    /// Reads the inputs and targets of some windows, one after the other.
    fn read(&self, room: &mut Room, windows: &[usize]) -> std::io::Result<()> {
        let lengths = self.inputs.lengths();
        room.lengths.clear();
        room.lengths.extend(windows.iter().map(|&window| lengths[window]));
        for (stream, all) in [(self.inputs, &mut room.input), (self.targets, &mut room.target)] {
            all.clear();
            for &window in windows {
                all.extend_from_slice(stream.window(window, &mut room.buffer)?);
            }
        }
        Ok(())
    }

    fn weights<'b>(&'b self, values: &'b BlockValues) -> BlockWeights<'b> {
        BlockWeights {
            linears: values.linears.iter().map(slice).collect(),
            biases: values.biases.iter().map(Option::as_deref).collect(),
            norms: values.norms.iter().map(Vec::as_slice).collect(),
            qk_norm: self.qk_norm.as_ref().map(|(q, k)| (q.as_slice(), k.as_slice())),
        }
    }

    /// Sum of the losses of some windows' tokens; `room.output` becomes its derivative by what is put out when
    /// `taped`.
    fn errors(
        &self,
        room: &mut Room,
        values: &BlockValues,
        windows: &[usize],
        taped: bool,
    ) -> std::io::Result<f64> {
        self.read(room, windows)?;
        let Room { input, target, output, lengths, tape, space, .. } = room;
        let tape = taped.then_some(tape);
        let weights = self.weights(values);
        self.blocks.forward(self.index, &weights, lengths, input, tape, space, output);
        let Some(head) = &self.head else {
            return Ok(differ(output, target, self.inputs.width()));
        };
        Ok(self.diverge(head, room, taped))
    }

    /// Divergence of the head's logits, summed over tokens, and its derivative into `room.output`.
    fn diverge(&self, head: &BlockValues, room: &mut Room, taped: bool) -> f64 {
        let width = self.inputs.width();
        let Room { target, output, normed, logits, wanted, space, .. } = room;
        let weights = BlockWeights { qk_norm: None, ..self.weights(head) };
        let mut nothing = BlockGradient {
            linears: vec![None],
            biases: vec![None],
            norms: vec![None],
            qk_norm: None,
            input: true,
        };
        let mut sum = 0.0;
        let pieces = output.chunks_mut(LOGIT_ROWS * width).zip(target.chunks(LOGIT_ROWS * width));
        for (made, target) in pieces {
            self.blocks.head_forward(&weights, target, space, normed, wanted);
            self.blocks.head_forward(&weights, made, space, normed, logits);
            let vocab = wanted.len() / (target.len() / width);
            let rows = logits.par_chunks_mut(vocab).zip(wanted.par_chunks_mut(vocab));
            let losses: Vec<f64> =
                rows.map_init(Vec::new, |room, (q, p)| divergence(q, p, room)).collect();
            sum += losses.iter().sum::<f64>();
            if taped {
                let x = made.to_vec();
                made.fill(0.0);
                self.blocks.head_backward(
                    &weights,
                    (&x, normed),
                    logits,
                    &mut nothing,
                    space,
                    made,
                );
            }
        }
        sum
    }

    /// Runs `work` on each part of `windows`, with a room of its own.
    fn parts<T: Send>(
        &self,
        windows: &[usize],
        work: impl Fn(&mut Room, &[usize]) -> std::io::Result<T> + Sync,
    ) -> Result<Vec<(T, Room)>, PassError> {
        let size = windows.len().div_ceil(LANES).max(1);
        windows
            .par_chunks(size)
            .map(|part| {
                let spare = self.rooms.lock().expect("nobody panics with it").pop();
                let mut room = spare.unwrap_or_default();
                work(&mut room, part).map(|made| (made, room))
            })
            .collect::<std::io::Result<Vec<_>>>()
            .map_err(PassError::Activations)
    }

    fn tokens(&self, windows: &[usize]) -> f64 {
        let lengths = self.inputs.lengths();
        windows.iter().map(|&window| lengths[window]).sum::<usize>().max(1) as f64
    }

    fn give_back(&self, rooms: impl IntoIterator<Item = Room>) {
        self.rooms.lock().expect("nobody panics with it").extend(rooms);
    }
}

fn slice(weight: &Mat) -> &[f32] {
    weight.as_slice().expect("weights are in standard layout")
}

/// Sum over tokens of `‖y − t‖² / ‖t‖²`; `made` becomes its derivative.
fn differ(made: &mut [f32], wanted: &[f32], width: usize) -> f64 {
    let mut sum = 0.0;
    for (made, wanted) in made.chunks_mut(width).zip(wanted.chunks(width)) {
        let inverse = 1.0 / sum_sq(wanted).max(f32::MIN_POSITIVE);
        for (made, wanted) in made.iter_mut().zip(wanted) {
            *made -= wanted;
        }
        sum += f64::from(sum_sq(made) * inverse);
        for d in made.iter_mut() {
            *d *= 2.0 * inverse;
        }
    }
    sum
}

/// `Σ p (log p − log q)` of a token whose logits are given; q's become the derivative by them, p's the probabilities.
fn divergence(q: &mut [f32], p: &mut [f32], room: &mut Vec<f32>) -> f64 {
    room.clear();
    room.extend(p.iter().zip(&*q).map(|(p, q)| p - q));
    let (of_p, of_q) = (probabilities(p), probabilities(q));
    // Logits and their sums apart, so that what is alike cancels.
    let sum = f64::from(dot(p, room)) - (of_p - of_q);
    axpy(-1.0, p, q);
    sum
}

/// Makes probabilities of logits; returns the logarithm of the sum of their exponentials.
pub(crate) fn probabilities(row: &mut [f32]) -> f64 {
    let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for v in row.iter_mut() {
        *v -= top;
    }
    exp_in_place(row);
    let sum: f64 = row.chunks(256).map(|part| f64::from(part.iter().sum::<f32>())).sum();
    let inverse = (1.0 / sum) as f32;
    for v in row.iter_mut() {
        *v *= inverse;
    }
    f64::from(top) + sum.ln()
}

impl BlockFunction for Lesson<'_> {
    fn windows(&self) -> usize {
        self.inputs.windows()
    }

    fn power(&self) -> Result<f64, PassError> {
        if self.head.is_some() {
            return Ok(1.0);
        }
        let mut room = Room::default();
        let (mut sum, all) = (0.0, (0..self.windows()).collect::<Vec<_>>());
        for window in &all {
            self.read(&mut room, &[*window]).map_err(PassError::Activations)?;
            sum += differ(&mut room.input, &room.target, self.inputs.width());
        }
        Ok(sum / self.tokens(&all))
    }

    fn loss(&self, weights: &BlockValues, windows: &[usize]) -> Result<f64, PassError> {
        /// Windows that one part runs at once.
        const TOGETHER: usize = 2;
        let mut sum = 0.0;
        for some in windows.chunks(LANES * TOGETHER) {
            let made = self.parts(some, |room, part| self.errors(room, weights, part, false))?;
            let (errors, rooms): (Vec<f64>, Vec<Room>) = made.into_iter().unzip();
            sum += errors.iter().sum::<f64>();
            self.give_back(rooms);
        }
        Ok(sum / self.tokens(windows))
    }

    fn gradient(
        &self,
        weights: &BlockValues,
        windows: &[usize],
        wanted: Wanted,
        gradient: &mut BlockValues,
    ) -> Result<f64, PassError> {
        let tokens = self.tokens(windows);
        let made = self.parts(windows, |room, part| {
            let error = self.errors(room, weights, part, true)?;
            let scale = (1.0 / tokens) as f32;
            room.output.iter_mut().for_each(|d| *d *= scale);
            let own = room.gradient.get_or_insert_with(|| weights.zeros());
            own.tensors_mut().for_each(|tensor| tensor.fill(0.0));
            let Room { input, output, lengths, tape, space, .. } = room;
            let mut places = places(own, wanted);
            let weights = self.weights(weights);
            let given = (input.as_slice(), output.as_mut_slice());
            self.blocks.backward(
                self.index,
                &weights,
                lengths,
                given.0,
                tape,
                &mut places,
                space,
                given.1,
            );
            Ok(error)
        })?;
        let mut sum = 0.0;
        for (at, (error, mut room)) in made.into_iter().enumerate() {
            sum += error;
            let part = room.gradient.as_mut().expect("it was just made");
            if wanted.linears {
                let linears = gradient.linears.par_iter_mut().zip(&mut part.linears);
                linears.for_each(|(to, from)| join(at, to, from));
            }
            if wanted.vectors {
                let biases = gradient.biases.iter_mut().zip(&mut part.biases);
                let biases = biases.filter_map(|(to, from)| Some((to.as_mut()?, from.as_mut()?)));
                for (to, from) in biases.chain(gradient.norms.iter_mut().zip(&mut part.norms)) {
                    if at == 0 {
                        std::mem::swap(to, from);
                    } else {
                        axpy(1.0, from, to);
                    }
                }
            }
            self.give_back([room]);
        }
        Ok(sum / tokens)
    }
}

/// The derivatives of the first part become those of all, others are added.
fn join(part: usize, to: &mut Mat, from: &mut Mat) {
    if part == 0 {
        std::mem::swap(to, from);
    } else {
        axpy(1.0, slice(from), to.as_slice_mut().expect("weights are in standard layout"));
    }
}

/// Where derivatives go.
fn places(values: &mut BlockValues, wanted: Wanted) -> BlockGradient<'_> {
    let linears = values.linears.iter_mut();
    BlockGradient {
        linears: linears
            .map(|weight| wanted.linears.then(|| weight.as_slice_mut().expect("standard layout")))
            .collect(),
        biases: values
            .biases
            .iter_mut()
            .map(|bias| bias.as_mut().filter(|_| wanted.vectors).map(Vec::as_mut_slice))
            .collect(),
        norms: values
            .norms
            .iter_mut()
            .map(|norm| wanted.vectors.then_some(norm.as_mut_slice()))
            .collect(),
        qk_norm: None,
        input: false,
    }
}
