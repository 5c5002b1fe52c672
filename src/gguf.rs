//! GGUF files between checkpoint and plan: what of a model and its tokenizer goes into a file's metadata, and
//! the function with which formats read blocks.

use std::{collections::BTreeMap, path::Path};

use attar_formats::{
    Checkpoint,
    gguf::{
        Gguf, Metadata, Params,
        artifact::{GgufPlan, file_type, name_of},
        params::Rope,
        vocab::{self, Sources},
    },
    read_json,
};
use attar_model::{DecoderSpec, spec::RopeKind};
use attar_tensor::{BlockType, DType, TensorHeader, TensorSource};
use serde_json::Value;

use crate::Error;

/// Values of whole blocks.
pub(crate) fn dequantize(block: BlockType, bytes: &[u8], out: &mut [f32]) {
    attar_kernels::layout::Ggml::new(block).dequantize_blocks(bytes, out);
}

/// What a file is written with, and what of the model runtimes of GGUF read otherwise than we do.
pub(crate) struct Described {
    pub(crate) params: Params,
    metadata: Metadata,
    pub(crate) notes: Vec<String>,
}

impl Described {
    /// For a file of plain numbers.
    pub(crate) fn set_file_type(&mut self, dtype: DType) {
        for (key, value) in &mut self.metadata.0 {
            if key == "general.file_type" {
                *value = attar_formats::gguf::Value::U32(file_type(None, dtype));
            }
        }
    }
}

/// The file of a model in which these tensors are written.
///
/// # Errors
/// What of the model or its tokenizer GGUF cannot say.
pub(crate) fn describe(
    checkpoint: &Checkpoint,
    spec: &DecoderSpec,
    mostly: Option<BlockType>,
) -> Result<Described, Error> {
    let fail = |reason: String| {
        Error::from(format!(
            "{}: cannot be written as GGUF: {reason}",
            checkpoint.place().display()
        ))
    };
    let (params, notes) = params_of(checkpoint, spec).map_err(&fail)?;
    let dense = checkpoint.headers().iter().find(|header| header.shape.len() == 2);
    let dense = dense.map_or(DType::F16, |header| header.dtype);
    let mut metadata = params.to_metadata(file_type(mostly, dense)).map_err(&fail)?;
    let own = match checkpoint.gguf() {
        // A tokenizer that came from a GGUF file goes into the next one as it is.
        Some(gguf) => {
            let all = gguf.file().header().metadata.0.iter();
            Metadata(all.filter(|(key, _)| key.starts_with("tokenizer.")).cloned().collect())
        }
        None => {
            vocab::to_metadata(&tokenizer_files(checkpoint.folder())?, spec.vocab).map_err(&fail)?
        }
    };
    metadata.0.extend(own.0);
    Ok(Described { params, metadata, notes })
}

/// The plan of a file; `blocks` gives the type of a weight in blocks.
pub(crate) fn plan(
    described: Described,
    headers: Vec<TensorHeader>,
    blocks: impl Fn(&str) -> Option<BlockType>,
) -> GgufPlan {
    let types: BTreeMap<String, BlockType> = headers
        .iter()
        .filter_map(|header| header.name.strip_suffix(".blocks"))
        .filter_map(|stem| Some((stem.to_owned(), blocks(stem)?)))
        .collect();
    let Described { params, metadata, .. } = described;
    GgufPlan { params, metadata, headers, blocks: types }
}

/// Every tensor must have a name there.
pub(crate) fn check_names<'a>(names: impl Iterator<Item = &'a str>) -> Result<(), Error> {
    let unknown: Vec<String> = names.filter_map(|name| name_of(name).err()).collect();
    match unknown.as_slice() {
        [] => Ok(()),
        [first] => Err(first.clone().into()),
        [first, rest @ ..] => Err(format!("{first} (and {} more)", rest.len()).into()),
    }
}

fn params_of(checkpoint: &Checkpoint, spec: &DecoderSpec) -> Result<(Params, Vec<String>), String> {
    let mut notes = Vec::new();
    let rope = match spec.rope.kind {
        RopeKind::Default => Rope::Plain,
        RopeKind::Linear { factor } => Rope::Linear { factor },
        RopeKind::Llama3 { factor, low, high, original } => {
            Rope::Llama3 { factor, low, high, original }
        }
        RopeKind::Yarn { factor, beta_fast, beta_slow, original, attention_factor, truncate } => {
            if !truncate {
                return Err("its YaRN bands are not truncated, which GGUF cannot say".into());
            }
            Rope::Yarn { factor, beta_fast, beta_slow, original, attention_factor }
        }
    };
    let window = spec.window.iter().flatten().next().copied();
    if let Some(window) = window {
        if spec.window.iter().any(|own| *own != Some(window)) {
            return Err("windows of attention differ between blocks, which GGUF cannot say".into());
        }
        notes.push(format!(
            "llama.cpp reads no sliding window for this architecture: beyond {window} tokens its results differ"
        ));
    }
    if spec.family == "qwen3" && spec.qkv_bias {
        return Err("qwen3 with biases of attention has no place in GGUF".into());
    }
    if spec.family == "qwen2" && spec.heads * spec.head_dim != spec.hidden {
        return Err(format!(
            "GGUF's qwen2 has query rows as many as the model is wide, not {} for {}",
            spec.heads * spec.head_dim,
            spec.hidden
        ));
    }
    let config = checkpoint.config();
    let named = config.get("_name_or_path").and_then(Value::as_str).unwrap_or_default();
    let named = named.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    let name = match checkpoint.gguf().map(Gguf::params) {
        Some(params) if !params.name.is_empty() => params.name.clone(),
        _ if named.is_empty() => spec.family.clone(),
        _ => named.to_owned(),
    };
    let params = Params {
        family: spec.family.clone(),
        name,
        hidden: spec.hidden,
        heads: spec.heads,
        kv_heads: spec.kv_heads,
        head_dim: spec.head_dim,
        intermediate: spec.intermediate,
        layers: spec.layers,
        vocab: spec.vocab,
        context: spec.context,
        rms_eps: f64::from(spec.rms_eps),
        theta: spec.rope.theta,
        rope,
        window,
    };
    params.architecture()?;
    Ok((params, notes))
}

fn tokenizer_files(folder: &Path) -> Result<Sources, Error> {
    let optional = |name: &str| -> Result<Value, Error> {
        let path = folder.join(name);
        if path.exists() { Ok(read_json(&path)?) } else { Ok(Value::Null) }
    };
    let path = folder.join("tokenizer.json");
    if !path.exists() {
        return Err(format!(
            "{}: has no tokenizer.json, which a GGUF file needs",
            folder.display()
        )
        .into());
    }
    let template = folder.join("chat_template.jinja");
    let template = if template.exists() {
        let text = attar_formats::read_bounded(&template, attar_formats::MAX_JSON)?;
        Some(String::from_utf8(text).map_err(|_| format!("{}: not UTF-8", template.display()))?)
    } else {
        None
    };
    let tokenizer = attar_formats::read_bounded(&path, 256 << 20)?;
    Ok(Sources {
        tokenizer: serde_json::from_slice(&tokenizer)
            .map_err(|error| format!("{}: not JSON: {error}", path.display()))?,
        config: optional("tokenizer_config.json")?,
        ids: vec![optional("config.json")?, optional("generation_config.json")?],
        template,
    })
}
