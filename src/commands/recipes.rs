//! `attar passes --markdown`: RECIPES.md, made of the list of passes.

use std::fmt::Write;

use attar_ir::PassDef;
use serde_json::Value;

/// Every pass with its paper, options and a recipe that runs on any small model.
pub(crate) fn markdown(passes: &[&PassDef]) -> String {
    let mut out = String::new();
    let _ = write(&mut out, passes);
    out
}

fn write(out: &mut String, passes: &[&PassDef]) -> std::fmt::Result {
    out.push_str(
        "# Recipes\n\nMade by `attar passes --markdown`; a test holds this file to what it prints and runs every \
         recipe on the demo model. A\nrecipe is a list of steps in order: prune, transform, quantize. Keys that \
         every step takes (`sites`, `keep`, `id`, `after`,\n`upstream`) stand in the JSON Schema, `attar passes \
         --schema`. Calibration data comes from `--text` or `--ids`:\n\n```\nattar compress MODEL --recipe \
         recipe.toml --text calibration.txt --out OUT\n```\n",
    );
    for pass in passes {
        writeln!(out, "\n## {}\n\n{}. {}.", pass.name, capital(pass.summary), pass.paper)?;
        if pass.takes_scheme {
            writeln!(out, "Takes a `scheme`.")?;
        }
        let schema = (pass.schema)().to_value();
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
        writeln!(out, "\n```toml\n{}\n```", pass.example.trim_end())?;
    }
    Ok(())
}

fn capital(text: &str) -> String {
    let mut rest = text.chars();
    rest.next().map_or_else(String::new, |first| first.to_uppercase().chain(rest).collect())
}
