//! What was typed.

use std::path::PathBuf;

use attar_ir::target::TargetSpec;
use attar_kernels::Activations;
use attar_tensor::linalg::Level;
use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};

use crate::commands::run::Measured;

/// A compression compiler for language models: prunes, transforms and quantizes Hugging Face checkpoints (and
/// GGUF files) into artifacts that runtimes load, and measures what it cost.
#[derive(Debug, Parser)]
#[command(version, about, after_help = "Exit codes: 0 done, 1 a check or gate failed, 2 an error.")]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
    /// Worker threads (default: all cores); results do not depend on it.
    #[arg(long, global = true)]
    pub(crate) threads: Option<usize>,
    /// Instruction set of everything that is computed (default: the best of this CPU); manifests record it.
    #[arg(long, global = true, value_name = "scalar|neon|avx2|avx512|amx")]
    pub(crate) isa: Option<Level>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Compress a checkpoint into one or several artifacts.
    Compress(Compress),
    /// Prove a recipe on a checkpoint and print what would be done, without reading a weight.
    Plan(Plan),
    /// Put the kernels that eat an artifact's packed weights into it, with a table of what is proved.
    Emit(Emit),
    /// Measure perplexity (and divergence from a reference) on the packed bytes.
    Eval(Eval),
    /// Re-open an artifact and check hashes, values, completeness and every kernel.
    Verify(Verify),
    /// List tensors, dtypes, sizes and schemes of a checkpoint or artifact.
    Inspect(Inspect),
    /// What was done to a tensor of an artifact: by which recipe step, from which statistics, at which error.
    Explain(Explain),
    /// Compare two artifacts or checkpoints, tensor by tensor; exit 1 when any differs.
    Diff(Diff),
    /// Compress again from an artifact's manifest and compare the hash of every file; exit 1 when any differs.
    Reproduce(Reproduce),
    /// Compare a report with a policy; exit 1 on a regression.
    Gate(Gate),
    /// Generate text through the packed kernels.
    Run(Run),
    /// Measure every kernel on every distinct shape of an artifact, beside what this machine can do.
    Bench(Bench),
    /// Compress the embedded model with several passes and print size against accuracy.
    Demo(Demo),
    /// Time the CUDA kernels on this GPU beside its copy bandwidth and cuBLAS.
    Gpu(Gpu),
    /// Write a model in another layout: exact where codes carry over, else with the error told.
    Convert(Convert),
    /// Sum the squares of every linear's input on a text: an importance matrix for this tool and llama.cpp.
    Imatrix(Imatrix),
    /// List, check or prune a work directory (`compress --scratch DIR`).
    Cache(Cache),
    /// List the runtimes that `--target` knows, with their rules and sources.
    Targets(Targets),
    /// List passes and presets, or print the recipe's JSON Schema.
    Passes {
        /// Print the JSON Schema of recipes.
        #[arg(long)]
        schema: bool,
        /// Print every pass with its options and a recipe that runs: RECIPES.md.
        #[arg(long, conflicts_with = "schema")]
        markdown: bool,
    },
}

#[derive(Debug, Default, ClapArgs)]
pub(crate) struct What {
    /// Directory with config.json and *.safetensors.
    pub(crate) checkpoint: PathBuf,
    /// Recipe file (TOML); RECIPES.md, or `attar passes --markdown`, has one for each pass.
    #[arg(long, conflicts_with = "preset", required_unless_present = "preset")]
    pub(crate) recipe: Option<PathBuf>,
    /// What paths in the recipe are relative to, where that is not its own folder.
    #[arg(skip)]
    pub(crate) base: Option<PathBuf>,
    /// Built-in recipe: rtn-w4, gptq-w4, awq-w4, gptq-w3, rtn-w8, ... (see `attar passes`).
    #[arg(long)]
    pub(crate) preset: Option<String>,
    /// Columns per scale for a preset; -1 is one scale per row.
    #[arg(long, default_value_t = 128, allow_negative_numbers = true, conflicts_with = "recipe")]
    pub(crate) group: i64,
    /// Layout of the packed weights; with several, one subdirectory each.
    #[arg(
        long,
        value_name = "compressed-tensors|compressed-tensors-int|gptq|gptq_v2|awq|dense|q4_0|q8_0|q4_k|..."
    )]
    pub(crate) layout: Vec<String>,
    /// Calibration text.
    #[arg(long, num_args = 1.., conflicts_with = "ids")]
    pub(crate) text: Vec<PathBuf>,
    /// Calibration token ids: JSON lines of {"input_ids": [...]}.
    #[arg(long)]
    pub(crate) ids: Option<PathBuf>,
    /// Importance matrix of llama.cpp (GGUF form), or of `attar imatrix`: what steps need no more than sums of squares
    /// (preset imatrix-q4_k_m, ...) read instead of calibrating.
    #[arg(long, value_name = "FILE")]
    pub(crate) imatrix: Option<PathBuf>,
    /// Calibration windows [default: 128, or the recipe's].
    #[arg(long)]
    pub(crate) samples: Option<usize>,
    /// Tokens per window, capped at the model's context [default: 2048, or the recipe's].
    #[arg(long)]
    pub(crate) context: Option<usize>,
    /// Seed [default: 0, or the recipe's].
    #[arg(long)]
    pub(crate) seed: Option<u64>,
    /// Resident memory that the run may use at its peak, e.g. 6GiB, 512MB or bytes: the plan picks what
    /// goes to scratch files and how many threads work, or names the smallest budget that would do
    /// [default: no limit].
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) memory: Option<u64>,
    #[command(flatten)]
    pub(crate) promise: Promise,
    /// Print one JSON object instead of text.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What the artifacts must be good for.
#[derive(Debug, Clone, Default, ClapArgs)]
pub(crate) struct Promise {
    /// Runtime that must accept every artifact, with the ranks it splits tensors over (repeatable):
    /// the plan is refused before any work when a rule of it is broken, and the written files are
    /// checked again. See `attar targets`.
    #[arg(long, value_name = "NAME[,tp=N]")]
    pub(crate) target: Vec<TargetSpec>,
    /// Accept linears that stay dense in some blocks while others of their kind are quantized.
    #[arg(long)]
    pub(crate) allow_dense: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Compress {
    #[command(flatten)]
    pub(crate) what: What,
    /// Where the artifact appears; must not exist, or be empty.
    #[arg(long)]
    pub(crate) out: PathBuf,
    /// Measure accuracy against the source on this text and put it into the report.
    #[arg(long, value_name = "FILE")]
    pub(crate) eval_text: Option<PathBuf>,
    /// Tokens per window of that measurement.
    #[arg(long, default_value_t = 512)]
    pub(crate) eval_context: usize,
    /// Work directory: results, statistics and activations that do not fit into memory. It is kept, and
    /// later runs take from it what they need [default: OUT.scratch, removed when the artifact is there].
    #[arg(long, value_name = "DIR")]
    pub(crate) scratch: Option<PathBuf>,
    /// Store the activations between blocks at most once per so many seconds; a killed run goes on from
    /// the last ones.
    #[arg(long, value_name = "SECONDS", default_value_t = 30.0)]
    pub(crate) checkpoint_every: f64,
    /// Prune a kept work directory to this size afterwards (20GB, 500MiB, ...), least recently used first.
    #[arg(long, value_name = "SIZE", requires = "scratch", value_parser = size)]
    pub(crate) cache_limit: Option<u64>,
    /// Progress on standard error.
    #[arg(long, value_enum, default_value = "bar")]
    pub(crate) progress: ProgressArg,
    /// Put the matching kernels into each artifact, as `attar emit` does.
    #[arg(long)]
    pub(crate) kernels: bool,
    /// Where the C library of the kernels lies [default: beside this program].
    #[arg(long, value_name = "DIR", requires = "kernels")]
    pub(crate) kernels_library: Option<PathBuf>,
}

/// `attar emit`.
#[derive(Debug, ClapArgs)]
pub(crate) struct Emit {
    /// Artifact; its `kernels/` is made, or replaced.
    pub(crate) artifact: PathBuf,
    /// Where the C library of the kernels lies [default: beside this program].
    #[arg(long, value_name = "DIR")]
    pub(crate) kernels_library: Option<PathBuf>,
}

/// Kinds of progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ProgressArg {
    /// A bar, on a terminal only.
    Bar,
    /// One JSON object a line for each part of the work, with its begin and end.
    Json,
}

/// Bytes as people write them.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: f64 = digits
        .trim()
        .parse()
        .map_err(|_| format!("`{text}` is no size; write e.g. 6GiB, 500MB or a number of bytes"))?;
    let unit = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kb" => 1e3,
        "m" | "mb" => 1e6,
        "g" | "gb" => 1e9,
        "t" | "tb" => 1e12,
        "kib" => 1024.0,
        "mib" => 1024.0 * 1024.0,
        "gib" => 1024.0 * 1024.0 * 1024.0,
        "tib" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        other => {
            return Err(format!("`{other}` is no unit of size; use kB, MB, GB, KiB, MiB, GiB"));
        }
    };
    let bytes = number * unit;
    if bytes.is_finite() && (0.0..1e18).contains(&bytes) {
        Ok(bytes as u64)
    } else {
        Err(format!("`{text}` is out of range"))
    }
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Cache {
    #[command(subcommand)]
    pub(crate) action: CacheAction,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CacheAction {
    /// What lies in a work directory, least recently used first.
    List {
        /// Work directory.
        dir: PathBuf,
        /// Print one JSON object instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Hash every object; exit 1 when one is damaged.
    Verify {
        /// Work directory.
        dir: PathBuf,
    },
    /// Remove the least recently used objects until the rest fits.
    Prune {
        /// Work directory.
        dir: PathBuf,
        /// Bytes that may stay (0, 20GB, 500MiB, ...).
        #[arg(long, value_name = "SIZE", value_parser = size)]
        limit: u64,
    },
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Plan {
    #[command(flatten)]
    pub(crate) what: What,
    /// Print the graph of steps and variants in Graphviz' language.
    #[arg(long, conflicts_with = "json")]
    pub(crate) dot: bool,
    /// Ignored; accepted so that a compress command line can be planned as it is.
    #[arg(long, hide = true)]
    pub(crate) out: Option<PathBuf>,
    /// Ignored likewise.
    #[arg(long, hide = true)]
    pub(crate) scratch: Option<PathBuf>,
    /// Count the memory of measuring accuracy on this text too.
    #[arg(long, value_name = "FILE")]
    pub(crate) eval_text: Option<PathBuf>,
    /// Tokens per window of that measurement.
    #[arg(long, default_value_t = 512)]
    pub(crate) eval_context: usize,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum ScoreArg {
    /// Every position but a window's first.
    All,
    /// llama.cpp's protocol: only the second half of each window.
    SecondHalf,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Eval {
    /// Checkpoint or artifact.
    pub(crate) path: PathBuf,
    /// Text to score.
    #[arg(long, conflicts_with = "ids", required_unless_present = "ids")]
    pub(crate) text: Option<PathBuf>,
    /// Token ids to score: JSON lines of {"input_ids": [...]}.
    #[arg(long)]
    pub(crate) ids: Option<PathBuf>,
    /// Tokens per window; windows do not overlap.
    #[arg(long, default_value_t = 512)]
    pub(crate) context: usize,
    /// Positions to score.
    #[arg(long, value_enum, default_value = "all")]
    pub(crate) score: ScoreArg,
    /// The original: adds KL divergence and top-1 agreement.
    #[arg(long)]
    pub(crate) reference: Option<PathBuf>,
    /// Windows at most.
    #[arg(long)]
    pub(crate) max_windows: Option<usize>,
    /// Put the beginning-of-sequence token in the first slot of each window.
    #[arg(long)]
    pub(crate) bos: bool,
    /// What the kernels of packed linears do to activations; by default what the artifact says (W8A8: bytes
    /// with a scale per token), else f32.
    #[arg(long, value_enum)]
    pub(crate) activations: Option<ActivationsArg>,
    /// Write the logits of the first window (tensor `logits`, f32 [context, vocab]).
    #[arg(long)]
    pub(crate) dump_logits: Option<PathBuf>,
    /// Print one JSON object instead of text.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Verify {
    /// Artifact.
    pub(crate) path: PathBuf,
    /// The checkpoint it was made from: every tensor must be accounted for.
    #[arg(long)]
    pub(crate) source: Option<PathBuf>,
    /// Runtime that must accept the artifact, ours or foreign (repeatable); exit 1 when it does not.
    #[arg(long, value_name = "NAME[,tp=N]")]
    pub(crate) target: Vec<TargetSpec>,
    /// Whose kernels: `cuda` runs every CUDA kernel on the shared cases and on this artifact's tensors, and nothing
    /// else.
    #[arg(long, value_enum, default_value_t = VerifyBackend::Cpu)]
    pub(crate) backend: VerifyBackend,
    /// Print one JSON object instead of text.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum VerifyBackend {
    Cpu,
    Cuda,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Gpu {
    /// Print one JSON object instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Targets {
    /// Only this one, with every rule in full.
    pub(crate) name: Option<TargetSpec>,
    /// Print one JSON object instead of text.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Inspect {
    /// Checkpoint or artifact.
    pub(crate) path: PathBuf,
    /// Print one JSON object instead of text.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Explain {
    /// Artifact (a checkpoint or an artifact of another tool says less).
    pub(crate) artifact: PathBuf,
    /// A site (`model.layers.0.mlp.up_proj`), a source tensor (`....weight`), a written part
    /// (`....qweight`), or the end of such a name when it is the only one.
    pub(crate) tensor: String,
    /// The checkpoint it was made from [default: where the report says it was].
    #[arg(long)]
    pub(crate) source: Option<PathBuf>,
    /// Print one JSON object instead of text.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Diff {
    /// Artifact or checkpoint.
    pub(crate) a: PathBuf,
    /// Artifact or checkpoint.
    pub(crate) b: PathBuf,
    /// Print one JSON object instead of text.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Reproduce {
    /// Artifact with its attar_manifest.json.
    pub(crate) artifact: PathBuf,
    /// The checkpoint it was made from [default: where the report says it was].
    #[arg(long)]
    pub(crate) source: Option<PathBuf>,
    /// Calibration text [default: where the report says it was].
    #[arg(long, num_args = 1.., conflicts_with = "ids")]
    pub(crate) text: Vec<PathBuf>,
    /// Calibration token ids [default: where the report says they were].
    #[arg(long)]
    pub(crate) ids: Option<PathBuf>,
    /// Importance matrix [default: where the report says it was].
    #[arg(long)]
    pub(crate) imatrix: Option<PathBuf>,
    /// Keep the new artifact here [default: a temporary directory beside the artifact, removed afterwards].
    #[arg(long)]
    pub(crate) out: Option<PathBuf>,
    /// Print one JSON object instead of text.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Gate {
    /// report.json, the output of `attar eval --json`, or an artifact.
    pub(crate) report: PathBuf,
    /// Policy file (TOML): baseline, max_perplexity_ratio, max_kl_mean, min_top1_agreement,
    /// max_bytes_ratio, min_kernel_status_cpu, min_kernel_status_cuda.
    #[arg(long)]
    pub(crate) policy: PathBuf,
    /// Write JUnit XML.
    #[arg(long)]
    pub(crate) junit: Option<PathBuf>,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Bench {
    /// Artifact.
    pub(crate) path: PathBuf,
    /// Where kernels run.
    #[arg(long, default_value = "cpu")]
    pub(crate) backend: String,
    /// Numbers of tokens.
    #[arg(long, value_delimiter = ',', default_value = "1,4,16,128,512")]
    pub(crate) m: Vec<usize>,
    /// Copies of a weight are read in turn until they are this large, so that up to 16 tokens read
    /// memory and not a cache; give more than the last-level cache.
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "640MiB")]
    pub(crate) rotate: u64,
    /// Seconds that each kernel is measured for at least.
    #[arg(long, default_value_t = 0.2)]
    pub(crate) seconds: f64,
    /// Exit 1 when the kernel that would be taken is slower than another one of the same activations by
    /// more than noise (8 %).
    #[arg(long)]
    pub(crate) assert_chosen: bool,
    /// Print one JSON object instead of text.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Run {
    /// Checkpoint or artifact.
    pub(crate) path: PathBuf,
    /// Text to continue.
    #[arg(long, required_unless_present = "bench")]
    pub(crate) prompt: Option<String>,
    /// Tokens to generate.
    #[arg(long, default_value_t = 64)]
    pub(crate) tokens: usize,
    /// 0 always takes the most likely token.
    #[arg(long, default_value_t = 0.0)]
    pub(crate) temperature: f32,
    /// Seed of the draw.
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// What the kernels of packed linears do to activations; by default what the artifact says (W8A8: bytes
    /// with a scale per token), else int8.
    #[arg(long, value_enum)]
    pub(crate) activations: Option<ActivationsArg>,
    /// Instead of text: measure the prefill of so many tokens and the decoding of so many others,
    /// each from an empty cache.
    #[arg(long, value_name = "PREFILL,DECODE", conflicts_with = "prompt")]
    pub(crate) bench: Option<Measured>,
    /// Repetitions of --bench; the fastest counts.
    #[arg(long, default_value_t = 3)]
    pub(crate) repeat: usize,
    /// Print one JSON object instead of text.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What kernels do to activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ActivationsArg {
    /// Nothing: products and sums in f32.
    F32,
    /// Round them to bytes, one scale for each 32, or for each token where the artifact says so.
    Int8,
}

impl From<ActivationsArg> for Activations {
    fn from(arg: ActivationsArg) -> Self {
        match arg {
            ActivationsArg::F32 => Self::F32,
            ActivationsArg::Int8 => Self::Int8,
        }
    }
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Convert {
    /// Checkpoint, artifact or GGUF file.
    pub(crate) source: PathBuf,
    /// Layout: compressed-tensors, compressed-tensors-int, gptq, gptq_v2, awq, a block type of GGUF (q4_0, q8_0, q4_k, ...), or f32,
    /// f16, bf16 for a GGUF file of plain numbers.
    #[arg(long)]
    pub(crate) layout: String,
    /// Where the artifact appears; must not exist, or be empty.
    #[arg(long)]
    pub(crate) out: PathBuf,
    /// Print one JSON object instead of text.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Imatrix {
    /// Directory with config.json and *.safetensors, or a GGUF file of plain numbers.
    pub(crate) checkpoint: PathBuf,
    /// Text.
    #[arg(long, num_args = 1.., conflicts_with = "ids")]
    pub(crate) text: Vec<PathBuf>,
    /// Token ids: JSON lines of {"input_ids": [...]}.
    #[arg(long)]
    pub(crate) ids: Option<PathBuf>,
    /// Windows at most, from the beginning [default: all].
    #[arg(long)]
    pub(crate) samples: Option<usize>,
    /// Tokens per window.
    #[arg(long, default_value_t = 512)]
    pub(crate) context: usize,
    /// Put the beginning-of-sequence token in the first slot of each window, as llama-imatrix does where the
    /// model asks for it.
    #[arg(long)]
    pub(crate) bos: bool,
    /// The input of the output head too.
    #[arg(long)]
    pub(crate) process_output: bool,
    /// The file to write.
    #[arg(long)]
    pub(crate) out: PathBuf,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Demo {
    /// Where the artifacts go.
    #[arg(long, default_value = "attar-demo")]
    pub(crate) out: PathBuf,
}
