//! From what was typed to a proven job: recipe, headers, variants, plans. No weight is read.

use std::path::{Path, PathBuf};

use attar_formats::{Checkpoint, CorpusSource, quant_config};
use attar_ir::{
    plan::{self, PassGraph, Plan, PlanError, PlanErrors},
    recipe::{Emit, Recipe},
};
use attar_model::{Decoder, DecoderSpec};
use attar_tensor::BlockType;

use super::{
    Job, Measure,
    reshape::{Base, Steps},
    settle::Decided,
    shim,
};
use crate::{Error, args::What, contract, importance::Importances, measure, registry};

fn recipe_of(what: &What) -> Result<(Recipe, PathBuf), Error> {
    let mut base = PathBuf::new();
    let mut recipe = if let Some(path) = &what.recipe {
        let text = std::fs::read_to_string(path)
            .map_err(|error| format!("{}: {error}", path.display()))?;
        let own = || path.parent().map(Path::to_path_buf).unwrap_or_default();
        base = what.base.clone().unwrap_or_else(own);
        Recipe::parse(&text).map_err(|error| format!("{}: {error}", path.display()))?
    } else {
        Recipe::preset(what.preset.as_deref().unwrap_or_default(), what.group)?
    };
    if !what.layout.is_empty() {
        if !recipe.emits.is_empty() {
            return Err(
                "the recipe has [[emit]] already; leave --layout away or change the recipe".into(),
            );
        }
        recipe.emits = what.layout.iter().map(|layout| Emit::new(layout)).collect();
    }
    if recipe.emits.is_empty() {
        let layout = recipe.default_layout();
        recipe.emits.push(Emit::new(layout));
    }
    let calibration = &mut recipe.calibration;
    calibration.samples = what.samples.unwrap_or(calibration.samples);
    calibration.context = what.context.unwrap_or(calibration.context);
    calibration.seed = what.seed.unwrap_or(calibration.seed);
    Ok((recipe, base))
}

/// Reads recipe and headers and proves the plan; no weight is read.
pub(crate) fn prepare(
    what: &What,
    threads: usize,
    measure: Option<&Measure>,
) -> Result<Job, Error> {
    prepare_with(what, threads, measure, &Decided::new())
}

/// As [`prepare`], with the ranks that passes have chosen.
pub(super) fn prepare_with(
    what: &What,
    threads: usize,
    measure: Option<&Measure>,
    decided: &Decided,
) -> Result<Job, Error> {
    let checkpoint = Checkpoint::open_dense(&what.checkpoint, crate::gguf::dequantize)?;
    if let Some(parsed) = quant_config::parse(checkpoint.config())? {
        return Err(format!(
            "{} is quantized already ({}); give the original checkpoint",
            what.checkpoint.display(),
            parsed.layout
        )
        .into());
    }
    if checkpoint.config().get("low_rank").is_some() {
        return Err(format!(
            "{} is factored already (low_rank in config.json); give the original checkpoint, or one written with `merge = true`",
            what.checkpoint.display()
        )
        .into());
    }
    let adapter =
        checkpoint.folder().join(attar_formats::adapter::FOLDER).join("adapter_config.json");
    if adapter.exists() {
        return Err(format!(
            "{} has an adapter beside its weights ({}); merge it into them first, or move it away to leave it out",
            what.checkpoint.display(),
            adapter.display()
        )
        .into());
    }
    let decoder = Decoder::read(checkpoint.config(), &checkpoint)
        .map_err(|error| format!("{}: {error}", what.checkpoint.display()))?;
    let (mut recipe, folder) = recipe_of(what)?;
    recipe.resolve(registry::known().as_known())?;
    let calibration = &recipe.calibration;
    let corpus = if let Some(ids) = &what.ids {
        Some(CorpusSource::Ids(ids.clone()))
    } else if !what.text.is_empty() {
        Some(CorpusSource::Text(what.text.clone()))
    } else if let Some(ids) = &calibration.ids {
        Some(CorpusSource::Ids(folder.join(ids)))
    } else if calibration.text.is_empty() {
        None
    } else {
        Some(CorpusSource::Text(calibration.text.iter().map(|t| folder.join(t)).collect()))
    };
    let context = calibration.context.min(decoder.spec.context);
    let tokens = if corpus.is_some() { calibration.samples * context } else { 0 };
    let texts = match &corpus {
        Some(CorpusSource::Text(texts)) => texts.as_slice(),
        _ => &[],
    };
    let budget = measure::budget(what.memory, threads, checkpoint.folder(), texts, measure);
    let layouts = registry::layouts();
    let imatrix = what.imatrix.as_deref();
    let imatrix = imatrix.map(|path| Importances::open(path, &decoder.graph)).transpose()?;
    let given = imatrix.as_ref().map(Importances::given);
    let (mut variants, mut bases, mut errors) = (Vec::new(), Vec::new(), Vec::new());
    // Steps that variants share are refused once.
    let mut refuse = |found: Vec<PlanError>| {
        for error in found {
            if !errors.contains(&error) {
                errors.push(error);
            }
        }
    };
    for mut variant in plan::variants(&recipe)? {
        let passes = variant.recipe.resolve(registry::known().as_known())?;
        let steps = (&variant.recipe, variant.steps.as_slice());
        let Steps { base, model, blocks: mut passes, last } =
            match Base::of(&checkpoint, &decoder, steps, passes, &folder)? {
                Ok(found) => found,
                Err(found) => {
                    refuse(found);
                    continue;
                }
            };
        let mut unsettled = Vec::new();
        for (pass, &number) in passes.iter_mut().zip(&variant.steps[model.len()..]) {
            if pass.chooses_ranks().is_some()
                && let Some(step) = model.first()
            {
                unsettled.push(PlanError::Reshape {
                    step: step.label.clone(),
                    reason: "ranks are chosen from the checkpoint's own weights, before this pass changes them; give \
                             the step behind it a `rank` or a `ratio` for each site"
                        .to_owned(),
                });
            } else if let Some(spectra) = decided.get(&number) {
                *pass = pass.with_ranks(spectra)?;
            }
        }
        if !unsettled.is_empty() {
            refuse(unsettled);
            continue;
        }
        if let (Some(_), Some(step)) = (given, model.first()) {
            let reason = "an importance matrix is of the model as it was, not of what this pass leaves; give \
                          calibration data instead"
                .to_owned();
            refuse(vec![PlanError::Reshape { step: step.label.clone(), reason }]);
            continue;
        }
        let checked = PassGraph::new(
            base.decoder.graph.clone(),
            passes,
            &base.recipe,
            &layouts,
            &base.headers,
            tokens,
        )
        .after(model)
        .before(last)
        .numbered(&variant)
        .with_given(given)
        .with_budget(budget)
        .check();
        match checked {
            Ok(mut plan) => {
                let spec = &base.decoder.spec;
                let follows = |spec: &DecoderSpec| spec.heads * spec.head_dim == spec.hidden;
                if spec.family == "qwen2" && follows(&decoder.spec) && !follows(spec) {
                    plan.notes.push(
                        "vLLM computes qwen2's width of a head from the hidden width and reads no head_dim: it will \
                         not load this; transformers does"
                            .to_owned(),
                    );
                }
                let whole = std::mem::replace(&mut variant.recipe, base.recipe.clone());
                variants.push((variant, plan));
                bases.push((base, whole));
            }
            Err(PlanErrors(found)) => refuse(found),
        }
    }
    keep_largest_need(&mut errors);
    if !errors.is_empty() {
        return Err(PlanErrors(errors).into());
    }
    for ((_, plan), (base, _)) in variants.iter_mut().zip(&bases) {
        imatrix.as_ref().map_or(Ok(()), |imatrix| imatrix.check(plan))?;
        if plan.emits.iter().any(|emit| !plan.factored(emit).is_empty()) {
            shim::text(checkpoint.config())?;
        }
        check_gguf(&checkpoint, &base.decoder, plan)?;
    }
    let warnings = contract::judge(&variants, &checkpoint, &what.promise)?;
    let promise = what.promise.clone();
    Ok(Job {
        checkpoint,
        decoder,
        recipe,
        folder,
        variants,
        bases,
        corpus,
        imatrix,
        promise,
        warnings,
    })
}

/// Whatever a GGUF file cannot say of this model is told before any work is done.
fn check_gguf(checkpoint: &Checkpoint, decoder: &Decoder, plan: &mut Plan) -> Result<(), Error> {
    let mut notes = Vec::new();
    if let Some(gguf) = checkpoint.gguf() {
        let types = gguf.block_types();
        let types: Vec<_> = types.iter().map(|(ty, count)| format!("{count} in {ty}")).collect();
        if !types.is_empty() {
            notes.push(format!(
                "the source is quantized itself ({}): its errors stay, and ours are measured against it",
                types.join(", ")
            ));
        }
    }
    for emit in plan.emits.iter().filter(|emit| emit.container == plan::GGUF) {
        let most = BlockType::from_name(emit.layout.0);
        notes.extend(crate::gguf::describe(checkpoint, &decoder.spec, most)?.notes);
        crate::gguf::check_names(emit.tensors.iter().map(|tensor| tensor.name.as_str()))?;
    }
    notes.sort();
    notes.dedup();
    plan.notes.extend(notes);
    Ok(())
}

/// Of several variants that a budget is too small for, one is told: that which needs the most.
fn keep_largest_need(errors: &mut Vec<PlanError>) {
    let need = |error: &PlanError| match error {
        PlanError::Memory { smallest, .. } => Some(*smallest),
        _ => None,
    };
    let largest = errors.iter().filter_map(need).max();
    errors.retain(|error| need(error).is_none() || need(error) == largest);
}
