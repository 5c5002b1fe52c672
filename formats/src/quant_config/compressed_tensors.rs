//! The compressed-tensors dialect, formats `pack-quantized` (weights alone) and `int-quantized` (W8A8).

use attar_tensor::{ActivationScheme, Granularity, QuantScheme, ScaleGrid};
use serde_json::{Map, Value, json};

use super::{Compiler, Entry, Parsed, Pattern};

fn weights(scheme: QuantScheme) -> Value {
    let (strategy, group) = match scheme.granularity {
        Granularity::Channel => ("channel", Value::Null),
        Granularity::Group(size) => ("group", json!(size)),
    };
    json!({
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "group_size": group,
        "strategy": strategy,
        "block_structure": null,
        "dynamic": false,
        "actorder": null,
        "observer": "memoryless_minmax",
        "observer_kwargs": {},
        "scale_dtype": null,
        "zp_dtype": if scheme.symmetric { Value::Null } else { json!("torch.int8") },
    })
}

/// The layout of each format.
const FORMATS: [(&str, &str); 2] =
    [("pack-quantized", "compressed-tensors"), ("int-quantized", "compressed-tensors-int")];

/// What is done to the inputs of linears.
fn activations(scheme: QuantScheme) -> Value {
    match scheme.activations {
        ActivationScheme::Float => Value::Null,
        ActivationScheme::Int8PerToken => json!({
            "num_bits": 8,
            "type": "int",
            "symmetric": true,
            "group_size": null,
            "strategy": "token",
            "block_structure": null,
            "dynamic": true,
            "actorder": null,
            "observer": null,
            "observer_kwargs": {},
            "scale_dtype": null,
            "zp_dtype": null,
        }),
    }
}

/// Reads them; `format` decides, since no layout carries the other combination.
fn read_activations(name: &str, group: &Value, format: &str) -> Result<ActivationScheme, String> {
    let said = group.get("input_activations").filter(|value| !value.is_null());
    let Some(said) = said else {
        return match format {
            "pack-quantized" => Ok(ActivationScheme::Float),
            _ => Err(format!(
                "{name} quantizes weights alone in format {format}, which is read with int8 activations only"
            )),
        };
    };
    if format == "pack-quantized" {
        return Err(format!(
            "{name} quantizes activations in format {format}, which cannot be read"
        ));
    }
    let is = |key: &str, value: Value| said.get(key) == Some(&value);
    let symmetric = said.get("symmetric").and_then(Value::as_bool).unwrap_or(true);
    let read = is("num_bits", json!(8))
        && said.get("type").is_none_or(|kind| kind == "int")
        && symmetric
        && is("dynamic", json!(true))
        && is("strategy", json!("token"));
    if read {
        Ok(ActivationScheme::Int8PerToken)
    } else {
        Err(format!(
            "{name}: input_activations can be read as 8-bit int, symmetric, dynamic, one scale per token only"
        ))
    }
}

pub(super) fn write(layout: &str, linears: &[Entry], dense: &[String]) -> Result<Value, String> {
    if linears.is_empty() {
        return Err(format!("layout {layout}: nothing is quantized"));
    }
    let format = FORMATS.iter().find(|(_, name)| *name == layout);
    let format = format.map(|(format, _)| *format).ok_or_else(|| format!("no layout {layout}"))?;
    let mut schemes: Vec<QuantScheme> = Vec::new();
    for (_, scheme) in linears {
        if !schemes.contains(scheme) {
            schemes.push(*scheme);
        }
    }
    let mut groups = Map::new();
    for (at, scheme) in schemes.iter().enumerate() {
        let targets: Vec<String> = if schemes.len() == 1 {
            vec!["Linear".into()]
        } else {
            linears.iter().filter(|(_, s)| s == scheme).map(|(name, _)| name.clone()).collect()
        };
        groups.insert(
            format!("group_{at}"),
            json!({
                "targets": targets,
                "weights": weights(*scheme),
                "input_activations": activations(*scheme),
                "output_activations": null,
                "format": format,
            }),
        );
    }
    Ok(json!({
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "global_compression_ratio": null,
        "kv_cache_scheme": null,
        "sparsity_config": {},
        "transform_config": {},
        "config_groups": groups,
        "ignore": dense,
        "version": "0.19.0",
    }))
}

pub(super) fn parse(quant: &Value) -> Result<Parsed, String> {
    let format = quant.get("format").and_then(Value::as_str).unwrap_or("");
    let Some((format, layout)) = FORMATS.iter().copied().find(|(known, _)| *known == format) else {
        return Err(format!(
            "compressed-tensors format `{}` cannot be read, only pack-quantized and int-quantized",
            crate::brief(format)
        ));
    };
    let groups = quant
        .get("config_groups")
        .and_then(Value::as_object)
        .ok_or("compressed-tensors config has no config_groups")?;
    // A name counts before an expression, and that before the class; `ignore` before all.
    let (mut rules, mut regexes, mut classes) = (Vec::new(), Vec::new(), Vec::new());
    let is_regex = |target: &&Value| target.as_str().is_some_and(|t| t.starts_with("re:"));
    let targets = groups.values().filter_map(|group| group.get("targets"));
    let expressions = targets
        .chain(quant.get("ignore"))
        .filter_map(Value::as_array)
        .map(|targets| targets.iter().filter(is_regex).count());
    let compiler = Compiler::new(expressions.sum())?;
    for target in quant.get("ignore").and_then(Value::as_array).into_iter().flatten() {
        match target.as_str() {
            Some("Linear") | None => {}
            Some(target) => rules.push((pattern(&compiler, target)?, None)),
        }
    }
    for (name, group) in groups {
        let weights = group
            .get("weights")
            .filter(|w| !w.is_null())
            .ok_or(format!("{name} has no weights scheme"))?;
        let activations = read_activations(name, group, format)?;
        if weights.get("type").and_then(Value::as_str) != Some("int") {
            return Err(format!("{name} holds a type of weights that cannot be read, only int"));
        }
        let bits = weights
            .get("num_bits")
            .and_then(Value::as_i64)
            .ok_or(format!("{name}: no num_bits"))?;
        let granularity = match (
            weights.get("strategy").and_then(Value::as_str),
            weights.get("group_size").and_then(Value::as_i64),
        ) {
            (Some("channel"), _) | (_, Some(-1)) => Granularity::Channel,
            (_, Some(size)) if size > 0 => Granularity::Group(size as usize),
            (strategy, _) => return Err(format!("{name}: strategy {strategy:?} cannot be read")),
        };
        let scheme = QuantScheme {
            bits: super::bits(bits)?,
            granularity,
            symmetric: weights.get("symmetric").and_then(Value::as_bool).unwrap_or(true),
            scale_grid: ScaleGrid::F32,
            zero_min: 0,
            activations,
        };
        let targets = group.get("targets").and_then(Value::as_array);
        for target in targets.into_iter().flatten().filter_map(Value::as_str) {
            match pattern(&compiler, target)? {
                Pattern::Any => classes.push((Pattern::Any, Some(scheme))),
                found @ Pattern::Name(_) => rules.push((found, Some(scheme))),
                found @ Pattern::Regex(_) => regexes.push((target.to_owned(), found, scheme)),
            }
        }
    }
    regexes.sort_by(|a, b| a.0.cmp(&b.0));
    rules.extend(regexes.into_iter().map(|(_, pattern, scheme)| (pattern, Some(scheme))));
    rules.extend(classes);
    Ok(Parsed { layout, rules })
}

fn pattern(compiler: &Compiler, target: &str) -> Result<Pattern, String> {
    match target.strip_prefix("re:") {
        Some(regex) => compiler.regex(regex),
        None if target == "Linear" => Ok(Pattern::Any),
        None => Ok(Pattern::Name(target.to_owned())),
    }
}
