//! The GPTQ dialect (AutoGPTQ, GPTQModel, transformers' GPTQConfig).

use attar_tensor::{QuantScheme, ScaleGrid};
use serde_json::{Map, Value, json};

use super::{Compiler, Entry, Parsed, Pattern, bits, granularity, integer, one_scheme};

pub(super) fn write(layout: &str, linears: &[Entry], dense: &[String]) -> Result<Value, String> {
    let scheme = one_scheme(layout, linears)?;
    let mut config = json!({
        "quant_method": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.granularity.as_config(),
        "desc_act": false,
        "sym": scheme.symmetric,
        "lm_head": linears.iter().any(|(name, _)| name == "lm_head"),
        "checkpoint_format": layout,
        "method": "gptq",
        "format": layout,
        "pack_dtype": "int32",
        "meta": {"quantizer": [concat!("attar:", env!("CARGO_PKG_VERSION"))]},
    });
    // Linears left dense inside decoder blocks: GPTQModel's negative rules.
    let mut dynamic = Map::new();
    for name in dense.iter().filter(|name| *name != "lm_head") {
        dynamic.insert(format!("-:^{}$", name.replace('.', "\\.")), json!({}));
    }
    if !dynamic.is_empty() {
        config["dynamic"] = Value::Object(dynamic);
    }
    Ok(config)
}

pub(super) fn parse(quant: &Value) -> Result<Parsed, String> {
    let layout = match quant.get("checkpoint_format").and_then(Value::as_str) {
        None | Some("gptq") => "gptq",
        Some("gptq_v2") => "gptq_v2",
        Some(other) => {
            return Err(format!("GPTQ checkpoint_format `{}` cannot be read", crate::brief(other)));
        }
    };
    let scheme = |rule: Option<&Value>| -> Result<QuantScheme, String> {
        let from = |key: &str| rule.filter(|rule| rule.get(key).is_some()).unwrap_or(quant);
        Ok(QuantScheme {
            bits: bits(integer(from("bits"), "bits")?)?,
            granularity: granularity(integer(from("group_size"), "group_size")?)?,
            symmetric: from("sym").get("sym").and_then(Value::as_bool).unwrap_or(true),
            scale_grid: ScaleGrid::F32,
            zero_min: 0,
            activations: attar_tensor::ActivationScheme::Float,
        })
    };
    // GPTQModel's `dynamic`: in order, `-:` leaves a linear dense, everything else overrides.
    let mut rules = Vec::new();
    let dynamic = quant.get("dynamic").and_then(Value::as_object);
    let compiler = Compiler::new(dynamic.map_or(0, Map::len))?;
    for (pattern, rule) in dynamic.into_iter().flatten() {
        if let Some(pattern) = pattern.strip_prefix("-:") {
            rules.push((compiler.regex(pattern)?, None));
        } else {
            let pattern = compiler.regex(pattern.strip_prefix("+:").unwrap_or(pattern))?;
            rules.push((pattern, Some(scheme(Some(rule))?)));
        }
    }
    rules.push((Pattern::Any, Some(scheme(None)?)));
    Ok(Parsed { layout, rules })
}
