//! `attar passes --markdown`: RECIPES.md, made of the list of passes.

use std::fmt::Write;

use attar_ir::recipe::Known;
use serde_json::Value;

/// Every pass with its paper, options and a recipe that runs on any small model.
pub(crate) fn markdown(passes: Known<'_>) -> String {
    let mut out = String::new();
    let _ = write(&mut out, passes);
    out
}

fn write(out: &mut String, passes: Known<'_>) -> std::fmt::Result {
    out.push_str(
        "# Recipes\n\nMade by `attar passes --markdown`; a test holds this file to what it prints and runs every \
         recipe on the demo model. A\nrecipe is a list of steps in order: prune, transform, quantize. Keys that \
         every step takes (`sites`, `keep`, `id`, `after`,\n`upstream`) stand in the JSON Schema, `attar passes \
         --schema`. Calibration data comes from `--text` or `--ids`:\n\n```\nattar compress MODEL --recipe \
         recipe.toml --text calibration.txt --out OUT\n```\n",
    );
    for pass in passes.model {
        let does = "Works on the model as a whole, before all passes on blocks.";
        section(out, (pass.name, pass.summary, pass.paper), does, (pass.schema)(), pass.example)?;
    }
    for pass in passes.block {
        let does = if pass.takes_scheme { "Takes a `scheme`." } else { "" };
        section(out, (pass.name, pass.summary, pass.paper), does, (pass.schema)(), pass.example)?;
    }
    Ok(())
}

fn section(
    out: &mut String,
    (name, summary, paper): (&str, &str, &str),
    does: &str,
    schema: schemars::Schema,
    example: &str,
) -> std::fmt::Result {
    writeln!(out, "\n## {name}\n\n{}. {paper}.", capital(summary))?;
    if !does.is_empty() {
        writeln!(out, "{does}")?;
    }
    let schema = schema.to_value();
    if let Some(options) = schema.get("properties").and_then(Value::as_object)
        && !options.is_empty()
    {
        writeln!(out, "\n| option | default | |\n|---|---|---|")?;
        for (name, option) in options {
            let default = option.get("default").filter(|value| !value.is_null());
            let default = default.map_or("-".to_owned(), Value::to_string);
            let text = option.get("description").and_then(Value::as_str).unwrap_or_default();
            writeln!(out, "| `{name}` | {default} | {} |", text.replace('\n', " "))?;
        }
    }
    writeln!(out, "\n```toml\n{}\n```", example.trim_end())
}

fn capital(text: &str) -> String {
    let mut rest = text.chars();
    rest.next().map_or_else(String::new, |first| first.to_uppercase().chain(rest).collect())
}
