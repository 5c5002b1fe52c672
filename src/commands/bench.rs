//! `attar bench`: every kernel on every distinct shape of an artifact, beside what the machine can do.

use std::{collections::BTreeMap, time::Instant};

use attar_kernels::{
    Activations, Backend, Kernel, Prepared, choose,
    cpu::roofline::{self, Roofline},
};
use attar_tensor::{PackedLinear, rng::Rng};
use serde::Serialize;
use serde_json::json;

use crate::{Error, args::Bench, packed::Opened, progress};

/// Passes over all copies at least.
const PASSES: usize = 3;
/// By how much the chosen kernel may seem slower than another one before it counts.
pub(super) const NOISE: f64 = 0.08;

/// One kernel on one shape and number of tokens.
#[derive(Debug, Serialize)]
struct Line {
    out_features: usize,
    in_features: usize,
    scheme: String,
    m: usize,
    kernel: &'static str,
    /// How the weights lie, where that is special: `2:4` without the zeros, `zeros` with those that the chosen form leaves
    /// away.
    #[serde(skip_serializing_if = "str::is_empty")]
    form: &'static str,
    /// Bytes that one token reads.
    resident_bytes: usize,
    activations: Activations,
    /// True when `select` takes it for these activations.
    chosen: bool,
    microseconds: f64,
    /// Packed weights read per second.
    gb_per_s: f64,
    gflop_per_s: f64,
    /// Least time that memory or arithmetic allow over the time taken.
    roofline: f64,
}

/// Least seconds of a product: `prepared` read once, or `2 m n k` operations.
fn least(prepared: &dyn Prepared, m: usize, activations: Activations, peak: &Roofline) -> f64 {
    let rate = match activations {
        Activations::F32 => peak.f32_gflop_per_s,
        Activations::Int8 | Activations::Int8PerToken => peak.int8_gop_per_s,
    };
    let operations = 2 * m * prepared.out_features() * prepared.in_features();
    let read = prepared.resident_bytes() as f64 / peak.read_gb_per_s;
    read.max(operations as f64 / rate) / 1e9
}

/// Seconds of one product, the fastest pass over all copies of at least `seconds`.
fn time(copies: &[Box<dyn Prepared>], m: usize, seconds: f64) -> f64 {
    let (rows, columns) = (copies[0].out_features(), copies[0].in_features());
    let x = Rng::new(m as u64).normals(m * columns);
    let mut out = vec![0.0f32; m * rows];
    let (mut best, mut passes) = (f64::MAX, 0);
    let all = Instant::now();
    while passes < PASSES || all.elapsed().as_secs_f64() < seconds {
        let started = Instant::now();
        for copy in copies {
            copy.matmul(&x, m, &mut out);
        }
        best = best.min(started.elapsed().as_secs_f64() / copies.len() as f64);
        passes += 1;
    }
    std::hint::black_box(out);
    best
}

fn lines(
    packed: &PackedLinear,
    kernels: &[Box<dyn Kernel>],
    args: &Bench,
    peak: &Roofline,
) -> Result<Vec<Line>, Error> {
    let mut lines = Vec::new();
    for kernel in kernels {
        let usable = kernel.backend() == Backend::Cpu && kernel.supported() && kernel.in_use();
        let fits = |m: &&usize| kernel.supports(packed.scheme, packed.in_features, **m);
        let tokens: Vec<usize> = args.m.iter().filter(fits).copied().collect();
        if !usable || tokens.is_empty() {
            continue;
        }
        let prepared = kernel.prepare(packed)?;
        let chosen = choose(kernels, packed, kernel.activations())
            .is_some_and(|chosen| chosen.name() == kernel.name());
        let other = prepared.with_zeros().map(|other| ("zeros", false, other));
        let form = if prepared.without_zeros() { "2:4" } else { "" };
        let own = (form, chosen, prepared);
        for (form, chosen, prepared) in std::iter::once(own).chain(other) {
            let mut copies = vec![prepared];
            // Without copies a small weight would be read from a cache.
            let wanted = (args.rotate as usize).div_ceil(copies[0].resident_bytes().max(1));
            while copies.len() < wanted {
                let Some(copy) = copies[0].duplicate() else { break };
                copies.push(copy);
            }
            for &m in &tokens {
                // Many tokens are not bound by memory, and the plain kernels are slow.
                let all = m <= 16 && !kernel.name().contains("scalar");
                let copies = &copies[..if all { copies.len() } else { 1 }];
                let seconds = super::run::in_pool(|| Ok(time(copies, m, args.seconds)))?;
                let operations = 2 * m * packed.out_features * packed.in_features;
                lines.push(Line {
                    out_features: packed.out_features,
                    in_features: packed.in_features,
                    scheme: packed.scheme.label(),
                    m,
                    kernel: kernel.name(),
                    form,
                    resident_bytes: copies[0].resident_bytes(),
                    activations: kernel.activations(),
                    chosen,
                    microseconds: seconds * 1e6,
                    gb_per_s: copies[0].resident_bytes() as f64 / seconds / 1e9,
                    gflop_per_s: operations as f64 / seconds / 1e9,
                    roofline: least(&*copies[0], m, kernel.activations(), peak) / seconds,
                });
            }
        }
    }
    Ok(lines)
}

/// Chosen kernels that another one of the same activations beats by more than noise.
fn beaten(lines: &[Line]) -> Vec<String> {
    let case = |line: &Line| {
        (line.out_features, line.in_features, line.scheme.clone(), line.m, line.activations.name())
    };
    let mut out = Vec::new();
    for chosen in lines.iter().filter(|line| line.chosen) {
        for other in lines.iter().filter(|line| case(line) == case(chosen)) {
            if chosen.microseconds > other.microseconds * (1.0 + NOISE) {
                out.push(format!(
                    "{}x{} {} m {}: {} takes {:.1} us, {} takes {:.1}",
                    chosen.out_features,
                    chosen.in_features,
                    chosen.scheme,
                    chosen.m,
                    chosen.kernel,
                    chosen.microseconds,
                    other.kernel,
                    other.microseconds
                ));
            }
        }
    }
    out
}

pub(crate) fn bench(args: &Bench) -> Result<bool, Error> {
    match args.backend.as_str() {
        "cpu" => {}
        "cuda" => return super::cuda::bench(args),
        other => return Err(format!("--backend {other}: there are cpu and cuda").into()),
    }
    let model = Opened::open(&args.path)?;
    let mut shapes = BTreeMap::new();
    for site in model.linears() {
        if let Some(scheme) = model.scheme_of(site) {
            let key = (site.out_features, site.in_features, scheme.label());
            shapes.entry(key).or_insert(site);
        }
    }
    if shapes.is_empty() {
        return Err(format!("{}: nothing is quantized", args.path.display()).into());
    }
    let peak = roofline::measure((args.rotate as usize).max(64 << 20));
    let bar = progress::bar(shapes.len(), "measuring");
    let mut all = Vec::new();
    for site in shapes.values() {
        let packed = model.packed(site)?.ok_or("a site with a scheme is packed")?;
        let kernels = attar_kernels::layout_of(&packed)?.kernels();
        all.extend(lines(&packed, &kernels, args, &peak)?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    let beaten = if args.assert_chosen { beaten(&all) } else { Vec::new() };
    if args.json {
        let out = json!({
            "roofline": peak,
            "threads": rayon::current_num_threads(),
            "isa": attar_tensor::linalg::level().name(),
            "rotated_bytes": args.rotate,
            "noise_margin": NOISE,
            "beaten": beaten,
            "lines": all,
        });
        say!("{}", serde_json::to_string_pretty(&out)?);
    } else {
        say!(
            "{} threads, {}: {:.2} GB/s read, {:.0} GFLOP/s f32, {:.0} Gop/s int8",
            rayon::current_num_threads(),
            attar_tensor::linalg::level(),
            peak.read_gb_per_s,
            peak.f32_gflop_per_s,
            peak.int8_gop_per_s
        );
        say!(
            "{:>14} {:<18} {:>4} {:<26} {:>12} {:>8} {:>9} {:>9}",
            "shape",
            "scheme",
            "m",
            "kernel",
            "us",
            "GB/s",
            "GFLOP/s",
            "roofline"
        );
        for line in &all {
            let shape = format!("{}x{}", line.out_features, line.in_features);
            let (mark, gap) =
                (if line.chosen { "*" } else { " " }, if line.form.is_empty() { "" } else { " " });
            let name = format!("{mark}{}{gap}{}", line.kernel, line.form);
            say!(
                "{shape:>14} {:<18} {:>4} {name:<26} {:>12.1} {:>8.2} {:>9.1} {:>7.1} %",
                line.scheme,
                line.m,
                line.microseconds,
                line.gb_per_s,
                line.gflop_per_s,
                100.0 * line.roofline
            );
        }
        say!("* taken for its activations");
        if all.iter().any(|line| line.form == "2:4") {
            say!("2:4: zeros are left away; zeros: the same weight with them, for comparison");
        }
    }
    for line in &beaten {
        eprintln!("BEATEN {line}");
    }
    Ok(beaten.is_empty())
}
