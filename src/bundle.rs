//! The kernel bundle of an artifact, `kernels/`: the C interface of the CPU kernels, and `kernels.json`,
//! which says for each packed linear where its bytes lie, which kernels eat them, and how well each of
//! these was proved; CUDA source and machine code beside it.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use attar_kernels::{Backend, KernelReport, Layout, layout::CtInt};
use attar_tensor::{Granularity, LayoutId, LayoutSpec, PackedLinear};
use serde_json::{Value, json};

use crate::{Error, packed::Opened, progress};

mod cuda;

/// Folder of the bundle inside an artifact.
pub(crate) const FOLDER: &str = "kernels";
/// What the bundle says of itself.
pub(crate) const TABLE: &str = "kernels.json";
/// Version of the C interface, as in the header.
const ABI: u32 = 1;
/// Why there is no bundle.
const NO_W8A8: &str = "rounds activations, which the C interface cannot be told; bundles are for layouts of \
     weights alone";
/// As above.
const NO_BUNDLE: &str = "lies in a GGUF file, whose runtimes bring their own kernels; bundles are for \
                         compressed-tensors, gptq and awq";
const HEADER: &str = include_str!("../kernels/capi/include/attar_kernels.h");
/// Numbers of tokens with which each linear is multiplied to measure errors: the direct kernels, and enough for
/// the panels and for the mean error of rounded activations.
const TOKENS: [usize; 3] = [1, 2, 33];

/// How well a kernel was proved, worst first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Status {
    Unmeasured,
    Shim,
    Hardware,
}

impl Status {
    const ALL: [Self; 3] = [Self::Unmeasured, Self::Shim, Self::Hardware];

    fn name(self) -> &'static str {
        attar_eval::KERNEL_STATUS[self as usize]
    }

    fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.name() == text)
    }
}

/// Files of the CPU library, where they lie and how the bundle names them.
struct Library {
    files: Vec<(PathBuf, String)>,
}

impl Library {
    /// Looks for the library in `folder`, else beside this program.
    fn find(folder: Option<&Path>) -> Result<Self, Error> {
        use std::env::consts::{DLL_PREFIX, DLL_SUFFIX};
        let folder = match folder {
            Some(folder) => folder.to_path_buf(),
            None => std::env::current_exe()?.parent().ok_or("this program has no folder")?.into(),
        };
        let shared = format!("{DLL_PREFIX}attar_kernels_c{DLL_SUFFIX}");
        let fixed = if cfg!(windows) { "attar_kernels_c.lib" } else { "libattar_kernels_c.a" };
        let mark = format!("attar_kernels abi {ABI} version {}", env!("CARGO_PKG_VERSION"));
        let mut files = Vec::new();
        for name in [shared.as_str(), fixed] {
            let path = folder.join(name);
            let remedy = "build it with `cargo build --release -p attar-capi`, or say where it lies \
                          with --kernels-library DIR";
            let bytes = fs::read(&path)
                .map_err(|error| format!("{}: {error}; {remedy}", path.display()))?;
            let marked = bytes.windows(mark.len()).any(|window| window == mark.as_bytes());
            if !marked {
                return Err(format!(
                    "{}: is not the library of attar {}; {remedy}",
                    path.display(),
                    env!("CARGO_PKG_VERSION")
                )
                .into());
            }
            files.push((path, name.replace("attar_kernels_c", "attar_kernels")));
        }
        Ok(Self { files })
    }
}

/// That the library can be found and these layouts can have a bundle, before any work is done.
pub(crate) fn check_plan(
    folder: Option<&Path>,
    mut layouts: impl Iterator<Item = LayoutId>,
) -> Result<(), Error> {
    let block = |id: &LayoutId| {
        attar_kernels::layout(id.0).is_some_and(|layout| layout.block_type().is_some())
    };
    let rounds = |id: &LayoutId| *id == LayoutSpec::id(&CtInt);
    if let Some(layout) = layouts.find(|id| block(id) || rounds(id)) {
        let why = if rounds(&layout) { NO_W8A8 } else { NO_BUNDLE };
        return Err(format!("--kernels: layout {layout} {why}").into());
    }
    Library::find(folder).map(drop)
}

/// Writes the bundle of the artifact in `artifact`, whole or not at all; one that is there is replaced.
/// Returns the number of packed linears.
pub(crate) fn write(artifact: &Path, library: Option<&Path>) -> Result<usize, Error> {
    let opened = Opened::open(artifact)?;
    if opened.checkpoint.gguf().is_some() {
        return Err(format!("{}: {NO_BUNDLE}", artifact.display()).into());
    }
    if opened.layout() == Some(LayoutSpec::id(&CtInt).0) {
        return Err(format!("{}: {NO_W8A8}", artifact.display()).into());
    }
    let library = Library::find(library)?;
    let mut device = cuda::Needed::new();
    let tensors = tensors(&opened, artifact, &mut device)?;
    if tensors.is_empty() {
        return Err(
            format!("{}: no linear is packed, so no kernel is needed", artifact.display()).into()
        );
    }
    let partial = artifact.join(format!("{FOLDER}.partial"));
    let fail = |path: &Path, error: std::io::Error| format!("{}: {error}", path.display());
    if partial.exists() {
        fs::remove_dir_all(&partial).map_err(|error| fail(&partial, error))?;
    }
    let fill = || -> Result<(), Error> {
        fs::create_dir(&partial).map_err(|error| fail(&partial, error))?;
        let header = partial.join("attar_kernels.h");
        fs::write(&header, HEADER).map_err(|error| fail(&header, error))?;
        for (from, name) in &library.files {
            let to = partial.join(name);
            fs::copy(from, &to).map_err(|error| fail(&to, error))?;
        }
        let mut names = device.write(&partial)?;
        names.extend(library.files.iter().map(|(_, name)| name.clone()));
        names.push("attar_kernels.h".into());
        let table = partial.join(TABLE);
        fs::write(&table, table_text(&partial, names, &tensors)?)
            .map_err(|error| fail(&table, error))?;
        Ok(())
    };
    if let Err(error) = fill() {
        let _ = fs::remove_dir_all(&partial);
        return Err(error);
    }
    let folder = artifact.join(FOLDER);
    if folder.exists() {
        fs::remove_dir_all(&folder).map_err(|error| fail(&folder, error))?;
    }
    fs::rename(&partial, &folder).map_err(|error| fail(&folder, error))?;
    Ok(tensors.len())
}

/// One line for each linear, so that a program without a JSON parser can find its way.
fn table_text(
    folder: &Path,
    mut names: Vec<String>,
    tensors: &[(String, Value)],
) -> Result<String, Error> {
    let mut files = serde_json::Map::new();
    names.sort();
    for name in names {
        let path = folder.join(&name);
        let bytes = fs::metadata(&path)?.len();
        files.insert(name, json!({"bytes": bytes, "blake3": attar_formats::hash_file(&path)?}));
    }
    let head = [
        ("attar", json!(env!("CARGO_PKG_VERSION"))),
        ("abi", json!(ABI)),
        ("platform", json!(format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS))),
        ("isa", json!(attar_tensor::linalg::level().name())),
        ("files", Value::Object(files)),
    ];
    let mut text = String::from("{\n");
    for (key, value) in head {
        text.push_str(&format!("{}:{value},\n", json!(key)));
    }
    text.push_str("\"tensors\":{\n");
    let lines: Vec<String> =
        tensors.iter().map(|(name, value)| format!("{}:{value}", json!(name))).collect();
    text.push_str(&lines.join(",\n"));
    text.push_str("\n}\n}\n");
    Ok(text)
}

fn tensors(
    opened: &Opened,
    artifact: &Path,
    device: &mut cuda::Needed,
) -> Result<Vec<(String, Value)>, Error> {
    let sites: Vec<_> = opened.linears().cloned().collect();
    let bar = progress::bar(sites.len(), "kernels");
    let mut tensors = Vec::new();
    for site in sites {
        bar.inc(1);
        let Some(packed) = opened.packed(&site)? else { continue };
        let mut entry = description(opened, artifact, &site.name, &packed)?;
        let layout = attar_kernels::layout_of(&packed)?;
        let seed = 1 + tensors.len() as u64;
        let mut kernels = kernels(layout, &packed, seed)?;
        kernels.extend(device.describe(&packed, seed)?);
        entry["kernels"] = json!(kernels);
        tensors.push((site.name, entry));
    }
    bar.finish_and_clear();
    Ok(tensors)
}

/// What a linear is and where its bytes lie.
fn description(
    opened: &Opened,
    artifact: &Path,
    name: &str,
    packed: &PackedLinear,
) -> Result<Value, Error> {
    let mut parts = Vec::new();
    for (suffix, tensor) in &packed.parts {
        let tensor_name = format!("{name}.{suffix}");
        let (file, offset, bytes) = opened
            .checkpoint
            .bytes_of(&tensor_name)
            .ok_or_else(|| format!("{tensor_name}: lies in no safetensors file"))?;
        let file = file.strip_prefix(artifact).unwrap_or(file);
        parts.push(json!({
            "suffix": suffix,
            "dtype": tensor.dtype().safetensors_name(),
            "shape": tensor.shape(),
            "file": file.to_string_lossy(),
            "offset": offset,
            "bytes": bytes,
        }));
    }
    let group = match packed.scheme.granularity {
        Granularity::Channel => -1,
        Granularity::Group(size) => size as i64,
    };
    Ok(json!({
        "layout": packed.layout.0,
        "bits": packed.scheme.bits,
        "group_size": group,
        "symmetric": packed.scheme.symmetric,
        "out_features": packed.out_features,
        "in_features": packed.in_features,
        "parts": parts,
    }))
}

/// The kernels that eat this linear, with the errors measured on its own bytes.
fn kernels(layout: &dyn Layout, packed: &PackedLinear, seed: u64) -> Result<Vec<Value>, Error> {
    let reports = attar_kernels::verify_tokens(layout, packed, seed, &TOKENS)?;
    let mut lines = Vec::new();
    for kernel in layout.kernels() {
        if kernel.backend() != Backend::Cpu
            || !kernel.supports(packed.scheme, packed.in_features, 1)
        {
            continue;
        }
        let report = reports.iter().find(|report| report.kernel == kernel.name());
        if let Some(KernelReport { ok: false, nmse, .. }) = report {
            return Err(format!(
                "kernel {} is off by nmse {nmse:e}, allowed {:e}",
                kernel.name(),
                kernel.tolerance().max_nmse
            )
            .into());
        }
        let status = if report.is_some() { Status::Hardware } else { Status::Unmeasured };
        lines.push(json!({
            "backend": kernel.backend(),
            "kernel": kernel.name(),
            "instructions": kernel.instructions(),
            "activations": kernel.activations().name(),
            "prepare": "attar_linear_prepare",
            "symbol": "attar_linear_matmul",
            "workspace_bytes": 0,
            "tolerance": {"max_nmse": kernel.tolerance().max_nmse},
            "measured": report.map(|report| json!({
                "nmse": report.nmse,
                "max_abs": report.max_abs,
                "worst_in_bounds": report.worst,
            })),
            "status": status.name(),
        }));
    }
    Ok(lines)
}

fn table(artifact: &Path) -> Result<Value, Error> {
    Ok(attar_formats::read_json(&artifact.join(FOLDER).join(TABLE))?)
}

/// Whether the artifact has a bundle.
pub(crate) fn exists(artifact: &Path) -> bool {
    artifact.join(FOLDER).join(TABLE).is_file()
}

/// What is wrong with the bundle; empty when nothing is, or when there is none.
pub(crate) fn check(artifact: &Path, opened: &Opened) -> Result<Vec<String>, Error> {
    if !exists(artifact) {
        return Ok(Vec::new());
    }
    let table = table(artifact)?;
    let mut wrong = Vec::new();
    let files = table["files"].as_object().ok_or("kernels.json has no `files`")?;
    for (name, want) in files {
        // A name from a file is compared with the folder's listing, never joined unseen.
        let path = artifact.join(FOLDER).join(name);
        let plain = Path::new(name).file_name().is_some_and(|last| last == name.as_str());
        if !plain || !path.is_file() {
            wrong.push(format!("{FOLDER}/{name}: missing"));
        } else if want["blake3"] != json!(attar_formats::hash_file(&path)?) {
            wrong.push(format!("{FOLDER}/{name}: hash differs from kernels.json"));
        }
    }
    let tensors = table["tensors"].as_object().ok_or("kernels.json has no `tensors`")?;
    let mut seen = BTreeSet::new();
    for site in opened.linears() {
        let Some(packed) = opened.packed(site)? else { continue };
        seen.insert(site.name.as_str());
        let Some(entry) = tensors.get(&site.name) else {
            wrong.push(format!("{FOLDER}/{TABLE}: {} is missing", site.name));
            continue;
        };
        let here = description(opened, artifact, &site.name, &packed)?;
        let differs = here
            .as_object()
            .is_none_or(|here| here.iter().any(|(key, value)| entry.get(key) != Some(value)));
        if differs {
            wrong.push(format!("{FOLDER}/{TABLE}: {} lies elsewhere or is another", site.name));
        }
    }
    for name in tensors.keys().filter(|name| !seen.contains(name.as_str())) {
        wrong.push(format!("{FOLDER}/{TABLE}: {name} is not packed in this artifact"));
    }
    if !wrong.is_empty() {
        wrong.push("make the bundle again with `attar emit`".into());
    }
    Ok(wrong)
}

/// For each backend, the least over the linears of the best status of its kernels, as numbers that gates
/// compare (`attar_eval::KERNEL_STATUS`).
pub(crate) fn statuses(artifact: &Path) -> Result<Vec<(&'static str, f64)>, Error> {
    let table = table(artifact)?;
    let tensors = table["tensors"].as_object().ok_or("kernels.json has no `tensors`")?;
    let mut found = Vec::new();
    for (backend, name) in [("cpu", "kernel_status_cpu"), ("cuda", "kernel_status_cuda")] {
        let best = |entry: &Value| {
            let kernels = entry["kernels"].as_array().map_or(&[][..], Vec::as_slice);
            kernels
                .iter()
                .filter(|kernel| kernel["backend"] == backend)
                .filter_map(|kernel| Status::parse(kernel["status"].as_str()?))
                .max()
        };
        // A linear without a kernel of this backend: there is no status to compare.
        let least: Option<Vec<Status>> = tensors.values().map(best).collect();
        if let Some(least) = least.and_then(|all| all.into_iter().min()) {
            found.push((name, f64::from(least as u8)));
        }
    }
    Ok(found)
}
