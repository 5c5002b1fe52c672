//! `attar eval`.

use attar_eval::{Evaluation, Score};
use attar_formats::{CorpusSource, corpus, safetensors::SafetensorsWriter};
use attar_tensor::{DType, Tensor, TensorHeader, TensorSink};
use serde_json::json;

use crate::{
    Error,
    args::{Eval, ScoreArg},
    measure,
    packed::Opened,
};

/// One line for people.
pub(crate) fn line(eval: &Evaluation) -> String {
    let mut text = format!(
        "perplexity {:.4} [{:.4}, {:.4}] over {} tokens, context {}",
        eval.perplexity,
        eval.perplexity_interval.low,
        eval.perplexity_interval.high,
        eval.tokens,
        eval.context
    );
    if let (Some(reference), Some(kl), Some(same)) =
        (eval.reference_perplexity, eval.kl_mean, eval.top1_agreement)
    {
        text += &format!(
            "; original {reference:.4}, KL {kl:.5} nats, top-1 agreement {:.2} %",
            100.0 * same
        );
    }
    text
}

pub(crate) fn evaluate(args: &Eval) -> Result<bool, Error> {
    let mut model = Opened::open(&args.path)?;
    let asked = args.activations.map(Into::into);
    model.set_activations(asked, attar_kernels::Activations::F32);
    let reference = args.reference.as_deref().map(Opened::open).transpose()?;
    let spec = &model.decoder.spec;
    if args.context < 2 || args.context > spec.context {
        return Err(format!(
            "--context {} is outside 2..={}, the model's context",
            args.context, spec.context
        )
        .into());
    }
    let tokenizer =
        if args.text.is_some() || args.bos { Some(model.checkpoint.tokenizer()?) } else { None };
    let source = match (&args.text, &args.ids) {
        (Some(text), _) => CorpusSource::Text(vec![text.clone()]),
        (None, Some(ids)) => CorpusSource::Ids(ids.clone()),
        (None, None) => return Err("give --text or --ids".into()),
    };
    let windows = corpus::evaluation(
        &source,
        tokenizer.as_ref(),
        args.context,
        args.max_windows,
        spec.vocab,
    )?;
    let bos = match (&tokenizer, args.bos) {
        (Some(tokenizer), true) => {
            Some(tokenizer.bos.ok_or("--bos, but the model names no bos_token_id")?)
        }
        _ => None,
    };
    let score = match args.score {
        ScoreArg::All => Score::All,
        ScoreArg::SecondHalf => Score::SecondHalf,
    };
    let limits = attar_ir::Limits::unbounded(measure::threads(None));
    let spill = measure::spill(&limits, &measure::scratch());
    let (eval, logits) =
        measure::evaluate(&model, reference.as_ref(), &windows, bos, args.context, score, &spill)?;
    if let Some(path) = &args.dump_logits {
        dump(path, &logits)?;
    }
    if args.json {
        let mut out = serde_json::to_value(&eval)?;
        out["bits_per_weight"] = json!(model.bits_per_weight());
        out["file_bytes"] = json!(model.file_bytes()?);
        if let Some(reference) = &reference {
            out["source_bytes"] = json!(reference.checkpoint.file_bytes()?);
        }
        out["layout"] = json!(model.layout());
        let activations = super::run::used(&model);
        out["activations"] = json!(activations);
        out["relative_error_tolerance"] = json!(super::run::tolerance(activations));
        out["kernels"] = json!(model.taken().keys().collect::<Vec<_>>());
        say!("{}", serde_json::to_string_pretty(&out)?);
    } else {
        say!("{}", line(&eval));
        say!(
            "{:.3} bits per weight, {:.2} MB",
            model.bits_per_weight(),
            model.file_bytes()? as f64 / 1e6
        );
    }
    Ok(true)
}

fn dump(path: &std::path::Path, logits: &attar_tensor::Mat) -> Result<(), Error> {
    let folder = tempfile::tempdir_in(
        path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(std::path::Path::new(".")),
    )?;
    let shape = vec![logits.nrows(), logits.ncols()];
    let header = TensorHeader { name: "logits".into(), dtype: DType::F32, shape: shape.clone() };
    let mut writer = SafetensorsWriter::create(folder.path(), vec![header], usize::MAX)?;
    let values = logits.as_slice().ok_or("logits are in standard layout")?;
    writer.write("logits", &Tensor::from_f32(DType::F32, shape, values)?)?;
    writer.finish()?;
    std::fs::rename(folder.path().join("model.safetensors"), path)
        .map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(())
}
