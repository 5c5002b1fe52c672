//! Memory budgets: kept, refused by name, and without influence on a byte.

use std::{fs, path::Path};

use serde_json::Value;

use super::{attar, compress, data, model};

fn bytes(folder: &Path) -> [Vec<u8>; 2] {
    ["model.safetensors", "attar_manifest.json"].map(|name| fs::read(folder.join(name)).unwrap())
}

fn report(folder: &Path) -> (u64, u64) {
    let report: Value =
        serde_json::from_slice(&fs::read(folder.join("report.json")).unwrap()).unwrap();
    let number = |key: &str| report[key].as_u64().unwrap();
    (number("measured_peak_bytes"), number("predicted_peak_bytes"))
}

/// The number of MiB that a refusal names.
fn smallest(error: &str) -> u64 {
    let rest = error.split("give --memory ").nth(1).expect(error);
    rest.split("MiB").next().unwrap().parse().unwrap()
}

#[test]
fn the_smallest_budget_is_named_is_kept_and_changes_no_byte() {
    let dir = tempfile::tempdir().unwrap();
    for preset in ["gptq-w4", "awq-w3"] {
        let place = |name: &str| dir.path().join(format!("{preset}-{name}"));
        let (code, _, error) = compress(preset, &place("free"), &[]);
        assert_eq!(code, 0, "{error}");
        let (code, _, error) = compress(preset, &place("none"), &["--memory", "1MiB"]);
        assert_eq!(code, 2);
        assert!(error.contains("memory 1MiB: the run needs") && !place("none").exists(), "{error}");
        let least = format!("{}MiB", smallest(&error));
        let (code, _, error) = compress(preset, &place("least"), &["--memory", &least]);
        assert_eq!(code, 0, "{least}: {error}");
        assert!(bytes(&place("free")) == bytes(&place("least")), "{preset}");
        for name in ["free", "least"] {
            let (measured, predicted) = report(&place(name));
            assert!(measured <= predicted, "{preset} {name}: {measured} {predicted}");
        }
        let (measured, _) = report(&place("least"));
        assert!(measured <= smallest(&format!("give --memory {least}")) << 20, "{measured}");
    }
}

#[test]
fn plans_state_the_memory_of_every_stage() {
    let (model, text) = (model(), data("tinystories_calib.txt").display().to_string());
    let mut args = vec!["plan", &model, "--preset", "gptq-w4", "--text", &text, "--threads", "2"];
    args.extend(["--context", "256", "--memory", "1GiB", "--eval-text", &text, "--json"]);
    let (code, stdout, error) = attar(&args);
    assert_eq!(code, 0, "{error}");
    let json: Value = serde_json::from_str(&stdout).unwrap();
    let plan = &json["variants"][0]["plan"];
    assert_eq!(
        (&plan["memory_budget"], &plan["limits"]["threads"]),
        (&(1 << 30).into(), &2.into())
    );
    let moments = plan["memory"]["moments"].as_array().unwrap();
    let at = |what: &str, place: &str| {
        moments.iter().find(|m| m["what"] == what && m["place"] == place).expect(what)
    };
    // The Hessian of the widest input, and what of it is summed before.
    let width = 384;
    let statistics = |what: &str| at(what, "mlp activation")["statistics"].as_u64().unwrap();
    assert!(statistics("observe") > statistics("step[0] (gptq)"));
    assert!(statistics("step[0] (gptq)") >= 4 * width * width);
    for what in ["read corpus", "embed", "load", "write", "copy", "verify", "measure, logits"] {
        at(what, "");
    }
    assert!(plan["memory"]["peak_bytes"].as_u64().unwrap() <= 1 << 30);
}

#[test]
fn sizes_that_are_none_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for size in ["much", "6 parsecs", "-1"] {
        let argument = format!("--memory={size}");
        let (code, _, error) = compress("rtn-w4", &dir.path().join("out"), &[&argument]);
        assert!(code == 2 && error.contains("--memory"), "{size}: {error}");
    }
}

#[test]
fn of_several_variants_the_one_that_needs_the_most_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let steps = "[[step]]\nid = \"a\"\npass = \"awq\"\n\
        [[step]]\nid = \"b\"\npass = \"gptq\"\nscheme = { bits = 4 }\n\
        [[step]]\nid = \"c\"\nafter = \"source\"\npass = \"rtn\"\nscheme = { bits = 4 }\n\
        [[emit]]\nlayout = \"gptq\"\n";
    let recipe = dir.path().join("recipe.toml");
    fs::write(&recipe, steps).unwrap();
    let (recipe, text) = (recipe.display().to_string(), data("tinystories_calib.txt"));
    let out = dir.path().join("out").display().to_string();
    let run = |memory: &str| {
        attar(&[
            "compress",
            &model(),
            "--recipe",
            &recipe,
            "--text",
            &text.display().to_string(),
            "--context",
            "256",
            "--samples",
            "12",
            "--checkpoint-every",
            "0",
            "--out",
            &out,
            "--memory",
            memory,
        ])
    };
    let (code, _, error) = run("1MiB");
    assert!(code == 2 && error.matches("memory 1MiB").count() == 1, "{error}");
    let least = smallest(&error);
    let (code, _, error) = run(&format!("{least}MiB"));
    assert_eq!(code, 0, "{error}");
    for variant in ["b", "c"] {
        let (measured, predicted) = report(&dir.path().join("out").join(variant));
        assert!(measured <= predicted && predicted <= least << 20, "{measured} {predicted}");
    }
}

#[test]
fn long_texts_and_measuring_keep_to_the_budget_too() {
    let dir = tempfile::tempdir().unwrap();
    let text = fs::read_to_string(data("tinystories_calib.txt")).unwrap();
    let long = dir.path().join("long.txt");
    fs::write(&long, text.repeat(1 + 3_000_000 / text.len())).unwrap();
    let (long, model) = (long.display().to_string(), model());
    let held_out = data("tinystories_val.txt").display().to_string();
    let out = dir.path().join("out");
    let place = out.display().to_string();
    let run = |memory: &str| {
        attar(&[
            "compress",
            &model,
            "--preset",
            "gptq-w4",
            "--text",
            &long,
            "--context",
            "256",
            "--samples",
            "12",
            "--eval-text",
            &held_out,
            "--eval-context",
            "256",
            "--out",
            &place,
            "--memory",
            memory,
        ])
    };
    let (code, _, error) = run("1MiB");
    assert_eq!(code, 2, "{error}");
    let least = smallest(&error);
    // A text of 3 MB: twelve bytes for each of it and the tokenizer's share, not a hundred.
    assert!(least < 120, "{error}");
    let (code, _, error) = run(&format!("{least}MiB"));
    assert_eq!(code, 0, "{error}");
    let (measured, predicted) = report(&out);
    assert!(measured <= predicted && predicted <= least << 20, "{measured} {predicted}");
}
