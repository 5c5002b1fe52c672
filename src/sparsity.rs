//! What the passes of an artifact's recipe promised of zeros, held against the weights as they are read back.

use std::{collections::BTreeMap, path::Path};

use attar_eval::report::Zeros;
use attar_formats::artifact;
use attar_ir::{
    Contract, Site, Sparsity,
    recipe::{AnyPass, Recipe, matches, selects},
};
use attar_tensor::{TensorSource, mask::breaks_pattern};

use crate::{Error, packed::Opened, registry};

/// What a pass promised of a site: its zeros, and the fraction of weights that stay.
#[derive(Debug, Clone, Copy)]
struct Promise {
    sparsity: Sparsity,
    density: f64,
}

/// Promises of the recipe in the manifest, by site; none without a manifest that this version reads.
fn promises(path: &Path, opened: &Opened) -> BTreeMap<String, Promise> {
    let mut found = BTreeMap::new();
    let recipe = attar_formats::read_json(&path.join(artifact::MANIFEST))
        .ok()
        .and_then(|manifest| Recipe::parse(manifest.get("recipe")?.as_str()?).ok());
    let Some(mut recipe) = recipe else { return found };
    let Ok(passes) = recipe.resolve(registry::known().as_known()) else { return found };
    for (step, pass) in recipe.steps.iter().zip(&passes) {
        let AnyPass::Block(pass) = pass else { continue };
        let Contract { produces, .. } = pass.contract();
        let (Some(sparsity), Some(density)) = (produces.sparsity, pass.density()) else {
            continue;
        };
        for site in opened.decoder.graph.all_blocks().flat_map(|block| &block.sites) {
            let selected = step.sites.iter().any(|pattern| selects(pattern, &site.name));
            if selected && !step.keep.iter().any(|pattern| matches(pattern, &site.name)) {
                found.insert(site.name.clone(), Promise { sparsity, density });
            }
        }
    }
    found
}

/// The weight of a site as numbers, row by row.
fn values(opened: &Opened, site: &Site) -> Result<Vec<f32>, Error> {
    if let Some(packed) = opened.packed(site)? {
        let weight = attar_kernels::layout_of(&packed)?.dequantize(&packed)?;
        return Ok(weight.into_raw_vec_and_offset().0);
    }
    let name = opened.decoder.weight_tensor(site);
    let values = opened.numbers().read(&name)?.to_f32()?;
    opened.numbers().release(&name);
    Ok(values)
}

/// Counts the zeros of every site that was pruned; problems are broken promises.
pub(crate) fn check(path: &Path, opened: &Opened) -> Result<(Vec<Zeros>, Vec<String>), Error> {
    let (mut lines, mut problems) = (Vec::new(), Vec::new());
    let promises = promises(path, opened);
    if promises.is_empty() {
        return Ok((lines, problems));
    }
    // Of all sites together: OWL shares zeros out among blocks.
    let mut promised = 0.0;
    let (mut zeros, mut weights) = (0, 0);
    for site in opened.decoder.graph.all_blocks().flat_map(|block| &block.sites) {
        let Some(promise) = promises.get(&site.name) else { continue };
        let values = values(opened, site)?;
        let count = values.iter().filter(|&&w| w == 0.0).count();
        zeros += count;
        weights += values.len();
        promised += (1.0 - promise.density) * values.len() as f64;
        let mut pattern = None;
        if let Sparsity::NM { n, m } = promise.sparsity {
            let mut rows = values.chunks(site.in_features.max(1)).enumerate();
            let broken = rows.find_map(|(row, values)| Some((row, breaks_pattern(values, n, m)?)));
            if let Some((row, group)) = broken {
                problems.push(format!(
                    "{}: promised {n}:{m}, but row {row} has more than {n} weights that are not zero in columns \
                     {} to {}",
                    site.name,
                    group * usize::from(m),
                    (group + 1) * usize::from(m) - 1
                ));
            }
            pattern = Some(format!("{n}:{m}"));
        }
        let zeros = count as f64 / values.len().max(1) as f64;
        lines.push(Zeros { site: site.name.clone(), zeros, pattern });
    }
    // Rows and tiles are rounded to whole weights, half a weight each.
    let part = |count: f64| count / weights.max(1) as f64;
    if part(zeros as f64) + 0.01 < part(promised) {
        problems.push(format!(
            "{:.2} % of the weights of {} sites are zero, promised were {:.2} %",
            100.0 * part(zeros as f64),
            lines.len(),
            100.0 * part(promised)
        ));
    }
    Ok((lines, problems))
}
