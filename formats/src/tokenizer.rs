//! Text to token ids and back, through the `tokenizers` crate.

use std::path::Path;

use crate::{FormatError, read_bounded, read_json};

/// Largest tokenizer.json that is read, bytes; Gemma's has 33 MB.
const MAX_TOKENIZER: u64 = 256 << 20;

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
    /// Opens `tokenizer.json` of a model directory. Memory taken: at most 1024 bytes for each byte of the
    /// file (vocabularies are kept in several tables) plus 64 MiB.
    ///
    /// # Errors
    /// When it is missing, damaged, no regular file or larger than 256 MiB.
    pub fn open(folder: &Path) -> Result<Self, FormatError> {
        let path = folder.join("tokenizer.json");
        if !path.exists() {
            return Err(FormatError::invalid(
                folder,
                "has no tokenizer.json; give token ids with --ids instead of --text",
            ));
        }
        let inner = parse(&read_bounded(&path, MAX_TOKENIZER)?)
            .map_err(|reason| FormatError::invalid(&path, reason))?;
        let (mut bos, mut eos) = (None, Vec::new());
        for name in ["config.json", "generation_config.json"] {
            let path = folder.join(name);
            if !path.exists() {
                continue;
            }
            let config = read_json(&path)?;
            // What is no token id (null, -1, a number beyond 32 bits) names no token.
            let token = |v: &serde_json::Value| v.as_u64().and_then(|v| u32::try_from(v).ok());
            bos = bos.or(config.get("bos_token_id").and_then(token));
            match config.get("eos_token_id") {
                Some(serde_json::Value::Array(list)) => eos.extend(list.iter().filter_map(token)),
                other => eos.extend(other.and_then(token)),
            }
        }
        eos.sort_unstable();
        eos.dedup();
        Ok(Self { inner, bos, eos })
    }

    /// Reads the text of a `tokenizer.json`, without the special tokens that config.json names; memory as
    /// [`Tokenizer::open`].
    ///
    /// # Errors
    /// When it is damaged.
    pub fn parse(json: &[u8]) -> Result<Self, String> {
        Ok(Self { inner: parse(json)?, bos: None, eos: Vec::new() })
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

fn parse(json: &[u8]) -> Result<tokenizers::Tokenizer, String> {
    let mut inner = tokenizers::Tokenizer::from_bytes(json)
        .map_err(|error| format!("not a tokenizer: {error}"))?;
    // Truncation and padding are for training batches; a corpus is tokenized whole.
    inner.with_truncation(None).map_err(|error| error.to_string())?;
    inner.with_padding(None);
    Ok(inner)
}
