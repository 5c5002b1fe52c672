//! The decoder as data, read from config.json: one entry of [`ARCHS`] per family.

use attar_ir::Sizes;
use serde_json::{Value, json};

use crate::ModelError;

/// How rotary frequencies are scaled beyond the trained context.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeKind {
    /// `theta^(-2i/d)`.
    Default,
    /// All frequencies divided by `factor`.
    Linear {
        /// Context extension.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided, high ones kept, a smooth band between.
    Llama3 {
        /// Context extension.
        factor: f64,
        /// Wavelengths above `original / low` are divided.
        low: f64,
        /// Wavelengths below `original / high` are kept.
        high: f64,
        /// Context before the extension.
        original: f64,
    },
    /// YaRN (Peng et al. 2023, arXiv:2309.00071).
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
        /// Band edges rounded to whole dimensions.
        truncate: bool,
    },
}

/// Rotary position embedding.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RopeSpec {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// Scaling.
    pub kind: RopeKind,
}

/// A decoder-only transformer with RMS norms, rotary attention and a gated SiLU MLP.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderSpec {
    /// `model_type` of config.json.
    pub family: String,
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
    pub rms_eps: f32,
    /// Position embedding.
    pub rope: RopeSpec,
    /// q, k, v have biases.
    pub qkv_bias: bool,
    /// o has a bias.
    pub o_bias: bool,
    /// gate, up, down have biases.
    pub mlp_bias: bool,
    /// Queries and keys are normalised per head.
    pub qk_norm: bool,
    /// Per layer: how many positions (itself included) a token attends to; `None` is all.
    pub window: Vec<Option<usize>>,
    /// Output head and embedding share one weight.
    pub tied: bool,
}

/// How one family's config.json is read.
#[derive(Debug)]
pub struct ArchDef {
    /// `model_type`.
    pub model_type: &'static str,
    /// q, k, v biases when the config does not say.
    qkv_bias: bool,
    /// `attention_bias` is read and covers o too.
    reads_attention_bias: bool,
    /// Norms on queries and keys.
    qk_norm: bool,
    /// Default head_dim; 0 is hidden / heads.
    head_dim: usize,
    /// How sliding windows are said.
    window: WindowRule,
}

#[derive(Debug, Clone, Copy)]
enum WindowRule {
    Never,
    Always,
    FromLayer,
}

/// The families that can be read.
pub const ARCHS: &[ArchDef] = &[
    ArchDef {
        model_type: "llama",
        qkv_bias: false,
        reads_attention_bias: true,
        qk_norm: false,
        head_dim: 0,
        window: WindowRule::Never,
    },
    ArchDef {
        model_type: "mistral",
        qkv_bias: false,
        reads_attention_bias: false,
        qk_norm: false,
        head_dim: 0,
        window: WindowRule::Always,
    },
    ArchDef {
        model_type: "qwen2",
        qkv_bias: true,
        reads_attention_bias: false,
        qk_norm: false,
        head_dim: 0,
        window: WindowRule::FromLayer,
    },
    ArchDef {
        model_type: "qwen3",
        qkv_bias: false,
        reads_attention_bias: true,
        qk_norm: true,
        head_dim: 128,
        window: WindowRule::FromLayer,
    },
];

/// A finite number; absent when the key is missing or null.
fn number(config: &Value, key: &str) -> Result<Option<f64>, ModelError> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_f64() {
            Some(number) if number.is_finite() => Ok(Some(number)),
            _ => Err(ModelError::Config(format!("`{key}` is {}, not a number", short(value)))),
        },
    }
}

/// Larger sizes are lies, and products of two of these do not overflow.
const MAX_SIZE: usize = 1 << 28;
/// More blocks than any model has.
const MAX_LAYERS: usize = 1 << 16;

/// An integer from 0 to [`MAX_SIZE`]; absent when the key is missing or null.
fn size(config: &Value, key: &str) -> Result<Option<usize>, ModelError> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_u64() {
            Some(size) if size <= MAX_SIZE as u64 => Ok(Some(size as usize)),
            Some(size) => Err(ModelError::Config(format!(
                "`{key}` is {size}, more than the largest supported size {MAX_SIZE}"
            ))),
            None => Err(ModelError::Config(format!(
                "`{key}` is {}, not an integer of at least 0",
                short(value)
            ))),
        },
    }
}

/// A value as errors show it, without pages of nested JSON.
fn short(value: &Value) -> String {
    match value {
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "a table".into(),
        Value::String(_) => "a text".into(),
        other => other.to_string(),
    }
}

/// True or false; absent when the key is missing or null.
fn flag(config: &Value, key: &str) -> Result<Option<bool>, ModelError> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(flag)) => Ok(Some(*flag)),
        Some(value) => {
            Err(ModelError::Config(format!("`{key}` is {}, not true or false", short(value))))
        }
    }
}

impl DecoderSpec {
    /// Reads config.json. Sizes up to 2^28 and 65536 layers are believed; memory taken: at most 2 MiB, of
    /// which the windows of the layers are most.
    ///
    /// # Errors
    /// [`ModelError::Config`] naming the missing or unsupported fact, or the one of the wrong type or size.
    pub fn read(config: &Value) -> Result<Self, ModelError> {
        let fail = |message: String| Err(ModelError::Config(message));
        let supported: Vec<_> = ARCHS.iter().map(|arch| arch.model_type).collect();
        let Some(family) = config.get("model_type").and_then(Value::as_str) else {
            return fail(format!(
                "`model_type` is missing, so the architecture is unknown; supported: {}",
                supported.join(", ")
            ));
        };
        let Some(arch) = ARCHS.iter().find(|arch| arch.model_type == family) else {
            return fail(format!(
                "unknown architecture: no description of model_type `{family}` (block structure and \
                 tensor names); supported: {}",
                supported.join(", ")
            ));
        };
        let need = |key: &str| match size(config, key)? {
            Some(0) | None => {
                Err(ModelError::Config(format!("`{key}` is missing or not a positive integer")))
            }
            Some(value) => Ok(value),
        };
        if let Some(act) = config.get("hidden_act").and_then(Value::as_str)
            && act != "silu"
            && act != "swish"
        {
            return fail(format!("hidden_act `{act}` is not supported, only silu"));
        }
        let (hidden, heads) = (need("hidden_size")?, need("num_attention_heads")?);
        let kv_heads = size(config, "num_key_value_heads")?.unwrap_or(heads);
        let default_dim = if arch.head_dim > 0 { arch.head_dim } else { hidden / heads };
        let head_dim = size(config, "head_dim")?.unwrap_or(default_dim);
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return fail(format!("{heads} heads cannot share {kv_heads} key/value heads"));
        }
        if !head_dim.is_multiple_of(2) || head_dim == 0 || heads * head_dim > MAX_SIZE {
            return fail(format!(
                "head_dim {head_dim} is not an even number with which {heads} heads take up to {MAX_SIZE}"
            ));
        }
        let layers = need("num_hidden_layers")?;
        if layers > MAX_LAYERS {
            return fail(format!("`num_hidden_layers` {layers} is more than {MAX_LAYERS}"));
        }
        let context = size(config, "max_position_embeddings")?.unwrap_or(2048);
        let rms_eps = number(config, "rms_norm_eps")?.unwrap_or(1e-6) as f32;
        if !(rms_eps >= 0.0 && rms_eps.is_finite()) {
            return fail(format!("rms_norm_eps {rms_eps} is not a small number of at least 0"));
        }
        let window = windows(config, arch.window, layers)?;
        if window.contains(&Some(0)) {
            return fail("sliding_window 0 lets no token attend to itself".into());
        }
        let bias = arch.reads_attention_bias && flag(config, "attention_bias")?.unwrap_or(false);
        Ok(Self {
            family: family.to_owned(),
            hidden,
            heads,
            kv_heads,
            head_dim,
            intermediate: need("intermediate_size")?,
            layers,
            vocab: need("vocab_size")?,
            context,
            rms_eps,
            rope: rope(config, context)?,
            qkv_bias: arch.qkv_bias || bias,
            o_bias: bias,
            mlp_bias: flag(config, "mlp_bias")?.unwrap_or(false),
            qk_norm: arch.qk_norm,
            window,
            tied: flag(config, "tie_word_embeddings")?.unwrap_or(false),
        })
    }
}

/// config.json of the model that has these sizes and the layers `kept` of this one. `head_dim` is written out,
/// since it no longer follows from the others.
///
/// # Errors
/// What the config of this family cannot say: a window that changes at a layer which is removed.
pub fn resized(
    config: &Value,
    spec: &DecoderSpec,
    sizes: &Sizes,
    kept: &[usize],
) -> Result<Value, ModelError> {
    let mut out = config.clone();
    let Some(table) = out.as_object_mut() else {
        return Err(ModelError::Config("is no JSON object".into()));
    };
    let mut set = |key: &str, value: Value| table.insert(key.to_owned(), value);
    let mut changed = false;
    for (key, now, before) in [
        ("hidden_size", sizes.hidden, spec.hidden),
        ("intermediate_size", sizes.ffn, spec.intermediate),
        ("num_attention_heads", sizes.heads, spec.heads),
        ("num_key_value_heads", sizes.kv_heads, spec.kv_heads),
    ] {
        if now != before {
            set(key, json!(now));
            changed |= key != "intermediate_size";
        }
    }
    if changed {
        set("head_dim", json!(spec.head_dim));
        set("num_key_value_heads", json!(sizes.kv_heads));
    }
    if sizes.tied != spec.tied {
        set("tie_word_embeddings", json!(sizes.tied));
    }
    if kept.len() == spec.layers {
        return Ok(out);
    }
    set("num_hidden_layers", json!(kept.len()));
    let types = config.get("layer_types").and_then(Value::as_array);
    if let Some(types) = types {
        let left: Vec<Value> = kept.iter().filter_map(|&layer| types.get(layer).cloned()).collect();
        set("layer_types", json!(left));
    } else if let Some(first) = spec.window.iter().position(Option::is_some).filter(|&at| at > 0) {
        // Layers from this one on look through a window: so many of those before it are left.
        set("max_window_layers", json!(kept.iter().filter(|&&layer| layer < first).count()));
    }
    let left = DecoderSpec::read(&out)?;
    if left.window.iter().zip(kept).any(|(now, &layer)| *now != spec.window[layer]) {
        return Err(ModelError::Config(
            "the attention windows of the layers that are left cannot be said by this family's keys".into(),
        ));
    }
    Ok(out)
}

fn windows(
    config: &Value,
    rule: WindowRule,
    layers: usize,
) -> Result<Vec<Option<usize>>, ModelError> {
    let window = match (config.get("sliding_window"), rule) {
        // Mistral's window when config.json does not mention one; an explicit null is none.
        (None, WindowRule::Always) => Some(4096),
        _ => size(config, "sliding_window")?,
    };
    if let Some(types) = config.get("layer_types").and_then(Value::as_array) {
        if types.len() != layers {
            return Err(ModelError::Config(format!(
                "layer_types has {} entries for {layers} layers",
                types.len()
            )));
        }
        return types
            .iter()
            .map(|kind| match kind.as_str() {
                Some("full_attention") => Ok(None),
                Some("sliding_attention") => window.map(Some).ok_or_else(|| {
                    ModelError::Config("sliding_attention without `sliding_window`".into())
                }),
                other => Err(ModelError::Config(format!(
                    "layer type {} is not supported",
                    other.map_or_else(|| short(kind), |name| format!("`{name}`"))
                ))),
            })
            .collect();
    }
    let first = match rule {
        WindowRule::Never => layers,
        WindowRule::Always => 0,
        WindowRule::FromLayer if flag(config, "use_sliding_window")?.unwrap_or(false) => {
            size(config, "max_window_layers")?.unwrap_or(28)
        }
        WindowRule::FromLayer => layers,
    };
    Ok((0..layers).map(|layer| if layer >= first { window } else { None }).collect())
}

fn rope(config: &Value, context: usize) -> Result<RopeSpec, ModelError> {
    let null = Value::Null;
    let scaling = config
        .get("rope_parameters")
        .or_else(|| config.get("rope_scaling"))
        .filter(|v| !v.is_null())
        .unwrap_or(&null);
    if !scaling.is_null() && !scaling.is_object() {
        return Err(ModelError::Config(format!(
            "the rope scaling is {}, not a table",
            short(scaling)
        )));
    }
    for kind in ["full_attention", "sliding_attention"] {
        if scaling.get(kind).is_some() {
            return Err(ModelError::Config(format!(
                "rope parameters per layer type (`{kind}`) are not supported, only one set for all"
            )));
        }
    }
    let theta = match number(scaling, "rope_theta")? {
        Some(theta) => theta,
        None => number(config, "rope_theta")?.unwrap_or(10_000.0),
    };
    for holder in [scaling, config] {
        if let Some(partial) = number(holder, "partial_rotary_factor")?
            && (partial - 1.0).abs() > 1e-9
        {
            return Err(ModelError::Config(format!(
                "partial_rotary_factor {partial} is not supported"
            )));
        }
    }
    let name = scaling
        .get("rope_type")
        .or_else(|| scaling.get("type"))
        .and_then(Value::as_str)
        .unwrap_or("default");
    let need = |key: &str| {
        number(scaling, key)?
            .ok_or_else(|| ModelError::Config(format!("rope type {name} without `{key}`")))
    };
    let original = match number(scaling, "original_max_position_embeddings")? {
        Some(original) => Some(original),
        None => number(config, "original_max_position_embeddings")?,
    };
    let kind = match name {
        "default" => RopeKind::Default,
        "linear" => RopeKind::Linear { factor: need("factor")? },
        "llama3" => RopeKind::Llama3 {
            factor: need("factor")?,
            low: need("low_freq_factor")?,
            high: need("high_freq_factor")?,
            original: original.unwrap_or(context as f64),
        },
        "yarn" => {
            let factor = match number(scaling, "factor")? {
                Some(factor) => factor,
                None => context as f64 / original.unwrap_or(context as f64),
            };
            let mscale = |scale: f64, m: f64| {
                if scale <= 1.0 { 1.0 } else { 0.1 * m * scale.ln() + 1.0 }
            };
            let scales = (number(scaling, "mscale")?, number(scaling, "mscale_all_dim")?);
            let attention_factor = match (number(scaling, "attention_factor")?, scales) {
                (Some(given), _) => given,
                (None, (Some(m), Some(all))) if m != 0.0 && all != 0.0 => {
                    mscale(factor, m) / mscale(factor, all)
                }
                _ => mscale(factor, 1.0),
            };
            RopeKind::Yarn {
                factor,
                beta_fast: number(scaling, "beta_fast")?.unwrap_or(32.0),
                beta_slow: number(scaling, "beta_slow")?.unwrap_or(1.0),
                original: original.unwrap_or(context as f64),
                attention_factor,
                truncate: flag(scaling, "truncate")?.unwrap_or(true),
            }
        }
        other => {
            return Err(ModelError::Config(format!(
                "rope type `{other}` is not supported; supported: default, linear, llama3, yarn"
            )));
        }
    };
    let factor = match kind {
        RopeKind::Default => 1.0,
        RopeKind::Linear { factor }
        | RopeKind::Llama3 { factor, .. }
        | RopeKind::Yarn { factor, .. } => factor,
    };
    for (key, value) in [("rope_theta", theta), ("factor", factor)] {
        if !(value > 0.0 && value.is_finite()) {
            return Err(ModelError::Config(format!("rope `{key}` {value} is not positive")));
        }
    }
    let finite = match kind {
        RopeKind::Default | RopeKind::Linear { .. } => true,
        RopeKind::Llama3 { low, high, original, .. } => low > 0.0 && high > low && original > 0.0,
        RopeKind::Yarn { beta_fast, beta_slow, original, attention_factor, .. } => {
            beta_fast > 0.0 && beta_slow > 0.0 && original > 0.0 && attention_factor.is_finite()
        }
    };
    if !finite {
        return Err(ModelError::Config(format!(
            "the numbers of rope type {name} give no frequencies: {kind:?}"
        )));
    }
    Ok(RopeSpec { theta, kind })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(family: &str, change: &Value) -> Result<DecoderSpec, ModelError> {
        let mut config = json!({
            "model_type": family, "hidden_size": 32, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 48, "num_hidden_layers": 4,
            "vocab_size": 64, "max_position_embeddings": 128,
        });
        for (key, value) in change.as_object().unwrap() {
            config[key] = value.clone();
        }
        DecoderSpec::read(&config)
    }

    #[test]
    fn windows_follow_the_rule_of_the_family() {
        let window = |family, change| read(family, &change).unwrap().window;
        assert_eq!(window("llama", json!({"sliding_window": 8})), [None; 4]);
        assert_eq!(window("mistral", json!({"sliding_window": 8})), [Some(8); 4]);
        assert_eq!(window("mistral", json!({"sliding_window": null})), [None; 4]);
        assert_eq!(window("mistral", json!({})), [Some(4096); 4]);
        let late = json!({"sliding_window": 8, "max_window_layers": 3, "use_sliding_window": true});
        assert_eq!(window("qwen2", late), [None, None, None, Some(8)]);
        let off = json!({"sliding_window": 8, "max_window_layers": 0, "use_sliding_window": false});
        assert_eq!(window("qwen2", off), [None; 4]);
        let (full, local) = ("full_attention", "sliding_attention");
        let types = json!({"sliding_window": 8, "layer_types": [full, local, full, local]});
        assert_eq!(window("qwen3", types), [None, Some(8), None, Some(8)]);
    }

    #[test]
    fn unsupported_facts_are_named() {
        for (change, word) in [
            (json!({"model_type": null}), "model_type"),
            (json!({"model_type": "mamba"}), "supported: llama, mistral, qwen2, qwen3"),
            (json!({"hidden_act": "gelu"}), "gelu"),
            (json!({"hidden_size": null}), "hidden_size"),
            (json!({"num_hidden_layers": 1 << 20}), "num_hidden_layers"),
            (json!({"vocab_size": 1_u64 << 60}), "vocab_size"),
            (json!({"num_key_value_heads": 3}), "3 key/value heads"),
            (json!({"head_dim": 7}), "head_dim 7"),
            (json!({"model_type": "mistral", "sliding_window": 0}), "sliding_window 0"),
            (json!({"layer_types": ["full_attention"]}), "1 entries"),
            (json!({"rope_scaling": {"rope_type": "dynamic"}}), "default, linear, llama3, yarn"),
            (json!({"rope_scaling": {"type": "linear"}}), "without `factor`"),
            (json!({"rope_scaling": {"type": "linear", "factor": 0.0}}), "factor"),
            (json!({"rope_parameters": {"full_attention": {}}}), "per layer type"),
            (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
            (json!({"hidden_size": 1_u64 << 60}), "hidden_size"),
            (json!({"hidden_size": -32}), "`hidden_size` is -32"),
            (json!({"hidden_size": 32.5}), "`hidden_size` is 32.5"),
            (json!({"hidden_size": [[]]}), "`hidden_size` is a list"),
            (json!({"num_hidden_layers": 1_000_000_000_000_u64}), "num_hidden_layers"),
            (json!({"num_key_value_heads": -1}), "num_key_value_heads"),
            (json!({"head_dim": 1 << 28}), "head_dim"),
            (json!({"max_position_embeddings": u64::MAX}), "max_position_embeddings"),
            (json!({"rms_norm_eps": -1.0}), "rms_norm_eps"),
            (json!({"rms_norm_eps": 1e300}), "rms_norm_eps"),
            (json!({"rms_norm_eps": "1e-5"}), "`rms_norm_eps` is a text"),
            (json!({"tie_word_embeddings": "yes"}), "`tie_word_embeddings` is a text"),
            (json!({"rope_scaling": "linear"}), "rope scaling is a text"),
            (json!({"rope_theta": -1}), "rope_theta"),
            (
                json!({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}}),
                "no frequencies",
            ),
            (
                json!({"rope_scaling": {"rope_type": "yarn", "factor": 8, "beta_fast": 0}}),
                "no frequencies",
            ),
        ] {
            let error = read("llama", &change).unwrap_err().to_string();
            assert!(error.contains(word), "{change}: {error}");
        }
    }
}
