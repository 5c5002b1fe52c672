//! What happens when: the time line of the report, and (`--progress json`) one JSON object a line on
//! standard error for those who run Attar from a program.

use std::{
    sync::{Mutex, PoisonError},
    time::Instant,
};

use attar_eval::report::{Phase, Span};
use attar_ir::Progress;
use serde_json::{Value, json};

/// Collects the time line of one run.
#[derive(Debug)]
pub(crate) struct Trace {
    begun: Instant,
    json: bool,
    spans: Mutex<Vec<Span>>,
}

impl Trace {
    pub(crate) fn new(json: bool) -> Self {
        Self { begun: Instant::now(), json, spans: Mutex::default() }
    }

    fn now(&self) -> f64 {
        self.begun.elapsed().as_secs_f64()
    }

    /// Seconds since the beginning.
    pub(crate) fn total(&self) -> f64 {
        self.now()
    }

    /// The time line so far, by beginning.
    pub(crate) fn spans(&self) -> Vec<Span> {
        let mut spans = self.spans.lock().unwrap_or_else(PoisonError::into_inner).clone();
        spans.sort_by(|a, b| a.start.total_cmp(&b.start));
        spans
    }

    /// Seconds of a phase so far.
    pub(crate) fn seconds(&self, phase: Phase) -> f64 {
        self.spans()
            .iter()
            .filter(|span| span.phase == phase)
            .map(|span| span.end - span.start)
            .sum()
    }

    /// Runs `work` as a part of `phase` and returns its result with the seconds it took.
    pub(crate) fn run<T>(&self, phase: Phase, what: &str, work: impl FnOnce() -> T) -> (T, f64) {
        let start = self.begin(phase, what);
        let result = work();
        (result, self.end(phase, what, start))
    }

    /// Tells that a part begins; give what it returns to [`Trace::end`].
    pub(crate) fn begin(&self, phase: Phase, what: &str) -> f64 {
        let start = self.now();
        if self.json {
            eprintln!("{}", json!({"event": "begin", "phase": phase, "what": what, "t": start}));
        }
        start
    }

    /// Tells that a part has ended; returns its seconds.
    pub(crate) fn end(&self, phase: Phase, what: &str, start: f64) -> f64 {
        let end = self.now();
        if self.json {
            eprintln!("{}", json!({"event": "end", "phase": phase, "what": what, "t": end}));
        }
        // Neighbours of one kind make one span.
        let mut spans = self.spans.lock().unwrap_or_else(PoisonError::into_inner);
        match spans.iter_mut().rev().find(|span| span.phase == phase) {
            Some(last) if last.what == what && start - last.end < 0.01 => last.end = end,
            _ => spans.push(Span { phase, what: what.to_owned(), start, end }),
        }
        end - start
    }

    /// Tells how far a pass that learns is, at every hundredth of its steps.
    pub(crate) fn progress(&self, what: &str, Progress { step, steps, loss }: Progress) {
        let hundredth = |step: usize| 100 * step / steps.max(1);
        if self.json && hundredth(step) != hundredth(step.saturating_sub(1)) {
            let line = json!({
                "event": "progress", "what": what, "step": step, "steps": steps, "loss": loss, "t": self.now(),
            });
            eprintln!("{line}");
        }
    }

    /// How far training is, for programs.
    pub(crate) fn training(&self, mut facts: Value) {
        if self.json {
            facts["event"] = json!("training");
            facts["t"] = json!(self.now());
            eprintln!("{facts}");
        }
    }

    /// Something worth a line that is not a part of the work.
    pub(crate) fn note(&self, text: &str) {
        if self.json {
            eprintln!("{}", json!({"event": "note", "text": text, "t": self.now()}));
        } else {
            eprintln!("note: {text}");
        }
    }
}
