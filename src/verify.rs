//! Re-opens an artifact as a stranger would: hashes, values, completeness, kernels against the reference.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use attar_formats::{Checkpoint, artifact};
use attar_tensor::{TensorSource, TensorView, linalg::first_non_finite};
use serde::Serialize;

use crate::{Error, packed::Opened};

/// Elements scanned for NaN and infinity at once.
const PIECE: usize = 1 << 20;

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde asks for a reference")]
fn none(count: &usize) -> bool {
    *count == 0
}

/// What was checked and what was wrong.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Verification {
    pub(crate) quantized: usize,
    pub(crate) dense: usize,
    /// Linears that the adapter corrects.
    #[serde(skip_serializing_if = "none")]
    pub(crate) corrected: usize,
    /// Zeros of sites that were pruned.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) sparsity: Vec<attar_eval::report::Zeros>,
    pub(crate) kernels: Vec<KernelLine>,
    pub(crate) problems: Vec<String>,
}

/// Worst result of one kernel over the linears it was run on.
#[derive(Debug, Serialize)]
pub(crate) struct KernelLine {
    pub(crate) kernel: &'static str,
    pub(crate) layout: &'static str,
    pub(crate) linears: usize,
    pub(crate) worst_nmse: f64,
    pub(crate) max_nmse: f64,
    /// Worst element in units of its bound.
    pub(crate) worst: f64,
    pub(crate) activations: attar_kernels::Activations,
}

/// Place and value of the first NaN or infinity of a float tensor, read piece by piece: an embedding in f32 can
/// be larger than all else that a run holds.
pub(crate) fn non_finite(view: &TensorView<'_>) -> Result<Option<(usize, f32)>, Error> {
    let elements = view.shape().iter().product::<usize>();
    let mut values = vec![0.0f32; PIECE.min(elements)];
    for start in (0..elements).step_by(PIECE) {
        let piece = &mut values[..PIECE.min(elements - start)];
        view.copy_to_f32(start, piece)?;
        if let Some(at) = first_non_finite(piece) {
            return Ok(Some((start + at, piece[at])));
        }
    }
    Ok(None)
}

/// Verifies an artifact; `every` runs the kernels on every linear, otherwise on the smallest of each
/// scheme.
pub(crate) fn verify(
    path: &Path,
    source: Option<&Checkpoint>,
    every: bool,
) -> Result<Verification, Error> {
    let mut result = Verification::default();
    if path.join(artifact::MANIFEST).exists() {
        result.problems.extend(artifact::check_manifest(path)?);
    }
    let opened = Opened::open(path)?;
    result.problems.extend(crate::bundle::check(path, &opened)?);
    let (sparsity, broken) = crate::sparsity::check(path, &opened)?;
    result.sparsity = sparsity;
    result.problems.extend(broken);
    let mut smallest: BTreeMap<String, (usize, String)> = BTreeMap::new();
    for site in opened.linears() {
        if let Some(scheme) = opened.scheme_of(site) {
            let found = (site.weights(), site.name.clone());
            let least = smallest.entry(scheme.label()).or_insert_with(|| found.clone());
            if found.0 < least.0 {
                *least = found;
            }
        }
    }
    for site in opened.linears() {
        let Some(packed) = opened.packed(site)? else {
            result.dense += 1;
            continue;
        };
        result.quantized += 1;
        for defect in attar_kernels::check_packed(&packed) {
            result.problems.push(format!("{}: {defect:?}", site.name));
        }
        if !every && smallest.values().all(|(_, name)| *name != site.name) {
            continue;
        }
        let layout = attar_kernels::layout_of(&packed)?;
        let seed = 1 + result.quantized as u64;
        for report in attar_kernels::verify(layout, &packed, seed)? {
            if !report.ok {
                result.problems.push(format!(
                    "{}: kernel {} is off by nmse {:e}, allowed {:e}; worst element {:.3} of its \
                     bound",
                    site.name, report.kernel, report.nmse, report.tolerance.max_nmse, report.worst
                ));
            }
            let id = layout.id().0;
            let same = |line: &&mut KernelLine| line.kernel == report.kernel && line.layout == id;
            match result.kernels.iter_mut().find(same) {
                Some(line) => {
                    line.linears += 1;
                    line.worst_nmse = line.worst_nmse.max(report.nmse);
                    line.worst = line.worst.max(report.worst);
                }
                None => result.kernels.push(KernelLine {
                    kernel: report.kernel,
                    layout: id,
                    linears: 1,
                    worst_nmse: report.nmse,
                    max_nmse: report.tolerance.max_nmse,
                    worst: report.worst,
                    activations: report.activations,
                }),
            }
        }
    }
    for header in opened.checkpoint.headers().iter().filter(|h| h.dtype.is_float()) {
        let view = opened.checkpoint.read(&header.name)?;
        if let Some((at, value)) = non_finite(&view)? {
            result.problems.push(format!("{}: {value} at flat index {at}", header.name));
        }
        opened.checkpoint.release(&header.name);
    }
    for site in opened.decoder.graph.all_blocks().flat_map(|block| &block.sites) {
        let Some(correction) = opened.correction(site)? else { continue };
        for (factor, view) in [("lora_A", &correction.down), ("lora_B", &correction.up)] {
            if let Some((at, value)) = non_finite(view)? {
                let place = format!("{} of {}", factor, site.name);
                result.problems.push(format!("adapter, {place}: {value} at flat index {at}"));
            }
        }
        result.corrected += 1;
    }
    if let Some(source) = source {
        let factored: BTreeSet<&str> = opened.factored().collect();
        let gone = removed_blocks(opened.checkpoint.folder(), opened.decoder.spec.layers);
        for header in source.headers() {
            let here = |name: &str| opened.checkpoint.header(name).is_some();
            let site = header.name.strip_suffix(".weight").unwrap_or(&header.name);
            let packed = ["weight_packed", "qweight", "blocks"]
                .iter()
                .any(|part| here(&format!("{site}.{part}")))
                || factored.contains(site);
            let computed = opened.checkpoint.gguf().is_some() && header.name.ends_with(".inv_freq");
            let renamed = header.name == opened.decoder.graph.embedding
                || (opened.decoder.graph.tied && header.name == "lm_head.weight");
            let removed = gone.iter().any(|prefix| header.name.starts_with(prefix));
            if !here(&header.name) && !packed && !renamed && !computed && !removed {
                result
                    .problems
                    .push(format!("{}: in the source, but not in the artifact", header.name));
            }
        }
    }
    Ok(result)
}

/// Prefixes of the blocks of the source that have no place among the `left` ones of the artifact: those that a pass
/// on the whole model has removed, as the report says.
fn removed_blocks(path: &Path, left: usize) -> Vec<String> {
    let report = attar_formats::read_json(&path.join(artifact::REPORT)).ok();
    let entries = report.as_ref().and_then(|report| report.get("model")?.as_array());
    let removed = entries.into_iter().flatten().filter(|entry| entry["what"] == "blocks");
    let removed: u64 = removed
        .filter_map(|entry| {
            Some(entry["before"].as_u64()?.saturating_sub(entry["after"].as_u64()?).min(1 << 16))
        })
        .sum();
    (left..left + removed as usize).map(|index| format!("model.layers.{index}.")).collect()
}
