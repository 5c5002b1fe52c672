//! What every fuzz target calls, with the memory it may take. Shared by `fuzz_targets/` (nightly, libFuzzer)
//! and `tests/fuzz_replay.rs` (stable, replays `corpus/`).

use std::{fs, path::Path, sync::OnceLock};

use attar_formats::{
    Checkpoint, Tokenizer, artifact, corpus, gguf, pytorch, quant_config, safetensors,
};
use attar_model::{Decoder, DecoderSpec};
use attar_tensor::TensorSource;
use serde_json::{Value, json};

/// Counts what is allocated. One target runs at a time.
#[global_allocator]
static MEMORY: peak_alloc::PeakAlloc = peak_alloc::PeakAlloc;

/// One reader.
pub(crate) struct Target {
    /// Name of the target and of its folder below `corpus/`.
    pub(crate) name: &'static str,
    /// Hands any input to the reader; an input that is refused is fine, a panic is not.
    pub(crate) run: fn(&[u8]),
    /// Bytes of memory that the reader may take for each byte of input, as its documentation states.
    pub(crate) per_byte: usize,
    /// And on top of that.
    pub(crate) constant: usize,
}

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// All readers of untrusted input.
pub(crate) const TARGETS: &[Target] = &[
    Target { name: "safetensors", run: safetensors, per_byte: 64, constant: 16 * KIB },
    Target { name: "checkpoint", run: checkpoint, per_byte: 256 + 64 + 2 * 64, constant: 4 * MIB },
    Target { name: "config", run: config, per_byte: 256 + 8, constant: 194 * MIB },
    Target { name: "recipe", run: recipe, per_byte: 1024, constant: 64 * KIB },
    Target { name: "tokenizer", run: tokenizer, per_byte: 1024, constant: 64 * MIB },
    Target { name: "ids", run: ids, per_byte: 64, constant: 4 * KIB },
    Target { name: "gate", run: gate, per_byte: 1024, constant: 64 * KIB },
    Target { name: "manifest", run: manifest, per_byte: 512, constant: 512 * KIB },
    // The header, config.json and the tokenizer made of it.
    Target { name: "gguf", run: gguf, per_byte: 2048, constant: 64 * MIB },
    Target { name: "imatrix", run: imatrix, per_byte: 18, constant: 16 * KIB },
    Target { name: "pytorch", run: pytorch, per_byte: 128, constant: 64 * KIB },
];

/// Runs one target and holds it to its memory; returns the bytes it took.
///
/// # Panics
/// When the reader panics or takes more memory than it states.
pub(crate) fn check(name: &str, input: &[u8]) -> usize {
    let target = TARGETS.iter().find(|target| target.name == name).expect("a known target");
    folder();
    if name == "tokenizer" || name == "gguf" {
        pass_over_panics_of_libraries();
    }
    MEMORY.reset_peak_usage();
    let before = MEMORY.current_usage();
    (target.run)(input);
    let taken = MEMORY.peak_usage().saturating_sub(before);
    let allowed = target.per_byte * input.len() + target.constant;
    assert!(
        taken <= allowed,
        "{name}: {taken} bytes for an input of {}, allowed {allowed}",
        input.len()
    );
    taken
}

/// Runs a target again and again; returns the bytes that are in use more after the last run than after the first.
#[allow(dead_code, reason = "libFuzzer's targets run one input at a time")]
pub(crate) fn kept(name: &str, input: &[u8], runs: usize) -> usize {
    check(name, input);
    let before = MEMORY.current_usage();
    for _ in 1..runs {
        check(name, input);
    }
    MEMORY.current_usage().saturating_sub(before)
}

/// A folder of this process, in memory where the system has such a place.
fn folder() -> &'static Path {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    let make = || {
        let shm = Path::new("/dev/shm");
        let made = if shm.is_dir() { tempfile::tempdir_in(shm) } else { tempfile::tempdir() };
        made.expect("a temporary folder can be made")
    };
    FOLDER.get_or_init(make).path()
}

fn put(name: &str, bytes: &[u8]) -> std::path::PathBuf {
    let path = folder().join(name);
    fs::write(&path, bytes).expect("a temporary file can be written");
    path
}

/// The header by itself within 16 bytes for each byte, then the whole as a checkpoint.
fn gguf(input: &[u8]) {
    let before = MEMORY.current_usage();
    let parsed = gguf::reader::parse(input);
    let taken = MEMORY.peak_usage().saturating_sub(before);
    let allowed = 16 * input.len() + 16 * KIB;
    assert!(taken <= allowed, "gguf header: {taken} bytes, allowed {allowed}");
    let Ok(header) = parsed else { return };
    for tensor in &header.tensors {
        assert_eq!(input[tensor.start..tensor.start + tensor.length].len(), tensor.length);
    }
    let path = put("model.gguf", input);
    let Ok(checkpoint) = Checkpoint::open(&path) else { return };
    let _ = Decoder::read(checkpoint.config(), &checkpoint);
    for header in checkpoint.headers() {
        let view = checkpoint.read(&header.name).expect("what has a header can be read");
        assert_eq!(view.bytes().len(), header.bytes());
        let _ = checkpoint.read_row(&header.name, 0);
    }
    let _ = quant_config::parse(checkpoint.config());
    if let Ok(tokenizer) = checkpoint.tokenizer() {
        let _ = tokenizer.encode("Once upon a time");
    }
}

/// What is read is written and read again.
fn imatrix(input: &[u8]) {
    let Ok(read) = gguf::Imatrix::parse(input) else { return };
    for (name, entry) in &read.entries {
        assert_eq!(entry.sums.len() % entry.counts.len().max(1), 0);
        let _ = read.of(name, entry.sums.len());
    }
    // Names that are too long for a tensor cannot come from a file, nor can empty shapes.
    let path = folder().join("imatrix.gguf");
    read.write(&path).expect("a temporary file can be written");
    let again = gguf::Imatrix::open(&path).expect("what was written is read").0;
    assert!(again == read);
}

fn safetensors(input: &[u8]) {
    for tensor in safetensors::parse(input).unwrap_or_default() {
        let end = tensor.start + tensor.length;
        assert_eq!(input[tensor.start..end].len(), tensor.header.bytes());
    }
}

/// Index, config.json and the second shard, divided by lines of `---`; an absent part is a valid one.
fn checkpoint(input: &[u8]) {
    let divider = b"\n---\n";
    let mut parts = Vec::new();
    let mut rest = input;
    while parts.len() < 2
        && let Some(at) = rest.windows(divider.len()).position(|w| w == divider)
    {
        parts.push(&rest[..at]);
        rest = &rest[at + divider.len()..];
    }
    parts.push(rest);
    let shard = |header: &str, data: &[u8]| {
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
    };
    let first = shard(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, &[0; 4]);
    let second = shard(r#"{"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, &[0; 4]);
    put("model-1.safetensors", &first);
    put("model-2.safetensors", parts.get(2).copied().unwrap_or(&second));
    put("config.json", parts.get(1).copied().unwrap_or(b"{}"));
    put("model.safetensors.index.json", parts[0]);
    let Ok(checkpoint) = Checkpoint::open(folder()) else { return };
    let _ = Decoder::read(checkpoint.config(), &checkpoint);
    for header in checkpoint.headers() {
        let view = checkpoint.read(&header.name).expect("what has a header can be read");
        assert_eq!(view.bytes().len(), header.bytes());
    }
}

fn config(input: &[u8]) {
    let Ok(config) = serde_json::from_slice::<Value>(input) else { return };
    if let Ok(spec) = DecoderSpec::read(&config) {
        assert_eq!(spec.window.len(), spec.layers);
        let widest = spec.hidden.max(spec.vocab).max(spec.heads * spec.head_dim);
        assert!(widest.checked_mul(widest).is_some());
    }
    if let Ok(Some(parsed)) = quant_config::parse(&config) {
        for name in ["lm_head", "model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj"]
        {
            let _ = parsed.scheme_of(name);
        }
    }
}

fn recipe(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let Ok(mut recipe) = attar_ir::recipe::Recipe::parse(text) else { return };
    let written = recipe.to_toml();
    let again = attar_ir::recipe::Recipe::parse(&written).expect("a written recipe is read");
    assert_eq!(again.to_toml(), written);
    let block: Vec<_> = attar_quant::PASSES.iter().collect();
    let defs = attar_ir::recipe::Known { block: &block, model: &[] };
    if recipe.resolve(defs).is_ok() {
        let written = recipe.to_toml();
        let mut again =
            attar_ir::recipe::Recipe::parse(&written).expect("a resolved recipe is read");
        assert!(again.resolve(defs).is_ok(), "a resolved recipe resolves");
        assert_eq!(again.to_toml(), written);
    }
}

/// Panics of the `tokenizers` library are turned into errors by the reader; libFuzzer's hook would abort
/// before that. One that the reader does not catch still ends the target.
fn pass_over_panics_of_libraries() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !info.location().is_some_and(|place| place.file().contains("/registry/src/")) {
                hook(info);
            }
        }));
    });
}

fn tokenizer(input: &[u8]) {
    let Ok(tokenizer) = Tokenizer::parse(input) else { return };
    for text in
        ["", "Once upon a time,\n there 1234 was a \u{e9}\u{1f600}\u{0301}.", "aaaa bbbb \0"]
    {
        if let Ok(ids) = tokenizer.encode(text) {
            let _ = tokenizer.decode(&ids);
        }
    }
    let _ = tokenizer.decode(&[0, 1, 2, 3, u32::MAX]);
}

fn ids(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    for window in corpus::parse_ids(text, 8, 1000).unwrap_or_default() {
        assert!((2..=8).contains(&window.len()) && window.iter().all(|&id| id < 1000));
    }
}

fn gate(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let Ok(policy) = attar_eval::gate::Policy::parse(text) else { return };
    let report = json!({"eval": {
        "perplexity": 2.0, "reference_perplexity": 1.0, "kl_mean": 0.1, "top1_agreement": 0.9,
        "file_bytes": 1, "source_bytes": 4, "context": 8, "score": "all", "tokens": 64,
    }});
    let verdict = policy.judge(&report, Some(&report)).expect("every metric is there");
    let _ = (verdict.table(), verdict.junit());
    if let Ok(report) = serde_json::from_str(text) {
        let _ = policy.judge(&report, None);
    }
}

fn manifest(input: &[u8]) {
    put("weights.bin", b"weights");
    let path = put(artifact::MANIFEST, input);
    let _ = artifact::check_manifest(folder());
    fs::remove_file(path).expect("the manifest was just written");
}

/// The whole archive, and the same bytes as a bare pickle.
fn pytorch(input: &[u8]) {
    for tensor in pytorch::pickle::state_dict(input).unwrap_or_default() {
        assert_eq!(tensor.shape.len(), tensor.strides.len());
    }
    let Ok(tensors) = pytorch::parse(input) else { return };
    let file = pytorch::PytorchFile::open(&put("state.bin", input)).expect("it was just parsed");
    for tensor in tensors {
        let header = tensor.placed.header;
        let view = file.view(&header.name).expect("what has a header can be read");
        assert_eq!(view.bytes().len(), header.bytes());
    }
}
