//! Training as a pass on the whole model: where its tensors come from, where its state lies while it works, and how it
//! tells what it does. The state is an object of the work directory that two names take turns for, so that one is always
//! whole; a run that was killed goes on from the newest.

use std::{
    cell::RefCell,
    path::Path,
    time::{Duration, Instant},
};

use attar_formats::{
    Checkpoint, Windows, hash_bytes,
    safetensors::{SafetensorsFile, SafetensorsWriter},
    stage::{ObjectInfo, Stage},
};
use attar_ir::{
    ModelContext, ModelEntry, PassError, Saved, Train, TrainProgress, TrainSession, plan::ModelStep,
};
use attar_model::Decoder;
use attar_tensor::{DType, QuantizedLinear, TensorHeader, TensorSource, TensorView};
use indicatif::ProgressBar;
use serde_json::{Value, json};

use super::{
    keys,
    reshape::{Around, Making},
};
use crate::{Error, progress, trace::Trace};

/// Why a checkpoint cannot teach another; they have to put out the same tokens.
pub(super) fn check_teacher(
    folder: &Path,
    student: &Checkpoint,
) -> Result<(Checkpoint, Decoder), String> {
    let fail = |reason: String| format!("teacher {}: {reason}", folder.display());
    let teacher = Checkpoint::open(folder).map_err(|error| fail(error.to_string()))?;
    if teacher.gguf().is_some() {
        return Err(fail("is a GGUF file; give the Hugging Face directory it was made of".into()));
    }
    for (key, what) in [("quantization_config", "quantized"), ("low_rank", "factored")] {
        if teacher.config().get(key).is_some() {
            return Err(fail(format!(
                "is {what} ({key} in config.json); give the checkpoint it was made of"
            )));
        }
    }
    let vocab = |checkpoint: &Checkpoint| checkpoint.config()["vocab_size"].as_u64();
    let (theirs, ours) = (vocab(&teacher), vocab(student));
    if theirs != ours {
        let show = |size: Option<u64>| size.map_or_else(|| "no".to_owned(), |n| n.to_string());
        let (theirs, ours) = (show(theirs), show(ours));
        return Err(fail(format!(
            "has {theirs} tokens where the student has {ours}; distillation needs one vocabulary"
        )));
    }
    let tokens = |checkpoint: &Checkpoint| {
        let path = checkpoint.folder().join("tokenizer.json");
        let text: Value = attar_formats::read_json(&path).ok()?;
        Some(hash_bytes(text["model"]["vocab"].to_string().as_bytes()))
    };
    if let (Some(theirs), Some(ours)) = (tokens(&teacher), tokens(student))
        && theirs != ours
    {
        return Err(fail(
            "its tokenizer.json gives the tokens other numbers than the student's; distillation needs one tokenizer"
                .into(),
        ));
    }
    let decoder = Decoder::read(teacher.config(), &teacher).map_err(|error| {
        fail(format!("{error}; give a checkpoint of a family that Attar reads"))
    })?;
    Ok((teacher, decoder))
}

/// One hash of all files of a teacher.
pub(super) fn teacher_hash(folder: &str) -> Result<String, Error> {
    let hashes = Checkpoint::open(Path::new(folder))?.hashes()?;
    Ok(hash_bytes(serde_json::to_string(&hashes)?.as_bytes()))
}

/// One training at work.
struct Session<'a> {
    around: &'a Around<'a>,
    student: (&'a Value, &'a dyn TensorSource),
    teacher: &'a Checkpoint,
    windows: &'a Windows,
    codes: &'a dyn Fn(&str) -> Option<QuantizedLinear>,
    write: &'a dyn Fn(&str, &[f32]) -> Result<(), PassError>,
    label: &'a str,
    /// Names of the state, by turns, and the one that was taken last.
    names: [String; 2],
    turn: RefCell<usize>,
    saved: RefCell<Instant>,
    begun: Instant,
    told: RefCell<Instant>,
    bar: ProgressBar,
    trace: &'a Trace,
}

/// Names of the state of a training whose result has this key.
fn names(key: &str) -> [String; 2] {
    ["0", "1"].map(|turn| keys::hash(&[keys::VERSION, "training", key, turn]))
}

/// Removes the state of a training; its result is there.
pub(super) fn forget(stage: &Stage, key: &str) -> Result<(), Error> {
    for name in names(key) {
        stage.remove(&name)?;
    }
    Ok(())
}

/// Lines of progress for programs come so often.
const TELL: Duration = Duration::from_secs(5);

impl Session<'_> {
    fn stage(&self) -> &Stage {
        self.around.stage
    }

    fn fail(&self, error: impl std::fmt::Display) -> PassError {
        failed(self.label, error)
    }

    /// The state of a name, when it is whole.
    fn object(&self, turn: usize) -> Option<(ObjectInfo, SafetensorsFile)> {
        self.stage().open_object(&self.names[turn]).ok().flatten()
    }
}

fn failed(label: &str, error: impl std::fmt::Display) -> PassError {
    PassError::Numeric { site: label.to_owned(), reason: error.to_string() }
}

impl TrainSession for Session<'_> {
    fn student(&self) -> (&Value, &dyn TensorSource) {
        self.student
    }

    fn codes(&self, weight: &str) -> Option<QuantizedLinear> {
        (self.codes)(weight)
    }

    fn teacher(&self) -> (&Value, &dyn TensorSource) {
        (self.teacher.config(), self.teacher)
    }

    fn windows(&self) -> &[Vec<u32>] {
        &self.windows.ids
    }

    fn stream_bytes(&self) -> usize {
        self.around.limits.stream
    }

    fn saved(&self) -> Result<Option<Saved>, PassError> {
        // Only one of them is read: a state is as large as the training itself.
        let step = |turn: usize| {
            let info = self.stage().info(&self.names[turn]);
            info.and_then(|info| info.facts["step"].as_u64())
        };
        let newer = usize::from(step(1) > step(0));
        let open = |turn| self.object(turn).map(|object| (turn, object));
        let found = open(newer).or_else(|| open(1 - newer));
        *self.turn.borrow_mut() = found.as_ref().map_or(newer, |(turn, _)| *turn);
        Ok(found.map(|(_, (info, file))| {
            self.trace.note(&format!("{} goes on at step {}", self.label, info.facts["step"]));
            let list = move |name: &str| {
                let list = file.view(name)?.to_f32().ok();
                file.release(name);
                list
            };
            Saved { facts: info.facts, list: Box::new(list) }
        }))
    }

    fn due(&self) -> bool {
        self.saved.borrow().elapsed() >= self.around.checkpoint_every
    }

    fn save(&self, facts: Value, lists: &[(String, &[f32])]) -> Result<(), PassError> {
        let (old, new) = (*self.turn.borrow(), 1 - *self.turn.borrow());
        let name = &self.names[new];
        self.stage().remove(name).map_err(|error| self.fail(error))?;
        let header = |(name, list): &(String, &[f32])| TensorHeader {
            name: name.clone(),
            dtype: DType::F32,
            shape: vec![list.len()],
        };
        let headers = lists.iter().map(header).collect();
        let kept = self.stage().put_with(name, "training", self.label, facts, headers, |writer| {
            for (name, list) in lists {
                let view =
                    TensorView::new(DType::F32, vec![list.len()], bytemuck::cast_slice(list))
                        .map_err(|error| error.to_string())?;
                writer.write_view(name, &view).map_err(|error| error.to_string())?;
            }
            Ok(())
        });
        kept.map_err(|error| self.fail(error))?;
        self.stage().remove(&self.names[old]).map_err(|error| self.fail(error))?;
        *self.turn.borrow_mut() = new;
        *self.saved.borrow_mut() = Instant::now();
        self.trace.training(json!({"saved": true}));
        Ok(())
    }

    fn progress(&self, TrainProgress { step, steps, done, loss, tokens }: TrainProgress) {
        let seconds = self.begun.elapsed().as_secs_f64();
        let speed = tokens as f64 / seconds.max(1e-9);
        self.bar.set_length(steps as u64);
        self.bar.set_position(step as u64);
        self.bar.set_message(format!("loss {loss:.4}, {speed:.0} tokens/s"));
        if step == steps || self.told.borrow().elapsed() >= TELL {
            *self.told.borrow_mut() = Instant::now();
            self.trace.training(json!({
                "step": step, "steps": steps, "loss": loss, "tokens_per_second": speed,
                "seconds_left": seconds * (steps - step) as f64 / done.max(1) as f64,
            }));
        }
    }

    fn write(&self, tensor: &str, values: &[f32]) -> Result<(), PassError> {
        (self.write)(tensor, values)
    }
}

/// A training, its model and its teacher, and where what it learns goes.
pub(super) struct Job<'a> {
    pub(super) step: &'a ModelStep,
    pub(super) around: &'a Around<'a>,
    /// The original model.
    pub(super) source: &'a Checkpoint,
    pub(super) context: ModelContext<'a>,
    pub(super) student: (&'a Value, &'a dyn TensorSource),
    pub(super) codes: &'a dyn Fn(&str) -> Option<QuantizedLinear>,
    pub(super) write: &'a dyn Fn(&str, &[f32]) -> Result<(), PassError>,
}

impl Job<'_> {
    /// Trains; `key` names the result, and with it the states until it is there.
    pub(super) fn train(
        &self,
        train: &dyn Train,
        key: &str,
        trace: &Trace,
    ) -> Result<ModelEntry, Error> {
        let Self { step, around, source, context, student, codes, write } = *self;
        let label = step.label.as_str();
        let windows = around.windows.ok_or("the plan counted on calibration data")?;
        let other = step.teacher.as_ref();
        let other = other
            .map(|folder| check_teacher(Path::new(folder), source))
            .transpose()?
            .map(|(teacher, _)| teacher);
        let session = Session {
            around,
            student,
            teacher: other.as_ref().unwrap_or(source),
            windows,
            codes,
            write,
            label,
            names: names(key),
            turn: RefCell::new(0),
            saved: RefCell::new(Instant::now()),
            begun: Instant::now(),
            told: RefCell::new(Instant::now()),
            bar: progress::bar(0, step.pass.name()),
            trace,
        };
        let training = train.train(&context, &session)?;
        session.bar.finish_and_clear();
        let values = context.graph.sizes().layers;
        Ok(ModelEntry {
            what: "training".into(),
            before: values,
            after: values,
            training: Some(training),
            ..ModelEntry::default()
        })
    }
}

/// Trains, writes what changed, and copies what did not.
pub(super) fn run(
    making: &Making<'_>,
    train: &dyn Train,
    key: &str,
    trace: &Trace,
    writer: &mut SafetensorsWriter,
) -> Result<Vec<ModelEntry>, Error> {
    let (writer, written) = (RefCell::new(writer), RefCell::new(Vec::new()));
    let write = |tensor: &str, values: &[f32]| {
        // A tied table may stand in the file twice.
        for header in making.headers() {
            if making.origin(&header.name) != tensor {
                continue;
            }
            let bytes = bytemuck::cast_slice(values);
            let fail = |error: &dyn std::fmt::Display| failed(&making.step.label, error);
            let view = TensorView::new(DType::F32, header.shape.clone(), bytes)
                .map_err(|error| fail(&error))?;
            let done = writer.borrow_mut().write_view(&header.name, &view);
            done.map_err(|error| fail(&error))?;
            written.borrow_mut().push(header.name);
        }
        Ok(())
    };
    let slopes = attar_ir::Slopes::new();
    let job = Job {
        step: making.step,
        around: making.around,
        source: making.source,
        context: making.context(&slopes),
        student: (making.checkpoint.config(), making.checkpoint),
        codes: &|_| None,
        write: &write,
    };
    let entry = job.train(train, key, trace)?;
    let (writer, written) = (writer.into_inner(), written.into_inner());
    for header in making.headers() {
        if written.contains(&header.name) {
            continue;
        }
        let origin = making.origin(&header.name);
        writer.write_view(&header.name, &making.checkpoint.read(&origin)?)?;
        making.checkpoint.release(&origin);
    }
    Ok(vec![entry])
}
