//! What the passes of this crate share: factors of a target, their errors, their cost.

use attar_ir::{
    Block, BlockState, BlockStats, Cost, Event, Factors, PassContext, PassError, SiteReport,
    Target, Weight, check_finite, relative,
};
use attar_tensor::{
    Mat,
    linalg::{
        LinalgError,
        lowrank::{Metric, Thin, best_rank, random_rank, spectrum},
        metric, squares,
    },
};

use crate::options::Solver;

/// The statistic of a target's input; the plan provides what the contract asks for.
pub(crate) fn hessian<'a>(stats: &'a BlockStats, block: &Block, site: usize) -> Option<&'a Mat> {
    stats.input(block.input_of(site))?.hessian.as_ref()
}

/// Numerics that failed, for people.
pub(crate) fn numeric(site: &str, error: &LinalgError) -> PassError {
    PassError::Numeric {
        site: site.to_owned(),
        reason: format!("{error}; check the checkpoint and the calibration text"),
    }
}

/// Factors every target with the metric that `of` gives it, and puts the factors into its place.
pub(crate) fn factor(
    pass: &'static str,
    (context, targets): (&PassContext<'_>, &[Target]),
    (state, stats): (&mut BlockState, &BlockStats),
    rank: impl Fn(&attar_ir::Site) -> Result<usize, String>,
    best: impl Fn(usize, &Mat, usize) -> Result<Thin, PassError>,
) -> Result<Vec<SiteReport>, PassError> {
    let mut sites = Vec::new();
    for target in targets {
        let site = &context.block.sites[target.site];
        let weight = state.linears[target.site].weight.as_dense();
        let weight = weight.expect("the plan proved a float weight");
        check_finite(&site.name, "the weight", weight)?;
        let rank = rank(site).expect("the plan proved a rank");
        let thin = best(target.site, weight, rank)?;
        let bound = bound(&thin);
        let Thin { down, up, spectrum, whole, .. } = thin;
        let factors = Factors::dense(down, up);
        let delta = &factors.product() - weight;
        let hessian = hessian(stats, context.block, target.site);
        let kept = spectrum.iter().take(rank).sum::<f64>() / whole.max(f64::MIN_POSITIVE);
        sites.push(SiteReport {
            site: site.name.clone(),
            pass: pass.into(),
            weight_error: relative(squares(&delta), squares(weight)),
            output_error: hessian.map(|h| relative(metric(&delta, h), metric(weight, h))),
            events: [
                Event::Chosen { name: "rank".into(), value: rank as f64 },
                Event::Chosen { name: "energy kept".into(), value: kept },
            ]
            .into_iter()
            .chain(bound)
            .collect(),
        });
        state.linears[target.site].weight = Weight::Factored(Box::new(factors));
        state.weight_changed[target.site] = true;
    }
    Ok(sites)
}

/// The best factors, with the site named where they are not found.
pub(crate) fn best(
    (context, solver): (&PassContext<'_>, Solver),
    site: usize,
    weight: &Mat,
    metric: Metric<'_>,
    rank: usize,
) -> Result<Thin, PassError> {
    let found = match solver {
        Solver::Exact => best_rank(weight, metric, rank),
        Solver::Randomized => {
            let place = ((context.block.index as u64) << 16) + site as u64 + 1;
            random_rank(weight, metric, rank, context.seed ^ place.wrapping_mul(0x9e37_79b9))
        }
    };
    found.map_err(|error| numeric(&context.block.sites[site].name, &error))
}

/// What a randomized search bounds, relative to the largest squared singular value.
pub(crate) fn bound(thin: &Thin) -> Option<Event> {
    let largest = thin.spectrum.first().copied().unwrap_or(0.0);
    let value = thin.bound? / largest.max(f64::MIN_POSITIVE);
    Some(Event::Chosen { name: "bound on what is left of a squared singular value".into(), value })
}

/// [`spectrum`] with the site named where it fails.
pub(crate) fn values(site: &str, weight: &Mat, metric: Metric<'_>) -> Result<Vec<f64>, PassError> {
    check_finite(site, "the weight", weight)?;
    spectrum(weight, metric).map_err(|error| numeric(site, &error))
}

/// Two Gram products and one decomposition of the smaller side, in f64.
pub(crate) fn cost(block: &Block, targets: &[Target], originals: bool) -> Cost {
    let mut cost = Cost::default();
    let mut kept = 0;
    for target in targets {
        let site = &block.sites[target.site];
        let (out, n) = (site.out_features, site.in_features);
        let side = out.min(n);
        cost.flops += 2.0 * (out * n) as f64 * (n + 2 * side) as f64
            + 9.0 * (side * side) as f64 * side as f64;
        // The weight, its product with the metric, their transposes; Gram matrix, vectors and working space; a strip
        // of the metric, or its factor; the result, its product and the difference.
        let wide = 8 * (4 * out * n + 5 * side * side);
        let metric = 8 * if out <= n { 512 * n.max(out) } else { 3 * n * n };
        let peak = wide + metric + 12 * out * n;
        cost.peak_bytes = cost.peak_bytes.max(peak);
        kept += 4 * site.weights();
    }
    if originals {
        cost.peak_bytes += kept;
    }
    cost
}
