//! Text to token ids and back, through the `tokenizers` crate.

use std::{panic::resume_unwind, path::Path};

use serde::Deserialize;
use serde_json::Value;

use crate::{FormatError, brief, read_bounded, read_json};

/// Largest tokenizer.json that is read, bytes; Gemma's has 33 MB.
const MAX_TOKENIZER: u64 = 256 << 20;

/// Bytes of text that are encoded at once.
const PIECE: usize = 64 << 10;
/// Bytes that two pieces share.
const OVERLAP: usize = 4 << 10;
/// Tokens in which two pieces must agree where they are joined.
const SEAM: usize = 32;
/// Bytes of stack for encoding, as a main thread has.
const STACK: usize = 8 << 20;

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

    /// Token ids of a text, no special token added. A long text is encoded piece by piece, since the library
    /// takes more than a hundred bytes for each byte of what it is given at once; pieces overlap and are
    /// joined where both have the same tokens at the same places. Where they nowhere have (a tokenizer that
    /// looks far ahead), the text is encoded as a whole.
    ///
    /// This happens on a thread of its own: the library keeps the words that a tokenizer has merged in a table of
    /// the thread, which it never empties, not even when the tokenizer is gone.
    ///
    /// # Errors
    /// When the tokenizer cannot encode it, or there can be no thread.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, FormatError> {
        let pieces = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().stack_size(STACK);
            let work = || self.encode_pieces(text, PIECE, OVERLAP);
            match thread.spawn_scoped(scope, work) {
                Ok(thread) => thread.join().unwrap_or_else(|cause| resume_unwind(cause)),
                Err(error) => Err(format!("no thread could be started: {error}")),
            }
        });
        pieces.map_err(|error| {
            FormatError::invalid(Path::new("tokenizer.json"), format!("cannot encode: {error}"))
        })
    }

    fn encode_pieces(&self, text: &str, piece: usize, overlap: usize) -> Result<Vec<u32>, String> {
        let whole = || guarded(|| Ok(self.inner.encode_fast(text, false)?.get_ids().to_vec()));
        if text.len() <= piece {
            return whole();
        }
        // Tokens with the bytes of the whole text that each stands for.
        let tokens = |start: usize, end: usize| {
            let encoding = guarded(|| self.inner.encode(&text[start..end], false))?;
            let places = encoding.get_offsets().iter().map(|(a, b)| (a + start, b + start));
            let ids = encoding.get_ids().iter().copied();
            Ok::<Vec<(u32, (usize, usize))>, String>(ids.zip(places).collect())
        };
        let mut ids = Vec::with_capacity(text.len() / 4);
        let mut end = text.floor_char_boundary(piece);
        // What is encoded, and the first token of it that is not in `ids` yet.
        let (mut now, mut from) = (tokens(0, end)?, 0);
        while end < text.len() {
            let start = text.floor_char_boundary(end - overlap);
            end = text.floor_char_boundary(start + piece);
            let next = tokens(start, end)?;
            let Some((at, again)) = seam(&now, &next, start) else { return whole() };
            ids.extend(now[from..at].iter().map(|(id, _)| *id));
            (now, from) = (next, again);
        }
        ids.extend(now[from..].iter().map(|(id, _)| *id));
        Ok(ids)
    }

    /// Text of token ids, special tokens left out.
    ///
    /// # Errors
    /// When an id is unknown.
    pub fn decode(&self, ids: &[u32]) -> Result<String, FormatError> {
        guarded(|| self.inner.decode(ids, true)).map_err(|error| {
            FormatError::invalid(Path::new("tokenizer.json"), format!("cannot decode: {error}"))
        })
    }
}

/// Where two pieces are joined: the middle of the first run of [`SEAM`] tokens, at least a quarter of the way
/// into the overlap, that both have with the same ids at the same places.
fn seam(
    now: &[(u32, (usize, usize))],
    next: &[(u32, (usize, usize))],
    start: usize,
) -> Option<(usize, usize)> {
    let end = now.last()?.1.1;
    let safe = start + end.saturating_sub(start) / 4;
    let first = now.partition_point(|(_, place)| place.0 < safe);
    let mut at = next.partition_point(|(_, place)| place.0 < safe);
    for i in first..now.len().saturating_sub(SEAM) {
        while at < next.len() && next[at].1.0 < now[i].1.0 {
            at += 1;
        }
        if next.get(at..at + SEAM)? == &now[i..i + SEAM] {
            return Some((i + SEAM / 2, at + SEAM / 2));
        }
    }
    None
}

/// Runs code of the `tokenizers` crate, which panics on some files that it cannot use (a damaged
/// `precompiled_charsmap`, for one): a panic there is an error here.
fn guarded<T>(run: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)) {
        Ok(result) => result.map_err(brief),
        Err(cause) => {
            let text = cause.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| cause.downcast_ref::<&str>().copied()).unwrap_or("a panic");
            Err(format!("the tokenizer library stopped: {}", brief(text)))
        }
    }
}

/// Checks every `precompiled_charsmap` of the normalizer: it begins with the length of a trie, for which
/// the library would allocate without looking whether the bytes are there.
fn check_charsmaps(json: &[u8]) -> Result<(), String> {
    #[derive(Deserialize)]
    struct Head {
        normalizer: Option<Value>,
    }
    fn check(value: &Value) -> Result<(), String> {
        match value {
            Value::Object(table) => {
                if let Some(map) = table.get("precompiled_charsmap").and_then(Value::as_str) {
                    let claimed = base64_u32(map).ok_or("a precompiled_charsmap is not base64")?;
                    let present = (map.len() / 4 * 3).saturating_sub(4);
                    if claimed as usize > present {
                        return Err(format!(
                            "a precompiled_charsmap claims {claimed} bytes, but has {present}"
                        ));
                    }
                }
                table.values().try_for_each(check)
            }
            Value::Array(list) => list.iter().try_for_each(check),
            _ => Ok(()),
        }
    }
    let head: Head = serde_json::from_slice(json).map_err(brief)?;
    head.normalizer.as_ref().map_or(Ok(()), check)
}

/// The first four bytes of a base64 text, little-endian.
fn base64_u32(text: &str) -> Option<u32> {
    let mut bits = 0u64;
    for character in text.as_bytes().get(..6)? {
        let digit = match character {
            b'A'..=b'Z' => character - b'A',
            b'a'..=b'z' => character - b'a' + 26,
            b'0'..=b'9' => character - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u64::from(digit);
    }
    Some(((bits >> 4) as u32).swap_bytes())
}

fn parse(json: &[u8]) -> Result<tokenizers::Tokenizer, String> {
    check_charsmaps(json).map_err(|error| format!("not a tokenizer: {error}"))?;
    let inner = guarded(|| {
        let mut inner = tokenizers::Tokenizer::from_bytes(json)?;
        // Truncation and padding are for training batches; a corpus is tokenized whole.
        inner.with_truncation(None)?;
        inner.with_padding(None);
        Ok(inner)
    })
    .map_err(|error| format!("not a tokenizer: {error}"))?;
    if let tokenizers::ModelWrapper::BPE(model) = inner.get_model()
        && model.dropout.is_some_and(|dropout| dropout > 0.0)
    {
        return Err("has a `dropout`, which gives other tokens at every run; set it to null".into());
    }
    Ok(inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(normalizer: &str, dropout: &str) -> String {
        format!(
            r#"{{"version":"1.0","truncation":{{"direction":"Right","max_length":2,"strategy":"LongestFirst","stride":0}},
            "padding":null,"added_tokens":[],"normalizer":{normalizer},"pre_tokenizer":null,"post_processor":null,"decoder":null,
            "model":{{"type":"BPE","dropout":{dropout},"vocab":{{"a":0,"b":1}},"merges":[]}}}}"#
        )
    }

    #[test]
    fn texts_are_not_cut() {
        let tokenizer = Tokenizer::parse(json("null", "null").as_bytes()).unwrap();
        assert_eq!(tokenizer.encode("abba").unwrap(), [0, 1, 1, 0]);
    }

    /// The library unwraps what it reads of a `precompiled_charsmap`.
    #[test]
    fn a_panic_of_the_library_is_an_error() {
        let bad = json(r#"{"type":"Precompiled","precompiled_charsmap":"BAAAAAAAAA!!"}"#, "null");
        let error = Tokenizer::parse(bad.as_bytes()).unwrap_err();
        assert!(error.contains("the tokenizer library stopped"), "{error}");
    }

    /// Found by fuzzing: 316 bytes made the library allocate 8 GB.
    #[test]
    fn a_charsmap_that_claims_more_than_it_holds_is_refused() {
        assert_eq!(base64_u32("ALQCAACE"), Some(0x0002_b400));
        for map in ["ALQC+ACEAAAAAACAAQAAgMz8AgC4BQAA", "////////", "ALQCAA", ""] {
            let inner = format!(r#"{{"type":"Precompiled","precompiled_charsmap":"{map}"}}"#);
            let sequence = format!(r#"{{"type":"Sequence","normalizers":[{inner}]}}"#);
            for normalizer in [inner, sequence] {
                let error = Tokenizer::parse(json(&normalizer, "null").as_bytes()).unwrap_err();
                assert!(error.contains("precompiled_charsmap"), "{error}");
            }
        }
    }

    #[test]
    fn tokens_do_not_depend_on_chance() {
        let error = Tokenizer::parse(json("null", "0.1").as_bytes()).unwrap_err();
        assert!(error.contains("dropout"), "{error}");
    }

    #[test]
    fn pieces_are_joined_to_the_tokens_of_the_whole() {
        let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data");
        let tokenizer = Tokenizer::open(&data.join("tinystories-656k")).unwrap();
        let text = std::fs::read_to_string(data.join("tinystories_calib.txt")).unwrap();
        let text = &text[..text.floor_char_boundary(200_000)];
        let whole = tokenizer.inner.encode_fast(text, false).unwrap().get_ids().to_vec();
        for (piece, overlap) in [(2_000, 700), (8_192, 1_000), (30_001, 4_000), (PIECE, OVERLAP)] {
            assert_eq!(tokenizer.encode_pieces(text, piece, overlap).unwrap(), whole, "{piece}");
        }
        assert_eq!(tokenizer.encode(text).unwrap(), whole);
        // Every kind of splitting into words that the field knows, with characters of several bytes.
        let mixed: String =
            "Größe ǅ 日本語の文 \u{1f600}\u{200d}\u{1f600}  two  spaces\n\n\tend. don't 12345 "
                .repeat(300);
        let bytes = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        let mut alphabet: Vec<char> = bytes.into_iter().chain(mixed.chars()).collect();
        alphabet.sort_unstable();
        alphabet.dedup();
        let vocab: Vec<String> = alphabet
            .iter()
            .enumerate()
            .map(|(id, c)| format!("{}:{}", serde_json::to_string(c).unwrap(), id + 1))
            .collect();
        let merge = r#"[["t","w"],["Ġ","t"],["▁","t"],["e","n"],["Ã","¶"]]"#;
        let ids = alphabet.len();
        let more = format!(
            r#""tw":{},"Ġt":{},"▁t":{},"en":{},"Ã¶":{},"▁":{}"#,
            ids + 1,
            ids + 2,
            ids + 3,
            ids + 4,
            ids + 5,
            ids + 6
        );
        for (normalizer, pre) in [
            (
                "null",
                r#"{"type":"ByteLevel","add_prefix_space":true,"trim_offsets":true,"use_regex":true}"#,
            ),
            (
                "null",
                r#"{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":false,"use_regex":false}"#,
            ),
            (
                r#"{"type":"NFKC"}"#,
                r#"{"type":"Metaspace","replacement":"▁","prepend_scheme":"always","split":true}"#,
            ),
            (r#"{"type":"Prepend","prepend":"▁"}"#, "null"),
        ] {
            let json = format!(
                r#"{{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":{normalizer},"pre_tokenizer":{pre},
                "post_processor":null,"decoder":null,"model":{{"type":"BPE","dropout":null,"unk_token":"<unk>","vocab":{{"<unk>":0,{},{more}}},"merges":{merge}}}}}"#,
                vocab.join(",")
            );
            let tokenizer = Tokenizer::parse(json.as_bytes()).unwrap();
            let whole = tokenizer.inner.encode_fast(&*mixed, false).unwrap().get_ids().to_vec();
            for piece in [1_000, 3_333, 10_000] {
                let found = tokenizer.encode_pieces(&mixed, piece, piece / 3).unwrap();
                assert!(found == whole, "{normalizer} {pre} {piece}");
            }
        }
    }
}
