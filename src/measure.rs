//! Evaluation block by block in bounded memory: all windows run through one block before the next is
//! loaded.

use std::path::Path;

use attar_eval::{Evaluation, Evaluator, Score};
use attar_formats::Windows;
use attar_ir::{Budget, Limits, Measured};
use attar_model::{BlockOps, Spill, Stream, embed, final_logits, run_block};
use attar_tensor::{Mat, Scratch};

use crate::{Error, compile::Measure, packed::Opened, progress};

/// Anonymous files in the temporary directory.
pub(crate) fn scratch() -> Scratch {
    Scratch::new(tempfile::tempfile)
}

/// Where activations and sums go within `limits`.
pub(crate) fn spill(limits: &Limits, scratch: &Scratch) -> Spill {
    let Limits { stream, beside, gram_on_scratch, .. } = *limits;
    Spill { limit: stream, beside, gram: gram_on_scratch, ..Spill::above(stream, scratch.clone()) }
}

/// Threads that could work: `asked`, the environment's, or one per core.
pub(crate) fn threads(asked: Option<usize>) -> usize {
    // Not rayon's own count, which would start its pool with that many threads.
    let set = std::env::var("RAYON_NUM_THREADS").ok().and_then(|value| value.parse().ok());
    asked
        .or(set)
        .filter(|&threads| threads > 0)
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, std::num::NonZero::get))
}

/// What a run is to keep to; `corpus` are files read as text, `folder` holds the tokenizer.
pub(crate) fn budget(
    memory: Option<u64>,
    threads: usize,
    folder: &Path,
    corpus: &[std::path::PathBuf],
    measure: Option<&Measure>,
) -> Budget {
    let bytes = |path: &Path| std::fs::metadata(path).map_or(0, |meta| meta.len() as usize);
    let read = |texts: &[std::path::PathBuf]| {
        let text: usize = texts.iter().map(|path| bytes(path)).sum();
        if texts.is_empty() { 0 } else { text + bytes(&folder.join("tokenizer.json")) }
    };
    let measured = measure.map(|measure| Measured {
        context: measure.context,
        tokens: bytes(&measure.text),
        corpus: read(std::slice::from_ref(&measure.text)),
    });
    let memory = memory.map(|bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
    Budget { memory, threads, corpus: read(corpus), measured }
}

fn hidden(model: &Opened, windows: &[Vec<u32>], spill: &Spill) -> Result<Stream, Error> {
    let lengths: Vec<usize> = windows.iter().map(Vec::len).collect();
    let decoder = &model.decoder;
    let mut stream = Stream::new(&lengths, decoder.spec.hidden, Some(spill))?;
    for (at, ids) in windows.iter().enumerate() {
        stream.write(at, &embed(decoder, model.numbers(), ids)?)?;
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
    spill: &Spill,
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
        let stream = hidden(opened, &inputs, spill)?;
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
