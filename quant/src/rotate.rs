//! Rotations merged into the weights: QuaRot (Ashkboos et al. 2024, arXiv:2404.00456) and SpinQuant's R1 and R2
//! without learning (Liu et al. 2024, arXiv:2405.16406).
//!
//! An RMS norm without weights commutes with any orthogonal Q: `norm(x Q) = norm(x) Q`. So with every norm's
//! weight `g` folded into what reads it, the residual stream may be turned by one `Q [hidden, hidden]`:
//! `E ← E Q`, `W ← W diag(g) Q` for what reads the stream, `W ← Qᵀ W`, `b ← b Q` for what adds to it (R1). Inside
//! each value head `V ← Rᵀ V`, `O ← O R` with `R [head_dim, head_dim]` (R2): attention weights only mix tokens.
//! The model computes the same; outlier channels are spread over all. Norm weights become one; a tied head
//! becomes a tensor of its own, since the embedding takes no `diag(g)`. f64, tensors as f32 until written.
//! Cost `n log n` per row for powers of two.
//!
//! `kind = "pca"` turns the stream into its principal axes: with `x` what norms read, over all blocks and tokens,
//! `Σ x xᵀ / rms(x)² = Q diag(λ) Qᵀ`, λ falling. The least of them can then be cut off by `prune_hidden`: SliceGPT (Ashkboos et
//! al. 2024, arXiv:2401.15024) with one Q for all blocks in place of one for each, since stock runtimes have no place for the
//! matrices between different bases.
//!
//! Not here: rotations that a runtime would have to apply (R3, R4).

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use attar_ir::{
    Block, Cost, DimName, ModelContext, ModelEntry, ModelGraph, ModelPass, ModelPassDef, Needs,
    PassError, ReadTensor, Side, Sizes, Survey, Transform, Work,
};
use attar_tensor::linalg::{Orthogonal, eigen_symmetric};
use rayon::prelude::*;
use serde::Deserialize;

use crate::common::options;

/// Registration of `rotate`.
pub(crate) const DEF: ModelPassDef = ModelPassDef {
    name: "rotate",
    summary: "turn the residual stream and the value heads by orthogonal matrices merged into the weights",
    paper: "Ashkboos et al. 2024, arXiv:2404.00456; Liu et al. 2024, arXiv:2405.16406; pca: Ashkboos et al. 2024, arXiv:2401.15024",
    example: "\
[[step]]\n\
pass = \"rotate\"\n\
\n\
[[step]]\n\
pass = \"gptq\"\n\
scheme = { bits = 4, group_size = -1 }\n\
",
    build: |table| {
        let options = options(table)?;
        Ok(Box::new(Rotate { options, known: Mutex::default(), seen: Mutex::default() }))
    },
    schema: || schemars::schema_for!(Options),
};

/// What the matrices are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Kind {
    /// Signed Walsh-Hadamard; for sizes that are no power of two times a small random matrix.
    Hadamard,
    /// Random orthogonal.
    Orthogonal,
    /// The stream by its principal axes on the calibration text, falling; heads by Hadamard matrices.
    Pca,
}

#[derive(Debug, Clone, Copy, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct Options {
    /// What the matrices are: `hadamard` (default), `orthogonal` (random, from the recipe's seed), or `pca`, the stream by its
    /// principal axes on the calibration text, the least of which `prune_hidden` can then cut (SliceGPT with one basis).
    kind: Kind,
    /// Turn the residual stream (R1).
    stream: bool,
    /// Turn the value heads (R2).
    values: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { kind: Kind::Hadamard, stream: true, values: true }
    }
}

#[derive(Debug)]
struct Rotate {
    options: Options,
    /// Matrices by order and seed: a random one takes a QR decomposition.
    known: Mutex<BTreeMap<(usize, u64), Arc<Orthogonal>>>,
    /// What was seen of the stream, and its principal axes once all was.
    seen: Mutex<(Vec<f64>, Option<Arc<Orthogonal>>)>,
}

/// What is done to one tensor.
#[derive(Debug, Default)]
struct Turns {
    /// Rows (or a vector) by the stream's matrix, columns of the norm's weight first.
    reads_stream: bool,
    /// The same without a norm: embedding and biases.
    makes_row: bool,
    /// Columns by the stream's matrix.
    makes_stream: bool,
    /// A norm's weight.
    norm: bool,
    /// A tensor of one axis.
    vector: bool,
    /// Number of heads along the columns, or the rows, that are turned, and the block.
    reads_values: Option<(usize, usize)>,
    makes_values: Option<(usize, usize)>,
}

impl Rotate {
    fn matrix(&self, n: usize, seed: u64) -> Arc<Orthogonal> {
        let mut known = self.known.lock().expect("nobody panics with it");
        let make = || match self.options.kind {
            Kind::Hadamard | Kind::Pca => Orthogonal::hadamard(n, seed),
            Kind::Orthogonal => Orthogonal::dense(n, seed),
        };
        Arc::clone(known.entry((n, seed)).or_insert_with(|| Arc::new(make())))
    }

    /// The matrix of the stream.
    fn of_stream(&self, context: &ModelContext<'_>) -> Result<Arc<Orthogonal>, PassError> {
        if self.options.kind != Kind::Pca {
            return Ok(self.matrix(context.graph.hidden, context.seed));
        }
        let seen = self.seen.lock().expect("nobody panics with it");
        seen.1.clone().ok_or_else(|| stream_error("its principal axes were not looked for".into()))
    }

    fn turns(&self, graph: &ModelGraph, tensor: &str, head: bool) -> Turns {
        let mut turns = Turns::default();
        if head {
            turns.reads_stream = self.options.stream;
            return turns;
        }
        let dims = graph.dims();
        let of = |dim: &'_ attar_ir::Dim| {
            let here = dim.members.iter().filter(|member| member.tensor == tensor);
            here.map(|member| (dim.name, member.clone())).collect::<Vec<_>>()
        };
        let members: Vec<_> = dims.iter().flat_map(of).collect();
        // A bias or a norm: no axis but the first.
        turns.vector = members.iter().all(|(_, member)| member.axis == 0);
        for (name, member) in &members {
            match (*name, member.side) {
                (DimName::Hidden, _) if !self.options.stream => {}
                (DimName::Hidden, Side::Reads) => turns.reads_stream = true,
                (DimName::Hidden, Side::Scales) => turns.norm = true,
                (DimName::Hidden, Side::Makes) if turns.vector || member.axis == 1 => {
                    turns.makes_row = true;
                }
                (DimName::Hidden, Side::Makes) => turns.makes_stream = true,
                (DimName::ValueChannel(block), side) if self.options.values => {
                    let of = Some((member.outer, block));
                    if side == Side::Reads {
                        turns.reads_values = of;
                    } else {
                        turns.makes_values = of;
                    }
                }
                _ => {}
            }
        }
        turns
    }
}

fn stream_error(reason: String) -> PassError {
    PassError::Numeric { site: "the residual stream".into(), reason }
}

/// Applies the matrix to rows of `values [rows, columns]`, `count` times side by side in each.
fn rows(q: &Orthogonal, count: usize, columns: usize, values: &mut [f32]) {
    /// Rows worked on by one task; each by itself, so that threads do not change bits.
    const TASK: usize = 64;
    let n = columns / count;
    values.par_chunks_mut(TASK * columns).for_each(|rows| {
        let (mut wide, mut buffer) = (vec![0.0f64; n], Vec::new());
        for part in rows.chunks_mut(n) {
            wide.iter_mut().zip(&*part).for_each(|(wide, &x)| *wide = f64::from(x));
            q.apply(&mut wide, &mut buffer);
            part.iter_mut().zip(&wide).for_each(|(x, &wide)| *x = wide as f32);
        }
    });
}

/// Applies the matrix to columns of `values [rows, columns]`, `count` times one below the other.
fn columns(q: &Orthogonal, count: usize, columns: usize, values: &mut [f32]) {
    /// Columns worked on by one task; fixed, so that threads do not change bits.
    const TASK: usize = 32;
    let height = values.len() / columns;
    let shared = &*values;
    let turned: Vec<Vec<f32>> = (0..columns)
        .into_par_iter()
        .step_by(TASK)
        .map(|first| {
            let width = TASK.min(columns - first);
            let mut lines = vec![0.0f32; width * height];
            for (r, row) in shared.chunks(columns).enumerate() {
                for c in 0..width {
                    lines[c * height + r] = row[first + c];
                }
            }
            rows(q, count, height, &mut lines);
            lines
        })
        .collect();
    for (at, lines) in turned.iter().enumerate() {
        for (c, line) in lines.chunks(height).enumerate() {
            for (r, &value) in line.iter().enumerate() {
                values[r * columns + at * TASK + c] = value;
            }
        }
    }
}

impl Transform for Rotate {
    fn needs(&self) -> Needs {
        let axes = self.options.kind == Kind::Pca && self.options.stream;
        if axes { Needs::HESSIAN } else { Needs::empty() }
    }

    fn see(
        &self,
        context: &ModelContext<'_>,
        block: &Block,
        survey: &Survey,
    ) -> Result<(), PassError> {
        let n = context.graph.hidden;
        let mut seen = self.seen.lock().expect("nobody panics with it");
        let (sum, axes) = &mut *seen;
        if block.index == 0 {
            (*sum, *axes) = (vec![0.0; n * n], None);
        }
        for (input, stats) in survey.stats.inputs.iter().enumerate() {
            let (Some(norm), Some(stats)) = (block.norm_of(input), stats) else { continue };
            let hessian = stats.hessian.as_ref().expect("the pass asks for it");
            // Without the norm's own weight.
            let inverse = |&g: &f32| if g == 0.0 { 0.0 } else { 1.0 / f64::from(g) };
            let inverse: Vec<f64> = survey.norms[norm].iter().map(inverse).collect();
            for ((sum, row), of_row) in sum.chunks_mut(n).zip(hessian.outer_iter()).zip(&inverse) {
                for ((sum, &h), of_column) in sum.iter_mut().zip(row).zip(&inverse) {
                    *sum += f64::from(h) * of_row * of_column;
                }
            }
        }
        if block.attention.is_none() {
            let sum = std::mem::take(sum);
            let eigen =
                eigen_symmetric(&sum, n).map_err(|error| stream_error(error.to_string()))?;
            // Row k of the vectors is an axis; `x Q` are the coordinates along them.
            let vectors = &eigen.vectors;
            let rows = (0..n * n).map(|at| vectors[at % n * n + at / n]).collect();
            *axes = Some(Arc::new(Orthogonal::given(n, rows)));
        }
        Ok(())
    }

    fn entries(&self, graph: &ModelGraph) -> Vec<ModelEntry> {
        let turned = |what: &str, size: usize| ModelEntry {
            step: String::new(),
            what: what.to_owned(),
            before: size,
            after: size,
            removed: Vec::new(),
            output_error: None,
            scores: Vec::new(),
            training: None,
        };
        let head = graph.blocks.first().and_then(|block| block.attention);
        let mut entries = Vec::new();
        if self.options.stream {
            entries.push(turned("hidden, turned", graph.hidden));
        }
        if self.options.values {
            entries.push(turned("value channels, turned", head.map_or(0, |head| head.head_dim)));
        }
        entries
    }

    fn mixes_rows(&self, context: &ModelContext<'_>, tensor: &str) -> bool {
        let turns = self.turns(context.graph, tensor, false);
        turns.makes_stream || turns.makes_values.is_some() && !turns.vector
    }

    fn apply(
        &self,
        context: &ModelContext<'_>,
        tensor: &str,
        head: bool,
        width: usize,
        values: &mut [f32],
        read: &ReadTensor<'_>,
    ) -> Result<(), PassError> {
        let graph = context.graph;
        let turns = self.turns(graph, tensor, head);
        let of_block = |block: usize| {
            let dim = graph.blocks[block].attention.map_or(1, |attention| attention.head_dim);
            self.matrix(dim, context.seed.wrapping_add(1 + block as u64))
        };
        if turns.norm {
            values.fill(1.0);
        }
        if turns.reads_stream {
            // The output head stands behind the last norm, whether a fold says so or not.
            let last = graph.epilogue.norms[0].tensor.as_str();
            let norm = if head { last } else { graph.norm_before(tensor).unwrap_or(last) };
            let scale = read(norm)?;
            for row in values.chunks_mut(width) {
                row.iter_mut().zip(&scale).for_each(|(x, g)| *x *= g);
            }
        }
        if turns.reads_stream || turns.makes_row {
            rows(&*self.of_stream(context)?, 1, width, values);
        }
        if turns.makes_stream {
            columns(&*self.of_stream(context)?, 1, width, values);
        }
        if let Some((count, block)) = turns.reads_values {
            rows(&of_block(block), count, width, values);
        }
        if let Some((count, block)) = turns.makes_values {
            if turns.vector {
                rows(&of_block(block), count, width, values);
            } else {
                columns(&of_block(block), count, width, values);
            }
        }
        Ok(())
    }
}

impl ModelPass for Rotate {
    fn name(&self) -> &'static str {
        "rotate"
    }

    fn reshape(&self, graph: &ModelGraph) -> Result<Sizes, String> {
        if !self.options.stream && !self.options.values {
            return Err("turns neither the stream nor the values; set one of them to true".into());
        }
        Ok(Sizes { tied: graph.tied && !self.options.stream, ..graph.sizes() })
    }

    fn turns_stream(&self) -> bool {
        self.options.stream
    }

    fn describe(&self, graph: &ModelGraph) -> String {
        let mut parts = Vec::new();
        if self.options.stream {
            let axes = if self.options.kind == Kind::Pca { " to its principal axes" } else { "" };
            parts.push(format!("residual stream of {}{axes}", graph.hidden));
        }
        if self.options.values {
            let dim = graph.blocks.first().and_then(|block| block.attention);
            parts.push(format!("value heads of {}", dim.map_or(0, |attention| attention.head_dim)));
        }
        let untied = graph.tied && self.options.stream;
        format!(
            "turns {}{}",
            parts.join(" and "),
            if untied { "; the output head gets a tensor of its own" } else { "" }
        )
    }

    fn cost(&self, graph: &ModelGraph, _: usize) -> Cost {
        let n = graph.hidden;
        let dense = n >> n.trailing_zeros().min(63);
        let each = match self.options.kind {
            Kind::Hadamard => (n.ilog2() as usize + 2 * dense) as f64,
            Kind::Orthogonal | Kind::Pca => 2.0 * n as f64,
        };
        let weights = graph.block_weights() + 2 * graph.vocab * graph.hidden;
        let matrix = if self.options.kind == Kind::Hadamard { dense * dense } else { n * n };
        let axes = if self.options.kind == Kind::Pca { 9.0 * (n as f64).powi(3) } else { 0.0 };
        // Numbers, their decomposition, Q, and Q row by row.
        Cost { flops: weights as f64 * each + axes, peak_bytes: 32 * matrix, scratch_bytes: 0 }
    }

    fn work(&self) -> Work<'_> {
        Work::Transform(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_and_columns_are_turned_alike() {
        let q = Orthogonal::hadamard(8, 3);
        let mut across: Vec<f32> = (0..16 * 5).map(|i| (i as f32 * 0.3).sin()).collect();
        // The transposed matrix [16, 5].
        let mut down: Vec<f32> = (0..16 * 5).map(|i| across[i % 5 * 16 + i / 5]).collect();
        rows(&q, 2, 16, &mut across);
        columns(&q, 2, 5, &mut down);
        for (i, value) in down.iter().enumerate() {
            assert_eq!(value.to_bits(), across[i % 5 * 16 + i / 5].to_bits());
        }
    }

    #[test]
    fn unknown_options_name_the_nearest() {
        let table: toml::Table = "strem = true".parse().unwrap();
        let error = (DEF.build)(&table).unwrap_err().to_string();
        assert!(error.contains("strem") && error.contains("stream"), "{error}");
    }
}
