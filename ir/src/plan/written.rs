//! What a proven plan writes: the table of sites, the tensors of each artifact, and what is worth a note.

use std::collections::{BTreeMap, BTreeSet};

use attar_tensor::{BlockType, DType, QuantScheme, ScaleGrid};

use super::{
    GGUF, Origin, OutputTensor, PlannedEmit, SitePlan,
    check::{Parts, Place, ResolvedEmit, SiteState, block_at},
    rank::Piece,
};
use crate::recipe::Recipe;
use crate::{Contract, Form, ModelGraph, Role, Site};

/// The emitted name of the embedding.
const EMBEDDING: &str = "model.embed_tokens.weight";

pub(super) fn site_table(
    graph: &ModelGraph,
    sites: &BTreeMap<Place, SiteState>,
    parts: &Parts,
) -> Vec<SitePlan> {
    sites
        .iter()
        .map(|(place, state)| {
            let site = &block_at(graph, place.0).sites[place.1];
            let dense_bytes = site.weights() * site.dtype.size();
            let bytes = |pieces: &Option<Vec<Piece>>| match pieces {
                Some(pieces) if pieces.iter().all(|piece| piece.leaf.corrects()) => {
                    dense_bytes + pieces.iter().map(|piece| piece.part.bytes()).sum::<usize>()
                }
                Some(pieces) => pieces.iter().map(|piece| piece.part.bytes()).sum(),
                None => dense_bytes,
            };
            let emits = parts.get(place).map_or(&[][..], Vec::as_slice);
            let stored = emits.iter().any(Option::is_some);
            SitePlan {
                name: site.name.clone(),
                block: place.0,
                role: site.role,
                out_features: site.out_features,
                in_features: site.in_features,
                before: Form::DENSE_FLOAT,
                after: state.form,
                steps: state.steps.clone(),
                scheme: state.scheme,
                density: state.density,
                rank: state.rank,
                correction: state.correction,
                dense_bytes,
                emitted_bytes: emits.iter().filter(|_| stored).map(bytes).collect(),
            }
        })
        .collect()
}

pub(super) fn planned_emit(
    graph: &ModelGraph,
    source: &[attar_tensor::TensorHeader],
    table: &[SitePlan],
    parts: &Parts,
    index: usize,
    emit: &ResolvedEmit<'_>,
    embedding: Option<BlockType>,
) -> PlannedEmit {
    let head = table.last().and_then(|head| head.scheme);
    let head_quantized = head.is_some();
    let gguf = emit.container == GGUF;
    // In a file of blocks a tied head and the embedding are one tensor.
    let shared = gguf && graph.tied && head_quantized;
    let coded = embedding.filter(|_| gguf && !graph.tied);
    let pieces_of = |place: &Place| parts.get(place)?.get(index)?.as_ref();
    let replaced: BTreeSet<String> = places(graph)
        .filter(|(place, _)| {
            pieces_of(place).is_some_and(|pieces| pieces.iter().any(|piece| !piece.leaf.corrects()))
        })
        .map(|(_, site)| format!("{}.weight", site.name))
        .collect();
    let mut adapter: BTreeMap<String, OutputTensor> = BTreeMap::new();
    let mut tensors: BTreeMap<String, OutputTensor> = BTreeMap::new();
    for header in source {
        let embedding = header.name == graph.embedding;
        if embedding && shared {
            continue;
        }
        if let Some(block) = coded.filter(|_| embedding)
            && let Some(row) = block.row_bytes(graph.hidden)
        {
            let name = EMBEDDING.replace(".weight", ".blocks");
            let (dtype, shape) = (DType::U8, vec![graph.vocab, row]);
            let origin = Origin::Coded { tensor: header.name.clone(), block };
            tensors.insert(name.clone(), OutputTensor { name, dtype, shape, origin });
            continue;
        }
        if !embedding && replaced.contains(&header.name) {
            continue;
        }
        let name = if embedding { EMBEDDING.to_owned() } else { header.name.clone() };
        if gguf && left_out(graph, &header.name, head_quantized) {
            continue;
        }
        // Vectors are F32 in GGUF: its runtimes have no other code for them.
        let dtype = if gguf && header.shape.len() < 2 { DType::F32 } else { header.dtype };
        tensors.insert(
            name.clone(),
            OutputTensor {
                name,
                dtype,
                shape: header.shape.clone(),
                origin: Origin::Source(header.name.clone()),
            },
        );
    }
    let (mut linear_bytes, mut weights) = (0, 0);
    for (site, (place, _)) in table.iter().zip(places(graph)) {
        let in_blocks = place.0 < graph.blocks.len();
        if in_blocks || head_quantized {
            weights += site.out_features * site.in_features;
            linear_bytes += site.emitted_bytes.get(index).copied().unwrap_or(site.dense_bytes);
        }
        for Piece { leaf, part } in pieces_of(&place).into_iter().flatten() {
            let stem = if shared && site.role == Role::Head {
                EMBEDDING.trim_end_matches(".weight")
            } else {
                &site.name
            };
            let name = leaf.name(stem, part.suffix);
            let file = if leaf.corrects() { &mut adapter } else { &mut tensors };
            file.insert(
                name.clone(),
                OutputTensor {
                    name,
                    dtype: part.dtype,
                    shape: part.shape.clone(),
                    origin: Origin::Part { site: site.name.clone(), suffix: part.suffix },
                },
            );
        }
    }
    let tensors: Vec<_> = tensors.into_values().collect();
    let adapter: Vec<_> = adapter.into_values().collect();
    PlannedEmit {
        layout: emit.spec.id(),
        container: emit.container.clone(),
        dir: emit.dir.clone(),
        target: emit.target.clone(),
        embedding: if shared { head.and_then(QuantScheme::block) } else { coded },
        tensor_bytes: tensors.iter().chain(&adapter).map(OutputTensor::bytes).sum(),
        tensors,
        adapter,
        merge: emit.merge,
        linear_bytes,
        bits_per_weight: 8.0 * linear_bytes as f64 / weights.max(1) as f64,
    }
}

/// Tensors of mixtures whose rows the blocks of the type asked for do not divide.
pub(super) fn fallbacks(
    graph: &ModelGraph,
    table: &[SitePlan],
    recipe: &Recipe,
    contracts: &[Contract],
) -> Vec<String> {
    let mut found: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for site in table {
        let Some(stored) = site.scheme.and_then(QuantScheme::block) else { continue };
        let typed = site.steps.iter().rev().find(|&&step| recipe.steps[step].types.is_some());
        let Some(&step) = typed else { continue };
        let Some(types) = recipe.steps[step].types else { continue };
        let calibrated = !contracts[step].needs.is_empty();
        let asked = types.of(graph, site.block, site.role, calibrated);
        // The layout's own note tells of its own type.
        if asked != stored && asked != types.base() {
            let text = format!(
                "rows of {} are no multiple of the {} weights of a {asked} block: stored as {stored} \
                 ({} instead of {} bits per weight)",
                site.in_features,
                asked.size(),
                bits(stored),
                bits(asked),
            );
            found.entry(text).or_default().push(&site.name);
        }
    }
    let line = |(text, sites): (String, Vec<&str>)| {
        format!("{text}: {} sites, {}", sites.len(), sites.join(", "))
    };
    found.into_iter().map(line).collect()
}

/// The type that stands in for `asked` where its blocks do not divide a row.
pub(super) fn stored_as(asked: BlockType, site: &Site) -> BlockType {
    let divides = site.in_features.is_multiple_of(asked.size());
    if divides { asked } else { asked.fallback().unwrap_or(asked) }
}

/// Tensors that a GGUF file leaves out: a tied head beside the embedding, and frequencies that runtimes
/// compute.
fn left_out(graph: &ModelGraph, name: &str, head_quantized: bool) -> bool {
    let tied = graph.tied && name == "lm_head.weight" && graph.embedding != name && !head_quantized;
    tied || name.ends_with(".rotary_emb.inv_freq")
}

/// Every site in the order of [`Plan::sites`].
fn places(graph: &ModelGraph) -> impl Iterator<Item = (Place, &Site)> {
    graph.all_blocks().flat_map(|block| {
        block.sites.iter().enumerate().map(|(at, site)| ((block.index, at), site))
    })
}

/// Bits per weight of a block type.
fn bits(block: BlockType) -> f64 {
    8.0 * block.bytes() as f64 / block.size() as f64
}

/// Names what the layouts of one run take from each other.
pub(super) fn notes(
    table: &[SitePlan],
    graph: &ModelGraph,
    emits: &[ResolvedEmit<'_>],
) -> Vec<String> {
    let grid_name = |grid| match grid {
        ScaleGrid::F32 => "f32",
        ScaleGrid::Bf16 => "bf16",
        ScaleGrid::F16 => "f16",
        ScaleGrid::F16AndBf16 => "values that are both f16 and bf16",
        ScaleGrid::Blocks(block) => block.name(),
    };
    // What each emit asks for and what all get, with the number of sites concerned.
    let mut scales: BTreeMap<String, usize> = BTreeMap::new();
    let mut zeros = 0;
    for (site, (_, source)) in table.iter().zip(places(graph)) {
        let Some(scheme) = site.scheme else { continue };
        let asked: Vec<_> = emits.iter().map(|e| (e, e.spec.scale_grid(source.dtype))).collect();
        if scheme.block().is_none() && asked.iter().any(|(_, grid)| *grid != scheme.scale_grid) {
            let asked: Vec<_> = asked
                .iter()
                .map(|(e, g)| format!("{} stores {}", e.spec.id(), grid_name(*g)))
                .collect();
            let text = format!(
                "scales are narrowed to {}, since {}",
                grid_name(scheme.scale_grid),
                asked.join(" and ")
            );
            *scales.entry(text).or_default() += 1;
        }
        if !scheme.symmetric && emits.iter().any(|e| e.spec.zero_min() < scheme.zero_min) {
            zeros += 1;
        }
    }
    // Rows that the blocks of the type asked for do not divide.
    let mut stand_ins: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for emit in emits {
        let Some(asked) = emit.spec.block_type() else { continue };
        for (site, _) in table.iter().zip(places(graph)) {
            let stored = site.scheme.and_then(QuantScheme::block);
            if let Some(stored) = stored.filter(|&stored| asked.fallback() == Some(stored))
                && !site.in_features.is_multiple_of(asked.size())
            {
                let text = format!(
                    "rows of {} are no multiple of the {} weights of a {asked} block: stored as {stored} \
                     ({} instead of {} bits per weight)",
                    site.in_features,
                    asked.size(),
                    bits(stored),
                    bits(asked),
                );
                stand_ins.entry(text).or_default().push(site.name.clone());
            }
        }
    }
    let mut notes: Vec<_> =
        scales.into_iter().map(|(text, count)| format!("{text} ({count} sites)")).collect();
    notes.extend(
        stand_ins
            .into_iter()
            .map(|(text, sites)| format!("{text}: {} sites, {}", sites.len(), sites.join(", "))),
    );
    if zeros > 0
        && let Some(strictest) = emits.iter().max_by_key(|emit| emit.spec.zero_min())
    {
        notes.push(format!(
            "zero points are at least {}, since layout {} stores no smaller one ({zeros} sites)",
            strictest.spec.zero_min(),
            strictest.spec.id(),
        ));
    }
    if graph.tied
        && table.last().is_some_and(|head| head.scheme.is_some())
        && emits.iter().any(|emit| emit.container != GGUF)
    {
        notes.push(
            "the output head is quantized and no longer equals the embedding: both are written and \
             config.json says that they are not tied"
                .to_owned(),
        );
    }
    notes
}
