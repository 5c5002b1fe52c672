//! The architecture as metadata: what llama.cpp reads, and config.json made of it again.

use serde_json::{Map, Value as Json, json};

use super::{
    names::ROPE_FREQS,
    reader::Header,
    value::{Array, Kind, Metadata, Value},
};
use crate::brief;

/// Our own key: factor, low, high and original of Llama 3's scaling, f64.
const LLAMA3: &str = "attar.rope.llama3";

/// How rotary frequencies are scaled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rope {
    /// Not at all.
    Plain,
    /// All divided.
    Linear {
        /// By so much.
        factor: f64,
    },
    /// Llama 3: stored as one divisor per frequency.
    Llama3 {
        /// Largest divisor.
        factor: f64,
        /// Wavelengths above `original / low` are divided.
        low: f64,
        /// Wavelengths below `original / high` are kept.
        high: f64,
        /// Context before the extension.
        original: f64,
    },
    /// YaRN.
    Yarn {
        /// Context extension.
        factor: f64,
        /// Rotations at which interpolation begins to fade out.
        beta_fast: f64,
        /// Rotations below which frequencies are fully interpolated.
        beta_slow: f64,
        /// Context before the extension.
        original: f64,
        /// Multiplies cosines and sines.
        attention_factor: f64,
    },
}

/// Numbers of a decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct Params {
    /// `model_type` of config.json: llama, mistral, qwen2 or qwen3.
    pub family: String,
    /// For `general.name`.
    pub name: String,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Channels per head.
    pub head_dim: usize,
    /// Width of the MLP.
    pub intermediate: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Trained context.
    pub context: usize,
    /// Added to the mean square in norms.
    pub rms_eps: f64,
    /// Base of the rotary embedding.
    pub theta: f64,
    /// Its scaling.
    pub rope: Rope,
    /// Positions that a token attends to, in all blocks; `None` is all.
    pub window: Option<usize>,
}

/// The architecture's name in GGUF.
fn architecture(family: &str) -> Option<&'static str> {
    match family {
        "llama" | "mistral" => Some("llama"),
        "qwen2" => Some("qwen2"),
        "qwen3" => Some("qwen3"),
        _ => None,
    }
}

/// What YaRN multiplies cosines and sines with when nothing is said.
fn yarn_scale(factor: f64) -> f64 {
    if factor > 1.0 { 0.1 * factor.ln() + 1.0 } else { 1.0 }
}

impl Params {
    /// The architecture's name in GGUF.
    ///
    /// # Errors
    /// For a family that it is not known of.
    pub fn architecture(&self) -> Result<&'static str, String> {
        architecture(&self.family).ok_or_else(|| {
            format!("model_type {} has no GGUF architecture here", brief(&self.family))
        })
    }

    /// True when query and key rows are interleaved ([`super::names::interleave`]).
    pub fn interleaved(&self) -> bool {
        architecture(&self.family) == Some("llama")
    }

    /// One divisor per frequency, for the scaling of Llama 3.
    pub fn rope_divisors(&self) -> Option<Vec<f32>> {
        let Rope::Llama3 { factor, low, high, original } = self.rope else { return None };
        let divisor = |at: usize| {
            let frequency = self.theta.powf(-((2 * at) as f64) / self.head_dim as f64);
            let wavelength = 2.0 * std::f64::consts::PI / frequency;
            if wavelength < original / high {
                1.0
            } else if wavelength > original / low {
                factor
            } else {
                let smooth = (original / wavelength - low) / (high - low);
                1.0 / ((1.0 - smooth) / factor + smooth)
            }
        };
        Some((0..self.head_dim / 2).map(|at| divisor(at) as f32).collect())
    }

    /// Keys of the architecture.
    ///
    /// # Errors
    /// For a family that GGUF has no name for here.
    pub fn to_metadata(&self, file_type: u32) -> Result<Metadata, String> {
        let arch = self.architecture()?;
        let mut out = Metadata::default();
        let key = |name: &str| format!("{arch}.{name}");
        out.put_text("general.architecture", arch);
        out.put_text("general.type", "model");
        out.put_text("general.name", &self.name);
        out.put("general.file_type", Value::U32(file_type));
        out.put("general.quantization_version", Value::U32(2));
        out.put_u32(key("block_count"), self.layers);
        out.put_u32(key("context_length"), self.context);
        out.put_u32(key("embedding_length"), self.hidden);
        out.put_u32(key("feed_forward_length"), self.intermediate);
        out.put_u32(key("attention.head_count"), self.heads);
        out.put_u32(key("attention.head_count_kv"), self.kv_heads);
        out.put_u32(key("attention.key_length"), self.head_dim);
        out.put_u32(key("attention.value_length"), self.head_dim);
        out.put_f32(key("attention.layer_norm_rms_epsilon"), self.rms_eps);
        out.put_u32(key("vocab_size"), self.vocab);
        out.put_u32(key("rope.dimension_count"), self.head_dim);
        out.put_f32(key("rope.freq_base"), self.theta);
        match self.rope {
            Rope::Plain => {}
            // Runtimes read the divisors; this lets us read the numbers behind them.
            Rope::Llama3 { factor, low, high, original } => {
                let numbers = [factor, low, high, original];
                let bytes = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
                out.put(LLAMA3, Value::Array(Array::Numbers { kind: Kind::F64, bytes }));
            }
            Rope::Linear { factor } => {
                out.put_text(key("rope.scaling.type"), "linear");
                out.put_f32(key("rope.scaling.factor"), factor);
            }
            Rope::Yarn { factor, beta_fast, beta_slow, original, attention_factor } => {
                out.put_text(key("rope.scaling.type"), "yarn");
                out.put_f32(key("rope.scaling.factor"), factor);
                out.put_u32(key("rope.scaling.original_context_length"), original as usize);
                out.put_f32(key("rope.scaling.yarn_beta_fast"), beta_fast);
                out.put_f32(key("rope.scaling.yarn_beta_slow"), beta_slow);
                let beside = attention_factor / yarn_scale(factor);
                if (beside - 1.0).abs() > 1e-6 {
                    out.put_f32(key("rope.scaling.attn_factor"), beside);
                }
            }
        }
        if let Some(window) = self.window {
            out.put_u32(key("attention.sliding_window"), window);
        }
        Ok(out)
    }

    /// Reads the keys of the architecture; `divisors` are the values of [`ROPE_FREQS`], when it is there.
    ///
    /// # Errors
    /// Missing or unsupported facts, by their key.
    pub fn read(header: &Header, divisors: Option<&[f32]>) -> Result<Self, String> {
        let metadata = &header.metadata;
        let arch = metadata
            .get("general.architecture")
            .and_then(Value::text)
            .ok_or("has no general.architecture")?;
        let family = match arch {
            "llama" | "qwen2" | "qwen3" => arch,
            other => {
                return Err(format!(
                    "architecture `{}` is not supported; supported: llama, qwen2, qwen3",
                    brief(other)
                ));
            }
        };
        let key = |name: &str| format!("{arch}.{name}");
        let size = |name: &str| {
            let number = metadata.get(&key(name)).map(|value| {
                value
                    .integer()
                    .and_then(|n| usize::try_from(n).ok())
                    .ok_or_else(|| format!("{} is {value}, not a size", key(name)))
            });
            number.transpose()
        };
        let need = |name: &str| size(name)?.ok_or_else(|| format!("has no {}", key(name)));
        let float = |name: &str| {
            let number = metadata.get(&key(name)).map(|value| {
                let found = match value {
                    // The shortest decimal of the stored f32: 1e-5, not 9.999999747e-6.
                    Value::F32(short) => short.to_string().parse().ok(),
                    other => other.float(),
                };
                found.ok_or_else(|| format!("{} is {value}, not a float", key(name)))
            });
            number.transpose()
        };
        if size("expert_count")?.is_some_and(|count| count > 0) {
            return Err("has experts, which are not supported".into());
        }
        let (hidden, heads) = (need("embedding_length")?, need("attention.head_count")?);
        let default_dim = hidden.checked_div(heads).ok_or("has no attention heads")?;
        let head_dim = size("attention.key_length")?.unwrap_or(default_dim);
        // Rotations mix the halves of a head.
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err(format!(
                "heads of {head_dim} columns ({hidden} over {heads} heads); rotary positions need an even number"
            ));
        }
        for name in ["attention.value_length", "rope.dimension_count"] {
            if let Some(other) = size(name)?.filter(|&other| other != head_dim) {
                return Err(format!("{} is {other}, but heads have {head_dim}", key(name)));
            }
        }
        let tokens = metadata.get("tokenizer.ggml.tokens").and_then(Value::array);
        let vocab = match (size("vocab_size")?, tokens) {
            (Some(vocab), _) => vocab,
            (None, Some(tokens)) => tokens.len(),
            (None, None) => return Err(format!("has neither {} nor tokens", key("vocab_size"))),
        };
        let context = need("context_length")?;
        let theta = float("rope.freq_base")?.unwrap_or(10_000.0);
        let factor = || {
            float("rope.scaling.factor")?
                .ok_or_else(|| format!("has no {}", key("rope.scaling.factor")))
        };
        let scaling = metadata.get(&key("rope.scaling.type")).and_then(Value::text);
        let rope = match (scaling, divisors) {
            (None | Some("none"), Some(divisors)) => llama3(metadata, divisors, theta, head_dim)?,
            (None | Some("none"), None) => Rope::Plain,
            (Some("linear"), None) => Rope::Linear { factor: factor()? },
            (Some("yarn"), None) => {
                let factor = factor()?;
                let original = size("rope.scaling.original_context_length")?.unwrap_or(context);
                let beside = float("rope.scaling.attn_factor")?.unwrap_or(1.0);
                Rope::Yarn {
                    factor,
                    beta_fast: float("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
                    beta_slow: float("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
                    original: original as f64,
                    attention_factor: beside * yarn_scale(factor),
                }
            }
            (Some(other), _) => {
                return Err(format!("rope scaling `{}` is not supported", brief(other)));
            }
        };
        let window = size("attention.sliding_window")?.filter(|&window| window > 0);
        let name = metadata.get("general.name").and_then(Value::text).unwrap_or_default();
        Ok(Self {
            // What tells these two apart is the window.
            family: if arch == "llama" && window.is_some() { "mistral" } else { family }.to_owned(),
            name: name.to_owned(),
            hidden,
            heads,
            kv_heads: size("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            intermediate: need("feed_forward_length")?,
            layers: need("block_count")?,
            vocab,
            context,
            rms_eps: float("attention.layer_norm_rms_epsilon")?
                .ok_or_else(|| format!("has no {}", key("attention.layer_norm_rms_epsilon")))?,
            theta,
            rope,
            window,
        })
    }

    /// config.json of these numbers. `has` says whether a tensor of this Hugging Face name is there.
    pub fn to_config(&self, has: &dyn Fn(&str) -> bool) -> Json {
        let class = match self.family.as_str() {
            "mistral" => "MistralForCausalLM",
            "qwen2" => "Qwen2ForCausalLM",
            "qwen3" => "Qwen3ForCausalLM",
            _ => "LlamaForCausalLM",
        };
        let mut config = Map::new();
        let mut put = |key: &str, value: Json| config.insert(key.to_owned(), value);
        put("architectures", json!([class]));
        put("model_type", json!(self.family));
        put("hidden_size", json!(self.hidden));
        put("intermediate_size", json!(self.intermediate));
        put("num_hidden_layers", json!(self.layers));
        put("num_attention_heads", json!(self.heads));
        put("num_key_value_heads", json!(self.kv_heads));
        put("head_dim", json!(self.head_dim));
        put("vocab_size", json!(self.vocab));
        put("max_position_embeddings", json!(self.context));
        put("rms_norm_eps", json!(self.rms_eps));
        put("rope_theta", json!(self.theta));
        let scaling = match self.rope {
            Rope::Plain => Json::Null,
            Rope::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
            Rope::Llama3 { factor, low, high, original } => json!({
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low,
                "high_freq_factor": high, "original_max_position_embeddings": original,
            }),
            Rope::Yarn { factor, beta_fast, beta_slow, original, attention_factor } => json!({
                "rope_type": "yarn", "factor": factor, "beta_fast": beta_fast,
                "beta_slow": beta_slow, "original_max_position_embeddings": original,
                "attention_factor": attention_factor,
            }),
        };
        put("rope_scaling", scaling);
        put("hidden_act", json!("silu"));
        if self.family == "mistral" {
            put("sliding_window", json!(self.window));
        }
        let first = |part: &str| has(&format!("model.layers.0.{part}.bias"));
        put("attention_bias", json!(first("self_attn.o_proj")));
        put("mlp_bias", json!(first("mlp.down_proj")));
        put("tie_word_embeddings", json!(!has("lm_head.weight") && !has("lm_head.blocks")));
        Json::Object(config)
    }
}

/// The numbers behind Llama 3's divisors, if they are those of a published model.
fn llama3(
    metadata: &Metadata,
    divisors: &[f32],
    theta: f64,
    head_dim: usize,
) -> Result<Rope, String> {
    let factor = divisors.iter().fold(1.0f32, |a, &b| a.max(b));
    let mut params = Params {
        family: "llama".into(),
        name: String::new(),
        hidden: 0,
        heads: 1,
        kv_heads: 1,
        head_dim,
        intermediate: 0,
        layers: 0,
        vocab: 0,
        context: 0,
        rms_eps: 0.0,
        theta,
        rope: Rope::Plain,
        window: None,
    };
    let mut candidates = Vec::new();
    if let Some(Value::Array(Array::Numbers { kind: Kind::F64, bytes })) = metadata.get(LLAMA3) {
        let number = |b: &[u8]| b.try_into().map_or(0.0, f64::from_le_bytes);
        let numbers: Vec<f64> = bytes.chunks_exact(8).map(number).collect();
        if let &[factor, low, high, original] = numbers.as_slice()
            && low > 0.0
            && high > low
        {
            candidates.push((factor, low, high, original));
        }
    }
    let originals = std::iter::once(8192.0).chain((5..20).map(|power| f64::from(1u32 << power)));
    candidates.extend(originals.map(|original| (f64::from(factor), 1.0, 4.0, original)));
    for (factor, low, high, original) in candidates {
        params.rope = Rope::Llama3 { factor, low, high, original };
        let ours = params.rope_divisors().unwrap_or_default();
        let close = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-4 * b.abs();
        if ours.len() == divisors.len() && ours.iter().zip(divisors).all(close) {
            return Ok(params.rope);
        }
    }
    Err(format!("{ROPE_FREQS} holds divisors of no known rope scaling"))
}
