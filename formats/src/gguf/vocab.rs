//! The tokenizer as metadata, made from tokenizer.json and made into one again.
//!
//! llama.cpp picks its splitting of words by a name, `tokenizer.ggml.pre`. Here the name follows from what
//! tokenizer.json itself says, so that a new model with a known splitting needs no entry anywhere.

use std::collections::{BTreeMap, HashMap};

use serde_json::{Map, Value as Json, json};

use super::value::{Array, Metadata, Value};
use crate::brief;

/// Token types of GGUF.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// How a text is cut into words before merging.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Words {
    /// GPT-2's own expression, inside of the byte-level step.
    Gpt2,
    /// Digits one by one, then GPT-2's.
    Digits,
    /// An expression, then bytes.
    Regex(&'static str),
}

/// Llama 3's expression.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen 2's: digits one by one.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Mistral's Tekken.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// GPT-4o's.
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Names that llama.cpp knows for each; the first is written. The flag says that a whole word which is a
/// token stays one whatever the merges say.
const PRE: &[(Words, bool, &[&str])] = &[
    (Words::Gpt2, false, &["gpt-2", "phi-2", "mellum", "modern-bert"]),
    (Words::Digits, false, &["smollm"]),
    (Words::Regex(LLAMA3), true, &["llama-bpe", "llama3", "llama-v3", "falcon3"]),
    (Words::Regex(QWEN2), false, &["qwen2", "deepseek-r1-qwen"]),
    (Words::Regex(TEKKEN), true, &["tekken"]),
    (Words::Regex(GPT4O), false, &["gpt-4o", "llama4"]),
];

fn of_type<'a>(value: &'a Json, name: &str) -> Option<&'a Json> {
    (value.get("type").and_then(Json::as_str) == Some(name)).then_some(value)
}

fn flag(value: &Json, key: &str) -> bool {
    value.get(key).and_then(Json::as_bool).unwrap_or(false)
}

/// What kind of tokenizer it is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    /// Bytes, words by an expression, merges.
    ByteLevel(&'static str),
    /// SentencePiece: spaces as `▁`, unknown characters as bytes.
    SentencePiece {
        /// A text begins with a space.
        space: bool,
    },
}

/// Says what in tokenizer.json has no name in GGUF.
fn unknown(what: &str, value: &Json) -> String {
    format!(
        "tokenizer.json: no GGUF name is known for its {what}: {}",
        brief(value).replace('\n', " ")
    )
}

fn kind_of(tokenizer: &Json) -> Result<Kind, String> {
    let null = Json::Null;
    let part = |key: &str| tokenizer.get(key).unwrap_or(&null);
    let (normalizer, pre, model) = (part("normalizer"), part("pre_tokenizer"), part("model"));
    // Files of older tools do not name the type of the model.
    let named = model.get("type").and_then(Json::as_str).unwrap_or("BPE");
    if named != "BPE" || model.get("merges").is_none() {
        return Err(unknown("model", model.get("type").unwrap_or(&null)));
    }
    let ignore_merges = flag(model, "ignore_merges");
    let byte_level = |value: &Json, regex: bool| {
        of_type(value, "ByteLevel").is_some_and(|value| {
            !flag(value, "add_prefix_space")
                && value.get("use_regex").and_then(Json::as_bool).unwrap_or(true) == regex
        })
    };
    let words = if byte_level(pre, true) {
        Some(Words::Gpt2)
    } else if let Some([first, second]) = of_type(pre, "Sequence")
        .and_then(|pre| pre.get("pretokenizers"))
        .and_then(Json::as_array)
        .map(Vec::as_slice)
    {
        let digits = of_type(first, "Digits").is_some_and(|first| flag(first, "individual_digits"));
        let regex = of_type(first, "Split")
            .filter(|split| {
                split.get("behavior").and_then(Json::as_str) == Some("Isolated")
                    && !flag(split, "invert")
            })
            .and_then(|split| split.get("pattern")?.get("Regex")?.as_str());
        match regex {
            _ if digits && byte_level(second, true) => Some(Words::Digits),
            Some(regex) if byte_level(second, false) => {
                PRE.iter().find_map(|(words, ..)| match words {
                    Words::Regex(known) if *known == regex => Some(words.clone()),
                    _ => None,
                })
            }
            _ => None,
        }
    } else {
        None
    };
    if let Some(words) = words {
        if !(normalizer.is_null() || of_type(normalizer, "NFC").is_some()) {
            return Err(unknown("normalizer", normalizer));
        }
        let (_, whole, names) =
            PRE.iter().find(|(known, ..)| *known == words).expect("the words are in the table");
        if *whole != ignore_merges {
            return Err(format!(
                "tokenizer.json: `ignore_merges` is {ignore_merges}, but splitting of the name {} implies {whole}",
                names[0]
            ));
        }
        return Ok(Kind::ByteLevel(names[0]));
    }
    if !flag(model, "byte_fallback") {
        return Err(unknown("pre_tokenizer", pre));
    }
    // SentencePiece: the space is put in by the normalizer, or by Metaspace.
    let replaces = |value: &Json| {
        of_type(value, "Replace").is_some_and(|value| {
            value.pointer("/pattern/String").and_then(Json::as_str) == Some(" ")
                && value.get("content").and_then(Json::as_str) == Some("▁")
        })
    };
    let prepends = |value: &Json| {
        of_type(value, "Prepend")
            .is_some_and(|value| value.get("prepend").and_then(Json::as_str) == Some("▁"))
    };
    let list = of_type(normalizer, "Sequence")
        .and_then(|value| value.get("normalizers"))
        .and_then(Json::as_array)
        .map(Vec::as_slice);
    if pre.is_null() {
        match list {
            Some([first, second]) if prepends(first) && replaces(second) => {
                return Ok(Kind::SentencePiece { space: true });
            }
            Some([only]) if replaces(only) => return Ok(Kind::SentencePiece { space: false }),
            None if replaces(normalizer) => return Ok(Kind::SentencePiece { space: false }),
            _ => return Err(unknown("normalizer", normalizer)),
        }
    }
    let Some(metaspace) = of_type(pre, "Metaspace").filter(|pre| {
        pre.get("replacement").and_then(Json::as_str) == Some("▁")
            && !pre.get("split").and_then(Json::as_bool).unwrap_or(true)
    }) else {
        return Err(unknown("pre_tokenizer", pre));
    };
    if !normalizer.is_null() {
        return Err(unknown("normalizer", normalizer));
    }
    match metaspace.get("prepend_scheme").and_then(Json::as_str) {
        Some("first" | "always") => Ok(Kind::SentencePiece { space: true }),
        Some("never") => Ok(Kind::SentencePiece { space: false }),
        _ => Err(unknown("pre_tokenizer", pre)),
    }
}

/// A merge as the two texts that it joins; both spellings of tokenizer.json.
fn merge_of(value: &Json) -> Option<(&str, &str)> {
    match value {
        Json::String(text) => text.split_once(' '),
        Json::Array(pair) => Some((pair.first()?.as_str()?, pair.get(1)?.as_str()?)),
        _ => None,
    }
}

/// Files of a model directory that say something of its tokenizer.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// tokenizer.json.
    pub tokenizer: Json,
    /// tokenizer_config.json.
    pub config: Json,
    /// config.json, then generation_config.json: ids of special tokens.
    pub ids: Vec<Json>,
    /// chat_template.jinja.
    pub template: Option<String>,
}

/// A special token of tokenizer_config.json: a text, or a table with one.
fn special<'a>(config: &'a Json, key: &str) -> Option<&'a str> {
    let value = config.get(key)?;
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// Keys of the tokenizer for a model with `vocab` rows of embedding.
///
/// # Errors
/// When tokenizer.json is damaged, or splits or normalizes texts in a way that GGUF has no name for.
pub fn to_metadata(sources: &Sources, vocab: usize) -> Result<Metadata, String> {
    let tokenizer = &sources.tokenizer;
    let kind = kind_of(tokenizer)?;
    let model = &tokenizer["model"];
    let entries = model.get("vocab").and_then(Json::as_object);
    let entries = entries.ok_or("tokenizer.json: the model has no vocab")?;
    let mut tokens: BTreeMap<usize, (&str, i32)> = BTreeMap::new();
    let mut ids: HashMap<&str, usize> = HashMap::new();
    let unk = model.get("unk_token").and_then(Json::as_str);
    let is_byte = |text: &str| {
        text.len() == 6
            && text.starts_with("<0x")
            && text.ends_with('>')
            && u8::from_str_radix(&text[3..5], 16).is_ok()
    };
    let sentence_piece = matches!(kind, Kind::SentencePiece { .. });
    for (text, id) in entries {
        let id = id.as_u64().and_then(|id| usize::try_from(id).ok()).filter(|&id| id < vocab);
        let id = id.ok_or_else(|| {
            format!("tokenizer.json: token {} has no id below {vocab}", brief(text))
        })?;
        let ty = if sentence_piece && is_byte(text) {
            BYTE
        } else if Some(text.as_str()) == unk {
            UNKNOWN
        } else {
            NORMAL
        };
        tokens.insert(id, (text, ty));
        ids.insert(text, id);
    }
    let none = Vec::new();
    for added in tokenizer.get("added_tokens").and_then(Json::as_array).unwrap_or(&none) {
        let text = added.get("content").and_then(Json::as_str).unwrap_or_default();
        let id = added.get("id").and_then(Json::as_u64).map(|id| id as usize);
        let Some(id) = id.filter(|&id| id < vocab) else {
            return Err(format!(
                "tokenizer.json: added token {} has no id below {vocab}",
                brief(text)
            ));
        };
        let ty = match (Some(text) == unk && sentence_piece, flag(added, "special")) {
            (true, _) => UNKNOWN,
            (_, true) => CONTROL,
            (_, false) => USER_DEFINED,
        };
        tokens.insert(id, (text, ty));
        ids.insert(text, id);
    }
    let merges = model.get("merges").and_then(Json::as_array).unwrap_or(&none);
    let merges: Vec<(&str, &str)> = merges
        .iter()
        .map(|merge| merge_of(merge).ok_or("tokenizer.json: a merge is no pair of texts"))
        .collect::<Result<_, _>>()?;

    let mut out = Metadata::default();
    let name = |key: &str| format!("tokenizer.ggml.{key}");
    match kind {
        Kind::ByteLevel(pre) => {
            out.put_text(name("model"), "gpt2");
            out.put_text(name("pre"), pre);
        }
        Kind::SentencePiece { .. } => {
            out.put_text(name("model"), "llama");
            out.put_text(name("pre"), "default");
        }
    }
    let pad = |id: usize| format!("[PAD{id}]");
    let list = (0..vocab).map(|id| tokens.get(&id).map_or_else(|| pad(id), |t| t.0.to_owned()));
    out.put(name("tokens"), Value::Array(Array::Strings(list.collect())));
    if let Kind::SentencePiece { space } = kind {
        // Pieces merge by score: minus the place of the first merge that makes a piece.
        let mut scores: Vec<f32> = vec![0.0; vocab];
        for (id, (_, ty)) in &tokens {
            if *ty == NORMAL {
                scores[*id] = -((merges.len() + id) as f32);
            }
        }
        for (place, (a, b)) in merges.iter().enumerate().rev() {
            if let Some(&id) = ids.get(format!("{a}{b}").as_str()) {
                scores[id] = -(place as f32);
            }
        }
        out.put(name("scores"), Value::Array(Array::f32(&scores)));
        out.put(name("add_space_prefix"), Value::Bool(space));
    }
    let types: Vec<i32> =
        (0..vocab).map(|id| tokens.get(&id).map_or(UNUSED, |token| token.1)).collect();
    out.put(name("token_type"), Value::Array(Array::i32(&types)));
    if !sentence_piece {
        let list = merges.iter().map(|(a, b)| format!("{a} {b}")).collect();
        out.put(name("merges"), Value::Array(Array::Strings(list)));
    }
    let config = &sources.config;
    for (key, token, id_key) in [
        ("bos_token_id", "bos_token", "bos_token_id"),
        ("eos_token_id", "eos_token", "eos_token_id"),
        ("unknown_token_id", "unk_token", "unk_token_id"),
        ("padding_token_id", "pad_token", "pad_token_id"),
    ] {
        let named = special(config, token).and_then(|text| ids.get(text).copied());
        let numbered = || {
            sources.ids.iter().find_map(|config| {
                let value = config.get(id_key)?;
                let value = value.as_array().and_then(|list| list.first()).unwrap_or(value);
                value.as_u64().map(|id| id as usize).filter(|&id| id < vocab)
            })
        };
        if let Some(id) = named.or_else(numbered) {
            out.put_u32(name(key), id);
        }
    }
    let adds = |key: &str, token: &str, first: bool| {
        config.get(key).and_then(Json::as_bool).unwrap_or_else(|| {
            special(config, token).is_some_and(|token| template_has(tokenizer, token, first))
        })
    };
    out.put(name("add_bos_token"), Value::Bool(adds("add_bos_token", "bos_token", true)));
    out.put(name("add_eos_token"), Value::Bool(adds("add_eos_token", "eos_token", false)));
    let template = sources.template.clone().or_else(|| {
        let value = config.get("chat_template")?;
        value
            .as_str()
            .or_else(|| value.as_array().and_then(|list| default_template(list)))
            .map(str::to_owned)
    });
    if let Some(template) = template {
        out.put_text("tokenizer.chat_template", template);
    }
    Ok(out)
}

/// The template called `default` of several, else the first.
fn default_template(list: &[Json]) -> Option<&str> {
    let default = |t: &&Json| t.get("name").and_then(Json::as_str) == Some("default");
    list.iter().find(default).or_else(|| list.first())?.get("template")?.as_str()
}

/// Whether the post-processor puts a token before (or behind) a text.
fn template_has(tokenizer: &Json, token: &str, first: bool) -> bool {
    fn find(value: &Json) -> Option<&Vec<Json>> {
        if of_type(value, "TemplateProcessing").is_some() {
            return value.get("single")?.as_array();
        }
        value.get("processors")?.as_array()?.iter().find_map(find)
    }
    let Some(items) = tokenizer.get("post_processor").and_then(find) else { return false };
    let item = if first { items.first() } else { items.last() };
    item.and_then(|item| item.pointer("/SpecialToken/id")).and_then(Json::as_str) == Some(token)
}

/// tokenizer.json of the keys, and the ids of the special tokens as generation_config.json gives them.
///
/// # Errors
/// When the keys are missing or damaged, or name a kind or splitting that is not known.
pub fn from_metadata(metadata: &Metadata) -> Result<(Json, Json), String> {
    let key = |key: &str| format!("tokenizer.ggml.{key}");
    let get = |name: &str| metadata.get(&key(name));
    let strings = |name: &str| match get(name) {
        Some(Value::Array(Array::Strings(list))) => Ok(list),
        _ => Err(format!("has no list of texts {}", key(name))),
    };
    let tokens = strings("tokens")?;
    let types = match get("token_type") {
        None => vec![i64::from(NORMAL); tokens.len()],
        Some(value) => value
            .array()
            .and_then(Array::integers)
            .filter(|types| types.len() == tokens.len())
            .ok_or_else(|| format!("{} does not fit the tokens", key("token_type")))?,
    };
    let mut added = Vec::new();
    let mut vocab = Map::new();
    let mut unk = None;
    for (id, (token, &ty)) in tokens.iter().zip(&types).enumerate() {
        let ty = i32::try_from(ty).unwrap_or(NORMAL);
        if ty == UNKNOWN {
            unk = Some(token);
        }
        if matches!(ty, CONTROL | USER_DEFINED | UNKNOWN) {
            added.push(json!({
                "id": id, "content": token, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": ty != USER_DEFINED,
            }));
        }
        if ty != UNUSED && vocab.insert(token.clone(), json!(id)).is_some() {
            return Err(format!("{}: {} stands twice", key("tokens"), brief(token)));
        }
    }
    let model = get("model").and_then(Value::text).unwrap_or_default();
    let pre = get("pre").and_then(Value::text).unwrap_or("default");
    let byte_level = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
    let tokenizer = match model {
        "gpt2" => {
            let known = PRE.iter().find(|(.., names)| names.contains(&pre));
            let Some((words, whole, _)) = known else {
                return Err(format!(
                    "tokenizer.ggml.pre is `{}`, a splitting of words that is not known here",
                    brief(pre)
                ));
            };
            let split = match words {
                Words::Gpt2 => byte_level(true),
                Words::Digits => json!({"type": "Sequence", "pretokenizers": [
                    {"type": "Digits", "individual_digits": true}, byte_level(true)]}),
                Words::Regex(regex) => json!({"type": "Sequence", "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false},
                    byte_level(false)]}),
            };
            // Qwen's own tokenizer composes characters, which llama.cpp leaves away.
            json!({
                "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
                "normalizer": null, "pre_tokenizer": split, "post_processor": null,
                "decoder": byte_level(true),
                "model": {
                    "type": "BPE", "dropout": null, "unk_token": null, "fuse_unk": false,
                    "byte_fallback": false, "ignore_merges": whole, "vocab": vocab,
                    "merges": strings("merges")?,
                },
            })
        }
        "llama" => {
            let scores = get("scores")
                .and_then(Value::array)
                .and_then(Array::floats)
                .filter(|scores| scores.len() == tokens.len())
                .ok_or_else(|| format!("{} does not fit the tokens", key("scores")))?;
            let space = !matches!(get("add_space_prefix"), Some(Value::Bool(false)));
            let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
            let normalizers = if space {
                json!([{"type": "Prepend", "prepend": "▁"}, replace])
            } else {
                json!([replace])
            };
            let mut decoders = vec![
                json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
                json!({"type": "ByteFallback"}),
                json!({"type": "Fuse"}),
            ];
            if space {
                decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
            }
            json!({
                "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
                "normalizer": {"type": "Sequence", "normalizers": normalizers},
                "pre_tokenizer": null, "post_processor": null,
                "decoder": {"type": "Sequence", "decoders": decoders},
                "model": {
                    "type": "BPE", "dropout": null, "unk_token": unk, "fuse_unk": true,
                    "byte_fallback": true, "ignore_merges": false,
                    "merges": merges_of(tokens, &types, &scores), "vocab": vocab,
                },
            })
        }
        other => {
            return Err(format!("tokenizer.ggml.model is `{}`, which is not read", brief(other)));
        }
    };
    let id = |name: &str| get(name).and_then(Value::integer);
    let ids = json!({"bos_token_id": id("bos_token_id"), "eos_token_id": id("eos_token_id")});
    Ok((tokenizer, ids))
}

/// Every way to make a piece of two pieces, best score first, as SentencePiece merges.
fn merges_of(tokens: &[String], types: &[i64], scores: &[f32]) -> Vec<Json> {
    let normal =
        |id: &usize| types[*id] == i64::from(NORMAL) || types[*id] == i64::from(USER_DEFINED);
    let ids: HashMap<&str, usize> =
        (0..tokens.len()).filter(normal).map(|id| (tokens[id].as_str(), id)).collect();
    let mut found: Vec<(usize, usize, usize)> = Vec::new();
    for id in (0..tokens.len()).filter(normal) {
        let text = tokens[id].as_str();
        for (at, _) in text.char_indices().skip(1) {
            if let (Some(&a), Some(&b)) = (ids.get(&text[..at]), ids.get(&text[at..])) {
                found.push((id, a, b));
            }
        }
    }
    found.sort_by(|x, y| scores[y.0].total_cmp(&scores[x.0]).then(x.cmp(y)));
    found.into_iter().map(|(_, a, b)| json!([tokens[a], tokens[b]])).collect()
}
