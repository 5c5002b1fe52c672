//! Files: containers and their metadata. Knows bytes on disk, not algorithms.

pub mod artifact;
pub mod corpus;
pub mod hf;
mod mmap;
pub mod quant_config;
pub mod safetensors;
pub mod stage;
pub mod tokenizer;

use std::path::{Path, PathBuf};

pub use artifact::ArtifactWriter;
pub use corpus::{CorpusSource, Windows};
pub use hf::Checkpoint;
pub use mmap::give_freed_memory_back;
pub use tokenizer::Tokenizer;

/// What is wrong with a file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The operating system refused.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's word.
        source: std::io::Error,
    },
    /// The file's content is not what its format says.
    #[error("{path}: {reason}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong and what can be done.
        reason: String,
    },
}

impl FormatError {
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_path_buf(), source }
    }

    pub(crate) fn invalid(path: &Path, reason: impl Into<String>) -> Self {
        Self::Invalid { path: path.to_path_buf(), reason: reason.into() }
    }
}

/// blake3 of a file, read through a small buffer, as hex.
///
/// # Errors
/// When the file cannot be read.
pub fn hash_file(path: &Path) -> Result<String, FormatError> {
    use std::io::Read;
    let mut file = std::fs::File::open(path).map_err(FormatError::io(path))?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0u8; 1 << 18];
    loop {
        let n = file.read(&mut buffer).map_err(FormatError::io(path))?;
        if n == 0 {
            return Ok(hasher.finalize().to_hex().to_string());
        }
        hasher.update(&buffer[..n]);
    }
}

/// blake3 of bytes, as hex.
pub fn hash_bytes(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

/// Parses a JSON file.
///
/// # Errors
/// When it cannot be read or is not JSON.
pub fn read_json(path: &Path) -> Result<serde_json::Value, FormatError> {
    let bytes = std::fs::read(path).map_err(FormatError::io(path))?;
    serde_json::from_slice(&bytes).map_err(|e| FormatError::invalid(path, format!("not JSON: {e}")))
}
