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
//! the block learn too. What is kept is the best of what was looked at: the start, and the iterates at the marks.
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
        let options: Options = options(
            table,
            &[
                "iterations",
                "batch",
                "rate",
                "scale_rate",
                "norm_rate",
                "mover",
                "reach",
                "start",
                "refine",
                "warmup",
                "decay",
            ],
        )?;
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
    /// Adam.
    #[default]
    Adam,
    /// By the sign of the derivative alone.
    Sign,
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
            iterations: 128,
            batch: 2,
            rate: 0.01,
            scale_rate: 0.002,
            norm_rate: 0.002,
            mover: Optimizer::Adam,
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
        if self.reach.is_some_and(|reach| !(reach > 0.0)) {
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
            all.push((found?, start::events(&factor)));
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
            cost.peak_bytes +=
                FakeLinear::bytes(site.weights(), size, self.0.adam(), self.0.reach.is_some());
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
            Learner::Fake(FakeLinear::new(weight, start, masked, reach, self.0.adam()))
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
