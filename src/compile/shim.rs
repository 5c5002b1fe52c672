//! What an artifact with factored linears brings along so that transformers loads it: a model class of its own
//! (`modeling_attar.py`) and the entries of config.json that name it and the ranks.

use serde_json::{Map, Value, json};

use crate::Error;

/// The file beside the weights.
pub(super) const FILE: &str = "modeling_attar.py";
const TEXT: &str = include_str!("modeling_attar.py");

/// The class with the checkpoint's own as its base.
pub(super) fn text(config: &Value) -> Result<String, Error> {
    let base = config["architectures"][0].as_str().unwrap_or_default();
    // It becomes Python code: nothing but a name.
    let name = base.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    if base.is_empty() || !name || base.as_bytes()[0].is_ascii_digit() {
        return Err("config.json: `architectures` names no class, which modeling_attar.py is based on; add it, or \
                    write with `merge = true`"
            .into());
    }
    Ok(TEXT.replace("BASE_CLASS", base))
}

/// Names class and ranks.
pub(super) fn declare(config: &mut Value, ranks: &[(&str, usize)]) {
    let ranks: Map<String, Value> =
        ranks.iter().map(|(site, rank)| ((*site).to_owned(), json!(rank))).collect();
    config["low_rank"] = Value::Object(ranks);
    config["auto_map"] = json!({"AutoModelForCausalLM": "modeling_attar.FactoredForCausalLM"});
}
