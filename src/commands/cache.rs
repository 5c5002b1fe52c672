//! `attar cache`: what a work directory holds.

use std::path::Path;

use attar_formats::stage::{Entry, Stage};
use serde_json::json;

use crate::{
    Error,
    args::{Cache, CacheAction},
};

fn open(dir: &Path) -> Result<Stage, Error> {
    if !dir.is_dir() {
        return Err(format!("{}: no such directory", dir.display()).into());
    }
    Ok(Stage::open(dir)?)
}

fn total(entries: &[Entry]) -> f64 {
    entries.iter().map(|entry| entry.bytes).sum::<u64>() as f64 / 1e6
}

pub(crate) fn cache(args: &Cache) -> Result<bool, Error> {
    match &args.action {
        CacheAction::List { dir, json } => {
            let entries = open(dir)?.list()?;
            if *json {
                say!("{}", serde_json::to_string_pretty(&json!({"objects": entries}))?);
                return Ok(true);
            }
            for entry in &entries {
                let (kind, label) = entry
                    .info
                    .as_ref()
                    .map_or(("damaged", ""), |info| (info.kind.as_str(), info.label.as_str()));
                say!(
                    "{}  {:>10.3} MB  {:>8} s ago  {kind:<9}  {label}",
                    &entry.key[..12.min(entry.key.len())],
                    entry.bytes as f64 / 1e6,
                    entry.age
                );
            }
            say!("{} objects, {:.3} MB", entries.len(), total(&entries));
            Ok(true)
        }
        CacheAction::Verify { dir } => {
            let stage = open(dir)?;
            let (all, damaged) = (stage.list()?.len(), stage.verify()?);
            for key in &damaged {
                say!("DAMAGED {key}; `attar compress` takes it away and does its work again");
            }
            say!("{all} objects, {} damaged", damaged.len());
            Ok(damaged.is_empty())
        }
        CacheAction::Prune { dir, limit } => {
            let stage = open(dir)?;
            let gone = stage.prune(*limit)?;
            let left = stage.list()?;
            say!(
                "{} objects removed ({:.3} MB); {} left ({:.3} MB)",
                gone.len(),
                total(&gone),
                left.len(),
                total(&left)
            );
            Ok(true)
        }
    }
}
