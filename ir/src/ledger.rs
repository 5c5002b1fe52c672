//! Where every tensor of the checkpoint went: one line each, computed from the plan, kept in the report,
//! and held against the headers of what was written.
//!
//! Also the guard against linears that are left dense by accident ([`left_dense`]). The rule, kind by kind
//! (a kind is a linear's name inside its block, e.g. `mlp.down_proj`): a kind that no quantizing step
//! selects anywhere was left out on purpose; a kind that is quantized in some blocks must be so in all,
//! except where a `keep` pattern names the linear. A pattern such as `layers.?.*`, which misses the blocks
//! from the tenth on, is thus an error, and `mlp.*` is not.

use std::collections::{BTreeMap, BTreeSet};

use attar_tensor::{QuantScheme, TensorHeader};
use serde::{Deserialize, Serialize};

use crate::{
    Needs, Numeric, Plan, Producer, Rank, Sparsity, Touches,
    plan::Origin,
    plan::PlanStep,
    recipe::{Step, matches},
};

/// Share of the linear bytes of the decoder blocks that may stay dense without being asked for.
pub const MAX_LEFT_DENSE: f64 = 0.01;

/// What became of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// Codes, scales and zero points.
    Quantized,
    /// Zeros among its values.
    Pruned,
    /// A product of thin matrices.
    Factored,
    /// Other values in its own dtype and shape: scales were folded into it.
    Changed,
    /// Byte for byte (of what passes on the whole model left, where there are any).
    Copied,
    /// Byte for byte, and a runtime reads another tensor in its place.
    Tied,
    /// Nothing of it is written.
    Dropped,
}

impl std::fmt::Display for Fate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Quantized => "quantized",
            Self::Pruned => "pruned",
            Self::Factored => "factored",
            Self::Changed => "changed",
            Self::Copied => "copied",
            Self::Tied => "tied",
            Self::Dropped => "dropped",
        })
    }
}

/// One tensor of the checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// Its name in the checkpoint.
    pub tensor: String,
    /// What became of it.
    pub fate: Fate,
    /// Scheme and layout, dtype and shape, the other tensor, or the reason.
    pub detail: String,
    /// What is written of it.
    #[serde(skip)]
    pub becomes: Vec<TensorHeader>,
}

/// One line for every tensor of the checkpoint, sorted by name, as emit `emit` of the plan writes it.
///
/// # Panics
/// When the plan has no such emit.
pub fn ledger(plan: &Plan, source: &[TensorHeader], emit: usize) -> Vec<Line> {
    let emit = &plan.emits[emit];
    let mut copies: BTreeMap<&str, Vec<TensorHeader>> = BTreeMap::new();
    let mut parts: BTreeMap<&str, Vec<TensorHeader>> = BTreeMap::new();
    for tensor in emit.tensors.iter().chain(&emit.adapter) {
        match &tensor.origin {
            Origin::Source(name) => copies.entry(name).or_default().push(tensor.header()),
            Origin::Coded { tensor: name, .. } => {
                copies.entry(name).or_default().push(tensor.header());
            }
            Origin::Part { site, .. } => parts.entry(site).or_default().push(tensor.header()),
        }
    }
    // Linears without a tensor of their own share the embedding's: a tied output head.
    let own =
        |site: &str| source.iter().any(|header| header.name.strip_suffix(".weight") == Some(site));
    let shared: Vec<&str> = parts.keys().copied().filter(|site| !own(site)).collect();
    let folds = folded(plan);
    let mut lines: Vec<_> = source
        .iter()
        .map(|header| {
            let name = header.name.as_str();
            let written = copies.get(name).cloned().unwrap_or_default();
            let site = name.strip_suffix(".weight").and_then(|site| plan.site(site));
            let packed = site.and_then(|site| parts.get(site.name.as_str()));
            let stored = format!("{} {:?}", header.dtype, header.shape);
            let moved = written.iter().find(|to| to.name != name);
            let by = folds.get(name);
            let (fate, detail, becomes) = if let (Some(site), Some(packed)) = (site, packed) {
                let scheme = site.scheme.map_or_else(String::new, QuantScheme::label);
                let steps: Vec<_> =
                    site.steps.iter().map(|&step| plan.steps[step].label.as_str()).collect();
                let mut detail = format!("{scheme}, {} ({})", emit.layout, steps.join(", "));
                let mut becomes = packed.clone();
                if let Some(rank) = site.correction {
                    detail.push_str(&format!(", correction of rank {rank}"));
                }
                if let Some(rank) = site.rank {
                    let detail = if site.scheme.is_some() {
                        format!("rank {rank}, factors {detail}")
                    } else {
                        let steps = steps.join(", ");
                        format!("rank {rank}, factors in {} ({steps})", header.dtype)
                    };
                    let tensor = header.name.clone();
                    return Line { tensor, fate: Fate::Factored, detail, becomes };
                }
                if !written.is_empty() {
                    // The only copy of a tied embedding: its other role stays dense.
                    let names: Vec<_> = written.iter().map(|to| to.name.as_str()).collect();
                    detail.push_str(&format!("; also copied as {}", names.join(", ")));
                    becomes.extend(written);
                }
                (Fate::Quantized, detail, becomes)
            } else if let Some(block) = emit.embedding.filter(|_| name == plan.graph.embedding) {
                (Fate::Quantized, format!("{block}"), written)
            } else if written.is_empty() {
                let why = "no tensor of the artifact comes from it".to_owned();
                (Fate::Dropped, why, Vec::new())
            } else if let Some(form) = site.map(|site| site.after).filter(|f| f.rank != Rank::Full)
            {
                let rank = site.and_then(|site| site.rank).unwrap_or_default();
                (Fate::Factored, format!("{form}, rank {rank}, multiplied"), written)
            } else if let Some(form) =
                site.map(|site| site.after).filter(|f| f.sparsity != Sparsity::Dense)
            {
                (Fate::Pruned, format!("{form}"), written)
            } else if let Some(steps) = by {
                let steps = steps.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
                (Fate::Changed, format!("{stored}, {steps}"), written)
            } else if plan.graph.tied && name == "lm_head.weight" && plan.graph.embedding != name {
                (Fate::Tied, format!("to {}, {stored}", plan.graph.embedding), written)
            } else if let Some(to) = written.iter().find(|to| to.dtype != header.dtype) {
                (Fate::Changed, format!("{stored}, as {}", to.dtype), written)
            } else if let Some(to) = moved {
                (Fate::Copied, format!("{stored}, as {}", to.name), written)
            } else {
                (Fate::Copied, stored, written)
            };
            let (mut detail, mut becomes) = (detail, becomes);
            for site in shared.iter().filter(|_| name == plan.graph.embedding) {
                let scheme = plan.site(site).and_then(|site| site.scheme);
                let label = scheme.map_or_else(String::new, QuantScheme::label);
                detail.push_str(&format!("; also quantized as {site}: {label}, {}", emit.layout));
                becomes.extend(parts[site].iter().cloned());
            }
            Line { tensor: header.name.clone(), fate, detail, becomes }
        })
        .collect();
    lines.sort_by(|a, b| a.tensor.cmp(&b.tensor));
    lines
}

/// Tensors that steps which touch folds, or learn, may write, with what these steps do.
fn folded(plan: &Plan) -> BTreeMap<String, BTreeSet<String>> {
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let learns = |step: &&PlanStep| step.contract.needs.contains(Needs::TEACHER);
    for (step, pass) in plan.steps.iter().zip(&plan.passes).filter(|(step, _)| learns(step)) {
        for (block, targets) in plan.graph.blocks.iter().zip(&step.targets) {
            let mut add = |name: String| {
                found.entry(name).or_default().insert(format!("trained by {}", step.label));
            };
            for target in targets {
                add(format!("{}.weight", block.sites[target.site].name));
            }
            if !targets.is_empty() && pass.training().vectors {
                block.norms.iter().for_each(|norm| add(norm.tensor.clone()));
                let biased = block.sites.iter().filter(|site| site.bias);
                biased.for_each(|site| add(format!("{}.bias", site.name)));
            }
        }
    }
    for step in plan.steps.iter().filter(|step| step.contract.touches == Touches::Folds) {
        for (block, targets) in plan.graph.all_blocks().zip(&step.targets) {
            let inputs: BTreeSet<usize> =
                targets.iter().map(|target| block.input_of(target.site)).collect();
            for fold in block.folds.iter().filter(|fold| inputs.contains(&fold.input)) {
                let mut add = |name: String| {
                    found
                        .entry(name)
                        .or_default()
                        .insert(format!("scales folded in by {}", step.label));
                };
                for &site in &block.inputs[fold.input].sites {
                    add(format!("{}.weight", block.sites[site].name));
                }
                match fold.producer {
                    Producer::Norm(norm) => add(block.norms[norm].tensor.clone()),
                    Producer::Rows(site) => {
                        add(format!("{}.weight", block.sites[site].name));
                        add(format!("{}.bias", block.sites[site].name));
                    }
                }
            }
        }
    }
    found
}

/// How many tensors met each fate: `22 source tensors: 14 quantized, 8 copied`.
pub fn summary(lines: &[Line]) -> String {
    let mut counts: BTreeMap<Fate, usize> = BTreeMap::new();
    for line in lines {
        *counts.entry(line.fate).or_default() += 1;
    }
    let counts: Vec<_> = counts.iter().map(|(fate, count)| format!("{count} {fate}")).collect();
    format!("{} source tensors: {}", lines.len(), counts.join(", "))
}

/// Holds the ledger against what was written: every tensor that a line promises is there with its dtype and
/// shape, nothing else is, and what was dropped is gone. Returns what differs.
pub fn check(lines: &[Line], written: &[TensorHeader]) -> Vec<String> {
    let mut wrong = Vec::new();
    let here: BTreeMap<&str, &TensorHeader> =
        written.iter().map(|header| (header.name.as_str(), header)).collect();
    let mut promised = BTreeSet::new();
    for line in lines {
        let Line { tensor, fate, .. } = line;
        for want in &line.becomes {
            promised.insert(want.name.as_str());
            match here.get(want.name.as_str()) {
                None => wrong.push(format!(
                    "ledger: {tensor} is {fate}, but {} is not in the artifact",
                    want.name
                )),
                Some(have) if *have != want => wrong.push(format!(
                    "ledger: {tensor} is {fate}, but {} is {} {:?} instead of {} {:?}",
                    want.name, have.dtype, have.shape, want.dtype, want.shape
                )),
                Some(_) => {}
            }
        }
    }
    for line in lines.iter().filter(|line| line.fate == Fate::Dropped) {
        if here.contains_key(line.tensor.as_str()) && !promised.contains(line.tensor.as_str()) {
            wrong.push(format!("ledger: {} is dropped, but is in the artifact", line.tensor));
        }
    }
    for name in here.keys().filter(|name| !promised.contains(*name)) {
        wrong.push(format!("ledger: {name} is in the artifact, but in no line of the ledger"));
    }
    wrong
}

/// Linears that stay dense though nobody asked for it.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error(
    "{:.1} % of the linear bytes in decoder blocks would stay dense without being asked for (at most {:.0} %): \
     {}. These kinds of linears are quantized in other blocks, so a `sites` pattern probably misses blocks. \
     Widen it, name the linears in `keep`, or give --allow-dense",
    .share * 100.0, MAX_LEFT_DENSE * 100.0, told(.sites)
)]
pub struct LeftDense {
    /// Their share of the linear bytes of the decoder blocks.
    pub share: f64,
    /// Their names.
    pub sites: Vec<String>,
}

fn told(sites: &[String]) -> String {
    const SHOWN: usize = 8;
    let shown = sites.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
    if sites.len() > SHOWN { format!("{shown} and {} more", sites.len() - SHOWN) } else { shown }
}

/// Linears of decoder blocks that stay dense without being asked for, when they are more than
/// [`MAX_LEFT_DENSE`] of the bytes; the rule stands at the head of this module. `steps[i]` is the recipe's
/// step behind `plan.steps[i]`.
///
/// # Errors
/// [`LeftDense`] with all of them.
pub fn left_dense(plan: &Plan, steps: &[Step]) -> Result<(), LeftDense> {
    let quantizes =
        |at: &usize| plan.steps[*at].contract.produces.numeric == Some(Numeric::Quantized);
    let quantizing: Vec<&Step> =
        (0..plan.steps.len()).filter(quantizes).filter_map(|at| steps.get(at)).collect();
    let kind = |site: &crate::plan::SitePlan| {
        let prefix = plan.graph.blocks[site.block].prefix.as_str();
        site.name.strip_prefix(prefix).unwrap_or(&site.name).to_owned()
    };
    let blocks = plan.graph.blocks.len();
    let sites: Vec<_> = plan.sites.iter().filter(|site| site.block < blocks).collect();
    let somewhere: BTreeSet<String> =
        sites.iter().filter(|site| site.scheme.is_some()).map(|site| kind(site)).collect();
    let total: usize = sites.iter().map(|site| site.dense_bytes).sum();
    let left: Vec<_> = sites
        .iter()
        .filter(|site| site.scheme.is_none() && site.after == site.before)
        .filter(|site| somewhere.contains(&kind(site)))
        .filter(|site| {
            !quantizing.iter().flat_map(|step| &step.keep).any(|keep| matches(keep, &site.name))
        })
        .collect();
    let bytes: usize = left.iter().map(|site| site.dense_bytes).sum();
    let share = bytes as f64 / total.max(1) as f64;
    if share > MAX_LEFT_DENSE {
        let sites = left.iter().map(|site| site.name.clone()).collect();
        return Err(LeftDense { share, sites });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use attar_tensor::DType;

    fn header(name: &str, dtype: DType, shape: &[usize]) -> TensorHeader {
        TensorHeader { name: name.into(), dtype, shape: shape.into() }
    }

    fn line(tensor: &str, fate: Fate, becomes: Vec<TensorHeader>) -> Line {
        Line { tensor: tensor.into(), fate, detail: String::new(), becomes }
    }

    #[test]
    fn what_is_written_must_be_what_the_ledger_promises() {
        let norm = header("norm.weight", DType::BF16, &[8]);
        let packed = header("up.qweight", DType::I32, &[4, 8]);
        let lines = [
            line("norm.weight", Fate::Copied, vec![norm.clone()]),
            line("rotary.inv_freq", Fate::Dropped, Vec::new()),
            line("up.weight", Fate::Quantized, vec![packed.clone()]),
        ];
        assert_eq!(check(&lines, &[norm.clone(), packed.clone()]), Vec::<String>::new());
        let refused = |written: &[TensorHeader], part: &str| {
            let wrong = check(&lines, written);
            assert!(wrong.len() == 1 && wrong[0].contains(part), "{part}: {wrong:?}");
        };
        refused(std::slice::from_ref(&norm), "up.weight is quantized, but up.qweight is not in");
        let narrowed = header("norm.weight", DType::F16, &[8]);
        refused(&[narrowed, packed.clone()], "norm.weight is F16 [8] instead of BF16 [8]");
        let short = header("up.qweight", DType::I32, &[4, 4]);
        refused(&[norm.clone(), short], "[4, 4] instead of I32 [4, 8]");
        let revived = header("rotary.inv_freq", DType::F32, &[4]);
        let wrong = check(&lines, &[norm, packed, revived]);
        assert!(wrong.iter().any(|w| w.contains("is dropped, but is in")), "{wrong:?}");
        assert!(wrong.iter().any(|w| w.contains("in no line")), "{wrong:?}");
        assert_eq!(summary(&lines), "3 source tensors: 1 quantized, 1 copied, 1 dropped");
    }
}
