//! Files: containers and their metadata. Knows bytes on disk, not algorithms.

pub mod adapter;
pub mod artifact;
pub mod corpus;
pub mod gguf;
pub mod hf;
mod mmap;
pub mod pytorch;
pub mod quant_config;
pub mod safetensors;
pub mod stage;
pub mod tokenizer;

use std::path::{Path, PathBuf};

pub use adapter::Adapter;
pub use artifact::ArtifactWriter;
pub use corpus::{CorpusSource, Windows};
pub use hf::Checkpoint;
pub use mmap::{give_freed_memory_back, give_freed_pieces_back};
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

/// What a file says, as an error may show it: at most 300 bytes, control characters replaced. Names and
/// values in a file may be as long as the file and would move a terminal's cursor.
pub(crate) fn brief(text: impl std::fmt::Display) -> String {
    struct Clip(String);
    impl std::fmt::Write for Clip {
        fn write_str(&mut self, text: &str) -> std::fmt::Result {
            for c in text.chars() {
                if self.0.len() >= 300 {
                    return Err(std::fmt::Error);
                }
                self.0.push(if c.is_control() { char::REPLACEMENT_CHARACTER } else { c });
            }
            Ok(())
        }
    }
    let mut clip = Clip(String::new());
    if std::fmt::write(&mut clip, format_args!("{text}")).is_err() {
        clip.0.push_str("...");
    }
    clip.0
}

/// Most bytes that [`read_json`] takes from a file.
pub const MAX_JSON: u64 = 16 << 20;

/// Opens a regular file, or a link to one. Whatever else may lie under the name of a checkpoint's file
/// (a directory, a FIFO, a socket, a device) is refused before it is opened, since opening it could wait
/// for ever.
///
/// # Errors
/// When it is no regular file or the system refuses.
pub fn open_regular(path: &Path) -> Result<std::fs::File, FormatError> {
    let refuse = |kind: std::fs::FileType| {
        use std::os::unix::fs::FileTypeExt;
        let what = if kind.is_dir() {
            "a directory"
        } else if kind.is_fifo() {
            "a FIFO"
        } else if kind.is_socket() {
            "a socket"
        } else {
            "a device"
        };
        FormatError::invalid(
            path,
            format!("is {what} or a link to one; only regular files and links to them are read"),
        )
    };
    let kind = std::fs::metadata(path).map_err(FormatError::io(path))?.file_type();
    if !kind.is_file() {
        return Err(refuse(kind));
    }
    let file = std::fs::File::open(path).map_err(FormatError::io(path))?;
    // Asked again of what was opened: the name may have got another file meanwhile.
    let kind = file.metadata().map_err(FormatError::io(path))?.file_type();
    if kind.is_file() { Ok(file) } else { Err(refuse(kind)) }
}

/// Reads a regular file of at most `limit` bytes.
///
/// # Errors
/// As [`open_regular`], and when the file is larger.
pub fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>, FormatError> {
    use std::io::Read;
    let file = open_regular(path)?;
    let size = file.metadata().map_err(FormatError::io(path))?.len();
    let mut bytes = Vec::with_capacity(size.min(limit) as usize);
    file.take(limit + 1).read_to_end(&mut bytes).map_err(FormatError::io(path))?;
    if bytes.len() as u64 > limit {
        return Err(FormatError::invalid(
            path,
            format!(
                "has {} bytes, more than the {limit} that such a file may have",
                size.max(limit)
            ),
        ));
    }
    Ok(bytes)
}

/// blake3 of a file, read through a small buffer, as hex.
///
/// # Errors
/// When the file cannot be read.
pub fn hash_file(path: &Path) -> Result<String, FormatError> {
    use std::io::Read;
    let mut file = open_regular(path)?;
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

/// Parses a JSON file of at most [`MAX_JSON`] bytes, nested at most 127 deep. The value takes at most 256
/// bytes of memory for each byte of the file.
///
/// # Errors
/// When it cannot be read, is too large or is not JSON.
pub fn read_json(path: &Path) -> Result<serde_json::Value, FormatError> {
    let bytes = read_bounded(path, MAX_JSON)?;
    serde_json::from_slice(&bytes).map_err(|e| FormatError::invalid(path, format!("not JSON: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_do_not_repeat_a_whole_file() {
        assert_eq!(brief("tensor \u{1b}[2J"), "tensor \u{fffd}[2J");
        assert_eq!(brief("a".repeat(1 << 20)).len(), 303);
        let name = "n".repeat(1 << 20);
        for json in [
            format!(r#"{{"{name}":1}}"#),
            format!(r#"{{"{name}":{{"dtype":"{name}"}}}}"#),
            format!(r#"{{"a":{{"shape":"{name}"}}}}"#),
        ] {
            let file = [&(json.len() as u64).to_le_bytes(), json.as_bytes()].concat();
            assert!(safetensors::parse(&file).unwrap_err().len() < 2000);
        }
        for json in [
            format!(r#"{{"weight_map":{{"{name}":"{name}"}}}}"#),
            format!(r#"{{"weight_map":"{name}"}}"#),
        ] {
            assert!(hf::Index::parse(json.as_bytes()).unwrap_err().len() < 2000);
        }
        assert!(corpus::parse_ids(&format!("\"{name}\""), 8, 8).unwrap_err().len() < 2000);
        let pickle = format!("c{name}\n{name}\n.");
        assert!(pytorch::pickle::state_dict(pickle.as_bytes()).unwrap_err().len() < 2000);
    }
}
