//! The proof: selects sites, follows forms, asks layouts, and collects every refusal.

use std::collections::BTreeMap;

use attar_tensor::{BlockType, LayoutSpec, QuantScheme, ScaleGrid};

use super::{
    CONTAINERS, DENSE, GGUF, ModelStep, PassGraph, Plan, PlanError, PlanErrors, PlanStep, predict,
    rank::{self, Piece, check_rank},
    written::{fallbacks, notes, planned_emit, site_table, stored_as},
};
use crate::recipe::{self, DEFAULT_KEEP, Recipe, Step, nearest};
use crate::{
    Block, Contract, Form, ModelGraph, Needs, Numeric, Producer, Rank, Site, Sparsity, Target,
    Touches, Upstream,
};

/// Position of a site: block and index in it.
pub(super) type Place = (usize, usize);

pub(super) fn check(input: PassGraph<'_>) -> Result<Plan, PlanErrors> {
    let PassGraph { graph, passes, recipe, numbers, layouts, source, .. } = input;
    let PassGraph { calibration_tokens, given, budget, model, last, .. } = input;
    let mut errors = Vec::new();
    // Steps and emits are called by their places in the recipe as it was written.
    let place = |list: &[usize], at: usize| list.get(at).copied().unwrap_or(at);
    let labels: Vec<_> =
        recipe.steps.iter().enumerate().map(|(i, s)| s.label(place(&numbers.0, i))).collect();
    if recipe.steps.is_empty() && model.is_empty() {
        errors.push(PlanError::NoSteps);
    }
    for step in model.iter().chain(&last) {
        if step.calibrates() && calibration_tokens == 0 {
            let (step, needs) = (step.label.clone(), "activations of every block".to_owned());
            errors.push(PlanError::CalibrationMissing { step, needs });
        }
        let context = recipe.calibration.context.min(step.graph.context);
        if step.pass.slopes(&step.graph).is_some() && context < 2 {
            let reason = "slopes of the loss need windows of two tokens at least, the calibration has 1; raise `context`";
            let step = step.label.clone();
            errors.push(PlanError::Reshape { step, reason: reason.into() });
        }
    }
    if recipe.emits.is_empty() && !labels.is_empty() {
        errors.push(PlanError::NeverEmitted { steps: labels.join(", ") });
    }
    let emits = resolve_emits(recipe, layouts, &numbers.1, &mut errors);

    let selected: Vec<Vec<Place>> = recipe
        .steps
        .iter()
        .zip(&labels)
        .map(|(step, label)| select(&graph, step, label, &mut errors))
        .collect();
    let contracts: Vec<_> = passes
        .iter()
        .zip(&recipe.steps)
        .map(|(pass, step)| {
            let schemed = step.scheme.is_some() || step.types.is_some();
            let own = if schemed { pass.contract_with_scheme() } else { pass.contract() };
            let known = given.is_some_and(|given| given.needs.contains(own.needs));
            let upstream = match step.upstream {
                Some(asked) => asked,
                None if known && !own.needs.is_empty() => Upstream::Given,
                None => own.upstream,
            };
            Contract { upstream, ..own }
        })
        .collect();
    if given.is_some() && !contracts.iter().any(|c| c.upstream == Upstream::Given) {
        errors.push(PlanError::GivenUnused { steps: labels.join(", ") });
    }
    let quantizes: Vec<_> =
        contracts.iter().map(|c| c.produces.numeric == Some(Numeric::Quantized)).collect();

    // Schemes: what the step says, narrowed to what every emit can store.
    // Emits that have a scheme of their own serve steps that give none.
    let owners: Vec<BlockType> = emits.iter().filter_map(|emit| emit.spec.block_type()).collect();
    let own = owners
        .first()
        .filter(|first| owners.len() == emits.len() && owners.iter().all(|other| other == *first));
    let lacking = recipe
        .steps
        .iter()
        .zip(&quantizes)
        .any(|(s, &q)| q && s.scheme.is_none() && s.types.is_none());
    if lacking && own.is_none() && !owners.is_empty() {
        let layouts: Vec<_> = emits.iter().map(|emit| emit.spec.id().0).collect();
        errors.push(PlanError::BlockGrids { layouts: layouts.join(", ") });
    }
    for ((step, label), &quantizes) in recipe.steps.iter().zip(&labels).zip(&quantizes) {
        let given = step.scheme.is_some() || step.types.is_some();
        match (given, quantizes) {
            (false, true) if !owners.is_empty() => {}
            (false, true) => errors.push(PlanError::SchemeMissing { step: label.clone() }),
            (true, false) => errors.push(PlanError::SchemeUnused { step: label.clone() }),
            _ => {}
        }
    }
    for ((step, label), contract) in recipe.steps.iter().zip(&labels).zip(&contracts) {
        if step.upstream.is_some() && contract.needs.is_empty() {
            errors.push(PlanError::UpstreamUnused { step: label.clone() });
        }
    }
    let scheme_of = |step: usize, place: Place, site: &Site| -> Option<QuantScheme> {
        if let Some(types) = recipe.steps[step].types {
            let block = types.of(&graph, place.0, site.role, !contracts[step].needs.is_empty());
            return Some(stored_as(block, site).scheme());
        }
        let Some(spec) = recipe.steps[step].scheme else {
            return emits.first().filter(|_| own.is_some())?.spec.own_scheme(site.in_features);
        };
        let grids = emits.iter().map(|emit| emit.spec.scale_grid(site.dtype));
        Some(QuantScheme {
            bits: spec.bits,
            granularity: spec.granularity,
            symmetric: spec.symmetric.unwrap_or(true),
            scale_grid: grids.fold(ScaleGrid::F32, ScaleGrid::intersect),
            zero_min: emits.iter().map(|emit| emit.spec.zero_min()).max().unwrap_or(0),
            activations: spec.activations,
        })
    };

    // Forms, step by step.
    let mut sites: BTreeMap<Place, SiteState> = BTreeMap::new();
    for block in graph.all_blocks() {
        for at in 0..block.sites.len() {
            sites.insert((block.index, at), SiteState::default());
        }
    }
    let mut steps: Vec<PlanStep> = Vec::with_capacity(passes.len());
    for (index, contract) in contracts.iter().enumerate() {
        let label = &labels[index];
        let mut refused: BTreeMap<(String, String), (Form, Vec<String>)> = BTreeMap::new();
        let mut no_ahead = Vec::new();
        let mut unable: BTreeMap<(String, &'static str), Vec<String>> = BTreeMap::new();
        let (mut uneven, mut broken) = (Vec::new(), Vec::new());
        let mut chosen = None;
        let mut folded: BTreeMap<(usize, bool), Vec<String>> = BTreeMap::new();
        let mut unranked: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let mut targets = vec![Vec::new(); graph.blocks.len() + 1];
        for &place in &selected[index] {
            let block = block_at(&graph, place.0);
            let site = &block.sites[place.1];
            let scheme = if quantizes[index] {
                let scheme = scheme_of(index, place, site);
                if scheme.is_some_and(|s| s.groups(site.in_features).is_none()) {
                    uneven.push((site.name.clone(), site.in_features));
                }
                if let (Some(scheme), Some(rank)) = (scheme, sites[&place].rank)
                    && scheme.groups(rank).is_none()
                {
                    uneven.push((format!("{}.up", site.name), rank));
                    // A rank that stands in the recipe is the writer's own.
                    let by = sites[&place].ranked_by;
                    chosen = by.filter(|by| !recipe.steps[*by].options.contains_key("rank"));
                }
                scheme
            } else if contract.looks_ahead {
                let next = (index + 1..recipe.steps.len())
                    .find(|&later| quantizes[later] && selected[later].contains(&place));
                if next.is_none() {
                    no_ahead.push(site.name.clone());
                }
                next.and_then(|later| scheme_of(later, place, site))
            } else {
                None
            };
            targets[place.0].push(Target { site: place.1, scheme });
            if let Some(Sparsity::NM { m, .. }) = contract.produces.sparsity
                && !site.in_features.is_multiple_of(usize::from(m))
            {
                broken.push((site.name.clone(), site.in_features));
            }
            if let Some(scheme) = scheme {
                let zeros = sites[&place].form.sparsity != Sparsity::Dense;
                let pass = &passes[index];
                let able = pass.takes(scheme);
                let able = if zeros { able.and(pass.keeps_zeros(scheme)) } else { able };
                if let Err(reason) = able {
                    unable.entry((scheme.label(), reason)).or_default().push(site.name.clone());
                }
            }
            if contract.touches == Touches::Folds {
                for other in fold_neighbours(block, place.1) {
                    let state = &sites[&(place.0, other)];
                    let factored = state.made_by.filter(|_| state.rank.is_some());
                    let by = state.quantized_by.map(|by| (by, false));
                    if let Some(by) = by.or(factored.map(|by| (by, true)))
                        && other != place.1
                    {
                        let names = folded.entry(by).or_default();
                        if !names.contains(&block.sites[other].name) {
                            names.push(block.sites[other].name.clone());
                        }
                    }
                }
            }
            let state = sites.get_mut(&place).expect("every site of the graph has a state");
            if !contract.accepts.accepts(state.form) {
                let made_by =
                    state.made_by.map_or("the checkpoint".to_owned(), |by| labels[by].clone());
                refused
                    .entry((state.form.to_string(), made_by))
                    .or_insert_with(|| (state.form, Vec::new()))
                    .1
                    .push(site.name.clone());
                continue;
            }
            // What an earlier step learned is not the original's any more: the correction would take it back.
            let learned = (0..index).find(|&earlier| {
                contracts[earlier].needs.contains(Needs::TEACHER)
                    && selected[earlier].iter().any(|other| other.0 == place.0)
            });
            if let (true, Some(earlier)) = (passes[index].reads_original(), learned) {
                let reason = format!(
                    "compares with the original weights, which {} has moved away from; leave one of the two out",
                    labels[earlier]
                );
                unranked.entry(reason).or_default().push(site.name.clone());
            }
            if let Some(kept) = passes[index].density() {
                state.density = Some(kept);
            }
            if let Some(made) = contract.produces.rank {
                let factors = made == Rank::Factored;
                let asked = passes[index].rank(site).and_then(|rank| {
                    let rank = rank.unwrap_or(0);
                    check_rank(site, rank, factors).map(|()| rank)
                });
                match asked {
                    Ok(rank) if factors => {
                        (state.rank, state.ranked_by) = (Some(rank), Some(index));
                    }
                    Ok(rank) => state.correction = Some(rank),
                    Err(reason) => {
                        unranked.entry(reason).or_default().push(site.name.clone());
                    }
                }
            }
            let mut after = contract.produces.apply(state.form);
            if let Some(scheme) = scheme.filter(|_| quantizes[index]) {
                after.activations = scheme.activations;
            }
            if after != state.form {
                state.made_by = Some(index);
            }
            state.form = after;
            state.steps.push(index);
            if quantizes[index] {
                state.quantized_by = Some(index);
                state.scheme = scheme;
            }
        }
        let step = || label.clone();
        if !uneven.is_empty() {
            let granularity = recipe.steps[index].scheme.map(|s| s.granularity.as_config());
            let group_size = granularity.unwrap_or_default().unsigned_abs() as usize;
            let chosen = chosen.map(|by| labels[by].clone());
            errors.push(PlanError::GroupSize { step: step(), group_size, sites: uneven, chosen });
        }
        if let (false, Some(Sparsity::NM { n, m })) =
            (broken.is_empty(), contract.produces.sparsity)
        {
            errors.push(PlanError::Pattern { step: step(), n, m, sites: broken });
        }
        for ((_, made_by), (form, sites)) in refused {
            errors.push(PlanError::Form { step: step(), form, made_by, sites });
        }
        for ((scheme, reason), sites) in unable {
            errors.push(PlanError::PassScheme { step: step(), scheme, reason, sites });
        }
        if !no_ahead.is_empty() {
            errors.push(PlanError::NothingAhead { step: step(), sites: no_ahead });
        }
        for ((by, factored), sites) in folded {
            let (step, by) = (step(), labels[by].clone());
            errors.push(if factored {
                PlanError::FoldFactored { step, by, sites }
            } else {
                PlanError::FoldQuantized { step, by, sites }
            });
        }
        for (reason, sites) in unranked {
            errors.push(PlanError::Rank { step: step(), reason, sites });
        }
        let calibrates = !contract.needs.is_empty() && contract.upstream != Upstream::Given;
        let chosen = passes[index].chooses_ranks().filter(|needs| !needs.is_empty());
        let surveys = passes[index].surveys().or(chosen);
        if (calibrates || surveys.is_some()) && calibration_tokens == 0 {
            let needs = needs_text(contract.needs | surveys.unwrap_or_default());
            errors.push(PlanError::CalibrationMissing { step: step(), needs });
        }
        steps.push(PlanStep {
            label: label.clone(),
            number: place(&numbers.0, index),
            pass: recipe.steps[index].pass.clone(),
            options: recipe.steps[index].options.clone(),
            contract: *contract,
            sites: targets.iter().map(Vec::len).sum(),
            given: given.filter(|_| contract.upstream == Upstream::Given),
            targets,
        });
    }

    check_siblings(&graph, &sites, &emits, &mut errors);
    if let Some(reason) = last.as_ref().and_then(|_| untrainable(&graph, &sites)) {
        let step = last.as_ref().map(|step| step.label.clone()).unwrap_or_default();
        errors.push(PlanError::Reshape { step, reason });
    }
    if !(recipe.steps.is_empty() && model.is_empty())
        && quantizes.iter().all(|quantizes| !quantizes)
    {
        for emit in emits.iter().filter(|emit| emit.spec.id() != DENSE) {
            errors.push(PlanError::NothingQuantized { emit: emit.index, layout: emit.spec.id() });
        }
    }
    for emit in emits.iter().filter(|emit| emit.merge) {
        if sites.values().all(|state| state.rank.is_none()) {
            errors.push(PlanError::MergeUnused { emit: emit.index });
        }
    }
    let parts = ask_layouts(&graph, &sites, &emits, layouts, &mut errors);
    if !errors.is_empty() {
        return Err(PlanErrors(errors));
    }

    let table = site_table(&graph, &sites, &parts);
    let head_quantized = table.last().is_some_and(|head| head.scheme.is_some());
    let embedding = recipe.steps.iter().rev().find_map(|step| step.types).map(|types| {
        let asked = if graph.tied { types.head() } else { types.base() };
        if graph.hidden.is_multiple_of(asked.size()) {
            asked
        } else {
            asked.fallback().unwrap_or(asked)
        }
    });
    let planned: Vec<_> = emits
        .iter()
        .enumerate()
        .map(|(index, emit)| planned_emit(&graph, source, &table, &parts, index, emit, embedding))
        .collect();
    let needs_data = contracts.iter().any(|c| !c.needs.is_empty() && c.upstream != Upstream::Given)
        || passes.iter().any(|pass| pass.surveys().is_some())
        || passes.iter().any(|pass| pass.chooses_ranks().is_some_and(|needs| !needs.is_empty()))
        || model.iter().chain(&last).any(ModelStep::calibrates);
    let calibration_tokens = if needs_data { calibration_tokens } else { 0 };
    let context = recipe.calibration.context.min(graph.context);
    let source_bytes = source.iter().map(attar_tensor::TensorHeader::bytes).sum();
    let mut notes = notes(&table, &graph, &emits);
    notes.extend(fallbacks(&graph, &table, recipe, &contracts));
    notes.extend(rank::notes(&table, &emits));
    if passes.iter().any(|pass| pass.chooses_ranks().is_some()) {
        notes.push(
            "ranks are chosen from the weights of all sites before any is worked on: those shown are the largest that can \
             come out, and so are the sizes"
                .to_owned(),
        );
    }
    if given.is_some_and(|given| !given.head)
        && steps.iter().any(|step| {
            step.given.is_some() && step.targets.last().is_some_and(|head| !head.is_empty())
        })
    {
        notes.push(
            "the importance matrix does not know the input of the output head, which is quantized without \
             importances (llama-imatrix and attar imatrix collect it with --process-output)"
                .to_owned(),
        );
    }
    let facts = predict::Facts {
        graph: &graph,
        model: &model,
        last: last.as_ref(),
        steps: &steps,
        passes: &passes,
        source,
        tokens: calibration_tokens,
        context,
        budget,
    };
    let predict::Prediction { limits, memory, scratch_bytes, work } = predict::within(&facts)?;
    Ok(Plan {
        untied: graph.tied && head_quantized && emits.iter().any(|emit| emit.container != GGUF),
        graph,
        passes,
        model,
        last,
        steps,
        sites: table,
        emits: planned,
        source_bytes,
        calibration_tokens,
        context,
        memory,
        memory_budget: budget.memory,
        limits,
        scratch_bytes,
        work,
        notes,
    })
}

/// What is known of a site at a point of the walk.
pub(super) struct SiteState {
    pub(super) form: Form,
    pub(super) made_by: Option<usize>,
    pub(super) quantized_by: Option<usize>,
    pub(super) steps: Vec<usize>,
    pub(super) scheme: Option<QuantScheme>,
    /// Fraction of the weights that stay, where any were pruned.
    pub(super) density: Option<f64>,
    /// Of the factors.
    pub(super) rank: Option<usize>,
    /// The step that made them.
    pub(super) ranked_by: Option<usize>,
    /// Of the correction.
    pub(super) correction: Option<usize>,
}

impl Default for SiteState {
    fn default() -> Self {
        let form = Form::DENSE_FLOAT;
        Self {
            form,
            made_by: None,
            quantized_by: None,
            steps: Vec::new(),
            scheme: None,
            density: None,
            rank: None,
            ranked_by: None,
            correction: None,
        }
    }
}

/// An emit whose names are resolved.
pub(super) struct ResolvedEmit<'a> {
    /// Index in the recipe.
    pub(super) index: usize,
    pub(super) spec: &'a dyn LayoutSpec,
    pub(super) container: String,
    pub(super) dir: Option<String>,
    pub(super) target: Vec<String>,
    /// Factors are multiplied.
    pub(super) merge: bool,
}

pub(super) fn block_at(graph: &ModelGraph, index: usize) -> &Block {
    graph.blocks.get(index).unwrap_or(&graph.epilogue)
}

fn resolve_emits<'a>(
    recipe: &Recipe,
    layouts: &'a [&'a dyn LayoutSpec],
    numbers: &[usize],
    errors: &mut Vec<PlanError>,
) -> Vec<ResolvedEmit<'a>> {
    let mut resolved: Vec<ResolvedEmit<'a>> = Vec::new();
    for (at, emit) in recipe.emits.iter().enumerate() {
        let index = numbers.get(at).copied().unwrap_or(at);
        if !CONTAINERS.contains(&emit.container.as_str()) {
            let container = emit.container.clone();
            errors.push(PlanError::UnknownContainer { emit: index, container });
        }
        let Some(spec) = layouts.iter().find(|layout| layout.id().0 == emit.layout) else {
            let names = || layouts.iter().map(|layout| layout.id().0);
            let hint = nearest(&emit.layout, names()).map_or_else(
                || format!("known: {}", names().collect::<Vec<_>>().join(", ")),
                |name| format!("did you mean `{name}`?"),
            );
            let layout = emit.layout.clone();
            errors.push(PlanError::UnknownLayout { emit: index, layout, hint });
            continue;
        };
        let right = if spec.block_type().is_some() { GGUF } else { CONTAINERS[0] };
        if CONTAINERS.contains(&emit.container.as_str()) && emit.container != right {
            let (layout, container) = (spec.id(), emit.container.clone());
            errors.push(PlanError::ContainerLayout { emit: index, layout, container, right });
        }
        let dir = match &emit.dir {
            Some(dir) => Some(dir.clone()),
            None if recipe.emits.len() > 1 => Some(emit.layout.clone()),
            None => None,
        };
        if let Some(first) = resolved.iter().find(|other| other.dir == dir) {
            let dir = dir.clone().unwrap_or_else(|| "the output directory".to_owned());
            errors.push(PlanError::SameDir { first: first.index, second: index, dir });
        }
        resolved.push(ResolvedEmit {
            index,
            spec: *spec,
            container: emit.container.clone(),
            dir,
            target: emit.target.clone(),
            merge: emit.merge,
        });
    }
    resolved
}

/// The sites of a step, in data order.
fn select(graph: &ModelGraph, step: &Step, label: &str, errors: &mut Vec<PlanError>) -> Vec<Place> {
    let all = || {
        graph.all_blocks().flat_map(|block| {
            block.sites.iter().enumerate().map(|(at, site)| ((block.index, at), &site.name))
        })
    };
    let kept = |name: &str| step.keep.iter().any(|pattern| recipe::matches(pattern, name));
    for pattern in &step.keep {
        let usual = DEFAULT_KEEP.contains(&pattern.as_str());
        if !usual && !all().any(|(_, name)| recipe::matches(pattern, name)) {
            errors.push(no_match(graph, label, "keep", pattern));
        }
    }
    for pattern in &step.sites {
        let mut matched = all().filter(|(_, name)| recipe::selects(pattern, name)).peekable();
        if matched.peek().is_none() {
            errors.push(no_match(graph, label, "sites", pattern));
        } else if matched.all(|(_, name)| kept(name)) {
            let (step, pattern) = (label.to_owned(), pattern.clone());
            errors.push(PlanError::AllKept { step, pattern });
        }
    }
    all()
        .filter(|(_, name)| step.sites.iter().any(|p| recipe::selects(p, name)) && !kept(name))
        .map(|(place, _)| place)
        .collect()
}

fn no_match(graph: &ModelGraph, label: &str, key: &'static str, pattern: &str) -> PlanError {
    let bare = pattern.trim_start_matches("*.").trim_end_matches('*').trim_end_matches('.');
    let mut scored: Vec<(f64, String)> = Vec::new();
    for block in graph.blocks.first().into_iter().chain(std::iter::once(&graph.epilogue)) {
        for site in &block.sites {
            let relative = site.name.strip_prefix(&block.prefix).unwrap_or(&site.name);
            let last = relative.rsplit('.').next().unwrap_or(relative);
            let first = relative.split('.').next().unwrap_or(relative);
            let score = [site.name.as_str(), relative, last, first]
                .into_iter()
                .map(|name| strsim::normalized_damerau_levenshtein(bare, name))
                .fold(0.0, f64::max);
            scored.push((score, site.name.clone()));
        }
    }
    scored.sort_by(|a, b| b.0.total_cmp(&a.0));
    let nearest = scored.into_iter().take(3).map(|(_, name)| name).collect();
    PlanError::NoMatch { step: label.to_owned(), key, pattern: pattern.to_owned(), nearest }
}

/// Sites whose weights change when a scale is folded around the input of `site`: all that read the same
/// input, and the one whose rows make it.
fn fold_neighbours(block: &Block, site: usize) -> Vec<usize> {
    let input = block.input_of(site);
    let mut others = Vec::new();
    for fold in block.folds.iter().filter(|fold| fold.input == input) {
        others.extend(&block.inputs[input].sites);
        if let Producer::Rows(producer) = fold.producer {
            others.push(producer);
        }
    }
    others
}

fn needs_text(needs: Needs) -> String {
    needs
        .iter_names()
        .map(|(name, _)| name.to_lowercase().replace('_', " "))
        .collect::<Vec<_>>()
        .join(", ")
}

/// Why the scales of what was quantized cannot be trained together.
fn untrainable(graph: &ModelGraph, sites: &BTreeMap<Place, SiteState>) -> Option<String> {
    let quantized = || sites.iter().filter(|(_, state)| state.scheme.is_some());
    let why = |(place, state): (&Place, &SiteState)| {
        let reason = if place.0 == graph.blocks.len() {
            "the output head is not trained; `keep` it"
        } else if state.scheme.and_then(QuantScheme::block).is_some() {
            "scales of block types lie on two levels and are not trained; emit an affine layout"
        } else if state.rank.is_some() || state.correction.is_some() {
            "scales of factors, or beside corrections, are not trained; leave one of the two out"
        } else {
            return None;
        };
        Some(format!("{}: {reason}", block_at(graph, place.0).sites[place.1].name))
    };
    if quantized().next().is_none() {
        return Some(
            "trains the scales of codes, and no step before it makes any; put it behind one that quantizes".into(),
        );
    }
    quantized().find_map(why)
}

fn check_siblings(
    graph: &ModelGraph,
    sites: &BTreeMap<Place, SiteState>,
    emits: &[ResolvedEmit<'_>],
    errors: &mut Vec<PlanError>,
) {
    let fusing: Vec<_> =
        emits.iter().filter(|e| e.spec.fuses_siblings()).map(|e| e.spec.id().0).collect();
    if fusing.is_empty() {
        return;
    }
    for block in graph.all_blocks() {
        for input in &block.inputs {
            let scheme = |site: usize| sites[&(block.index, site)].scheme;
            let Some((&first, rest)) = input.sites.split_first() else { continue };
            if rest.iter().all(|&site| scheme(site) == scheme(first)) {
                continue;
            }
            let named = |&site: &usize| {
                let scheme = scheme(site).map_or("float".to_owned(), QuantScheme::label);
                (block.sites[site].name.clone(), scheme)
            };
            errors.push(PlanError::FusedSiblings {
                layouts: fusing.join(", "),
                input: input.name.to_owned(),
                sites: input.sites.iter().map(named).collect(),
            });
        }
    }
}

/// What each emit stores of every site; `None` is the checkpoint's tensor.
pub(super) type Parts = BTreeMap<Place, Vec<Option<Vec<Piece>>>>;

fn ask_layouts(
    graph: &ModelGraph,
    sites: &BTreeMap<Place, SiteState>,
    emits: &[ResolvedEmit<'_>],
    layouts: &[&dyn LayoutSpec],
    errors: &mut Vec<PlanError>,
) -> Parts {
    let mut parts = Parts::new();
    for emit in emits {
        let mut refused: Vec<(attar_tensor::LayoutError, Vec<String>)> = Vec::new();
        for (&place, state) in sites {
            let site = &block_at(graph, place.0).sites[place.1];
            let uneven = |scheme: QuantScheme| {
                scheme.groups(site.in_features).is_none()
                    || state.rank.is_some_and(|rank| scheme.groups(rank).is_none())
            };
            if state.scheme.is_some_and(uneven) {
                continue;
            }
            match rank::pieces(site, state, emit, layouts) {
                Ok(pieces) => parts.entry(place).or_default().push(pieces),
                Err(error) => match refused.iter_mut().find(|(known, _)| *known == error) {
                    Some((_, names)) => names.push(site.name.clone()),
                    None => refused.push((error, vec![site.name.clone()])),
                },
            }
        }
        for (error, sites) in refused {
            let layout = emit.spec.id();
            errors.push(PlanError::Layout { emit: emit.index, layout, error, sites });
        }
    }
    parts
}
