//! Which groups of a linear's input channels can go, and what the others must become to make up for them.
//!
//! For `y = W x` with `H = 2/n XᵀX`, removing the channels G costs at least
//! `tr(W_G (H⁻¹_GG)⁻¹ W_Gᵀ)` of squared output error, reached by `W ← W − W_G (H⁻¹_GG)⁻¹ H⁻¹_G,:`, and the
//! inverse of what is left is `H⁻¹ ← H⁻¹ − H⁻¹_:,G (H⁻¹_GG)⁻¹ H⁻¹_G,:` (optimal brain surgeon on groups: Hassibi
//! and Stork 1993; ZipLM, Kurtic et al. 2023, arXiv:2302.04089; SlimGPT, Ling et al. 2024, arXiv:2412.18110).
//! Removing one group after the other ends at the least-squares solution on what is kept. `weight [out, in]`,
//! `hessian [in, in]`; f64. Cost `2 in² (in + removed) + 2 out·in·removed`.
//!
//! Deliberate difference: groups go in rounds, several at once where there are many, scores renewed between.

use attar_ir::{
    Cost, DimName, InputStats, ModelGraph, PassError, SlopeBy, SlopeQuery, recipe::RecipeError,
};
use attar_tensor::{
    Mat,
    linalg::double::{gemm, inverse_spd},
};
use serde::Deserialize;

/// Rounds of removal where there are many groups.
const ROUNDS: usize = 24;

/// How groups are ranked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Importance {
    /// The output error that removal costs after the others have made up for it.
    #[default]
    Output,
    /// `Σ ‖W_:,j‖ · ‖X_j‖`, no interaction.
    Activation,
    /// Norms of the coupled weights alone.
    Magnitude,
    /// First-order Taylor: what scaling all coupled weights does to the loss of the calibration text, root mean square over
    /// windows (Molchanov et al. 2019, arXiv:1906.10771).
    Taylor,
    /// First-order Taylor by element: `Σ |w g|` over the coupled weights, g the mean gradient of the loss (LLM-Pruner, Ma
    /// et al. 2023, arXiv:2305.11627).
    TaylorElements,
}

impl Importance {
    /// The slopes of the loss along a dimension of every block that it ranks by.
    pub(crate) fn slopes(
        self,
        graph: &ModelGraph,
        dim: fn(usize) -> DimName,
    ) -> Option<SlopeQuery> {
        let by = match self {
            Self::Taylor => SlopeBy::Groups,
            Self::TaylorElements => SlopeBy::Elements,
            Self::Output | Self::Activation | Self::Magnitude => return None,
        };
        Some(SlopeQuery { dims: graph.blocks.iter().map(|block| dim(block.index)).collect(), by })
    }

    /// Words for the plan.
    pub(crate) const fn words(self) -> &'static str {
        match self {
            Self::Taylor | Self::TaylorElements => ", ranked by slopes of the loss",
            Self::Output | Self::Activation | Self::Magnitude => "",
        }
    }
}

/// What is asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asked<'a> {
    /// Channels of each group.
    pub(crate) places: &'a [Vec<usize>],
    /// How many groups stay.
    pub(crate) keep: usize,
    /// Groups fall into classes of which equally many stay: `classes` consecutive runs.
    pub(crate) classes: usize,
    pub(crate) importance: Importance,
    /// Scores by group where [`Importance`] does not come from the statistics: norms of the coupled weights, or slopes.
    pub(crate) given: &'a [f64],
    /// Moves what stays to make up for what goes.
    pub(crate) update: bool,
    /// Dampening as a fraction of the Hessian's mean diagonal.
    pub(crate) percdamp: f64,
}

/// What was found.
#[derive(Debug)]
pub(crate) struct Found {
    /// Groups that stay, rising.
    pub(crate) kept: Vec<usize>,
    /// `tr(ΔW H ΔWᵀ) / tr(W H Wᵀ)`.
    pub(crate) error: f64,
    /// Score of each group before anything was removed.
    pub(crate) scores: Vec<f64>,
}

fn wide(x: &Mat) -> Vec<f64> {
    x.iter().map(|&v| f64::from(v)).collect()
}

/// The square `[places, places]` of a matrix of order `n`.
fn square(a: &[f64], n: usize, places: &[usize]) -> Vec<f64> {
    places.iter().flat_map(|&i| places.iter().map(move |&j| a[i * n + j])).collect()
}

/// Columns of `a [rows, n]`.
fn columns(a: &[f64], n: usize, places: &[usize]) -> Vec<f64> {
    a.chunks(n).flat_map(|row| places.iter().map(move |&j| row[j])).collect()
}

/// Removes groups of columns of `weight`: they become zero, and with `update` the others move.
///
/// # Errors
/// NaN and infinity, or a Hessian that no dampening makes positive definite.
pub(crate) fn remove(
    site: &str,
    weight: &mut Mat,
    stats: &InputStats,
    asked: Asked<'_>,
) -> Result<Found, PassError> {
    let fail = |reason: String| PassError::Numeric { site: site.to_owned(), reason };
    let hessian = stats.hessian.as_ref().expect("the pass asks for it");
    let (out, n) = weight.dim();
    for (what, values) in [("the weight", &*weight), ("the Hessian", hessian)] {
        if values.iter().any(|v| !v.is_finite()) {
            return Err(fail(format!(
                "{what} holds a NaN or infinity; check the checkpoint and the calibration text"
            )));
        }
    }
    let h = wide(hessian);
    let before = wide(weight);
    let mut w = before.clone();
    let mean = (0..n).map(|i| h[i * n + i]).sum::<f64>() / n as f64;
    if mean <= 0.0 {
        return Err(fail(
            "all inputs are zero on the calibration set; use other calibration text".into(),
        ));
    }
    // Channels that were never seen cost nothing.
    let dead: Vec<usize> = (0..n).filter(|&i| h[i * n + i] <= 0.0).collect();
    for row in w.chunks_mut(n) {
        for &j in &dead {
            row[j] = 0.0;
        }
    }
    let mut inverse = damped_inverse(&h, n, mean, asked.percdamp).map_err(&fail)?;
    let norms: Vec<f64> = (0..n)
        .map(|j| (0..out).map(|i| w[i * n + j] * w[i * n + j]).sum::<f64>() * h[j * n + j])
        .map(f64::sqrt)
        .collect();
    let single = asked.places.iter().all(|places| places.len() == 1);
    let scores = |w: &[f64], inverse: &[f64], left: &[usize]| -> Vec<f64> {
        if single && asked.importance == Importance::Output {
            // Rows lie in memory one after the other; columns do not.
            let mut sizes = vec![0.0; n];
            for row in w.chunks(n) {
                sizes.iter_mut().zip(row).for_each(|(size, x)| *size += x * x);
            }
            let place = |&group: &usize| asked.places[group][0];
            return left.iter().map(place).map(|j| sizes[j] / inverse[j * n + j]).collect();
        }
        left.iter()
            .map(|&group| {
                let places = &asked.places[group];
                match asked.importance {
                    // What cannot be solved for stays; infinities are not written to reports.
                    Importance::Output => cost_of(w, inverse, n, places).min(f64::MAX),
                    Importance::Activation => places.iter().map(|&j| norms[j]).sum(),
                    Importance::Magnitude | Importance::Taylor | Importance::TaylorElements => {
                        asked.given[group]
                    }
                }
            })
            .collect()
    };
    let count = asked.places.len();
    let mut left: Vec<usize> = (0..count).collect();
    let first = scores(&w, &inverse, &left);
    let removed = count - asked.keep;
    // One at a time where groups are few or classes bind them.
    let rounds = if asked.classes > 1 { removed } else { removed.min(ROUNDS) };
    let quota = removed / asked.classes.max(1);
    let mut gone_of = vec![0usize; asked.classes.max(1)];
    for round in 0..rounds {
        let now = (removed - (count - left.len())).div_ceil(rounds - round);
        let scored = scores(&w, &inverse, &left);
        let mut order: Vec<usize> = (0..left.len())
            .filter(|&at| gone_of[left[at] * gone_of.len() / count] < quota || asked.classes <= 1)
            .collect();
        order.sort_by(|&a, &b| scored[a].total_cmp(&scored[b]).then(a.cmp(&b)));
        let gone: Vec<usize> = order[..now].iter().map(|&at| left[at]).collect();
        for &group in &gone {
            let class = group * gone_of.len() / count;
            gone_of[class] += 1;
        }
        let mut places: Vec<usize> =
            gone.iter().flat_map(|&g| asked.places[g].iter().copied()).collect();
        places.sort_unstable();
        left.retain(|group| !gone.contains(group));
        surgery(&mut w, &mut inverse, (out, n), &places).map_err(&fail)?;
    }
    if !asked.update {
        w.copy_from_slice(&before);
    }
    let mut kept_columns = vec![false; n];
    left.iter().flat_map(|&g| &asked.places[g]).for_each(|&j| kept_columns[j] = true);
    for row in w.chunks_mut(n) {
        row.iter_mut().zip(&kept_columns).for_each(|(x, kept)| {
            if !kept {
                *x = 0.0;
            }
        });
    }
    // Dead channels that stay keep what they had.
    for (row, old) in w.chunks_mut(n).zip(before.chunks(n)) {
        dead.iter().filter(|&&j| kept_columns[j]).for_each(|&j| row[j] = old[j]);
    }
    let delta: Vec<f64> = w.iter().zip(&before).map(|(a, b)| a - b).collect();
    let error = metric(&delta, &h, (out, n)) / metric(&before, &h, (out, n)).max(f64::MIN_POSITIVE);
    if !error.is_finite()
        || first.iter().any(|score| score.is_nan())
        || w.iter().any(|x| !x.is_finite())
    {
        return Err(fail(format!(
            "removing {removed} of {count} groups gives NaN or infinity; raise percdamp ({}) or give more \
             calibration text",
            asked.percdamp
        )));
    }
    weight.iter_mut().zip(&w).for_each(|(to, &from)| *to = from as f32);
    Ok(Found { kept: left, error: error.max(0.0), scores: first })
}

fn damped_inverse(h: &[f64], n: usize, mean: f64, percdamp: f64) -> Result<Vec<f64>, String> {
    let mut percdamp = percdamp;
    for _ in 0..8 {
        let mut damped = h.to_vec();
        for i in 0..n {
            let d = &mut damped[i * n + i];
            *d = if *d > 0.0 { *d } else { mean } + percdamp * mean;
        }
        if let Ok(inverse) = inverse_spd(damped, n) {
            return Ok(inverse);
        }
        percdamp = (percdamp * 10.0).max(1e-4);
    }
    Err(format!("the Hessian is not positive definite even with dampening {percdamp}"))
}

/// `tr(W_G (H⁻¹_GG)⁻¹ W_Gᵀ)`.
fn cost_of(w: &[f64], inverse: &[f64], n: usize, places: &[usize]) -> f64 {
    let k = places.len();
    let Ok(middle) = inverse_spd(square(inverse, n, places), k) else { return f64::INFINITY };
    let part = columns(w, n, places);
    let mut product = vec![0.0; part.len()];
    gemm((part.len() / k, k, k), 1.0, &part, &middle, false, &mut product);
    part.iter().zip(&product).map(|(a, b)| a * b).sum()
}

/// Removes channels from the weight and the inverse; their rows and columns become those of a unit matrix.
fn surgery(
    w: &mut [f64],
    inverse: &mut [f64],
    (out, n): (usize, usize),
    places: &[usize],
) -> Result<(), String> {
    let k = places.len();
    let middle = inverse_spd(square(inverse, n, places), k)
        .map_err(|error| format!("removing {k} channels: {error}"))?;
    let rows: Vec<f64> =
        places.iter().flat_map(|&i| inverse[i * n..(i + 1) * n].iter().copied()).collect();
    let mut solved = vec![0.0; k * n];
    gemm((k, n, k), 1.0, &middle, &rows, false, &mut solved);
    let part = columns(w, n, places);
    gemm((out, n, k), -1.0, &part, &solved, true, w);
    let across = columns(inverse, n, places);
    gemm((n, n, k), -1.0, &across, &solved, true, inverse);
    for &place in places {
        w.chunks_mut(n).for_each(|row| row[place] = 0.0);
        for i in 0..n {
            inverse[i * n + place] = 0.0;
            inverse[place * n + i] = 0.0;
        }
        inverse[place * n + place] = 1.0;
    }
    Ok(())
}

/// `tr(D H Dᵀ)`.
fn metric(d: &[f64], h: &[f64], (out, n): (usize, usize)) -> f64 {
    let mut product = vec![0.0; out * n];
    gemm((out, n, n), 1.0, d, h, false, &mut product);
    d.iter().zip(&product).map(|(a, b)| a * b).sum()
}

/// What removal costs on `[out, n]`.
pub(crate) fn cost(out: usize, n: usize, removed: usize) -> Cost {
    let (o, n, r) = (out as f64, n as f64, removed as f64);
    let flops = 4.0 * n * n * n + 2.0 * n * n * r + 2.0 * o * n * (r + 2.0 * n);
    let peak = 8.0 * (4.0 * n * n + 4.0 * o * n);
    Cost { flops, peak_bytes: peak as usize, scratch_bytes: 0 }
}

/// Refuses a dampening that is no fraction.
///
/// # Errors
/// When it is negative or not finite.
pub(crate) fn check_percdamp(percdamp: f64) -> Result<(), RecipeError> {
    if percdamp.is_finite() && percdamp >= 0.0 {
        return Ok(());
    }
    let reason = format!("expected a number of at least 0, got {percdamp}");
    Err(RecipeError::invalid("percdamp", reason))
}

/// How many of `size` stay when `ratio` goes, a multiple of `multiple`.
///
/// # Errors
/// A ratio out of range, or one that leaves nothing or everything.
pub(crate) fn keep(size: usize, ratio: f64, multiple: usize, what: &str) -> Result<usize, String> {
    if !(ratio > 0.0 && ratio < 1.0) {
        return Err(format!(
            "ratio: expected a fraction between 0 and 1, both excluded, got {ratio}"
        ));
    }
    if multiple == 0 {
        return Err("multiple_of: expected at least 1".into());
    }
    let wanted = size as f64 * (1.0 - ratio);
    let kept = (wanted / multiple as f64).round() as usize * multiple;
    if kept == 0 || kept >= size {
        return Err(format!(
            "removing {ratio} of {size} {what} in multiples of {multiple} leaves {kept}; choose another ratio \
             or a smaller multiple_of"
        ));
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;
    use attar_tensor::rng::Rng;

    fn stats(n: usize, tokens: usize, seed: u64) -> InputStats {
        let mut rng = Rng::new(seed);
        let mix = Mat::from_shape_fn((n, n), |(i, j)| {
            rng.normal() / (1.0 + (i as f32 - j as f32).abs()) * (1.0 + (j % 5) as f32)
        });
        let x = Mat::from_shape_vec((tokens, n), rng.normals(tokens * n)).unwrap().dot(&mix);
        let hessian = x.t().dot(&x).as_standard_layout().to_owned() * (2.0 / tokens as f32);
        InputStats { tokens, hessian: Some(hessian), ..InputStats::default() }
    }

    fn run(
        importance: Importance,
        update: bool,
        places: &[Vec<usize>],
        keep: usize,
    ) -> (Mat, Found) {
        let n = 24;
        let mut weight = Mat::from_shape_vec((10, n), Rng::new(2).normals(10 * n)).unwrap();
        let magnitude: Vec<f64> = (0..places.len()).map(|i| (i * 7 % 5) as f64).collect();
        let asked = Asked {
            places,
            keep,
            classes: 1,
            importance,
            given: &magnitude,
            update,
            percdamp: 1e-8,
        };
        let found = remove("w", &mut weight, &stats(n, 200, 1), asked).unwrap();
        (weight, found)
    }

    #[test]
    fn the_update_is_the_least_squares_solution_on_what_is_kept() {
        let places: Vec<Vec<usize>> = (0..24).map(|i| vec![i]).collect();
        let (weight, found) = run(Importance::Output, true, &places, 15);
        assert_eq!(found.kept.len(), 15);
        // Normal equations: the gradient (W' − W) H vanishes on the kept columns.
        let original = Mat::from_shape_vec((10, 24), Rng::new(2).normals(240)).unwrap();
        let h = stats(24, 200, 1).hessian.unwrap();
        let gradient = (&weight - &original).dot(&h);
        let scale = original.dot(&h).iter().fold(0.0f32, |m, v| m.max(v.abs()));
        for &j in &found.kept {
            assert!(gradient.column(j).iter().all(|v| v.abs() < 1e-4 * scale));
        }
        for j in (0..24).filter(|j| !found.kept.contains(j)) {
            assert!(weight.column(j).iter().all(|v| v.abs() == 0.0));
        }
        let plain = run(Importance::Output, false, &places, 15).1;
        assert!(found.error < plain.error, "{} {}", found.error, plain.error);
        for other in [Importance::Activation, Importance::Magnitude] {
            let other = run(other, true, &places, 15).1;
            assert!(found.error <= other.error * 1.05, "{} {}", found.error, other.error);
        }
    }

    #[test]
    fn groups_go_whole_and_classes_keep_equally_many() {
        let places: Vec<Vec<usize>> = (0..8).map(|i| (3 * i..3 * i + 3).collect()).collect();
        let (weight, found) = run(Importance::Output, true, &places, 5);
        let zero = |j: usize| weight.column(j).iter().all(|v| v.abs() == 0.0);
        for (group, places) in places.iter().enumerate() {
            assert_eq!(places.iter().all(|&j| zero(j)), !found.kept.contains(&group));
        }
        let mut weight = Mat::from_shape_vec((10, 24), Rng::new(2).normals(240)).unwrap();
        let asked = Asked {
            places: &places,
            keep: 4,
            classes: 2,
            importance: Importance::Output,
            given: &[],
            update: true,
            percdamp: 0.01,
        };
        let found = remove("w", &mut weight, &stats(24, 200, 1), asked).unwrap();
        let low = found.kept.iter().filter(|&&group| group < 4).count();
        assert_eq!((found.kept.len(), low), (4, 2));
    }

    #[test]
    fn dead_channels_go_first_and_cost_nothing() {
        let mut stats = stats(24, 200, 3);
        let h = stats.hessian.as_mut().unwrap();
        for j in [4, 9] {
            h.row_mut(j).fill(0.0);
            h.column_mut(j).fill(0.0);
        }
        let mut weight = Mat::from_shape_vec((10, 24), Rng::new(2).normals(240)).unwrap();
        let places: Vec<Vec<usize>> = (0..24).map(|i| vec![i]).collect();
        let asked = Asked {
            places: &places,
            keep: 22,
            classes: 1,
            importance: Importance::Output,
            given: &[],
            update: true,
            percdamp: 0.01,
        };
        let found = remove("w", &mut weight, &stats, asked).unwrap();
        assert!(!found.kept.contains(&4) && !found.kept.contains(&9));
        assert!(found.error < 1e-12, "{}", found.error);
    }

    #[test]
    fn ratios_are_checked() {
        assert_eq!(keep(768, 0.25, 64, "channels"), Ok(576));
        for ratio in [0.0, 1.0, -0.1, 25.0, f64::NAN] {
            assert!(keep(768, ratio, 64, "channels").unwrap_err().contains("between 0 and 1"));
        }
        assert!(keep(4, 0.1, 1, "kv groups").unwrap_err().contains("leaves 4"));
    }
}
