//! `attar targets`.

use attar_ir::target::{Level, Profile};
use serde_json::json;

use crate::{Error, args::Targets};

pub(crate) fn targets(args: &Targets) -> Result<bool, Error> {
    let profiles = match &args.name {
        Some(target) => vec![Profile::of(target)?],
        None => Profile::all()?,
    };
    if args.json {
        say!("{}", serde_json::to_string_pretty(&json!({"targets": profiles}))?);
        return Ok(true);
    }
    for profile in &profiles {
        say!("{}: {}", profile.name, profile.about);
        say!("  versions: {}", profile.versions.join("; "));
        say!("  checked:  {}", profile.checked);
        for rule in &profile.rules {
            let level = if rule.level == Level::Refuse { "refuses" } else { "warns" };
            let doubt = if rule.unverified.is_some() { ", not verified" } else { "" };
            say!("  {} ({level}{doubt}): {}", rule.id, rule.reason);
            if args.name.is_some() {
                let check = serde_json::to_value(&rule.check)?;
                say!("      check:  {check}");
                say!("      remedy: {}", rule.remedy);
                for source in &rule.source {
                    say!("      source: {source}");
                }
                if let Some(unverified) = &rule.unverified {
                    say!("      not verified: {unverified}");
                }
            }
        }
    }
    Ok(true)
}
