//! Block-wise reconstruction: what a block lost is trained back, one block after the other, against what the original
//! block puts out. One block's weights, derivatives and optimizer state are in memory.
//!
//! `min ‖f(X̂; Ŵ) − f(X; W)‖²` as in BRECQ (Li et al. 2021, arXiv:2102.05426), by AdamW. Of float linears all weights
//! learn, those that were pruned stay zero (as EBFT, Guo et al. 2024, arXiv:2402.12419, does behind sparse
//! pruning); of quantized ones the scales, the codes stay as they are (as PEQA, Kim et al. 2023, arXiv:2305.14152, and
//! the first half of EfficientQAT, arXiv:2407.11062, do); norms and biases always. Weights in ggml's block types stay.
//! Cost: 6 FLOPs per token and weight and step.

use attar_ir::{
    Block, BlockState, BlockStats, BlockValues, Contract, Cost, Event, FormChange, FormSet, Limits,
    Needs, Pass, PassContext, PassDef, PassError, PassReport, Site, SiteReport, Target, Teacher,
    Touches, Training, Upstream, Weight, recipe::options, relative,
};
use attar_tensor::{Mat, linalg::squares};
use serde::Deserialize;

use crate::{
    Decay,
    dense::DenseLinear,
    fake::{FakeLinear, Mover},
    trainer::{Course, Learner, Outcome, Trainer},
};

/// Registration of `reconstruct`.
pub(crate) const DEF: PassDef = PassDef {
    name: "reconstruct",
    summary: "train weights, scales and norms of a block against what the original block puts out",
    paper: "Li et al. 2021, arXiv:2102.05426; Guo et al. 2024, arXiv:2402.12419",
    example: "\
[[step]]
pass = \"wanda\"
sparsity = 0.5
[[step]]
pass = \"reconstruct\"
",
    takes_scheme: false,
    symmetric_by_default: true,
    build: |table| {
        let options: Options = options(table)?;
        options.course().check()?;
        Ok(Box::new(Reconstruct(options)))
    },
    schema: || schemars::schema_for!(Options),
};

/// What learns.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Learn {
    /// Weights of float linears, scales of quantized ones, norms and biases.
    #[default]
    All,
    /// Norms and biases.
    Vectors,
}

#[derive(Debug, Clone, Copy, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct Options {
    /// Steps for each block.
    iterations: usize,
    /// Windows of a step.
    batch: usize,
    /// Learning rate of weights, relative to their root mean square.
    rate: f64,
    /// Learning rate of the factors on scales of quantized linears.
    scale_rate: f64,
    /// Learning rate of norms and biases, relative to the mean size of a norm's weights.
    norm_rate: f64,
    /// What learns.
    learn: Learn,
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
            scale_rate: 0.005,
            norm_rate: 0.005,
            learn: Learn::All,
            warmup: 0.05,
            decay: Decay::Cosine,
            logits: true,
        }
    }
}

impl Options {
    const fn course(&self) -> Course {
        let Self { iterations, batch, rate, scale_rate, norm_rate, warmup, decay, logits, .. } =
            *self;
        let mover = Mover::Fixed;
        Course { iterations, batch, rate, scale_rate, norm_rate, mover, warmup, decay, logits }
    }
}

#[derive(Debug)]
struct Reconstruct(Options);

/// Why the numbers of a linear do not learn, where they might be expected to.
fn left_alone(weight: &Weight) -> Option<Event> {
    let reason = match weight {
        Weight::Quantized(quantized) if quantized.g_idx.is_some() => {
            "its columns are in groups by importance (`order` of gptq), whose scales do not learn"
        }
        Weight::Blocks(_) => "scales of block types do not learn",
        _ => return None,
    };
    Some(Event::LeftAlone { reason: reason.into() })
}

impl Reconstruct {
    fn learner(&self, state: &BlockState, target: &Target) -> Learner {
        let masked = state.masked[target.site];
        match &state.linears[target.site].weight {
            _ if self.0.learn == Learn::Vectors => Learner::Fixed,
            Weight::Dense(weight) => Learner::Dense(DenseLinear::new(weight, masked)),
            Weight::Quantized(quantized) if quantized.g_idx.is_none() => {
                let values = quantized.dequantize();
                Learner::Fake(Box::new(FakeLinear::new(&values, quantized, masked, None, false)))
            }
            _ => Learner::Fixed,
        }
    }
}

impl Pass for Reconstruct {
    fn name(&self) -> &'static str {
        "reconstruct"
    }

    fn contract(&self) -> Contract {
        Contract {
            accepts: FormSet::FLOAT_ANY_ZEROS.union(FormSet::QUANTIZED),
            produces: FormChange::NONE,
            needs: Needs::TEACHER,
            upstream: Upstream::Compressed,
            touches: Touches::Block,
            looks_ahead: false,
        }
    }

    fn training(&self) -> Training {
        self.0.course().training()
    }

    fn cost(&self, block: &Block, targets: &[Target], _: &Limits) -> Cost {
        let weights: usize = block.sites.iter().map(Site::weights).sum();
        // Weights in training, derivatives of each part of a step and of all, and a weight beside its former self.
        let mut peak_bytes = 4 * weights * 5;
        for target in targets.iter().filter(|_| self.0.learn == Learn::All) {
            peak_bytes += DenseLinear::bytes(block.sites[target.site].weights());
        }
        Cost { flops: 0.0, peak_bytes, scratch_bytes: 0 }
    }

    /// The head has no teacher and stays as it is.
    fn apply(
        &self,
        context: &PassContext<'_>,
        targets: &[Target],
        _: &mut BlockState,
        _: &mut BlockStats,
    ) -> Result<PassReport, PassError> {
        let same = |target: &Target| SiteReport {
            site: context.block.sites[target.site].name.clone(),
            pass: "reconstruct".into(),
            weight_error: 0.0,
            output_error: None,
            events: Vec::new(),
        };
        Ok(PassReport { sites: targets.iter().map(same).collect() })
    }

    fn learn(
        &self,
        context: &PassContext<'_>,
        targets: &[Target],
        state: &mut BlockState,
        _: &mut BlockStats,
        teacher: &Teacher<'_>,
    ) -> Result<PassReport, PassError> {
        let values = BlockValues::of(state);
        let learners = targets.iter().map(|target| self.learner(state, target)).collect();
        let seed = context.seed ^ context.block.index as u64;
        let mut trainer = Trainer { course: self.0.course(), seed, targets, learners, values };
        let Outcome { event, better } = trainer.run(teacher)?;
        let Trainer { learners, mut values, .. } = trainer;
        let mut sites = Vec::new();
        for (target, learner) in targets.iter().zip(learners) {
            let at = target.site;
            let mut weight_error = 0.0;
            if better {
                let learned = std::mem::take(&mut values.linears[at]);
                let before = state.linears[at].weight.values();
                let delta: Mat = &learned - &*before;
                weight_error = relative(squares(&delta), squares(&before));
                match learner {
                    Learner::Dense(_) => {
                        state.linears[at].weight = Weight::Dense(learned);
                        state.weight_changed[at] = true;
                    }
                    Learner::Fake(fake) => {
                        state.linears[at].weight = Weight::Quantized(fake.quantized());
                    }
                    Learner::Fixed => {}
                }
            }
            let mut events = vec![event.clone()];
            events.extend(left_alone(&state.linears[at].weight));
            sites.push(SiteReport {
                site: context.block.sites[at].name.clone(),
                pass: "reconstruct".into(),
                weight_error,
                output_error: None,
                events,
            });
        }
        if better && self.0.norm_rate > 0.0 {
            state.put_vectors(values.biases, values.norms);
        }
        Ok(PassReport { sites })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        rounding,
        testing::{Linear, learn, loss, scheme, state},
    };

    fn pruned(before: &BlockState) -> BlockState {
        let mut state = before.clone();
        let Weight::Dense(weight) = &mut state.linears[0].weight else { unreachable!() };
        weight.iter_mut().filter(|w| w.abs() < 0.6).for_each(|w| *w = 0.0);
        state.masked[0] = true;
        state
    }

    #[test]
    fn float_weights_learn_what_pruning_took_and_zeros_stay() {
        let before = state(1);
        let linear = Linear::new(&before, 2);
        let start = pruned(&before);
        let zeros: Vec<bool> = start.linears[0].weight.values().iter().map(|&w| w == 0.0).collect();
        let (mut all, mut vectors, mut none) = (start.clone(), start.clone(), start.clone());
        let report = learn(&DEF, "iterations = 400", None, &linear, &mut all);
        learn(&DEF, "iterations = 400\nlearn = \"vectors\"", None, &linear, &mut vectors);
        learn(&DEF, "iterations = 0", None, &linear, &mut none);
        assert_eq!(none.linears, start.linears);
        assert_eq!(none.norms, start.norms);
        assert_eq!(vectors.linears[0].weight, start.linears[0].weight);
        let losses = [&start, &vectors, &all].map(|state| loss(&linear, state));
        assert!(losses[1] < 0.95 * losses[0] && losses[2] < 0.5 * losses[0], "{losses:?}");
        for (w, zero) in all.linears[0].weight.values().iter().zip(zeros) {
            assert!(!zero || *w == 0.0);
        }
        assert!(all.weight_changed[0] && all.norm_changed[0] && all.bias_changed[0]);
        assert!(report.sites[0].weight_error > 0.0);
    }

    #[test]
    fn what_is_right_already_is_left_alone() {
        let before = state(3);
        let linear = Linear::new(&before, 4);
        let mut state = before.clone();
        learn(&DEF, "iterations = 20", None, &linear, &mut state);
        assert_eq!(state.linears, before.linears);
        assert_eq!(state.norms, before.norms);
    }

    #[test]
    fn of_quantized_weights_the_scales_learn() {
        let before = state(5);
        let linear = Linear::new(&before, 6);
        let mut start = before.clone();
        learn(&rounding::DEF, "iterations = 0", Some(scheme(2, true)), &linear, &mut start);
        let mut state = start.clone();
        learn(&DEF, "", None, &linear, &mut state);
        let of = |state: &BlockState| state.linears[0].weight.as_quantized().unwrap().clone();
        let (old, new) = (of(&start), of(&state));
        assert_eq!(old.codes, new.codes);
        assert_ne!(old.scales, new.scales);
        assert!(loss(&linear, &state) < 0.95 * loss(&linear, &start));
    }

    #[test]
    fn scales_of_reordered_columns_stay_and_the_report_says_so() {
        let before = state(5);
        let linear = Linear::new(&before, 6);
        let mut start = before.clone();
        learn(&rounding::DEF, "iterations = 0", Some(scheme(2, true)), &linear, &mut start);
        let Weight::Quantized(own) = &mut start.linears[0].weight else { unreachable!() };
        let size = own.scheme.group_size(own.in_features);
        own.g_idx = Some((0..own.in_features).map(|c| (c / size) as u32).collect());
        let mut state = start.clone();
        let report = learn(&DEF, "", None, &linear, &mut state);
        assert_eq!(state.linears[0].weight, start.linears[0].weight);
        let told = |event: &Event| matches!(event, Event::LeftAlone { reason } if reason.contains("columns"));
        assert!(report.sites[0].events.iter().any(told), "{report:?}");
    }

    #[test]
    fn threads_do_not_change_bits() {
        let before = state(8);
        let linear = Linear::new(&before, 9);
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut state = pruned(&before);
            pool.install(|| learn(&DEF, "iterations = 50", None, &linear, &mut state));
            state
        };
        assert_eq!(run(1), run(2));
    }
}
