//! What an artifact says about the CUDA kernels of a linear: symbols, launches, workspace, tolerance, status.

use attar_tensor::QuantScheme;
use serde::Serialize;

use super::geometry::{ArrangeArgument, DECODE_TOKENS, Generation, Half, Launch};
use super::geometry::{MatmulArgument, MatmulLaunch, Problem, arrange_launch};
use super::packed::{BLOCK_ROWS, Places, ScaleKind, zero_bytes};
use super::proof::UNITS;
use super::repack::{OrderArgument, RepackArgument, order_launch, repack_of};

/// How far a kernel has been proven.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Against the shared cases on a device.
    ValidatedOnHardware,
    /// Against the shared cases on the CPU shim, which runs the same source.
    ValidatedOnShim,
    /// Not run.
    Unmeasured,
}

/// The kernels of one linear for a number of tokens.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Description {
    /// Numbers of tokens that take this kernel, first and last. In the last range every 128 tokens begun take one more of
    /// `grid[2]`, and `partial_bytes` and `counters` once more.
    pub tokens: (usize, Option<usize>),
    /// The product.
    pub matmul: MatmulLaunch,
    /// Bytes of its argument, `AttarMatmul`.
    pub matmul_argument_bytes: usize,
    /// Packs the codes of the artifact, then lays out scales and zero points.
    pub repack: [Launch; 2],
    /// Bytes of their argument, `AttarRepack`.
    pub repack_argument_bytes: usize,
    /// Sorts columns (argument of this size), and puts activations into that order (argument of this size); `None` when places
    /// and columns are the same.
    pub order: Option<(Launch, usize, Launch, usize)>,
    /// Sizes of the packed codes, scales and zero points (0: a null pointer), and the places of a row of activations.
    pub packed_bytes: [usize; 3],
    /// Columns with padding: elements from token to token of arranged activations.
    pub places: usize,
    /// `group_halves` of the argument.
    pub group_halves: usize,
    /// `scale_kind` of the argument.
    pub scale_kind: i32,
    /// Units in the last place that a result may be off, beside twice the bound of f32 sums.
    pub tolerance_units: f64,
    /// How far it has been proven.
    pub status: Status,
}

/// Numbers of tokens that take the same kernel, first and last.
const fn token_ranges(generation: Generation) -> &'static [(usize, Option<usize>)] {
    match generation {
        Generation::Ampere => {
            &[(1, Some(8)), (9, Some(DECODE_TOKENS)), (17, Some(32)), (33, Some(64)), (65, None)]
        }
        // The memory of a block grows with the first eight tokens.
        Generation::Hopper => &[
            (1, Some(1)),
            (2, Some(2)),
            (3, Some(4)),
            (5, Some(8)),
            (9, Some(16)),
            (17, Some(32)),
            (33, Some(64)),
            (65, None),
        ],
    }
}

/// Describes the kernels of a linear of this layout, one entry for each range of tokens, launches for the last number of the
/// range (for 128 where it has no end). `None` when no kernel reads the layout.
pub fn describe(
    layout: &str,
    scheme: QuantScheme,
    (rows, columns): (usize, usize),
    g_idx: Option<&[u32]>,
    (half, scales): (Half, ScaleKind),
    generation: Generation,
) -> Option<Vec<Description>> {
    let reader = repack_of(layout)?;
    let bits = scheme.bits;
    let places = Places::new(columns, scheme.groups(columns)?, g_idx);
    let padded = rows.next_multiple_of(BLOCK_ROWS) * places.padded_groups();
    let codes = rows.div_ceil(BLOCK_ROWS) * places.chunks * 256 * usize::from(bits);
    let zeros = if scheme.symmetric { 0 } else { padded * zero_bytes(bits) };
    let one = |&tokens: &(usize, Option<usize>)| {
        let m = tokens.1.unwrap_or(128);
        let order = places.order.as_ref().map(|_| {
            (
                order_launch(places.chunks),
                size_of::<OrderArgument>(),
                arrange_launch(places.places(), m),
                size_of::<ArrangeArgument>(),
            )
        });
        Description {
            tokens,
            matmul: Problem {
                bits,
                half,
                rows,
                chunks: places.chunks,
                group_halves: places.group_halves,
                m,
                generation,
            }
            .launch(),
            matmul_argument_bytes: size_of::<MatmulArgument>(),
            repack: [
                reader.codes_launch(bits, rows, places.chunks),
                reader.groups_launch(bits, rows, &places),
            ],
            repack_argument_bytes: size_of::<RepackArgument>(),
            order,
            packed_bytes: [codes, padded * scales.bytes(), zeros],
            places: places.places(),
            group_halves: places.group_halves,
            scale_kind: scales as i32,
            tolerance_units: UNITS,
            status: Status::ValidatedOnShim,
        }
    };
    Some(token_ranges(generation).iter().map(one).collect())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::cases;
    use crate::cuda::images::images;

    #[test]
    fn a_range_of_tokens_takes_one_kernel() {
        for generation in [Generation::Ampere, Generation::Hopper] {
            for rows in [256, 8191, 8192, 20000] {
                let mut next = 1;
                for &(first, last) in token_ranges(generation) {
                    assert_eq!(first, next, "every number has a kernel");
                    let symbol = |m: usize| {
                        let (bits, half) = (4, Half::F16);
                        let problem = Problem {
                            bits,
                            half,
                            rows,
                            chunks: 64,
                            group_halves: 4,
                            m,
                            generation,
                        };
                        problem.launch().launch.symbol
                    };
                    for m in first..=last.unwrap_or(first + 200) {
                        assert_eq!(symbol(m), symbol(first), "{generation:?} {rows} rows, {m}");
                    }
                    next = last.unwrap_or(0) + 1;
                }
            }
        }
    }

    #[test]
    fn every_kernel_that_is_described_is_in_the_images() {
        let ptx = images().into_iter().find(|image| image.name == "ptx").unwrap();
        let ptx = String::from_utf8(ptx.bytes).unwrap();
        let sm_90a = images().into_iter().find(|image| image.name == "sm_90a").unwrap().bytes;
        let has = |launch: &Launch| {
            assert!(ptx.contains(&format!(".entry {}(", launch.symbol)), "{}", launch.symbol);
        };
        let mut seen = BTreeSet::new();
        for case in cases::all() {
            for layout in ["gptq", "gptq_v2", "awq", "compressed-tensors"] {
                if layout == "awq" && case.bits != 4 {
                    continue;
                }
                let (shape, weight) = ((case.out_features, case.in_features), case.weight());
                let g_idx = weight.g_idx.as_deref();
                for half in Half::ALL {
                    let of = |generation| {
                        let scales = (half, ScaleKind::F16);
                        describe(layout, case.scheme(), shape, g_idx, scales, generation).unwrap()
                    };
                    for d in of(Generation::Ampere) {
                        has(&d.matmul.launch);
                        d.repack.iter().for_each(has);
                        assert_eq!(d.order.is_some(), d.places != shape.1 || g_idx.is_some());
                        // What the smallest GPU of these generations allows a block.
                        assert!(d.matmul.launch.shared <= 99 << 10);
                    }
                    for d in of(Generation::Hopper) {
                        assert!(d.matmul.launch.shared <= 227 << 10);
                        seen.insert(d.matmul.launch.symbol);
                    }
                }
            }
        }
        for symbol in &seen {
            let name = format!(".text.{symbol}\0");
            let found = sm_90a.windows(name.len()).any(|bytes| bytes == name.as_bytes());
            assert!(found, "{symbol} is in the image for 9.0a");
        }
        assert!(seen.len() > 40, "{}", seen.len());
        assert!(
            describe(
                "q4_0",
                cases::all()[0].scheme(),
                (1, 128),
                None,
                (Half::F16, ScaleKind::F16),
                Generation::Ampere
            )
            .is_none()
        );
    }
}
