//! A recipe whose steps branch, as chains: every step whose result is emitted ends one *variant*, the path
//! from the checkpoint to it. Each variant is proven and run as a chain; what variants have in common is
//! found by content (equal inputs, equal step), not by name, so a shared prefix is computed once.

use super::{PlanError, PlanErrors};
use crate::recipe::{Emit, Recipe, SOURCE, nearest};

/// One path through the steps of a recipe.
#[derive(Debug, Clone, PartialEq)]
pub struct Variant {
    /// `id` of the last step, else its place, `step[i]`.
    pub name: String,
    /// Indices into the recipe's steps, from the first to the emitted one.
    pub steps: Vec<usize>,
    /// Indices into the recipe's emits.
    pub emits: Vec<usize>,
    /// The path as a recipe of its own: a chain, every emit with its directory.
    pub recipe: Recipe,
}

/// The step that each step follows; `None` is the checkpoint.
fn parents(recipe: &Recipe, errors: &mut Vec<PlanError>) -> Vec<Option<usize>> {
    let mut parents = Vec::with_capacity(recipe.steps.len());
    for (index, step) in recipe.steps.iter().enumerate() {
        let earlier = &recipe.steps[..index];
        if let Some(id) = &step.id {
            if let Some(first) = earlier.iter().position(|s| s.id.as_ref() == Some(id)) {
                errors.push(PlanError::DuplicateId { index, id: id.clone(), first });
            }
            if id == SOURCE {
                errors.push(PlanError::ReservedId { index });
            }
        }
        parents.push(match step.after.as_deref() {
            None => index.checked_sub(1),
            Some(SOURCE) => None,
            Some(after) => {
                let found = earlier.iter().position(|s| s.id.as_deref() == Some(after));
                if found.is_none() {
                    let ids = earlier.iter().filter_map(|s| s.id.as_deref()).chain([SOURCE]);
                    errors.push(unknown(
                        format!("step[{index}].after"),
                        "earlier step",
                        after,
                        ids.collect(),
                    ));
                }
                found
            }
        });
    }
    parents
}

fn unknown(path: String, which: &'static str, id: &str, ids: Vec<&str>) -> PlanError {
    let hint = nearest(id, ids).map_or(String::new(), |id| format!("; did you mean `{id}`?"));
    PlanError::UnknownStep { path, which, id: id.to_owned(), hint }
}

/// Splits a recipe into its variants, in the order of their last steps.
///
/// # Errors
/// No step, ids that are taken twice or unknown, steps that no emit needs, artifacts in one place.
pub fn variants(recipe: &Recipe) -> Result<Vec<Variant>, PlanErrors> {
    let mut errors = Vec::new();
    if recipe.steps.is_empty() {
        errors.push(PlanError::NoSteps);
    }
    let parents = parents(recipe, &mut errors);
    let followed: Vec<bool> =
        (0..recipe.steps.len()).map(|index| parents.contains(&Some(index))).collect();
    let leaves: Vec<usize> = (0..followed.len()).filter(|&index| !followed[index]).collect();
    // Steps whose result each emit writes.
    let mut ends: Vec<(usize, usize)> = Vec::new();
    for (index, emit) in recipe.emits.iter().enumerate() {
        match &emit.of {
            None => ends.extend(leaves.iter().map(|&leaf| (leaf, index))),
            Some(id) => match recipe.steps.iter().position(|s| s.id.as_ref() == Some(id)) {
                Some(step) => ends.push((step, index)),
                None => {
                    let ids = recipe.steps.iter().filter_map(|s| s.id.as_deref()).collect();
                    errors.push(unknown(format!("emit[{index}].of"), "step", id, ids));
                }
            },
        }
    }
    let mut emitted: Vec<usize> = ends.iter().map(|(step, _)| *step).collect();
    emitted.sort_unstable();
    emitted.dedup();
    let path_to = |leaf: usize| {
        let mut path = vec![leaf];
        while let Some(parent) = parents[path[path.len() - 1]] {
            path.push(parent);
        }
        path.reverse();
        path
    };
    let paths: Vec<Vec<usize>> = emitted.iter().map(|&step| path_to(step)).collect();
    let idle: Vec<_> = recipe
        .steps
        .iter()
        .enumerate()
        .filter(|(index, _)| !paths.iter().any(|path| path.contains(index)))
        .map(|(index, step)| step.label(index))
        .collect();
    // An emit that names an unknown step is told already.
    if !idle.is_empty() && errors.is_empty() {
        errors.push(PlanError::NeverEmitted { steps: idle.join(", ") });
    }
    let mut variants = Vec::new();
    let mut dirs: Vec<(Option<String>, usize)> = Vec::new();
    for (&last, path) in emitted.iter().zip(&paths) {
        let name = recipe.steps[last].id.clone().unwrap_or_else(|| format!("step[{last}]"));
        let emits: Vec<usize> =
            ends.iter().filter(|(step, _)| *step == last).map(|(_, emit)| *emit).collect();
        let mut chain = Recipe { steps: Vec::new(), emits: Vec::new(), ..recipe.clone() };
        for &step in path {
            let mut step = recipe.steps[step].clone();
            step.after = None;
            chain.steps.push(step);
        }
        for &index in &emits {
            let emit = &recipe.emits[index];
            let plain = name.replace(['[', ']'], "");
            let place = match (emitted.len() > 1, emits.len() > 1) {
                (false, false) => None,
                (false, true) => Some(emit.layout.clone()),
                (true, false) => Some(plain),
                (true, true) => Some(format!("{plain}-{}", emit.layout)),
            };
            let dir = match &emit.dir {
                // One emit of several variants: each below the directory that it names.
                Some(dir) if emit.of.is_none() && leaves.len() > 1 => {
                    Some(format!("{dir}/{}", name.replace(['[', ']'], "")))
                }
                Some(dir) => Some(dir.clone()),
                None => place,
            };
            if let Some((_, first)) = dirs.iter().find(|(other, _)| *other == dir) {
                let dir = dir.clone().unwrap_or_else(|| "the output directory".to_owned());
                errors.push(PlanError::SameDir { first: *first, second: index, dir });
            }
            dirs.push((dir.clone(), index));
            chain.emits.push(Emit { dir, of: None, ..emit.clone() });
        }
        variants.push(Variant { name, steps: path.clone(), emits, recipe: chain });
    }
    if errors.is_empty() { Ok(variants) } else { Err(PlanErrors(errors)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<Vec<Variant>, String> {
        variants(&Recipe::parse(text).unwrap()).map_err(|errors| errors.to_string())
    }

    const BRANCHING: &str = "
[[step]]
id = \"scaled\"
pass = \"awq\"
[[step]]
id = \"w4\"
pass = \"gptq\"
[[step]]
id = \"w3\"
after = \"scaled\"
pass = \"gptq\"
[[step]]
id = \"plain\"
after = \"source\"
pass = \"rtn\"
[[emit]]
layout = \"gptq\"
";

    #[test]
    fn every_end_of_the_graph_is_a_variant_with_its_own_place() {
        let found = of(BRANCHING).unwrap();
        let names: Vec<_> = found.iter().map(|v| (v.name.as_str(), v.steps.clone())).collect();
        assert_eq!(names, [("w4", vec![0, 1]), ("w3", vec![0, 2]), ("plain", vec![3])]);
        assert_eq!(found[1].recipe.emits[0].dir.as_deref(), Some("w3"));
        assert!(found.iter().all(|v| v.recipe.steps.iter().all(|s| s.after.is_none())));
        // A step in the middle can be written too, and a layout can be kept to one variant.
        let text = format!(
            "{BRANCHING}[[emit]]\nlayout = \"awq\"\nof = \"w4\"\n[[emit]]\nlayout = \"x\"\nof = \"scaled\"\n"
        );
        let found = of(&text).unwrap();
        let dirs: Vec<Vec<_>> = found
            .iter()
            .map(|v| v.recipe.emits.iter().map(|e| e.dir.clone().unwrap()).collect())
            .collect();
        assert_eq!(dirs, [vec!["scaled"], vec!["w4-gptq", "w4-awq"], vec!["w3"], vec!["plain"]]);
    }

    #[test]
    fn a_chain_stays_what_it_was() {
        let found = of("[[step]]\npass = \"rtn\"\n[[emit]]\nlayout = \"gptq\"\n").unwrap();
        assert_eq!((found.len(), found[0].recipe.emits[0].dir.clone()), (1, None));
        assert_eq!(found[0].name, "step[0]");
    }

    #[test]
    fn refusals_name_the_place() {
        for (text, expected) in [
            ("", "the recipe has no [[step]]"),
            ("[[step]]\npass = \"a\"\n", "the result of step[0] (a) is never emitted"),
            (
                "[[step]]\npass = \"a\"\nid = \"x\"\n[[step]]\npass = \"b\"\nafter = \"source\"\n\
                 [[emit]]\nlayout = \"l\"\nof = \"x\"\n",
                "the result of step[1] (b) is never emitted",
            ),
            (
                "[[step]]\npass = \"a\"\nid = \"first\"\n[[step]]\npass = \"b\"\nafter = \"frist\"\n\
                 [[emit]]\nlayout = \"l\"\n",
                "step[1].after: no earlier step has the id `frist`; did you mean `first`?",
            ),
            (
                "[[step]]\npass = \"a\"\nid = \"source\"\n[[emit]]\nlayout = \"l\"\n",
                "step[0].id: `source` means the checkpoint",
            ),
            (
                "[[step]]\npass = \"a\"\n[[emit]]\nlayout = \"l\"\ndir = \"d\"\n\
                 [[emit]]\nlayout = \"m\"\ndir = \"d\"\n",
                "emit[0] and emit[1] both write to d",
            ),
        ] {
            let error = of(text).unwrap_err();
            assert!(error.contains(expected), "{error}\n{expected}");
        }
    }
}
