//! `attar convert`: a model in another layout. Codes carry over where the layout can hold them; where it cannot,
//! weights are rounded anew and the error against the source is told.
//!
//! A file begins with the headers of all its tensors, and what a linear becomes is known only when it has been made.
//! So each is made once and waits in a file without a name beside the output; memory holds one tensor.

use std::{borrow::Cow, collections::BTreeMap, fs::File, os::unix::fs::FileExt, path::Path};

use attar_formats::{
    artifact::{self, ArtifactRoot, ArtifactWriter},
    quant_config,
};
use attar_ir::{Role, Site};
use attar_kernels::{
    Layout,
    layout::{CtInt, Ggml},
};
use attar_quant::round_to_nearest;
use attar_tensor::{
    BlockType, DType, Granularity, Mat, PackedLinear, QuantScheme, QuantizedLinear, Tensor,
    TensorHeader, TensorSource, TensorView, block_search, grid::Clip,
};
use serde_json::{Map, json};

use crate::{Error, args::Convert, gguf, packed::Opened, provenance, verify};

/// What a linear becomes.
struct Relaid {
    packed: PackedLinear,
    /// `‖Ŵ − W‖² / ‖W‖²` against the source's own numbers; `None` says that every number is the same.
    error: Option<f64>,
}

/// Where to.
enum Goal {
    /// Plain numbers in a GGUF file.
    Dense(DType),
    /// A quantized layout.
    Layout(&'static dyn Layout),
}

impl Goal {
    fn parse(name: &str) -> Result<Self, Error> {
        let dense = [("f32", DType::F32), ("f16", DType::F16), ("bf16", DType::BF16)];
        if let Some((_, dtype)) = dense.iter().find(|(known, _)| *known == name) {
            return Ok(Self::Dense(*dtype));
        }
        attar_kernels::layout(name).map(Self::Layout).ok_or_else(|| {
            let names = attar_kernels::LAYOUTS.iter().map(|layout| layout.id().0);
            let names: Vec<_> = names.chain(dense.iter().map(|(name, _)| *name)).collect();
            format!("--layout: unknown layout `{name}`; known: {}", names.join(", ")).into()
        })
    }

    fn gguf(&self) -> bool {
        match self {
            Self::Dense(_) => true,
            Self::Layout(layout) => layout.block_type().is_some(),
        }
    }
}

/// Lines of the summary.
#[derive(Default)]
struct Tally {
    exact: usize,
    rounded: Vec<(String, f64)>,
    /// Plain tensors that lost bits in the dtype asked for.
    narrowed: Vec<(String, f64)>,
}

pub(crate) fn convert(args: &Convert) -> Result<bool, Error> {
    let goal = Goal::parse(&args.layout)?;
    let source = Opened::open(&args.source)?;
    let thin = match (source.factored().next(), source.corrected().first()) {
        (Some(site), _) => Some(format!(
            "{site} is factored, which no other layout holds; compress again with `merge = true` in its [[emit]]"
        )),
        (None, Some(site)) => Some(format!(
            "{site} has a correction in adapter/, which the converted file would be without; convert a copy without the \
             adapter, or keep this artifact"
        )),
        (None, None) => None,
    };
    if let Some(reason) = thin {
        return Err(format!("{}: {reason}", args.source.display()).into());
    }
    let graph = &source.decoder.graph;
    let sites: BTreeMap<&str, &Site> = graph
        .all_blocks()
        .flat_map(|block| &block.sites)
        .map(|site| (site.name.as_str(), site))
        .collect();
    if matches!(goal, Goal::Layout(_)) && source.layout().is_none() {
        return Err(format!(
            "{} holds no quantized linear, and convert chooses no codes; use `attar compress --preset rtn --layout {}`",
            args.source.display(),
            args.layout
        )
        .into());
    }
    let mut tally = Tally::default();
    let mut waiting = Waiting::beside(&args.out)?;
    let schemes = make(&source, &sites, &goal, &mut tally, &mut waiting)?;
    let headers = waiting.headers();
    let root = ArtifactRoot::create(&args.out)?;
    let mut writer = if goal.gguf() {
        let most = match &goal {
            Goal::Layout(layout) => layout.block_type(),
            Goal::Dense(_) => None,
        };
        gguf::check_names(headers.iter().map(|header| header.name.as_str()))?;
        let mut described = gguf::describe(&source.checkpoint, &source.decoder.spec, most)?;
        if let Goal::Dense(dtype) = goal {
            described.set_file_type(dtype);
        }
        for note in &described.notes {
            say!("note: {note}");
        }
        let types: BTreeMap<String, BlockType> = schemes
            .iter()
            .filter_map(|(name, scheme)| Some((name.clone(), scheme.block()?)))
            .collect();
        let of = |site: &str| types.get(site).copied();
        ArtifactWriter::create_gguf(root.partial(), gguf::plan(described, headers, of))?
    } else {
        ArtifactWriter::create(root.partial(), headers)?
    };
    waiting.write(&source, &sites, &goal, &mut writer)?;
    if !goal.gguf() {
        for file in source.checkpoint.auxiliary_files()? {
            writer.copy_file(&file)?;
        }
        let generated = source.checkpoint.gguf().map(attar_formats::gguf::Gguf::generated_files);
        for (name, json) in generated.unwrap_or_default() {
            writer.put_json(name, &json)?;
        }
        let mut config = source.checkpoint.config().clone();
        let dense: Vec<String> = sites
            .values()
            .filter(|site| !schemes.iter().any(|(name, _)| *name == site.name))
            .map(|site| site.name.clone())
            .collect();
        config["quantization_config"] = quant_config::write(&args.layout, &schemes, &dense)?;
        writer.put_json("config.json", &config)?;
    }
    let folder = writer.finish()?;
    let mut facts = Map::new();
    facts.insert("attar".into(), json!(env!("CARGO_PKG_VERSION")));
    facts.insert("layout".into(), json!(args.layout));
    facts.insert("converted_from".into(), json!(source.layout().unwrap_or("float")));
    facts.insert("sources".into(), json!(source.checkpoint.hashes()?));
    facts.insert("exact".into(), json!(tally.rounded.is_empty() && tally.narrowed.is_empty()));
    artifact::write_manifest(&folder, facts)?;
    let checked = verify::verify(&folder, None, false)?;
    if !checked.problems.is_empty() {
        let problems = checked.problems.join("; ");
        return Err(format!("what was written does not verify: {problems}").into());
    }
    let bytes = Opened::open(&folder)?.checkpoint.file_bytes()?;
    root.seal()?;
    tell(args, &tally, bytes, source.checkpoint.file_bytes()?)?;
    Ok(true)
}

fn tell(args: &Convert, tally: &Tally, bytes: u64, before: u64) -> Result<(), Error> {
    let worst = |list: &[(String, f64)]| {
        list.iter().max_by(|a, b| a.1.total_cmp(&b.1)).cloned().unwrap_or_default()
    };
    if args.json {
        let list = |list: &[(String, f64)]| -> Vec<_> {
            list.iter().map(|(name, error)| json!({"tensor": name, "error": error})).collect()
        };
        let all = json!({
            "artifact": args.out, "layout": args.layout, "exact": tally.exact,
            "rounded": list(&tally.rounded), "narrowed": list(&tally.narrowed),
            "bytes": bytes, "source_bytes": before,
        });
        say!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(());
    }
    let mb = |bytes: u64| bytes as f64 / 1e6;
    say!("{}: {}, {:.2} MB of {:.2} MB", args.out.display(), args.layout, mb(bytes), mb(before));
    if tally.rounded.is_empty() && tally.narrowed.is_empty() {
        match tally.exact {
            0 => say!("exact: every number carries over"),
            count => say!("exact: all {count} quantized linears carry over, number by number"),
        }
        return Ok(());
    }
    if tally.exact > 0 {
        say!("exact: {} quantized linears carry over, number by number", tally.exact);
    }
    for (list, what) in
        [(&tally.rounded, "linears were rounded anew"), (&tally.narrowed, "tensors lost bits")]
    {
        if list.is_empty() {
            continue;
        }
        let mean = list.iter().map(|(_, error)| error).sum::<f64>() / list.len() as f64;
        let (name, error) = worst(list);
        say!(
            "not exact: {} {what}, relative squared error {mean:.3e} on average, {error:.3e} at most ({name})",
            list.len()
        );
    }
    Ok(())
}

/// Where a tensor waits to be written.
enum Place {
    /// From this byte of the file on.
    Scratch(u64),
    /// In the source under this name, as it is.
    Source(String),
}

/// Tensors of the result before their headers are all known.
struct Waiting {
    file: File,
    end: u64,
    tensors: Vec<(TensorHeader, Place)>,
}

impl Waiting {
    /// With its file on the disk of the output.
    fn beside(out: &Path) -> Result<Self, Error> {
        let out = std::path::absolute(out)?;
        let folder = out.parent().unwrap_or(&out);
        std::fs::create_dir_all(folder)
            .and_then(|()| tempfile::tempfile_in(folder))
            .map(|file| Self { file, end: 0, tensors: Vec::new() })
            .map_err(|error| format!("{}: {error}", folder.display()).into())
    }

    fn put(&mut self, name: String, tensor: &Tensor) -> Result<(), Error> {
        self.file
            .write_all_at(tensor.bytes(), self.end)
            .map_err(|error| format!("scratch file of {} bytes: {error}", self.end))?;
        self.tensors.push((header(name, tensor), Place::Scratch(self.end)));
        self.end += tensor.bytes().len() as u64;
        Ok(())
    }

    /// Sorted by name.
    fn headers(&mut self) -> Vec<TensorHeader> {
        self.tensors.sort_by(|a, b| a.0.name.cmp(&b.0.name));
        self.tensors.iter().map(|(header, _)| header.clone()).collect()
    }

    fn write(
        self,
        source: &Opened,
        sites: &BTreeMap<&str, &Site>,
        goal: &Goal,
        writer: &mut ArtifactWriter,
    ) -> Result<(), Error> {
        for (header, place) in self.tensors {
            match place {
                Place::Scratch(start) => {
                    let mut bytes = vec![0u8; header.bytes()];
                    self.file
                        .read_exact_at(&mut bytes, start)
                        .map_err(|error| format!("scratch file at byte {start}: {error}"))?;
                    let view = TensorView::new(header.dtype, header.shape, Cow::Owned(bytes))?;
                    writer.put(&header.name, &view)?;
                }
                Place::Source(name) => {
                    let made = number(source, sites, goal, &name)?;
                    writer.put(&header.name, &made.tensor.view())?;
                    source.numbers().release(&name);
                }
            }
        }
        Ok(())
    }
}

/// Makes everything that will be written; returns the schemes of what is quantized.
fn make(
    source: &Opened,
    sites: &BTreeMap<&str, &Site>,
    goal: &Goal,
    tally: &mut Tally,
    waiting: &mut Waiting,
) -> Result<Vec<(String, QuantScheme)>, Error> {
    let mut schemes = Vec::new();
    for site in sites.values() {
        let Some(relaid) = relay(source, site, goal)? else { continue };
        match relaid.error {
            None => tally.exact += 1,
            Some(error) => tally.rounded.push((site.name.clone(), error)),
        }
        for (suffix, tensor) in &relaid.packed.parts {
            waiting.put(format!("{}.{suffix}", site.name), tensor)?;
        }
        schemes.push((site.name.clone(), relaid.packed.scheme));
    }
    for name in others(source, sites, goal) {
        let Number { name: to_name, tensor, error, kept } = number(source, sites, goal, &name)?;
        if let Some(error) = error {
            tally.narrowed.push((to_name.clone(), error));
        }
        if let (Some(stem), Some(scheme)) =
            (to_name.strip_suffix(".blocks"), embedding_block(source))
        {
            schemes.push((stem.to_owned(), scheme.scheme()));
        }
        if kept {
            waiting.tensors.push((header(to_name, &tensor), Place::Source(name.clone())));
        } else {
            waiting.put(to_name, &tensor)?;
        }
        source.numbers().release(&name);
    }
    Ok(schemes)
}

fn header(name: String, tensor: &Tensor) -> TensorHeader {
    TensorHeader { name, dtype: tensor.dtype(), shape: tensor.shape().to_vec() }
}

/// Tensors that are no packed linear in the result, by the names of [`Opened::numbers`].
fn others(source: &Opened, sites: &BTreeMap<&str, &Site>, goal: &Goal) -> Vec<String> {
    let tied = source.decoder.graph.tied;
    let mut names: Vec<String> = Vec::new();
    for header in source.numbers().headers() {
        let name = header.name.as_str();
        if provenance::site_of_part(name).is_some_and(|site| sites.contains_key(site)) {
            // The parts of a packed linear, whose numbers a file of plain ones takes.
            continue;
        }
        let site = name.strip_suffix(".weight").and_then(|site| sites.get(site));
        let packed = site.is_some_and(|site| source.scheme_of(site).is_some());
        let bytes =
            source.layout().is_some_and(|layout| layout == attar_tensor::LayoutSpec::id(&CtInt).0);
        if packed && (bytes || matches!(goal, Goal::Layout(_))) {
            continue;
        }
        let second_head =
            tied && name == "lm_head.weight" && source.decoder.graph.embedding != name;
        if goal.gguf() && (second_head || name.ends_with(".rotary_emb.inv_freq")) {
            continue;
        }
        names.push(name.to_owned());
    }
    if matches!(goal, Goal::Dense(_)) {
        for site in sites.values() {
            let name = format!("{}.weight", site.name);
            if source.scheme_of(site).is_some() && !names.contains(&name) {
                names.push(name);
            }
        }
    }
    names.sort();
    names
}

/// The block type of a GGUF source's embedding.
fn embedding_block(source: &Opened) -> Option<BlockType> {
    let stem = source.decoder.graph.embedding.strip_suffix(".weight")?;
    source.block_of(stem)
}

/// One tensor of plain numbers.
struct Number {
    /// Its name in the result.
    name: String,
    tensor: Tensor,
    /// What it lost, as [`relative`].
    error: Option<f64>,
    /// True when it is the source's as it lies there.
    kept: bool,
}

/// One tensor of plain numbers in the result.
fn number(
    source: &Opened,
    sites: &BTreeMap<&str, &Site>,
    goal: &Goal,
    name: &str,
) -> Result<Number, Error> {
    let kept = |name: String, tensor| Number { name, tensor, error: None, kept: true };
    let to_name = if *name == source.decoder.graph.embedding && goal.gguf() {
        "model.embed_tokens.weight"
    } else {
        name
    };
    if let (Goal::Layout(_), true, Some(stem)) = (goal, goal.gguf(), name.strip_suffix(".weight"))
        && *name == source.decoder.graph.embedding
        && source.block_of(stem).is_some()
    {
        // From GGUF to GGUF the embedding stays as it is.
        let tensor = source.checkpoint.read(&format!("{stem}.blocks"))?.to_tensor();
        return Ok(kept(format!("{stem}.blocks"), tensor));
    }
    let site = name.strip_suffix(".weight").and_then(|site| sites.get(site));
    let packed = match site {
        Some(site) => source.packed(site)?,
        None => None,
    };
    let (shape, values, dtype) = if let Some(packed) = packed {
        let weight = attar_kernels::layout_of(&packed)?.dequantize(&packed)?;
        let shape = vec![weight.nrows(), weight.ncols()];
        (shape, weight.into_raw_vec_and_offset().0, DType::F32)
    } else {
        let view = source.numbers().read(name)?;
        let same = match goal {
            Goal::Layout(_) => !goal.gguf() || view.shape().len() > 1,
            Goal::Dense(dtype) => view.shape().len() > 1 && view.dtype() == *dtype,
        };
        if same || !view.dtype().is_float() {
            return Ok(kept(to_name.to_owned(), view.to_tensor()));
        }
        (view.shape().to_vec(), view.to_f32()?, view.dtype())
    };
    let to = match goal {
        Goal::Dense(dtype) if shape.len() > 1 => *dtype,
        _ => DType::F32,
    };
    let tensor = Tensor::from_f32(to, shape, &values)?;
    let error = if to == DType::F32 || to == dtype {
        None
    } else {
        relative(&tensor.view().to_f32()?, &values)
    };
    Ok(Number { name: to_name.to_owned(), tensor, error, kept: false })
}

/// `‖a − b‖² / ‖b‖²`; `None` when all bits are the same.
fn relative(a: &[f32], b: &[f32]) -> Option<f64> {
    if a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits()) {
        return None;
    }
    let (mut error, mut whole) = (0.0f64, 0.0f64);
    for (a, b) in a.iter().zip(b) {
        error += (f64::from(*a) - f64::from(*b)).powi(2);
        whole += f64::from(*b).powi(2);
    }
    Some(error / whole.max(f64::MIN_POSITIVE))
}

/// A quantized linear in the layout of the goal; `None` for one that is not quantized, or not to be.
fn relay(source: &Opened, site: &Site, goal: &Goal) -> Result<Option<Relaid>, Error> {
    let Goal::Layout(to) = goal else { return Ok(None) };
    let tied = site.role == Role::Head && source.decoder.graph.tied;
    if tied && source.scheme_of(site).is_none() {
        return Ok(None);
    }
    let Some(packed) = source.packed(site)? else { return Ok(None) };
    // Rows that the blocks asked for do not divide go into the type that stands in.
    let own = to.own_scheme(site.in_features).and_then(QuantScheme::block);
    let to: &'static dyn Layout = own.map_or(*to, |block| Ggml::new(block));
    let from = attar_kernels::layout_of(&packed)?;
    let fail = |error: attar_tensor::LayoutError| format!("{}: {error}", site.name);
    if from.id() == to.id() {
        return Ok(Some(Relaid { packed, error: None }));
    }
    let expected = from.dequantize(&packed).map_err(fail)?;
    if let Ok(mut affine) = from.unpack(&packed) {
        // The numbers of weights are what is carried over; W8A8 has one layout only.
        affine.scheme.activations = attar_tensor::ActivationScheme::Float;
        for candidate in std::iter::once(affine.clone()).chain(widened(&affine)) {
            if let Ok(packed) = to.pack(&candidate, DType::F16) {
                let same = to.dequantize(&packed).map_err(fail)?;
                let error = compare(&same, &expected);
                return Ok(Some(Relaid { packed, error }));
            }
        }
    }
    let packed = round(to, packed.scheme, &expected).map_err(fail)?;
    let found = attar_kernels::layout_of(&packed)?.dequantize(&packed).map_err(fail)?;
    Ok(Some(Relaid { packed, error: compare(&found, &expected) }))
}

fn compare(a: &Mat, b: &Mat) -> Option<f64> {
    relative(a.as_slice().unwrap_or_default(), b.as_slice().unwrap_or_default())
}

/// The same numbers with symmetric codes of 8 bits, for widths that a layout has not.
fn widened(from: &QuantizedLinear) -> Option<QuantizedLinear> {
    let groups = from.groups();
    let mut wide = from.clone();
    wide.scheme.bits = 8;
    wide.scheme.symmetric = true;
    for (at, code) in wide.codes.iter_mut().enumerate() {
        let (row, column) = (at / from.in_features, at % from.in_features);
        let zero = i32::from(from.zeros[row * groups + from.group_of(column)]);
        *code = u8::try_from(i32::from(*code) - zero + 128).ok()?;
    }
    wide.zeros.fill(128);
    (from.scheme.bits < 8).then_some(wide)
}

/// Rounds numbers anew: the type's own search for blocks, else round to nearest with the scheme that is
/// nearest to the source's.
fn round(
    to: &'static dyn Layout,
    from: QuantScheme,
    weight: &Mat,
) -> Result<PackedLinear, attar_tensor::LayoutError> {
    let (rows, columns) = weight.dim();
    if let Some(block) = to.own_scheme(columns).and_then(QuantScheme::block) {
        let values = weight.as_slice().unwrap_or_default();
        return Ggml::new(block).pack_blocks(&block_search::quantize(block, values, rows, columns));
    }
    let bits = match from.bits {
        bits @ (2 | 3 | 4 | 8) if to.id().0 != "awq" => bits,
        5.. if to.id().0 != "awq" => 8,
        _ => 4,
    };
    let granularity = match from.granularity {
        Granularity::Group(size) if size < 32 => Granularity::Group(32),
        other => other,
    };
    let scheme = QuantScheme {
        bits,
        granularity,
        symmetric: from.symmetric,
        scale_grid: to.scale_grid(DType::F16),
        zero_min: to.zero_min(),
        activations: attar_tensor::ActivationScheme::Float,
    };
    to.pack(&round_to_nearest(weight, scheme, Clip::Search(40)).0, DType::F16)
}
