//! `attar verify --backend cuda` and `attar gpu`.

use std::collections::BTreeSet;
use std::path::Path;

use attar_kernels::cuda::bench::{
    Timing, copy_bandwidth, random_weights, time_cublas, time_linear,
};
use attar_kernels::cuda::proof::Table;
use attar_kernels::cuda::{CudaWeights, Gpu, Half};
use serde::Serialize;
use serde_json::json;

use super::bench::NOISE;
use crate::{Error, args, packed::Opened};

/// Every CUDA kernel on the shared cases, and on a linear of each scheme and shape of the artifact; one table.
pub(crate) fn verify(path: &Path, as_json: bool) -> Result<bool, Error> {
    // The artifact first: a wrong path is found without a GPU.
    let opened = Opened::open(path)?;
    let gpu = Gpu::open().map_err(|error| format!("--backend cuda: {error}"))?;
    let mut table = Table::default();
    table.run_cases(&gpu)?;
    let (mut seen, mut linears) = (BTreeSet::new(), 0);
    for site in opened.linears() {
        let Some(scheme) = opened.scheme_of(site) else { continue };
        if !seen.insert((scheme.label(), site.out_features, site.in_features)) {
            continue;
        }
        if let Some(packed) = opened.packed(site)? {
            table.run_linear(&gpu, &packed, &site.name)?;
            linears += 1;
        }
    }
    let (info, good) = (gpu.info(), table.ok());
    if as_json {
        let json = json!({"gpu": info, "linears": linears, "kernels": table.kernels, "ok": good});
        say!("{}", serde_json::to_string_pretty(&json)?);
        return Ok(good);
    }
    say!(
        "{} (compute capability {}.{}, driver of CUDA {}), kernels for {}",
        info.name,
        info.major,
        info.minor,
        info.driver,
        info.image
    );
    say!("shared cases, and {linears} linears of {}", path.display());
    say!("{:<36} {:>6} {:>22} {:>10}", "kernel", "runs", "worst, of what is allowed", "nmse");
    for line in &table.kernels {
        say!("{:<36} {:>6} {:>25.3} {:>10.1e}", line.kernel, line.runs, line.worst, line.nmse);
    }
    for failure in table.kernels.iter().filter_map(|line| line.failure.as_ref()) {
        say!("PROBLEM {failure}");
    }
    say!("{}", if good { "verified" } else { "verification FAILED" });
    Ok(good)
}

/// `attar bench --backend cuda`: both types of activations on every distinct shape of an artifact, beside the copy
/// bandwidth.
pub(crate) fn bench(args: &args::Bench) -> Result<bool, Error> {
    let opened = Opened::open(&args.path)?;
    let gpu = Gpu::open().map_err(|error| format!("--backend cuda: {error}"))?;
    let copy = copy_bandwidth(&gpu)?;
    let (mut seen, mut timings, mut beaten) = (BTreeSet::new(), Vec::new(), Vec::new());
    for site in opened.linears() {
        let Some(scheme) = opened.scheme_of(site) else { continue };
        if !seen.insert((scheme.label(), site.out_features, site.in_features)) {
            continue;
        }
        let packed = opened.packed(site)?.ok_or("a site with a scheme is packed")?;
        let weights = CudaWeights::new(&packed)?;
        for &m in &args.m {
            for half in Half::ALL {
                let all = time_linear(&gpu, &weights, half, m)?;
                if args.assert_chosen {
                    beaten.extend(faster(&all));
                }
                timings.extend(all.into_iter().map(|timing| (scheme.label(), timing)));
            }
        }
    }
    if args.json {
        let lines: Vec<_> = timings
            .iter()
            .map(|(scheme, timing)| json!({"scheme": scheme, "timing": timing}))
            .collect();
        let json = json!({
            "gpu": gpu.info(),
            "copy_bytes_per_second": copy,
            "noise_margin": NOISE,
            "beaten": beaten,
            "lines": lines,
        });
        say!("{}", serde_json::to_string_pretty(&json)?);
        return Ok(beaten.is_empty());
    }
    say!("{}: copies at {:.0} GB/s (read and written)", gpu.info().name, copy / 1e9);
    say!(
        "{:>14} {:<18} {:>5} {:<26} {:>10} {:>8} {:>9} {:>8}",
        "shape",
        "scheme",
        "m",
        "kernel",
        "us",
        "GB/s",
        "GFLOP/s",
        "of copy"
    );
    for (scheme, timing) in &timings {
        let (microseconds, bandwidth) = (timing.seconds * 1e6, timing.bandwidth());
        say!(
            "{:>14} {scheme:<18} {:>5} {:<26} {microseconds:>10.2} {:>8.1} {:>9.0} {:>8.3}",
            format!("{}x{}", timing.rows, timing.columns),
            timing.m,
            timing.kernel,
            bandwidth / 1e9,
            timing.flops() / 1e9,
            bandwidth / copy
        );
    }
    for line in &beaten {
        say!("PROBLEM {line}");
    }
    Ok(beaten.is_empty())
}

/// What is faster than the chosen kernel, the first, by more than noise.
fn faster(timings: &[Timing]) -> Option<String> {
    let (chosen, others) = timings.split_first()?;
    let best = others.iter().min_by(|a, b| a.seconds.total_cmp(&b.seconds))?;
    (chosen.seconds > best.seconds * (1.0 + NOISE)).then(|| {
        let (rows, columns, m) = (chosen.rows, chosen.columns, chosen.m);
        let (us, best_us) = (chosen.seconds * 1e6, best.seconds * 1e6);
        let (kernel, other) = (&chosen.kernel, &best.kernel);
        format!("{rows}x{columns} m {m}: {kernel} takes {us:.1} us, {other} takes {best_us:.1}")
    })
}

/// One bar: a figure, what it is held against, and what is wanted of their ratio.
#[derive(Debug, Serialize)]
struct Bar {
    what: String,
    measured: Option<f64>,
    unit: &'static str,
    against: &'static str,
    ratio: Option<f64>,
    wanted: Option<f64>,
}

/// Times the kernels on this GPU beside its copy bandwidth and cuBLAS.
pub(crate) fn bars(args: &args::Gpu) -> Result<bool, Error> {
    let gpu = Gpu::open()?;
    let mut bars: Vec<Bar> = Vec::new();
    let mut timings: Vec<Timing> = Vec::new();
    let copy = copy_bandwidth(&gpu)?;
    for (bits, shape, half, wanted) in [
        (4, (8192, 28672), Half::F16, 0.9),
        (4, (8192, 28672), Half::Bf16, 0.9),
        (4, (28672, 8192), Half::F16, 0.8),
        (4, (16384, 8192), Half::F16, 0.8),
        (8, (8192, 8192), Half::F16, 0.8),
        (8, (8192, 28672), Half::Bf16, 0.8),
    ] {
        let timing = time_linear(&gpu, &random_weights(bits, shape, 128), half, 1)?.swap_remove(0);
        bars.push(Bar {
            what: format!("m=1 w{bits} {} {}x{}", half.name(), shape.0, shape.1),
            measured: Some(timing.bandwidth() / 1e9),
            unit: "GB/s",
            against: "copy bandwidth",
            ratio: Some(timing.bandwidth() / copy),
            wanted: Some(wanted),
        });
        timings.push(timing);
    }
    for m in [1, 4, 8] {
        let weights = random_weights(4, (4096, 4096), 128);
        let timing = time_linear(&gpu, &weights, Half::F16, m)?.swap_remove(0);
        bars.push(Bar {
            what: format!("m={m} w4 f16 4096x4096"),
            measured: Some(timing.seconds * 1e6),
            unit: "us",
            against: "-",
            ratio: None,
            wanted: None,
        });
        timings.push(timing);
    }
    let mut missing = None;
    let shapes = [(4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192)];
    // Every kernel that multiplies few tokens: where the choice between them lies.
    let mut few = Vec::new();
    for shape in shapes {
        let weights = random_weights(4, shape, 128);
        for m in [1, 2, 4, 6, 8] {
            few.extend(time_linear(&gpu, &weights, Half::Bf16, m)?);
        }
    }
    for (m, wanted) in [(16, Some(3.0)), (64, None), (4096, Some(0.65))] {
        for shape in shapes {
            let weights = random_weights(4, shape, 128);
            let timing = time_linear(&gpu, &weights, Half::Bf16, m)?.swap_remove(0);
            let dense = match time_cublas(&gpu, shape, m) {
                Ok(dense) => Some(dense),
                Err(error) => {
                    missing = Some(error.to_string());
                    None
                }
            };
            bars.push(Bar {
                what: format!("m={m} w4 bf16 {}x{}", shape.0, shape.1),
                measured: Some(timing.seconds * 1e6),
                unit: "us",
                against: "cuBLAS bf16",
                ratio: dense.as_ref().map(|dense| dense.seconds / timing.seconds),
                wanted,
            });
            timings.push(timing);
            timings.extend(dense);
        }
    }
    if args.json {
        let json = json!({
            "gpu": gpu.info(),
            "copy_bytes_per_second": copy,
            "bars": bars,
            "timings": timings,
            "few_tokens": few,
            "missing": missing.map(|why| format!("cuBLAS: {why}")),
        });
        say!("{}", serde_json::to_string_pretty(&json)?);
        return Ok(true);
    }
    let info = gpu.info();
    say!("{}, driver of CUDA {}, kernels for {}", info.name, info.driver, info.image);
    say!("copy bandwidth {:.0} GB/s (read and written)", copy / 1e9);
    say!("{:<28} {:>10} {:<5} {:>7} {:>7}  of", "product", "measured", "", "ratio", "wanted");
    let number = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.2}"));
    for bar in &bars {
        let (ratio, wanted) = (number(bar.ratio), number(bar.wanted));
        let (measured, unit) = (number(bar.measured), bar.unit);
        let (what, against) = (&bar.what, bar.against);
        say!("{what:<28} {measured:>10} {unit:<5} {ratio:>7} {wanted:>7}  {against}");
    }
    for t in &few {
        let (rows, columns, us) = (t.rows, t.columns, t.seconds * 1e6);
        say!("{:<28} {us:>10.2} us  {}", format!("m={} w4 bf16 {rows}x{columns}", t.m), t.kernel);
    }
    if let Some(why) = missing {
        say!("missing: cuBLAS ({why})");
    }
    Ok(true)
}
