//! The cases that every kernel of every backend is held to, and the judge that holds it.
//!
//! A [`Case`] is a quantized weight: shapes with tails, widths, groups, zero points, an order of columns,
//! and values chosen to hurt. It is multiplied with each kind of [`Input`] for each number of
//! [`TOKENS`]. The [`Judge`] multiplies in f64 and knows by how much each element may be off: a bound
//! that follows from the format and from what the kernel does to activations.

use attar_tensor::compare::Tolerance;
use attar_tensor::rng::Rng;
use attar_tensor::{
    BlockQuantized, DType, Granularity, QuantScheme, QuantizedLinear, ScaleGrid, blocks::Levels,
};
use rayon::prelude::*;

use crate::spec::Activations;

/// Numbers of tokens: one, the few that share a read of the weights, and tiles with tails.
pub const TOKENS: [usize; 9] = [1, 2, 3, 7, 16, 17, 33, 128, 513];

/// What is special about the numbers of a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Values {
    /// Uniform codes and zero points, scales of the usual size.
    Plain,
    /// A third of the scales is zero.
    ZeroScales,
    /// The largest and the smallest normal scales of the type, next to each other.
    ExtremeScales,
    /// Scales below the smallest normal number of the type.
    DenormalScales,
    /// Zero points at both ends of their range, codes too.
    Ends,
}

/// Kinds of activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// Standard normal.
    Gaussian,
    /// Standard normal with every 97th column eight times as large, as trained models have them.
    Outliers,
}

impl Input {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Gaussian, Self::Outliers];

    /// `[m, columns]`; the first tokens do not depend on `m`.
    pub fn activations(self, m: usize, columns: usize, seed: u64) -> Vec<f32> {
        let mut x = Rng::new(seed).normals(m * columns);
        if self == Self::Outliers {
            for x in x.chunks_mut(columns.max(1)) {
                x.iter_mut().skip(5).step_by(97).for_each(|x| *x *= 8.0);
            }
        }
        x
    }
}

/// One weight to multiply by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Case {
    /// Bits per code.
    pub bits: u8,
    /// Columns per scale; 0 is one scale per row.
    pub group: usize,
    /// Zero points in the middle.
    pub symmetric: bool,
    /// Columns stand in a random order of groups.
    pub act_order: bool,
    /// Rows.
    pub out_features: usize,
    /// Columns.
    pub in_features: usize,
    /// Of four neighbouring columns two have the zero point's code.
    pub pruned: bool,
    /// What the values are.
    pub values: Values,
    /// Type of the tensor in the source checkpoint; its scales lie on that grid.
    pub source: DType,
}

/// All cases.
pub fn all() -> Vec<Case> {
    let plain = Case {
        bits: 4,
        group: 128,
        symmetric: true,
        act_order: false,
        pruned: false,
        out_features: 96,
        in_features: 256,
        values: Values::Plain,
        source: DType::F16,
    };
    let mut cases = Vec::new();
    for bits in [2, 3, 4, 8] {
        for group in [32, 64, 128, 0] {
            for symmetric in [true, false] {
                cases.push(Case { bits, group, symmetric, ..plain });
            }
        }
        let asymmetric = Case { bits, symmetric: false, ..plain };
        cases.push(Case { act_order: true, in_features: 512, ..asymmetric });
        cases.push(Case { act_order: true, group: 32, symmetric: true, ..asymmetric });
        for values in
            [Values::ZeroScales, Values::ExtremeScales, Values::DenormalScales, Values::Ends]
        {
            cases.push(Case { values, group: 32, ..asymmetric });
        }
        // Tails: rows that fill no tile, one row, columns that fill no block of their group.
        cases.push(Case { out_features: 37, in_features: 384, ..asymmetric });
        cases.push(Case { out_features: 1, in_features: 128, ..asymmetric });
        cases.push(Case { out_features: 17, in_features: 72, group: 24, ..asymmetric });
        cases.push(Case { out_features: 50, in_features: 77, group: 0, ..asymmetric });
        cases.push(Case { bits, out_features: 33, in_features: 1024, group: 64, ..plain });
        for source in [DType::BF16, DType::F32] {
            cases.push(Case { source, ..asymmetric });
        }
    }
    // 4-bit weights at 2:4, with the tails and the numbers that hurt.
    let pruned = Case { pruned: true, ..plain };
    for group in [32, 128, 0] {
        for symmetric in [true, false] {
            cases.push(Case { group, symmetric, ..pruned });
        }
    }
    let asymmetric = Case { symmetric: false, ..pruned };
    cases.push(Case { out_features: 37, in_features: 384, ..asymmetric });
    cases.push(Case { out_features: 17, in_features: 72, group: 24, ..asymmetric });
    cases.push(Case { out_features: 1, in_features: 128, ..pruned });
    cases.push(Case { out_features: 33, in_features: 1024, group: 64, ..pruned });
    cases.push(Case { values: Values::ZeroScales, group: 32, ..asymmetric });
    cases.push(Case { values: Values::Ends, group: 32, ..asymmetric });
    cases.push(Case { source: DType::F32, ..asymmetric });
    cases
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let order = if self.act_order { " act-order" } else { "" };
        let (rows, columns) = (self.out_features, self.in_features);
        let (label, values, source) = (self.scheme().label(), self.values, self.source);
        let pruned = if self.pruned { " 2:4" } else { "" };
        write!(f, "{rows}x{columns} {label}{order}{pruned} {values:?} {source} scales")
    }
}

impl Case {
    /// Bits, group, symmetry, scale grid.
    pub fn scheme(&self) -> QuantScheme {
        QuantScheme {
            bits: self.bits,
            granularity: match self.group {
                0 => Granularity::Channel,
                size => Granularity::Group(size),
            },
            symmetric: self.symmetric,
            scale_grid: match self.source {
                DType::F16 => ScaleGrid::F16,
                DType::BF16 => ScaleGrid::Bf16,
                _ => ScaleGrid::F32,
            },
            zero_min: 1,
            activations: attar_tensor::ActivationScheme::Float,
        }
    }

    /// The weight; the same one every time.
    pub fn weight(&self) -> QuantizedLinear {
        let scheme = self.scheme();
        let (rows, columns) = (self.out_features, self.in_features);
        let groups = columns / scheme.group_size(columns);
        let seed = 1 + u64::from(self.bits) + 16 * (rows * columns + self.group) as u64;
        let mut rng = Rng::new(seed);
        let levels = usize::from(scheme.max_code()) + 1;
        let low = usize::from(scheme.zero_min);
        let ends = self.values == Values::Ends;
        let code = |rng: &mut Rng| match rng.below(if ends { 4 } else { 1 }) {
            1 => 0,
            2 => scheme.max_code(),
            _ => rng.below(levels) as u8,
        };
        let codes: Vec<u8> = (0..rows * columns).map(|_| code(&mut rng)).collect();
        let zeros = (0..rows * groups).map(|_| match (self.symmetric, ends) {
            (true, _) => u16::from(scheme.mid_code()),
            (false, true) => [scheme.zero_min.into(), scheme.max_code().into()][rng.below(2)],
            (false, false) => (low + rng.below(levels - low)) as u16,
        });
        let zeros = zeros.collect();
        let scales = (0..rows * groups).map(|_| self.scale(&mut rng)).collect();
        let mut g_idx = None;
        if self.act_order && groups > 1 {
            let size = scheme.group_size(columns);
            let mut order: Vec<u32> = (0..columns).map(|column| (column / size) as u32).collect();
            for i in (1..order.len()).rev() {
                order.swap(i, rng.below(i + 1));
            }
            g_idx = Some(order);
        }
        let mut weight = QuantizedLinear {
            scheme,
            out_features: rows,
            in_features: columns,
            codes,
            scales,
            zeros,
            g_idx,
        };
        if self.pruned {
            let groups = weight.groups();
            for at in 0..rows * columns {
                // Two of each four, any of the six pairs.
                let (row, column) = (at / columns, at % columns);
                let pair = [3u8, 5, 6, 9, 10, 12][(row * 31 + column / 4 * 7) % 6];
                if pair >> (column % 4) & 1 == 0 {
                    let zero = weight.zeros[row * groups + weight.group_of(column)];
                    weight.codes[at] = zero as u8;
                }
            }
        }
        weight
    }

    fn scale(&self, rng: &mut Rng) -> f32 {
        let plain = self.scheme().scale_grid.project(0.001 + 0.02 * rng.uniform());
        let half = self.source == DType::F16;
        match self.values {
            Values::Plain | Values::Ends => plain,
            Values::ZeroScales => [0.0, plain, plain][rng.below(3)],
            Values::ExtremeScales if half => [65504.0, 6.103_515_6e-5][rng.below(2)],
            Values::ExtremeScales => {
                [1e30, 1e-30].map(|s| self.scheme().scale_grid.project(s))[rng.below(2)]
            }
            // Multiples of the smallest f16, 2^-24, or of the smallest bf16 and f32 alike, 2^-133.
            Values::DenormalScales => {
                let step = if half { 2f32.powi(-24) } else { 2f32.powi(-133) };
                step * (1 + rng.below(if half { 1023 } else { 127 })) as f32
            }
        }
    }
}

/// Tokens over which errors of rounded activations average out.
pub const AVERAGED: usize = 33;

/// What one result was found to be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Finding {
    /// True when there are at least [`AVERAGED`] tokens and sixteen rows.
    pub averaged: bool,
    /// `‖got − reference‖² / ‖reference‖²`; where products cancel by chance so that the reference is
    /// smaller than [`Expected`] powers, those take its place.
    pub nmse: f64,
    /// Largest `|got − reference|`.
    pub max_abs: f64,
    /// Largest `|got − reference|` in units of the element's bound; more than 1 is an error.
    pub worst: f64,
}

impl Finding {
    /// True when each element is within its bound and the whole within the tolerance. The errors of a
    /// token that was rounded to bytes are the same for all of its outputs, so that a mean says something
    /// when there are many tokens only.
    pub fn within(&self, activations: Activations, tolerance: Tolerance) -> bool {
        let judged = activations == Activations::F32 || self.averaged;
        let close = self.nmse <= tolerance.max_nmse || !judged;
        close && self.worst <= 1.0 && self.max_abs.is_finite()
    }
}

/// What a product should be.
#[derive(Debug, Clone)]
pub struct Expected {
    /// `[m, rows]`.
    pub reference: Vec<f64>,
    /// `Σ w² x²` of each token over all rows: the squared norm of its outputs when products neither
    /// cancel nor agree.
    pub powers: Vec<f64>,
}

/// The reference of one weight: f64 sums over the dequantized weight, and the bound of each element.
#[derive(Debug)]
pub struct Judge {
    rows: usize,
    columns: usize,
    /// `[rows, columns]`.
    weight: Vec<f32>,
    /// Columns in the order of groups; `starts` are the places where groups begin, and the end.
    order: Vec<u32>,
    starts: Vec<usize>,
    /// `scale * 2^bits`, `[rows, groups]`.
    ranges: Vec<f64>,
}

/// Columns that share an activation scale in [`Activations::Int8`].
const BLOCK: usize = 32;

impl Judge {
    /// Dequantizes.
    pub fn new(weight: &QuantizedLinear) -> Self {
        let (groups, columns) = (weight.groups(), weight.in_features);
        let mut order: Vec<u32> = (0..columns as u32).collect();
        order.sort_by_key(|&column| weight.group_of(column as usize));
        let group = |place: &u32| weight.group_of(*place as usize);
        let starts = (0..=groups).map(|g| order.partition_point(|column| group(column) < g));
        let range = f64::from(1u32 << weight.scheme.bits);
        Self {
            rows: weight.out_features,
            columns,
            starts: starts.collect(),
            weight: weight.dequantize().into_raw_vec_and_offset().0,
            ranges: weight.scales.iter().map(|&scale| f64::from(scale) * range).collect(),
            order,
        }
    }

    /// The same of a weight in blocks: groups are its sub-blocks, and what a kernel may sum apart is the
    /// largest level times the scale, and the minimum.
    pub fn of_blocks(weight: &BlockQuantized) -> Self {
        let (block, columns) = (weight.block, weight.in_features);
        let level = match block.levels() {
            Levels::Linear { .. } => f64::from(block.max_code()) + 1.0,
            Levels::Codebook(values) => {
                values.iter().map(|&value| f64::from(value).abs()).fold(0.0, f64::max)
            }
        };
        let ranges = (0..weight.out_features * weight.blocks()).flat_map(|at| {
            (0..block.subs()).map(move |sub| {
                let (scale, min) = weight.scale_min(at, sub);
                f64::from(scale.abs()) * level + f64::from(min.abs())
            })
        });
        Self {
            rows: weight.out_features,
            columns,
            weight: weight.dequantize().into_raw_vec_and_offset().0,
            order: (0..columns as u32).collect(),
            starts: (0..=columns / block.sub_size()).map(|g| g * block.sub_size()).collect(),
            ranges: ranges.collect(),
        }
    }

    /// `x [m, columns] · Wᵀ` with f64 sums.
    pub fn expect(&self, x: &[f32]) -> Expected {
        let mut squares = vec![0.0f64; self.columns];
        for row in self.weight.chunks_exact(self.columns.max(1)) {
            squares.iter_mut().zip(row).for_each(|(sum, &w)| *sum += f64::from(w).powi(2));
        }
        let power =
            |x: &[f32]| x.iter().zip(&squares).map(|(&x, s)| f64::from(x).powi(2) * s).sum();
        Expected {
            powers: x.chunks(self.columns.max(1)).map(power).collect(),
            reference: self.reference(x),
        }
    }

    /// The products alone, `[m, rows]`.
    pub fn reference(&self, x: &[f32]) -> Vec<f64> {
        let m = x.len() / self.columns.max(1);
        let mut out = vec![0.0f64; m * self.rows];
        out.par_chunks_mut(self.rows.max(1)).zip(x.par_chunks(self.columns.max(1))).for_each(
            |(out, x)| {
                for (out, weight) in out.iter_mut().zip(self.weight.chunks_exact(self.columns)) {
                    // Four sums, so that the loop is not one chain of additions.
                    let mut sums = [0.0f64; 4];
                    for (i, (&x, &w)) in x.iter().zip(weight).enumerate() {
                        sums[i % 4] += f64::from(x) * f64::from(w);
                    }
                    *out = (sums[0] + sums[1]) + (sums[2] + sums[3]);
                }
            },
        );
        out
    }

    /// By how much each element of `x [m, columns] · Wᵀ` may be off, `[m, rows]`.
    ///
    /// For f32: `(columns + 16) · 2^-24 · Σ_groups scale · 2^bits · Σ|x|`, which holds for any order of
    /// sums over codes and zero points apart. Plus, for bytes, half a step of the activation times the
    /// magnitudes of the weights, `Σ_blocks max|x| / 254 · Σ|w|`, where a block is 32 columns of a group
    /// or, with one scale per token, the row; a hundredth is added for the rounding of the scale itself.
    pub fn bounds(&self, x: &[f32], activations: Activations) -> Vec<f64> {
        let groups = self.starts.len() - 1;
        let unit = (self.columns + 16) as f64 * 2f64.powi(-24);
        let abs = |x: f32| f64::from(x.abs());
        // Places of each block.
        let blocks: Vec<(usize, usize)> = match activations {
            Activations::F32 => Vec::new(),
            Activations::Int8PerToken => vec![(0, self.columns)],
            Activations::Int8 => (0..groups)
                .flat_map(|g| {
                    let (first, end) = (self.starts[g], self.starts[g + 1]);
                    (first..end).step_by(BLOCK).map(move |at| (at, (at + BLOCK).min(end)))
                })
                .collect(),
        };
        let magnitudes: Vec<Vec<f64>> = (self.weight.chunks(self.columns.max(1)))
            .map(|row| {
                let sum = |&(first, end): &(usize, usize)| {
                    self.order[first..end].iter().map(|&column| abs(row[column as usize])).sum()
                };
                blocks.iter().map(sum).collect()
            })
            .collect();
        let mut out = Vec::with_capacity(x.len() / self.columns.max(1) * self.rows);
        for x in x.chunks_exact(self.columns.max(1)) {
            let at = |place: usize| abs(x[self.order[place] as usize]);
            let sums: Vec<f64> = (0..groups)
                .map(|g| (self.starts[g]..self.starts[g + 1]).map(at).sum::<f64>())
                .collect();
            let steps: Vec<f64> = (blocks.iter())
                .map(|&(first, end)| (first..end).map(at).fold(0.0, f64::max) / 254.0 * 1.01)
                .collect();
            for (row, magnitudes) in magnitudes.iter().enumerate() {
                let ranges = &self.ranges[row * groups..(row + 1) * groups];
                let exact: f64 = ranges.iter().zip(&sums).map(|(r, s)| r.abs() * s).sum();
                let rounded: f64 = magnitudes.iter().zip(&steps).map(|(w, s)| w * s).sum();
                // The smallest f32: sums of denormals cannot be closer.
                out.push(unit * exact + rounded + 2f64.powi(-149) * self.columns as f64);
            }
        }
        out
    }

    /// Compares a result with what is expected, which may be of more tokens.
    pub fn compare(&self, got: &[f32], expected: &Expected, bounds: &[f64]) -> Finding {
        let (mut error, mut norm, mut max_abs, mut worst) = (0.0f64, 0.0f64, 0.0f64, 0.0f64);
        for ((&got, &want), &bound) in got.iter().zip(&expected.reference).zip(bounds) {
            let difference = (f64::from(got) - want).abs();
            if !difference.is_finite() {
                return Finding {
                    averaged: false,
                    nmse: f64::INFINITY,
                    max_abs: f64::INFINITY,
                    worst: f64::INFINITY,
                };
            }
            error += difference * difference;
            norm += want * want;
            max_abs = max_abs.max(difference);
            worst = worst.max(difference / bound);
        }
        let tokens = got.len() / self.rows.max(1);
        let norm = norm.max(expected.powers[..tokens].iter().sum());
        let nmse = if error > 0.0 { error / norm.max(f64::MIN_POSITIVE) } else { 0.0 };
        Finding { averaged: tokens >= AVERAGED && self.rows >= 16, nmse, max_abs, worst }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_are_distinct_and_every_value_is_as_named() {
        let cases = all();
        for (at, case) in cases.iter().enumerate() {
            assert!(!cases[..at].contains(case), "{case} stands there twice");
            let weight = case.weight();
            assert_eq!(weight, case.weight());
            let has = |f: &dyn Fn(f32) -> bool| weight.scales.iter().any(|&scale| f(scale));
            match case.values {
                Values::ZeroScales => assert!(has(&|s| s == 0.0) && has(&|s| s > 0.0)),
                Values::ExtremeScales => assert!(has(&|s| s > 6e4) && has(&|s| s < 1e-4)),
                Values::DenormalScales => assert!(!has(&|s| s >= 6.2e-5)),
                Values::Ends => {
                    assert!(weight.zeros.contains(&u16::from(weight.scheme.max_code())));
                }
                Values::Plain => {}
            }
        }
    }

    #[test]
    fn the_judge_finds_a_wrong_code_and_forgives_rounding() {
        let case = all()[0];
        let weight = case.weight();
        let judge = Judge::new(&weight);
        let x = Input::Outliers.activations(3, case.in_features, 1);
        let expected = judge.expect(&x);
        let bounds = judge.bounds(&x, Activations::F32);
        let got: Vec<f32> = expected.reference.iter().map(|&y| y as f32).collect();
        assert!(
            judge
                .compare(&got, &expected, &bounds)
                .within(Activations::F32, Activations::F32.tolerance())
        );
        let mut other = weight.clone();
        other.codes[7] ^= 1;
        let other = Judge::new(&other).reference(&x);
        let got: Vec<f32> = other.iter().map(|&y| y as f32).collect();
        let found = judge.compare(&got, &expected, &bounds);
        assert!(found.worst > 1.0, "{found:?}");
    }
}
