//! The loop that passes of this crate share: steps over windows, each with derivatives of the block's loss by what its
//! linears stand for, and one move of everything that learns. The loss of some windows, the same before and after,
//! decides whether what was learned is kept.

use attar_ir::{
    BlockValues, Event, PassError, Progress, Target, Teacher, Training, Wanted, recipe::RecipeError,
};
use attar_tensor::Mat;

use crate::{
    AdamW, Decay, Moments, Order, Schedule,
    dense::DenseLinear,
    fake::{FakeLinear, Mover},
};

/// Windows whose loss decides.
const JUDGES: usize = 16;

/// How a block is trained: what the passes have in common.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Course {
    /// Steps.
    pub(crate) iterations: usize,
    /// Windows of a step.
    pub(crate) batch: usize,
    /// Levels (in steps between codes) or weights (relative to their root mean square).
    pub(crate) rate: f64,
    /// Factors on scales.
    pub(crate) scale_rate: f64,
    /// Norms and biases, relative to their mean size.
    pub(crate) norm_rate: f64,
    /// How levels move.
    pub(crate) mover: Mover,
    /// Fraction of the steps in which rates rise.
    pub(crate) warmup: f64,
    /// How rates fall.
    pub(crate) decay: Decay,
    /// The last block's logits are compared, not what it puts out.
    pub(crate) logits: bool,
}

impl Course {
    /// Refuses what is out of range.
    pub(crate) fn check(&self) -> Result<(), RecipeError> {
        if self.batch == 0 {
            return Err(RecipeError::invalid("batch", "expected at least 1 window"));
        }
        let rates =
            [("rate", self.rate), ("scale_rate", self.scale_rate), ("norm_rate", self.norm_rate)];
        for (name, rate) in rates {
            if !(0.0..=1.0).contains(&rate) {
                let reason = format!("expected a number from 0 to 1, got {rate}");
                return Err(RecipeError::invalid(name, reason));
            }
        }
        if !(0.0..1.0).contains(&self.warmup) {
            let reason = format!("expected a fraction below 1, got {}", self.warmup);
            return Err(RecipeError::invalid("warmup", reason));
        }
        Ok(())
    }

    /// What the plan counts on.
    pub(crate) const fn training(&self) -> Training {
        let Self { iterations: steps, batch, logits, .. } = *self;
        Training { steps, batch, vectors: self.norm_rate > 0.0, logits }
    }
}

/// What learns at one site.
#[derive(Debug)]
pub(crate) enum Learner {
    /// Codes and scales.
    Fake(Box<FakeLinear>),
    /// Weights.
    Dense(DenseLinear),
    /// Nothing.
    Fixed,
}

impl Learner {
    fn values(&self, out: &mut Mat) {
        match self {
            Self::Fake(fake) => fake.values(out),
            Self::Dense(_) | Self::Fixed => {}
        }
    }
}

/// A block in training; `learners[i]` belongs to `targets[i]`.
pub(crate) struct Trainer<'a> {
    pub(crate) course: Course,
    pub(crate) seed: u64,
    pub(crate) targets: &'a [Target],
    pub(crate) learners: Vec<Learner>,
    pub(crate) values: BlockValues,
}

/// What came of it.
pub(crate) struct Outcome {
    /// For the report.
    pub(crate) event: Event,
    /// False when the start was better.
    pub(crate) better: bool,
}

impl Trainer<'_> {
    fn put(&mut self) {
        for (target, learner) in self.targets.iter().zip(&self.learners) {
            learner.values(&mut self.values.linears[target.site]);
        }
    }

    /// Trains.
    pub(crate) fn run(&mut self, teacher: &Teacher<'_>) -> Result<Outcome, PassError> {
        let (course, function) = (self.course, teacher.function);
        let power = function.power()?.max(f64::MIN_POSITIVE);
        let windows = function.windows();
        let judges = Order::new(windows, JUDGES, !self.seed).batch(0);
        self.put();
        let before = function.loss(&self.values, &judges)?;
        let linears = self.learners.iter().any(|learner| !matches!(learner, Learner::Fixed));
        let wanted = Wanted { linears, vectors: course.norm_rate > 0.0 };
        let mut gradient = self.values.zeros();
        let vectors = self.values.biases.iter().flatten().chain(&self.values.norms);
        let mut vectors: Vec<(Moments, f32)> = vectors
            .map(|vector| {
                let sum: f32 = vector.iter().map(|v| v.abs()).sum();
                let mean = sum / vector.len().max(1) as f32;
                (Moments::new(vector.len()), course.norm_rate as f32 * mean)
            })
            .collect();
        let steps = course.iterations;
        let schedule = Schedule {
            steps,
            warmup: (course.warmup * steps as f64) as usize,
            decay: course.decay,
            floor: 0.0,
        };
        let mut order = Order::new(windows, course.batch, self.seed);
        for step in 0..steps {
            let batch = order.batch(step);
            let loss = function.gradient(&self.values, &batch, wanted, &mut gradient)?;
            let factor = schedule.factor(step);
            let rates = (course.rate as f32 * factor, course.scale_rate as f32 * factor);
            for (target, learner) in self.targets.iter().zip(&mut self.learners) {
                let derivative = &mut gradient.linears[target.site];
                match learner {
                    Learner::Fake(fake) => fake.step(step + 1, rates, course.mover, derivative),
                    Learner::Dense(dense) => {
                        let weight = &mut self.values.linears[target.site];
                        dense.step(step + 1, rates.0, weight, derivative);
                    }
                    Learner::Fixed => {}
                }
            }
            if wanted.vectors {
                let values = &mut self.values;
                let all = values.biases.iter_mut().flatten().chain(&mut values.norms);
                let from = gradient.biases.iter().flatten().chain(&gradient.norms);
                for ((vector, from), (moments, rate)) in all.zip(from).zip(&mut vectors) {
                    AdamW::default().step(step + 1, *rate * factor, moments, vector, from);
                }
            }
            self.put();
            (teacher.progress)(Progress { step: step + 1, steps, loss: loss / power });
        }
        let after = function.loss(&self.values, &judges)?;
        // Also where the loss has become NaN.
        let better = after <= before;
        let kept = if better { after } else { before };
        let event = Event::Learned { steps, before: before / power, after: kept / power };
        Ok(Outcome { event, better })
    }
}
