//! JSON Schema of recipes, for editors.

use serde_json::{Value, json};

use super::PRESETS;
use crate::PassDef;

/// JSON Schema (draft 2020-12) of a recipe whose steps may use `passes`.
pub fn json_schema(passes: &[&PassDef]) -> Value {
    let strings = json!({ "oneOf": [
        { "type": "string" },
        { "type": "array", "items": { "type": "string" } },
    ] });
    let limit = |text: &str| json!({ "type": "number", "minimum": 0, "description": text });
    let steps: Vec<_> = passes.iter().map(|def| step(def, &strings)).collect();
    let presets: Vec<_> = PRESETS.iter().map(|(name, _)| *name).collect();
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Attar recipe",
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
                    "of": { "type": "string", "description": "id of the step whose result is written" },
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

fn step(def: &PassDef, strings: &Value) -> Value {
    let options = (def.schema)().to_value();
    let mut properties = options.get("properties").cloned().unwrap_or_else(|| json!({}));
    let own = json!({
        "pass": { "const": def.name },
        "id": { "type": "string" },
        "after": { "type": "string" },
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
    let mut schema = json!({
        "type": "object",
        "description": def.summary,
        "additionalProperties": false,
        "required": required,
        "properties": properties,
    });
    if let Some(defs) = options.get("$defs") {
        schema["$defs"] = defs.clone();
    }
    schema
}

fn scheme(symmetric: bool) -> Value {
    json!({
        "type": "object",
        "additionalProperties": false,
        "required": ["bits"],
        "properties": {
            "bits": { "enum": [2, 3, 4, 8] },
            "group_size": { "type": "integer", "minimum": -1, "default": 128,
                "description": "columns that share a scale; -1 is one scale per row" },
            "symmetric": { "type": "boolean", "default": symmetric },
        },
    })
}
