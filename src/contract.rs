//! What a plan promises and what the files keep: the ledger of tensors, and the rules of the runtimes that
//! were named with `--target`. The plan is judged before a weight is read, the files after they are
//! written.

use std::{collections::BTreeSet, path::Path};

use attar_formats::{Checkpoint, quant_config};
use attar_ir::{
    Plan, Role,
    ledger::{self, Fate, Line},
    plan::{PlannedEmit, Variant},
    target::{self, Linear, Profile, Subject, TargetSpec, Violation},
};
use attar_tensor::{Tensor, TensorHeader, TensorSource, TensorView};

use crate::{Error, args::Promise, packed::Opened};

/// Judges the proven variants and returns what the targets warn of.
pub(crate) fn judge(
    variants: &[(Variant, Plan)],
    checkpoint: &Checkpoint,
    promise: &Promise,
) -> Result<Vec<Violation>, Error> {
    if !promise.allow_dense {
        for (variant, plan) in variants {
            ledger::left_dense(plan, &variant.recipe.steps)?;
        }
    }
    let mut files = vec!["config.json".to_owned()];
    for path in checkpoint.auxiliary_files()? {
        files.push(path.file_name().unwrap_or_default().to_string_lossy().into_owned());
    }
    let (mut refused, mut warnings) = (Vec::new(), Vec::new());
    for (_, plan) in variants {
        for emit in 0..plan.emits.len() {
            for target in &targets(promise, &plan.emits[emit])? {
                let profile = Profile::of(target)?;
                let mut subject = Subject::of_plan(plan, emit);
                subject.files = Some(files.clone());
                if let Some(layout) = subject.layout.clone() {
                    declare(&mut subject, &layout, (plan, &plan.emits[emit]))?;
                }
                let found = target::check(&subject, &profile, target);
                let (refuses, warns): (Vec<_>, Vec<_>) =
                    found.into_iter().partition(Violation::refuses);
                refused.extend(refuses);
                warnings.extend(warns);
            }
        }
    }
    if refused.is_empty() { Ok(warnings) } else { Err(listed(&refused).into()) }
}

/// What was asked for on the command line, then what the recipe asks of this emit.
pub(crate) fn targets(promise: &Promise, emit: &PlannedEmit) -> Result<Vec<TargetSpec>, Error> {
    let mut all = promise.target.clone();
    for target in &emit.target {
        let target: TargetSpec = target.parse()?;
        if !all.contains(&target) {
            all.push(target);
        }
    }
    Ok(all)
}

/// Puts the `quantization_config` that will be written into a subject.
fn declare(
    subject: &mut Subject,
    layout: &str,
    (plan, emit): (&Plan, &PlannedEmit),
) -> Result<(), Error> {
    let (mut quantized, mut dense) = (Vec::new(), Vec::new());
    for (name, scheme) in plan.linears(emit) {
        match scheme {
            Some(scheme) => quantized.push((name, scheme)),
            None => dense.push(name),
        }
    }
    if attar_tensor::BlockType::from_name(layout).is_some() {
        // The types stand in the file itself.
        return Ok(());
    }
    let config = quant_config::write(layout, &quantized, &dense)?;
    if let Some(parsed) = quant_config::parse(&serde_json::json!({"quantization_config": config}))?
    {
        for linear in &mut subject.linears {
            linear.declared = Some(parsed.scheme_of(&linear.name).is_some());
        }
    }
    subject.config = Some(config);
    Ok(())
}

/// Violations as an error lists them.
fn listed(violations: &[Violation]) -> String {
    let mut text = match violations.len() {
        1 => "the target refuses this plan:".to_owned(),
        count => format!("the target refuses this plan, {count} rules are broken:"),
    };
    for violation in violations {
        text.push_str(&format!("\n- {violation}"));
    }
    text
}

/// The ledger of one emit. `source` are the tensors that its steps on blocks read, `original` those of the checkpoint:
/// what passes on the whole model have taken away is dropped.
pub(crate) fn lines(
    plan: &Plan,
    original: &Checkpoint,
    source: &[TensorHeader],
    emit: usize,
) -> Vec<Line> {
    let mut lines = ledger::ledger(plan, source, emit);
    let Some(last) = plan.model.last() else { return lines };
    for line in &mut lines {
        if matches!(line.fate, Fate::Copied | Fate::Tied) {
            line.detail.push_str(&format!(", as {} left it", last.of_chain));
        }
    }
    let known: BTreeSet<String> = lines.iter().map(|line| line.tensor.clone()).collect();
    let gone = original.headers().iter().filter(|header| !known.contains(&header.name));
    lines.extend(gone.map(|header| Line {
        tensor: header.name.clone(),
        fate: Fate::Dropped,
        detail: "taken away by a pass on the whole model".to_owned(),
        becomes: Vec::new(),
    }));
    lines.sort_by(|a, b| a.tensor.cmp(&b.tensor));
    lines
}

/// What became of a plan's promises in the files.
pub(crate) struct Kept {
    /// Promises that were broken.
    pub(crate) broken: Vec<String>,
    /// What the targets warn of.
    pub(crate) warnings: Vec<String>,
}

/// Reads a written artifact back and holds it against its ledger and the targets.
pub(crate) fn kept(
    lines: &[Line],
    checkpoint: &Checkpoint,
    artifact: &Opened,
    targets: &[TargetSpec],
) -> Result<Kept, Error> {
    let mut broken = ledger::check(lines, &artifact.headers());
    for line in lines.iter().filter(|line| matches!(line.fate, Fate::Copied | Fate::Tied)) {
        let Some(copy) = line.becomes.first() else { continue };
        if artifact.checkpoint.header(&copy.name) != Some(copy) {
            continue;
        }
        let (here, there) = (checkpoint.read(&line.tensor)?, artifact.checkpoint.read(&copy.name)?);
        // What a pass on the whole model has computed is held in f32 until it is written.
        let same = if here.dtype() == there.dtype() {
            here.bytes() == there.bytes()
        } else {
            narrowed(&here, &there)?
        };
        checkpoint.release(&line.tensor);
        artifact.checkpoint.release(&copy.name);
        if !same {
            broken.push(format!(
                "ledger: {} is {}, but the bytes of {} differ",
                line.tensor, line.fate, copy.name
            ));
        }
    }
    let mut warnings = Vec::new();
    for violation in judge_files(artifact, targets)? {
        let list = if violation.refuses() { &mut broken } else { &mut warnings };
        list.push(violation.to_string());
    }
    Ok(Kept { broken, warnings })
}

/// True when a tensor in f32, rounded to the other's type, is the other; piece by piece.
fn narrowed(wide: &TensorView<'_>, narrow: &TensorView<'_>) -> Result<bool, Error> {
    const PIECE: usize = 1 << 20;
    let elements: usize = wide.shape().iter().product();
    let (size, bytes) = (narrow.dtype().size(), narrow.bytes());
    if bytes.len() != elements * size {
        return Ok(false);
    }
    let mut values = vec![0.0f32; PIECE.min(elements)];
    for first in (0..elements).step_by(PIECE) {
        let values = &mut values[..PIECE.min(elements - first)];
        wide.copy_to_f32(first, values)?;
        let piece = Tensor::from_f32(narrow.dtype(), vec![values.len()], values)?;
        if piece.bytes() != &bytes[first * size..first * size + piece.bytes().len()] {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Everything in which an artifact, ours or foreign, breaks the rules of the targets.
pub(crate) fn judge_files(
    artifact: &Opened,
    targets: &[TargetSpec],
) -> Result<Vec<Violation>, Error> {
    let mut found = Vec::new();
    if targets.is_empty() {
        return Ok(found);
    }
    let subject = subject_of(artifact)?;
    for target in targets {
        found.extend(target::check(&subject, &Profile::of(target)?, target));
    }
    Ok(found)
}

/// An artifact as the rules see it, from its headers, its config and the files beside it.
fn subject_of(artifact: &Opened) -> Result<Subject, Error> {
    let folder = artifact.checkpoint.folder();
    let mut linears = Vec::new();
    for block in artifact.decoder.graph.all_blocks() {
        for site in block.sites.iter().flat_map(|site| artifact.leaves(site)) {
            let part =
                |suffix: &str| artifact.checkpoint.header(&format!("{}.{suffix}", site.name));
            let scheme = artifact.scheme_of(site);
            let scales = part("weight_scale").or_else(|| part("scales")).map(|header| header.dtype);
            // The output head may be a tied one, which has no tensors and no rule of its own.
            let declared = (site.role != Role::Head).then(|| artifact.declared(site)).flatten();
            linears.push(Linear {
                name: site.name.clone(),
                block: block.index,
                role: site.role,
                out_features: site.out_features,
                in_features: site.in_features,
                scheme,
                scales,
                column_order: match scheme {
                    Some(scheme) => Some(ordered(artifact, &site.name, scheme, site.in_features)?),
                    None => None,
                },
                declared,
            });
        }
    }
    let embedding = &artifact.decoder.graph.embedding;
    let stem = embedding.strip_suffix(".weight").unwrap_or(embedding);
    let packed = |suffix: &str| artifact.checkpoint.header(&format!("{stem}.{suffix}")).is_some();
    let config = artifact.checkpoint.config();
    Ok(Subject {
        // No path: this stands in reports.
        name: format!("artifact in {}", artifact.layout().unwrap_or("float")),
        layout: artifact.layout().map(str::to_owned),
        container: if artifact.checkpoint.gguf().is_some() { "gguf" } else { "safetensors" }
            .to_owned(),
        family: artifact.decoder.spec.family.clone(),
        attention: artifact.decoder.graph.blocks.first().and_then(|block| block.attention),
        linears,
        factored: artifact.factored().map(str::to_owned).collect(),
        corrected: artifact.corrected(),
        embedding_quantized: stem != "lm_head"
            && (["weight_packed", "qweight", "blocks"].iter().any(|part| packed(part))),
        files: Some(names(folder)?),
        config: config.get("quantization_config").filter(|value| !value.is_null()).cloned(),
    })
}

/// True when a linear's columns are not in the order of their groups.
fn ordered(
    artifact: &Opened,
    site: &str,
    scheme: attar_tensor::QuantScheme,
    in_features: usize,
) -> Result<bool, Error> {
    for suffix in ["g_idx", "weight_g_idx"] {
        let name = format!("{site}.{suffix}");
        if artifact.checkpoint.header(&name).is_none() {
            continue;
        }
        let tensor = artifact.checkpoint.read(&name)?.to_tensor();
        let size = scheme.group_size(in_features).max(1);
        return Ok(tensor
            .bytes()
            .chunks_exact(4)
            .enumerate()
            .any(|(at, group)| little(group) as usize != at / size));
    }
    Ok(false)
}

fn little(bytes: &[u8]) -> u32 {
    bytes.iter().rev().fold(0, |value, &byte| (value << 8) | u32::from(byte))
}

fn names(folder: &Path) -> Result<Vec<String>, Error> {
    let fail = |error: std::io::Error| format!("{}: {error}", folder.display());
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(fail)? {
        names.push(entry.map_err(fail)?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}
