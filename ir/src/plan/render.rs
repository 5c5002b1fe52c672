//! The plan as text: compact tables, identical blocks told once.

use std::fmt::Write;

use super::{Plan, SitePlan};

/// Everything that `attar plan` prints.
pub(super) fn render(plan: &Plan) -> String {
    let mut out = String::new();
    write_plan(&mut out, plan).expect("writing to a string does not fail");
    out
}

fn write_plan(out: &mut String, plan: &Plan) -> std::fmt::Result {
    let graph = &plan.graph;
    writeln!(
        out,
        "model     {}, {} blocks, hidden {}, vocab {}{}, {} weights in the blocks' linears, {}",
        graph.family,
        graph.blocks.len(),
        graph.hidden,
        graph.vocab,
        if graph.tied { " (tied)" } else { "" },
        graph.block_weights(),
        bytes(plan.source_bytes),
    )?;
    if plan.calibration_tokens > 0 {
        writeln!(
            out,
            "data      {} tokens in windows of {}",
            plan.calibration_tokens, plan.context
        )?;
    } else {
        writeln!(out, "data      none needed")?;
    }
    writeln!(out, "\nsteps")?;
    for step in &plan.model {
        writeln!(out, "  {}: {}", step.label, step.does)?;
    }
    for (step, pass) in plan.steps.iter().zip(&plan.passes) {
        let needs = step.contract.needs | pass.surveys().unwrap_or_default();
        let needs: Vec<_> =
            needs.iter_names().map(|(name, _)| name.to_lowercase().replace('_', " ")).collect();
        let needs = if needs.is_empty() { "no statistics".to_owned() } else { needs.join(", ") };
        writeln!(out, "  {}: {} sites, {needs}", step.label, step.sites)?;
    }
    if let Some(step) = &plan.last {
        writeln!(out, "  {}: {}", step.label, step.does)?;
    }
    writeln!(out)?;
    write_sites(out, plan)?;
    writeln!(out, "\nartifacts")?;
    for emit in &plan.emits {
        writeln!(
            out,
            "  {} ({}){}: {} tensors, {}, {:.3} x the source, {:.3} bits per weight",
            emit.layout,
            emit.container,
            emit.dir.as_ref().map_or(String::new(), |dir| format!(" in {dir}/")),
            emit.tensors.len(),
            bytes(emit.tensor_bytes),
            emit.tensor_bytes as f64 / plan.source_bytes.max(1) as f64,
            emit.bits_per_weight,
        )?;
    }
    for note in &plan.notes {
        writeln!(out, "  note: {note}")?;
    }
    write_memory(out, plan)?;
    if plan.scratch_bytes > 0 {
        writeln!(out, "scratch   {} on disk", bytes(plan.scratch_bytes))?;
    }
    let stored = plan.stored();
    if stored.total() > 0 {
        writeln!(
            out,
            "kept      {} in the work directory: results {}, statistics {}, activations {}",
            bytes(stored.total()),
            bytes(stored.results),
            bytes(stored.statistics),
            bytes(stored.streams),
        )?;
    }
    let work = &plan.work;
    writeln!(
        out,
        "work      {}: forward {}, hessian {}, solve {}",
        flops(work.total()),
        flops(work.forward),
        flops(work.hessian),
        flops(work.solve),
    )
}

/// The peak, how it is kept, and what is held when.
fn write_memory(out: &mut String, plan: &Plan) -> std::fmt::Result {
    let (memory, limits) = (&plan.memory, &plan.limits);
    let peak = memory.worst().map(super::Moment::name).unwrap_or_default();
    write!(out, "\nmemory    {} at the peak ({peak})", bytes(memory.peak()))?;
    if let Some(budget) = plan.memory_budget {
        write!(out, ", budget {}", bytes(budget))?;
    }
    let threads = if limits.threads == 1 { "thread" } else { "threads" };
    write!(out, ", {} {threads}", limits.threads)?;
    let spilled = [
        (limits.stream == 0, "activations between blocks"),
        (limits.beside == 0, "activations inside blocks"),
        (limits.gram_on_scratch, "sums of Hessians"),
        (limits.factor_on_scratch, "factors"),
    ];
    let spilled: Vec<_> = spilled.iter().filter(|(on, _)| *on).map(|(_, name)| *name).collect();
    if plan.calibrates() && !spilled.is_empty() {
        write!(out, "; on scratch: {}", spilled.join(", "))?;
    }
    writeln!(out)?;
    let header =
        ["when", "peak", "block", "statistics", "solver", "stream", "windows", "tensors", "base"];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    for moment in &memory.moments {
        let mut row = vec![moment.name()];
        let sizes = [
            moment.total(),
            moment.block,
            moment.statistics,
            moment.solver,
            moment.stream,
            moment.activations,
            moment.tensors,
            moment.base,
        ];
        row.extend(sizes.map(|size| if size == 0 { "-".to_owned() } else { bytes(size) }));
        rows.push(row);
    }
    let widths: Vec<usize> = (0..rows[0].len())
        .map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0))
        .collect();
    for row in &rows {
        write!(out, "  {:<width$}", row[0], width = widths[0])?;
        for (cell, width) in row.iter().zip(&widths).skip(1) {
            write!(out, "  {cell:>width$}")?;
        }
        writeln!(out)?;
    }
    Ok(())
}

fn write_sites(out: &mut String, plan: &Plan) -> std::fmt::Result {
    let header = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
    let mut rows = vec![header(&["site", "out x in", "form", "scheme", "source"])];
    rows[0].extend(plan.emits.iter().map(|emit| emit.layout.to_string()));
    let relative = |site: &SitePlan| {
        let prefix = plan.graph.blocks.get(site.block).map_or("", |block| block.prefix.as_str());
        site.name.strip_prefix(prefix).unwrap_or(&site.name).to_owned()
    };
    let table_of = |block: usize| -> Vec<Vec<String>> {
        plan.sites
            .iter()
            .filter(|site| site.block == block)
            .map(|site| {
                let mut form = if site.before == site.after {
                    short(site.before)
                } else {
                    format!("{} -> {}", short(site.before), short(site.after))
                };
                if let Some(density) = site.density {
                    form.push_str(&format!(", {:.1} % kept", 100.0 * density));
                }
                if let Some(rank) = site.rank {
                    form.push_str(&format!(", rank {rank}"));
                }
                if let Some(rank) = site.correction {
                    form.push_str(&format!(", correction of rank {rank}"));
                }
                let mut row = vec![
                    format!("  {}", relative(site)),
                    format!("{} x {}", site.out_features, site.in_features),
                    form,
                    site.scheme.map_or("-".to_owned(), attar_tensor::QuantScheme::label),
                    bytes(site.dense_bytes),
                ];
                row.extend((0..plan.emits.len()).map(|emit| {
                    bytes(site.emitted_bytes.get(emit).copied().unwrap_or(site.dense_bytes))
                }));
                row
            })
            .collect()
    };
    let count = plan.graph.blocks.len();
    let mut first = 0;
    while first <= count {
        let table = table_of(first);
        let mut last = first;
        while first < count && last + 1 < count && table_of(last + 1) == table {
            last += 1;
        }
        let title = match (first == count, first == last) {
            (true, _) => "head".to_owned(),
            (_, true) => format!("block {first}"),
            _ => format!("blocks {first}-{last}"),
        };
        rows.push(vec![title]);
        rows.extend(table);
        first = last + 1;
    }
    let columns = rows[0].len();
    let width = |column: usize| {
        rows.iter().filter(|row| row.len() > 1).map(|row| row[column].len()).max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..columns).map(width).collect();
    for row in &rows {
        let cells: Vec<_> =
            row.iter()
                .zip(&widths)
                .enumerate()
                .map(|(column, (cell, width))| {
                    if column >= 4 { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
                })
                .collect();
        writeln!(out, "{}", cells.join("  ").trim_end())?;
    }
    Ok(())
}

/// A form without what is usual: dense and of full rank.
fn short(form: crate::Form) -> String {
    form.to_string().replace(", dense", "").replace(", full rank", "")
}

/// Bytes for people, powers of 1000.
fn bytes(count: usize) -> String {
    scaled(count as f64, &["B", "kB", "MB", "GB", "TB"])
}

fn flops(count: f64) -> String {
    scaled(count, &["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"])
}

fn scaled(mut value: f64, units: &[&str]) -> String {
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{value:.0} {}", units[0])
    } else {
        format!("{value:.2} {}", units[unit])
    }
}
