//! Rules that a compiler does not check: Attar never uses a network.
#![allow(clippy::unwrap_used, reason = "a test may stop anywhere")]

use std::{fs, path::Path};

/// Crates that open connections or carry a TLS stack; none may be a dependency, not even of a dependency.
const NETWORK: &[&str] = &[
    "attohttpc",
    "curl",
    "curl-sys",
    "h2",
    "hf-hub",
    "http",
    "hyper",
    "hyper-util",
    "isahc",
    "mio",
    "native-tls",
    "openssl",
    "openssl-sys",
    "quinn",
    "reqwest",
    "ring",
    "rustls",
    "socket2",
    "surf",
    "tokio",
    "tungstenite",
    "ureq",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn no_dependency_can_reach_a_network() {
    let lock = fs::read_to_string(root().join("Cargo.lock")).unwrap();
    let names: Vec<&str> =
        lock.lines().filter_map(|line| line.strip_prefix("name = \"")?.strip_suffix('"')).collect();
    assert!(names.contains(&"tokenizers"), "the lock file is read");
    for name in NETWORK {
        assert!(!names.contains(name), "Cargo.lock holds {name}");
    }
}

/// Which linears belong together is said in one place: a second list of folds, shared inputs or members would sooner or
/// later say something else.
#[test]
fn the_coupling_table_is_the_only_source_of_what_belongs_together() {
    fn sources(folder: &Path, found: &mut Vec<std::path::PathBuf>) {
        for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.is_dir() {
                sources(&entry, found);
            } else if entry.extension().is_some_and(|end| end == "rs") {
                found.push(entry);
            }
        }
    }
    let mut files = Vec::new();
    for part in ["ir", "model", "quant", "prune", "lowrank", "distill", "eval", "formats"] {
        sources(&root().join(part).join("src"), &mut files);
    }
    sources(&root().join("src"), &mut files);
    let mut builders = Vec::new();
    for file in &files {
        let name = file.strip_prefix(root()).unwrap().display().to_string();
        if ["tests.rs", "testing.rs"].iter().any(|end| name.ends_with(end)) {
            continue;
        }
        let text = fs::read_to_string(file).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap();
        let builds = |line: &str| {
            let made = ["Fold {", "InputGroup {", "Member {"].iter().any(|of| line.contains(of));
            made && !line.contains("struct ") && !line.contains("impl ")
        };
        if code.lines().any(builds) {
            builders.push(name.clone());
        }
        // Passes ask the table which linear reads a dimension, and never look at roles or names.
        let pass =
            ["quant", "prune", "lowrank", "distill"].iter().any(|part| name.starts_with(part));
        for word in ["Role::", "_proj"].iter().filter(|_| pass) {
            let said = code
                .lines()
                .any(|line| !line.trim_start().starts_with("//") && line.contains(word));
            assert!(!said, "{name} names `{word}`: ask `Block::reader_of` or the table");
        }
    }
    assert!(files.len() > 50, "the sources are read");
    assert_eq!(builders, ["ir/src/coupling.rs"]);
}
