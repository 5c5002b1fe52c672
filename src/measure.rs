//! Evaluation block by block in bounded memory: all windows run through one block before the next is
//! loaded.

use std::sync::Arc;

use attar_eval::{Evaluation, Evaluator, Score};
use attar_formats::Windows;
use attar_model::{BlockOps, Spill, Stream, embed, final_logits, run_block};
use attar_tensor::Mat;

use crate::{Error, packed::Opened, progress};

/// Activations kept in memory; larger streams go to an anonymous file in the temporary directory.
pub(crate) const STREAM_LIMIT: usize = 192 << 20;

pub(crate) fn spill() -> Spill {
    Spill { limit: STREAM_LIMIT, open: Arc::new(tempfile::tempfile) }
}

fn hidden(model: &Opened, windows: &[Vec<u32>]) -> Result<Stream, Error> {
    let lengths: Vec<usize> = windows.iter().map(Vec::len).collect();
    let decoder = &model.decoder;
    let mut stream = Stream::new(&lengths, decoder.spec.hidden, Some(&spill()))?;
    for (at, ids) in windows.iter().enumerate() {
        stream.write(at, &embed(decoder, &model.checkpoint, ids)?)?;
    }
    let bar = progress::bar(decoder.spec.layers, "evaluating");
    for index in 0..decoder.spec.layers {
        let ops = BlockOps::load(decoder, index, model)?;
        run_block(decoder, index, &ops, &mut stream)?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(stream)
}

/// Measures `model` (against `reference`) and returns the logits of the first window too.
pub(crate) fn evaluate(
    model: &Opened,
    reference: Option<&Opened>,
    windows: &Windows,
    bos: Option<u32>,
    context: usize,
    score: Score,
) -> Result<(Evaluation, Mat), Error> {
    if let Some(reference) = reference
        && reference.decoder.spec.vocab != model.decoder.spec.vocab
    {
        return Err(format!(
            "the reference has a vocabulary of {}, the model of {}; they do not compare",
            reference.decoder.spec.vocab, model.decoder.spec.vocab
        )
        .into());
    }
    let mut inputs = windows.ids.clone();
    if let Some(bos) = bos {
        for window in &mut inputs {
            window[0] = bos;
        }
    }
    let run = |opened: &Opened| -> Result<_, Error> {
        let stream = hidden(opened, &inputs)?;
        let head = BlockOps::load(&opened.decoder, opened.decoder.spec.layers, opened)?;
        Ok((stream, head))
    };
    let (stream, head) = run(model)?;
    let original = reference.map(run).transpose()?;
    let mut evaluator = Evaluator::new(context, score);
    let mut first = None;
    for (at, ids) in windows.ids.iter().enumerate() {
        let logits = final_logits(&model.decoder, &head, &stream.read(at)?);
        let compare = match (&original, reference) {
            (Some((stream, head)), Some(reference)) => {
                Some(final_logits(&reference.decoder, head, &stream.read(at)?))
            }
            _ => None,
        };
        evaluator.add(&logits, compare.as_ref(), ids);
        if first.is_none() {
            first = Some(logits);
        }
    }
    let first = first.ok_or("no window to evaluate")?;
    Ok((evaluator.finish(0), first))
}
