//! What lies, what is cut off, and what comes back.

use std::path::Path;

use attar_tensor::{DType, Tensor, TensorHeader, TensorSource};
use serde_json::json;

use super::{
    artifact::GgufPlan,
    params::Rope,
    reader::parse,
    value::Kind,
    vocab::{self, Sources},
    *,
};
use crate::{ArtifactWriter, Checkpoint};

/// A file put together by hand.
#[derive(Default)]
struct Bytes(Vec<u8>);

impl Bytes {
    fn head(version: u32, tensors: u64, keys: u64) -> Self {
        let mut out = Self(b"GGUF".to_vec());
        out.u32(version);
        out.u64(tensors);
        out.u64(keys);
        out
    }

    fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn text(&mut self, text: &str) -> &mut Self {
        self.u64(text.len() as u64);
        self.0.extend(text.as_bytes());
        self
    }

    fn tensor(&mut self, name: &str, dims: &[u64], ty: u32, offset: u64) -> &mut Self {
        self.text(name).u32(dims.len() as u32);
        for &dim in dims {
            self.u64(dim);
        }
        self.u32(ty).u64(offset)
    }

    fn data(&mut self, bytes: usize) -> &[u8] {
        let start = self.0.len().next_multiple_of(32);
        self.0.resize(start + bytes, 7);
        &self.0
    }
}

fn error(bytes: &[u8]) -> String {
    parse(bytes).unwrap_err()
}

#[test]
fn heads_that_lie_are_refused() {
    for (file, word) in [
        (&b"GG"[..], "beyond the end"),
        (b"GGML\0\0\0\0", "no GGUF file"),
        (b"GGUF\x01\0\0\0", "version 1"),
        (b"GGUF\0\0\0\x03", "big-endian"),
        (b"GGUF\x09\0\0\0", "version 9"),
    ] {
        assert!(error(file).contains(word), "{}", error(file));
    }
    assert!(error(&Bytes::head(3, u64::MAX, 0).0).contains("tensors"));
    assert!(error(&Bytes::head(3, 0, u64::MAX / 13).0).contains("metadata keys"));
    let key = |fill: &dyn Fn(&mut Bytes)| {
        let mut file = Bytes::head(3, 0, 1);
        file.text("k");
        fill(&mut file);
        file.0.resize(file.0.len() + 64, 0);
        error(&file.0)
    };
    for (what, word) in [
        (
            key(&|f| {
                f.u32(13);
            }),
            "unknown kind 13",
        ),
        (
            key(&|f| {
                f.u32(8).u64(u64::MAX);
            }),
            "beyond the end",
        ),
        (
            key(&|f| {
                f.u32(8).u64(1 << 40);
            }),
            "beyond the end",
        ),
        (
            key(&|f| {
                f.u32(9).u32(6).u64(1 << 62);
            }),
            "items of metadata k",
        ),
        (
            key(&|f| {
                f.u32(9).u32(8).u64(9);
            }),
            "items of metadata k",
        ),
        (
            key(&|f| {
                f.u32(9).u32(99).u64(1);
            }),
            "unknown kind 99",
        ),
        (key(&|f| f.u32(7).0.push(2)), "neither true nor false"),
        (key(&|f| f.u32(8).u64(2).0.extend([0xff, 0xfe])), "not UTF-8"),
        (
            key(&|f| {
                f.u32(9);
                for _ in 0..6 {
                    f.u32(9).u64(1);
                }
            }),
            "deeper",
        ),
    ] {
        assert!(what.contains(word), "{what}");
    }
    let mut twice = Bytes::head(3, 0, 2);
    twice.text("k").u32(4).u32(1).text("k").u32(4).u32(1);
    assert!(error(&twice.0).contains("stands twice"));
    for alignment in [0, 3, 33, 1 << 21] {
        let mut file = Bytes::head(3, 0, 1);
        file.text("general.alignment").u32(4).u32(alignment);
        assert!(error(&file.0).contains("general.alignment"));
    }
}

#[test]
fn nested_lists_and_old_versions_are_read() {
    let mut file = Bytes::head(2, 0, 1);
    file.text("k").u32(9).u32(9).u64(2);
    file.u32(8).u64(1).text("a").u32(4).u64(2).u32(5).u32(6);
    let header = parse(&file.0).unwrap();
    let Some(Value::Array(Array::Arrays(lists))) = header.metadata.get("k") else { panic!() };
    assert_eq!(lists[0], Array::Strings(vec!["a".into()]));
    assert_eq!(lists[1].integers(), Some(vec![5, 6]));
    assert!(matches!(lists[1], Array::Numbers { kind: Kind::U32, .. }));
}

#[test]
fn tensors_that_lie_are_refused() {
    let one = |dims: &[u64], ty, offset, data| {
        let mut file = Bytes::head(3, 1, 0);
        file.tensor("t", dims, ty, offset).data(data);
        parse(&file.0).map(|header| header.tensors[0].length)
    };
    assert_eq!(one(&[4, 2], 0, 0, 32), Ok(32));
    assert_eq!(one(&[64, 2], 8, 0, 136), Ok(136));
    for (found, word) in [
        (one(&[], 0, 0, 64), "0 dimensions"),
        (one(&[1; 5], 0, 0, 64), "5 dimensions"),
        (one(&[0], 0, 0, 64), "dimension of 0"),
        (one(&[1 << 40, 1 << 40], 0, 0, 64), "overflows"),
        (one(&[u64::MAX, 2], 0, 0, 64), "overflows"),
        (one(&[1 << 61], 0, 0, 64), "more bytes than there can be"),
        (one(&[33], 8, 0, 64), "no multiple of the 32"),
        (one(&[32], 8, 16, 64), "alignment"),
        (one(&[4], 0, 1 << 20, 64), "beyond the end"),
        (one(&[4], 0, u64::MAX - 31, 64), "beyond the end"),
        (one(&[64], 0, 0, 64), "cut off"),
    ] {
        assert!(found.as_ref().is_err_and(|e| e.contains(word)), "{found:?} {word}");
    }
    let two = |second: (u32, u64), name| {
        let mut file = Bytes::head(3, 2, 0);
        file.tensor("a", &[16], 0, 0).tensor(name, &[16], second.0, second.1).data(160);
        parse(&file.0)
    };
    assert!(two((0, 64), "b").is_ok());
    assert!(two((0, 32), "b").unwrap_err().contains("overlaps"));
    assert!(two((0, 0), "b").unwrap_err().contains("overlaps"));
    assert!(two((0, 64), "a").unwrap_err().contains("stands twice"));
    // A type of tomorrow: carried up to the end of the file, or the next tensor.
    let unknown = two((77, 64), "b").unwrap();
    assert_eq!((unknown.tensors[1].ty, unknown.tensors[1].length), (GgmlType(77), 96));
}

/// A decoder of two blocks, with biases of nothing.
fn model(dir: &Path, family: &str) -> (Params, Vec<(String, Tensor)>) {
    let params = Params {
        family: family.into(),
        name: "tiny".into(),
        hidden: 64,
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        intermediate: 96,
        layers: 2,
        vocab: 8,
        context: 128,
        rms_eps: 1e-5,
        theta: 500_000.0,
        rope: Rope::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 64.0 },
        window: None,
    };
    let mut tensors = Vec::new();
    let mut add = |name: String, shape: Vec<usize>| {
        let count: usize = shape.iter().product();
        let seed = tensors.len() as f32;
        let values: Vec<f32> = (0..count).map(|i| (seed + i as f32 * 0.37).sin()).collect();
        let dtype = if shape.len() == 1 { DType::F32 } else { DType::F16 };
        tensors.push((name, Tensor::from_f32(dtype, shape, &values).unwrap()));
    };
    add("model.embed_tokens.weight".into(), vec![8, 64]);
    add("model.norm.weight".into(), vec![64]);
    for layer in 0..2 {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        add(name("input_layernorm"), vec![64]);
        add(name("post_attention_layernorm"), vec![64]);
        add(name("self_attn.q_proj"), vec![64, 64]);
        add(name("self_attn.k_proj"), vec![32, 64]);
        add(name("self_attn.v_proj"), vec![32, 64]);
        add(name("self_attn.o_proj"), vec![64, 64]);
        add(name("mlp.gate_proj"), vec![96, 64]);
        add(name("mlp.up_proj"), vec![96, 64]);
        add(name("mlp.down_proj"), vec![64, 96]);
    }
    let headers = tensors
        .iter()
        .map(|(name, tensor)| TensorHeader {
            name: name.clone(),
            dtype: tensor.dtype(),
            shape: tensor.shape().to_vec(),
        })
        .collect();
    let mut metadata = params.to_metadata(1).unwrap();
    metadata.0.extend(vocab::to_metadata(&sources(&gpt2("null", "[]")), 8).unwrap().0);
    let plan = GgufPlan { params: params.clone(), metadata, headers, blocks: Default::default() };
    let mut writer = ArtifactWriter::create_gguf(dir, plan).unwrap();
    for (name, tensor) in tensors.iter().rev() {
        writer.put(name, &tensor.view()).unwrap();
    }
    writer.finish().unwrap();
    (params, tensors)
}

fn gpt2(normalizer: &str, merges: &str) -> serde_json::Value {
    serde_json::from_str(&format!(
        r#"{{"added_tokens":[{{"id":4,"content":"<s>","special":true}}],"normalizer":{normalizer},
        "pre_tokenizer":{{"type":"ByteLevel","add_prefix_space":false,"use_regex":true}},
        "post_processor":null,"decoder":{{"type":"ByteLevel"}},
        "model":{{"type":"BPE","vocab":{{"a":0,"b":1,"ab":2,"Ġ":3}},"merges":{merges}}}}}"#
    ))
    .unwrap()
}

fn sources(tokenizer: &serde_json::Value) -> Sources {
    Sources {
        tokenizer: tokenizer.clone(),
        config: json!({"bos_token": "<s>", "eos_token": {"content": "<s>"}, "chat_template": "x"}),
        ids: vec![json!({"bos_token_id": 4})],
        template: None,
    }
}

#[test]
fn a_model_comes_back_with_its_rows_in_order() {
    for family in ["llama", "qwen2", "qwen3"] {
        let dir = tempfile::tempdir().unwrap();
        let (params, tensors) = model(dir.path(), family);
        // The directory that holds one GGUF file is as good as the file.
        for place in [dir.path().to_path_buf(), dir.path().join("model.gguf")] {
            let checkpoint = Checkpoint::open(&place).unwrap();
            let gguf = checkpoint.gguf().unwrap();
            assert_eq!(gguf.params(), &params);
            assert_eq!(checkpoint.headers().len(), tensors.len());
            for (name, tensor) in &tensors {
                assert_eq!(checkpoint.read(name).unwrap(), tensor.view(), "{name}");
                if tensor.shape().len() == 2 {
                    let row = checkpoint.read_row(name, 3).unwrap();
                    assert_eq!(Some(row), tensor.view().into_row(3), "{name}");
                }
            }
            assert_eq!(checkpoint.config()["model_type"], family);
            assert_eq!(checkpoint.config()["tie_word_embeddings"], true);
            assert_eq!(checkpoint.config()["rope_scaling"]["rope_type"], "llama3");
            assert_eq!(checkpoint.config()["rms_norm_eps"], 1e-5);
            let ids = checkpoint.tokenizer().unwrap().encode("abba b").unwrap();
            assert_eq!(ids, [0, 1, 1, 0, 3, 1]);
            assert_eq!(checkpoint.tokenizer().unwrap().bos, Some(4));
        }
        // Llama's queries lie interleaved in the file, Qwen's do not.
        let file = GgufFile::open(&dir.path().join("model.gguf")).unwrap();
        let q = file.header().tensors.iter().find(|t| t.name == "blk.0.attn_q.weight").unwrap();
        let plain = &tensors.iter().find(|(name, _)| name.ends_with("0.self_attn.q_proj.weight"));
        let same = file.bytes(q) == plain.unwrap().1.bytes();
        assert_eq!(same, family != "llama", "{family}");
    }
}

#[test]
fn heads_that_no_rotation_fits_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    model(dir.path(), "llama");
    let path = dir.path().join("model.gguf");
    let mut bytes = std::fs::read(&path).unwrap();
    let key = b"llama.attention.key_length";
    let at = bytes.windows(key.len()).position(|window| window == key).unwrap() + key.len() + 4;
    for size in [0u32, 1, 7] {
        bytes[at..at + 4].copy_from_slice(&size.to_le_bytes());
        std::fs::write(&path, &bytes).unwrap();
        let error = Checkpoint::open(&path).unwrap_err().to_string();
        assert!(error.contains("even number"), "{size}: {error}");
    }
}

#[test]
fn frequencies_of_another_type_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    model(dir.path(), "llama");
    let path = dir.path().join("model.gguf");
    let mut bytes = std::fs::read(&path).unwrap();
    let name = b"rope_freqs.weight";
    // Behind the name: the number of dimensions, one dimension, the type.
    let at = bytes.windows(name.len()).position(|window| window == name).unwrap() + name.len() + 12;
    assert_eq!(bytes[at..at + 4], 0u32.to_le_bytes());
    bytes[at..at + 4].copy_from_slice(&1u32.to_le_bytes());
    std::fs::write(&path, &bytes).unwrap();
    let error = Checkpoint::open(&path).unwrap_err().to_string();
    assert!(error.contains("frequencies are F32"), "{error}");
}

#[test]
fn every_cut_is_refused_or_harmless() {
    let dir = tempfile::tempdir().unwrap();
    model(dir.path(), "llama");
    let path = dir.path().join("model.gguf");
    let whole = std::fs::read(&path).unwrap();
    let header = parse(&whole).unwrap();
    let data = header.tensors.iter().map(|t| t.start).min().unwrap();
    for end in (0..data).chain((data..whole.len()).step_by(61)) {
        // Padding behind the last tensor may be missing.
        let needed = header.tensors.iter().map(|t| t.start + t.length).max().unwrap();
        assert!(end >= needed || parse(&whole[..end]).is_err(), "{end}");
    }
    // Each byte of the header changed in turn: refused or read, never a panic.
    let mut copy = whole.clone();
    for at in 0..data {
        for change in [0x01, 0x80, 0xff] {
            copy[at] ^= change;
            let _ = parse(&copy);
            copy[at] ^= change;
        }
    }
}

#[test]
fn what_gguf_cannot_say_of_a_tokenizer_is_told() {
    let refuse =
        |tokenizer: serde_json::Value| vocab::to_metadata(&sources(&tokenizer), 8).unwrap_err();
    let good = gpt2("null", r#"["a b"]"#);
    let metadata = vocab::to_metadata(&sources(&good), 8).unwrap();
    assert_eq!(metadata.get("tokenizer.ggml.pre").and_then(Value::text), Some("gpt-2"));
    let types = metadata.get("tokenizer.ggml.token_type").and_then(Value::array).unwrap();
    assert_eq!(types.integers().unwrap(), [1, 1, 1, 1, 3, 5, 5, 5]);
    assert_eq!(metadata.get("tokenizer.chat_template").and_then(Value::text), Some("x"));
    assert_eq!(metadata.get("tokenizer.ggml.eos_token_id").and_then(Value::integer), Some(4));
    assert!(refuse(gpt2(r#"{"type":"Lowercase"}"#, "[]")).contains("normalizer"));
    let mut other = good.clone();
    other["pre_tokenizer"] = json!({"type": "Whitespace"});
    assert!(refuse(other.clone()).contains("pre_tokenizer"));
    other["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "\\w+"}, "behavior": "Isolated", "invert": false},
        {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false}]});
    assert!(refuse(other.clone()).contains("\\\\w+"));
    let mut unigram = good.clone();
    unigram["model"]["type"] = json!("Unigram");
    assert!(refuse(unigram).contains("Unigram"));
    let mut whole = good.clone();
    whole["model"]["ignore_merges"] = json!(true);
    assert!(refuse(whole).contains("ignore_merges"));
    let mut far = good;
    far["added_tokens"][0]["id"] = json!(99);
    assert!(refuse(far).contains("no id below 8"));
}

/// SentencePiece: merges become scores, scores become the same merges.
#[test]
fn a_sentencepiece_tokenizer_comes_back() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/tinystories-656k");
    let json = crate::read_json(&data.join("tokenizer.json")).unwrap();
    let sources = Sources {
        tokenizer: json,
        config: crate::read_json(&data.join("tokenizer_config.json")).unwrap(),
        ids: vec![crate::read_json(&data.join("config.json")).unwrap()],
        template: None,
    };
    let metadata = vocab::to_metadata(&sources, 2048).unwrap();
    assert_eq!(metadata.get("tokenizer.ggml.model").and_then(Value::text), Some("llama"));
    assert_eq!(metadata.get("tokenizer.ggml.add_bos_token"), Some(&Value::Bool(true)));
    let (again, ids) = vocab::from_metadata(&metadata).unwrap();
    assert_eq!(ids["bos_token_id"], 1);
    let again = crate::Tokenizer::parse(again.to_string().as_bytes()).unwrap();
    let first = crate::Tokenizer::open(&data).unwrap();
    let text = std::fs::read_to_string(data.join("../tinystories_calib.txt")).unwrap();
    let text = &text[..text.floor_char_boundary(60_000)];
    assert_eq!(again.encode(text).unwrap(), first.encode(text).unwrap());
    let odd = "Größe 日本 \u{1f600}  two  spaces\n\tend";
    assert_eq!(again.encode(odd).unwrap(), first.encode(odd).unwrap());
    let known = "Once upon a time, there  was\n a cat.";
    assert_eq!(again.decode(&again.encode(known).unwrap()).unwrap(), known);
}
