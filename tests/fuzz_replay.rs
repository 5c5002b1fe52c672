//! Replays the corpus of every fuzz target: no panic, and no more memory than the reader's documentation
//! states. `fuzz/` finds such inputs with libFuzzer and a nightly toolchain; this needs neither.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test may stop anywhere; what it prints is shown when it fails"
)]

#[path = "../fuzz/targets.rs"]
mod targets;

use std::{fs, path::Path};

// One test alone: what another thread allocates would be counted too.
#[test]
fn every_input_of_the_corpus_is_read_or_refused_within_its_memory() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    for target in targets::TARGETS {
        let mut inputs: Vec<_> =
            fs::read_dir(corpus.join(target.name)).unwrap().map(|e| e.unwrap().path()).collect();
        inputs.sort();
        assert!(inputs.len() >= 3, "{}: the corpus is gone", target.name);
        for path in inputs {
            let input = fs::read(&path).unwrap();
            // Named before it runs: a panic is told with its input.
            println!("{} {}", target.name, path.file_name().unwrap().display());
            targets::check(target.name, &input);
        }
    }
    long_inputs();
    nothing_is_kept(&corpus);
}

/// Found by fuzzing: the tokenizer library keeps a table for each tokenizer that has encoded, for as long as the
/// thread lives; after millions of files one small file made that table double, by 76 MB.
fn nothing_is_kept(corpus: &Path) {
    for (name, file) in [("gguf", "memory"), ("tokenizer", "bpe2")] {
        let input = fs::read(corpus.join(name).join(file)).unwrap();
        let kept = targets::kept(name, &input, 50);
        assert!(kept < 1024, "{name}: {kept} bytes are still in use after 50 runs");
    }
}

/// Inputs that a corpus of small files cannot hold.
fn long_inputs() {
    let check = |name: &str, input: &[u8]| {
        let taken = targets::check(name, input);
        println!("{name}: {} bytes of input took {taken}", input.len());
    };
    let header = |json: String| [&(json.len() as u64).to_le_bytes(), json.as_bytes()].concat();
    let many = (0..20_000)
        .map(|i| format!(r#""{i}":{{"dtype":"U8","shape":[],"data_offsets":[{i},{}]}}"#, i + 1));
    let mut file = header(format!("{{{}}}", many.collect::<Vec<_>>().join(",")));
    file.resize(file.len() + 20_000, 0);
    check("safetensors", &file);
    let map = (0..50_000).map(|i| format!(r#""{i}":"m{}.bin""#, i % 7)).collect::<Vec<_>>();
    let index = format!(r#"{{"weight_map":{{{}}}}}"#, map.join(","));
    check("checkpoint", index.as_bytes());
    let own = (0..50_000).map(|i| format!(r#""{i}":"{i}.bin""#)).collect::<Vec<_>>();
    check("checkpoint", format!(r#"{{"weight_map":{{{}}}}}"#, own.join(",")).as_bytes());
    for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
        let deep = format!("{}1{}", open.repeat(100_000), close.repeat(100_000));
        for name in ["config", "checkpoint", "manifest", "gate", "ids", "tokenizer"] {
            check(name, deep.as_bytes());
        }
        check("safetensors", &header(deep.clone()));
        check("recipe", format!("x = {}", "[".repeat(100_000)).as_bytes());
    }
    let flat = format!(r#"{{"model_type":"llama","x":[{}0]}}"#, "0,".repeat(300_000));
    check("config", flat.as_bytes());
    check("manifest", flat.as_bytes());
    let empty = format!("[{}{{}}]", "{},".repeat(300_000));
    check("config", empty.as_bytes());
    let small = format!("[{}{{}}]", "{\"\":0},".repeat(100_000));
    check("config", small.as_bytes());
    check("manifest", small.as_bytes());
    let dotted = (0..3000).map(|i| format!("{i}.{}a = 1\n", "a.".repeat(70)));
    check("recipe", dotted.collect::<String>().as_bytes());
    check("gate", "a.".repeat(70).as_bytes());
    let inline = format!("x = [{}]", "{a=1},".repeat(50_000));
    check("recipe", inline.as_bytes());
    let expressions = (0..1024).map(|i| format!(r#""{i}(?:\\w{{50}}){{50}}":{{}}"#));
    let expressions = expressions.collect::<Vec<_>>().join(",");
    let quant = r#"{"quant_method":"gptq","bits":4,"group_size":8,"dynamic":"#;
    let rules = format!(r#"{{"quantization_config":{quant}{{{expressions}}}}}}}"#);
    check("config", rules.as_bytes());
    check("config", rules.replace("{50}", "").as_bytes());
    check("config", rules.replace("(?:", "(?=").replace("{50}", "").as_bytes());
    let ids = format!("{{\"input_ids\":[{}1]}}\n", "1,".repeat(300_000));
    check("ids", ids.as_bytes());
    check("ids", "{\"input_ids\":[1,2]}\n".repeat(20_000).as_bytes());
    check("recipe", format!("x = [{}]", "1,".repeat(100_000)).as_bytes());
    check("recipe", "[[step]]\npass=\"rtn\"\n".repeat(20_000).as_bytes());
    for opcode in [&b"]"[..], b"}", b"(", b"N", b"N\x94", b"N\x85", b")", b"}Nq\0"] {
        check("pytorch", &opcode.repeat(200_000));
    }
}
