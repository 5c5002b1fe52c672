//! Learned rounding: codes, scales and norms of a block are trained against what the original block puts out
//! (SignRound, Cheng et al. 2023, arXiv:2309.05516; training through the rounding of all of a block as in EfficientQAT's
//! Block-AP, Chen et al. 2024, arXiv:2407.11062).
//!
//! For the weights of a block, `min ‖f(X̂; Ŵ) − f(X; W)‖²` over levels l and scales s of `Ŵ = s · clamp(round(l))`
//! (`fake`): X̂ are the inputs that the compressed blocks before it make, X the original ones, so that each block also
//! makes up for what those before it lost. SignRound begins at `W / s` and moves each weight to one of its two
//! neighbours by the sign of the derivative.
//!
//! Deliberate differences: it begins at the solution of the column sweep in the Hessian's metric (`start`), each level
//! as near to its weight as the code found there allows; a step sees few windows, so that there are many; the norms of
//! the block learn too. What is kept is the better of the start and the end.
//! Cost: 6 FLOPs per token and weight and step, and as much memory as `attar plan` says.

use attar_ir::{
    Block, BlockState, BlockStats, BlockValues, Contract, Cost, Event, FormChange, FormSet, Limits,
    Needs, Pass, PassContext, PassDef, PassError, PassReport, SiteReport, Target, Teacher, Touches,
    Training, Upstream, Weight, check_finite,
    recipe::{RecipeError, options},
    relative,
};
use attar_tensor::{
    Mat, QuantizedLinear,
    column_solver::Factor,
    linalg::{InverseFactor, metric, squares},
};
use serde::Deserialize;

use crate::{
    AdamW, Decay,
    fake::{FakeLinear, Mover},
    start,
    trainer::{Course, Learner, Outcome, Trainer},
};

/// Registration of `autoround`.
pub(crate) const DEF: PassDef = PassDef {
    name: "autoround",
    summary: "learn codes, scales and norms of a block against what the original block puts out",
    paper: "Cheng et al. 2023, arXiv:2309.05516; Chen et al. 2024, arXiv:2407.11062",
    example: "\
[[step]]
pass = \"autoround\"
scheme = { bits = 2, group_size = 64 }
",
    takes_scheme: true,
    symmetric_by_default: true,
    build: |table| {
        let options: Options = options(table)?;
        options.check()?;
        Ok(Box::new(AutoRound(options)))
    },
    schema: || schemars::schema_for!(Options),
};

/// Where codes begin.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Start {
    /// The column sweep with its refinement, as in gptq.
    #[default]
    Sweep,
    /// Rounding to nearest.
    Nearest,
}

/// How levels move.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Optimizer {
    /// By the sign of the derivative alone.
    #[default]
    Sign,
    /// Adam.
    Adam,
}

#[derive(Debug, Clone, Copy, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct Options {
    /// Steps for each block.
    iterations: usize,
    /// Windows of a step.
    batch: usize,
    /// How far a level moves in the first step, in steps between codes.
    rate: f64,
    /// Learning rate of the factors on scales; 0 leaves scales alone.
    scale_rate: f64,
    /// Learning rate of norms and biases, relative to the mean size of a norm's weights; 0 leaves them alone.
    norm_rate: f64,
    /// How levels move.
    mover: Optimizer,
    /// How far a level may go from where it began, in steps between codes; any distance when absent.
    reach: Option<f64>,
    /// Where codes begin.
    start: Start,
    /// Rounds of refinement after the sweep.
    refine: usize,
    /// Fraction of the steps in which rates rise.
    warmup: f64,
    /// How rates fall.
    decay: Decay,
    /// The last block is taught by the divergence of the logits that the output head makes, not by what it puts out.
    logits: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            iterations: 96,
            batch: 2,
            rate: 0.01,
            scale_rate: 0.01,
            norm_rate: 0.002,
            mover: Optimizer::Sign,
            reach: None,
            start: Start::Sweep,
            refine: 2,
            warmup: 0.0,
            decay: Decay::Linear,
            logits: true,
        }
    }
}

impl Options {
    fn check(&self) -> Result<(), RecipeError> {
        if self.reach.is_some_and(|reach| reach.is_nan() || reach <= 0.0) {
            return Err(RecipeError::invalid("reach", "expected a positive number"));
        }
        self.course().check()
    }

    fn course(&self) -> Course {
        let &Self { iterations, batch, rate, scale_rate, norm_rate, warmup, decay, logits, .. } =
            self;
        let mover = match self.mover {
            Optimizer::Adam => Mover::Adam(AdamW { beta2: 0.99, ..AdamW::default() }),
            Optimizer::Sign => Mover::Sign,
        };
        Course { iterations, batch, rate, scale_rate, norm_rate, mover, warmup, decay, logits }
    }

    const fn adam(&self) -> bool {
        matches!(self.mover, Optimizer::Adam)
    }
}

#[derive(Debug)]
struct AutoRound(Options);

impl AutoRound {
    /// Codes, scales and zero points to begin with, and what is worth telling.
    fn start(
        &self,
        context: &PassContext<'_>,
        targets: &[Target],
        state: &BlockState,
        stats: &mut BlockStats,
    ) -> Result<Vec<(QuantizedLinear, Vec<Event>)>, PassError> {
        let mut shared: Option<(usize, Factor)> = None;
        let mut all = Vec::new();
        for target in targets {
            let site = &context.block.sites[target.site];
            let scheme = target.scheme.expect("the plan gives quantizing steps a scheme");
            let input = context.block.input_of(target.site);
            let hessian = stats
                .inputs
                .get_mut(input)
                .and_then(|input| input.as_mut()?.hessian.as_mut())
                .expect("the plan provides what the contract needs");
            let weight = state.linears[target.site]
                .weight
                .as_dense()
                .expect("the plan proved a float weight");
            check_finite(&site.name, "the weight", weight)?;
            if self.0.start == Start::Nearest {
                let diagonal: Vec<f32> = hessian.diag().to_vec();
                all.push((start::nearest(weight, &diagonal, scheme), Vec::new()));
                continue;
            }
            let factor = match shared.take() {
                Some((of, factor)) if of == input => factor,
                old => {
                    drop(old);
                    check_finite(&site.name, "the Hessian", hessian)?;
                    start::factor(&site.name, hessian, context.scratch)?
                }
            };
            factor.fill(hessian, true);
            let masked = state.masked[target.site];
            let refine = self.0.refine;
            let found = start::sweep(&site.name, weight, hessian, &factor, scheme, masked, refine);
            factor.fill(hessian, false);
            all.push((found?, Event::of_factor(&factor)));
            shared = Some((input, factor));
        }
        Ok(all)
    }
}

impl Pass for AutoRound {
    fn name(&self) -> &'static str {
        "autoround"
    }

    fn contract(&self) -> Contract {
        Contract {
            accepts: FormSet::FLOAT_ANY_ZEROS,
            produces: FormChange::QUANTIZE,
            needs: Needs::HESSIAN | Needs::TEACHER,
            upstream: Upstream::Compressed,
            touches: Touches::Block,
            looks_ahead: false,
        }
    }

    fn training(&self) -> Training {
        self.0.course().training()
    }

    fn cost(&self, block: &Block, targets: &[Target], limits: &Limits) -> Cost {
        let mut cost = Cost::default();
        let weights: usize = block.sites.iter().map(attar_ir::Site::weights).sum();
        // Weights in training, and derivatives of each part of a step and of all.
        cost.peak_bytes = 4 * weights * 4;
        for target in targets {
            let site = &block.sites[target.site];
            let size = target.scheme.map_or(64, |scheme| scheme.group_size(site.in_features));
            // What learning begins from is kept: codes, scales and zero points.
            let start = site.weights() + 5 * site.weights() / size;
            cost.peak_bytes += start
                + FakeLinear::bytes(site.weights(), size, self.0.adam(), self.0.reach.is_some());
            let n = site.in_features;
            let (factorizing, factor) = InverseFactor::bytes(n, limits.factor_on_scratch);
            cost.flops += (n * n) as f64 * (n as f64 * 2.0 / 3.0 + 7.0 * site.out_features as f64);
            // The sweep is over before training begins, and takes less than it.
            cost.peak_bytes = cost.peak_bytes.max(factorizing.max(factor) + 6 * 4 * site.weights());
            if limits.factor_on_scratch {
                cost.scratch_bytes = cost.scratch_bytes.max(6 * n * n);
            }
        }
        cost
    }

    fn apply(
        &self,
        context: &PassContext<'_>,
        targets: &[Target],
        state: &mut BlockState,
        stats: &mut BlockStats,
    ) -> Result<PassReport, PassError> {
        let found = self.start(context, targets, state, stats)?;
        Ok(self.finish(context, targets, state, stats, found))
    }

    fn learn(
        &self,
        context: &PassContext<'_>,
        targets: &[Target],
        state: &mut BlockState,
        stats: &mut BlockStats,
        teacher: &Teacher<'_>,
    ) -> Result<PassReport, PassError> {
        let mut found = self.start(context, targets, state, stats)?;
        let values = BlockValues::of(state);
        let reach = self.0.reach.map(|reach| reach as f32);
        let learner = |(target, (start, _)): (&Target, &(QuantizedLinear, Vec<Event>))| {
            let (weight, masked) = (&values.linears[target.site], state.masked[target.site]);
            Learner::Fake(Box::new(FakeLinear::new(weight, start, masked, reach, self.0.adam())))
        };
        let learners = targets.iter().zip(&found).map(learner).collect();
        let seed = context.seed ^ context.block.index as u64;
        let mut trainer = Trainer { course: self.0.course(), seed, targets, learners, values };
        let Outcome { event, better } = trainer.run(teacher)?;
        let Trainer { learners, values, .. } = trainer;
        for ((quantized, events), learner) in found.iter_mut().zip(learners) {
            if let (true, Learner::Fake(fake)) = (better, learner) {
                *quantized = fake.quantized();
            }
            events.push(event.clone());
        }
        if better && self.0.norm_rate > 0.0 {
            state.put_vectors(values.biases, values.norms);
        }
        Ok(self.finish(context, targets, state, stats, found))
    }
}

impl AutoRound {
    /// Puts what was found into the block and says how far it is from what was given.
    fn finish(
        &self,
        context: &PassContext<'_>,
        targets: &[Target],
        state: &mut BlockState,
        stats: &BlockStats,
        found: Vec<(QuantizedLinear, Vec<Event>)>,
    ) -> PassReport {
        let mut sites = Vec::new();
        for (target, (quantized, events)) in targets.iter().zip(found) {
            let linear = &mut state.linears[target.site];
            let weight = linear.weight.as_dense().expect("the plan proved a float weight");
            let input = context.block.input_of(target.site);
            let hessian = stats.input(input).and_then(|input| input.hessian.as_ref());
            let delta: Mat = quantized.dequantize() - weight;
            sites.push(SiteReport {
                site: context.block.sites[target.site].name.clone(),
                pass: "autoround".into(),
                weight_error: relative(squares(&delta), squares(weight)),
                output_error: hessian.map(|h| relative(metric(&delta, h), metric(weight, h))),
                events,
            });
            linear.weight = Weight::Quantized(quantized);
        }
        PassReport { sites }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{IN, Linear, OUT, learn, loss, scheme, state};
    use attar_ir::LinearState;

    fn quantized(state: &BlockState) -> &QuantizedLinear {
        state.linears[0].weight.as_quantized().unwrap()
    }

    #[test]
    fn no_iteration_is_the_start_and_more_of_them_lower_the_loss() {
        let before = state(1);
        let linear = Linear::new(&before, 2);
        for (bits, symmetric) in [(2, true), (2, false), (3, true)] {
            let scheme = Some(scheme(bits, symmetric));
            let of = |options: &str| {
                let mut state = before.clone();
                let report = learn(&DEF, options, scheme, &linear, &mut state);
                (state, report)
            };
            let (start, _) = of("iterations = 0");
            let (nearest, _) = of("iterations = 0\nstart = \"nearest\"");
            assert!(loss(&linear, &start) < loss(&linear, &nearest));
            assert_eq!(start.norms, before.norms);
            // A linear alone has little left to learn behind the sweep, and signs are too coarse for it: a start that
            // is better is kept.
            let (from_start, from_nearest) = (loss(&linear, &start), loss(&linear, &nearest));
            for (options, most) in [
                ("", from_start),
                ("rate = 0.0", 0.999 * from_start),
                ("start = \"nearest\"\nbatch = 4", from_nearest),
                ("start = \"nearest\"\nmover = \"adam\"\nrate = 0.02", 0.97 * from_nearest),
                ("start = \"nearest\"\nreach = 1.0\nbatch = 4", from_nearest),
            ] {
                let (learned, report) = of(options);
                let now = loss(&linear, &learned);
                assert!(now <= most, "{bits} {symmetric} {options}: {now} {most}");
                let events = &report.sites[0].events;
                let Some(Event::Learned { before, after, .. }) = events.first() else { panic!() };
                assert!(after <= before);
                let found = quantized(&learned);
                for &scale in &found.scales {
                    assert_eq!(scale.to_bits(), found.scheme.scale_grid.project(scale).to_bits());
                }
                assert!(found.codes.iter().all(|&code| code <= found.scheme.max_code()));
            }
            // Scales and norms alone, and codes alone.
            let (scales, _) = of("rate = 0.0");
            assert_eq!(quantized(&scales).codes, quantized(&start).codes);
            assert_ne!(quantized(&scales).scales, quantized(&start).scales);
            let frozen = "scale_rate = 0.0\nnorm_rate = 0.0\nstart = \"nearest\"\nmover = \"adam\"\nrate = 0.02";
            let (codes, _) = of(frozen);
            assert_eq!(quantized(&codes).scales, quantized(&nearest).scales);
            assert!(codes.norms == before.norms && !codes.norm_changed[0]);
            let moved = quantized(&codes).codes != quantized(&nearest).codes;
            assert!(moved || bits > 2);
        }
    }

    #[test]
    fn what_the_scheme_holds_exactly_stays() {
        let mut before = state(4);
        let step = 0.0078125;
        let weight = before.linears[0].weight.as_dense().unwrap();
        // Every group reaches both ends, so that the search finds this grid.
        let exact = Mat::from_shape_fn((OUT, IN), |(r, c)| match c % 32 {
            0 => -128.0 * step,
            1 => 127.0 * step,
            _ => (weight[[r, c]] / step).round().clamp(-128.0, 127.0) * step,
        });
        let bias = before.linears[0].bias.clone();
        before.linears[0] = LinearState { weight: Weight::Dense(exact.clone()), bias };
        let linear = Linear::new(&before, 5);
        let mut state = before.clone();
        learn(&DEF, "start = \"nearest\"", Some(scheme(8, false)), &linear, &mut state);
        assert_eq!(quantized(&state).dequantize(), exact);
        assert_eq!(state.norms, before.norms);
    }

    #[test]
    fn pruned_weights_stay_zero() {
        let mut before = state(6);
        let linear = Linear::new(&before, 7);
        let Weight::Dense(weight) = &mut before.linears[0].weight else { unreachable!() };
        weight.iter_mut().enumerate().filter(|(i, _)| i % 2 == 0).for_each(|(_, w)| *w = 0.0);
        before.masked[0] = true;
        for options in ["", "start = \"nearest\"\nmover = \"adam\"\nrate = 0.05"] {
            let mut state = before.clone();
            learn(&DEF, options, Some(scheme(3, true)), &linear, &mut state);
            let values = quantized(&state).dequantize();
            assert!(values.iter().step_by(2).all(|&w| w == 0.0));
            assert!(values.iter().skip(1).step_by(2).any(|&w| w != 0.0));
        }
    }

    #[test]
    fn threads_do_not_change_bits() {
        let before = state(8);
        let linear = Linear::new(&before, 9);
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut state = before.clone();
            pool.install(|| learn(&DEF, "", Some(scheme(2, true)), &linear, &mut state));
            state
        };
        assert_eq!(run(1), run(2));
    }

    #[test]
    fn options_out_of_range_are_refused() {
        for (options, word) in [
            ("batch = 0", "batch"),
            ("rate = -0.1", "rate"),
            ("scale_rate = 2.0", "scale_rate"),
            ("warmup = 1.0", "warmup"),
            ("reach = 0.0", "reach"),
            ("itertions = 3", "iterations"),
        ] {
            let error = (DEF.build)(&options.parse().unwrap()).unwrap_err().to_string();
            assert!(error.contains(word), "{options}: {error}");
        }
    }
}
