//! Gradients of the next-token loss by the weights of every block, one block resident ([`crate::descent`]).
//!
//! Squares are of the gradient of each window. Memory beside the streams: four times the weights of a block (weights,
//! gradient of a window, sum, squares), tape and room of one window. `attar_ir` predicts it (`plan/predict/gradients.rs`).

use attar_ir::{Block, BlockGradients, BlockState, SiteGradient};
use attar_tensor::Mat;
use rayon::prelude::*;

use crate::{BlockGradient, Decoder, ModelError, Spill, WeightSource, descent::Descent};

/// Elements of a gradient per task.
const PIECE: usize = 1 << 14;

/// Runs all `windows` forward and backward through the model of `source` and hands each block to `visit`, the last one
/// first, with its weights and what the loss says of them. Returns the mean over windows of the mean loss of
/// their tokens, nats.
///
/// Windows of one token predict nothing and count as zeros.
///
/// # Errors
/// When a tensor cannot be read or a scratch file fails, and whatever `visit` says.
pub fn sweep_gradients<E: From<ModelError>>(
    decoder: &Decoder,
    source: &dyn WeightSource,
    windows: &[Vec<u32>],
    spill: Option<&Spill>,
    visit: &mut dyn FnMut(&Block, &BlockState, BlockGradients) -> Result<(), E>,
) -> Result<f64, E> {
    let tensors = source.tensors();
    let mut descent = Descent::new(decoder, source, windows, spill, &|| {})?;
    let loss = descent.head(tensors, false, &mut |_, _, _| {})?;
    for block in decoder.graph.blocks.iter().rev() {
        let state = decoder.load_block(block.index, tensors)?;
        let zeros = |site: &attar_ir::Site| Mat::zeros((site.out_features, site.in_features));
        let site = |site| SiteGradient { sum: zeros(site), squares: zeros(site) };
        let mut found = BlockGradients {
            windows: windows.len(),
            sites: block.sites.iter().map(site).collect(),
        };
        let mut own: Vec<Vec<f32>> =
            block.sites.iter().map(|site| vec![0.0; site.weights()]).collect();
        descent.block(block.index, tensors, &state, &mut |_, run| {
            run(&mut BlockGradient {
                linears: own.iter_mut().map(|own| Some(own.as_mut_slice())).collect(),
                input: block.index > 0,
                ..BlockGradient::input_only(block)
            });
            for (own, site) in own.iter_mut().zip(&mut found.sites) {
                add(own, site);
            }
        })?;
        visit(block, &state, found)?;
    }
    Ok(loss)
}

/// Adds the gradient of a window, and makes room for the next.
fn add(own: &mut [f32], site: &mut SiteGradient) {
    const LAYOUT: &str = "just made in standard layout";
    let sum = site.sum.as_slice_mut().expect(LAYOUT);
    let squares = site.squares.as_slice_mut().expect(LAYOUT);
    own.par_chunks_mut(PIECE)
        .zip(sum.par_chunks_mut(PIECE))
        .zip(squares.par_chunks_mut(PIECE))
        .for_each(|((own, sum), squares)| {
            for ((own, sum), square) in own.iter_mut().zip(sum).zip(squares) {
                *sum += *own;
                *square += *own * *own;
                *own = 0.0;
            }
        });
}
