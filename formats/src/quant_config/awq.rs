//! The AutoAWQ dialect, version `gemm`.

use attar_tensor::{QuantScheme, ScaleGrid};
use serde_json::{Value, json};

use super::{Entry, Parsed, Pattern, granularity, integer, one_scheme};

pub(super) fn write(linears: &[Entry], dense: &[String]) -> Result<Value, String> {
    let scheme = one_scheme("awq", linears)?;
    let skip: Vec<&String> = dense.iter().filter(|name| *name != "lm_head").collect();
    Ok(json!({
        "quant_method": "awq",
        "bits": scheme.bits,
        "group_size": scheme.granularity.as_config(),
        "zero_point": !scheme.symmetric,
        "version": "gemm",
        "modules_to_not_convert": if skip.is_empty() { Value::Null } else { json!(skip) },
    }))
}

pub(super) fn parse(quant: &Value) -> Result<Parsed, String> {
    match quant.get("version").and_then(Value::as_str) {
        None => {}
        Some(version) if version.eq_ignore_ascii_case("gemm") => {}
        Some(other) => {
            return Err(format!("AWQ version `{}` cannot be read, only gemm", crate::brief(other)));
        }
    }
    let bits = integer(quant, "bits").or_else(|_| integer(quant, "w_bit"))?;
    let group = integer(quant, "group_size").or_else(|_| integer(quant, "q_group_size"))?;
    let scheme = QuantScheme {
        bits: super::bits(bits)?,
        granularity: granularity(group)?,
        symmetric: !quant.get("zero_point").and_then(Value::as_bool).unwrap_or(true),
        scale_grid: ScaleGrid::F16,
        zero_min: 0,
        activations: attar_tensor::ActivationScheme::Float,
    };
    Ok(Parsed { layout: "awq", rules: vec![(Pattern::Any, Some(scheme))] })
}
