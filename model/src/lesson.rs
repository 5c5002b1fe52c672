//! A block with what it is to learn from: inputs of every window, and what the original block made of the original
//! ones. The loss of some windows is the mean of `(y − t)²` over their tokens and channels, f32 differences, sums in
//! f64. Windows of a step are cut into [`LANES`] fixed parts, whose derivatives are added in their order, so that the
//! number of threads does not change bits.

use std::sync::Mutex;

use attar_ir::{BlockFunction, BlockValues, PassError, Wanted};
use attar_tensor::{Mat, TensorSource};
use rayon::prelude::*;

use crate::{
    BlockGradient, BlockWeights, Decoder, Differentiable, ModelError, QkNorm, Space, Stream, Tape,
};

/// Parts of a step; each holds derivatives of its own.
pub const LANES: usize = 2;

/// Memory of one part, used again.
#[derive(Debug, Default)]
struct Room {
    input: Vec<f32>,
    target: Vec<f32>,
    output: Vec<f32>,
    lengths: Vec<usize>,
    buffer: Vec<f32>,
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
    rooms: Mutex<Vec<Room>>,
}

impl<'a> Lesson<'a> {
    /// Block `index`, to which `inputs` come and which is to put out `targets`.
    ///
    /// # Errors
    /// When the norms of queries and keys cannot be read.
    pub fn new(
        decoder: &'a Decoder,
        index: usize,
        source: &dyn TensorSource,
        inputs: &'a Stream,
        targets: &'a Stream,
    ) -> Result<Self, ModelError> {
        let positions = inputs.lengths().into_iter().max().unwrap_or(0);
        Ok(Self {
            index,
            blocks: Differentiable::new(decoder, positions),
            qk_norm: decoder.load_qk_norm(index, source)?,
            inputs,
            targets,
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

    /// Squared error of some windows and the number of elements; `room.output` holds the differences.
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
        Ok(differ(output, target))
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

    fn elements(&self, windows: &[usize]) -> f64 {
        let lengths = self.inputs.lengths();
        let tokens: usize = windows.iter().map(|&window| lengths[window]).sum();
        (tokens * self.inputs.width()).max(1) as f64
    }

    fn give_back(&self, rooms: impl IntoIterator<Item = Room>) {
        self.rooms.lock().expect("nobody panics with it").extend(rooms);
    }
}

fn slice(weight: &Mat) -> &[f32] {
    weight.as_slice().expect("weights are in standard layout")
}

/// `made −= wanted`, and the sum of the squares.
fn differ(made: &mut [f32], wanted: &[f32]) -> f64 {
    const PIECE: usize = 4096;
    let mut sum = 0.0;
    for (made, wanted) in made.chunks_mut(PIECE).zip(wanted.chunks(PIECE)) {
        for (made, wanted) in made.iter_mut().zip(wanted) {
            *made -= wanted;
        }
        sum += f64::from(attar_tensor::linalg::sum_sq(made));
    }
    sum
}

impl BlockFunction for Lesson<'_> {
    fn windows(&self) -> usize {
        self.inputs.windows()
    }

    fn power(&self) -> Result<f64, PassError> {
        let mut room = Room::default();
        let (mut sum, all) = (0.0, (0..self.windows()).collect::<Vec<_>>());
        for window in &all {
            self.read(&mut room, &[*window]).map_err(PassError::Activations)?;
            sum += differ(&mut room.input, &room.target);
        }
        Ok(sum / self.elements(&all))
    }

    fn loss(&self, weights: &BlockValues, windows: &[usize]) -> Result<f64, PassError> {
        /// Windows that one part runs at once.
        const TOGETHER: usize = 4;
        let mut sum = 0.0;
        for some in windows.chunks(LANES * TOGETHER) {
            let made = self.parts(some, |room, part| self.errors(room, weights, part, false))?;
            let (errors, rooms): (Vec<f64>, Vec<Room>) = made.into_iter().unzip();
            sum += errors.iter().sum::<f64>();
            self.give_back(rooms);
        }
        Ok(sum / self.elements(windows))
    }

    fn gradient(
        &self,
        weights: &BlockValues,
        windows: &[usize],
        wanted: Wanted,
        gradient: &mut BlockValues,
    ) -> Result<f64, PassError> {
        let elements = self.elements(windows);
        let made = self.parts(windows, |room, part| {
            let error = self.errors(room, weights, part, true)?;
            let scale = (2.0 / elements) as f32;
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
            for (at_tensor, (to, from)) in
                gradient.tensors_mut().zip(part.tensors_mut()).enumerate()
            {
                let linear = at_tensor < weights.linears.len();
                if !(if linear { wanted.linears } else { wanted.vectors }) {
                    continue;
                }
                if at == 0 {
                    to.copy_from_slice(from);
                } else {
                    attar_tensor::linalg::axpy(1.0, from, to);
                }
            }
            self.give_back([room]);
        }
        Ok(sum / elements)
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
