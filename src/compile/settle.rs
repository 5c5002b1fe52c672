//! Ranks that follow from the weights of all sites together: chosen before any block is worked on and before the plan is
//! made for good, so that every size is known when the first byte is written. One forward of the original model, one
//! block and one input's statistics in memory; the plan is then proved again with the chosen ranks.

use std::collections::BTreeMap;

use attar_eval::report::Phase;
use attar_formats::Windows;
use attar_ir::{BlockStats, Needs, Pass, Site};
use attar_model::{BlockRun, Stream, embed};

use super::{Job, Measure, prepare::prepare_with, read_windows, scratch_of, walk::sweep};
use crate::{Error, args::What, measure, progress, trace::Trace};

/// Passes whose ranks were chosen, by the number of their step.
pub(super) type Decided = BTreeMap<usize, Vec<(Site, Vec<f64>)>>;

/// The job with every rank known; the same when no pass chooses any.
pub(crate) fn settle(
    job: Job,
    what: &What,
    threads: usize,
    measure: Option<&Measure>,
) -> Result<Job, Error> {
    let choosing = |plan: &attar_ir::Plan| -> Vec<(usize, Needs)> {
        let passes = plan.passes.iter().enumerate();
        passes.filter_map(|(at, pass)| Some((at, pass.chooses_ranks()?))).collect()
    };
    if job.variants.iter().all(|(_, plan)| choosing(plan).is_empty()) {
        return Ok(job);
    }
    let windows = read_windows(&job)?;
    let mut decided = Decided::new();
    for (_, plan) in &job.variants {
        let mut steps = choosing(plan);
        steps.retain(|(at, _)| !decided.contains_key(&plan.steps[*at].number));
        if !steps.is_empty() {
            decided.extend(survey(&job, plan, &steps, windows.as_ref())?);
        }
    }
    prepare_with(what, threads, measure, &decided)
}

/// Squared singular values of every target of the steps, on the original model.
fn survey(
    job: &Job,
    plan: &attar_ir::Plan,
    steps: &[(usize, Needs)],
    windows: Option<&Windows>,
) -> Result<Decided, Error> {
    let (decoder, checkpoint) = (&job.decoder, &job.checkpoint);
    let (back, steps): (Vec<_>, Vec<_>) =
        steps.iter().partition(|(_, needs)| needs.contains(Needs::GRADIENTS));
    let needs = steps.iter().fold(Needs::empty(), |all, (_, needs)| all | *needs);
    let spill = measure::spill(&plan.limits, &scratch_of(None));
    let trace = Trace::new(false);
    let begun = trace.begin(Phase::Calibrate, "ranks");
    let mut decided = Decided::new();
    if !back.is_empty() {
        let windows = windows.ok_or("the plan counted on calibration data")?;
        // Blocks come last first; spectra go in their order.
        let mut found: BTreeMap<(usize, usize), Vec<(Site, Vec<f64>)>> = BTreeMap::new();
        sweep(decoder, checkpoint, windows, &spill, &mut |block, state, stats| {
            for &(at, _) in &back {
                let (step, pass): (_, &dyn Pass) = (&plan.steps[at], &*plan.passes[at]);
                for target in &step.targets[block.index] {
                    let weight = state.linears[target.site].weight.values();
                    let values = pass.spectrum(block, target.site, &weight, stats)?;
                    let site = block.sites[target.site].clone();
                    found.entry((step.number, block.index)).or_default().push((site, values));
                }
            }
            Ok(())
        })?;
        for ((number, _), sites) in found {
            decided.entry(number).or_default().extend(sites);
        }
    }
    if steps.is_empty() {
        trace.end(Phase::Calibrate, "ranks", begun);
        return Ok(decided);
    }
    let mut stream = None;
    if !needs.is_empty() {
        let windows = windows.ok_or("the plan counted on calibration data")?;
        let lengths: Vec<usize> = windows.ids.iter().map(Vec::len).collect();
        let mut embedded = Stream::new(&lengths, decoder.spec.hidden, Some(&spill))?;
        for (at, ids) in windows.ids.iter().enumerate() {
            embedded.write(at, &embed(decoder, checkpoint, ids)?)?;
        }
        stream = Some(embedded);
    }
    let bar = progress::bar(decoder.graph.blocks.len(), "choosing ranks");
    for block in &decoder.graph.blocks {
        let state = decoder.load_block(block.index, checkpoint)?;
        let mut run = match &mut stream {
            Some(stream) => {
                let spill = Some(spill.clone());
                Some(BlockRun::begin(decoder, block.index, checkpoint, stream, spill)?)
            }
            None => None,
        };
        for input in 0..block.inputs.len() {
            let mut stats = BlockStats::empty(block.inputs.len());
            if let Some(run) = &mut run {
                stats.inputs[input] = Some(run.observe(input, &state, needs)?);
            }
            for &(at, _) in &steps {
                let (step, pass): (_, &dyn Pass) = (&plan.steps[at], &*plan.passes[at]);
                let targets = &step.targets[block.index];
                for target in targets.iter().filter(|t| block.input_of(t.site) == input) {
                    let weight = state.linears[target.site].weight.values();
                    let values = pass.spectrum(block, target.site, &weight, &stats)?;
                    let site = block.sites[target.site].clone();
                    decided.entry(step.number).or_default().push((site, values));
                }
            }
        }
        if let Some(run) = run {
            run.finish(&state)?;
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    trace.end(Phase::Calibrate, "ranks", begun);
    Ok(decided)
}
