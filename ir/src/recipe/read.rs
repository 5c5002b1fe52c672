//! TOML to [`Recipe`] and back. The walk is written out, so that every refusal names its key path.

use attar_tensor::{ActivationScheme, Granularity};
use toml::{Table, Value};

use crate::{Upstream, target::TargetSpec};

use super::{
    Calibration, Emit, GateSpec, MIXTURES, Mixture, Recipe, RecipeError, STEP_KEYS, SchemeSpec,
    Step, nearest,
};

type Result<T> = std::result::Result<T, RecipeError>;

const TOP_KEYS: &[&str] = &["calibration", "step", "emit", "gate"];
const CALIBRATION_KEYS: &[&str] = &["text", "ids", "samples", "context", "seed"];
const SCHEME_KEYS: &[&str] = &["bits", "group_size", "symmetric", "activations"];
const EMIT_KEYS: &[&str] = &["layout", "container", "dir", "of", "target", "merge"];
const GATE_KEYS: &[&str] =
    &["max_perplexity_ratio", "max_kl_mean", "min_top1_agreement", "max_bytes_ratio"];

/// Reads the whole file.
pub(super) fn recipe(text: &str) -> Result<Recipe> {
    let table: Table = text.parse().map_err(|error: toml::de::Error| {
        let line = error.span().map_or(1, |span| text[..span.start].matches('\n').count() + 1);
        RecipeError::invalid(format!("line {line}"), error.message())
    })?;
    let mut top = Keys::new(table, "recipe");
    top.only(TOP_KEYS)?;
    let mut recipe = Recipe::default();
    if let Some(table) = top.table("calibration")? {
        recipe.calibration = calibration(table)?;
    }
    for table in top.tables("step")? {
        recipe.steps.push(step(table)?);
    }
    for table in top.tables("emit")? {
        recipe.emits.push(emit(table)?);
    }
    if let Some(mut table) = top.table("gate")? {
        table.only(GATE_KEYS)?;
        recipe.gate = Some(GateSpec {
            max_perplexity_ratio: table.number("max_perplexity_ratio")?,
            max_kl_mean: table.number("max_kl_mean")?,
            min_top1_agreement: table.number("min_top1_agreement")?,
            max_bytes_ratio: table.number("max_bytes_ratio")?,
        });
    }
    Ok(recipe)
}

fn calibration(mut table: Keys) -> Result<Calibration> {
    table.only(CALIBRATION_KEYS)?;
    let default = Calibration::default();
    let calibration = Calibration {
        text: table.strings("text")?.unwrap_or_default(),
        ids: table.string("ids")?,
        samples: table.count("samples")?.unwrap_or(default.samples),
        context: table.count("context")?.unwrap_or(default.context),
        seed: match table.integer("seed")? {
            None => default.seed,
            Some(seed) => u64::try_from(seed).map_err(|_| {
                RecipeError::invalid(table.path("seed"), "expected an integer of at least 0")
            })?,
        },
    };
    if calibration.ids.is_some() && !calibration.text.is_empty() {
        let reason = "`text` and `ids` exclude each other; give one of them";
        return Err(RecipeError::invalid(table.path, reason));
    }
    Ok(calibration)
}

fn step(mut table: Keys) -> Result<Step> {
    let Some(pass) = table.string("pass")? else {
        let near = table.table.keys().find(|key| super::nearest(key, ["pass"]).is_some());
        return Err(match near {
            Some(key) => RecipeError::unknown_key(&table.path, key, STEP_KEYS),
            None => RecipeError::invalid(table.path("pass"), "missing; name the pass to run"),
        });
    };
    let default = Step::new(&pass);
    let types = match table.table.get("scheme") {
        Some(Value::String(name)) => {
            let name = name.clone();
            table.table.remove("scheme");
            let known = || MIXTURES.iter().map(|(known, _)| *known);
            Some(Mixture::from_name(&name).ok_or_else(|| {
                let hint = super::nearest(&name, known()).map_or_else(
                    || format!("known: {}", known().collect::<Vec<_>>().join(", ")),
                    |near| format!("did you mean `{near}`?"),
                );
                RecipeError::invalid(
                    table.path("scheme"),
                    format!("unknown mixture `{name}`; {hint}"),
                )
            })?)
        }
        _ => None,
    };
    Ok(Step {
        pass,
        id: table.string("id")?,
        after: table.string("after")?,
        sites: table.strings("sites")?.unwrap_or(default.sites),
        keep: table.strings("keep")?.unwrap_or(default.keep),
        scheme: table.table("scheme")?.map(scheme).transpose()?,
        types,
        upstream: match table.string("upstream")?.as_deref() {
            None => None,
            Some("original") => Some(Upstream::Original),
            Some("compressed") => Some(Upstream::Compressed),
            Some(other) => {
                let reason = format!("expected `original` or `compressed`, got `{other}`");
                return Err(RecipeError::invalid(table.path("upstream"), reason));
            }
        },
        options: table.table,
    })
}

fn scheme(mut table: Keys) -> Result<SchemeSpec> {
    table.only(SCHEME_KEYS)?;
    let bits = match table.integer("bits")? {
        Some(bits @ (2 | 3 | 4 | 8)) => bits as u8,
        Some(bits) => {
            let reason = format!("expected 2, 3, 4 or 8, got {bits}");
            return Err(RecipeError::invalid(table.path("bits"), reason));
        }
        None => {
            return Err(RecipeError::invalid(table.path("bits"), "missing; give 2, 3, 4 or 8"));
        }
    };
    let group_size = table.integer("group_size")?.unwrap_or(128);
    Ok(SchemeSpec {
        bits,
        granularity: granularity(group_size, &table.path("group_size"))?,
        symmetric: table.boolean("symmetric")?,
        activations: match table.string("activations")?.as_deref() {
            None => ActivationScheme::Float,
            Some(name) => activations(name, &table.path("activations"))?,
        },
    })
}

/// Names of what is done to activations.
const ACTIVATIONS: [(&str, ActivationScheme); 2] =
    [("float", ActivationScheme::Float), ("int8", ActivationScheme::Int8PerToken)];

fn activations(name: &str, path: &str) -> Result<ActivationScheme> {
    let known = ACTIVATIONS.iter().find(|(known, _)| *known == name);
    known.map(|(_, scheme)| *scheme).ok_or_else(|| {
        let hint = nearest(name, ACTIVATIONS.map(|(name, _)| name))
            .map_or_else(String::new, |name| format!("; did you mean `{name}`?"));
        RecipeError::invalid(path, format!("expected `float` or `int8`, got `{name}`{hint}"))
    })
}

/// -1 is one scale per row, a positive number so many columns per scale.
pub(super) fn granularity(group_size: i64, path: &str) -> Result<Granularity> {
    match group_size {
        -1 => Ok(Granularity::Channel),
        1.. => Ok(Granularity::Group(group_size as usize)),
        _ => {
            let reason = format!("expected a positive integer or -1 (per row), got {group_size}");
            Err(RecipeError::invalid(path, reason))
        }
    }
}

fn emit(mut table: Keys) -> Result<Emit> {
    table.only(EMIT_KEYS)?;
    let Some(layout) = table.string("layout")? else {
        return Err(RecipeError::invalid(table.path("layout"), "missing; name a layout"));
    };
    let default = Emit::new(&layout);
    let emit = Emit {
        layout,
        container: table.string("container")?.unwrap_or(default.container),
        dir: table.string("dir")?,
        of: table.string("of")?,
        target: table.strings("target")?.unwrap_or_default(),
        merge: table.boolean("merge")?.unwrap_or(false),
    };
    for target in &emit.target {
        if let Err(error) = target.parse::<TargetSpec>() {
            return Err(RecipeError::invalid(table.path("target"), error.to_string()));
        }
    }
    if let Some(dir) = &emit.dir {
        let plain =
            |part: std::path::Component<'_>| matches!(part, std::path::Component::Normal(_));
        if dir.is_empty() || !std::path::Path::new(dir).components().all(plain) {
            let reason = format!("expected a path below the output directory, got `{dir}`");
            return Err(RecipeError::invalid(table.path("dir"), reason));
        }
    }
    Ok(emit)
}

/// A table whose keys are taken one by one.
struct Keys {
    table: Table,
    path: String,
}

impl Keys {
    fn new(table: Table, path: impl Into<String>) -> Self {
        Self { table, path: path.into() }
    }

    /// Path of one key; the top level has no prefix.
    fn path(&self, key: &str) -> String {
        if self.path == "recipe" { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// Refuses keys outside of `known`.
    fn only(&self, known: &[&str]) -> Result<()> {
        match self.table.keys().find(|key| !known.contains(&key.as_str())) {
            Some(key) => Err(RecipeError::unknown_key(&self.path, key, known)),
            None => Ok(()),
        }
    }

    fn wrong<T>(&self, key: &str, expected: &str, got: &Value) -> Result<T> {
        let reason = format!("expected {expected}, got {} `{got}`", got.type_str());
        Err(RecipeError::invalid(self.path(key), reason))
    }

    fn string(&mut self, key: &str) -> Result<Option<String>> {
        match self.table.remove(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => self.wrong(key, "a string", &other),
        }
    }

    /// A string or a list of strings.
    fn strings(&mut self, key: &str) -> Result<Option<Vec<String>>> {
        match self.table.remove(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(vec![text])),
            Some(Value::Array(items)) => {
                let one = |(at, item)| match item {
                    Value::String(text) => Ok(text),
                    other => self.wrong(&format!("{key}[{at}]"), "a string", &other),
                };
                items.into_iter().enumerate().map(one).collect::<Result<_>>().map(Some)
            }
            Some(other) => self.wrong(key, "a string or a list of strings", &other),
        }
    }

    fn integer(&mut self, key: &str) -> Result<Option<i64>> {
        match self.table.remove(key) {
            None => Ok(None),
            Some(Value::Integer(value)) => Ok(Some(value)),
            Some(other) => self.wrong(key, "an integer", &other),
        }
    }

    fn count(&mut self, key: &str) -> Result<Option<usize>> {
        match self.integer(key)? {
            Some(value @ 1..) => Ok(Some(value as usize)),
            Some(value) => self.wrong(key, "a positive integer", &Value::Integer(value)),
            None => Ok(None),
        }
    }

    fn boolean(&mut self, key: &str) -> Result<Option<bool>> {
        match self.table.remove(key) {
            None => Ok(None),
            Some(Value::Boolean(value)) => Ok(Some(value)),
            Some(other) => self.wrong(key, "true or false", &other),
        }
    }

    /// A non-negative finite number.
    fn number(&mut self, key: &str) -> Result<Option<f64>> {
        let value = match self.table.remove(key) {
            None => return Ok(None),
            Some(Value::Float(value)) => value,
            Some(Value::Integer(value)) => value as f64,
            Some(other) => return self.wrong(key, "a number", &other),
        };
        if value.is_finite() && value >= 0.0 {
            Ok(Some(value))
        } else {
            self.wrong(key, "a finite number of at least 0", &Value::Float(value))
        }
    }

    fn table(&mut self, key: &str) -> Result<Option<Self>> {
        match self.table.remove(key) {
            None => Ok(None),
            Some(Value::Table(table)) => Ok(Some(Self::new(table, self.path(key)))),
            Some(other) => self.wrong(key, "a table", &other),
        }
    }

    fn tables(&mut self, key: &str) -> Result<Vec<Self>> {
        let expected = format!("tables written as [[{key}]]");
        match self.table.remove(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(items)) => items
                .into_iter()
                .enumerate()
                .map(|(at, item)| match item {
                    Value::Table(table) => Ok(Self::new(table, format!("{key}[{at}]"))),
                    other => self.wrong(key, &expected, &other),
                })
                .collect(),
            Some(other) => self.wrong(key, &expected, &other),
        }
    }
}

/// Writes every default out.
pub(super) fn write(recipe: &Recipe) -> String {
    fn put(table: &mut Table, key: &str, value: impl Into<Value>) {
        table.insert(key.to_owned(), value.into());
    }
    fn put_some(table: &mut Table, key: &str, value: Option<impl Into<Value>>) {
        if let Some(value) = value {
            put(table, key, value);
        }
    }
    let mut top = Table::new();
    let mut calibration = Table::new();
    put(&mut calibration, "text", recipe.calibration.text.clone());
    put_some(&mut calibration, "ids", recipe.calibration.ids.clone());
    put(&mut calibration, "samples", recipe.calibration.samples as i64);
    put(&mut calibration, "context", recipe.calibration.context as i64);
    put(&mut calibration, "seed", recipe.calibration.seed as i64);
    put(&mut top, "calibration", calibration);
    let steps = recipe.steps.iter().map(|step| {
        let mut table = Table::new();
        put(&mut table, "pass", step.pass.clone());
        put_some(&mut table, "id", step.id.clone());
        put_some(&mut table, "after", step.after.clone());
        put(&mut table, "sites", step.sites.clone());
        put(&mut table, "keep", step.keep.clone());
        put_some(&mut table, "scheme", step.types.map(Mixture::name));
        if let Some(scheme) = &step.scheme {
            let mut numbers = Table::new();
            put(&mut numbers, "bits", i64::from(scheme.bits));
            put(&mut numbers, "group_size", scheme.granularity.as_config());
            put_some(&mut numbers, "symmetric", scheme.symmetric);
            if !scheme.activations.is_float() {
                let name = ACTIVATIONS.iter().find(|(_, known)| *known == scheme.activations);
                put_some(&mut numbers, "activations", name.map(|(name, _)| *name));
            }
            put(&mut table, "scheme", numbers);
        }
        let upstream = step.upstream.and_then(|upstream| match upstream {
            Upstream::Original => Some("original"),
            Upstream::Compressed => Some("compressed"),
            Upstream::Given => None,
        });
        put_some(&mut table, "upstream", upstream);
        for (key, value) in &step.options {
            put(&mut table, key, value.clone());
        }
        Value::Table(table)
    });
    put(&mut top, "step", steps.collect::<Vec<_>>());
    let emits = recipe.emits.iter().map(|emit| {
        let mut table = Table::new();
        put(&mut table, "layout", emit.layout.clone());
        put(&mut table, "container", emit.container.clone());
        put_some(&mut table, "dir", emit.dir.clone());
        put_some(&mut table, "of", emit.of.clone());
        if !emit.target.is_empty() {
            put(&mut table, "target", emit.target.clone());
        }
        if emit.merge {
            put(&mut table, "merge", true);
        }
        Value::Table(table)
    });
    put(&mut top, "emit", emits.collect::<Vec<_>>());
    if let Some(gate) = &recipe.gate {
        let mut table = Table::new();
        put_some(&mut table, "max_perplexity_ratio", gate.max_perplexity_ratio);
        put_some(&mut table, "max_kl_mean", gate.max_kl_mean);
        put_some(&mut table, "min_top1_agreement", gate.min_top1_agreement);
        put_some(&mut table, "max_bytes_ratio", gate.max_bytes_ratio);
        put(&mut top, "gate", table);
    }
    toml::to_string(&top).expect("a table of plain values is TOML")
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = r#"
calibration = { text = ["calib.txt"], samples = 16, context = 256, seed = 3 }
[[step]]
pass = "awq"
sites = "mlp.*"
grid = 20
upstream = "original"
[[step]]
pass = "gptq"
id = "solve"
scheme = { bits = 4, group_size = -1 }
keep = ["lm_head", "layers.0.*"]
[[emit]]
layout = "gptq"
[[emit]]
layout = "awq"
dir = "for-awq"
of = "solve"
target = ["vllm,tp=2", "transformers"]
[gate]
max_kl_mean = 0.05
"#;

    #[test]
    fn an_example_is_read_and_survives_writing() {
        let recipe = Recipe::parse(EXAMPLE).unwrap();
        assert_eq!(recipe.calibration.samples, 16);
        assert_eq!(recipe.steps[0].sites, ["mlp.*"]);
        assert_eq!(recipe.steps[0].upstream, Some(Upstream::Original));
        assert_eq!(recipe.steps[0].options["grid"].as_integer(), Some(20));
        let scheme = recipe.steps[1].scheme.unwrap();
        assert_eq!((scheme.granularity, scheme.symmetric), (Granularity::Channel, None));
        assert_eq!(recipe.emits[1].dir.as_deref(), Some("for-awq"));
        assert_eq!(recipe.gate.unwrap().max_kl_mean, Some(0.05));
        let text = recipe.to_toml();
        assert_eq!(Recipe::parse(&text).unwrap(), recipe);
        assert_eq!(Recipe::parse(&text).unwrap().to_toml(), text);
    }

    #[test]
    fn refusals_name_the_path_and_the_nearest_key() {
        for (text, expected) in [
            ("calibraton = {}", "recipe: unknown key `calibraton`; did you mean `calibration`?"),
            (
                "[calibration]\nsampels = 3",
                "calibration: unknown key `sampels`; did you mean `samples`?",
            ),
            (
                "[calibration]\nsamples = 0",
                "calibration.samples: expected a positive integer, got integer `0`",
            ),
            ("[calibration]\nseed = -1", "calibration.seed: expected an integer of at least 0"),
            (
                "[calibration]\ntext = \"a\"\nids = \"b\"",
                "calibration: `text` and `ids` exclude each other; give one of them",
            ),
            ("[[step]]\npas = \"rtn\"", "step[0]: unknown key `pas`; did you mean `pass`?"),
            ("[[step]]\nsites = \"*\"", "step[0].pass: missing; name the pass to run"),
            ("[[step]]\npass = 3", "step[0].pass: expected a string, got integer `3`"),
            (
                "[[step]]\npass = \"rtn\"\nscheme = { bits = 5 }",
                "step[0].scheme.bits: expected 2, 3, 4 or 8, got 5",
            ),
            (
                "[[step]]\npass = \"rtn\"\nscheme = { bits = \"4\" }",
                "step[0].scheme.bits: expected an integer, got string `\"4\"`",
            ),
            (
                "[[step]]\npass = \"rtn\"\nscheme = { group = 4, bits = 4 }",
                "step[0].scheme: unknown key `group`",
            ),
            (
                "[[step]]\npass = \"rtn\"\nscheme = { bits = 4, group_size = 0 }",
                "step[0].scheme.group_size: expected a positive integer or -1 (per row), got 0",
            ),
            (
                "[[step]]\npass = \"rtn\"\nsites = [1]",
                "step[0].sites[0]: expected a string, got integer `1`",
            ),
            ("[step]\npass = \"rtn\"", "step: expected tables written as [[step]], got table"),
            (
                "[[emit]]\nlayuot = \"gptq\"",
                "emit[0]: unknown key `layuot`; did you mean `layout`?",
            ),
            (
                "[[emit]]\nlayout = \"gptq\"\ndir = \"../x\"",
                "emit[0].dir: expected a path below the output directory, got `../x`",
            ),
            (
                "[[step]]\npass = \"gptq\"\nupstream = \"origin\"",
                "step[0].upstream: expected `original` or `compressed`, got `origin`",
            ),
            ("[[emit]]\nlayout = \"gptq\"\ntarget = \"vlm\"", "emit[0].target: "),
            ("[gate]\nmax_kl = 0.1", "gate: unknown key `max_kl`; did you mean `max_kl_mean`?"),
            (
                "[gate]\nmax_kl_mean = nan",
                "gate.max_kl_mean: expected a finite number of at least 0",
            ),
            ("\n[[step]\n", "line 2: "),
        ] {
            let error = Recipe::parse(text).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{text}\n  {error}\n  {expected}");
        }
    }
}
