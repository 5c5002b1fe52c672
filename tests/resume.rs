//! What a night's work must stand: killed processes, full disks, a second process, damaged objects.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::Duration,
};

use attar_tensor::rng::Rng;
use serde_json::Value;

use super::{attar, data, model};

const PHASES: [&str; 6] = ["calibrate", "solve", "store", "emit", "verify", "seal"];

const RECIPE: &str = r#"
[calibration]
context = 256
samples = 12
[[step]]
pass = "awq"
[[step]]
pass = "gptq"
scheme = { bits = 3 }
[[emit]]
layout = "gptq"
"#;

fn binary() -> PathBuf {
    assert_cmd::cargo::cargo_bin("attar")
}

/// The command that all tests here run.
fn arguments(recipe: &Path, out: &Path, extra: &[&str]) -> Vec<String> {
    let text = data("tinystories_calib.txt").display().to_string();
    let mut all: Vec<String> = vec!["compress".into(), model()];
    all.extend(["--recipe".into(), recipe.display().to_string(), "--text".into(), text]);
    all.extend(["--out".into(), out.display().to_string(), "--progress".into(), "json".into()]);
    all.extend(extra.iter().map(|&e| e.to_owned()));
    all
}

fn written(dir: &Path, name: &str, text: &str) -> PathBuf {
    let path = dir.join(name);
    fs::write(&path, text).unwrap();
    path
}

/// Bytes of every file of an artifact but the reports, whose times differ.
fn content(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            for (inner, bytes) in content(&path) {
                all.insert(format!("{name}/{inner}"), bytes);
            }
        } else if !name.starts_with("report.") {
            all.insert(name, fs::read(path).unwrap());
        }
    }
    all
}

/// `(event, phase, seconds)` of a line of progress.
fn event(line: &str) -> Option<(String, String, f64)> {
    let value: Value = serde_json::from_str(line).ok()?;
    let text = |key: &str| value[key].as_str().map(str::to_owned);
    Some((text("event")?, text("phase")?, value["t"].as_f64()?))
}

/// Starts a run, waits for the `nth` beginning of `phase`, then for `delay`, and kills it. Returns the phase
/// in which it died; `None` when it had finished.
fn kill_in(
    arguments: &[String],
    phase: &str,
    nth: usize,
    delay: Duration,
) -> (Option<String>, bool) {
    let mut child: Child = Command::new(binary())
        .args(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap());
    let (mut line, mut seen) = (String::new(), 0);
    let mut open: Vec<String> = Vec::new();
    let follow = |line: &str, open: &mut Vec<String>| match event(line) {
        Some((kind, phase, _)) if kind == "begin" => {
            open.push(phase.clone());
            Some(phase)
        }
        Some((kind, phase, _)) if kind == "end" => {
            open.retain(|p| *p != phase);
            None
        }
        _ => None,
    };
    while lines.read_line(&mut line).unwrap_or(0) > 0 {
        if follow(&line, &mut open).as_deref() == Some(phase) {
            if seen == nth {
                break;
            }
            seen += 1;
        }
        line.clear();
    }
    sleep(delay);
    child.kill().unwrap();
    let finished = child.wait().unwrap().success();
    // What it wrote between the wait and its death.
    let mut rest = String::new();
    let _ = lines.read_to_string(&mut rest);
    for line in rest.lines() {
        follow(line, &mut open);
    }
    (open.pop(), finished)
}

#[test]
fn a_killed_run_goes_on_to_the_same_bytes() {
    let kills: usize =
        std::env::var("ATTAR_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(100);
    let dir = tempfile::tempdir().unwrap();
    let recipe = written(dir.path(), "recipe.toml", RECIPE);
    let clean = dir.path().join("clean");
    let run = Command::new(binary()).args(arguments(&recipe, &clean, &[])).output().unwrap();
    let log = String::from_utf8_lossy(&run.stderr).into_owned();
    assert!(run.status.success(), "{log}");
    let expected = content(&clean);
    assert!(!dir.path().join("clean.scratch").exists());
    // Where the parts of a run begin, and how long they take.
    let mut parts: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    let mut begun: BTreeMap<String, f64> = BTreeMap::new();
    for (kind, phase, t) in log.lines().filter_map(event) {
        if kind == "begin" {
            begun.insert(phase, t);
        } else if let Some(start) = begun.remove(&phase) {
            parts.entry(phase).or_default().push(t - start);
        }
    }
    let mut rng = Rng::new(20);
    let mut died: BTreeMap<String, usize> = BTreeMap::new();
    let at_least = kills / 10;
    let (mut done, mut tries) = (0, 0);
    let wanting = |died: &BTreeMap<String, usize>| {
        PHASES.iter().find(|p| died.get(**p).copied().unwrap_or(0) < at_least).copied()
    };
    while done < kills || wanting(&died).is_some() {
        assert!(tries < 6 * kills, "{died:?}: some phase is too short to be hit");
        // Every phase in turn, then those that were missed.
        let phase = if done < kills { PHASES[tries % 6] } else { wanting(&died).unwrap() };
        tries += 1;
        let durations = &parts[phase];
        let nth = (rng.uniform() * durations.len() as f32) as usize % durations.len();
        let delay = Duration::from_secs_f64(durations[nth] * f64::from(rng.uniform()));
        let out = dir.path().join(format!("out{tries}"));
        let every = if tries % 2 == 0 { "0" } else { "30" };
        let extra = ["--checkpoint-every", every];
        let (at, finished) = kill_in(&arguments(&recipe, &out, &extra), phase, nth, delay);
        if finished {
            continue;
        }
        done += 1;
        let at = at.unwrap_or_else(|| "between".to_owned());
        *died.entry(at.clone()).or_default() += 1;
        // Killed once more on the way, every third time.
        if tries % 3 == 0 {
            kill_in(&arguments(&recipe, &out, &extra), PHASES[tries / 3 % 6], 0, delay);
        }
        let again = Command::new(binary()).args(arguments(&recipe, &out, &extra)).output().unwrap();
        let error = String::from_utf8_lossy(&again.stderr).into_owned();
        assert!(again.status.success(), "killed in {at} (try {tries}): {error}");
        assert!(content(&out) == expected, "killed in {at} (try {tries}): other bytes");
        for left in ["partial", "scratch"] {
            let left = dir.path().join(format!("out{tries}.{left}"));
            assert!(!left.exists(), "killed in {at} (try {tries}): {} is left", left.display());
        }
        fs::remove_dir_all(&out).unwrap();
    }
    println!("{done} of {done} kills ended in the same bytes; they fell into {died:?}");
}

#[test]
fn a_full_disk_is_told_and_the_run_goes_on_afterwards() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = written(dir.path(), "recipe.toml", RECIPE);
    let clean = dir.path().join("clean");
    let run = Command::new(binary()).args(arguments(&recipe, &clean, &[])).output().unwrap();
    assert!(run.status.success());
    let expected = content(&clean);
    let mut rng = Rng::new(7);
    let mut failed = 0;
    for attempt in 0..10 {
        let out = dir.path().join(format!("out{attempt}"));
        let command = arguments(&recipe, &out, &["--checkpoint-every", "0"]);
        // Blocks of 512 bytes; the largest file has about 1.2 MB, the smallest of an object a few hundred.
        let limit = (2.0f32.powf(rng.uniform() * 12.0)) as usize;
        // A limit on the size of files stands for a full disk: the signal is ignored, so writes fail.
        let script = format!("trap '' XFSZ; ulimit -f {limit}; exec \"$@\"");
        let limited = Command::new("sh")
            .args(["-c", &script, "sh"])
            .arg(binary())
            .args(&command)
            .output()
            .unwrap();
        if !limited.status.success() {
            failed += 1;
            let error = String::from_utf8_lossy(&limited.stderr).into_owned();
            assert_eq!(limited.status.code(), Some(2), "{error}");
            assert!(error.contains("error: ") && error.contains("File too large"), "{error}");
            assert!(!out.exists(), "something stands under the final name");
        }
        let again = Command::new(binary()).args(&command).output().unwrap();
        assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stderr));
        assert!(content(&out) == expected, "limit {limit}: other bytes");
    }
    assert!(failed >= 7, "only {failed} of 10 limits were felt");
}

#[test]
fn a_work_directory_serves_later_runs_and_keeps_others_out() {
    let dir = tempfile::tempdir().unwrap();
    let work = dir.path().join("work");
    let recipe = |name: &str, upstream: &str, bits: u8| {
        let text = RECIPE
            .replace("bits = 3", &format!("bits = {bits}"))
            .replace("pass = \"gptq\"", &format!("pass = \"gptq\"\nupstream = \"{upstream}\""))
            .replace("[[step]]\npass = \"awq\"\n", "");
        written(dir.path(), name, &text)
    };
    let run = |recipe: &Path, out: &str, scratch: Option<&Path>| {
        let out = dir.path().join(out);
        let scratch = scratch.map(|s| s.display().to_string());
        let extra: Vec<&str> =
            scratch.iter().flat_map(|scratch| ["--scratch", scratch.as_str()]).collect();
        let output = Command::new(binary()).args(arguments(recipe, &out, &extra)).output().unwrap();
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{log}");
        let count = |phase: &str| {
            let begins =
                |line: &&str| event(line).is_some_and(|(kind, p, _)| kind == "begin" && p == phase);
            log.lines().filter(begins).count()
        };
        (content(&out), count("calibrate"), count("solve"))
    };
    for upstream in ["original", "compressed"] {
        let (w4, w3) = (recipe("w4.toml", upstream, 4), recipe("w3.toml", upstream, 3));
        let name = |what: &str| format!("{upstream}-{what}");
        let (first, calibrated, solved) = run(&w4, &name("first"), Some(&work));
        // 4 stages of 2 blocks; what enters block 0 is the same for both upstreams, and so is its first stage.
        let stages = if upstream == "original" { 8 } else { 7 };
        assert_eq!(solved, stages);
        if upstream == "original" {
            // The plan said what would lie there; each file has a header of its own.
            let recipe = w4.display().to_string();
            let text = data("tinystories_calib.txt").display().to_string();
            let (_, stdout, _) =
                attar(&["plan", &model(), "--recipe", &recipe, "--text", &text, "--json"]);
            let plan: Value = serde_json::from_str(&stdout).unwrap();
            let told = &plan["variants"][0]["work_directory"];
            let told = told["results"].as_u64().unwrap() + told["statistics"].as_u64().unwrap();
            let (_, stdout, _) = attar(&["cache", "list", &work.display().to_string(), "--json"]);
            let found: Value = serde_json::from_str(&stdout).unwrap();
            let found = found["objects"].as_array().unwrap().clone();
            let bytes: u64 = found.iter().map(|o| o["info"]["bytes"].as_u64().unwrap()).sum();
            assert!((told..told + 2000 * found.len() as u64).contains(&bytes), "{told} {bytes}");
        }
        // The same once more: nothing is computed.
        let (again, calibrated_again, solved_again) = run(&w4, &name("again"), Some(&work));
        assert_eq!((calibrated_again, solved_again), (0, 0));
        assert!(again == first);
        // Other bits: every Hessian is there with original upstream, else those of the first input.
        let (third, calibrated_third, solved_third) = run(&w3, &name("third"), Some(&work));
        assert_eq!(solved_third, stages);
        if upstream == "original" {
            assert_eq!(calibrated_third, 0);
        } else {
            // The first input of block 0 was there for the first run too.
            assert_eq!(calibrated_third, calibrated);
        }
        // A cold run agrees.
        assert!(run(&w3, &name("cold"), None).0 == third);
    }
    let list = |args: &[&str]| {
        let mut all = vec!["cache"];
        all.extend(args);
        let work = work.display().to_string();
        all.insert(2, &work);
        attar(&all)
    };
    let (code, stdout, _) = list(&["list", "--json"]);
    assert_eq!(code, 0);
    let objects: Value = serde_json::from_str(&stdout).unwrap();
    let objects = objects["objects"].as_array().unwrap().clone();
    assert!(objects.len() > 20);
    // A damaged object is found, told of, and its work done again.
    let result = objects
        .iter()
        .find(|o| o["info"]["kind"] == "result" && o["bytes"].as_u64().unwrap() > 10_000)
        .unwrap();
    let file = work.join("objects").join(result["key"].as_str().unwrap()).join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 4;
    fs::write(&file, bytes).unwrap();
    let (code, stdout, _) = list(&["verify"]);
    assert!(code == 1 && stdout.contains("DAMAGED"), "{stdout}");
    for (name, upstream, bits) in [
        ("o4", "original", 4),
        ("o3", "original", 3),
        ("c4", "compressed", 4),
        ("c3", "compressed", 3),
    ] {
        let (found, ..) = run(&recipe("x.toml", upstream, bits), name, Some(&work));
        let (cold, ..) = run(&recipe("x.toml", upstream, bits), &format!("{name}-cold"), None);
        assert!(found == cold, "{name}");
    }
    assert_eq!(list(&["verify"]).0, 0);
    let (code, stdout, _) = list(&["prune", "--limit", "100kB"]);
    assert!(code == 0 && stdout.contains("objects removed"), "{stdout}");
    // Two processes.
    let stage = attar_formats::stage::Stage::open(&work).unwrap();
    let out = dir.path().join("second");
    let scratch = work.display().to_string();
    let command = arguments(&recipe("w4.toml", "original", 4), &out, &["--scratch", &scratch]);
    let output = Command::new(binary()).args(&command).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(2) && error.contains("another attar process"), "{error}");
    drop(stage);
}

#[test]
fn one_recipe_makes_several_variants_each_as_if_alone() {
    let dir = tempfile::tempdir().unwrap();
    let text = r#"
[calibration]
context = 256
samples = 12
[[step]]
id = "scaled"
pass = "awq"
[[step]]
id = "w4"
pass = "gptq"
upstream = "original"
scheme = { bits = 4 }
[[step]]
id = "w3"
after = "scaled"
pass = "gptq"
scheme = { bits = 3 }
[[step]]
id = "plain"
after = "source"
pass = "gptq"
upstream = "original"
scheme = { bits = 4 }
[[emit]]
layout = "gptq"
"#;
    let recipe = written(dir.path(), "all.toml", text);
    let all = dir.path().join("all");
    let output = Command::new(binary()).args(arguments(&recipe, &all, &[])).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for (name, steps) in [
        (
            "w4",
            "[[step]]\npass = \"awq\"\n[[step]]\npass = \"gptq\"\nupstream = \"original\"\nscheme = { bits = 4 }\n",
        ),
        ("w3", "[[step]]\npass = \"awq\"\n[[step]]\npass = \"gptq\"\nscheme = { bits = 3 }\n"),
        ("plain", "[[step]]\npass = \"gptq\"\nupstream = \"original\"\nscheme = { bits = 4 }\n"),
    ] {
        let text = format!(
            "[calibration]\ncontext = 256\nsamples = 12\n{steps}[[emit]]\nlayout = \"gptq\"\n"
        );
        let recipe = written(dir.path(), "one.toml", &text);
        let one = dir.path().join(name);
        let output = Command::new(binary()).args(arguments(&recipe, &one, &[])).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let (ours, alone) = (content(&all.join(name)), content(&one));
        assert!(ours["model.safetensors"] == alone["model.safetensors"], "{name}");
    }
    let recipe = recipe.display().to_string();
    let calibration = data("tinystories_calib.txt").display().to_string();
    let (code, stdout, error) =
        attar(&["plan", &model(), "--recipe", &recipe, "--text", &calibration]);
    assert_eq!(code, 0, "{error}");
    for line in ["|- step[0] (awq, id scaled)", "=> w3/ (gptq", "from one sweep"] {
        assert!(stdout.contains(line), "{stdout}");
    }
    let (_, dot, _) =
        attar(&["plan", &model(), "--recipe", &recipe, "--text", &calibration, "--dot"]);
    assert!(dot.starts_with("digraph") && dot.contains("step0 -> step2"), "{dot}");
}
