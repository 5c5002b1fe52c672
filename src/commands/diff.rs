//! `attar diff`: two artifacts or checkpoints, tensor by tensor; one tensor is in memory at a time.

use std::{collections::BTreeMap, path::Path};

use attar_eval::Report;
use attar_ir::Site;
use attar_tensor::{
    BlockQuantized, BlockType, QuantizedLinear, TensorHeader, TensorSource, TensorView,
};
use serde::Serialize;
use serde_json::{Value, json};

use super::evaluate;
use crate::{
    Error,
    args::Diff,
    packed::Opened,
    provenance::{Record, Weights},
};

/// Elements that are compared at a time.
const CHUNK: usize = 1 << 16;
/// Facts that are compared by their parts, or follow from what is.
const OWN_SECTION: &[&str] = &["recipe", "sources", "files"];

/// Name of the embedding, whatever a tied checkpoint calls it.
const EMBEDDING: &str = "model.embed_tokens.weight";

/// A fact that differs.
#[derive(Debug, Serialize)]
struct Fact {
    name: String,
    a: Value,
    b: Value,
}

/// A tensor, or all parts of a packed linear, that is not the same in both.
#[derive(Debug, Serialize)]
struct Line {
    name: String,
    /// `only in a`, `only in b`, `scheme`, `layout`, `dtype`, `shape` or `values`.
    differs: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    a: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    b: Option<String>,
    bytes_a: usize,
    bytes_b: usize,
    /// Fraction of codes that differ, where both are quantized to the same number of bits.
    #[serde(skip_serializing_if = "Option::is_none")]
    codes: Option<f64>,
    /// Largest absolute difference of values.
    #[serde(skip_serializing_if = "Option::is_none")]
    max_abs: Option<f64>,
    /// `‖A − B‖ / ‖A‖`.
    #[serde(skip_serializing_if = "Option::is_none")]
    relative: Option<f64>,
    /// Why values were not compared.
    #[serde(skip_serializing_if = "Option::is_none")]
    note: Option<String>,
}

/// Errors that the reports state for one step on one site.
#[derive(Debug, Serialize)]
struct Errors {
    site: String,
    pass: String,
    weight_a: Option<f64>,
    weight_b: Option<f64>,
    output_a: Option<f64>,
    output_b: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Comparison {
    identical: bool,
    a: Value,
    b: Value,
    facts: Vec<Fact>,
    /// Lines of the recipe, ` ` in both, `-` only in A, `+` only in B; empty when all are in both.
    recipe: Vec<String>,
    tensors_identical: usize,
    tensors: Vec<Line>,
    errors: Vec<Errors>,
    notes: Vec<String>,
}

/// One side.
struct Side {
    weights: Weights,
    record: Record,
}

/// What is compared as one.
enum Unit<'a> {
    Packed(&'a Opened, &'a Site),
    Plain(&'a TensorHeader),
}

impl Side {
    fn open(folder: &Path) -> Result<Self, Error> {
        Ok(Self { weights: Weights::open(folder)?, record: Record::open(folder)? })
    }

    /// By name: packed linears under the name of their weight, every other tensor under its own.
    fn units(&self) -> BTreeMap<String, Unit<'_>> {
        let mut units = BTreeMap::new();
        let mut of_linears = Vec::new();
        if let Some(model) = self.weights.model() {
            for site in model.linears() {
                if model.scheme_of(site).is_some() {
                    let parts = self.weights.parts(&site.name);
                    of_linears.extend(parts.into_iter().map(|header| header.name.as_str()));
                    units.insert(format!("{}.weight", site.name), Unit::Packed(model, site));
                }
            }
        }
        of_linears.sort_unstable();
        for header in self.weights.headers() {
            if of_linears.binary_search(&header.name.as_str()).is_err() {
                // A tied checkpoint may store its one matrix as the head's.
                let embedding = self.weights.model().is_some_and(|model| {
                    let graph = &model.decoder.graph;
                    graph.tied && graph.embedding == header.name
                });
                let name = if embedding { EMBEDDING } else { &header.name };
                units.insert(name.to_owned(), Unit::Plain(header));
            }
        }
        units
    }

    fn summary(&self, folder: &Path) -> Result<Value, Error> {
        let checkpoint = self.weights.checkpoint();
        let report = self.record.report.as_ref();
        Ok(json!({
            "path": folder,
            "layout": self.weights.layout(),
            "file_bytes": match self.weights.model() {
                Some(model) => model.file_bytes()?,
                None => checkpoint.file_bytes()?,
            },
            "tensors": self.weights.headers().count(),
            "bits_per_weight": self.weights.model().map(Opened::bits_per_weight),
            "eval": report.and_then(|report| report.eval.as_ref()),
            "seconds": report.map(|report| report.timings.total),
        }))
    }

    fn plain(&self, name: &str) -> Result<TensorView<'_>, Error> {
        self.weights.read(name)
    }

    fn release(&self, name: &str) {
        self.weights.checkpoint().release(name);
    }
}

impl Unit<'_> {
    fn bytes(&self) -> usize {
        match self {
            Self::Packed(model, site) => {
                model.weight_tensors(site).iter().map(|(_, bytes)| bytes).sum()
            }
            Self::Plain(header) => header.bytes(),
        }
    }

    /// Scheme and layout, or dtype and shape.
    fn label(&self) -> String {
        match self {
            Self::Packed(model, site) => format!(
                "{} {}",
                model.layout().unwrap_or("packed"),
                model.scheme_of(site).map_or("?".into(), attar_tensor::QuantScheme::label)
            ),
            Self::Plain(header) => format!("{} {:?}", header.dtype, header.shape),
        }
    }
}

/// Sums of a comparison.
#[derive(Debug, Default)]
struct Distance {
    error: f64,
    norm: f64,
    max_abs: f64,
}

impl Distance {
    fn add(&mut self, a: &[f32], b: &[f32]) {
        for (&a, &b) in a.iter().zip(b) {
            // The same bits are no difference, whatever they mean.
            let difference =
                if a.to_bits() == b.to_bits() { 0.0 } else { f64::from(a) - f64::from(b) };
            let difference = if difference.is_nan() { f64::INFINITY } else { difference };
            self.error += difference * difference;
            self.norm += f64::from(a) * f64::from(a);
            self.max_abs = self.max_abs.max(difference.abs());
        }
    }

    fn put(&self, line: &mut Line) {
        line.max_abs = Some(self.max_abs);
        let relative = if self.error > 0.0 {
            (self.error / self.norm.max(f64::MIN_POSITIVE)).sqrt()
        } else {
            0.0
        };
        line.relative = Some(relative);
    }
}

/// The codes of a packed linear.
enum Codes {
    Affine(QuantizedLinear),
    Blocks(BlockQuantized),
}

impl Codes {
    fn shape(&self) -> [usize; 2] {
        match self {
            Self::Affine(weight) => [weight.out_features, weight.in_features],
            Self::Blocks(weight) => [weight.out_features, weight.in_features],
        }
    }

    /// Codes, and what they are codes of: they compare with those of the same kind.
    fn codes(&self) -> (Option<BlockType>, u8, &[u8]) {
        match self {
            Self::Affine(weight) => (None, weight.scheme.bits, &weight.codes),
            Self::Blocks(weight) => (Some(weight.block), weight.block.bits(), &weight.codes),
        }
    }

    fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        match self {
            Self::Affine(weight) => weight.dequantize_row(row, out),
            Self::Blocks(weight) => weight.dequantize_row(row, out),
        }
    }
}

fn unpack(model: &Opened, site: &Site) -> Result<Codes, Error> {
    let packed = model.packed(site)?.ok_or("a unit is packed")?;
    let layout = attar_kernels::layout_of(&packed)?;
    let codes = match layout.block_type() {
        Some(_) => layout.unpack_blocks(&packed).map(Codes::Blocks),
        None => layout.unpack(&packed).map(Codes::Affine),
    };
    Ok(codes.map_err(|error| format!("{}: {error}", site.name))?)
}

/// True when both sides hold the same parts with the same bytes.
fn same_parts(a: &Side, b: &Side, site: &str) -> Result<bool, Error> {
    let (ours, theirs) = (a.weights.parts(site), b.weights.parts(site));
    if ours != theirs {
        return Ok(false);
    }
    for header in ours {
        let same = a.plain(&header.name)?.bytes() == b.plain(&header.name)?.bytes();
        a.release(&header.name);
        b.release(&header.name);
        if !same {
            return Ok(false);
        }
    }
    Ok(true)
}

fn compare_quantized(a: &Codes, b: &Codes, line: &mut Line) {
    if a.shape() != b.shape() {
        line.differs = "shape";
        return;
    }
    let [rows_of, columns] = a.shape();
    let ((kind_a, bits_a, codes_a), (kind_b, bits_b, codes_b)) = (a.codes(), b.codes());
    if (kind_a, bits_a) == (kind_b, bits_b) {
        let differ = codes_a.iter().zip(codes_b).filter(|(a, b)| a != b).count();
        line.codes = Some(differ as f64 / codes_a.len().max(1) as f64);
    }
    let mut rows = (vec![0.0f32; columns], vec![0.0f32; columns]);
    let mut distance = Distance::default();
    for row in 0..rows_of {
        a.dequantize_row(row, &mut rows.0);
        b.dequantize_row(row, &mut rows.1);
        distance.add(&rows.0, &rows.1);
    }
    distance.put(line);
}

/// A packed linear against dense values; `packed_first` says which side is A.
fn compare_mixed(
    packed: &Codes,
    dense: &TensorView<'_>,
    packed_first: bool,
    line: &mut Line,
) -> Result<(), Error> {
    if dense.shape() != packed.shape() {
        line.differs = "shape";
        return Ok(());
    }
    let [rows_of, columns] = packed.shape();
    let mut rows = (vec![0.0f32; columns], vec![0.0f32; columns]);
    let mut distance = Distance::default();
    for row in 0..rows_of {
        packed.dequantize_row(row, &mut rows.0);
        if let Err(error) = dense.copy_to_f32(row * columns, &mut rows.1) {
            line.note = Some(error.to_string());
            return Ok(());
        }
        let (a, b) = if packed_first { (&rows.0, &rows.1) } else { (&rows.1, &rows.0) };
        distance.add(a, b);
    }
    distance.put(line);
    Ok(())
}

fn compare_plain(a: &TensorView<'_>, b: &TensorView<'_>, line: &mut Line) {
    if a.shape() != b.shape() {
        line.differs = "shape";
        return;
    }
    if a.dtype() != b.dtype() {
        line.differs = "dtype";
    }
    if !(a.dtype().is_float() && b.dtype().is_float()) {
        line.note = Some("integers; values are not compared".into());
        return;
    }
    let count: usize = a.shape().iter().product();
    let mut values = (vec![0.0f32; CHUNK.min(count)], vec![0.0f32; CHUNK.min(count)]);
    let mut distance = Distance::default();
    for start in (0..count).step_by(CHUNK) {
        let length = CHUNK.min(count - start);
        let (x, y) = (&mut values.0[..length], &mut values.1[..length]);
        if let Err(error) = a.copy_to_f32(start, x).and_then(|()| b.copy_to_f32(start, y)) {
            line.note = Some(error.to_string());
            return;
        }
        distance.add(x, y);
    }
    distance.put(line);
}

/// `None` when both are the same to the last byte.
fn compare(
    name: &str,
    (a, in_a): (&Side, Option<&Unit<'_>>),
    (b, in_b): (&Side, Option<&Unit<'_>>),
) -> Result<Option<Line>, Error> {
    let mut line = Line {
        name: name.to_owned(),
        differs: "values",
        a: in_a.map(Unit::label),
        b: in_b.map(Unit::label),
        bytes_a: in_a.map_or(0, Unit::bytes),
        bytes_b: in_b.map_or(0, Unit::bytes),
        codes: None,
        max_abs: None,
        relative: None,
        note: None,
    };
    match (in_a, in_b) {
        (Some(_), None) => line.differs = "only in a",
        (None, _) => line.differs = "only in b",
        (Some(Unit::Plain(in_a)), Some(Unit::Plain(in_b))) => {
            let (x, y) = (a.plain(&in_a.name)?, b.plain(&in_b.name)?);
            let same = x.dtype() == y.dtype() && x.shape() == y.shape() && x.bytes() == y.bytes();
            if !same {
                compare_plain(&x, &y, &mut line);
            }
            a.release(&in_a.name);
            b.release(&in_b.name);
            if same {
                return Ok(None);
            }
        }
        (Some(Unit::Packed(model_a, site_a)), Some(Unit::Packed(model_b, site_b))) => {
            if model_a.layout() != model_b.layout() {
                line.differs = "layout";
            } else if model_a.scheme_of(site_a) != model_b.scheme_of(site_b) {
                line.differs = "scheme";
            } else if same_parts(a, b, &site_a.name)? {
                return Ok(None);
            }
            compare_quantized(&unpack(model_a, site_a)?, &unpack(model_b, site_b)?, &mut line);
        }
        (Some(Unit::Packed(model, site)), Some(Unit::Plain(_))) => {
            line.differs = "scheme";
            compare_mixed(&unpack(model, site)?, &b.plain(name)?, true, &mut line)?;
            b.release(name);
        }
        (Some(Unit::Plain(_)), Some(Unit::Packed(model, site))) => {
            line.differs = "scheme";
            compare_mixed(&unpack(model, site)?, &a.plain(name)?, false, &mut line)?;
            a.release(name);
        }
    }
    Ok(Some(line))
}

/// Every fact of the manifests that differs, sources by file.
fn facts(a: &Record, b: &Record) -> Vec<Fact> {
    let null = || Value::Null;
    let mut names: Vec<String> = Vec::new();
    for manifest in [&a.manifest, &b.manifest].into_iter().flatten() {
        for name in manifest.keys().filter(|name| !OWN_SECTION.contains(&name.as_str())) {
            if !names.contains(name) {
                names.push(name.clone());
            }
        }
    }
    let fact = |record: &Record, name: &str| {
        record.manifest.as_ref().and_then(|m| m.get(name).cloned()).unwrap_or_else(null)
    };
    let mut facts: Vec<Fact> =
        names.into_iter().map(|name| Fact { a: fact(a, &name), b: fact(b, &name), name }).collect();
    let sources =
        |record: &Record| fact(record, "sources").as_object().cloned().unwrap_or_default();
    let (in_a, in_b) = (sources(a), sources(b));
    let mut files: Vec<&String> = in_a.keys().chain(in_b.keys()).collect();
    files.sort();
    files.dedup();
    facts.extend(files.into_iter().map(|file| Fact {
        name: format!("source {file}"),
        a: in_a.get(file).cloned().unwrap_or_else(null),
        b: in_b.get(file).cloned().unwrap_or_else(null),
    }));
    facts.retain(|fact| fact.a != fact.b);
    facts
}

/// The lines of both in the order of their longest common subsequence; empty when all are common.
fn line_diff(a: &str, b: &str) -> Vec<String> {
    let (a, b): (Vec<&str>, Vec<&str>) = (a.lines().collect(), b.lines().collect());
    if a == b {
        return Vec::new();
    }
    // length[i][j]: common lines of a[i..] and b[j..].
    let mut length = vec![vec![0usize; b.len() + 1]; a.len() + 1];
    for i in (0..a.len()).rev() {
        for j in (0..b.len()).rev() {
            length[i][j] = if a[i] == b[j] {
                length[i + 1][j + 1] + 1
            } else {
                length[i + 1][j].max(length[i][j + 1])
            };
        }
    }
    let (mut i, mut j, mut out) = (0, 0, Vec::new());
    while i < a.len() || j < b.len() {
        if i < a.len() && j < b.len() && a[i] == b[j] {
            out.push(format!("  {}", a[i]));
            (i, j) = (i + 1, j + 1);
        } else if i < a.len() && (j == b.len() || length[i + 1][j] >= length[i][j + 1]) {
            out.push(format!("- {}", a[i]));
            i += 1;
        } else {
            out.push(format!("+ {}", b[j]));
            j += 1;
        }
    }
    out
}

/// The errors of both reports by site and pass, where they are not the same.
fn errors(a: Option<&Report>, b: Option<&Report>) -> Vec<Errors> {
    let mut lines: BTreeMap<(String, String), Errors> = BTreeMap::new();
    for (report, first) in [(a, true), (b, false)] {
        for entry in report.iter().flat_map(|report| &report.sites) {
            let (site, pass) = (entry.result.site.clone(), entry.result.pass.clone());
            let line = lines.entry((site.clone(), pass.clone())).or_insert(Errors {
                site,
                pass,
                weight_a: None,
                weight_b: None,
                output_a: None,
                output_b: None,
            });
            let (weight, output) = if first {
                (&mut line.weight_a, &mut line.output_a)
            } else {
                (&mut line.weight_b, &mut line.output_b)
            };
            *weight = Some(entry.result.weight_error);
            *output = entry.result.output_error;
        }
    }
    let bits = |value: Option<f64>| value.map(f64::to_bits);
    let same =
        |e: &Errors| bits(e.weight_a) == bits(e.weight_b) && bits(e.output_a) == bits(e.output_b);
    lines.into_values().filter(|line| !same(line)).collect()
}

fn find(args: &Diff) -> Result<(Comparison, [Option<Report>; 2]), Error> {
    let (a, b) = (Side::open(&args.a)?, Side::open(&args.b)?);
    let mut notes = Vec::new();
    for (folder, side) in [(&args.a, &a), (&args.b, &b)] {
        if let Weights::Files(_, why) = &side.weights {
            notes.push(format!(
                "{}: packed linears are compared as tensors, not unpacked: {why}",
                folder.display()
            ));
        }
        if side.record.manifest.is_none() {
            notes.push(format!("{}: no attar_manifest.json, no provenance", folder.display()));
        }
        notes.extend(side.record.notes.iter().cloned());
    }
    let (units_a, units_b) = (a.units(), b.units());
    let mut names: Vec<&String> = units_a.keys().chain(units_b.keys()).collect();
    names.sort();
    names.dedup();
    let mut tensors = Vec::new();
    let total = names.len();
    for name in names {
        tensors.extend(compare(name, (&a, units_a.get(name)), (&b, units_b.get(name)))?);
    }
    let recipe = |side: &Side| side.record.fact("recipe").unwrap_or_default().to_owned();
    let comparison = Comparison {
        identical: tensors.is_empty(),
        a: a.summary(&args.a)?,
        b: b.summary(&args.b)?,
        facts: facts(&a.record, &b.record),
        recipe: line_diff(&recipe(&a), &recipe(&b)),
        tensors_identical: total - tensors.len(),
        tensors,
        errors: errors(a.record.report.as_ref(), b.record.report.as_ref()),
        notes,
    };
    Ok((comparison, [a.record.report, b.record.report]))
}

/// Largest and mean of some errors, for people.
fn spread(values: impl Iterator<Item = Option<f64>>) -> String {
    let values: Vec<f64> = values.flatten().collect();
    if values.is_empty() {
        return "-".into();
    }
    let largest = values.iter().copied().fold(0.0, f64::max);
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    format!("mean {mean:.3e}, largest {largest:.3e} ({} sites)", values.len())
}

fn shown(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(text) if text.len() == 64 => crate::provenance::short(text).to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn print(c: &Comparison, reports: &[Option<Report>; 2]) {
    for (name, side) in [("A", &c.a), ("B", &c.b)] {
        say!(
            "{name} {}: {}, {} bytes, {} bits per weight, {} tensors",
            shown(&side["path"]),
            side["layout"].as_str().unwrap_or("dense"),
            side["file_bytes"],
            side["bits_per_weight"].as_f64().map_or("?".into(), |bits| format!("{bits:.3}")),
            side["tensors"]
        );
    }
    if !c.facts.is_empty() {
        say!("facts that differ");
        for fact in &c.facts {
            say!("  {:<24} {}  |  {}", fact.name, shown(&fact.a), shown(&fact.b));
        }
    }
    if !c.recipe.is_empty() {
        say!("recipe");
        for line in &c.recipe {
            say!("  {line}");
        }
    }
    say!("tensors: {} identical, {} differ", c.tensors_identical, c.tensors.len());
    let width = c.tensors.iter().map(|line| line.name.len()).max().unwrap_or(0);
    let number = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.3e}"));
    if !c.tensors.is_empty() {
        say!(
            "  {:<width$}  {:<9}  {:>8}  {:>10}  {:>10}  A | B",
            "tensor",
            "differs",
            "codes",
            "max abs",
            "relative"
        );
    }
    for line in &c.tensors {
        let codes = line.codes.map_or("-".into(), |codes| format!("{:.2} %", 100.0 * codes));
        let note = line.note.as_ref().map(|note| format!("  ({note})")).unwrap_or_default();
        say!(
            "  {:<width$}  {:<9}  {:>8}  {:>10}  {:>10}  {} | {}{note}",
            line.name,
            line.differs,
            codes,
            number(line.max_abs),
            number(line.relative),
            line.a.as_deref().unwrap_or("-"),
            line.b.as_deref().unwrap_or("-")
        );
    }
    if !c.errors.is_empty() {
        say!("reported errors (squared, relative), where they differ");
        for (name, a, b) in [
            (
                "weight",
                spread(c.errors.iter().map(|e| e.weight_a)),
                spread(c.errors.iter().map(|e| e.weight_b)),
            ),
            (
                "output",
                spread(c.errors.iter().map(|e| e.output_a)),
                spread(c.errors.iter().map(|e| e.output_b)),
            ),
        ] {
            say!("  {name}  A {a}");
            say!("  {name}  B {b}");
        }
    }
    for (name, report) in ["A", "B"].into_iter().zip(reports) {
        if let Some(eval) = report.as_ref().and_then(|report| report.eval.as_ref()) {
            say!("{name} {}", evaluate::line(eval));
        }
    }
    for note in &c.notes {
        say!("note: {note}");
    }
}

pub(crate) fn diff(args: &Diff) -> Result<bool, Error> {
    let (comparison, reports) = find(args)?;
    if args.json {
        say!("{}", serde_json::to_string_pretty(&comparison)?);
    } else {
        print(&comparison, &reports);
    }
    Ok(comparison.identical)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_matched_in_order() {
        assert!(line_diff("a\nb", "a\nb").is_empty());
        assert_eq!(line_diff("a\nb\nc", "a\nx\nc"), ["  a", "- b", "+ x", "  c"]);
        assert_eq!(line_diff("", "a"), ["+ a"]);
        assert_eq!(line_diff("a\nb", "b"), ["- a", "  b"]);
    }

    #[test]
    fn equal_bits_are_no_difference_and_nan_is_an_infinite_one() {
        let mut same = Distance::default();
        same.add(&[f32::NAN, 1.0], &[f32::NAN, 1.0]);
        assert!(same.error.abs() < f64::MIN_POSITIVE && same.max_abs.abs() < f64::MIN_POSITIVE);
        let mut other = Distance::default();
        other.add(&[f32::NAN, 1.0], &[0.0, 1.0]);
        assert!(other.max_abs.is_infinite());
    }
}
