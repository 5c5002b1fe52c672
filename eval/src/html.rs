//! A report as one HTML page without scripts or outside files: what it cost, where the error lies, where the
//! time went.

use std::fmt::Write;

use attar_ir::{Event, ModelEntry};

use crate::{
    Evaluation, Report,
    report::{Phase, SiteEntry, Span, Timings},
};

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1d2733}\
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse}\
td,th{padding:.15rem .8rem .15rem 0;text-align:left;white-space:nowrap}td.n,th.n{text-align:right}\
tr+tr{border-top:1px solid #e4e8ee}small{color:#5b6878}svg{max-width:100%}\
.k{font-size:1.3rem;font-weight:600}.facts td{padding-right:2.5rem;border:0}";
/// One colour per part of a block, told apart without red and green alone.
const COLOURS: [&str; 8] =
    ["#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2", "#97bbf5", "#9c6b4e"];
const WIDTH: f64 = 900.0;

pub(crate) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn mb(bytes: u64) -> String {
    format!("{:.2} MB", bytes as f64 / 1e6)
}

/// The relative error that is plotted: of the output where a Hessian was there, else of the weight.
fn error_of(site: &SiteEntry) -> f64 {
    site.result.output_error.unwrap_or(site.result.weight_error)
}

/// The page.
pub fn page(report: &Report) -> String {
    let mut out = String::new();
    // Writing into a String does not fail.
    let _ = write_page(&mut out, report);
    out
}

fn write_page(out: &mut String, report: &Report) -> std::fmt::Result {
    write!(
        out,
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>Attar report</title>\
         <style>{STYLE}</style><h1>Compression report</h1><table class=\"facts\"><tr>"
    )?;
    let ratio = report.file_bytes as f64 / report.source_bytes.max(1) as f64;
    for (value, name) in [
        (escape(&report.layout), "layout"),
        (mb(report.file_bytes), &*format!("of {}, {ratio:.3} x", mb(report.source_bytes))),
        (format!("{:.3}", report.bits_per_weight), "bits per weight"),
    ] {
        write!(out, "<td><span class=\"k\">{value}</span><br><small>{}</small>", escape(name))?;
    }
    out.push_str("</table>");
    if let Some(eval) = &report.eval {
        accuracy(out, eval)?;
    } else {
        out.push_str(
            "<p>Accuracy was not measured in this run; give <code>--eval-text</code>, or run \
             <code>attar eval</code> with <code>--reference</code>.</p>",
        );
    }
    if !report.model.is_empty() {
        whole_model(out, &report.model)?;
        crate::curve::trainings(out, &report.model)?;
    }
    let quantized: Vec<&SiteEntry> = report.sites.iter().filter(|s| s.scheme.is_some()).collect();
    if !quantized.is_empty() {
        errors(out, &quantized)?;
    }
    sparsity(out, report)?;
    time(out, &report.timings)?;
    timeline(out, &report.timeline)?;
    if report.reused.0 > 0 {
        write!(
            out,
            "<p>{} of {} results were in the work directory already.</p>",
            report.reused.0, report.reused.1
        )?;
    }
    write!(
        out,
        "<h2>Memory</h2><p>Peak {}, predicted {}.</p>",
        report.measured_peak_bytes.map_or_else(|| "not measured".to_owned(), mb),
        mb(report.predicted_peak_bytes)
    )?;
    if !report.notes.is_empty() {
        out.push_str("<h2>Notes</h2><ul>");
        for note in &report.notes {
            write!(out, "<li>{}", escape(note))?;
        }
        out.push_str("</ul>");
    }
    sites(out, report)?;
    ledger(out, report)?;
    writeln!(out, "<p><small>attar {}</small></html>", escape(&report.attar))
}

/// What passes on the whole model took away.
fn whole_model(out: &mut String, entries: &[ModelEntry]) -> std::fmt::Result {
    if entries.iter().all(|entry| entry.training.is_some()) {
        return Ok(());
    }
    out.push_str(
        "<h2>Whole model</h2><table><tr><th>step<th>what<th class=\"n\">before<th class=\"n\">after\
         <th class=\"n\">output error<th>removed",
    );
    for entry in entries.iter().filter(|entry| entry.training.is_none()) {
        let error = entry.output_error.map_or_else(|| "-".to_owned(), |e| format!("{e:.3e}"));
        let first: Vec<_> = entry.removed.iter().take(12).map(usize::to_string).collect();
        let more = entry.removed.len().saturating_sub(first.len());
        write!(
            out,
            "<tr><td>{}<td>{}<td class=\"n\">{}<td class=\"n\">{}<td class=\"n\">{error}<td>{}{}",
            escape(&entry.step),
            escape(&entry.what),
            entry.before,
            entry.after,
            first.join(", "),
            if more > 0 { format!(" and {more} more") } else { String::new() }
        )?;
    }
    out.push_str("</table>");
    Ok(())
}

/// Zeros per site that was pruned.
fn sparsity(out: &mut String, report: &Report) -> std::fmt::Result {
    if report.sparsity.is_empty() {
        return Ok(());
    }
    out.push_str("<h2>Zeros</h2><table><tr><th>site<th class=\"n\">% zero<th>pattern, read back");
    for line in &report.sparsity {
        write!(
            out,
            "<tr><td>{}<td class=\"n\">{:.2}<td>{}",
            escape(&line.site),
            100.0 * line.zeros,
            line.pattern.as_deref().unwrap_or("-")
        )?;
    }
    out.push_str("</table>");
    Ok(())
}

fn accuracy(out: &mut String, eval: &Evaluation) -> std::fmt::Result {
    write!(
        out,
        "<h2>Accuracy</h2><table><tr><th>metric<th class=\"n\">value<th class=\"n\">95 % interval"
    )?;
    let mut row =
        |name: &str, value: f64, interval: Option<crate::Interval>, unit: f64, digits: usize| {
            let range = interval.map_or_else(String::new, |i| {
                format!("{:.digits$} – {:.digits$}", i.low * unit, i.high * unit)
            });
            write!(
                out,
                "<tr><td>{name}<td class=\"n\">{:.digits$}<td class=\"n\">{range}",
                value * unit
            )
        };
    if let Some(reference) = eval.reference_perplexity {
        row("perplexity, original", reference, None, 1.0, 3)?;
    }
    row("perplexity", eval.perplexity, Some(eval.perplexity_interval), 1.0, 3)?;
    if let Some(ratio) = eval.perplexity_ratio {
        row("perplexity ratio", ratio, eval.perplexity_ratio_interval, 1.0, 4)?;
    }
    if let Some(kl) = eval.kl_mean {
        row("KL divergence (nats)", kl, eval.kl_mean_interval, 1.0, 5)?;
    }
    if let Some(same) = eval.top1_agreement {
        row("same most likely token (%)", same, eval.top1_agreement_interval, 100.0, 2)?;
    }
    write!(
        out,
        "</table><p><small>{} positions in {} windows of {} tokens; perplexities compare only at the same \
         windows.</small>",
        eval.tokens, eval.windows, eval.context
    )
}

/// Relative error of every quantized site on a logarithmic scale, one colour per part of the block.
fn errors(out: &mut String, sites: &[&SiteEntry]) -> std::fmt::Result {
    const TOP: f64 = 12.0;
    const HEIGHT: f64 = 200.0;
    const LEFT: f64 = 60.0;
    let part = |site: &SiteEntry| site.result.site.rsplit('.').next().unwrap_or("").to_owned();
    let mut parts: Vec<String> = Vec::new();
    for site in sites {
        if !parts.contains(&part(site)) {
            parts.push(part(site));
        }
    }
    let logs: Vec<f64> = sites.iter().map(|site| error_of(site).max(1e-12).log10()).collect();
    let low = logs.iter().copied().fold(f64::INFINITY, f64::min).floor();
    let high = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max).ceil().max(low + 1.0);
    let y = |log: f64| TOP + (high - log) / (high - low) * HEIGHT;
    let what = if sites.iter().all(|s| s.result.output_error.is_some()) {
        "output, on the calibration inputs"
    } else {
        "weight"
    };
    write!(
        out,
        "<h2>Relative squared error of the {what}</h2><svg viewBox=\"0 0 {WIDTH} {}\" role=\"img\" \
         aria-label=\"error per site\">",
        TOP + HEIGHT + 46.0
    )?;
    let mut tick = low;
    while tick <= high {
        write!(
            out,
            "<line x1=\"{LEFT}\" x2=\"{WIDTH}\" y1=\"{0:.1}\" y2=\"{0:.1}\" stroke=\"#e4e8ee\"/>\
             <text x=\"{1}\" y=\"{2:.1}\" font-size=\"12\" text-anchor=\"end\" fill=\"#5b6878\">1e{tick}</text>",
            y(tick),
            LEFT - 6.0,
            y(tick) + 4.0
        )?;
        tick += 1.0;
    }
    let step = (WIDTH - LEFT - 10.0) / sites.len() as f64;
    let radius = (step * 0.45).clamp(2.0, 5.0);
    for (at, (site, log)) in sites.iter().zip(&logs).enumerate() {
        let colour = parts.iter().position(|p| *p == part(site)).unwrap_or(0) % COLOURS.len();
        write!(
            out,
            "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"{radius:.1}\" fill=\"{}\"><title>{}: {:.3e}</title></circle>",
            LEFT + (at as f64 + 0.5) * step,
            y(*log),
            COLOURS[colour],
            escape(&site.result.site),
            error_of(site)
        )?;
    }
    for (at, part) in parts.iter().enumerate() {
        let x = LEFT + at as f64 * 115.0;
        let base = TOP + HEIGHT + 36.0;
        write!(
            out,
            "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"5\" fill=\"{}\"/><text x=\"{:.1}\" y=\"{base:.1}\" \
             font-size=\"13\" fill=\"#1d2733\">{}</text>",
            x + 5.0,
            base - 4.0,
            COLOURS[at % COLOURS.len()],
            x + 15.0,
            escape(part)
        )?;
    }
    write!(
        out,
        "<text x=\"{LEFT}\" y=\"{:.1}\" font-size=\"12\" fill=\"#5b6878\">sites in the order of the model, first block left</text></svg>",
        TOP + HEIGHT + 16.0
    )
}

fn time(out: &mut String, t: &Timings) -> std::fmt::Result {
    let phases = [
        ("read", t.read),
        ("forward", t.forward),
        ("statistics", t.statistics),
        ("passes", t.solve),
        ("store", t.store),
        ("write", t.write),
        ("verify", t.verify),
        ("eval", t.eval),
    ];
    let known: f64 = phases.iter().map(|(_, s)| s).sum();
    let total = t.total.max(known).max(1e-9);
    write!(
        out,
        "<h2>Time: {total:.1} s</h2><svg viewBox=\"0 0 {WIDTH} 56\" role=\"img\" aria-label=\"time by phase\">"
    )?;
    let mut x = 0.0;
    for (at, (name, seconds)) in phases.iter().enumerate() {
        let width = seconds / total * WIDTH;
        write!(
            out,
            "<rect x=\"{x:.1}\" y=\"0\" width=\"{width:.1}\" height=\"24\" fill=\"{0}\"><title>{name} {seconds:.1} s</title></rect>\
             <rect x=\"{1}\" y=\"36\" width=\"10\" height=\"10\" fill=\"{0}\"/>\
             <text x=\"{2}\" y=\"46\" font-size=\"13\" fill=\"#1d2733\">{name} {seconds:.1}</text>",
            COLOURS[at],
            at * 112,
            at * 112 + 15
        )?;
        x += width;
    }
    out.push_str("</svg>");
    Ok(())
}

/// What ran when, one row per phase; rows that overlap ran side by side.
fn timeline(out: &mut String, spans: &[Span]) -> std::fmt::Result {
    const ROWS: [(Phase, &str); 8] = [
        (Phase::Read, "read"),
        (Phase::Calibrate, "calibrate"),
        (Phase::Solve, "passes"),
        (Phase::Store, "store"),
        (Phase::Emit, "write"),
        (Phase::Verify, "verify"),
        (Phase::Eval, "eval"),
        (Phase::Seal, "seal"),
    ];
    const LEFT: f64 = 70.0;
    let end = spans.iter().map(|span| span.end).fold(0.0, f64::max);
    if end <= 0.0 {
        return Ok(());
    }
    let rows: Vec<_> =
        ROWS.iter().filter(|(phase, _)| spans.iter().any(|s| s.phase == *phase)).collect();
    let height = rows.len() * 18 + 20;
    write!(out, "<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"time line\">")?;
    let x = |t: f64| LEFT + t / end * (WIDTH - LEFT);
    for (row, (phase, name)) in rows.iter().enumerate() {
        let y = row * 18;
        write!(
            out,
            "<text x=\"0\" y=\"{}\" font-size=\"13\" fill=\"#1d2733\">{name}</text>",
            y + 12
        )?;
        for span in spans.iter().filter(|span| span.phase == *phase) {
            write!(
                out,
                "<rect x=\"{:.2}\" y=\"{}\" width=\"{:.2}\" height=\"13\" fill=\"{}\"><title>{} {:.2} s</title></rect>",
                x(span.start),
                y + 1,
                ((span.end - span.start) / end * (WIDTH - LEFT)).max(0.4),
                COLOURS[row % COLOURS.len()],
                escape(&span.what),
                span.end - span.start
            )?;
        }
    }
    let base = rows.len() * 18 + 14;
    write!(
        out,
        "<text x=\"{LEFT}\" y=\"{base}\" font-size=\"12\" fill=\"#5b6878\">0 s</text>\
         <text x=\"{WIDTH}\" y=\"{base}\" font-size=\"12\" fill=\"#5b6878\" text-anchor=\"end\">{end:.1} s</text></svg>"
    )
}

fn sites(out: &mut String, report: &Report) -> std::fmt::Result {
    write!(
        out,
        "<details><summary>{} steps on sites</summary><table><tr><th>site<th>pass<th>scheme\
         <th class=\"n\">weight error<th class=\"n\">output error<th>events",
        report.sites.len()
    )?;
    for site in &report.sites {
        let events: Vec<String> = site.result.events.iter().map(told).collect();
        write!(
            out,
            "<tr><td>{}<td>{}<td>{}<td class=\"n\">{:.3e}<td class=\"n\">{}<td>{}",
            escape(&site.result.site),
            escape(&site.result.pass),
            escape(site.scheme.as_deref().unwrap_or("-")),
            site.result.weight_error,
            site.result.output_error.map_or_else(|| "-".to_owned(), |e| format!("{e:.3e}")),
            escape(&events.join("; "))
        )?;
    }
    out.push_str("</table></details>");
    Ok(())
}

/// One row for every tensor of the checkpoint; long tables are folded up.
fn ledger(out: &mut String, report: &Report) -> std::fmt::Result {
    const OPEN: usize = 30;
    if report.ledger.is_empty() {
        return Ok(());
    }
    write!(
        out,
        "<h2>Every tensor</h2><details{}><summary>{}</summary><table><tr><th>tensor<th>became<th>",
        if report.ledger.len() <= OPEN { " open" } else { "" },
        escape(&attar_ir::ledger::summary(&report.ledger))
    )?;
    for line in &report.ledger {
        let (tensor, detail) = (escape(&line.tensor), escape(&line.detail));
        write!(out, "<tr><td>{tensor}<td>{}<td>{detail}", line.fate)?;
    }
    out.push_str("</table></details>");
    Ok(())
}

fn told(event: &Event) -> String {
    match event {
        Event::DampeningRaised { percdamp, failures } => {
            format!("dampening raised to {percdamp} after {failures} failures")
        }
        Event::DeadColumns { count } => format!("{count} dead columns"),
        Event::LeftAlone { reason } => format!("left as it was: {reason}"),
        Event::Learned { steps, before, after } => {
            format!("block loss {before:.4} to {after:.4}, {steps} steps")
        }
        Event::Chosen { name, value } => format!("{name} {value}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use attar_ir::{
        SiteReport,
        ledger::{Fate, Line},
    };

    #[test]
    fn names_are_escaped_and_every_site_is_drawn() {
        let site = |name: &str, error| SiteEntry {
            result: SiteReport {
                site: name.into(),
                pass: "gptq".into(),
                weight_error: error,
                output_error: Some(error),
                events: vec![Event::DeadColumns { count: 3 }],
            },
            scheme: Some("w4 g128 sym".into()),
            bits: Some(4),
            seconds: 0.1,
            step: "step[0] (gptq)".into(),
            statistics: None,
        };
        let span = |phase, start, end| Span { phase, what: "a&b".into(), start, end };
        let report = Report {
            sparsity: vec![crate::report::Zeros {
                site: "model.layers.0.mlp.up_proj".into(),
                zeros: 0.5,
                pattern: Some("2:4".into()),
            }],
            attar: "0".into(),
            layout: "<b>".into(),
            isa: "scalar".into(),
            inputs: crate::report::Inputs::default(),
            file_bytes: 10,
            source_bytes: 40,
            bits_per_weight: 4.1,
            model: Vec::new(),
            sites: vec![site("a.q_proj", 1e-3), site("a.<script>", 0.0)],
            eval: None,
            notes: vec!["a & b".into()],
            ledger: vec![Line {
                tensor: "<i>.weight".into(),
                fate: Fate::Dropped,
                detail: "\"x\"".into(),
                becomes: Vec::new(),
            }],
            predicted_peak_bytes: 1,
            measured_peak_bytes: None,
            timings: Timings::default(),
            timeline: vec![span(Phase::Read, 0.0, 0.5), span(Phase::Solve, 0.4, 2.0)],
            reused: (1, 2),
        };
        let page = page(&report);
        assert!(!page.contains("<script>") && !page.contains("<b>") && page.contains("a &amp; b"));
        assert_eq!(page.matches("<title>a.").count(), 2);
        assert!(page.contains("a&amp;b 1.60 s") && page.contains("1 of 2 results"));
        assert!(page.contains("&lt;i&gt;.weight<td>dropped<td>&quot;x&quot;"));
        assert!(page.contains("1 source tensors: 1 dropped"));
        assert!(page.contains("3 dead columns") && !page.contains("NaN") && !page.contains("inf"));
    }
}
