//! Token windows for calibration and evaluation. Windows do not overlap; calibration takes windows evenly
//! spaced over the text, `floor(linspace(0, w − 1, min(n, w)))`, so that other tools can be given the same.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::{FormatError, Tokenizer, brief};

/// Where tokens come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CorpusSource {
    /// Text files, tokenized one after the other.
    Text(Vec<PathBuf>),
    /// JSON lines of `{"input_ids": [...]}`, one window each.
    Ids(PathBuf),
}

/// Token windows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Windows {
    /// One list of token ids per window.
    pub ids: Vec<Vec<u32>>,
    /// blake3 over all ids, hex.
    pub hash: String,
}

impl Windows {
    fn new(ids: Vec<Vec<u32>>) -> Self {
        let mut hasher = blake3::Hasher::new();
        for window in &ids {
            hasher.update(&(window.len() as u64).to_le_bytes());
            for id in window {
                hasher.update(&id.to_le_bytes());
            }
        }
        Self { hash: hasher.finalize().to_hex().to_string(), ids }
    }

    /// Tokens in all windows.
    pub fn tokens(&self) -> usize {
        self.ids.iter().map(Vec::len).sum()
    }
}

/// `samples` windows of `context` tokens, evenly spaced (text), or the first `samples` lines (ids).
///
/// # Errors
/// Unreadable or empty input, fewer tokens than one window, ids beyond the vocabulary.
pub fn calibration(
    source: &CorpusSource,
    tokenizer: Option<&Tokenizer>,
    context: usize,
    samples: usize,
    vocab: usize,
) -> Result<Windows, FormatError> {
    let mut all = windows(source, tokenizer, context, vocab)?;
    let count = all.len();
    let take = samples.min(count);
    if matches!(source, CorpusSource::Ids(_)) {
        all.truncate(take);
        return Ok(Windows::new(all));
    }
    Ok(Windows::new(
        evenly(count, take).into_iter().map(|at| std::mem::take(&mut all[at])).collect(),
    ))
}

/// numpy's `linspace(0, count − 1, take).astype(int)`.
fn evenly(count: usize, take: usize) -> Vec<usize> {
    if take <= 1 {
        return (0..take).collect();
    }
    let step = (count - 1) as f64 / (take - 1) as f64;
    (0..take).map(|i| if i + 1 == take { count - 1 } else { (i as f64 * step) as usize }).collect()
}

/// All windows of `context` tokens (text), or all lines cut to `context` (ids); at most `max`.
///
/// # Errors
/// As [`calibration`].
pub fn evaluation(
    source: &CorpusSource,
    tokenizer: Option<&Tokenizer>,
    context: usize,
    max: Option<usize>,
    vocab: usize,
) -> Result<Windows, FormatError> {
    let mut all = windows(source, tokenizer, context, vocab)?;
    all.truncate(max.unwrap_or(usize::MAX));
    Ok(Windows::new(all))
}

fn windows(
    source: &CorpusSource,
    tokenizer: Option<&Tokenizer>,
    context: usize,
    vocab: usize,
) -> Result<Vec<Vec<u32>>, FormatError> {
    match source {
        CorpusSource::Text(paths) => {
            let first = paths.first().map_or(Path::new("--text"), PathBuf::as_path);
            let tokenizer = tokenizer.ok_or_else(|| {
                FormatError::invalid(
                    first,
                    "text needs a tokenizer.json in the checkpoint; give --ids instead",
                )
            })?;
            let mut ids = Vec::new();
            for path in paths {
                let text = std::fs::read_to_string(path).map_err(FormatError::io(path))?;
                ids.extend(tokenizer.encode(&text)?);
                check(path, &ids, vocab)?;
            }
            if ids.len() < context || context == 0 {
                return Err(FormatError::invalid(
                    first,
                    format!(
                        "{} tokens are fewer than one window of {context}; give more text or a smaller --context",
                        ids.len()
                    ),
                ));
            }
            Ok(ids.chunks_exact(context).map(<[u32]>::to_vec).collect())
        }
        CorpusSource::Ids(path) => {
            let text = std::fs::read_to_string(path).map_err(FormatError::io(path))?;
            parse_ids(&text, context, vocab).map_err(|reason| FormatError::invalid(path, reason))
        }
    }
}

/// One line of a file of token ids; other keys are skipped.
#[derive(Deserialize)]
struct Line {
    input_ids: Option<Vec<u32>>,
}

/// Windows of a file of token ids: one `{"input_ids": [...]}` a line, cut to `context`. Memory taken: at
/// most 64 bytes for each byte of the text plus 4 KiB.
///
/// # Errors
/// Lines of another form, fewer than two tokens in one, ids that are no ids or beyond the vocabulary, no line.
pub fn parse_ids(text: &str, context: usize, vocab: usize) -> Result<Vec<Vec<u32>>, String> {
    let mut all = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let wrong = |what: &str| format!("line {}: {what}", number + 1);
        let line: Line = serde_json::from_str(line).map_err(|error| {
            wrong(&format!("expected {{\"input_ids\": [...]}}: {}", brief(error)))
        })?;
        let mut ids =
            line.input_ids.ok_or_else(|| wrong("expected {\"input_ids\": [...]}, found none"))?;
        ids.truncate(context);
        ids.shrink_to_fit();
        if ids.len() < 2 {
            return Err(wrong("a window needs at least two tokens"));
        }
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
            return Err(wrong(&beyond(*id, vocab)));
        }
        all.push(ids);
    }
    if all.is_empty() {
        return Err("holds no window".into());
    }
    Ok(all)
}

fn beyond(id: u32, vocab: usize) -> String {
    format!("token id {id} is beyond the model's vocabulary of {vocab}: wrong tokenizer?")
}

fn check(path: &Path, ids: &[u32], vocab: usize) -> Result<(), FormatError> {
    match ids.iter().find(|&&id| id as usize >= vocab) {
        None => Ok(()),
        Some(id) => Err(FormatError::invalid(path, beyond(*id, vocab))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_spaced_as_numpy_spaces_them() {
        // numpy: np.linspace(0, w - 1, n).astype(int)
        assert_eq!(evenly(49, 49), (0..49).collect::<Vec<_>>());
        assert_eq!(evenly(10, 4), [0, 3, 6, 9]);
        assert_eq!(evenly(11, 4), [0, 3, 6, 10]);
        assert_eq!(evenly(7, 5), [0, 1, 3, 4, 6]);
        assert_eq!(evenly(5, 1), [0]);
    }

    #[test]
    fn ids_are_checked_line_by_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ids.jsonl");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            calibration(&CorpusSource::Ids(path.clone()), None, 4, 8, 100)
                .map_err(|e| e.to_string())
        };
        let windows = read("{\"input_ids\": [1,2,3,4,5]}\n{\"input_ids\": [6,7]}\n").unwrap();
        assert_eq!(windows.ids, [vec![1, 2, 3, 4], vec![6, 7]]);
        assert!(read("").unwrap_err().contains("no window"));
        assert!(read("{\"input_ids\": [1,200]}").unwrap_err().contains("wrong tokenizer"));
        assert!(read("{\"input_ids\": [1,2]}\n{\"ids\": [1]}").unwrap_err().contains("line 2"));
        for bad in ["-1", "1.5", "4294967296", "\"1\"", "null"] {
            let error = read(&format!("{{\"input_ids\": [1, {bad}]}}")).unwrap_err();
            assert!(error.contains("line 1: expected"), "{error}");
        }
    }
}
