//! FWSVD: singular values of the weight, each input channel weighed by what the loss says of its weights (Hsu et al. 2022,
//! arXiv:2207.00112, section 4).
//!
//! The importance of a weight is the diagonal of the empirical Fisher matrix, the mean over calibration windows of its squared
//! gradient. All weights of an input channel share its sum (a row of the matrix in `y = x Wᵀ`), so that the weighed problem
//! still has a closed form: with `D = diag(sqrt(I))` the best approximation of `W D` of rank r is taken and D divided out
//! again. `of = "outputs"` reads the paper the other way round; `of = "both"` weighs with the product of both sums, the
//! importance that would be if rows and columns were independent, which has a closed form as well: `D W E`.
//! `weight [out, in]`. Cost: 8 FLOPs per calibration token and weight of the model for the gradients, then O(min² · max).
//!
//! Deliberate differences: the gradients are those of the next-token loss on calibration text, not of a task that the model was
//! tuned for; an importance below 1e-8 of the mean counts as that, so that D has an inverse. Behind scales that were folded
//! into the block the weight as it was is factored, and the factors follow the scales.

use attar_ir::{
    Block, BlockState, BlockStats, Contract, Cost, FormChange, FormSet, Limits, Needs, Pass,
    PassContext, PassDef, PassError, PassReport, Site, SiteGradient, Target, Touches, Upstream,
    recipe::options,
};
use attar_tensor::{
    Mat,
    linalg::lowrank::{Metric, Thin},
};
use serde::Deserialize;

use crate::{
    common::{best, cost, factor, values},
    options::{Options, Share, Size, Solver},
};

/// Registration of `fwsvd`.
pub(crate) const DEF: PassDef = PassDef {
    name: "fwsvd",
    summary: "put two thin matrices in the place of each, input channels weighed by the squared gradients of the loss",
    paper: "Hsu et al. 2022, arXiv:2207.00112",
    example: "\
[[step]]
pass = \"fwsvd\"
ratio = 0.2
[[emit]]
layout = \"dense\"
",
    takes_scheme: false,
    symmetric_by_default: false,
    build: |table| {
        let own: FwsvdOptions = options(table)?;
        let FwsvdOptions { rank, ratio, share, energy, multiple_of, solver, of } = own;
        let size = Options { rank, ratio, share, energy, multiple_of, solver }.size()?;
        Ok(Box::new(Fwsvd { size, solver, of }))
    },
    schema: || schemars::schema_for!(FwsvdOptions),
};

/// What one importance is given to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Of {
    /// Columns of `[out, in]`.
    #[default]
    Inputs,
    /// Rows.
    Outputs,
    /// Rows and columns, each by its own sum.
    Both,
}

#[derive(Debug, Clone, Copy, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct FwsvdOptions {
    /// Rank of every site's factors, instead of a ratio.
    rank: Option<usize>,
    /// Fraction of the parameters that is taken away; 0.2 where nothing else is given.
    ratio: Option<f64>,
    /// With a ratio: `site` takes it of each site, `model` shares one budget out among all sites of the step.
    share: Share,
    /// Fraction of the squared singular values that each site keeps (of the weighed weight), instead of a ratio.
    energy: Option<f64>,
    /// Chosen ranks are rounded to multiples of it.
    multiple_of: usize,
    /// `exact`, or `randomized`: much faster where the rank is a small part of the width, within the error bound that the
    /// report states.
    solver: Solver,
    /// Whose weights share one importance: those of `inputs` (when absent) or `outputs`, or, as far as a product can say it,
    /// `both`.
    of: Of,
}

impl Default for FwsvdOptions {
    fn default() -> Self {
        let Options { rank, ratio, share, energy, multiple_of, solver } = Options::default();
        Self { rank, ratio, share, energy, multiple_of, solver, of: Of::default() }
    }
}

#[derive(Debug)]
struct Fwsvd {
    size: Size,
    solver: Solver,
    of: Of,
}

/// Least importance, as a fraction of the mean.
const LEAST: f64 = 1e-8;

impl Fwsvd {
    /// The diagonals of what rows and what columns are multiplied with, relative to their mean squares; empty for none.
    fn scales(&self, gradient: &SiteGradient) -> (Vec<f64>, Vec<f64>) {
        let squares = &gradient.squares;
        let (mut rows, mut columns) = (Vec::new(), Vec::new());
        if self.rows() {
            let sums = squares.outer_iter().map(|lane| lane.iter().map(|&s| f64::from(s)).sum());
            rows = roots(sums.collect());
        }
        if self.columns() {
            columns = vec![0.0; squares.ncols()];
            for lane in squares.outer_iter() {
                columns.iter_mut().zip(lane).for_each(|(sum, &square)| *sum += f64::from(square));
            }
            columns = roots(columns);
        }
        (rows, columns)
    }

    fn rows(&self) -> bool {
        self.of != Of::Inputs
    }

    fn columns(&self) -> bool {
        self.of != Of::Outputs
    }

    /// Numbers that [`Fwsvd::scales`] makes of the rows and columns of a site.
    fn counts(&self, site: &Site) -> (usize, usize) {
        let of = |wanted: bool, count: usize| if wanted { count } else { 0 };
        (of(self.rows(), site.out_features), of(self.columns(), site.in_features))
    }

    /// The best factors of a weight whose scales are known.
    fn thin(
        &self,
        context: &PassContext<'_>,
        site: usize,
        weight: &Mat,
        ((rows, columns), rank): ((&[f64], &[f64]), usize),
    ) -> Result<Thin, PassError> {
        let around = (context, self.solver);
        let metric = if columns.is_empty() { Metric::Plain } else { Metric::Scales(columns) };
        if rows.is_empty() {
            return best(around, site, weight, metric, rank);
        }
        let mut thin = best(around, site, &rows_times(weight, rows), metric, rank)?;
        let inverse: Vec<f64> = rows.iter().map(|scale| 1.0 / scale).collect();
        thin.up = rows_times(&thin.up, &inverse);
        Ok(thin)
    }
}

/// Square roots of sums, relative to their mean.
fn roots(sums: Vec<f64>) -> Vec<f64> {
    let mean = sums.iter().sum::<f64>() / sums.len().max(1) as f64;
    if mean.is_finite() && mean > 0.0 {
        sums.iter().map(|sum| (sum / mean).max(LEAST).sqrt()).collect()
    } else {
        // The loss says nothing of this weight.
        vec![1.0; sums.len()]
    }
}

fn rows_times(weight: &Mat, scales: &[f64]) -> Mat {
    let mut scaled = weight.clone();
    for (mut row, scale) in scaled.outer_iter_mut().zip(scales) {
        row.mapv_inplace(|w| (f64::from(w) * scale) as f32);
    }
    scaled
}

/// What scales that were folded into the block have multiplied the rows and columns of a site's weight with.
fn folded(
    context: &PassContext<'_>,
    state: &BlockState,
    site: usize,
) -> Option<(Vec<f64>, Vec<f64>)> {
    if state.input_scale.iter().all(Option::is_none) {
        return None;
    }
    let shape = state.linears[site].weight.shape();
    let mut ones = Mat::ones(shape);
    state.follow_folds(context.block, site, &mut ones);
    let first = f64::from(ones[[0, 0]]);
    let rows = ones.column(0).iter().map(|&scale| f64::from(scale) / first).collect();
    Some((rows, ones.row(0).iter().map(|&scale| f64::from(scale)).collect()))
}

impl Pass for Fwsvd {
    fn name(&self) -> &'static str {
        "fwsvd"
    }

    fn contract(&self) -> Contract {
        Contract {
            accepts: FormSet::DENSE_FLOAT,
            produces: FormChange::FACTOR,
            needs: Needs::empty(),
            upstream: Upstream::Original,
            touches: Touches::Sites,
            looks_ahead: false,
        }
    }

    fn rank(&self, site: &Site) -> Result<Option<usize>, String> {
        if site.is_head() {
            return Err("gradients are taken of decoder blocks only; `keep` the output head".into());
        }
        self.size.rank(site).map(Some)
    }

    fn chooses_ranks(&self) -> Option<Needs> {
        self.size.chooses().then_some(Needs::GRADIENTS)
    }

    fn spectrum(
        &self,
        block: &Block,
        site: usize,
        weight: &Mat,
        stats: &BlockStats,
    ) -> Result<Vec<f64>, PassError> {
        let gradients = stats.gradients.as_ref().expect("the plan provides what is asked for");
        let (rows, columns) = self.scales(&gradients.sites[site]);
        let metric = if columns.is_empty() { Metric::Plain } else { Metric::Scales(&columns) };
        let name = &block.sites[site].name;
        if rows.is_empty() {
            return values(name, weight, metric);
        }
        values(name, &rows_times(weight, &rows), metric)
    }

    fn with_ranks(&self, sites: &[(Site, Vec<f64>)]) -> Result<Box<dyn Pass>, String> {
        let Self { solver, of, .. } = *self;
        Ok(Box::new(Self { size: self.size.choose(sites)?, solver, of }))
    }

    fn surveys(&self) -> Option<Needs> {
        Some(Needs::GRADIENTS)
    }

    fn survey(&self, _: &Block, _: &[Target], _: &BlockState, stats: &BlockStats) -> Vec<f64> {
        let gradients = stats.gradients.as_ref().expect("the plan provides what is asked for");
        // Of every site: targets come stage by stage.
        let scales = gradients.sites.iter().map(|gradient| self.scales(gradient));
        scales.flat_map(|(rows, columns)| rows.into_iter().chain(columns)).collect()
    }

    fn cost(&self, block: &Block, targets: &[Target], _: &Limits) -> Cost {
        let mut cost = cost(block, targets, false);
        // The weight with its rows scaled, and unfolded.
        let largest = targets.iter().map(|target| block.sites[target.site].weights()).max();
        cost.peak_bytes += 8 * largest.unwrap_or(0);
        cost
    }

    fn apply(
        &self,
        context: &PassContext<'_>,
        targets: &[Target],
        state: &mut BlockState,
        stats: &mut BlockStats,
    ) -> Result<PassReport, PassError> {
        let (block, survey) = (context.block, &context.survey[context.block.index]);
        let folds: Vec<_> =
            (0..block.sites.len()).map(|site| folded(context, state, site)).collect();
        let thin = |site: usize, weight: &Mat, rank| {
            let count = |site: &Site| self.counts(site).0 + self.counts(site).1;
            let start: usize = block.sites[..site].iter().map(count).sum();
            let (own, all) = (self.counts(&block.sites[site]).0, count(&block.sites[site]));
            let scales = survey[start..start + all].split_at(own);
            let Some((rows, columns)) = &folds[site] else {
                return self.thin(context, site, weight, (scales, rank));
            };
            let across = |weight: &Mat, scale: &dyn Fn(usize) -> f64| {
                Mat::from_shape_fn(weight.dim(), |(i, j)| {
                    (f64::from(weight[[i, j]]) * scale(j)) as f32
                })
            };
            let inverse: Vec<f64> = rows.iter().map(|scale| 1.0 / scale).collect();
            let original = across(&rows_times(weight, &inverse), &|j| 1.0 / columns[j]);
            let mut thin = self.thin(context, site, &original, (scales, rank))?;
            thin.up = rows_times(&thin.up, rows);
            thin.down = across(&thin.down, &|j| columns[j]);
            Ok(thin)
        };
        let rank = |site: &Site| self.size.rank(site);
        let sites = factor("fwsvd", (context, targets), (state, stats), rank, thin)?;
        Ok(PassReport { sites })
    }
}

#[cfg(test)]
mod tests {
    use attar_ir::{
        BlockGradients, ChannelMap, Fold, InputGroup, LinearState, Producer, Role, Weight,
    };
    use attar_tensor::{DType, rng::Rng};

    use super::*;

    /// Two linears, the rows of the first making the input of the second.
    fn block() -> Block {
        let site = |name: &str, role, out_features, in_features| {
            let (name, dtype) = (name.to_owned(), DType::F32);
            Site { name, role, out_features, in_features, bias: false, dtype }
        };
        let input = |name, width, site| InputGroup { name, width, sites: vec![site] };
        Block {
            index: 0,
            prefix: "b.".into(),
            sites: vec![site("b.up", Role::Up, 24, 16), site("b.down", Role::Down, 16, 24)],
            norms: Vec::new(),
            inputs: vec![input("mlp input", 16, 0), input("mlp activation", 24, 1)],
            folds: vec![Fold { producer: Producer::Rows(0), input: 1, map: ChannelMap::Identity }],
            attention: None,
        }
    }

    fn random(rng: &mut Rng, shape: (usize, usize)) -> Mat {
        Mat::from_shape_vec(shape, rng.normals(shape.0 * shape.1)).unwrap()
    }

    fn state(rng: &mut Rng) -> BlockState {
        let linear = |shape| LinearState { weight: Weight::Dense(random(rng, shape)), bias: None };
        let linears = [(24, 16), (16, 24)].map(linear).into();
        BlockState::new(0, linears, Vec::new())
    }

    /// Gradients whose rows and columns differ a hundredfold, or are alike.
    fn stats(rng: &mut Rng, alike: bool) -> BlockStats {
        let mut gradient = |shape: (usize, usize)| {
            let sum = random(rng, shape);
            let size = |i: usize| if alike { 1.0 } else { 10f32.powf((i % 5) as f32 - 2.0) };
            let of = |(i, j): (usize, usize)| size(i) * size(j + 1);
            SiteGradient { squares: Mat::from_shape_fn(shape, of), sum }
        };
        let sites = vec![gradient((24, 16)), gradient((16, 24))];
        let gradients = Some(BlockGradients { windows: 4, sites });
        BlockStats { gradients, ..BlockStats::empty(2) }
    }

    fn pass(of: Of) -> Fwsvd {
        Fwsvd { size: Size::Rank(5), solver: Solver::Exact, of }
    }

    /// Factors both sites; what came out, as whole matrices.
    fn apply(pass: &dyn Pass, state: &mut BlockState, stats: &BlockStats) -> Vec<Mat> {
        let block = block();
        let targets = [0, 1].map(|site| Target { site, scheme: None });
        let survey = [pass.survey(&block, &targets, state, stats)];
        let context =
            PassContext { block: &block, seed: 0, survey: &survey, original: &[], scratch: None };
        let mut stats = stats.clone();
        // One stage after the other, as in a run.
        for target in targets {
            pass.apply(&context, &[target], state, &mut stats).unwrap();
        }
        state.linears.iter().map(|linear| linear.weight.values().into_owned()).collect()
    }

    /// `Σ w_ij (a_ij − b_ij)²` with the importance shared as the pass shares it.
    fn error(of: Of, squares: &Mat, a: &Mat, b: &Mat) -> f64 {
        let shared = |i: usize, j: usize| -> f64 {
            let row: f64 = squares.row(i).iter().map(|v| f64::from(*v)).sum();
            let column: f64 = squares.column(j).iter().map(|v| f64::from(*v)).sum();
            match of {
                Of::Inputs => column,
                Of::Outputs => row,
                Of::Both => row * column,
            }
        };
        let cells = a.indexed_iter().zip(b);
        cells.map(|(((i, j), a), b)| shared(i, j) * f64::from(a - b).powi(2)).sum()
    }

    #[test]
    fn with_equal_importance_it_is_svd_and_else_its_weighed_error_is_the_least() {
        let mut rng = Rng::new(5);
        let before = state(&mut rng);
        let svd = (crate::svd::DEF.build)(&"rank = 5".parse().unwrap()).unwrap();
        let (alike, apart) = (stats(&mut rng, true), stats(&mut rng, false));
        let plain = apply(&*svd, &mut before.clone(), &alike);
        let whole = |site: usize| before.linears[site].weight.values().into_owned();
        for of in [Of::Inputs, Of::Outputs, Of::Both] {
            let same = apply(&pass(of), &mut before.clone(), &alike);
            for (same, plain) in same.iter().zip(&plain) {
                let most = (same - plain).iter().fold(0.0f32, |most, v| most.max(v.abs()));
                assert!(most < 1e-5, "{of:?}: {most}");
            }
            let weighed = apply(&pass(of), &mut before.clone(), &apart);
            let gradients = apart.gradients.as_ref().unwrap();
            for (site, (own, plain)) in weighed.iter().zip(&plain).enumerate() {
                let of = |x: &Mat| error(of, &gradients.sites[site].squares, &whole(site), x);
                assert!(of(own) < 0.7 * of(plain), "{site}: {} {}", of(own), of(plain));
                // No better one is near.
                for at in 0..20 {
                    let (out, inner) = own.dim();
                    let left = random(&mut rng, (out, 1));
                    let right = random(&mut rng, (1, inner));
                    let moved = own + &(left.dot(&right) * (0.001 * (at + 1) as f32));
                    // Back to rank 5 in the Frobenius norm.
                    let moved = attar_tensor::linalg::lowrank::best_rank(&moved, Metric::Plain, 5)
                        .map(|thin| thin.up.dot(&thin.down))
                        .unwrap();
                    assert!(of(&moved) > of(own) * (1.0 - 1e-5), "{site}");
                }
            }
        }
    }

    #[test]
    fn scales_that_were_folded_before_change_nothing_but_themselves() {
        let mut rng = Rng::new(6);
        let before = state(&mut rng);
        let stats = stats(&mut rng, false);
        for of in [Of::Inputs, Of::Outputs, Of::Both] {
            let plain = apply(&pass(of), &mut before.clone(), &stats);
            let mut folded = before.clone();
            let scale: Vec<f32> = (0..24).map(|i| 0.5 + i as f32 / 8.0).collect();
            folded.scale_input(1, &scale);
            for site in [0, 1] {
                let mut weight = before.linears[site].weight.values().into_owned();
                folded.follow_folds(&block(), site, &mut weight);
                folded.linears[site].weight = Weight::Dense(weight);
            }
            let found = apply(&pass(of), &mut folded, &stats);
            let up = Mat::from_shape_fn((24, 16), |(i, j)| plain[0][[i, j]] / scale[i]);
            let down = Mat::from_shape_fn((16, 24), |(i, j)| plain[1][[i, j]] * scale[j]);
            for (found, wanted) in found.iter().zip([up, down]) {
                let most = (found - &wanted).iter().fold(0.0f32, |most, v| most.max(v.abs()));
                assert!(most < 1e-4, "{of:?}: {most}");
            }
        }
    }

    #[test]
    fn silent_weights_have_a_scale() {
        let squares = Mat::zeros((3, 2));
        let silent = SiteGradient { sum: squares.clone(), squares };
        assert_eq!(pass(Of::Inputs).scales(&silent), (vec![], vec![1.0, 1.0]));
        let mut squares = Mat::zeros((3, 2));
        squares[[1, 1]] = 8.0;
        let (found, none) =
            pass(Of::Outputs).scales(&SiteGradient { sum: squares.clone(), squares });
        assert!(none.is_empty());
        assert!((found[1] - 3f64.sqrt()).abs() < 1e-12 && (found[0] - 1e-4).abs() < 1e-12);
    }
}
