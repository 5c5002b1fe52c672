//! The GPTQ dialect (AutoGPTQ, GPTQModel, transformers' GPTQConfig).

use attar_tensor::{QuantScheme, ScaleGrid};
use serde_json::{Map, Value, json};

use super::{Entry, Parsed, granularity, integer, one_scheme};

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
    let scheme = QuantScheme {
        bits: integer(quant, "bits")? as u8,
        granularity: granularity(integer(quant, "group_size")?)?,
        symmetric: quant.get("sym").and_then(Value::as_bool).unwrap_or(true),
        scale_grid: ScaleGrid::F32,
        zero_min: 0,
    };
    let layout = match quant.get("checkpoint_format").and_then(Value::as_str) {
        None | Some("gptq") => "gptq",
        Some("gptq_v2") => "gptq_v2",
        Some(other) => return Err(format!("GPTQ checkpoint_format `{other}` cannot be read")),
    };
    Ok(Parsed { layout, schemes: vec![(vec!["Linear".into()], scheme)] })
}
