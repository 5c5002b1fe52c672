//! `attar run`.

use std::{collections::BTreeMap, time::Instant};

use attar_kernels::Activations;
use attar_model::{Generator, Sampling};
use serde::Serialize;
use serde_json::json;

use crate::{
    Error,
    args::Run,
    packed::{Opened, Taken},
};

/// Tokens and the time they took.
#[derive(Debug, Default, Clone, Copy, Serialize)]
pub(crate) struct Speed {
    pub(crate) tokens: usize,
    pub(crate) seconds: f64,
}

impl Speed {
    fn add(&mut self, tokens: usize, since: Instant) {
        self.tokens += tokens;
        self.seconds += since.elapsed().as_secs_f64();
    }

    /// Tokens per second.
    fn rate(self) -> f64 {
        self.tokens as f64 / self.seconds.max(1e-9)
    }
}

/// What was generated, and how fast.
#[derive(Debug)]
pub(crate) struct Continued {
    pub(crate) text: String,
    pub(crate) prefill: Speed,
    pub(crate) decode: Speed,
}

/// Continues a prompt.
pub(crate) fn continue_text(
    model: &Opened,
    prompt: &str,
    tokens: usize,
    sampling: Sampling,
) -> Result<Continued, Error> {
    let tokenizer = model.checkpoint.tokenizer()?;
    let mut ids = tokenizer.encode(prompt)?;
    if ids.is_empty() {
        ids.push(tokenizer.bos.ok_or("an empty prompt needs a model with a bos token")?);
    }
    let limit = (ids.len() + tokens).min(model.decoder.spec.context);
    if ids.len() >= limit {
        return Err(format!(
            "the prompt has {} tokens, the model's context is {}",
            ids.len(),
            model.decoder.spec.context
        )
        .into());
    }
    let mut generator = Generator::new(&model.decoder, model, limit, sampling)?;
    let (mut prefill, mut decode) = (Speed::default(), Speed::default());
    let started = Instant::now();
    let mut logits = generator.forward(&ids)?;
    prefill.add(ids.len(), started);
    loop {
        let started = Instant::now();
        let next = generator.choose(&logits);
        if tokenizer.eos.contains(&next) {
            break;
        }
        ids.push(next);
        if ids.len() >= limit || generator.remaining() == 0 {
            break;
        }
        logits = generator.forward(&[next])?;
        decode.add(1, started);
    }
    Ok(Continued { text: tokenizer.decode(&ids)?, prefill, decode })
}

/// Tokens to measure without a prompt.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Measured {
    pub(crate) prefill: usize,
    pub(crate) decode: usize,
}

impl std::str::FromStr for Measured {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts =
            text.split_once(',').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
        match parts {
            Some((prefill, decode)) if prefill + decode > 0 => Ok(Self { prefill, decode }),
            _ => Err(format!("`{text}` is not PREFILL,DECODE; write e.g. 512,64")),
        }
    }
}

/// Prefill of so many pseudo-random tokens into an empty cache, then decoding of so many from an empty
/// one; the fastest of `repeat`.
fn measure(model: &Opened, what: Measured, repeat: usize) -> Result<(Speed, Speed), Error> {
    let spec = &model.decoder.spec;
    let positions = what.prefill.max(what.decode + 1);
    if positions > spec.context {
        return Err(
            format!("{positions} positions, but the model's context is {}", spec.context).into()
        );
    }
    let sampling = Sampling { temperature: 0.0, seed: 0 };
    let mut generator = Generator::new(&model.decoder, model, positions, sampling)?;
    let mut rng = attar_tensor::rng::Rng::new(1);
    let mut random =
        |count: usize| -> Vec<u32> { (0..count).map(|_| rng.below(spec.vocab) as u32).collect() };
    let (prompt, tokens) = (random(what.prefill), random(what.decode + 1));
    let mut best = (Speed::default(), Speed::default());
    let take = |best: &mut Speed, tokens: usize, since: Instant| {
        let seconds = since.elapsed().as_secs_f64();
        if best.tokens == 0 || seconds < best.seconds {
            *best = Speed { tokens, seconds };
        }
    };
    for _ in 0..repeat.max(1) {
        if !prompt.is_empty() {
            generator.clear();
            let started = Instant::now();
            generator.forward(&prompt)?;
            take(&mut best.0, prompt.len(), started);
        }
        if what.decode > 0 {
            generator.clear();
            generator.forward(&tokens[..1])?;
            let started = Instant::now();
            for &token in &tokens[1..] {
                generator.forward(&[token])?;
            }
            take(&mut best.1, what.decode, started);
        }
    }
    Ok(best)
}

/// What was multiplied with, for people.
fn kernels(taken: &BTreeMap<&'static str, Taken>) -> String {
    let one = |(name, taken): (&&str, &Taken)| {
        let sparse = match taken.without_zeros {
            0 => String::new(),
            n => format!(", {n} of them 2:4 without the zeros"),
        };
        let megabytes = taken.bytes as f64 / 1e6;
        format!("{name} ({} linears{sparse}, {megabytes:.1} MB)", taken.linears)
    };
    taken.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// What was done to activations: bytes are asked for, but not every layout has such a kernel.
pub(crate) fn used(model: &Opened) -> Activations {
    let taken = model.taken();
    let any = |end: &str| taken.keys().any(|name| name.ends_with(end));
    match (any("-w8a8"), any("-int8")) {
        (true, _) => Activations::Int8PerToken,
        (_, true) => model.activations,
        _ => Activations::F32,
    }
}

/// Relative root mean square error that kernels are held to on Gaussian and outlier-ridden activations
/// (`attar verify`); no bound for any input.
pub(crate) fn tolerance(activations: Activations) -> f64 {
    activations.tolerance().max_nmse.sqrt()
}

/// Runs `work` on a thread of the pool: handing each product over to another thread costs more than a small
/// one takes.
pub(crate) fn in_pool<T: Send>(work: impl FnOnce() -> Result<T, Error> + Send) -> Result<T, Error> {
    // An error that crosses threads is its text.
    Ok(rayon::scope(|_| work().map_err(|error| error.to_string()))?)
}

pub(crate) fn generate(args: &Run) -> Result<bool, Error> {
    let mut model = Opened::open(&args.path)?;
    model.set_activations(args.activations.map(Into::into), Activations::Int8);
    model.resident = true;
    let (text, prefill, decode) = match (&args.prompt, args.bench) {
        (Some(prompt), None) => {
            let sampling = Sampling { temperature: args.temperature, seed: args.seed };
            let work = || continue_text(&model, prompt, args.tokens, sampling);
            let done = in_pool(work)?;
            (Some(done.text), done.prefill, done.decode)
        }
        (_, Some(what)) => {
            let (prefill, decode) = in_pool(|| measure(&model, what, args.repeat))?;
            (None, prefill, decode)
        }
        (None, None) => return Err("give --prompt or --bench".into()),
    };
    let taken = model.taken();
    let bytes: usize = taken.values().map(|taken| taken.bytes).sum();
    let activations = used(&model);
    let tolerance = tolerance(activations);
    if args.json {
        let speed = |speed: Speed| {
            json!({
                "tokens": speed.tokens,
                "seconds": speed.seconds,
                "tokens_per_second": speed.rate(),
            })
        };
        let out = json!({
            "text": text,
            "activations": activations,
            "relative_error_tolerance": tolerance,
            "kernels": taken,
            "bytes_per_token": bytes,
            "threads": rayon::current_num_threads(),
            "isa": attar_tensor::linalg::level().name(),
            "prefill": speed(prefill),
            "decode": speed(decode),
        });
        say!("{}", serde_json::to_string_pretty(&out)?);
        return Ok(true);
    }
    if let Some(text) = text {
        say!("{text}");
    }
    let line = |what: &str, speed: Speed| {
        let (tokens, rate) = (speed.tokens, speed.rate());
        format!("{what} {tokens} tokens in {:.3} s, {rate:.2} tokens/s", speed.seconds)
    };
    if prefill.tokens > 0 {
        eprintln!("{}", line("prefill", prefill));
    }
    if decode.tokens > 0 {
        let gigabytes = bytes as f64 * decode.rate() / 1e9;
        eprintln!(
            "{}, {:.1} MB of weights each, {gigabytes:.2} GB/s",
            line("decode ", decode),
            bytes as f64 / 1e6
        );
    }
    eprintln!(
        "kernels {}; {} activations, held to a relative error of {tolerance:.1e} a product",
        kernels(&taken),
        activations.name()
    );
    Ok(true)
}
