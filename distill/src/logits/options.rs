//! Options of `distill`.

use attar_ir::recipe::RecipeError;
use attar_tensor::{ActivationScheme, Granularity, QuantScheme, ScaleGrid};
use serde::Deserialize;

use crate::{Decay, loss::Divergence};

/// Which values are trained.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum What {
    /// Every value of the model.
    #[default]
    All,
    /// Weights of norms, and biases.
    Norms,
    /// Scales of what the steps before have quantized: the codes stay. The step is then the last one, behind them.
    Scales,
    /// Low-rank adapters beside the linears of the blocks, merged when it is done.
    Adapters,
}

/// Numbers that the forward rounds the linears of the blocks to, as `rtn` with its defaults would.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Rounding {
    /// 2, 3, 4 or 8.
    bits: u8,
    /// Columns per scale; -1 is one scale per row.
    #[serde(default = "default_group")]
    group_size: i64,
    /// Symmetric about zero.
    #[serde(default = "yes")]
    symmetric: bool,
}

fn default_group() -> i64 {
    128
}

fn yes() -> bool {
    true
}

/// Blocks at which streams are compared.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, schemars::JsonSchema)]
#[serde(untagged)]
pub(super) enum At {
    /// A word.
    Word(Word),
    /// Blocks of the student, counted from 0.
    Blocks(Vec<usize>),
}

/// What can be said of blocks in a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum Word {
    /// The last one.
    Last,
    /// Every one.
    All,
}

impl At {
    /// The blocks of a student of so many, rising.
    ///
    /// # Errors
    /// A block that it does not have, or one named twice.
    pub(super) fn blocks(&self, layers: usize) -> Result<Vec<usize>, String> {
        let mut blocks = match self {
            Self::Word(Word::Last) => layers.checked_sub(1).into_iter().collect(),
            Self::Word(Word::All) => (0..layers).collect(),
            Self::Blocks(blocks) => blocks.clone(),
        };
        blocks.sort_unstable();
        if let Some(none) = blocks.iter().find(|&&block| block >= layers) {
            return Err(format!(
                "hidden_at: there is no block {none}; the student's are 0 to {}",
                layers - 1
            ));
        }
        if let Some([twice, _]) = blocks.array_windows().find(|[a, b]| a == b) {
            return Err(format!("hidden_at: block {twice} is named twice"));
        }
        Ok(blocks)
    }
}

#[derive(Debug, Clone, PartialEq, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Options {
    /// Directory of the teacher; the original checkpoint of the run when absent.
    pub(super) teacher: Option<String>,
    /// How the student's logits are held against the teacher's: forward_kl (when absent), reverse_kl or jensen_shannon.
    pub(super) loss: Divergence,
    /// Of jensen_shannon: the teacher's share of the mixture.
    pub(super) beta: f32,
    /// Softens both distributions.
    pub(super) temperature: f32,
    /// Share of the cross-entropy with the text, 0 to 1.
    pub(super) text: f32,
    /// Weight of the relative squared distance between the streams that leave the blocks of `hidden_at`, their mean.
    pub(super) hidden: f32,
    /// At which blocks of the student streams are compared: `last` (when absent), `all`, or a list counted from 0. Of a
    /// student with fewer blocks each stands for as many of the teacher's.
    pub(super) hidden_at: At,
    /// Which values are trained: all (when absent), norms (with biases), adapters, or scales (of the codes that the steps before have made).
    pub(super) train: What,
    /// Of adapters: their rank.
    pub(super) rank: usize,
    /// Of adapters: their product is multiplied by alpha / rank; twice the rank when absent.
    pub(super) alpha: Option<f32>,
    /// The forward sees the linears of the blocks rounded to these numbers (a straight-through estimator goes back).
    pub(super) rounding: Option<Rounding>,
    /// How often every window is seen.
    pub(super) epochs: usize,
    /// Steps of the optimizer; those of the epochs when absent.
    pub(super) steps: Option<usize>,
    /// Windows that go through the model together.
    pub(super) batch: usize,
    /// Batches per step of the optimizer.
    pub(super) accumulate: usize,
    /// Largest learning rate; 5e-4, for norms, scales and adapters 2e-3, when absent.
    pub(super) rate: Option<f32>,
    /// Fraction of the steps in which the rate rises.
    pub(super) warmup: f64,
    /// How it falls afterwards: cosine (when absent), linear or constant.
    pub(super) decay: Decay,
    /// What it falls to, as a fraction.
    pub(super) floor: f64,
    /// AdamW's decoupled decay of matrices.
    pub(super) weight_decay: f32,
    /// Largest norm of a step's gradient.
    pub(super) clip: f64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            teacher: None,
            loss: Divergence::default(),
            beta: 0.5,
            temperature: 1.0,
            text: 0.0,
            hidden: 0.0,
            hidden_at: At::Word(Word::Last),
            train: What::default(),
            rank: 16,
            alpha: None,
            rounding: None,
            epochs: 1,
            steps: None,
            batch: 8,
            accumulate: 1,
            rate: None,
            warmup: 0.05,
            decay: Decay::default(),
            floor: 0.0,
            weight_decay: 0.0,
            clip: 1.0,
        }
    }
}

impl Options {
    /// Refuses numbers that make no sense.
    pub(super) fn check(&self) -> Result<(), RecipeError> {
        let fail = |key: &str, reason: String| Err(RecipeError::invalid(key, reason));
        let o = self;
        for (key, value, least, most) in [
            ("beta", f64::from(o.beta), 1e-3, 0.999),
            ("temperature", f64::from(o.temperature), 0.05, 100.0),
            ("text", f64::from(o.text), 0.0, 1.0),
            ("hidden", f64::from(o.hidden), 0.0, 1e6),
            ("rate", f64::from(o.rate.unwrap_or(1e-3)), 1e-12, 10.0),
            ("alpha", f64::from(o.alpha.unwrap_or(1.0)), 1e-6, 1e6),
            ("warmup", o.warmup, 0.0, 1.0),
            ("floor", o.floor, 0.0, 1.0),
            ("weight_decay", f64::from(o.weight_decay), 0.0, 10.0),
            ("clip", o.clip, 1e-9, f64::MAX),
        ] {
            if !(least..=most).contains(&value) {
                return fail(key, format!("expected {least} to {most}, got {value}"));
            }
        }
        for (key, value) in [
            ("epochs", o.epochs),
            ("steps", o.steps.unwrap_or(1)),
            ("batch", o.batch),
            ("accumulate", o.accumulate),
            ("rank", o.rank),
        ] {
            if !(1..=1 << 20).contains(&value) {
                return fail(key, format!("expected 1 to {}, got {value}", 1 << 20));
            }
        }
        if o.hidden_at != At::Word(Word::Last) && o.hidden <= 0.0 {
            return fail(
                "hidden_at",
                "streams have no weight; give `hidden` one, or leave it away".into(),
            );
        }
        if o.hidden_at == At::Blocks(Vec::new()) {
            return fail("hidden_at", "expected `last`, `all` or some blocks, got none".into());
        }
        if o.train == What::Scales && o.rounding.is_some() {
            return fail(
                "rounding",
                "the codes are there already where `scales` are trained; leave it away".into(),
            );
        }
        if o.text >= 1.0 && o.teacher.is_some() && o.hidden <= 0.0 {
            return fail("teacher", "has no share of the loss where `text` has all of it".into());
        }
        Ok(())
    }
}

impl Rounding {
    /// As quantizers take it.
    pub(super) fn scheme(self) -> Result<QuantScheme, RecipeError> {
        let of = self;
        if ![2, 3, 4, 8].contains(&of.bits) {
            let reason = format!("expected 2, 3, 4 or 8, got {}", of.bits);
            return Err(RecipeError::invalid("rounding.bits", reason));
        }
        let granularity = match of.group_size {
            -1 => Granularity::Channel,
            size if size > 0 => Granularity::Group(size as usize),
            size => {
                let reason = format!("expected a positive integer or -1 (per row), got {size}");
                return Err(RecipeError::invalid("rounding.group_size", reason));
            }
        };
        Ok(QuantScheme {
            bits: of.bits,
            granularity,
            symmetric: of.symmetric,
            scale_grid: ScaleGrid::F16,
            zero_min: 1,
            activations: ActivationScheme::Float,
        })
    }
}
