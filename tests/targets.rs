//! `--target` and the ledger from the command line: what breaks a rule is refused before any work, and what
//! was written is judged again.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::{attar, compress, data, model};

fn copy(to: &Path) -> String {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(data("tinystories-656k")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
    to.display().to_string()
}

fn plan(model: &str, extra: &[&str]) -> (i32, String, String) {
    attar(&[&["plan", model][..], extra].concat())
}

fn recipe(dir: &Path, text: &str) -> String {
    let path = dir.join("recipe.toml");
    fs::write(&path, text).unwrap();
    path.display().to_string()
}

#[test]
fn an_accepted_artifact_is_accepted_again_as_files() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let flags = ["--group", "32", "--target", "vllm,tp=2", "--target", "transformers"];
    let layouts = ["--layout", "compressed-tensors", "--layout", "gptq"];
    let (code, stdout, error) = compress("gptq-w4", &out, &[&flags[..], &layouts].concat());
    assert_eq!(code, 0, "{error}");
    assert!(stdout.contains("note: vllm,tp=2: rule marlin-shape"), "{stdout}");
    for layout in ["compressed-tensors", "gptq"] {
        let path = out.join(layout).display().to_string();
        let targets = ["--target", "vllm,tp=2", "--target", "vllm,tp=4", "--target", "sglang"];
        let (code, stdout, error) = attar(&[&["verify", &path][..], &targets].concat());
        assert_eq!(code, 0, "{stdout}{error}");
        assert!(stdout.contains("vllm,tp=4: accepts it"), "{stdout}");
        // 8 ranks cut the groups of o and down, whose 128 and 384 columns become 16 and 48 a rank.
        let (code, stdout, _) = attar(&["verify", &path, "--target", "vllm,tp=8", "--json"]);
        assert_eq!(code, 1, "{stdout}");
        let json: Value = serde_json::from_str(&stdout).unwrap();
        assert!(json["problems"].as_array().unwrap().is_empty());
        let broken = json["violations"].as_array().unwrap();
        let cut = broken.iter().find(|v| v["rule"] == "split-groups").unwrap();
        assert_eq!(cut["places"].as_array().unwrap().len(), 4, "{cut}");
        assert_eq!(cut["places"][0]["name"], "model.layers.0.self_attn.o_proj");
    }
    let awq = dir.path().join("awq");
    assert_eq!(compress("awq-w4", &awq, &["--layout", "awq", "--target", "transformers"]).0, 0);
    let (code, stdout, _) = attar(&["verify", &awq.display().to_string(), "--target", "vllm,tp=2"]);
    assert!(code == 1 && stdout.contains("REFUSED vllm,tp=2: rule awq-split-groups"), "{stdout}");
    assert!(stdout.contains("vllm,tp=2: does NOT accept it"), "{stdout}");
}

#[test]
fn plans_that_a_runtime_refuses_name_tensors_numbers_rule_source_and_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let (code, _, error) = compress("gptq-w4", &out, &["--target", "vllm,tp=2"]);
    assert_eq!(code, 2, "{error}");
    for part in [
        "rule split-groups",
        "model.layers.0.self_attn.o_proj, model.layers.1.self_attn.o_proj: 128 columns / 2 = 64",
        "384 columns / 2 = 192, which cuts a group of 128",
        "remedy: choose a smaller group",
        "marlin_utils.py",
    ] {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert!(!out.exists() && !dir.path().join("out.partial").exists());
    let rtn = ["--preset", "rtn-w4", "--target"];
    for (target, part) in [
        ("llama.cpp", "GGUF files only, which Attar does not write yet"),
        ("tensorrt-llm", "reads none of the layouts"),
        ("vllm,tp=3", "8 do not split over 3 ranks"),
        ("vlm", "did you mean `vllm`"),
        ("vllm,tp=0", "1 to 1024"),
    ] {
        let (code, _, error) = plan(&model(), &[&rtn[..], &[target]].concat());
        assert!(code == 2 && error.contains(part), "{target}: {error}");
    }
    // Every emit and every target is judged, and all is told at once.
    let many =
        ["--layout", "gptq", "--layout", "awq", "--target", "vllm,tp=2", "--target", "sglang,tp=2"];
    let (code, _, error) = plan(&model(), &[&["--preset", "rtn-w4"][..], &many].concat());
    assert!(code == 2 && error.contains("4 rules are broken"), "{error}");
    // A model directory without a tokenizer.
    let bare = copy(&dir.path().join("bare"));
    fs::remove_file(Path::new(&bare).join("tokenizer.json")).unwrap();
    let (code, _, error) = plan(&bare, &[&rtn[..], &["vllm"]].concat());
    assert!(code == 2 && error.contains("tokenizer.json or tokenizer.model"), "{error}");
    // An output head that SGLang never reads, and vLLM does.
    let head = recipe(
        dir.path(),
        "[[step]]\npass = \"rtn\"\nsites = [\"*\", \"lm_head\"]\nkeep = []\nscheme = { bits = 4 }\n",
    );
    let (code, _, error) = plan(&model(), &["--recipe", &head, "--target", "sglang"]);
    assert!(code == 2 && error.contains("rule head-ct") && error.contains("lm_head"), "{error}");
    let (code, stdout, error) = plan(&model(), &["--recipe", &head, "--target", "vllm"]);
    assert!(code == 0 && stdout.contains("warning   vllm: rule head-ct"), "{error}");
    assert!(stdout.contains("20 source tensors: 15 quantized, 5 copied"), "{stdout}");
    // The checkpoint stores embedding and head as one tensor: it is both.
    let (_, json, _) = plan(&model(), &["--recipe", &head, "--json"]);
    let json: Value = serde_json::from_str(&json).unwrap();
    let line = &json["variants"][0]["plan"]["emits"][0]["ledger"][0];
    assert_eq!(line["tensor"], "lm_head.weight");
    let detail = line["detail"].as_str().unwrap();
    assert!(detail.ends_with("; also copied as model.embed_tokens.weight"), "{detail}");
    let (code, _, error) =
        plan(&model(), &["--recipe", &head, "--layout", "awq", "--target", "vllm"]);
    assert!(code == 2 && error.contains("`lm_head` is not true"), "{error}");
}

/// Rewrites a tensor's bytes in a safetensors file.
#[test]
fn an_emit_of_a_recipe_names_its_own_targets() {
    let dir = tempfile::tempdir().unwrap();
    let text = "[[step]]\npass = \"rtn\"\nscheme = { bits = 4 }\n\
        [[emit]]\nlayout = \"compressed-tensors\"\ntarget = \"transformers\"\n\
        [[emit]]\nlayout = \"gptq\"\ntarget = [\"vllm,tp=2\"]\n";
    let (code, _, error) = plan(&model(), &["--recipe", &recipe(dir.path(), text)]);
    assert!(code == 2 && error.contains("vllm,tp=2: rule split-groups, emit gptq"), "{error}");
    assert!(!error.contains("emit compressed-tensors"), "{error}");
    let (code, _, error) =
        plan(&model(), &["--recipe", &recipe(dir.path(), &text.replace(",tp=2", ""))]);
    assert_eq!(code, 0, "{error}");
}

fn patch(file: &PathBuf, tensor: &str, change: impl Fn(&mut [u8])) {
    let mut bytes = fs::read(file).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let at = |i: usize| header[tensor]["data_offsets"][i].as_u64().unwrap() as usize + 8 + length;
    change(&mut bytes[at(0)..at(1)]);
    fs::write(file, bytes).unwrap();
}

#[test]
fn files_that_lie_to_a_runtime_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let (code, _, error) = compress("rtn-w4", &out, &["--group", "32", "--layout", "gptq"]);
    assert_eq!(code, 0, "{error}");
    let path = out.display().to_string();
    // As if from elsewhere: no manifest of ours.
    fs::remove_file(out.join("attar_manifest.json")).unwrap();
    let verify = || attar(&["verify", &path, "--target", "vllm"]);
    assert_eq!(verify().0, 0);
    // Columns in another order than the config says.
    let tensor = "model.layers.1.mlp.down_proj.g_idx";
    let swap = |bytes: &mut [u8]| {
        let end = bytes.len() - 4;
        let (first, last) = (bytes[..4].to_vec(), bytes[end..].to_vec());
        bytes[..4].copy_from_slice(&last);
        bytes[end..].copy_from_slice(&first);
    };
    let weights = out.join("model.safetensors");
    patch(&weights, tensor, swap);
    let (code, stdout, _) = verify();
    assert!(code == 1 && stdout.contains("rule column-order"), "{stdout}");
    assert!(stdout.contains("model.layers.1.mlp.down_proj: its columns are ordered"), "{stdout}");
    patch(&weights, tensor, swap);
    assert_eq!(verify().0, 0);
    let config = out.join("config.json");
    let text = fs::read_to_string(&config).unwrap();
    let with = |from: &str, to: &str| {
        assert!(text.contains(from), "{from}");
        fs::write(&config, text.replace(from, to)).unwrap();
    };
    with("\"desc_act\": false,", "");
    let (code, stdout, _) = verify();
    assert!(code == 1 && stdout.contains("desc_act: quantization_config lacks it"), "{stdout}");
    with("\"sym\": true", "\"sym\": false");
    let (code, stdout, _) = verify();
    assert!(
        code == 1 && stdout.contains("rule gptq-scheme") && stdout.contains("asym"),
        "{stdout}"
    );
    fs::write(&config, &text).unwrap();
    fs::remove_file(out.join("tokenizer.json")).unwrap();
    let (code, stdout, _) = verify();
    assert!(code == 1 && stdout.contains("tokenizer.json or tokenizer.model"), "{stdout}");
}

#[test]
fn every_source_tensor_is_in_one_line_of_the_ledger() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let text = data("tinystories_calib.txt").display().to_string();
    let args = ["--preset", "awq-w4", "--text", &text, "--context", "256", "--samples", "12"];
    let (code, stdout, error) = plan(&model(), &args);
    assert!(code == 0 && stdout.contains("20 source tensors: 14 quantized, 4 changed, 2 copied"));
    let (_, json, _) = plan(&model(), &[&args[..], &["--json"]].concat());
    let json: Value = serde_json::from_str(&json).unwrap();
    let planned = json["variants"][0]["plan"]["emits"][0]["ledger"].as_array().unwrap().clone();
    let (code, _, more) = compress("awq-w4", &out, &[]);
    assert_eq!(code, 0, "{error}{more}");
    let report: Value =
        serde_json::from_slice(&fs::read(out.join("report.json")).unwrap()).unwrap();
    assert_eq!(report["ledger"].as_array().unwrap(), &planned);
    let bytes = fs::read(data("tinystories-656k").join("model.safetensors")).unwrap();
    let source = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut names: Vec<&str> = source.names().into_iter().collect();
    names.sort_unstable();
    let told: Vec<&str> = planned.iter().map(|line| line["tensor"].as_str().unwrap()).collect();
    assert_eq!(told, names);
    let line = |name: &str| planned.iter().find(|line| line["tensor"] == name).unwrap();
    let up = line("model.layers.0.mlp.up_proj.weight");
    assert_eq!(up["fate"], "quantized");
    let detail = up["detail"].as_str().unwrap();
    assert_eq!(detail, "w4 g128 asym, compressed-tensors (step[0] (awq), step[1] (rtn))");
    let norm = line("model.layers.0.input_layernorm.weight");
    assert_eq!(norm["fate"], "changed");
    assert!(norm["detail"].as_str().unwrap().contains("folded in by step[0] (awq)"));
    assert_eq!(line("model.norm.weight")["fate"], "copied");
    let page = fs::read_to_string(out.join("report.html")).unwrap();
    assert!(
        page.contains("Every tensor") && page.contains("model.layers.1.mlp.up_proj.weight<td>")
    );
}

/// A copy of the demo model, which stores its tied embedding as `lm_head.weight`, with other names for it.
fn stored_as(to: &Path, names: &[&str]) -> String {
    let model = copy(to);
    let file = to.join("model.safetensors");
    let bytes = fs::read(&file).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut views = Vec::new();
    for (name, view) in tensors.tensors() {
        if name == "lm_head.weight" {
            views.extend(names.iter().map(|name| ((*name).to_owned(), view.clone())));
        } else {
            views.push((name, view));
        }
    }
    fs::write(&file, safetensors::serialize(views, None).unwrap()).unwrap();
    model
}

#[test]
fn tied_embeddings_are_in_the_ledger_however_they_are_stored() {
    let dir = tempfile::tempdir().unwrap();
    let head = recipe(
        dir.path(),
        "[[step]]\npass = \"rtn\"\nsites = [\"*\", \"lm_head\"]\nkeep = []\nscheme = { bits = 4 }\n",
    );
    let (embedding, lm_head) = ("model.embed_tokens.weight", "lm_head.weight");
    for (at, names) in [&[embedding][..], &[lm_head], &[embedding, lm_head]].into_iter().enumerate()
    {
        let model = stored_as(&dir.path().join(format!("model{at}")), names);
        for (flag, value) in [("--preset", "rtn-w4"), ("--recipe", head.as_str())] {
            let out = dir.path().join(format!("out{at}{flag}"));
            let text = out.display().to_string();
            // That the files are what the ledger says is checked by compress itself.
            let (code, _, error) = attar(&["compress", &model, flag, value, "--out", &text]);
            assert_eq!(code, 0, "{names:?} {value}: {error}");
            let report: Value =
                serde_json::from_slice(&fs::read(out.join("report.json")).unwrap()).unwrap();
            let lines = report["ledger"].as_array().unwrap();
            let line = |name: &str| lines.iter().find(|line| line["tensor"] == name).unwrap();
            let quantized = flag == "--recipe";
            match (names, quantized) {
                ([one], false) => assert_eq!(line(one)["fate"], "copied"),
                ([one], true) if *one == embedding => {
                    let detail = line(one)["detail"].as_str().unwrap();
                    assert!(detail.contains("also quantized as lm_head: w4 g128 sym"), "{detail}");
                }
                ([one], true) => assert_eq!(line(one)["fate"], "quantized"),
                (_, false) => {
                    assert_eq!(line(lm_head)["fate"], "tied");
                    assert_eq!(
                        line(lm_head)["detail"],
                        "to model.embed_tokens.weight, F32 [2048, 128]"
                    );
                    assert_eq!(line(embedding)["fate"], "copied");
                }
                (_, true) => {
                    assert_eq!(line(lm_head)["fate"], "quantized");
                    assert_eq!(line(embedding)["fate"], "copied");
                }
            }
        }
    }
}

#[test]
fn linears_left_dense_by_accident_are_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let step = |sites: &str, keep: &str| {
        let keep = if keep.is_empty() { String::new() } else { format!("keep = {keep}\n") };
        let text =
            format!("[[step]]\npass = \"rtn\"\nsites = {sites}\n{keep}scheme = {{ bits = 4 }}\n");
        recipe(dir.path(), &text)
    };
    // The pattern covers one block of two.
    let path = step("[\"layers.0.*\"]", "");
    let (code, _, error) = plan(&model(), &["--recipe", &path]);
    assert_eq!(code, 2, "{error}");
    for part in ["50.0 % of the linear bytes", "model.layers.1.mlp.down_proj", "--allow-dense"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert!(!error.contains("layers.0."), "{error}");
    assert_eq!(plan(&model(), &["--recipe", &path, "--allow-dense"]).0, 0);
    // Asked for: named in keep, or a kind that is quantized nowhere.
    let path = step("[\"*\"]", "[\"layers.1.*\"]");
    assert_eq!(plan(&model(), &["--recipe", &path]).0, 0);
    let path = step("[\"mlp.*\"]", "");
    assert_eq!(plan(&model(), &["--recipe", &path]).0, 0);
    // A kind of which one is missed: 49152 of 393216 weights.
    let path = step("[\"self_attn.*\", \"layers.0.mlp.*\", \"gate_proj\", \"up_proj\"]", "");
    let (code, _, error) = plan(&model(), &["--recipe", &path]);
    assert!(code == 2 && error.contains("12.5 %") && error.contains("layers.1.mlp.down_proj"));
    assert!(!error.contains("up_proj"), "{error}");
}

#[test]
fn targets_are_listed_with_their_sources() {
    let (code, stdout, _) = attar(&["targets"]);
    assert_eq!(code, 0);
    for name in ["vllm:", "transformers:", "sglang:", "tensorrt-llm:", "llama.cpp:"] {
        assert!(stdout.lines().any(|line| line.starts_with(name)), "{name}");
    }
    let (code, stdout, _) = attar(&["targets", "sglang"]);
    assert!(
        code == 0 && stdout.contains("source: https://github.com/sgl-project/sglang/issues/35358")
    );
    assert!(stdout.contains("not verified: "));
    let (_, stdout, _) = attar(&["targets", "--json"]);
    let json: Value = serde_json::from_str(&stdout).unwrap();
    let targets = json["targets"].as_array().unwrap();
    assert_eq!(targets.len(), 5);
    assert_eq!(targets[0]["rule"][0]["check"]["layouts"]["containers"][0], "safetensors");
    assert_eq!(attar(&["targets", "onnx"]).0, 2);
}
