//! JSON Schema of recipes, for editors.

use serde_json::{Value, json};

use super::{Known, MIXTURES, PRESETS};
use crate::{ModelPassDef, PassDef};

/// JSON Schema (draft 2020-12) of a recipe whose steps may use `passes`.
pub fn json_schema(passes: Known<'_>) -> Value {
    let strings = json!({ "oneOf": [
        { "type": "string" },
        { "type": "array", "items": { "type": "string" } },
    ] });
    let limit = |text: &str| json!({ "type": "number", "minimum": 0, "description": text });
    let model = passes.model.iter().map(|def| model_step(def));
    let steps: Vec<_> = passes.block.iter().map(|def| step(def, &strings)).chain(model).collect();
    let presets: Vec<_> = PRESETS.iter().map(|(name, _)| *name).collect();
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Attar recipe",
        "$defs": definitions(passes),
        "description": format!("Built-in recipes: {}", presets.join(", ")),
        "type": "object",
        "additionalProperties": false,
        "properties": {
            "calibration": {
                "type": "object",
                "additionalProperties": false,
                "properties": {
                    "text": strings,
                    "ids": { "type": "string", "description": "file with one {\"input_ids\": [...]} a line" },
                    "samples": { "type": "integer", "minimum": 1, "default": 128 },
                    "context": { "type": "integer", "minimum": 1, "default": 2048 },
                    "seed": { "type": "integer", "minimum": 0, "default": 0 },
                },
            },
            "step": { "type": "array", "items": { "oneOf": steps } },
            "emit": { "type": "array", "items": {
                "type": "object",
                "additionalProperties": false,
                "required": ["layout"],
                "properties": {
                    "layout": { "type": "string" },
                    "container": { "type": "string", "default": "safetensors" },
                    "dir": { "type": "string", "description": "subdirectory of the output" },
                    "target": { "oneOf": [
                        { "type": "string" },
                        { "type": "array", "items": { "type": "string" } },
                    ], "description": "runtimes that must accept it: NAME or NAME,tp=N" },
                    "of": { "type": "string", "description": "id of the step whose result is written" },
                    "merge": { "type": "boolean", "default": false,
                        "description": "multiply float factors, so that linears are written whole" },
                },
            } },
            "gate": {
                "type": "object",
                "additionalProperties": false,
                "properties": {
                    "max_perplexity_ratio": limit("largest perplexity relative to the baseline's"),
                    "max_kl_mean": limit("largest mean KL divergence, nats"),
                    "min_top1_agreement": limit("smallest fraction of equal most likely tokens"),
                    "max_bytes_ratio": limit("largest size relative to the baseline's"),
                },
            },
        },
    })
}

/// Types that options refer to; references are from the root of the schema.
fn definitions(passes: Known<'_>) -> Value {
    let mut all = serde_json::Map::new();
    let schemas = passes.block.iter().map(|def| def.schema);
    for schema in schemas.chain(passes.model.iter().map(|def| def.schema)) {
        if let Some(Value::Object(own)) = schema().to_value().get("$defs") {
            all.extend(own.clone());
        }
    }
    Value::Object(all)
}

/// A step whose pass works on the whole model.
fn model_step(def: &ModelPassDef) -> Value {
    let options = (def.schema)().to_value();
    let mut properties = options.get("properties").cloned().unwrap_or_else(|| json!({}));
    let own = json!({
        "pass": { "const": def.name },
        "id": { "type": "string" },
        "after": { "type": "string", "description": "id of the step that this one follows, or `source`" },
    });
    let mut required = vec![json!("pass")];
    if let (Some(all), Some(own)) = (properties.as_object_mut(), own.as_object()) {
        all.extend(own.iter().map(|(key, value)| (key.clone(), value.clone())));
    }
    if let Some(more) = options.get("required").and_then(Value::as_array) {
        required.extend(more.iter().cloned());
    }
    json!({
        "type": "object",
        "description": def.summary,
        "additionalProperties": false,
        "required": required,
        "properties": properties,
    })
}

fn step(def: &PassDef, strings: &Value) -> Value {
    let options = (def.schema)().to_value();
    let mut properties = options.get("properties").cloned().unwrap_or_else(|| json!({}));
    let own = json!({
        "pass": { "const": def.name },
        "id": { "type": "string" },
        "after": { "type": "string", "description": "id of the step that this one follows, or `source`" },
        "upstream": { "enum": ["original", "compressed"],
            "description": "which activations the statistics come from" },
        "sites": strings,
        "keep": strings,
    });
    let mut required = vec![json!("pass")];
    if let (Some(all), Some(own)) = (properties.as_object_mut(), own.as_object()) {
        all.extend(own.iter().map(|(key, value)| (key.clone(), value.clone())));
        if def.takes_scheme {
            all.insert("scheme".to_owned(), scheme(def.symmetric_by_default));
        }
    }
    if let Some(more) = options.get("required").and_then(Value::as_array) {
        required.extend(more.iter().cloned());
    }
    json!({
        "type": "object",
        "description": def.summary,
        "additionalProperties": false,
        "required": required,
        "properties": properties,
    })
}

fn scheme(symmetric: bool) -> Value {
    let names: Vec<_> = MIXTURES.iter().map(|(name, _)| *name).collect();
    let mixture = json!({ "enum": names, "description": "block types of ggml, one for each tensor, by llama.cpp's name" });
    let numbers = json!({
        "type": "object",
        "additionalProperties": false,
        "required": ["bits"],
        "properties": {
            "bits": { "enum": [2, 3, 4, 8] },
            "group_size": { "type": "integer", "minimum": -1, "default": 128,
                "description": "columns that share a scale; -1 is one scale per row" },
            "symmetric": { "type": "boolean", "default": symmetric },
            "activations": { "enum": ["float", "int8"], "default": "float",
                "description": "int8: inputs become signed bytes with one scale per token (W8A8)" },
        },
    });
    json!({ "oneOf": [numbers, mixture] })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::{Recipe, RecipeError};

    const KNOWN: Known<'static> = Known { block: &[&SOLVER], model: &[] };

    /// Options of the pass that the tests below know; it is never built with good ones.
    #[derive(schemars::JsonSchema)]
    #[allow(dead_code, reason = "only its schema is read")]
    struct Options {
        percdamp: f64,
        reads: Option<crate::Upstream>,
        block: Option<u32>,
    }

    const SOLVER: PassDef = PassDef {
        example: "",
        name: "solver",
        summary: "a pass for tests",
        paper: "none",
        takes_scheme: true,
        symmetric_by_default: false,
        build: |options| match options.keys().next() {
            Some(key) => Err(RecipeError::unknown_key("", key, &["percdamp", "block"])),
            None => Err(RecipeError::invalid("percdamp", "missing")),
        },
        schema: || schemars::schema_for!(Options),
    };

    #[test]
    fn steps_have_their_own_and_the_common_keys() {
        let schema = json_schema(KNOWN);
        let step = &schema["properties"]["step"]["items"]["oneOf"][0];
        assert_eq!(step["properties"]["pass"]["const"], "solver");
        assert_eq!(
            step["properties"]["scheme"]["oneOf"][0]["properties"]["symmetric"]["default"],
            false
        );
        for key in ["percdamp", "block", "sites", "keep", "id", "after"] {
            assert!(step["properties"].get(key).is_some(), "{key}");
        }
        assert_eq!(step["required"], json!(["pass", "percdamp"]));
        assert_eq!(step["additionalProperties"], false);
        // References of options point to the root.
        assert!(step["properties"]["reads"].to_string().contains("#/$defs/Upstream"));
        assert!(schema["$defs"].get("Upstream").is_some() && step.get("$defs").is_none());
    }

    #[test]
    fn errors_of_passes_name_the_step_and_the_nearest_key_of_either() {
        for (keys, expected) in [
            ("pass = \"solvr\"", "step[0].pass: unknown pass `solvr`; did you mean `solver`?"),
            ("pass = \"x\"", "step[0].pass: unknown pass `x`; known passes: solver"),
            ("pass = \"solver\"", "step[0].percdamp: missing"),
            (
                "pass = \"solver\"\npercdmp = 1",
                "step[0]: unknown key `percdmp`; did you mean `percdamp`?",
            ),
            (
                "pass = \"solver\"\nschem = 1",
                "step[0]: unknown key `schem`; did you mean `scheme`?",
            ),
        ] {
            let mut recipe = Recipe::parse(&format!("[[step]]\n{keys}\n")).unwrap();
            let error = recipe.resolve(KNOWN).unwrap_err();
            assert_eq!(error.to_string(), expected);
        }
        let text = "[[step]]\npass = \"solver\"\nscheme = { bits = 4 }\n";
        let mut recipe = Recipe::parse(text).unwrap();
        assert!(recipe.resolve(KNOWN).is_err());
        assert_eq!(recipe.steps[0].scheme.unwrap().symmetric, Some(false));
    }
}
