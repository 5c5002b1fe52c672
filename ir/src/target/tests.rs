//! Every rule kind: a good artifact passes, a cutting or lying one is refused with its names and numbers.

use std::collections::BTreeSet;

use attar_tensor::{Granularity, ScaleGrid};
use serde_json::json;

use super::*;

fn scheme(bits: u8, group: i64, symmetric: bool) -> QuantScheme {
    let granularity =
        if group < 0 { Granularity::Channel } else { Granularity::Group(group as usize) };
    QuantScheme {
        bits,
        granularity,
        symmetric,
        scale_grid: ScaleGrid::F16,
        zero_min: 0,
        activations: attar_tensor::ActivationScheme::Float,
    }
}

#[test]
fn w8a8_is_read_per_row_and_by_those_who_have_a_class_for_it() {
    let mut w8a8 = subject("compressed-tensors");
    w8a8.layout = Some("compressed-tensors-int".to_owned());
    for linear in w8a8.linears.iter_mut().filter(|linear| linear.scheme.is_some()) {
        let activations = attar_tensor::ActivationScheme::Int8PerToken;
        linear.scheme = Some(QuantScheme { activations, ..scheme(8, -1, true) });
    }
    for target in ["vllm", "vllm,tp=2", "transformers", "sglang"] {
        assert_eq!(judge(&w8a8, target), [], "{target}");
    }
    assert_eq!(refusals(&w8a8, "tensorrt-llm")[0], "layout");
    assert_eq!(refusals(&w8a8, "llama.cpp")[0], "container");
    let mut mixed = w8a8.clone();
    mixed.linears[1].scheme = Some(scheme(8, -1, true));
    assert!(refusals(&mixed, "vllm").contains(&"fused".to_owned()));
    w8a8.linears[3].scheme = Some(scheme(8, 128, true));
    assert!(refusals(&w8a8, "vllm").contains(&"ct-int-scheme".to_owned()));
}

/// Two Llama blocks (hidden 1024, 8 heads of 128, 4 key/value heads, MLP 2048), w4 g128 sym.
fn subject(layout: &str) -> Subject {
    let mut linears = Vec::new();
    let mut add = |block: usize, name: &str, role, out_features, in_features, quantized: bool| {
        linears.push(Linear {
            name: name.to_owned(),
            block,
            role,
            out_features,
            in_features,
            scheme: quantized.then(|| scheme(4, 128, true)),
            scales: quantized.then_some(DType::F16),
            column_order: Some(false),
            declared: Some(quantized),
        });
    };
    for block in 0..2 {
        for (name, role, rows, columns) in [
            ("self_attn.q_proj", Role::Query, 1024, 1024),
            ("self_attn.k_proj", Role::Key, 512, 1024),
            ("self_attn.v_proj", Role::Value, 512, 1024),
            ("self_attn.o_proj", Role::AttentionOutput, 1024, 1024),
            ("mlp.gate_proj", Role::Gate, 2048, 1024),
            ("mlp.up_proj", Role::Up, 2048, 1024),
            ("mlp.down_proj", Role::Down, 1024, 2048),
        ] {
            add(block, &format!("model.layers.{block}.{name}"), role, rows, columns, true);
        }
    }
    add(2, "lm_head", Role::Head, 4096, 1024, false);
    let config = match layout {
        "compressed-tensors" => {
            json!({"quant_method": layout, "format": "pack-quantized", "config_groups": {"g": {}}})
        }
        "awq" => json!({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": true}),
        _ => json!({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": true,
            "desc_act": false, "lm_head": false, "checkpoint_format": layout}),
    };
    let mut subject = Subject {
        name: "toy".to_owned(),
        layout: Some(layout.to_owned()),
        container: "safetensors".to_owned(),
        family: "llama".to_owned(),
        attention: Some(AttentionShape { heads: 8, kv_heads: 4, head_dim: 128 }),
        linears,
        embedding_quantized: false,
        factored: Vec::new(),
        corrected: Vec::new(),
        files: Some(vec!["config.json".to_owned(), "tokenizer.json".to_owned()]),
        config: Some(config),
    };
    if layout == "awq" {
        for scheme in subject.linears.iter_mut().filter_map(|linear| linear.scheme.as_mut()) {
            scheme.symmetric = false;
        }
    }
    subject
}

fn rescheme(subject: &mut Subject, bits: u8, group: i64, symmetric: bool) {
    for linear in &mut subject.linears {
        if linear.scheme.is_some() {
            linear.scheme = Some(scheme(bits, group, symmetric));
        }
    }
}

fn linear<'a>(subject: &'a mut Subject, end: &str) -> &'a mut Linear {
    subject.linears.iter_mut().find(|linear| linear.name.ends_with(end)).unwrap()
}

fn judge(subject: &Subject, target: &str) -> Vec<Violation> {
    let target: TargetSpec = target.parse().unwrap();
    check(subject, &Profile::of(&target).unwrap(), &target)
}

/// The ids of the rules that refuse.
fn refusals(subject: &Subject, target: &str) -> Vec<String> {
    judge(subject, target).into_iter().filter(Violation::refuses).map(|v| v.rule).collect()
}

/// The violation of this rule as text.
fn told(subject: &Subject, target: &str, rule: &str) -> String {
    let found = judge(subject, target);
    let violation = found.iter().find(|violation| violation.rule == rule);
    violation.unwrap_or_else(|| panic!("{target} has no {rule} among {found:?}")).to_string()
}

#[test]
fn every_profile_is_read_and_every_rule_has_a_source() {
    let profiles = Profile::all().unwrap();
    assert_eq!(profiles.len(), PROFILES.len());
    for (profile, (name, _)) in profiles.iter().zip(PROFILES) {
        assert_eq!(profile.name, *name);
        assert!(!profile.versions.is_empty() && !profile.checked.is_empty(), "{name}");
        let ids: BTreeSet<_> = profile.rules.iter().map(|rule| &rule.id).collect();
        assert_eq!(ids.len(), profile.rules.len(), "{name}: two rules of one id");
        for rule in &profile.rules {
            let id = &rule.id;
            assert!(!rule.source.is_empty(), "{name}: {id} has no source");
            for source in &rule.source {
                let place = source.starts_with("https://")
                    || source.starts_with("tests/")
                    || source.split_once(": ").is_some_and(|(repo, _)| repo.contains('/'));
                assert!(place, "{name}: {id}: `{source}` is no place");
            }
            assert!(!rule.reason.is_empty() && !rule.remedy.is_empty(), "{name}: {id}");
        }
    }
}

#[test]
fn profiles_with_unknown_keys_are_refused_by_name() {
    let (_, text) = PROFILES[0];
    let parse = |text: &str| Profile::parse("vllm", text).unwrap_err().to_string();
    let error = parse(&text.replacen("reason =", "raeson =", 1));
    assert!(error.contains("raeson") && error.contains("rule[0]"), "{error}");
    let error = parse(&text.replacen("accepted =", "acepted =", 1));
    assert!(error.contains("acepted"), "{error}");
    let error = parse(&text.replacen("[rule.check.layouts]", "[rule.check.layout]", 1));
    assert!(error.contains("layout"), "{error}");
    let error = parse(&text.replacen("source = [", "source = 3 #", 1));
    assert!(error.starts_with("profile vllm"), "{error}");
}

#[test]
fn targets_are_spelt_exactly() {
    let parse = |text: &str| text.parse::<TargetSpec>();
    assert_eq!(parse("vllm").unwrap(), TargetSpec { name: "vllm".into(), tp: 1 });
    assert_eq!(parse("vllm,tp=4").unwrap().to_string(), "vllm,tp=4");
    for (text, part) in [
        ("vlm", "did you mean `vllm`"),
        ("onnx-runtime-web", "known: vllm, transformers"),
        ("vllm,tp=0", "1 to 1024"),
        ("vllm,tp=two", "1 to 1024"),
        ("vllm,tp=99999", "1 to 1024"),
        ("vllm,pp=2", "unknown option `pp=2`"),
        ("vllm,tp=2,tp=4", "twice"),
    ] {
        let error = parse(text).unwrap_err().to_string();
        assert!(error.contains(part), "{text}: {error}");
    }
}

#[test]
fn good_artifacts_are_accepted() {
    for layout in ["compressed-tensors", "gptq", "gptq_v2", "awq"] {
        for target in ["vllm", "vllm,tp=2", "vllm,tp=4", "sglang", "sglang,tp=4", "transformers"] {
            let found = judge(&subject(layout), target);
            assert!(found.is_empty(), "{layout} for {target}: {found:?}");
        }
    }
}

#[test]
fn layouts_and_containers() {
    let text = told(&subject("gptq"), "tensorrt-llm", "layout");
    assert!(text.contains("gptq: this runtime reads none"), "{text}");
    let text = told(&subject("gptq"), "llama.cpp", "container");
    assert!(text.contains("safetensors: this runtime reads gguf"), "{text}");
    let mut dense = subject("gptq");
    dense.layout = None;
    dense.linears.iter_mut().for_each(|linear| linear.scheme = None);
    assert!(judge(&dense, "tensorrt-llm").is_empty());
    let mut other = subject("marlin_24");
    assert_eq!(refusals(&other, "vllm"), ["layout"]);
    other.family = "mamba".into();
    assert_eq!(refusals(&other, "vllm"), ["layout", "family"]);
}

#[test]
fn schemes() {
    let with = |layout: &str, bits, group, symmetric| {
        let mut subject = subject(layout);
        rescheme(&mut subject, bits, group, symmetric);
        subject
    };
    assert_eq!(refusals(&with("gptq", 3, 128, true), "vllm"), ["gptq-scheme"]);
    assert_eq!(refusals(&with("gptq", 4, 128, false), "vllm"), ["gptq-scheme"]);
    assert_eq!(refusals(&with("gptq", 4, 256, true), "vllm"), ["gptq-scheme"]);
    assert_eq!(refusals(&with("gptq_v2", 8, -1, true), "vllm"), Vec::<String>::new());
    assert_eq!(refusals(&with("gptq", 3, 128, false), "sglang"), Vec::<String>::new());
    assert_eq!(refusals(&with("awq", 4, 16, false), "vllm"), ["awq-scheme"]);
    assert_eq!(refusals(&with("compressed-tensors", 3, 128, false), "vllm"), ["ct-asymmetric-low"]);
    assert_eq!(refusals(&with("compressed-tensors", 3, 128, true), "sglang"), ["ct-bits"]);
    assert_eq!(refusals(&with("compressed-tensors", 8, 128, false), "sglang"), ["ct-asymmetric-8"]);
    let warned = judge(&with("compressed-tensors", 3, 128, true), "vllm");
    assert!(warned.iter().any(|v| v.rule == "ct-low-bits") && warned.iter().all(|v| !v.refuses()));
    let text = told(&with("gptq", 3, 256, false), "vllm", "gptq-scheme");
    assert!(text.contains("3 bits, group size 256, asymmetric (w3 g256 asym)"), "{text}");
    assert!(text.contains("model.layers.0.self_attn.q_proj") && text.contains("and 6 more"));
    assert!(text.contains("auto_gptq.py") && text.contains("remedy:"), "{text}");
    let mut wide = subject("compressed-tensors");
    linear(&mut wide, "0.mlp.up_proj").scales = Some(DType::F32);
    let text = told(&wide, "vllm", "ct-scales");
    assert!(text.contains("model.layers.0.mlp.up_proj: scales in F32"), "{text}");
}

#[test]
fn column_orders_must_be_declared() {
    let mut shuffled = subject("gptq");
    linear(&mut shuffled, "1.mlp.down_proj").column_order = Some(true);
    let text = told(&shuffled, "vllm", "column-order");
    assert!(
        text.contains("model.layers.1.mlp.down_proj") && text.contains("`desc_act` is not true")
    );
    shuffled.config.as_mut().unwrap()["desc_act"] = json!(true);
    assert_eq!(refusals(&shuffled, "vllm"), Vec::<String>::new());
}

#[test]
fn fused_linears_have_one_scheme() {
    let mut mixed = subject("compressed-tensors");
    linear(&mut mixed, "0.mlp.up_proj").scheme = Some(scheme(8, 128, true));
    let value = linear(&mut mixed, "1.self_attn.v_proj");
    (value.scheme, value.declared) = (None, Some(false));
    let text = told(&mixed, "vllm", "fused");
    assert!(text.contains("0.mlp.gate_proj+up_proj: gate_proj is w4 g128 sym, up_proj is w8 g128"));
    assert!(text.contains("v_proj is dense"), "{text}");
    assert_eq!(refusals(&mixed, "transformers"), Vec::<String>::new());
}

#[test]
fn heads_and_even_splits() {
    assert_eq!(refusals(&subject("gptq"), "vllm,tp=8"), Vec::<String>::new());
    let found = refusals(&subject("gptq"), "vllm,tp=3");
    assert_eq!(found, ["heads", "even-split"]);
    let text = told(&subject("gptq"), "vllm,tp=3", "heads");
    assert!(text.contains("8 do not split over 3") && text.contains("4 neither split nor repeat"));
    let text = told(&subject("gptq"), "vllm,tp=3", "even-split");
    assert!(text.contains("1.mlp.down_proj: 2048 columns / 3 is not even"), "{text}");
    let mut few = subject("gptq");
    few.attention = Some(AttentionShape { heads: 8, kv_heads: 3, head_dim: 128 });
    assert_eq!(refusals(&few, "vllm,tp=4"), ["heads"]);
}

#[test]
fn a_group_is_never_cut() {
    // Qwen2.5-72B's MLP, 29568 = 231 groups of 128, on two ranks.
    for (layout, rule) in [
        ("gptq", "split-groups"),
        ("compressed-tensors", "split-groups"),
        ("awq", "awq-split-groups"),
    ] {
        let mut odd = subject(layout);
        for linear in &mut odd.linears {
            match linear.role {
                Role::Down => linear.in_features = 29568,
                Role::Gate | Role::Up => linear.out_features = 29568,
                _ => {}
            }
        }
        for target in ["vllm", "sglang"] {
            assert_eq!(refusals(&odd, target), Vec::<String>::new());
            assert_eq!(refusals(&odd, &format!("{target},tp=2")), [rule]);
            let text = told(&odd, &format!("{target},tp=2"), rule);
            assert!(
                text.contains("model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj: ")
                    && text.contains("29568 columns / 2 = 14784, which cuts a group of 128"),
                "{text}"
            );
        }
        // 29568 / 2 is 231 groups of 64.
        let symmetric = layout != "awq";
        rescheme(&mut odd, 4, 64, symmetric);
        assert_eq!(refusals(&odd, "vllm,tp=2"), Vec::<String>::new());
        // One scale per row is repeated on every rank, but not by AWQ's loader.
        rescheme(&mut odd, 4, -1, symmetric);
        let found = refusals(&odd, "vllm,tp=2");
        assert_eq!(found.is_empty(), layout != "awq", "{found:?}");
    }
}

#[test]
fn packed_words_are_never_cut() {
    let mut narrow = subject("gptq");
    linear(&mut narrow, "0.mlp.up_proj").out_features = 24;
    assert_eq!(refusals(&narrow, "vllm,tp=2"), ["split-rows"]);
    let text = told(&narrow, "vllm,tp=2", "split-rows");
    assert!(text.contains("12 rows a rank, but 8 are packed together"), "{text}");
    let mut narrow = subject("compressed-tensors");
    linear(&mut narrow, "0.mlp.up_proj").out_features = 24;
    assert_eq!(refusals(&narrow, "vllm,tp=2"), Vec::<String>::new());
    rescheme(&mut narrow, 4, 128, false);
    assert_eq!(refusals(&narrow, "vllm,tp=2"), ["ct-split-rows"]);
    let mut narrow = subject("gptq");
    rescheme(&mut narrow, 4, -1, true);
    linear(&mut narrow, "0.mlp.down_proj").in_features = 24;
    assert_eq!(refusals(&narrow, "vllm,tp=2"), ["split-columns"]);
    // Three bits fill words in 32s.
    let mut three = subject("gptq");
    rescheme(&mut three, 3, -1, true);
    linear(&mut three, "0.mlp.up_proj").out_features = 32;
    assert_eq!(refusals(&three, "sglang,tp=2"), ["split-rows"]);
}

#[test]
fn tiles_of_kernels_count_fused_linears_together() {
    let mut small = subject("gptq");
    rescheme(&mut small, 4, 32, true);
    for block in 0..2 {
        for (name, rows) in [("k_proj", 32), ("v_proj", 32)] {
            linear(&mut small, &format!("{block}.self_attn.{name}")).out_features = rows;
        }
    }
    // 1024 + 32 + 32 rows are 17 times 64.
    assert!(judge(&small, "vllm").is_empty());
    linear(&mut small, "0.self_attn.v_proj").out_features = 64;
    linear(&mut small, "0.mlp.down_proj").in_features = 1056;
    let text = told(&small, "vllm", "marlin-shape");
    assert!(text.contains("q_proj+k_proj+v_proj: a rank has 1120 rows, not a multiple of 64"));
    assert!(text.contains("down_proj: a rank has 1056 columns, not a multiple of 128"), "{text}");
    assert_eq!(refusals(&small, "vllm"), Vec::<String>::new());
}

#[test]
fn heads_and_embeddings_that_nobody_reads() {
    let packed = |layout: &str| {
        let mut subject = subject(layout);
        let symmetric = layout != "awq";
        linear(&mut subject, "lm_head").scheme = Some(scheme(4, 128, symmetric));
        subject
    };
    assert_eq!(refusals(&packed("compressed-tensors"), "sglang"), ["head-ct"]);
    assert_eq!(refusals(&packed("compressed-tensors"), "vllm"), Vec::<String>::new());
    assert_eq!(refusals(&packed("awq"), "vllm"), ["head-gptq-awq"]);
    assert_eq!(refusals(&packed("awq"), "transformers"), ["head-awq"]);
    let mut head = packed("gptq");
    assert_eq!(refusals(&head, "vllm"), ["head-gptq-awq"]);
    head.config.as_mut().unwrap()["lm_head"] = json!(true);
    assert_eq!(refusals(&head, "vllm"), Vec::<String>::new());
    let mut embedding = subject("gptq");
    embedding.embedding_quantized = true;
    for target in ["vllm", "sglang", "transformers"] {
        assert_eq!(refusals(&embedding, target), ["embedding"]);
    }
}

#[test]
fn files_and_configs() {
    let mut bare = subject("awq");
    bare.files = Some(vec!["config.json".into(), "model.safetensors".into()]);
    let text = told(&bare, "vllm", "files");
    assert!(text.contains("tokenizer.json or tokenizer.model or vocab.json: is missing"), "{text}");
    bare.files = None;
    assert_eq!(refusals(&bare, "vllm"), Vec::<String>::new());
    bare.config.as_mut().unwrap().as_object_mut().unwrap().remove("zero_point");
    let text = told(&bare, "vllm", "awq-config");
    assert!(text.contains("zero_point: quantization_config lacks it"), "{text}");
    let mut lying = subject("compressed-tensors");
    let down = linear(&mut lying, "0.mlp.down_proj");
    (down.scheme, down.declared) = (None, Some(true));
    let text = told(&lying, "vllm", "declared");
    assert!(
        text.contains("0.mlp.down_proj: quantization_config calls it quantized, but it is dense")
    );
    let down = linear(&mut lying, "0.mlp.down_proj");
    (down.scheme, down.declared) = (Some(scheme(4, 128, true)), Some(false));
    assert_eq!(refusals(&lying, "sglang"), ["declared"]);
}

#[test]
fn ranks_at_most() {
    let found = judge(&subject("gptq"), "transformers,tp=2");
    assert!(found.len() == 1 && found[0].rule == "tensor-parallel" && !found[0].refuses());
    assert!(found[0].to_string().contains("not verified"), "{}", found[0]);
}

#[test]
fn factors_need_code_and_corrections_an_adapter() {
    let mut both = subject("compressed-tensors");
    both.factored = vec!["model.layers.0.mlp.up_proj".to_owned()];
    both.corrected = vec!["model.layers.0.mlp.down_proj".to_owned()];
    for target in ["vllm", "sglang"] {
        assert_eq!(refusals(&both, target), ["factored-linears"]);
        assert!(told(&both, target, "factored-linears").contains("layers.0.mlp.up_proj"));
        assert!(told(&both, target, "correction").contains("layers.0.mlp.down_proj"));
    }
    assert_eq!(refusals(&both, "transformers"), Vec::<String>::new());
    assert!(told(&both, "transformers", "factored-linears").contains("trust_remote_code"));
}
