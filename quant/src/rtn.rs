//! Round to nearest: `code = round(w / scale) + zero`, each group on its own.
//!
//! `weight [out, in]`, cost O(out·in) for min-max, times the number of candidates for the searched
//! clipping range. The range search minimises the group's squared error.

use attar_ir::{
    Block, BlockState, BlockStats, Contract, Cost, Factors, FormChange, FormSet, InputStats,
    Limits, Needs, Pass, PassContext, PassDef, PassError, PassReport, SiteReport, Target, Touches,
    Upstream, Weight,
};
use attar_tensor::{
    BlockType, Mat, QuantScheme, QuantizedLinear, block_search,
    grid::{Clip, GroupGrid, choose_grid},
    linalg::{lowrank::product_error, vectorize},
};
use rayon::prelude::*;
use serde::Deserialize;

use crate::common::{ROW_TILE, check_finite, metric, options, relative, report_rows};

/// Registration of `rtn`.
pub(crate) const DEF: PassDef = PassDef {
    name: "rtn",
    summary: "round each weight to the nearest code; no calibration",
    paper: "baseline of Frantar et al. 2022, arXiv:2210.17323",
    example: "\
[[step]]
pass = \"rtn\"
scheme = { bits = 4, group_size = 64 }
",
    takes_scheme: true,
    symmetric_by_default: true,
    build: |table| Ok(Box::new(Rtn(options(table)?))),
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
    /// Block types: weigh each weight's squared error by the mean square of its input.
    importance: bool,
}

#[derive(Debug)]
struct Rtn(Options);

/// Rounds a weight to nearest; also returns `Σ (w − ŵ)²` and `Σ w²`, f32 within a group, f64 over groups.
pub fn round_to_nearest(
    weight: &Mat,
    scheme: QuantScheme,
    clip: Clip,
) -> (QuantizedLinear, [f64; 2]) {
    let (out, n) = weight.dim();
    let size = scheme.group_size(n);
    let groups = n / size;
    let top = f32::from(scheme.max_code());
    let mut codes = vec![0u8; out * n];
    let mut grids = vec![GroupGrid { scale: 1.0, zero: 0 }; out * groups];
    let sums: Vec<[f64; 2]> = weight
        .as_slice()
        .expect("standard layout")
        .par_chunks(ROW_TILE * n)
        .zip(codes.par_chunks_mut(ROW_TILE * n))
        .zip(grids.par_chunks_mut(ROW_TILE * groups))
        .map(|((weight, codes), grids)| {
            vectorize(
                #[inline(always)]
                || {
                    let mut sum = [0.0f64; 2];
                    let spans = weight.chunks(size).zip(codes.chunks_mut(size));
                    for ((w, codes), grid) in spans.zip(grids.iter_mut()) {
                        *grid = choose_grid(w, None, scheme, clip);
                        let [error, square] = round_group(w, *grid, top, codes);
                        sum[0] += f64::from(error);
                        sum[1] += f64::from(square);
                    }
                    sum
                },
            )
        })
        .collect();
    let total = sums.iter().fold([0.0; 2], |a, b| [a[0] + b[0], a[1] + b[1]]);
    (QuantizedLinear::of_grids(scheme, (out, n), codes, &grids), total)
}

/// Codes of one group; returns their squared error and the squares of the weights.
#[inline(always)]
fn round_group(w: &[f32], grid: GroupGrid, top: f32, codes: &mut [u8]) -> [f32; 2] {
    const LANES: usize = 32;
    let (scale, inverse, zero) = (grid.scale, 1.0 / grid.scale, f32::from(grid.zero));
    // 1.5 · 2²³ plus a small number rounds it to even and leaves it in the low bits, in two's complement;
    // a conversion of floats to integers is no vector instruction in Rust.
    const SHIFT: f32 = 12_582_912.0;
    let (low, high, offset) = (-zero, top - zero, u32::from(grid.zero));
    let one = |w: f32| {
        let shifted = (w * inverse).clamp(low, high) + SHIFT;
        let error = (shifted - SHIFT) * scale - w;
        (shifted.to_bits().wrapping_add(offset) as u8, error * error)
    };
    let (mut errors, mut squares) = ([0.0f32; LANES], [0.0f32; LANES]);
    let ((whole, tail), (to, to_tail)) = (w.as_chunks::<LANES>(), codes.as_chunks_mut::<LANES>());
    for (w, to) in whole.iter().zip(to) {
        for l in 0..LANES {
            let (code, error) = one(w[l]);
            to[l] = code;
            errors[l] += error;
            squares[l] += w[l] * w[l];
        }
    }
    for (l, (&w, to)) in tail.iter().zip(to_tail).enumerate() {
        let (code, error) = one(w);
        *to = code;
        errors[l] += error;
        squares[l] += w * w;
    }
    [fold(errors), fold(squares)]
}

/// Sum of lanes by halves.
#[inline(always)]
fn fold(mut lanes: [f32; 32]) -> f32 {
    let mut width = 16;
    while width > 0 {
        for l in 0..width {
            lanes[l] += lanes[l + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Mean square of each channel; `None` where the file that stands for calibration does not know the input.
fn importance(input: Option<&InputStats>) -> Option<Vec<f32>> {
    let input = input?;
    let sum = input.square_sum.as_ref().expect("the contract asks for it");
    let tokens = input.tokens.max(1) as f64;
    Some(sum.iter().map(|&v| (v / tokens) as f32).collect())
}

/// Rounds both factors of a weight.
fn factored(
    factors: &Factors,
    hessian: Option<&Mat>,
    (scheme, clip): (QuantScheme, Clip),
    site: &str,
) -> Result<(Factors, SiteReport), PassError> {
    let (down, up) = (factors.down.values(), factors.up.values());
    check_finite(site, "the factor down", &down)?;
    check_finite(site, "the factor up", &up)?;
    let round = |weight: &Mat| round_to_nearest(weight, scheme, clip).0;
    let (new_down, new_up) = (round(&down), round(&up));
    let made = (&new_up.dequantize(), &new_down.dequantize());
    let error = |h: Option<&Mat>| {
        let [error, whole] = product_error((&up, &down), made, h);
        relative(error, whole)
    };
    let report = SiteReport {
        site: site.to_owned(),
        pass: "rtn".into(),
        weight_error: error(None),
        output_error: hessian.map(|h| error(Some(h))),
        events: Vec::new(),
    };
    let quantized = Weight::Quantized;
    Ok((Factors { down: quantized(new_down), up: quantized(new_up) }, report))
}

impl Pass for Rtn {
    fn name(&self) -> &'static str {
        "rtn"
    }

    fn contract(&self) -> Contract {
        Contract {
            accepts: FormSet::FLOAT_ANY_RANK,
            produces: FormChange::QUANTIZE,
            needs: if self.0.importance { Needs::SQUARE_SUM } else { Needs::empty() },
            upstream: Upstream::Compressed,
            touches: Touches::Sites,
            looks_ahead: false,
        }
    }

    fn takes(&self, scheme: QuantScheme) -> Result<(), &'static str> {
        if self.0.importance && scheme.block().is_none() {
            return Err(
                "`importance` weighs the search of block types only and would be ignored; leave it away, or use gptq",
            );
        }
        Ok(())
    }

    fn cost(&self, block: &Block, targets: &[Target], _: &Limits) -> Cost {
        let weights: usize = targets.iter().map(|t| block.sites[t.site].weights()).sum();
        let each = if self.0.clip == Range::Mse { 500.0 } else { 8.0 };
        // Blocks: codes and what is at work of them; else the result and its error, where a Hessian is there.
        let bytes = |target: &Target| {
            let weights = block.sites[target.site].weights();
            match target.scheme.and_then(QuantScheme::block) {
                Some(_) => 2 * weights + (8 * weights).min(12 << 20),
                None => 8 * weights,
            }
        };
        let peak_bytes = targets.iter().map(bytes).max().unwrap_or(0);
        Cost { flops: each * weights as f64, peak_bytes, scratch_bytes: 0 }
    }

    fn apply(
        &self,
        context: &PassContext<'_>,
        targets: &[Target],
        state: &mut BlockState,
        stats: &mut BlockStats,
    ) -> Result<PassReport, PassError> {
        let clip = if self.0.clip == Range::Mse { Clip::Search(40) } else { Clip::MinMax };
        let mut sites = Vec::new();
        for target in targets {
            let site = &context.block.sites[target.site];
            let scheme = target.scheme.expect("the plan gives quantizing steps a scheme");
            let linear = &mut state.linears[target.site];
            if let Some(factors) = linear.weight.as_factored() {
                let hessian = stats
                    .input(context.block.input_of(target.site))
                    .and_then(|input| input.hessian.as_ref());
                let (made, report) = factored(factors, hessian, (scheme, clip), &site.name)?;
                sites.push(report);
                linear.weight = Weight::Factored(Box::new(made));
                continue;
            }
            let weight = linear.weight.as_dense().expect("the plan proved a float weight");
            check_finite(&site.name, "the weight", weight)?;
            let hessian = stats
                .input(context.block.input_of(target.site))
                .and_then(|input| input.hessian.as_ref());
            // A block type has a search of its own, which the range option does not change.
            let (quantized, weight_error, output_error) = if let Some(block) = scheme.block() {
                let values = weight.as_slice().expect("standard layout");
                let (out, n) = weight.dim();
                let input = stats.input(context.block.input_of(target.site));
                let importance = importance(input.filter(|_| self.0.importance));
                // Without weights the types with one level are what their range says, as in llama.cpp.
                let ranged = block.sub_scale_range().is_none() && block != BlockType::Iq4Nl;
                let quantized = if ranged && importance.is_none() || block == BlockType::Q80 {
                    block_search::quantize(block, values, out, n)
                } else {
                    block_search::search(block, values, out, n, importance.as_deref())
                };
                let row = |at: usize, out: &mut [f32]| quantized.dequantize_row(at, out);
                let found = report_rows("rtn", &site.name, weight, row, hessian);
                (Weight::Blocks(quantized), found.weight_error, found.output_error)
            } else {
                let (quantized, [error, square]) = round_to_nearest(weight, scheme, clip);
                let output_error = hessian.map(|h| {
                    relative(metric(&(&quantized.dequantize() - weight), h), metric(weight, h))
                });
                (Weight::Quantized(quantized), relative(error, square), output_error)
            };
            sites.push(SiteReport {
                site: site.name.clone(),
                pass: "rtn".into(),
                weight_error,
                output_error,
                events: Vec::new(),
            });
            linear.weight = quantized;
        }
        Ok(PassReport { sites })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::squares;
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
                    activations: attar_tensor::ActivationScheme::Float,
                };
                let loss = |clip| {
                    let (q, [error, _]) = round_to_nearest(&w, scheme, clip);
                    assert!(q.codes.iter().all(|&c| c <= scheme.max_code()));
                    assert!(q.zeros.iter().all(|&z| z >= 1 && z <= u16::from(scheme.max_code())));
                    for s in &q.scales {
                        assert_eq!(s.to_bits(), scheme.scale_grid.project(*s).to_bits());
                    }
                    let delta = &q.dequantize() - &w;
                    assert!((error / squares(&delta) - 1.0).abs() < 1e-4);
                    metric(&delta, &eye) / metric(&w, &eye)
                };
                let (plain, searched) = (loss(Clip::MinMax), loss(Clip::Search(40)));
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
