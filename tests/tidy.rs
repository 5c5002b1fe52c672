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
