//! `quantization_config` of config.json, in the dialect of each layout.

mod awq;
mod compressed_tensors;
mod gptq;

use attar_tensor::{BlockType, QuantScheme};
use serde_json::Value;

use crate::brief;

/// What a config says of one quantized linear.
pub type Entry = (String, QuantScheme);

/// Writes the config of a layout. `linears` are the quantized ones, `dense` the linears left alone.
///
/// # Errors
/// When the dialect cannot say it.
pub fn write(layout: &str, linears: &[Entry], dense: &[String]) -> Result<Value, String> {
    match layout {
        "compressed-tensors" | "compressed-tensors-int" => {
            compressed_tensors::write(layout, linears, dense)
        }
        "gptq" | "gptq_v2" => gptq::write(layout, linears, dense),
        "awq" => awq::write(linears, dense),
        other => Err(format!("no quantization_config dialect for layout {other}")),
    }
}

/// Which linears a rule holds for.
#[derive(Debug, Clone)]
enum Pattern {
    /// The linear of this full name.
    Name(String),
    /// Names that the expression matches from their first character (Python's `re.match`).
    Regex(fancy_regex::Regex),
    /// Every linear.
    Any,
}

/// Bytes that all compiled expressions of a config may take together.
const MAX_COMPILED: usize = 64 << 20;
/// Most expressions of a config.
const MAX_EXPRESSIONS: usize = 1024;
/// Longest expression, bytes.
const MAX_EXPRESSION: usize = 4096;

/// Largest product of an expression's counts: the library multiplies nested ones without looking.
const MAX_REPETITIONS: u64 = 1 << 32;

/// Product of the numbers between braces, as `{3}` and `{2,5}`; saturates. Where comments may hide a
/// brace, all numbers count.
fn repetitions(text: &str) -> u64 {
    let product = |text: &str| {
        let numbers = text.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty());
        numbers.fold(1u64, |product, digits| {
            product.saturating_mul(digits.parse().unwrap_or(u64::MAX).max(1))
        })
    };
    if text.contains('#') && text.contains('{') {
        return product(text);
    }
    let counts = text.split('{').skip(1).map(|rest| product(rest.split('}').next().unwrap_or("")));
    counts.fold(1, u64::saturating_mul)
}

/// Compiles the expressions of one config within its memory.
struct Compiler {
    /// Of one compiled expression, bytes.
    limit: usize,
}

impl Compiler {
    /// For a config of at most `count` expressions.
    fn new(count: usize) -> Result<Self, String> {
        if count > MAX_EXPRESSIONS {
            return Err(format!(
                "quantization_config has {count} rules, more than the {MAX_EXPRESSIONS} that are read"
            ));
        }
        Ok(Self { limit: (MAX_COMPILED / count.max(1)).min(1 << 20) })
    }

    fn regex(&self, text: &str) -> Result<Pattern, String> {
        if text.len() > MAX_EXPRESSION {
            return Err(format!(
                "a regular expression of quantization_config has {} bytes, more than {MAX_EXPRESSION}",
                text.len()
            ));
        }
        if repetitions(text) > MAX_REPETITIONS {
            return Err(format!("`{}` repeats too often to be read", brief(text)));
        }
        fancy_regex::RegexBuilder::new(&format!("^(?:{text})"))
            .delegate_size_limit(self.limit)
            .delegate_dfa_size_limit(self.limit)
            .build()
            .map(Pattern::Regex)
            .map_err(|error| {
                let (text, error) = (brief(text), brief(error));
                format!("`{text}` is not a regular expression that is read: {error}")
            })
    }
}

impl Pattern {
    /// `None` when an expression backtracks beyond its limit.
    fn matches(&self, linear: &str) -> Option<bool> {
        match self {
            Self::Name(name) => Some(name == linear),
            Self::Regex(regex) => regex.is_match(linear).ok(),
            Self::Any => Some(true),
        }
    }
}

/// A parsed config: the layout's name, and the scheme of a linear found in it.
#[derive(Debug, Clone)]
pub struct Parsed {
    /// `compressed-tensors`, `compressed-tensors-int`, `gptq`, `gptq_v2`, `awq`, or `gguf`, whose linears have layouts of their own.
    pub layout: &'static str,
    /// The first rule that matches counts; `None` says that the linear is not quantized.
    rules: Vec<(Pattern, Option<QuantScheme>)>,
}

impl Parsed {
    /// The scheme of a linear whose packed parts are present.
    pub fn scheme_of(&self, linear: &str) -> Option<QuantScheme> {
        // A rule that cannot be decided decides: a later one could give the wrong scheme.
        let decides = |(pattern, _): &&(Pattern, _)| pattern.matches(linear) != Some(false);
        let (pattern, scheme) = self.rules.iter().find(decides)?;
        pattern.matches(linear).and(*scheme)
    }

    /// The layout of a linear of this scheme.
    pub fn layout_of(&self, scheme: QuantScheme) -> &'static str {
        scheme.block().map_or(self.layout, BlockType::name)
    }

    /// Suffix of the tensor whose presence marks a linear as quantized.
    pub fn marker(&self) -> &'static str {
        match self.layout {
            "compressed-tensors" => ".weight_packed",
            "compressed-tensors-int" => ".weight_scale",
            "gguf" => ".blocks",
            _ => ".qweight",
        }
    }
}

/// Parses the quantization config of a model's config.json; `None` when it has none. Memory taken,
/// matching included: at most 8 bytes for each byte of the config plus 192 MiB for regular expressions, of
/// which 1024 of 4096 bytes each are read at most; together they are compiled to 64 MiB at most.
///
/// # Errors
/// When it describes something that cannot be read.
pub fn parse(config: &Value) -> Result<Option<Parsed>, String> {
    let Some(quant) =
        config.get("quantization_config").or_else(|| config.get("compression_config"))
    else {
        return Ok(None);
    };
    let method = quant.get("quant_method").and_then(Value::as_str).unwrap_or("");
    match method {
        "compressed-tensors" => compressed_tensors::parse(quant).map(Some),
        "gptq" => gptq::parse(quant).map(Some),
        "awq" => awq::parse(quant).map(Some),
        "gguf" => gguf(quant).map(Some),
        other => Err(format!(
            "quantization_config: quant_method `{}` cannot be read; supported: compressed-tensors, gptq, awq",
            brief(other)
        )),
    }
}

/// What [`crate::gguf::Gguf::config`] says of its weights in blocks.
fn gguf(quant: &Value) -> Result<Parsed, String> {
    let types = quant.get("types").and_then(Value::as_object).ok_or("gguf: has no `types`")?;
    let mut rules = Vec::with_capacity(types.len());
    for (name, ty) in types {
        let block = ty.as_str().and_then(BlockType::from_name);
        let block = block.ok_or_else(|| format!("gguf: {} is of an unknown type", brief(name)))?;
        rules.push((Pattern::Name(name.clone()), Some(block.scheme())));
    }
    Ok(Parsed { layout: "gguf", rules })
}

/// The one scheme of all linears, for dialects that know only one.
fn one_scheme(layout: &str, linears: &[Entry]) -> Result<QuantScheme, String> {
    let Some((_, first)) = linears.first() else {
        return Err(format!("layout {layout}: nothing is quantized"));
    };
    match linears.iter().find(|(_, scheme)| scheme != first) {
        None => Ok(*first),
        Some((name, scheme)) => Err(format!(
            "layout {layout} has one scheme for all linears, but {name} is {} and {} is {}",
            scheme.label(),
            linears[0].0,
            first.label()
        )),
    }
}

/// Bits that the layouts of this crate hold.
fn bits(value: i64) -> Result<u8, String> {
    match value {
        2 | 3 | 4 | 8 => Ok(value as u8),
        other => Err(format!("{other} bits cannot be read, only 2, 3, 4 and 8")),
    }
}

fn granularity(group_size: i64) -> Result<attar_tensor::Granularity, String> {
    match group_size {
        -1 => Ok(attar_tensor::Granularity::Channel),
        size if size > 0 => Ok(attar_tensor::Granularity::Group(size as usize)),
        other => Err(format!("group_size {other} is not a group size")),
    }
}

fn integer(value: &Value, key: &str) -> Result<i64, String> {
    value
        .get(key)
        .and_then(Value::as_i64)
        .ok_or_else(|| format!("quantization_config lacks `{key}`"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use attar_tensor::{Granularity, ScaleGrid};

    #[test]
    fn what_is_written_is_read_back() {
        for layout in ["compressed-tensors", "gptq", "awq"] {
            for symmetric in [true, false] {
                let scheme = QuantScheme {
                    bits: 4,
                    granularity: Granularity::Group(128),
                    symmetric,
                    scale_grid: ScaleGrid::F16,
                    zero_min: 0,
                    activations: attar_tensor::ActivationScheme::Float,
                };
                let linears = vec![("model.layers.0.mlp.up_proj".to_owned(), scheme)];
                let config = write(layout, &linears, &["lm_head".into()]).unwrap();
                let parsed =
                    parse(&serde_json::json!({"quantization_config": config})).unwrap().unwrap();
                let back = parsed.scheme_of("model.layers.0.mlp.up_proj").unwrap();
                assert_eq!(parsed.layout, layout);
                assert_eq!((back.bits, back.granularity), (4, Granularity::Group(128)));
                assert_eq!(back.symmetric, symmetric);
            }
        }
        assert!(parse(&serde_json::json!({})).unwrap().is_none());
        let odd = serde_json::json!({"quant_method": "gptq", "bits": 260, "group_size": 128});
        let error = parse(&serde_json::json!({"quantization_config": odd})).unwrap_err();
        assert!(error.contains("260 bits"), "{error}");
        assert!(
            parse(&serde_json::json!({"quantization_config": {"quant_method": "fp8"}})).is_err()
        );
    }

    #[test]
    fn w8a8_is_written_and_read_and_its_relatives_are_refused() {
        let scheme = QuantScheme {
            bits: 8,
            granularity: Granularity::Channel,
            symmetric: true,
            scale_grid: ScaleGrid::F32,
            zero_min: 0,
            activations: attar_tensor::ActivationScheme::Int8PerToken,
        };
        let linears = vec![("a.up_proj".to_owned(), scheme)];
        let good = write("compressed-tensors-int", &linears, &["lm_head".into()]).unwrap();
        let read = |config: &Value| parse(&serde_json::json!({"quantization_config": config}));
        let parsed = read(&good).unwrap().unwrap();
        assert_eq!((parsed.layout, parsed.marker()), ("compressed-tensors-int", ".weight_scale"));
        assert_eq!(parsed.scheme_of("a.up_proj"), Some(scheme));
        assert_eq!(parsed.scheme_of("lm_head"), None);
        let refused = |key: &str, value: Value, part: &str| {
            let mut config = good.clone();
            config["config_groups"]["group_0"]["input_activations"][key] = value;
            let error = read(&config).unwrap_err();
            assert!(error.contains("group_0") && error.contains(part), "{key}: {error}");
        };
        refused("dynamic", false.into(), "dynamic");
        refused("dynamic", "local".into(), "dynamic");
        refused("strategy", "tensor".into(), "one scale per token");
        refused("symmetric", false.into(), "symmetric");
        refused("num_bits", 4.into(), "8-bit");
        refused("type", "float".into(), "int");
        let mut alone = good.clone();
        alone["config_groups"]["group_0"]["input_activations"] = Value::Null;
        assert!(read(&alone).unwrap_err().contains("weights alone"));
        let mut packed = good.clone();
        packed["format"] = "pack-quantized".into();
        assert!(read(&packed).unwrap_err().contains("activations"));
        packed["format"] = "float-quantized".into();
        assert!(read(&packed).unwrap_err().contains("float-quantized"));
    }

    /// `(\w{100}){100}` takes 20 bytes in a file and gigabytes when it is compiled.
    #[test]
    fn expressions_share_a_bounded_memory() {
        let parse = |dynamic: Value| {
            let quant = serde_json::json!({
                "quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": dynamic,
            });
            super::parse(&serde_json::json!({"quantization_config": quant}))
        };
        let error = parse(serde_json::json!({"(?:\\w{100}){100}": {}})).unwrap_err();
        assert!(error.contains("regular expression"), "{error}");
        // Found by fuzzing: counts are multiplied without looking for an overflow.
        for text in
            ["(a{0000018446744073709550815}){1000}", "(?x)(a{#}\n18446744073709550815}){1000}"]
        {
            let error = parse(serde_json::json!({text: {}})).unwrap_err();
            assert!(error.contains("repeats too often"), "{error}");
        }
        assert!(parse(serde_json::json!({"layers\\.\\d{1,2}\\.(?!x)": {}})).is_ok());
        assert!(parse(serde_json::json!({"a".repeat(4097): {}})).unwrap_err().contains("4097"));
        let many = |count: usize| {
            Value::Object((0..count).map(|i| (format!("-:^{i}$"), serde_json::json!({}))).collect())
        };
        assert!(parse(many(1025)).unwrap_err().contains("1025 rules"));
        assert_eq!(parse(many(1024)).unwrap().unwrap().rules.len(), 1025);
    }

    #[test]
    fn rules_of_foreign_gptq_files_are_followed() {
        let quant = serde_json::json!({
            "quant_method": "gptq", "bits": 4, "group_size": 128, "sym": true,
            "dynamic": {
                "-:.*\\.0\\..*down_proj": {},
                "+:.*down_proj": {"bits": 8, "group_size": 32},
                ".*\\.(?!q)._proj": {"bits": 3},
            },
        });
        let parsed = parse(&serde_json::json!({"quantization_config": quant})).unwrap().unwrap();
        let found = |name: &str| parsed.scheme_of(name).map(|s| (s.bits, s.granularity));
        assert_eq!(found("model.layers.0.mlp.down_proj"), None);
        assert_eq!(found("model.layers.1.mlp.down_proj"), Some((8, Granularity::Group(32))));
        assert_eq!(found("model.layers.1.self_attn.k_proj"), Some((3, Granularity::Group(128))));
        assert_eq!(found("model.layers.1.self_attn.q_proj"), Some((4, Granularity::Group(128))));
    }

    #[test]
    fn groups_of_foreign_compressed_tensors_files_keep_their_order_of_precedence() {
        let group = |targets: &[&str], bits: u8| {
            serde_json::json!({"targets": targets, "weights": {
                "num_bits": bits, "type": "int", "symmetric": true, "strategy": "group", "group_size": 64,
            }})
        };
        let quant = serde_json::json!({
            "quant_method": "compressed-tensors", "format": "pack-quantized",
            "config_groups": {
                "group_0": group(&["Linear"], 4),
                "group_1": group(&["re:.*down_proj$"], 8),
                "group_2": group(&["model.layers.0.mlp.down_proj"], 3),
            },
            "ignore": ["lm_head", "re:.*gate_proj"],
        });
        let parsed = parse(&serde_json::json!({"quantization_config": quant})).unwrap().unwrap();
        let bits = |name: &str| parsed.scheme_of(name).map(|s| s.bits);
        assert_eq!(bits("model.layers.0.mlp.down_proj"), Some(3));
        assert_eq!(bits("model.layers.1.mlp.down_proj"), Some(8));
        assert_eq!(bits("model.layers.1.mlp.up_proj"), Some(4));
        assert_eq!(bits("model.layers.1.mlp.gate_proj"), None);
        assert_eq!(bits("lm_head"), None);
    }
}
