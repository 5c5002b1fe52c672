//! The solver's promises: patterns are exact, each refinement lowers the objective, and the errors that it reports
//! are those of the result.

use super::{
    Errors, Factor, FactorOptions, Group, factorize,
    masking::{self, MaskingOptions},
    rounding::{self, Mask, RoundingOptions},
};
use crate::{
    Granularity, Mat, Pattern, QuantScheme, QuantizedLinear, ScaleGrid,
    grid::GroupGrid,
    linalg::{GramAccumulator, metric},
    mask::breaks_pattern,
    rng::Rng,
};

fn correlated(n: usize, tokens: usize, seed: u64) -> Mat {
    let mut rng = Rng::new(seed);
    let mix = Mat::from_shape_fn((n, n), |(i, j)| {
        rng.normal() * (1.0 / (1.0 + (i as f32 - j as f32).abs())) * (1.0 + (j % 7) as f32)
    });
    let x = Mat::from_shape_vec((tokens, n), rng.normals(tokens * n)).unwrap().dot(&mix);
    let mut gram = GramAccumulator::new(n);
    gram.add(x.as_standard_layout().as_slice().unwrap()).unwrap();
    gram.finish(2.0 / tokens as f64).unwrap()
}

fn random(out: usize, n: usize) -> Mat {
    Mat::from_shape_vec((out, n), Rng::new(8).normals(out * n)).unwrap()
}

fn factor(h: &Mat, pattern: Pattern) -> Factor {
    let panel = masking::panel(pattern, 128);
    factorize(h, FactorOptions { percdamp: 0.01, by_diagonal: false, panel }, None).unwrap()
}

fn prune(w: &Mat, h: &Mat, pattern: Pattern, refine: usize, exchange: bool) -> (Mat, Errors) {
    let options = MaskingOptions { pattern, refine, inner: 2, exchange };
    let mut pruned = Mat::zeros(w.dim());
    let out = pruned.as_slice_mut().unwrap();
    let tile = masking::Tile { weight: w.as_slice().unwrap(), out };
    let factor = factor(h, pattern);
    let errors = tile.solve(h.as_slice().unwrap(), &factor, &options, &mut Default::default());
    (pruned, errors.unwrap())
}

const PATTERNS: [Pattern; 5] = [
    Pattern::Fraction(0.5),
    Pattern::Fraction(0.73),
    Pattern::NM { n: 2, m: 4 },
    Pattern::NM { n: 4, m: 8 },
    Pattern::NM { n: 1, m: 5 },
];

#[test]
fn patterns_are_exact_and_refinement_lowers_the_objective() {
    // 240 columns: no whole number of blocks; 21 rows: no whole vector.
    let (out, n) = (21, 240);
    let (h, w) = (correlated(n, 500, 4), random(out, n));
    for pattern in PATTERNS {
        let mut last = f64::INFINITY;
        for (refine, exchange) in [(0, false), (1, false), (3, false), (3, true), (8, true)] {
            let (pruned, errors) = prune(&w, &h, pattern, refine, exchange);
            let found = metric(&(&pruned - &w), &h);
            assert!((errors.output / found - 1.0).abs() < 1e-3, "{errors:?} {found}");
            assert!(found < last, "{pattern:?} {refine} {exchange}: {found} {last}");
            last = found;
            let values = pruned.as_slice().unwrap();
            let zeros = values.iter().filter(|w| w.to_bits() == 0).count();
            assert_eq!(zeros, pattern.zeros(out * n), "{pattern:?}");
            if let Pattern::NM { n: kept, m } = pattern {
                assert!(values.chunks(n).all(|row| breaks_pattern(row, kept, m).is_none()));
            }
        }
    }
}

#[test]
fn kept_weights_come_to_their_least_error() {
    let (out, n) = (16, 64);
    let (h, w) = (correlated(n, 300, 2), random(out, n));
    let (pruned, _) = prune(&w, &h, Pattern::Fraction(0.5), 300, false);
    let slopes = (&w - &pruned).dot(&h);
    let scale = h.diag().iter().fold(0.0f32, |a, &b| a.max(b));
    for (slope, kept) in slopes.iter().zip(&pruned) {
        assert!(*kept == 0.0 || slope.abs() < 2e-4 * scale, "{slope} {scale}");
    }
}

fn round(w: &Mat, target: Option<&Mat>, h: &Mat, mask: Mask, refine: usize) -> QuantizedLinear {
    let (out, n) = w.dim();
    let scheme = QuantScheme {
        bits: 3,
        granularity: Granularity::Group(48),
        symmetric: false,
        scale_grid: ScaleGrid::F16,
        zero_min: 1,
        activations: crate::ActivationScheme::Float,
    };
    let groups = n / 48;
    let (mut codes, mut grids) =
        (vec![0; out * n], vec![GroupGrid { scale: 1.0, zero: 0 }; out * groups]);
    let tile = rounding::Tile {
        weight: w.as_slice().unwrap(),
        target: target.map(|target| target.as_slice().unwrap()),
        codes: &mut codes,
        grids: &mut grids,
    };
    let options = RoundingOptions { scheme, refine, inner: 2, mask };
    let factor = factor(h, Pattern::Fraction(0.5));
    let errors =
        tile.solve(h.as_slice().unwrap(), &factor, &options, &mut Default::default()).unwrap();
    let result = QuantizedLinear {
        scheme,
        out_features: out,
        in_features: n,
        codes,
        scales: grids.iter().map(|grid| grid.scale).collect(),
        zeros: grids.iter().map(|grid| grid.zero).collect(),
        g_idx: None,
    };
    let found = metric(&(&result.dequantize() - target.unwrap_or(w)), h);
    assert!((errors.output / found - 1.0).abs() < 1e-3, "{errors:?} {found}");
    result
}

#[test]
fn zeros_stay_zero_through_rounding() {
    let (out, n) = (21, 240);
    let (h, w) = (correlated(n, 500, 4), random(out, n));
    for pattern in PATTERNS {
        let (pruned, _) = prune(&w, &h, pattern, 2, true);
        let mut last = f64::INFINITY;
        for refine in [0, 1, 3] {
            let values = round(&pruned, None, &h, Mask::Fixed, refine).dequantize();
            let pairs = pruned.iter().zip(&values);
            assert!(pairs.clone().all(|(w, v)| *w != 0.0 || v.to_bits() == 0), "{pattern:?}");
            // Most of the others are not.
            let kept = pairs.filter(|(_, v)| **v != 0.0).count();
            assert!(kept * 2 > pruned.iter().filter(|w| **w != 0.0).count());
            let found = metric(&(&values - &pruned), &h);
            assert!(found < last, "{pattern:?} {refine}: {found} {last}");
            last = found;
        }
    }
    // Without a promise, feedback fills them.
    let (pruned, _) = prune(&w, &h, Pattern::Fraction(0.5), 2, true);
    let values = round(&pruned, None, &h, Mask::None, 1).dequantize();
    assert!(pruned.iter().zip(&values).any(|(w, v)| *w == 0.0 && *v != 0.0));
}

#[test]
fn a_mask_that_may_move_is_better_and_no_fuller() {
    let (out, n) = (32, 240);
    let (h, w) = (correlated(n, 500, 4), random(out, n));
    for (pattern, group) in [
        (Pattern::Fraction(0.5), Group::Block),
        (Pattern::NM { n: 2, m: 4 }, Group::Columns(4)),
        (Pattern::NM { n: 4, m: 8 }, Group::Columns(8)),
    ] {
        let (pruned, _) = prune(&w, &h, pattern, 2, true);
        let fixed = round(&pruned, Some(&w), &h, Mask::Fixed, 3).dequantize();
        let free = round(&pruned, Some(&w), &h, Mask::Free(group), 3).dequantize();
        let loss = |values: &Mat| metric(&(values - &w), &h);
        assert!(loss(&free) < loss(&fixed), "{pattern:?} {} {}", loss(&free), loss(&fixed));
        assert!(free.iter().filter(|v| **v == 0.0).count() >= pattern.zeros(out * n));
        if let Pattern::NM { n: kept, m } = pattern {
            let values = free.as_slice().unwrap();
            assert!(values.chunks(n).all(|row| breaks_pattern(row, kept, m).is_none()));
        }
    }
}
