//! Round to nearest: `code = round(w / scale) + zero`, each group on its own.
//!
//! `weight [out, in]`, cost O(out·in) for min-max, times the number of candidates for the searched
//! clipping range. The range search minimises the group's squared error.

use attar_ir::{
    Block, BlockState, BlockStats, Contract, Cost, FormChange, FormSet, Needs, Pass, PassContext,
    PassDef, PassError, PassReport, Target, Touches, Upstream, Weight,
};
use attar_tensor::{
    Mat, QuantScheme, QuantizedLinear,
    grid::{Clip, GroupGrid, choose_grid},
};
use rayon::prelude::*;
use serde::Deserialize;

use crate::common::{ROW_TILE, assemble, check_finite, options, report};

/// Registration of `rtn`.
pub(crate) const DEF: PassDef = PassDef {
    name: "rtn",
    summary: "round each weight to the nearest code; no calibration",
    paper: "baseline of Frantar et al. 2022, arXiv:2210.17323",
    takes_scheme: true,
    symmetric_by_default: true,
    build: |table| Ok(Box::new(Rtn(options(table, &["clip"])?))),
    schema: || schemars::schema_for!(Options),
};

/// How the range of a group is chosen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Range {
    /// The whole range of the group.
    #[default]
    Minmax,
    /// The shrunken range with the least squared error.
    Mse,
}

#[derive(Debug, Clone, Copy, Default, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct Options {
    clip: Range,
}

#[derive(Debug)]
struct Rtn(Options);

/// Rounds a weight to nearest.
pub(crate) fn round_to_nearest(weight: &Mat, scheme: QuantScheme, clip: Clip) -> QuantizedLinear {
    let (out, n) = weight.dim();
    let size = scheme.group_size(n);
    let groups = n / size;
    let top = f32::from(scheme.max_code());
    let mut codes = vec![0u8; out * n];
    let mut grids = vec![GroupGrid { scale: 1.0, zero: 0 }; out * groups];
    weight
        .as_slice()
        .expect("standard layout")
        .par_chunks(ROW_TILE * n)
        .zip(codes.par_chunks_mut(ROW_TILE * n))
        .zip(grids.par_chunks_mut(ROW_TILE * groups))
        .for_each(|((weight, codes), grids)| {
            let rows = weight.chunks(size).zip(codes.chunks_mut(size)).zip(grids);
            for ((w, codes), grid) in rows {
                *grid = choose_grid(w, None, scheme, clip);
                let (inverse, zero) = (1.0 / grid.scale, f32::from(grid.zero));
                pulp::Arch::new().dispatch(
                    #[inline(always)]
                    || {
                        for (code, &w) in codes.iter_mut().zip(w) {
                            let v = (w * inverse).round_ties_even() + zero;
                            *code = v.clamp(0.0, top) as u8;
                        }
                    },
                );
            }
        });
    assemble(scheme, (out, n), codes, &grids)
}

impl Pass for Rtn {
    fn name(&self) -> &'static str {
        "rtn"
    }

    fn contract(&self) -> Contract {
        Contract {
            accepts: FormSet::DENSE_FLOAT,
            produces: FormChange::QUANTIZE,
            needs: Needs::empty(),
            upstream: Upstream::Compressed,
            touches: Touches::Sites,
            looks_ahead: false,
        }
    }

    fn cost(&self, block: &Block, targets: &[Target]) -> Cost {
        let weights: usize = targets.iter().map(|t| block.sites[t.site].weights()).sum();
        let each = if self.0.clip == Range::Mse { 500.0 } else { 8.0 };
        let largest = targets.iter().map(|t| block.sites[t.site].weights()).max().unwrap_or(0);
        Cost { flops: each * weights as f64, peak_bytes: largest * 8 }
    }

    fn apply(
        &self,
        context: &PassContext<'_>,
        targets: &[Target],
        state: &mut BlockState,
        stats: &mut BlockStats,
    ) -> Result<PassReport, PassError> {
        let clip = if self.0.clip == Range::Mse { Clip::Search(80) } else { Clip::MinMax };
        let mut sites = Vec::new();
        for target in targets {
            let site = &context.block.sites[target.site];
            let scheme = target.scheme.expect("the plan gives quantizing steps a scheme");
            let linear = &mut state.linears[target.site];
            let weight = linear.weight.as_dense().expect("the plan proved a float weight");
            check_finite(&site.name, "the weight", weight)?;
            let quantized = round_to_nearest(weight, scheme, clip);
            let hessian = stats
                .input(context.block.input_of(target.site))
                .and_then(|input| input.hessian.as_ref());
            sites.push(report("rtn", &site.name, weight, &quantized.dequantize(), hessian));
            linear.weight = Weight::Quantized(quantized);
        }
        Ok(PassReport { sites })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::metric;
    use attar_tensor::{Granularity, ScaleGrid, rng::Rng};

    #[test]
    fn bits_and_the_range_search_lower_the_error_within_limits() {
        let (out, n) = (140, 128);
        let w = Mat::from_shape_vec((out, n), Rng::new(6).normals(out * n)).unwrap();
        let eye = Mat::from_shape_fn((n, n), |(i, j)| f32::from(u8::from(i == j)));
        for symmetric in [true, false] {
            let mut last = f64::INFINITY;
            for bits in [2, 3, 4, 8] {
                let scheme = QuantScheme {
                    bits,
                    granularity: Granularity::Group(64),
                    symmetric,
                    scale_grid: ScaleGrid::F16AndBf16,
                    zero_min: 1,
                };
                let loss = |clip| {
                    let q = round_to_nearest(&w, scheme, clip);
                    assert!(q.codes.iter().all(|&c| c <= scheme.max_code()));
                    assert!(q.zeros.iter().all(|&z| z >= 1 && z <= u16::from(scheme.max_code())));
                    for s in &q.scales {
                        assert_eq!(s.to_bits(), scheme.scale_grid.project(*s).to_bits());
                    }
                    metric(&(&q.dequantize() - &w), &eye) / metric(&w, &eye)
                };
                let (plain, searched) = (loss(Clip::MinMax), loss(Clip::Search(80)));
                assert!(searched <= plain * 1.0001 && plain < last);
                last = plain;
            }
            assert!(last < 1e-4, "8 bits are nearly exact: {last}");
        }
    }

    #[test]
    fn unknown_options_name_the_nearest() {
        let table: toml::Table = "clp = \"mse\"".parse().unwrap();
        let error = (DEF.build)(&table).unwrap_err().to_string();
        assert!(error.contains("clp") && error.contains("clip"), "{error}");
    }
}
