//! `attar imatrix`: sums of squares of every linear's input on a text, as llama.cpp's importance matrix.

use std::collections::BTreeMap;

use attar_formats::{
    Checkpoint, CorpusSource, corpus,
    gguf::{Imatrix, imatrix::Entry},
};
use attar_ir::Needs;
use attar_model::{BlockRun, Decoder, Stream, embed};
use attar_tensor::TensorSource;

use crate::{Error, args, importance, measure, progress};

/// Windows of the text, with the beginning-of-sequence token in the first slot of each when asked for.
fn windows(
    args: &args::Imatrix,
    checkpoint: &Checkpoint,
    decoder: &Decoder,
) -> Result<Vec<Vec<u32>>, Error> {
    let spec = &decoder.spec;
    if args.context < 2 || args.context > spec.context {
        return Err(format!(
            "--context {} is outside 2..={}, the model's context",
            args.context, spec.context
        )
        .into());
    }
    let text = args.ids.is_none();
    let tokenizer = if text || args.bos { Some(checkpoint.tokenizer()?) } else { None };
    let source = match &args.ids {
        Some(ids) => CorpusSource::Ids(ids.clone()),
        None if args.text.is_empty() => return Err("give --text or --ids".into()),
        None => CorpusSource::Text(args.text.clone()),
    };
    let found =
        corpus::evaluation(&source, tokenizer.as_ref(), args.context, args.samples, spec.vocab)?;
    let mut ids = found.ids;
    if ids.is_empty() {
        return Err("there is no window to count over".into());
    }
    if args.bos {
        let bos = tokenizer.as_ref().and_then(|tokenizer| tokenizer.bos);
        let bos = bos.ok_or("--bos, but the model names no bos_token_id")?;
        for window in &mut ids {
            window[0] = bos;
        }
    }
    Ok(ids)
}

/// Runs every window through the model, block by block.
pub(crate) fn collect(args: &args::Imatrix) -> Result<bool, Error> {
    attar_formats::give_freed_memory_back();
    let checkpoint = Checkpoint::open_dense(&args.checkpoint, crate::gguf::dequantize)?;
    if checkpoint.config().get("quantization_config").is_some() {
        return Err(format!(
            "{} is quantized already; importances are those of the original model",
            args.checkpoint.display()
        )
        .into());
    }
    let decoder = Decoder::read(checkpoint.config(), &checkpoint)
        .map_err(|error| format!("{}: {error}", args.checkpoint.display()))?;
    let windows = windows(args, &checkpoint, &decoder)?;
    let limits = attar_ir::Limits::unbounded(measure::threads(None));
    let spill = measure::spill(&limits, &measure::scratch());
    let lengths: Vec<usize> = windows.iter().map(Vec::len).collect();
    let mut stream = Stream::new(&lengths, decoder.spec.hidden, Some(&spill))?;
    for (at, ids) in windows.iter().enumerate() {
        stream.write(at, &embed(&decoder, &checkpoint, ids)?)?;
    }
    checkpoint.release(&decoder.graph.embedding);
    let mut entries = BTreeMap::new();
    let bar = progress::bar(decoder.spec.layers, "counting");
    for block in decoder.graph.all_blocks() {
        if block.attention.is_none() && !args.process_output {
            continue;
        }
        let state = decoder.load_block(block.index, &checkpoint)?;
        let mut run =
            BlockRun::begin(&decoder, block.index, &checkpoint, &mut stream, Some(spill.clone()))?;
        for (input, group) in block.inputs.iter().enumerate() {
            let stats = run.observe(input, &state, Needs::SQUARE_SUM)?;
            let sums = stats.square_sum.ok_or("sums of squares were asked for")?;
            let sums: Vec<f32> = sums.iter().map(|&sum| sum as f32).collect();
            if let Some(at) = sums.iter().position(|sum| !sum.is_finite()) {
                let (sum, what) = (sums[at], group.name);
                return Err(format!(
                    "{}the {what} sums to {sum} in channel {at}; the model does not compute finite numbers on this text",
                    block.prefix
                )
                .into());
            }
            for &site in &group.sites {
                let site = &block.sites[site].name;
                let name = importance::name_of(block, site, decoder.graph.tied)
                    .ok_or_else(|| format!("{site} has no name in GGUF"))?;
                let counts = vec![stats.tokens as f32];
                entries.insert(name, Entry { sums: sums.clone(), counts });
            }
        }
        if block.index + 1 < decoder.spec.layers || args.process_output {
            run.finish(&state)?;
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    let named = |path: &std::path::PathBuf| path.display().to_string();
    let own = Imatrix {
        datasets: args.text.iter().chain(&args.ids).map(named).collect(),
        chunk_count: u32::try_from(windows.len())?,
        chunk_size: u32::try_from(args.context)?,
        entries,
    };
    if let Some(folder) = args.out.parent() {
        std::fs::create_dir_all(folder)
            .map_err(|error| format!("{}: {error}", folder.display()))?;
    }
    // Written whole or not at all.
    let mut partial = args.out.clone().into_os_string();
    partial.push(".partial");
    let partial = std::path::PathBuf::from(partial);
    let written = own.write(&partial).map_err(Error::from).and_then(|()| {
        std::fs::rename(&partial, &args.out)
            .map_err(|error| format!("{}: {error}", args.out.display()).into())
    });
    if written.is_err() {
        let _ = std::fs::remove_file(&partial);
    }
    written?;
    let tokens: usize = lengths.iter().sum();
    say!(
        "{}: importances of {} weights over {tokens} tokens in {} windows",
        args.out.display(),
        own.entries.len(),
        windows.len()
    );
    Ok(true)
}
