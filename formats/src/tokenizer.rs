//! Text to token ids and back, through the `tokenizers` crate.

use std::path::Path;

use crate::{FormatError, read_json};

/// The tokenizer of a checkpoint.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// `bos_token_id` of config.json or generation_config.json.
    pub bos: Option<u32>,
    /// `eos_token_id` (one or several).
    pub eos: Vec<u32>,
}

impl Tokenizer {
    /// Opens `tokenizer.json` of a model directory.
    ///
    /// # Errors
    /// When it is missing or damaged.
    pub fn open(folder: &Path) -> Result<Self, FormatError> {
        let path = folder.join("tokenizer.json");
        if !path.exists() {
            return Err(FormatError::invalid(
                folder,
                "has no tokenizer.json; give token ids with --ids instead of --text",
            ));
        }
        let mut inner = tokenizers::Tokenizer::from_file(&path)
            .map_err(|error| FormatError::invalid(&path, format!("not a tokenizer: {error}")))?;
        // Truncation and padding are for training batches; a corpus is tokenized whole.
        inner
            .with_truncation(None)
            .map_err(|error| FormatError::invalid(&path, error.to_string()))?;
        inner.with_padding(None);
        let (mut bos, mut eos) = (None, Vec::new());
        for name in ["config.json", "generation_config.json"] {
            let path = folder.join(name);
            if !path.exists() {
                continue;
            }
            let config = read_json(&path)?;
            let id =
                |key: &str| config.get(key).and_then(serde_json::Value::as_u64).map(|v| v as u32);
            bos = bos.or(id("bos_token_id"));
            eos.extend(id("eos_token_id"));
            if let Some(list) = config.get("eos_token_id").and_then(|v| v.as_array()) {
                eos.extend(list.iter().filter_map(serde_json::Value::as_u64).map(|v| v as u32));
            }
        }
        eos.sort_unstable();
        eos.dedup();
        Ok(Self { inner, bos, eos })
    }

    /// Token ids of a text, no special token added.
    ///
    /// # Errors
    /// When the tokenizer cannot encode it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, FormatError> {
        let encoding = self.inner.encode_fast(text, false).map_err(|error| {
            FormatError::invalid(Path::new("tokenizer.json"), format!("cannot encode: {error}"))
        })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of token ids, special tokens left out.
    ///
    /// # Errors
    /// When an id is unknown.
    pub fn decode(&self, ids: &[u32]) -> Result<String, FormatError> {
        self.inner.decode(ids, true).map_err(|error| {
            FormatError::invalid(Path::new("tokenizer.json"), format!("cannot decode: {error}"))
        })
    }
}
