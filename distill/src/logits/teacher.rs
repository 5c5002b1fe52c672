//! A teacher that is followed block by block.

use std::collections::BTreeMap;

use attar_ir::PassError;
use attar_model::{BlockOps, Decoder, ModelError, Stream, embed, run_block};
use attar_tensor::{SourceError, TensorHeader, TensorSource, TensorView};

/// A teacher's final norm and head, and the streams that leave its last block (and some before) for some windows.
pub(super) struct Teacher<'a> {
    pub(super) decoder: Decoder,
    pub(super) source: &'a dyn TensorSource,
    pub(super) norm: Vec<f32>,
    pub(super) head: Vec<f32>,
    /// Blocks before the last whose streams are kept too, rising.
    pub(super) taps: Vec<usize>,
    /// By window: what leaves each of the taps, then what leaves the last block.
    pub(super) streams: BTreeMap<usize, Vec<Vec<f32>>>,
}

/// A source behind a reference, for what asks for a type of known size.
struct Tensors<'a>(&'a dyn TensorSource);

impl TensorSource for Tensors<'_> {
    fn headers(&self) -> &[TensorHeader] {
        self.0.headers()
    }

    fn read(&self, name: &str) -> Result<TensorView<'_>, SourceError> {
        self.0.read(name)
    }

    fn read_row(&self, name: &str, row: usize) -> Result<TensorView<'_>, SourceError> {
        self.0.read_row(name, row)
    }

    fn release(&self, name: &str) {
        self.0.release(name);
    }
}

/// An error as passes tell it.
pub(super) fn failed(site: &str, error: impl std::fmt::Display) -> PassError {
    PassError::Numeric { site: site.to_owned(), reason: error.to_string() }
}

impl<'a> Teacher<'a> {
    pub(super) fn read(
        config: &serde_json::Value,
        source: &'a dyn TensorSource,
    ) -> Result<Self, PassError> {
        let of = |error: ModelError| failed("teacher", error);
        let decoder = Decoder::read(config, source).map_err(of)?;
        let state = decoder.load_block(decoder.spec.layers, source).map_err(of)?;
        let norm = state.norms[0].clone();
        let head = state.linears[0].weight.values().iter().copied().collect();
        Ok(Self { decoder, source, norm, head, taps: Vec::new(), streams: BTreeMap::new() })
    }

    /// Runs the windows that are not there yet through all blocks, in place of those that were.
    pub(super) fn follow(
        &mut self,
        wanted: &[usize],
        windows: &[Vec<u32>],
    ) -> Result<(), PassError> {
        let of = |error: ModelError| failed("teacher", error);
        let io = |error: std::io::Error| failed("teacher", error);
        let lengths: Vec<usize> = wanted.iter().map(|&at| windows[at].len()).collect();
        self.streams.clear();
        let mut stream = Stream::new(&lengths, self.decoder.spec.hidden, None).map_err(io)?;
        for (place, &at) in wanted.iter().enumerate() {
            let x = embed(&self.decoder, self.source, &windows[at]).map_err(of)?;
            stream.write(place, &x).map_err(io)?;
        }
        for index in 0..self.decoder.spec.layers {
            let ops = BlockOps::load(&self.decoder, index, &Tensors(self.source)).map_err(of)?;
            run_block(&self.decoder, index, &ops, &mut stream).map_err(of)?;
            if self.taps.contains(&index) || index + 1 == self.decoder.spec.layers {
                for (place, &at) in wanted.iter().enumerate() {
                    let left = stream.read(place).map_err(io)?;
                    self.streams.entry(at).or_default().push(left);
                }
            }
        }
        Ok(())
    }
}
