//! What the passes of this crate are told alike: how large factors are.

use std::collections::BTreeMap;

use attar_ir::{Site, recipe::RecipeError};
use serde::Deserialize;

/// Whose parameters a fraction is taken of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Share {
    /// Of each site alone.
    #[default]
    Site,
    /// Of all sites of the step together: ranks go where they save the most error for each parameter.
    Model,
}

/// How singular vectors are found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Solver {
    /// All of them.
    #[default]
    Exact,
    /// As many as it takes, by a seeded randomized search, whose error the report bounds.
    Randomized,
}

/// Options of passes that factor.
#[derive(Debug, Clone, Copy, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Options {
    /// Rank of every site's factors, instead of a ratio.
    pub(crate) rank: Option<usize>,
    /// Fraction of the parameters that is taken away; 0.2 where nothing else is given.
    pub(crate) ratio: Option<f64>,
    /// With a ratio: `site` takes it of each site, `model` shares one budget out among all sites of the step by what each
    /// rank is worth on the original model's activations (in the metric of the pass).
    pub(crate) share: Share,
    /// Fraction of the squared singular values that each site keeps (in the metric of the pass), instead of a ratio.
    pub(crate) energy: Option<f64>,
    /// Chosen ranks are rounded to multiples of it, e.g. the group size of a quantizer that follows.
    pub(crate) multiple_of: usize,
    /// `exact`, or `randomized`: much faster where the rank is a small part of the width, within the error bound that the
    /// report states.
    pub(crate) solver: Solver,
}

impl Default for Options {
    fn default() -> Self {
        let (share, solver) = (Share::Site, Solver::Exact);
        Self { rank: None, ratio: None, share, energy: None, multiple_of: 1, solver }
    }
}

/// Size of the factors of a site.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Size {
    /// This rank for every site.
    Rank(usize),
    /// The largest rank that is a multiple of `multiple_of` and takes this fraction of the parameters away.
    Ratio { ratio: f64, multiple_of: usize },
    /// As many as keep this fraction of the squared singular values.
    Energy { energy: f64, multiple_of: usize },
    /// One budget for all sites.
    Shared { ratio: f64, multiple_of: usize },
    /// Ranks that were chosen before, by site.
    Chosen(BTreeMap<String, usize>),
}

impl Options {
    /// The size that they describe.
    ///
    /// # Errors
    /// Several are given, or one is out of range.
    pub(crate) fn size(self) -> Result<Size, RecipeError> {
        let Self { rank, ratio, share, energy, multiple_of, .. } = self;
        if multiple_of == 0 {
            return Err(RecipeError::invalid("multiple_of", "expected a positive integer, got 0"));
        }
        let given =
            [("rank", rank.is_some()), ("ratio", ratio.is_some()), ("energy", energy.is_some())];
        let given: Vec<&str> =
            given.iter().filter(|(_, set)| *set).map(|(name, _)| *name).collect();
        if let [first, second, ..] = given[..] {
            let reason = format!("`{first}` and `{second}` exclude each other; give one of them");
            return Err(RecipeError::invalid(second, reason));
        }
        let fraction = |key: &str, value: f64| {
            if value > 0.0 && value < 1.0 {
                return Ok(value);
            }
            let reason = format!("expected a fraction between 0 and 1, both excluded, got {value}");
            Err(RecipeError::invalid(key, reason))
        };
        if share == Share::Model && (rank.is_some() || energy.is_some()) {
            let reason = "`model` shares a ratio out; give a `ratio`, or leave `share` away";
            return Err(RecipeError::invalid("share", reason));
        }
        match (rank, energy) {
            (Some(0), _) => Err(RecipeError::invalid("rank", "expected a positive integer, got 0")),
            (Some(rank), _) => Ok(Size::Rank(rank)),
            (None, Some(energy)) => {
                Ok(Size::Energy { energy: fraction("energy", energy)?, multiple_of })
            }
            (None, None) => {
                let ratio = fraction("ratio", ratio.unwrap_or(0.2))?;
                Ok(match share {
                    Share::Site => Size::Ratio { ratio, multiple_of },
                    Share::Model => Size::Shared { ratio, multiple_of },
                })
            }
        }
    }
}

/// The largest multiple at which factors are smaller than the weight; 0 when there is none.
fn largest(site: &Site, multiple_of: usize) -> usize {
    let (out, inner) = (site.out_features, site.in_features);
    let saving = (out * inner).saturating_sub(1) / (out + inner).max(1);
    saving.min(out.min(inner)) / multiple_of * multiple_of
}

impl Size {
    /// True when ranks follow from the weights of all sites.
    pub(crate) const fn chooses(&self) -> bool {
        matches!(self, Self::Energy { .. } | Self::Shared { .. })
    }

    /// The rank of a site's factors; the largest that it could be where it is still to be chosen.
    ///
    /// # Errors
    /// When so few parameters are left that there is none.
    pub(crate) fn rank(&self, site: &Site) -> Result<usize, String> {
        let (out, inner) = (site.out_features, site.in_features);
        let each = (out + inner).max(1);
        let (ratio, multiple_of) = match self {
            Self::Rank(rank) => return Ok(*rank),
            Self::Chosen(ranks) => return Ok(ranks.get(&site.name).copied().unwrap_or(0)),
            Self::Energy { multiple_of, .. } | Self::Shared { multiple_of, .. } => {
                return match largest(site, *multiple_of) {
                    0 => Err(format!(
                        "no rank that is a multiple of {multiple_of} makes {out} x {inner} smaller; `keep` it"
                    )),
                    rank => Ok(rank),
                };
            }
            Self::Ratio { ratio, multiple_of } => (*ratio, *multiple_of),
        };
        // A hair more, so that a ratio which is met exactly is not missed by rounding.
        let kept = ((1.0 - ratio) * (out * inner) as f64 * (1.0 + 1e-12)) as usize;
        let rank = (kept / each).min(out.min(inner)) / multiple_of * multiple_of;
        if rank > 0 {
            return Ok(rank);
        }
        Err(format!(
            "a ratio of {ratio} leaves {kept} of the {} weights of {out} x {inner}, and each rank takes {each} (ranks are \
             multiples of {multiple_of}); give a smaller ratio or `keep` it",
            out * inner
        ))
    }

    /// Chooses the ranks of all sites from their squared singular values.
    ///
    /// # Errors
    /// When a budget is too small for a rank of every site.
    pub(crate) fn choose(&self, sites: &[(Site, Vec<f64>)]) -> Result<Self, String> {
        match *self {
            Self::Energy { energy, multiple_of } => {
                let rank = |(site, spectrum): &(Site, Vec<f64>)| {
                    let whole: f64 = spectrum.iter().sum();
                    let mut kept = 0.0;
                    let enough = spectrum.iter().position(|value| {
                        kept += value;
                        kept >= energy * whole
                    });
                    let rank = enough.map_or(spectrum.len(), |at| at + 1);
                    let rank = rank.next_multiple_of(multiple_of).min(largest(site, multiple_of));
                    (site.name.clone(), rank)
                };
                Ok(Self::Chosen(sites.iter().map(rank).collect()))
            }
            Self::Shared { ratio, multiple_of } => {
                share_out(sites, ratio, multiple_of).map(Self::Chosen)
            }
            Self::Rank(_) | Self::Ratio { .. } | Self::Chosen(_) => Ok(self.clone()),
        }
    }
}

/// Ranks, `multiple_of` at a time, to the site where they lower the sum of relative errors the most for each parameter,
/// until the budget is spent. Squared singular values fall, so the greedy choice is the best up to the last step.
fn share_out(
    sites: &[(Site, Vec<f64>)],
    ratio: f64,
    multiple_of: usize,
) -> Result<BTreeMap<String, usize>, String> {
    let cost = |site: &Site| multiple_of * (site.out_features + site.in_features);
    let whole: usize = sites.iter().map(|(site, _)| site.weights()).sum();
    let mut left = ((1.0 - ratio) * whole as f64 * (1.0 + 1e-12)) as usize;
    // Every site has something.
    let least: usize = sites.iter().map(|(site, _)| cost(site)).sum();
    if least > left {
        return Err(format!(
            "a ratio of {ratio} leaves {left} of {whole} weights, and the least rank ({multiple_of}) of every site takes \
             {least}; give a smaller ratio"
        ));
    }
    left -= least;
    let mut ranks = vec![multiple_of; sites.len()];
    let worth = |at: usize, rank: usize| {
        let (site, spectrum) = &sites[at];
        let whole: f64 = spectrum.iter().sum();
        let end = (rank + multiple_of).min(spectrum.len());
        let saved: f64 = spectrum.get(rank..end).unwrap_or(&[]).iter().sum();
        saved / whole.max(f64::MIN_POSITIVE) / cost(site) as f64
    };
    let mut next: Vec<f64> = (0..sites.len()).map(|at| worth(at, multiple_of)).collect();
    loop {
        let fits = |at: &usize| {
            let site = &sites[*at].0;
            cost(site) <= left && ranks[*at] + multiple_of <= largest(site, multiple_of)
        };
        // The first of equals.
        let best = (0..sites.len()).rev().filter(fits).max_by(|&a, &b| next[a].total_cmp(&next[b]));
        let Some(at) = best else { break };
        ranks[at] += multiple_of;
        left -= cost(&sites[at].0);
        next[at] = worth(at, ranks[at]);
    }
    Ok(sites.iter().zip(ranks).map(|((site, _), rank)| (site.name.clone(), rank)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use attar_ir::Role;
    use attar_tensor::DType;

    fn site(name: &str, out_features: usize, in_features: usize) -> Site {
        let (role, bias, dtype) = (Role::Query, false, DType::F32);
        Site { name: name.into(), role, out_features, in_features, bias, dtype }
    }

    fn of(text: &str) -> Result<Size, RecipeError> {
        attar_ir::recipe::options::<Options>(&text.parse().unwrap())?.size()
    }

    #[test]
    fn ranks_follow_from_numbers_and_fractions() {
        let site = site("q", 100, 300);
        assert_eq!(of("rank = 9").unwrap().rank(&site), Ok(9));
        assert_eq!(of("").unwrap().rank(&site), Ok(60));
        assert_eq!(of("ratio = 0.2\nmultiple_of = 16").unwrap().rank(&site), Ok(48));
        // Still to be chosen: the most that saves anything.
        assert_eq!(of("energy = 0.9").unwrap().rank(&site), Ok(74));
        assert_eq!(of("ratio = 0.2\nshare = \"model\"").unwrap().rank(&site), Ok(74));
        let none = of("ratio = 0.99").unwrap().rank(&site).unwrap_err();
        assert!(none.contains("leaves 300 of the 30000 weights"), "{none}");
        for (text, part) in [
            ("ratio = 0.0", "ratio: expected a fraction"),
            ("ratio = 1.0", "ratio: expected a fraction"),
            ("energy = nan", "energy: expected a fraction"),
            ("rank = 0", "rank: expected a positive"),
            ("multiple_of = 0", "multiple_of: expected"),
            ("rank = 3\nratio = 0.1", "ratio: `rank` and `ratio` exclude"),
            ("rank = 3\nshare = \"model\"", "share: `model` shares a ratio"),
        ] {
            let error = of(text).unwrap_err().to_string();
            assert!(error.starts_with(part), "{text}: {error}");
        }
    }

    #[test]
    fn energy_and_budgets_choose_where_ranks_are_worth_most() {
        let steep: Vec<f64> = (0..40).map(|k| 0.5f64.powi(k)).collect();
        let flat = vec![1.0; 40];
        let sites = [(site("steep", 40, 80), steep), (site("flat", 40, 80), flat)];
        let ranks = |size: &Size| match size.choose(&sites).unwrap() {
            Size::Chosen(ranks) => (ranks["steep"], ranks["flat"]),
            other => panic!("{other:?}"),
        };
        assert_eq!(ranks(&of("energy = 0.7").unwrap()), (2, 26));
        assert_eq!(ranks(&of("energy = 0.5\nmultiple_of = 8").unwrap()), (8, 24));
        let (steep, flat) = ranks(&of("ratio = 0.5\nshare = \"model\"").unwrap());
        // 3200 parameters, 120 for each rank.
        assert_eq!(steep + flat, 26);
        assert!(steep < flat && steep >= 4, "{steep} {flat}");
        let tight = Size::Shared { ratio: 0.99, multiple_of: 1 };
        assert!(tight.choose(&sites).unwrap_err().contains("the least rank (1)"));
    }
}
