//! Importance matrices in the place of calibration, from llama.cpp and for it.

use std::{fmt::Write, fs, path::Path};

use attar_formats::{Tokenizer, gguf::Imatrix};
use serde_json::Value;

use crate::{attar, compress, data, model};

const PRESET: &str = "imatrix-q4_k_m";

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn golden() -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    text(&root.join("tests/golden/imatrix/tinystories-656k.gguf"))
}

/// The windows of llama-imatrix behind the golden file.
fn windows() -> String {
    let tokenizer = Tokenizer::open(Path::new(&model())).unwrap();
    let bos = tokenizer.bos.unwrap();
    let all = fs::read(data("tinystories_calib.txt")).unwrap();
    let ids = tokenizer.encode(std::str::from_utf8(&all[..12000]).unwrap()).unwrap();
    let ids: Vec<u32> = [bos].into_iter().chain(ids).collect();
    let mut lines = String::new();
    for window in ids.chunks_exact(256).take(4) {
        let mut window = window.to_vec();
        window[0] = bos;
        writeln!(lines, "{{\"input_ids\": {window:?}}}").unwrap();
    }
    lines
}

fn eval_kl(out: &Path) -> f64 {
    let (val, path, original) = (text(&data("tinystories_val.txt")), text(out), model());
    let args = ["eval", &path, "--reference", &original, "--text", &val];
    let more = ["--context", "256", "--max-windows", "12", "--json"];
    let (code, stdout, error) = attar(&[&args[..], &more].concat());
    assert_eq!(code, 0, "{error}");
    serde_json::from_str::<Value>(&stdout).unwrap()["kl_mean"].as_f64().unwrap()
}

/// Sums over the same tokens are llama.cpp's but for rounding.
#[test]
fn sums_are_those_of_llama_cpp() {
    let dir = tempfile::tempdir().unwrap();
    let (ids, out) = (dir.path().join("ids.jsonl"), dir.path().join("own.gguf"));
    fs::write(&ids, windows()).unwrap();
    let args = ["imatrix", &model(), "--ids", &text(&ids), "--context", "256"];
    let (code, said, error) = attar(&[&args[..], &["--out", &text(&out)]].concat());
    assert_eq!(code, 0, "{error}");
    assert!(said.contains("importances of 14 weights over 1024 tokens in 4 windows"), "{said}");
    let own = Imatrix::open(&out).unwrap().0;
    let theirs = Imatrix::open(Path::new(&golden())).unwrap().0;
    assert_eq!((own.chunk_count, own.chunk_size), (theirs.chunk_count, theirs.chunk_size));
    assert!(own.entries.keys().eq(theirs.entries.keys()), "{:?}", theirs.entries.keys());
    for (name, entry) in &own.entries {
        let other = &theirs.entries[name];
        assert_eq!(entry.counts, other.counts, "{name}");
        let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
        let pairs = || entry.sums.iter().zip(&other.sums);
        let difference = norm(&mut pairs().map(|(a, b)| f64::from(a - b)));
        let size = norm(&mut other.sums.iter().map(|&v| f64::from(v)));
        assert!(difference < 1e-8 * size, "{name}: {}", (difference / size).sqrt());
    }
}

#[test]
fn a_file_stands_for_calibration_and_is_recorded() {
    let dir = tempfile::tempdir().unwrap();
    let plan = ["plan", &model(), "--preset", PRESET, "--imatrix", &golden()];
    let (code, said, error) = attar(&plan);
    assert_eq!(code, 0, "{error}");
    assert!(said.contains("statistics from the importance matrix"), "{said}");
    let out = dir.path().join("out");
    let args = ["compress", &model(), "--preset", PRESET, "--imatrix", &golden(), "--out"];
    let (code, _, error) = attar(&[&args[..], &[&text(&out)]].concat());
    assert_eq!(code, 0, "{error}");
    let manifest: Value =
        serde_json::from_slice(&fs::read(out.join("attar_manifest.json")).unwrap()).unwrap();
    let hash = Imatrix::open(Path::new(&golden())).unwrap().1;
    assert_eq!(manifest["imatrix_blake3"], hash);
    assert_eq!(manifest["calibration_blake3"], Value::Null);
    // As good as statistics of our own, better than none.
    let (own, none) = (dir.path().join("own"), dir.path().join("none"));
    assert_eq!(compress(PRESET, &own, &[]).0, 0);
    assert_eq!(compress("rtn-q4_k_m", &none, &[]).0, 0);
    let (file, own, none) = (eval_kl(&out), eval_kl(&own), eval_kl(&none));
    assert!(file < 1.1 * own && file < none, "file {file}, own {own}, none {none}");
    // Where it came from, and again.
    let (code, said, error) = attar(&["explain", &text(&out), "layers.0.mlp.down_proj"]);
    assert_eq!(code, 0, "{error}");
    assert!(said.contains("from an importance matrix") && said.contains(&hash[..12]), "{said}");
    let (code, said, error) = attar(&["reproduce", &text(&out)]);
    assert!(code == 0 && said.contains("identical"), "{said}{error}");
    let other = dir.path().join("other.gguf");
    let mut sums = Imatrix::open(Path::new(&golden())).unwrap().0;
    sums.datasets.clear();
    sums.write(&other).unwrap();
    let (code, _, error) = attar(&["reproduce", &text(&out), "--imatrix", &text(&other)]);
    assert!(code == 2 && error.contains("recorded is"), "{error}");
    // Results of one file are not taken for another's, even with the same sums.
    let kept = dir.path().join("scratch");
    let again = |file: &Path, out: &str| {
        let (out, file) = (text(&dir.path().join(out)), text(file));
        let args = ["compress", &model(), "--preset", PRESET, "--imatrix", &file, "--out", &out];
        let (code, _, error) = attar(&[&args[..], &["--scratch", &text(&kept)]].concat());
        assert_eq!(code, 0, "{error}");
        fs::read(Path::new(&out).join("model.gguf")).unwrap()
    };
    assert!(again(Path::new(&golden()), "first") == again(&other, "second"), "the same sums");
}

#[test]
fn what_a_file_lacks_is_told_before_any_work() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bad.gguf");
    let whole = Imatrix::open(Path::new(&golden())).unwrap().0;
    let refuse = |preset: &str, words: &[&str]| {
        let (code, _, error) =
            attar(&["plan", &model(), "--preset", preset, "--imatrix", &text(&path)]);
        assert_eq!(code, 2, "{error}");
        for word in words {
            assert!(error.contains(word), "wanted {word:?} in: {error}");
        }
    };
    let change = |change: &dyn Fn(&mut Imatrix)| {
        let mut own = whole.clone();
        change(&mut own);
        own.write(&path).unwrap();
    };
    change(&|own| drop(own.entries.remove("blk.1.ffn_down.weight")));
    refuse(PRESET, &["bad.gguf", "has no entry for blk.1.ffn_down.weight"]);
    change(&|own| own.entries.get_mut("blk.0.attn_q.weight").unwrap().sums.truncate(96));
    refuse(PRESET, &["blk.0.attn_q.weight", "96 channels", "128"]);
    change(&|own| own.entries.get_mut("blk.0.ffn_down.weight").unwrap().counts[0] = 0.0);
    refuse(PRESET, &["blk.0.ffn_down.weight", "no token"]);
    change(&|own| own.entries.get_mut("blk.0.ffn_down.weight").unwrap().sums[3] = f32::NAN);
    refuse(PRESET, &["blk.0.ffn_down.weight.in_sum2 holds NaN at 3"]);
    change(&|own| own.entries.get_mut("blk.0.attn_k.weight").unwrap().sums[0] += 1.0);
    refuse(PRESET, &["attn_q", "attn_k", "their sums differ"]);
    change(&|own| {
        let entries = std::mem::take(&mut own.entries);
        own.entries = entries.into_iter().map(|(name, e)| (format!("x.{name}"), e)).collect();
    });
    refuse(PRESET, &["has no entry for blk.0.attn_q.weight", "is it of another model?"]);
    change(&|_| ());
    refuse("gptq-q4_k_m", &["no step reads it", "imatrix-q4_k_m"]);
    refuse("rtn-q4_k_m", &["no step reads it"]);
    // Wanda reads sums of squares, and OWL those of every block of a forward that needs text.
    let recipe = dir.path().join("owl.toml");
    fs::write(&recipe, "[[step]]\npass = \"wanda\"\nratios = \"owl\"\n").unwrap();
    let args = ["plan", &model(), "--recipe", &text(&recipe), "--imatrix", &text(&path)];
    let (code, _, error) = attar(&args);
    assert!(code == 2 && error.contains("needs calibration data"), "{error}");
    fs::write(
        &path,
        [&1i32.to_le_bytes()[..], &19i32.to_le_bytes(), b"blk.0.attn_q.weight"].concat(),
    )
    .unwrap();
    refuse(PRESET, &["older form (.dat)", "llama-imatrix --in-file"]);
    fs::copy(data("tinystories-656k").join("model.safetensors"), &path).unwrap();
    refuse(PRESET, &["is no importance matrix"]);
}
