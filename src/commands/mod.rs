//! One file per subcommand that needs more than a screen; the short ones stand here.

mod bench;
mod cache;
mod convert;
mod cuda;
mod demo;
mod diff;
mod evaluate;
mod explain;
mod imatrix;
mod inspect;
mod recipes;
mod reproduce;
pub(crate) mod run;
mod targets;

use attar_eval::{Policy, Report};
use attar_formats::{Checkpoint, artifact};
use attar_ir::plan;
use serde_json::json;

use crate::{
    Error,
    args::{self, Args, Command, Compress, Emit, Gate, Plan, ProgressArg, Verify},
    bundle,
    compile::{self, Measure, Options},
    contract, measure,
    packed::Opened,
    registry, verify,
};

/// Runs what was typed; `false` when a check or gate failed.
pub(crate) fn run(args: Args) -> Result<bool, Error> {
    if let (Some(threads), false) = (args.threads, matches!(args.command, Command::Compress(_))) {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    }
    if let Some(isa) = args.isa {
        attar_tensor::linalg::pin(isa).map_err(|error| format!("--isa {isa}: {error}"))?;
    }
    match args.command {
        Command::Compress(what) => compress(&what, args.threads),
        Command::Plan(what) => print_plan(&what, args.threads),
        Command::Emit(args) => emit(&args),
        Command::Eval(args) => evaluate::evaluate(&args),
        Command::Verify(args) if args.backend == args::VerifyBackend::Cuda => {
            cuda::verify(&args.path, args.json)
        }
        Command::Verify(args) => verify_artifact(&args),
        Command::Gpu(args) => cuda::bars(&args),
        Command::Inspect(args) => inspect::inspect(&args),
        Command::Explain(args) => explain::explain(&args),
        Command::Diff(args) => diff::diff(&args),
        Command::Reproduce(reproduction) => reproduce::reproduce(&reproduction, args.isa),
        Command::Gate(args) => gate(&args),
        Command::Bench(args) => bench::bench(&args),
        Command::Run(args) => run::generate(&args),
        Command::Demo(args) => demo::demo(&args),
        Command::Convert(args) => convert::convert(&args),
        Command::Imatrix(args) => imatrix::collect(&args),
        Command::Cache(args) => cache::cache(&args),
        Command::Targets(args) => targets::targets(&args),
        Command::Passes { markdown: true, .. } => {
            say!("{}", recipes::markdown(registry::known().as_known()).trim_end());
            Ok(true)
        }
        Command::Passes { schema, .. } => passes(schema),
    }
}

fn compress(args: &Compress, threads: Option<usize>) -> Result<bool, Error> {
    attar_formats::give_freed_memory_back();
    let measure = args.eval_text.clone().map(|text| Measure { text, context: args.eval_context });
    let job = compile::prepare(&args.what, measure::threads(threads), measure.as_ref())?;
    // A tight budget lets fewer threads work.
    rayon::ThreadPoolBuilder::new().num_threads(job.threads()).build_global()?;
    let job = compile::settle(job, &args.what, measure::threads(threads), measure.as_ref())?;
    let every = std::time::Duration::try_from_secs_f64(args.checkpoint_every)
        .map_err(|_| "--checkpoint-every: give a number of seconds, 0 or more")?;
    let options = Options {
        measure,
        scratch: args.scratch.as_deref(),
        checkpoint_every: every,
        cache_limit: args.cache_limit,
        json_progress: args.progress == ProgressArg::Json,
        kernels: args.kernels,
        library: args.kernels_library.as_deref(),
        ..Options::new(&args.out)
    };
    let reports = compile::compile(&job, &options)?;
    if args.what.json {
        let list: Vec<_> = reports
            .iter()
            .map(|(path, report)| json!({"artifact": path, "report": report}))
            .collect();
        say!("{}", serde_json::to_string_pretty(&json!({"artifacts": list}))?);
    } else {
        for (path, report) in &reports {
            print_report(path, report);
        }
    }
    Ok(true)
}

fn print_report(path: &std::path::Path, report: &Report) {
    let mb = |bytes: u64| bytes as f64 / 1e6;
    say!(
        "{}: {}, {:.2} MB of {:.2} MB, {:.3} bits per weight",
        path.display(),
        report.layout,
        mb(report.file_bytes),
        mb(report.source_bytes),
        report.bits_per_weight
    );
    for note in &report.notes {
        say!("  note: {note}");
    }
    let worst = report.sites.iter().filter(|site| site.bits.is_some()).max_by(|a, b| {
        let error = |s: &attar_eval::report::SiteEntry| {
            s.result.output_error.unwrap_or(s.result.weight_error)
        };
        error(a).total_cmp(&error(b))
    });
    if let Some(worst) = worst {
        let (what, error) = match worst.result.output_error {
            Some(error) => ("output", error),
            None => ("weight", worst.result.weight_error),
        };
        say!("  largest relative {what} error: {error:.3e} at {}", worst.result.site);
    }
    if !report.sparsity.is_empty() {
        let mean = report.sparsity.iter().map(|line| line.zeros).sum::<f64>();
        say!(
            "  {} pruned linears, {:.2} % zero on average, read back",
            report.sparsity.len(),
            100.0 * mean / report.sparsity.len() as f64
        );
    }
    if report.reused.0 > 0 {
        say!("  {} of {} results were there already", report.reused.0, report.reused.1);
    }
    if let Some(eval) = &report.eval {
        say!("  {}", evaluate::line(eval));
    }
    let t = &report.timings;
    say!(
        "  {:.1} s: read {:.1}, forward {:.1}, statistics {:.1}, passes {:.1}, store {:.1}, write {:.1}, verify {:.1}, eval {:.1}; peak {:.0} MB (predicted {:.0} MB)",
        t.total,
        t.read,
        t.forward,
        t.statistics,
        t.solve,
        t.store,
        t.write,
        t.verify,
        t.eval,
        report.measured_peak_bytes.map_or(f64::NAN, mb),
        mb(report.predicted_peak_bytes)
    );
}

fn print_plan(args: &Plan, threads: Option<usize>) -> Result<bool, Error> {
    let measure = args.eval_text.clone().map(|text| Measure { text, context: args.eval_context });
    let job = compile::prepare(&args.what, measure::threads(threads), measure.as_ref())?;
    if args.what.json {
        let mut json = plan::to_json(&job.variants);
        for (at, (_, plan)) in job.variants.iter().enumerate() {
            for emit in 0..plan.emits.len() {
                let lines = contract::lines(plan, &job.checkpoint, &job.bases[at].0.headers, emit);
                json["variants"][at]["plan"]["emits"][emit]["ledger"] = json!(lines);
            }
        }
        json["warnings"] = json!(job.warnings);
        say!("{}", serde_json::to_string_pretty(&json)?);
    } else if args.dot {
        say!("{}", plan::dot(&job.variants));
    } else {
        say!("{}", plan::text(&job.variants));
        for ((variant, plan), (base, _)) in job.variants.iter().zip(&job.bases) {
            let lines = contract::lines(plan, &job.checkpoint, &base.headers, 0);
            let of =
                if job.variants.len() > 1 { format!("{}: ", variant.name) } else { String::new() };
            say!("ledger    {of}{}", attar_ir::ledger::summary(&lines));
        }
        for warning in &job.warnings {
            say!("warning   {warning}");
        }
    }
    Ok(true)
}

fn verify_artifact(args: &Verify) -> Result<bool, Error> {
    let source = args
        .source
        .as_deref()
        .map(|path| Checkpoint::open_dense(path, crate::gguf::dequantize))
        .transpose()?;
    let result = verify::verify(&args.path, source.as_ref(), true)?;
    let broken = contract::judge_files(&Opened::open(&args.path)?, &args.target)?;
    let refused = broken.iter().any(attar_ir::target::Violation::refuses);
    let good = result.problems.is_empty() && !refused;
    if args.json {
        let mut json = serde_json::to_value(&result)?;
        json["targets"] = json!(args.target);
        json["violations"] = json!(broken);
        say!("{}", serde_json::to_string_pretty(&json)?);
    } else {
        say!("{} quantized linears, {} dense", result.quantized, result.dense);
        if !result.sparsity.is_empty() {
            let all = result.sparsity.iter().map(|line| line.zeros);
            let (least, most) = all.fold((1.0f64, 0.0f64), |(a, b), z| (a.min(z), b.max(z)));
            say!(
                "{} pruned linears, {:.2} to {:.2} % zero; patterns hold as read back",
                result.sparsity.len(),
                100.0 * least,
                100.0 * most
            );
        }
        for line in &result.kernels {
            say!(
                "kernel {} on {} ({} linears): nmse {:.2e}, allowed {:.1e}; worst element {:.3} of its bound",
                line.kernel,
                line.layout,
                line.linears,
                line.worst_nmse,
                line.max_nmse,
                line.worst
            );
        }
        for problem in &result.problems {
            say!("PROBLEM {problem}");
        }
        for violation in &broken {
            say!("{} {violation}", if violation.refuses() { "REFUSED" } else { "warning" });
        }
        for target in &args.target {
            let name = target.to_string();
            let refused = broken.iter().any(|v| v.target == name && v.refuses());
            say!("{name}: {}", if refused { "does NOT accept it" } else { "accepts it" });
        }
        say!("{}", if good { "verified" } else { "verification FAILED" });
    }
    Ok(good)
}

fn emit(args: &Emit) -> Result<bool, Error> {
    let linears = bundle::write(&args.artifact, args.kernels_library.as_deref())?;
    let folder = args.artifact.join(bundle::FOLDER);
    say!("{}: kernels for {linears} packed linears", folder.display());
    for (metric, least) in bundle::statuses(&args.artifact)? {
        let backend = metric.trim_start_matches("kernel_status_");
        say!("  {backend}: {}", attar_eval::KERNEL_STATUS[least as usize]);
    }
    Ok(true)
}

fn gate(args: &Gate) -> Result<bool, Error> {
    let text = std::fs::read_to_string(&args.policy)
        .map_err(|error| format!("{}: {error}", args.policy.display()))?;
    let policy = Policy::parse(&text)?;
    let load = |path: &std::path::Path| -> Result<serde_json::Value, Error> {
        let file = if path.is_dir() { path.join(artifact::REPORT) } else { path.to_path_buf() };
        let mut report = attar_formats::read_json(&file)?;
        if path.is_dir() && bundle::exists(path) {
            for (metric, status) in bundle::statuses(path)? {
                report[metric] = json!(status);
            }
        }
        Ok(report)
    };
    let baseline = policy
        .baseline
        .as_ref()
        .map(|name| load(&args.policy.parent().unwrap_or(std::path::Path::new("")).join(name)))
        .transpose()?;
    let verdict = policy.judge(&load(&args.report)?, baseline.as_ref())?;
    if let Some(path) = &args.junit {
        std::fs::write(path, verdict.junit())
            .map_err(|error| format!("{}: {error}", path.display()))?;
    }
    if args.json {
        say!("{}", serde_json::to_string_pretty(&verdict)?);
    } else {
        say!("{}", verdict.table());
    }
    Ok(verdict.pass)
}

fn passes(schema: bool) -> Result<bool, Error> {
    let known = registry::known();
    if schema {
        let schema = attar_ir::recipe::json_schema(known.as_known());
        say!("{}", serde_json::to_string_pretty(&schema)?);
        return Ok(true);
    }
    say!("passes on the whole model (before all others):");
    for pass in &known.model {
        say!("  {:<15} {} ({})", pass.name, pass.summary, pass.paper);
    }
    say!("passes on one block after the other:");
    for pass in &known.block {
        say!("  {:<15} {} ({})", pass.name, pass.summary, pass.paper);
    }
    say!("presets:");
    for (name, summary) in attar_ir::recipe::PRESETS {
        say!("  {name:<15} {summary}");
    }
    Ok(true)
}
