//! The kernel bundle as programs of other languages use it: they read the artifact's own files, and the
//! products are those of the weights that an independent unpacking gives.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use attar_formats::{Checkpoint, quant_config};
use attar_kernels::layout::SUFFIXES;
use attar_tensor::{LayoutId, PackedLinear, TensorSource};
use serde_json::Value;

use crate::{attar, compress, data};

fn sources() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/bundle"))
}

/// Builds the C library as this test was built, and returns the folder that holds it.
fn library() -> &'static str {
    static FOLDER: OnceLock<String> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = Path::new(env!("CARGO_BIN_EXE_attar")).parent().unwrap();
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "--quiet", "--locked", "-p", "attar-capi"]);
        cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
        if folder.ends_with("release") {
            cargo.arg("--release");
        }
        cargo.env("CARGO_TARGET_DIR", folder.parent().unwrap());
        assert!(cargo.status().unwrap().success(), "the C library does not build");
        folder.display().to_string()
    })
}

/// Compiles a C program against the bundle (or any folder with header and library).
fn compiled(source: &str, header: &Path, library: &Path, out: &Path) -> PathBuf {
    let program = out.join(source.replace(".c", ""));
    let status = Command::new("cc")
        .args(["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-I"])
        .arg(header)
        .arg(sources().join(source))
        .arg(library)
        .arg(format!("-Wl,-rpath,{}", library.parent().unwrap().display()))
        .arg("-o")
        .arg(&program)
        .status()
        .expect("tests need a C compiler");
    assert!(status.success(), "{source} does not compile");
    program
}

fn numbers(command: &mut Command) -> Vec<f32> {
    let output = command.output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    String::from_utf8(output.stdout).unwrap().lines().map(|line| line.parse().unwrap()).collect()
}

/// Rows of a linear of the artifact times x[i] = (i % 7 - 3) / 4, in f64.
fn expected(artifact: &Path, name: &str) -> Vec<f64> {
    let checkpoint = Checkpoint::open(artifact).unwrap();
    let quant = quant_config::parse(checkpoint.config()).unwrap().unwrap();
    let entry = table(artifact)["tensors"][name].clone();
    let size = |key: &str| entry[key].as_u64().unwrap() as usize;
    let parts = SUFFIXES.iter().filter_map(|suffix| {
        let name = format!("{name}.{suffix}");
        checkpoint.header(&name).map(|_| (*suffix, checkpoint.read(&name).unwrap().to_tensor()))
    });
    let packed = PackedLinear {
        layout: LayoutId(quant.layout),
        scheme: quant.scheme_of(name).unwrap(),
        out_features: size("out_features"),
        in_features: size("in_features"),
        parts: parts.collect(),
    };
    let weight = attar_kernels::unpack(&packed).unwrap().dequantize();
    let x = |i: usize| f64::from((i % 7) as i32 - 3) / 4.0;
    let row = |row: ndarray::ArrayView1<'_, f32>| {
        row.iter().enumerate().map(|(i, &w)| f64::from(w) * x(i)).sum()
    };
    weight.rows().into_iter().map(row).collect()
}

fn table(artifact: &Path) -> Value {
    serde_json::from_slice(&fs::read(artifact.join("kernels/kernels.json")).unwrap()).unwrap()
}

fn relative(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let off: f64 = got.iter().zip(want).map(|(&a, b)| (f64::from(a) - b).powi(2)).sum();
    (off / want.iter().map(|b| b * b).sum::<f64>()).sqrt()
}

#[test]
fn other_languages_multiply_with_the_artifacts_own_files() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let layouts = ["--layout", "compressed-tensors", "--layout", "gptq", "--layout", "awq"];
    let kernels = ["--kernels", "--kernels-library", library()];
    let (code, _, error) = compress("gptq-w4", &out, &[&layouts[..], &kernels].concat());
    assert_eq!(code, 0, "{error}");
    let shared = format!("libattar_kernels{}", std::env::consts::DLL_SUFFIX);
    for layout in ["compressed-tensors", "gptq", "awq"] {
        let artifact = out.join(layout);
        let folder = artifact.join("kernels");
        let program = compiled("multiply.c", &folder, &folder.join(&shared), &folder);
        let tensors = table(&artifact)["tensors"].as_object().unwrap().clone();
        assert_eq!(tensors.len(), 14);
        for name in ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"] {
            let want = expected(&artifact, name);
            let got = numbers(Command::new(&program).arg(&artifact).arg(name));
            assert!(relative(&got, &want) < 1e-6, "{layout} {name}: {}", relative(&got, &want));
            let python = || {
                let mut command = Command::new("python3");
                command.arg(sources().join("multiply.py")).arg(&artifact).arg(name);
                command
            };
            if python().arg("-h").output().is_err() {
                eprintln!("SKIPPED: there is no python3 to run multiply.py");
                continue;
            }
            assert_eq!(numbers(&mut python()), got, "{layout} {name}");
            let fast = relative(&numbers(python().arg("int8")), &want);
            assert!(fast < 1.2e-2, "{layout} {name}: {fast}");
        }
        let absent = Command::new(&program).arg(&artifact).arg("lm_head").output().unwrap();
        assert_eq!(absent.status.code(), Some(2));
        let (code, stdout, error) = attar(&["verify", &artifact.display().to_string()]);
        assert_eq!(code, 0, "{stdout}{error}");
    }
}

#[test]
fn the_c_interface_refuses_with_a_reason() {
    let dir = tempfile::tempdir().unwrap();
    let shared =
        Path::new(library()).join(format!("libattar_kernels_c{}", std::env::consts::DLL_SUFFIX));
    let header = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/capi/include"));
    let program = compiled("refuse.c", header, &shared, dir.path());
    let output = Command::new(program).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn a_bundle_is_whole_checked_and_judged() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let (code, _, error) = compress("rtn-w4", &out, &["--layout", "gptq"]);
    assert_eq!(code, 0, "{error}");
    let path = out.display().to_string();
    let policy = dir.path().join("policy.toml");
    fs::write(&policy, "min_kernel_status_cpu = 'validated on hardware'").unwrap();
    let policy = policy.display().to_string();
    let gate = || attar(&["gate", &path, "--policy", &policy]);
    let (code, _, error) = gate();
    assert!(code == 2 && error.contains("attar emit"), "{code} {error}");

    // Without the library nothing is written, and the error says how to get it.
    let nowhere = dir.path().display().to_string();
    let (code, _, error) = attar(&["emit", &path, "--kernels-library", &nowhere]);
    assert!(code == 2 && error.contains("cargo build --release -p attar-capi"), "{error}");
    for name in ["libattar_kernels_c.so", "libattar_kernels_c.a"] {
        fs::write(dir.path().join(name), "something else").unwrap();
    }
    let (code, _, error) = attar(&["emit", &path, "--kernels-library", &nowhere]);
    assert!(code == 2 && error.contains("is not the library of attar"), "{error}");
    assert!(!out.join("kernels").exists() && !out.join("kernels.partial").exists());

    let emit = || attar(&["emit", &path, "--kernels-library", library()]);
    let (code, stdout, error) = emit();
    assert!(code == 0 && stdout.contains("14 packed linears"), "{stdout}{error}");
    let first = fs::read(out.join("kernels/kernels.json")).unwrap();
    assert_eq!(emit().0, 0);
    assert!(first == fs::read(out.join("kernels/kernels.json")).unwrap(), "made again, the same");
    assert_eq!(gate().0, 0);
    for kernel in
        table(&out)["tensors"]["model.layers.0.mlp.up_proj"]["kernels"].as_array().unwrap()
    {
        if kernel["backend"] == "cuda" {
            let launch = &kernel["matmul"][0]["launch"];
            let symbol = launch["symbol"].as_str().unwrap();
            let ptx = fs::read_to_string(out.join("kernels/attar.ptx")).unwrap();
            for symbol in [symbol, kernel["prepare"].as_str().unwrap()] {
                assert!(ptx.contains(&format!(".visible .entry {symbol}(")), "{symbol}");
            }
            assert!(launch["threads"].as_u64().unwrap() >= 32, "{kernel}");
            let hopper = &kernel["sm_90a"];
            let cubin = out.join("kernels").join(hopper["cubin"].as_str().unwrap());
            let machine_code = fs::read(cubin).unwrap();
            for launch in hopper["matmul"].as_array().unwrap() {
                let symbol = launch["launch"]["symbol"].as_str().unwrap().as_bytes();
                assert!(
                    machine_code.windows(symbol.len()).any(|bytes| bytes == symbol),
                    "{launch}"
                );
            }
            assert_ne!(hopper["status"], "unmeasured");
            assert_ne!(kernel["status"], "unmeasured");
            continue;
        }
        let measured = &kernel["measured"];
        let proved = kernel["status"] == "validated on hardware";
        assert_eq!(proved, measured["nmse"].is_f64(), "{kernel}");
        let allowed = kernel["tolerance"]["max_nmse"].as_f64().unwrap();
        let within = |nmse: f64| 0.0 < nmse && nmse <= allowed;
        assert!(!proved || within(measured["nmse"].as_f64().unwrap()), "{kernel}");
    }

    // A status that was lowered fails the gate; what was altered does not verify.
    let text = String::from_utf8(first).unwrap();
    let lowered = text.replace("validated on hardware", "unmeasured");
    fs::write(out.join("kernels/kernels.json"), lowered).unwrap();
    assert_eq!(gate().0, 1);
    let moved = text.replacen("\"offset\":", "\"offset\":1", 1);
    fs::write(out.join("kernels/kernels.json"), moved).unwrap();
    let (code, stdout, _) = attar(&["verify", &path]);
    assert!(code == 1 && stdout.contains("attar emit"), "{stdout}");
    fs::write(out.join("kernels/kernels.json"), &text).unwrap();
    assert_eq!(attar(&["verify", &path]).0, 0);
    fs::write(out.join("kernels/attar_kernels.h"), "/* edited */").unwrap();
    let (code, stdout, _) = attar(&["verify", &path]);
    assert!(code == 1 && stdout.contains("attar_kernels.h: hash differs"), "{stdout}");

    // GGUF files have none: an error before any work.
    let blocks = dir.path().join("blocks");
    let kernels = ["--layout", "q8_0", "--kernels", "--kernels-library", library()];
    let (code, _, error) = compress("rtn", &blocks, &kernels);
    assert!(code == 2 && error.contains("q8_0 lies in a GGUF file"), "{error}");
    assert!(!blocks.exists());

    // A dense checkpoint needs no kernel.
    let dense = dir.path().join("dense");
    fs::create_dir(&dense).unwrap();
    for entry in fs::read_dir(data("tinystories-656k")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), dense.join(entry.file_name())).unwrap();
    }
    let (code, _, error) =
        attar(&["emit", &dense.display().to_string(), "--kernels-library", library()]);
    assert!(code == 2 && error.contains("no linear is packed"), "{error}");
}
