//! Recipes by name.

use attar_tensor::{ActivationScheme, Granularity};

use super::{Mixture, Recipe, RecipeError, SchemeSpec, Step, nearest, read};

/// Names and meanings of the built-in recipes.
pub const PRESETS: &[(&str, &str)] = &[
    ("rtn-w4", "round to nearest, 4 bits, symmetric; no calibration"),
    ("rtn-w3", "round to nearest, 3 bits, symmetric; no calibration"),
    ("rtn-w8", "round to nearest, 8 bits, symmetric; no calibration"),
    ("gptq-w4", "GPTQ, 4 bits, symmetric"),
    ("gptq-w3", "GPTQ, 3 bits, symmetric"),
    ("gptq-w2", "GPTQ, 2 bits, symmetric"),
    ("gptq-w8", "GPTQ, 8 bits, symmetric"),
    ("awq-w4", "AWQ scales and clipping, then round to nearest, 4 bits, asymmetric"),
    (
        "rtn-q4_k_m",
        "block types for llama.cpp: the mixture Q4_K_M by search; no calibration; also q2_k, q3_k_m, ...",
    ),
    ("imatrix-q4_k_m", "the same, each weight's error weighed by its importance"),
    ("gptq-q4_k_m", "the same, GPTQ on the types' own grids of scales"),
    ("rtn", "the layout's own search; no calibration, for block types (q4_k, q8_0, ...)"),
    ("awq-w3", "AWQ scales and clipping, then round to nearest, 3 bits, asymmetric"),
    ("w8a8", "SmoothQuant, then 8 bits per row and int8 activations per token, symmetric"),
];

/// The preset whose activations are quantized, too; it has one scale per row. Weights are rounded to nearest: with
/// 8 bits gptq's perplexity is the same within 0.01 %, at many times the cost (`bench/results/2026-11-26-w8a8`).
const W8A8: &str = "w8a8";

/// Builds a preset.
pub(super) fn recipe(name: &str, group_size: i64) -> Result<Recipe, RecipeError> {
    let granularity = read::granularity(group_size, "group")?;
    if name == "rtn" {
        return Ok(Recipe { steps: vec![Step::new("rtn")], ..Recipe::default() });
    }
    if name == W8A8 {
        let scheme = SchemeSpec {
            bits: 8,
            granularity: Granularity::Channel,
            symmetric: Some(true),
            activations: ActivationScheme::Int8PerToken,
        };
        let quantize = Step { scheme: Some(scheme), ..Step::new("rtn") };
        return Ok(Recipe { steps: vec![Step::new("smoothquant"), quantize], ..Recipe::default() });
    }
    if let Some((method, Some(types))) =
        name.split_once('-').map(|(method, types)| (method, Mixture::from_name(types)))
        && let Some(recipe) = of_mixture(method, types)
    {
        return Ok(recipe);
    }
    let known = || PRESETS.iter().map(|(name, _)| *name);
    let parsed = known().find(|known| *known == name).and_then(|name| name.rsplit_once("-w"));
    let Some((method, bits)) = parsed else {
        let hint = nearest(name, known()).map_or_else(
            || format!("known presets: {}", known().collect::<Vec<_>>().join(", ")),
            |name| format!("did you mean `{name}`?"),
        );
        return Err(RecipeError::invalid("preset", format!("unknown preset `{name}`; {hint}")));
    };
    let bits = bits.parse().expect("every preset ends with its number of bits");
    let scheme = |symmetric| SchemeSpec {
        bits,
        granularity,
        symmetric: Some(symmetric),
        activations: ActivationScheme::Float,
    };
    let quantize =
        |pass: &str, symmetric| Step { scheme: Some(scheme(symmetric)), ..Step::new(pass) };
    let steps = match method {
        "awq" => vec![Step::new("awq"), quantize("rtn", false)],
        method => vec![quantize(method, true)],
    };
    Ok(Recipe { steps, ..Recipe::default() })
}

/// A preset of block types: every linear and the output head; the embedding follows.
fn of_mixture(method: &str, types: Mixture) -> Option<Recipe> {
    let step = |pass: &str| Step {
        sites: vec!["*".to_owned(), "lm_head".to_owned()],
        keep: Vec::new(),
        types: Some(types),
        ..Step::new(pass)
    };
    let weighed = || {
        let mut step = step("rtn");
        step.options.insert("importance".to_owned(), true.into());
        step
    };
    let steps = match method {
        "rtn" | "gptq" => vec![step(method)],
        "imatrix" => vec![weighed()],
        "awq" => vec![Step::new("awq"), weighed()],
        _ => return None,
    };
    Some(Recipe { steps, ..Recipe::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_survives_its_own_toml() {
        for (name, _) in PRESETS {
            let recipe = Recipe::preset(name, 128).unwrap();
            assert_eq!(Recipe::parse(&recipe.to_toml()).unwrap(), recipe, "{name}");
        }
        assert_eq!(Recipe::preset("awq-w4", -1).unwrap().steps.len(), 2);
    }

    #[test]
    fn an_unknown_preset_suggests_the_nearest() {
        let error = Recipe::preset("gtpq-w4", 128).unwrap_err().to_string();
        assert!(error.contains("did you mean `gptq-w4`"), "{error}");
        assert!(Recipe::preset("gptq-w4", 0).is_err());
    }
}
