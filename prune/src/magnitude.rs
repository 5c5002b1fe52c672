//! Magnitude pruning: the weights with the least `|w|` become zero (Han et al. 2015, arXiv:1506.02626).
//!
//! `weight [out, in]`, no statistics, cost O(out·in). The least are looked for in the whole matrix, as the baselines of
//! the field do, or with `group = "row"` in each row; with n:m in each m weights of a row.

use attar_ir::{
    Block, BlockState, BlockStats, Contract, Cost, FormChange, FormSet, Limits, Needs, Pass,
    PassContext, PassDef, PassError, PassReport, SiteReport, Sparsity, Target, Touches, Upstream,
    Weight, check_finite, recipe::options, relative,
};
use attar_tensor::{Mat, Pattern, linalg::squares, mask::zero_least};
use rayon::prelude::*;
use serde::Deserialize;

use crate::options::pattern;

/// Registration of `magnitude`.
pub(crate) const DEF: PassDef = PassDef {
    name: "magnitude",
    summary: "set the smallest weights to zero; no calibration",
    paper: "Han et al. 2015, arXiv:1506.02626",
    example: "\
[[step]]
pass = \"magnitude\"
sparsity = 0.3
",
    takes_scheme: false,
    symmetric_by_default: false,
    build: |table| {
        let options: Options = options(table)?;
        let pattern = pattern(options.sparsity, options.pattern.as_deref())?;
        Ok(Box::new(Magnitude { pattern, group: options.group }))
    },
    schema: || schemars::schema_for!(Options),
};

/// Among which weights the least are looked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Group {
    /// All of a matrix.
    #[default]
    Matrix,
    /// Those of a row.
    Row,
}

#[derive(Debug, Clone, Default, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct Options {
    /// Fraction of the weights that become zero; 0.5 when there is no pattern either.
    sparsity: Option<f64>,
    /// `n:m`: n of every m consecutive weights of a row stay, e.g. `2:4`.
    pattern: Option<String>,
    /// Among which weights the least are looked for, without a pattern.
    group: Group,
}

#[derive(Debug)]
struct Magnitude {
    pattern: Pattern,
    group: Group,
}

/// Sets the least scores of each `span` weights to zero; `score(weight, column)`.
pub(crate) fn prune_spans(
    weight: &mut Mat,
    span: usize,
    pattern: Pattern,
    score: impl Fn(f32, usize) -> f32 + Sync,
) {
    let n = weight.ncols();
    let values = weight.as_slice_mut().expect("standard layout");
    values.par_chunks_mut(span.max(n)).for_each(|lines| {
        let (mut scores, mut order) = (Vec::new(), Vec::new());
        for (at, line) in lines.chunks_mut(span).enumerate() {
            // A span holds whole rows or lies inside one.
            let first = at * span;
            scores.clear();
            scores.extend(line.iter().enumerate().map(|(at, &w)| score(w, (first + at) % n)));
            zero_least(line, &scores, pattern.zeros(line.len()), &mut order);
        }
    });
}

impl Pass for Magnitude {
    fn name(&self) -> &'static str {
        "magnitude"
    }

    fn contract(&self) -> Contract {
        let sparsity = Some(Sparsity::from(self.pattern));
        Contract {
            accepts: FormSet::DENSE_FLOAT,
            produces: FormChange { sparsity, ..FormChange::NONE },
            needs: Needs::empty(),
            upstream: Upstream::Compressed,
            touches: Touches::Sites,
            looks_ahead: false,
        }
    }

    fn density(&self) -> Option<f64> {
        Some(self.pattern.density())
    }

    fn cost(&self, block: &Block, targets: &[Target], _: &Limits) -> Cost {
        let sizes = || targets.iter().map(|target| block.sites[target.site].weights());
        // A copy for the error, scores and their order.
        let peak_bytes = 12 * sizes().max().unwrap_or(0);
        Cost { flops: 20.0 * sizes().sum::<usize>() as f64, peak_bytes, scratch_bytes: 0 }
    }

    fn apply(
        &self,
        context: &PassContext<'_>,
        targets: &[Target],
        state: &mut BlockState,
        _: &mut BlockStats,
    ) -> Result<PassReport, PassError> {
        let mut sites = Vec::new();
        for target in targets {
            let site = &context.block.sites[target.site];
            let weight = state.linears[target.site].weight.as_dense();
            let weight = weight.expect("the plan proved a float weight");
            check_finite(&site.name, "the weight", weight)?;
            let mut pruned = weight.clone();
            let span = match (self.pattern, self.group) {
                (Pattern::NM { m, .. }, _) => usize::from(m),
                (_, Group::Row) => site.in_features,
                (_, Group::Matrix) => site.weights(),
            };
            prune_spans(&mut pruned, span, self.pattern, |w, _| w.abs());
            sites.push(SiteReport {
                site: site.name.clone(),
                pass: "magnitude".into(),
                weight_error: relative(squares(&(&pruned - weight)), squares(weight)),
                output_error: None,
                events: Vec::new(),
            });
            finish(state, target.site, pruned);
        }
        Ok(PassReport { sites })
    }
}

/// Puts a pruned weight into a block.
pub(crate) fn finish(state: &mut BlockState, site: usize, pruned: Mat) {
    state.linears[site].weight = Weight::Dense(pruned);
    state.weight_changed[site] = true;
    state.masked[site] = true;
}

#[cfg(test)]
mod tests {
    use super::*;
    use attar_tensor::{mask::breaks_pattern, rng::Rng};

    fn random(out: usize, n: usize) -> Mat {
        Mat::from_shape_vec((out, n), Rng::new(3).normals(out * n)).unwrap()
    }

    #[test]
    fn what_stays_is_larger_than_what_goes() {
        let w = random(6, 40);
        for (span, zeros) in [(240, 72), (40, 12)] {
            let mut pruned = w.clone();
            prune_spans(&mut pruned, span, Pattern::Fraction(0.3), |w, _| w.abs());
            let (w, pruned) = (w.as_slice().unwrap(), pruned.as_slice().unwrap());
            for (w, p) in w.chunks(span).zip(pruned.chunks(span)) {
                let gone = w.iter().zip(p).filter(|(_, p)| **p == 0.0).map(|(w, _)| w.abs());
                let stays = p.iter().filter(|p| **p != 0.0).map(|p| p.abs());
                assert_eq!(gone.clone().count(), zeros);
                assert!(gone.fold(0.0, f32::max) < stays.fold(f32::MAX, f32::min));
            }
        }
    }

    #[test]
    fn groups_keep_their_number() {
        for (n, m) in [(2u8, 4u8), (4, 8), (1, 5)] {
            let mut pruned = random(7, 40);
            let pattern = Pattern::NM { n, m };
            prune_spans(&mut pruned, usize::from(m), pattern, |w, _| w.abs());
            for row in pruned.as_slice().unwrap().chunks(40) {
                assert_eq!(breaks_pattern(row, n, m), None);
                let kept = row.iter().filter(|&&w| w != 0.0).count();
                assert_eq!(kept, 40 / usize::from(m) * usize::from(n));
            }
        }
    }
}
