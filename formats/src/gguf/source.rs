//! A GGUF file seen as a checkpoint: Hugging Face's names, order of rows and config.json.
//!
//! Tensors of plain numbers keep their type. Tensors in blocks show as `<name>.blocks`, U8 `[rows, bytes of a
//! row]`, or, when a function that dequantizes them is given, as `<name>.weight` in F32. Tensors of types whose
//! codes are not understood show as `<name>.<type>`, U8, whole.

use std::path::Path;

use attar_tensor::{BlockType, DType, TensorHeader, TensorView};
use serde_json::{Value as Json, json};

use super::{
    GgufFile, Params, names,
    value::{Array, Value},
    vocab,
};
use crate::{FormatError, Tokenizer, brief};

/// Writes the values of whole blocks.
pub type Dequantize = fn(BlockType, &[u8], &mut [f32]);

#[derive(Debug)]
struct Entry {
    header: TensorHeader,
    /// Index into the file's tensors.
    at: usize,
    block: Option<BlockType>,
    /// Rows are interleaved within heads.
    interleaved: bool,
}

/// A file with its view as a checkpoint.
#[derive(Debug)]
pub struct Gguf {
    file: GgufFile,
    params: Params,
    config: Json,
    /// Sorted by name.
    entries: Vec<Entry>,
    dequantize: Option<Dequantize>,
    unreadable: Vec<String>,
}

impl Gguf {
    /// Opens a file of a model. With `dequantize`, weights in blocks read as F32. Memory taken: as
    /// [`super::reader::parse`], twice.
    ///
    /// # Errors
    /// A damaged file, an architecture that is not supported, facts that are missing.
    pub fn open(path: &Path, dequantize: Option<Dequantize>) -> Result<Self, FormatError> {
        let invalid = |reason: String| FormatError::invalid(path, reason);
        let file = GgufFile::open(path)?;
        let header = file.header();
        let find = |name: &str| header.tensors.iter().find(|tensor| tensor.name == name);
        let divisors: Option<Vec<f32>> = find(names::ROPE_FREQS)
            .map(|tensor| match tensor.ty.dtype() {
                Some(DType::F32) => {
                    let number = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                    Ok(file.bytes(tensor).chunks_exact(4).map(number).collect())
                }
                _ => Err(invalid(format!(
                    "{} is {}; frequencies are F32",
                    names::ROPE_FREQS,
                    tensor.ty
                ))),
            })
            .transpose()?;
        let mut params = Params::read(header, divisors.as_deref()).map_err(&invalid)?;
        if let Some(&[_, rows]) = find("token_embd.weight").map(|tensor| tensor.dims.as_slice()) {
            params.vocab = rows;
        }
        let (mut entries, mut unreadable) = (Vec::new(), Vec::new());
        for (at, tensor) in header.tensors.iter().enumerate() {
            if tensor.name == names::ROPE_FREQS {
                continue;
            }
            let name = names::from_gguf(&tensor.name).unwrap_or_else(|| tensor.name.clone());
            let stem = name.strip_suffix(".weight").unwrap_or(&name).to_owned();
            let head = |part: &str| {
                params.interleaved()
                    && [".weight", ".bias"]
                        .iter()
                        .any(|end| name.strip_suffix(end).is_some_and(|stem| stem.ends_with(part)))
            };
            // Bytes of an unknown type are carried as they lie.
            let known = tensor.ty.dtype().is_some() || tensor.ty.block().is_some();
            let interleaved = known && (head(".self_attn.q_proj") || head(".self_attn.k_proj"));
            let mut shape = tensor.shape();
            if interleaved && !shape[0].is_multiple_of(params.head_dim.max(1)) {
                return Err(invalid(format!(
                    "tensor {} has {} rows, no multiple of the {} of a head",
                    brief(&tensor.name),
                    shape[0],
                    params.head_dim
                )));
            }
            let rows: usize = shape[..shape.len() - 1].iter().product();
            let block = tensor.ty.block();
            let header = match (tensor.ty.dtype(), block) {
                (Some(dtype), _) => TensorHeader { name, dtype, shape },
                (None, Some(_)) if dequantize.is_some() => {
                    TensorHeader { name, dtype: DType::F32, shape }
                }
                (None, Some(_)) => {
                    let name = format!("{stem}.blocks");
                    let last = shape.len() - 1;
                    shape[last] = tensor.length / rows.max(1);
                    TensorHeader { name, dtype: DType::U8, shape }
                }
                (None, None) => {
                    let ty = tensor.ty.to_string().replace(' ', "_");
                    unreadable.push(format!("{} ({})", brief(&tensor.name), tensor.ty));
                    let shape = vec![tensor.length];
                    TensorHeader { name: format!("{stem}.{ty}"), dtype: DType::U8, shape }
                }
            };
            entries.push(Entry { header, at, block, interleaved });
        }
        entries.sort_by(|a, b| a.header.name.cmp(&b.header.name));
        if let Some(pair) =
            entries.windows(2).find(|pair| pair[0].header.name == pair[1].header.name)
        {
            return Err(invalid(format!("tensor {} stands twice", brief(&pair[0].header.name))));
        }
        let has = |name: &str| {
            entries.binary_search_by(|entry| entry.header.name.as_str().cmp(name)).is_ok()
        };
        let mut config = params.to_config(&has);
        let id = |name: &str| {
            let value = header.metadata.get(&format!("tokenizer.ggml.{name}"));
            value.and_then(Value::integer)
        };
        for name in ["bos_token_id", "eos_token_id"] {
            if let Some(id) = id(name) {
                config[name] = json!(id);
            }
        }
        let types: serde_json::Map<String, Json> = entries
            .iter()
            .filter(|_| dequantize.is_none())
            .filter_map(|entry| {
                let stem = entry.header.name.strip_suffix(".blocks")?;
                Some((stem.to_owned(), json!(entry.block?.name())))
            })
            .collect();
        if !types.is_empty() {
            config["quantization_config"] = json!({"quant_method": "gguf", "types": types});
        }
        Ok(Self { file, params, config, entries, dequantize, unreadable })
    }

    /// The file as it is.
    pub fn file(&self) -> &GgufFile {
        &self.file
    }

    /// Numbers of the architecture.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// config.json as a Hugging Face directory would have it; types of weights in blocks stand in
    /// `quantization_config`.
    pub fn config(&self) -> &Json {
        &self.config
    }

    /// Tensors of types whose codes are not understood, with the type.
    pub fn unreadable(&self) -> &[String] {
        &self.unreadable
    }

    /// Block types that occur, with the number of their tensors.
    pub fn block_types(&self) -> Vec<(BlockType, usize)> {
        BlockType::ALL
            .into_iter()
            .map(|block| (block, self.entries.iter().filter(|e| e.block == Some(block)).count()))
            .filter(|(_, count)| *count > 0)
            .collect()
    }

    pub(crate) fn headers(&self) -> impl Iterator<Item = &TensorHeader> {
        self.entries.iter().map(|entry| &entry.header)
    }

    fn find(&self, name: &str) -> Option<&Entry> {
        let at =
            self.entries.binary_search_by(|entry| entry.header.name.as_str().cmp(name)).ok()?;
        Some(&self.entries[at])
    }

    /// The data of a tensor in Hugging Face's order.
    pub(crate) fn view(&self, name: &str) -> Option<TensorView<'_>> {
        let entry = self.find(name)?;
        self.rows(entry, 0, usize::MAX)
    }

    /// One row of a matrix.
    pub(crate) fn row(&self, name: &str, row: usize) -> Option<TensorView<'_>> {
        let entry = self.find(name)?;
        (entry.header.shape.len() == 2 && row < entry.header.shape[0])
            .then(|| self.rows(entry, row, 1))
            .flatten()
    }

    /// `count` rows from `first` on; all of them for a count beyond the end.
    fn rows(&self, entry: &Entry, first: usize, count: usize) -> Option<TensorView<'_>> {
        let tensor = &self.file.header().tensors[entry.at];
        let mut shape = entry.header.shape.clone();
        let all = shape[0];
        let count = count.min(all - first);
        shape[0] = count;
        let bytes = self.file.bytes(tensor);
        let row = bytes.len() / all.max(1);
        let raw = if entry.interleaved {
            let order = names::deinterleave(all, self.params.head_dim);
            let mut out = Vec::with_capacity(count * row);
            for &at in &order[first..first + count] {
                out.extend_from_slice(&bytes[at * row..(at + 1) * row]);
            }
            std::borrow::Cow::Owned(out)
        } else {
            std::borrow::Cow::Borrowed(&bytes[first * row..(first + count) * row])
        };
        if let (Some(block), Some(dequantize)) = (entry.block, self.dequantize) {
            let mut values = vec![0.0f32; shape.iter().product()];
            dequantize(block, &raw, &mut values);
            let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            return TensorView::new(DType::F32, shape, std::borrow::Cow::Owned(bytes)).ok();
        }
        TensorView::new(entry.header.dtype, shape, raw).ok()
    }

    pub(crate) fn prefetch(&self, name: &str) {
        if let Some(entry) = self.find(name) {
            self.file.prefetch(&self.file.header().tensors[entry.at]);
        }
    }

    pub(crate) fn release(&self, name: &str) {
        if let Some(entry) = self.find(name) {
            self.file.release(&self.file.header().tensors[entry.at]);
        }
    }

    /// The tokenizer, rebuilt from the metadata.
    ///
    /// # Errors
    /// When the metadata name a tokenizer that cannot be rebuilt.
    pub fn tokenizer(&self) -> Result<Tokenizer, FormatError> {
        let fail = |reason: String| {
            FormatError::invalid(
                self.file.path(),
                format!("{reason}; give token ids with --ids instead of text"),
            )
        };
        let (json, ids) = vocab::from_metadata(&self.file.header().metadata).map_err(&fail)?;
        let text = serde_json::to_vec(&json).expect("a JSON value serializes");
        let mut tokenizer = Tokenizer::parse(&text).map_err(&fail)?;
        let id = |name: &str| ids[name].as_u64().and_then(|id| u32::try_from(id).ok());
        tokenizer.bos = id("bos_token_id");
        tokenizer.eos = id("eos_token_id").into_iter().collect();
        Ok(tokenizer)
    }

    /// Files of a Hugging Face directory that this one stands for: tokenizer and ids of special tokens.
    /// Empty when the tokenizer cannot be rebuilt.
    pub fn generated_files(&self) -> Vec<(&'static str, Json)> {
        let metadata = &self.file.header().metadata;
        let Ok((tokenizer, ids)) = vocab::from_metadata(metadata) else { return Vec::new() };
        let mut config = serde_json::Map::new();
        config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
        let tokens = match metadata.get("tokenizer.ggml.tokens") {
            Some(Value::Array(Array::Strings(tokens))) => tokens.as_slice(),
            _ => &[],
        };
        for (key, token) in [("bos_token_id", "bos_token"), ("eos_token_id", "eos_token")] {
            let id = ids[key].as_u64().and_then(|id| tokens.get(id as usize));
            if let Some(text) = id {
                config.insert(token.into(), json!(text));
            }
        }
        for key in ["add_bos_token", "add_eos_token"] {
            if let Some(Value::Bool(on)) = metadata.get(&format!("tokenizer.ggml.{key}")) {
                config.insert(key.into(), json!(on));
            }
        }
        if let Some(template) = metadata.get("tokenizer.chat_template").and_then(Value::text) {
            config.insert("chat_template".into(), json!(template));
        }
        vec![
            ("tokenizer.json", tokenizer),
            ("tokenizer_config.json", Json::Object(config)),
            ("generation_config.json", ids),
        ]
    }
}
