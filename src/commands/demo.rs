//! `attar demo`: the whole way on a small trained model that the binary carries.

use std::{fs, path::PathBuf};

use attar_eval::Score;
use attar_formats::{CorpusSource, Tokenizer, corpus};
use attar_model::Sampling;

use super::run::continue_text;
use crate::{
    Error,
    args::{Demo, Promise, What},
    compile, measure,
    packed::Opened,
};

/// TinyStories-656K (raincandy-u, Apache-2.0) with calibration and held-out text.
const FILES: &[(&str, &[u8])] = &[
    ("config.json", include_bytes!("../../tests/data/tinystories-656k/config.json")),
    (
        "generation_config.json",
        include_bytes!("../../tests/data/tinystories-656k/generation_config.json"),
    ),
    ("model.safetensors", include_bytes!("../../tests/data/tinystories-656k/model.safetensors")),
    ("tokenizer.json", include_bytes!("../../tests/data/tinystories-656k/tokenizer.json")),
    (
        "tokenizer_config.json",
        include_bytes!("../../tests/data/tinystories-656k/tokenizer_config.json"),
    ),
    (
        "special_tokens_map.json",
        include_bytes!("../../tests/data/tinystories-656k/special_tokens_map.json"),
    ),
];
const CALIBRATION: &[u8] = include_bytes!("../../tests/data/tinystories_calib.txt");
const HELD_OUT: &[u8] = include_bytes!("../../tests/data/tinystories_val.txt");
const CONTEXT: usize = 256;
const PROMPT: &str = "Once upon a time, there was a little";

pub(crate) fn demo(args: &Demo) -> Result<bool, Error> {
    let source = args.out.join("source");
    fs::create_dir_all(&source).map_err(|error| format!("{}: {error}", source.display()))?;
    let write = |path: PathBuf, bytes: &[u8]| {
        fs::write(&path, bytes).map_err(|error| format!("{}: {error}", path.display()))
    };
    for (name, bytes) in FILES {
        write(source.join(name), bytes)?;
    }
    let (calibration, held_out) = (args.out.join("calibration.txt"), args.out.join("held_out.txt"));
    write(calibration.clone(), CALIBRATION)?;
    write(held_out.clone(), HELD_OUT)?;
    let original = Opened::open(&source)?;
    let tokenizer = Tokenizer::open(&source)?;
    let text = CorpusSource::Text(vec![held_out]);
    let vocab = original.decoder.spec.vocab;
    let windows = corpus::evaluation(&text, Some(&tokenizer), CONTEXT, None, vocab)?;
    let limits = attar_ir::Limits::unbounded(measure::threads(None));
    let spill = measure::spill(&limits, &measure::scratch());
    let greedy = Sampling { temperature: 0.0, seed: 0 };
    say!(
        "TinyStories-656K: 656,000 parameters, group 128, perplexity over {} tokens at context {CONTEXT}\n",
        windows.ids.len() * (CONTEXT - 1)
    );
    say!(
        "{:<10} {:>10} {:>8} {:>12} {:>10} {:>8}",
        "recipe",
        "bits/wt",
        "MB",
        "perplexity",
        "KL (nats)",
        "top-1"
    );
    let (base, _) =
        measure::evaluate(&original, None, &windows, None, CONTEXT, Score::All, &spill)?;
    let mb =
        |model: &Opened| -> Result<f64, Error> { Ok(model.checkpoint.file_bytes()? as f64 / 1e6) };
    say!(
        "{:<10} {:>10.3} {:>8.3} {:>12.3} {:>10} {:>8}",
        "original",
        original.bits_per_weight(),
        mb(&original)?,
        base.perplexity,
        "-",
        "-"
    );
    let mut texts = vec![("original", continue_text(&original, PROMPT, 48, greedy)?.text)];
    for preset in ["rtn-w4", "awq-w4", "gptq-w4", "rtn-w3", "awq-w3", "gptq-w3"] {
        let out = args.out.join(preset);
        if out.exists() {
            fs::remove_dir_all(&out).map_err(|error| format!("{}: {error}", out.display()))?;
        }
        let what = What {
            checkpoint: source.clone(),
            base: None,
            recipe: None,
            preset: Some(preset.to_owned()),
            group: 128,
            layout: Vec::new(),
            text: vec![calibration.clone()],
            ids: None,
            imatrix: None,
            samples: None,
            context: Some(CONTEXT),
            seed: None,
            promise: Promise::default(),
            memory: None,
            json: false,
        };
        let job = compile::prepare(&what, measure::threads(None), None)?;
        compile::compile(&job, &compile::Options::new(&out))?;
        let model = Opened::open(&out)?;
        let (eval, _) = measure::evaluate(
            &model,
            Some(&original),
            &windows,
            None,
            CONTEXT,
            Score::All,
            &spill,
        )?;
        say!(
            "{:<10} {:>10.3} {:>8.3} {:>12.3} {:>10.4} {:>7.1}%",
            preset,
            model.bits_per_weight(),
            mb(&model)?,
            eval.perplexity,
            eval.kl_mean.unwrap_or(f64::NAN),
            100.0 * eval.top1_agreement.unwrap_or(f64::NAN)
        );
        if preset.ends_with("w4") && preset != "awq-w4" || preset == "gptq-w3" {
            texts.push((preset, continue_text(&model, PROMPT, 48, greedy)?.text));
        }
    }
    say!();
    for (name, text) in texts {
        say!("{name}: {text}\n");
    }
    say!("artifacts: {}", args.out.display());
    Ok(true)
}
