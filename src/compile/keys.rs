//! Names of results by content. The key of a result is the hash of everything that its bytes depend on:
//! the binary, the instruction set, config.json, the weights it reads (themselves named by the files they
//! came from, or by the result that made them), the statistics it reads, the pass, its options, scheme and
//! seed. All keys of a run are known before any weight is read; equal keys are equal work, whether they
//! come from an earlier run, a killed one, or another variant of the same recipe.

use attar_formats::stage::{Key, Stage};
use attar_ir::{
    Block, ModelGraph, Needs, Target, Upstream,
    plan::{Plan, Round},
};

/// Begins every key; to be raised when a stored object changes its meaning.
pub(super) const VERSION: &str = "attar object 1";

/// blake3 over parts, each with its length.
pub(super) fn hash(parts: &[&str]) -> Key {
    let mut text = String::new();
    for part in parts {
        text.push_str(&part.len().to_string());
        text.push(':');
        text.push_str(part);
    }
    attar_formats::hash_bytes(text.as_bytes())
}

/// What keys are made from beside the plan.
#[derive(Debug, Clone)]
pub(crate) struct Ground {
    /// Binary, instruction set, config.json.
    pub(crate) salt: String,
    /// Hash of the calibration windows.
    pub(crate) windows: String,
    /// Hash of the importance matrix.
    pub(crate) imatrix: String,
    pub(crate) seed: u64,
}

impl Ground {
    fn key(&self, kind: &str, parts: &[&str]) -> Key {
        let mut all = vec![VERSION, kind, &self.salt];
        all.extend(parts);
        hash(&all)
    }

    /// The key of the activations that enter block 0.
    fn embedded(&self, embedding: &str) -> Key {
        self.key("embed", &[&self.windows, embedding])
    }

    /// The key under which a stream of activations is stored.
    pub(crate) fn stream(&self, activations: &str) -> Key {
        self.key("stream", &[activations])
    }
}

/// One application of a step to sites of a block.
#[derive(Debug, Clone)]
pub(crate) struct Unit {
    /// Index into the plan's steps.
    pub(crate) step: usize,
    /// Input group of all targets; `None` for passes that work on the whole block.
    pub(crate) input: Option<usize>,
    pub(crate) targets: Vec<Target>,
    pub(crate) key: Key,
    /// True when the result lies in the work directory.
    pub(crate) cached: bool,
}

/// One statistic of an input group.
#[derive(Debug, Clone)]
pub(crate) struct Statistic {
    pub(crate) needs: Needs,
    pub(crate) key: Key,
    pub(crate) cached: bool,
    /// True when a later run with other bits could read it again.
    pub(crate) keep: bool,
}

/// A round with its keys.
#[derive(Debug, Clone)]
pub(crate) struct RoundKeys {
    pub(crate) upstream: Upstream,
    /// True for the one pass that works on the whole block.
    pub(crate) whole: bool,
    /// True when its stages run in one forward that also carries the stream on.
    pub(crate) staged: bool,
    /// True when its step learns from the original block.
    pub(crate) learns: bool,
    /// One per input group.
    pub(crate) statistics: Vec<Option<Statistic>>,
    pub(crate) units: Vec<Unit>,
}

impl RoundKeys {
    /// True when something that is not yet there reads the statistic of this input.
    pub(crate) fn reads(&self, input: usize) -> bool {
        self.units.iter().any(|unit| !unit.cached && unit.input.is_none_or(|own| own == input))
    }

    /// True when the statistic of this input has to be computed.
    pub(crate) fn observes(&self, input: usize) -> bool {
        self.reads(input) && self.statistics[input].as_ref().is_some_and(|s| !s.cached)
    }

    /// True when its step has yet to learn: both streams have to enter the block.
    pub(crate) fn teaches(&self) -> bool {
        self.learns && self.units.iter().any(|unit| !unit.cached)
    }

    /// True when any has.
    pub(crate) fn observes_any(&self) -> bool {
        (0..self.statistics.len()).any(|input| self.observes(input))
    }
}

/// A block with its keys.
#[derive(Debug, Clone)]
pub(crate) struct BlockKeys {
    pub(crate) rounds: Vec<RoundKeys>,
    /// Activations that enter it: through compressed blocks, and through original ones.
    pub(crate) compressed: Key,
    pub(crate) original: Key,
}

impl BlockKeys {
    /// True when activations of this upstream have to enter the block.
    pub(crate) fn needs(&self, upstream: Upstream) -> bool {
        let teaches = |round: &RoundKeys| {
            round.teaches() && (upstream == Upstream::Original || round.upstream == upstream)
        };
        self.observes(upstream) || self.rounds.iter().any(teaches)
    }

    /// True when statistics have to be taken of these activations.
    pub(crate) fn observes(&self, upstream: Upstream) -> bool {
        self.rounds.iter().any(|round| round.upstream == upstream && round.observes_any())
    }
}

/// Names of a block's weights: what it reads, in the order of its sites and norms.
struct Slots {
    weights: Vec<Key>,
    norms: Vec<Key>,
}

/// What statistics of the original model are asked for by any variant, per block and input: one sweep
/// serves them all.
pub(crate) fn original_needs<'a>(plans: impl Iterator<Item = &'a Plan>) -> Vec<Vec<Needs>> {
    let mut all: Vec<Vec<Needs>> = Vec::new();
    for plan in plans {
        for block in plan.graph.all_blocks() {
            if all.len() <= block.index {
                all.push(vec![Needs::empty(); block.inputs.len()]);
            }
            for round in plan.rounds(block.index) {
                if round.upstream == Upstream::Original {
                    for (all, needs) in all[block.index].iter_mut().zip(&round.needs) {
                        *all |= *needs;
                    }
                }
            }
        }
    }
    all
}

/// Every key of a variant. `file_of` gives the hash of the file that holds a tensor; `has` says whether an
/// object is there and whole.
pub(crate) fn blocks(
    ground: &Ground,
    plan: &Plan,
    original_needs: &[Vec<Needs>],
    tensor: &dyn Fn(&str) -> Key,
    mut has: impl FnMut(&str) -> bool,
) -> Vec<BlockKeys> {
    let graph: &ModelGraph = &plan.graph;
    let start = ground.embedded(&tensor(&graph.embedding));
    let (mut compressed, mut original) = (start.clone(), start.clone());
    let mut all = Vec::new();
    // What a survey of all blocks depends on.
    let mut surveyed = start.clone();
    for block in graph.all_blocks() {
        let source = source_slots(ground, graph, block, tensor);
        let mut parts = vec![surveyed.as_str()];
        parts.extend(source.weights.iter().chain(&source.norms).map(String::as_str));
        surveyed = ground.key("survey", &parts);
    }
    for block in graph.all_blocks() {
        let source = source_slots(ground, graph, block, tensor);
        let mut slots = Slots { weights: source.weights.clone(), norms: source.norms.clone() };
        // The last block may be taught by the logits.
        let last = block.index + 1 == graph.blocks.len();
        let head = last.then(|| source_slots(ground, graph, &graph.epilogue, tensor));
        let rounds = plan.rounds(block.index);
        let mut keyed = Vec::new();
        let count = rounds.len();
        for (at, round) in rounds.into_iter().enumerate() {
            let staged = !round.whole && at + 1 == count && round.upstream == Upstream::Compressed;
            let round = round_keys(
                ground,
                plan,
                block,
                round,
                staged,
                (&compressed, &original, &surveyed),
                (&source, &mut slots, head.as_ref()),
                &original_needs[block.index],
                &mut has,
            );
            keyed.push(round);
        }
        let out = |activations: &str, slots: &Slots| {
            let mut parts = vec![activations];
            parts.extend(slots.weights.iter().chain(&slots.norms).map(String::as_str));
            ground.key("forward", &parts)
        };
        let next = (out(&compressed, &slots), out(&original, &source));
        all.push(BlockKeys {
            rounds: keyed,
            compressed: std::mem::replace(&mut compressed, next.0),
            original: std::mem::replace(&mut original, next.1),
        });
    }
    all
}

fn source_slots(
    ground: &Ground,
    graph: &ModelGraph,
    block: &Block,
    tensor: &dyn Fn(&str) -> Key,
) -> Slots {
    let weight = |site: &attar_ir::Site| {
        let tied = block.attention.is_none() && graph.tied;
        let name = &site.name;
        let weight = if tied { graph.embedding.clone() } else { format!("{name}.weight") };
        let bias = if site.bias { tensor(&format!("{name}.bias")) } else { String::new() };
        ground.key("tensor", &[&tensor(&weight), &weight, &bias])
    };
    let mut norms: Vec<Key> = block
        .norms
        .iter()
        .map(|norm| ground.key("tensor", &[&tensor(&norm.tensor), &norm.tensor]))
        .collect();
    if block.attention.is_some() {
        // Norms of queries and keys, where the family has them; no pass changes them.
        let file = |part: &str| tensor(&format!("{}self_attn.{part}.weight", block.prefix));
        norms.push(ground.key("qk", &[&block.prefix, &file("q_norm"), &file("k_norm")]));
    }
    Slots { weights: block.sites.iter().map(weight).collect(), norms }
}

#[allow(clippy::too_many_lines, reason = "one walk over the units in the order in which they run")]
fn round_keys(
    ground: &Ground,
    plan: &Plan,
    block: &Block,
    round: Round,
    staged: bool,
    activations: (&str, &str, &str),
    (source, slots, head): (&Slots, &mut Slots, Option<&Slots>),
    original_needs: &[Needs],
    has: &mut impl FnMut(&str) -> bool,
) -> RoundKeys {
    let original = round.upstream == Upstream::Original;
    // A statistic depends on the activations that enter the block, on its norms, and on the weights of
    // the sites before it.
    let statistic = |input: usize, slots: &Slots| {
        if round.needs[input].is_empty() {
            return None;
        }
        if round.upstream == Upstream::Given {
            // Read from the file each time: it is smaller than what could be kept of it.
            let place = [block.index.to_string(), input.to_string()];
            let key = ground.key("imatrix", &[&ground.imatrix, &place[0], &place[1]]);
            return Some(Statistic { needs: round.needs[input], key, cached: true, keep: false });
        }
        let (activations, slots, needs) = if original {
            (activations.1, source, original_needs[input])
        } else {
            (activations.0, slots, round.needs[input])
        };
        let before = block.inputs[..input].iter().flat_map(|group| &group.sites);
        let needs_text = needs.bits().to_string();
        let place = input.to_string();
        let mut parts = vec![activations, &needs_text, &place];
        parts.extend(slots.norms.iter().map(String::as_str));
        parts.extend(before.map(|&site| slots.weights[site].as_str()));
        let key = ground.key("statistic", &parts);
        let keep = original || block.index == 0 && (input == 0 || round.whole);
        Some(Statistic { needs, key, cached: false, keep })
    };
    let mut statistics: Vec<Option<Statistic>> = vec![None; block.inputs.len()];
    if !staged {
        for (input, slot) in statistics.iter_mut().enumerate() {
            *slot = statistic(input, slots);
        }
    }
    let mut units = Vec::new();
    let stages: Vec<Option<usize>> =
        if round.whole { vec![None] } else { (0..block.inputs.len()).map(Some).collect() };
    for input in stages {
        if let (true, Some(input)) = (staged, input) {
            statistics[input] = statistic(input, slots);
        }
        for &step in &round.steps {
            let targets: Vec<Target> = plan.steps[step].targets[block.index]
                .iter()
                .copied()
                .filter(|target| input.is_none_or(|input| block.input_of(target.site) == input))
                .collect();
            if targets.is_empty() {
                continue;
            }
            let described = &plan.steps[step];
            let (number, seed) = (block.index.to_string(), ground.seed.to_string());
            let options = toml_text(&described.options);
            let schemes = serde_json::to_string(
                &targets.iter().map(|t| (t.site, t.scheme)).collect::<Vec<_>>(),
            )
            .expect("plain numbers serialize");
            let ranks = ranks(plan, step, block, &targets);
            let mut parts = vec![described.pass.as_str(), &options, &schemes, &number, &seed];
            parts.extend(ranks.as_deref());
            let read: Vec<&Statistic> = match input {
                Some(input) => statistics[input].iter().collect(),
                None => statistics.iter().flatten().collect(),
            };
            parts.extend(read.iter().map(|s| s.key.as_str()));
            if plan.passes[step].surveys().is_some() {
                parts.push(activations.2);
            }
            if round.learns {
                // Inputs, and what the original block makes of the original ones.
                parts.push(if original { activations.1 } else { activations.0 });
                parts.push(activations.1);
                for taught in [Some(source), head].into_iter().flatten() {
                    parts.extend(taught.weights.iter().chain(&taught.norms).map(String::as_str));
                }
            }
            match input {
                Some(_) => parts.extend(targets.iter().map(|t| slots.weights[t.site].as_str())),
                None => parts.extend(slots.weights.iter().chain(&slots.norms).map(String::as_str)),
            }
            let key = ground.key("result", &parts);
            let written = |slot: &mut Key, place: &str| *slot = ground.key(place, &[&key]);
            if input.is_some() {
                for &Target { site, .. } in &targets {
                    written(&mut slots.weights[site], &format!("weight {site}"));
                }
            } else {
                for (at, slot) in slots.weights.iter_mut().enumerate() {
                    written(slot, &format!("weight {at}"));
                }
                for (at, slot) in slots.norms.iter_mut().enumerate() {
                    written(slot, &format!("norm {at}"));
                }
            }
            let cached = has(&key);
            units.push(Unit { step, input, targets, key, cached });
        }
    }
    let Round { upstream, whole, learns, .. } = round;
    let mut keyed = RoundKeys { upstream, whole, staged, learns, statistics, units };
    for input in 0..block.inputs.len() {
        // Statistics are large: only those that something will read are looked at.
        let read = keyed.reads(input);
        if let Some(statistic) = keyed.statistics[input].as_mut().filter(|s| read && s.keep) {
            statistic.cached = has(&statistic.key);
        }
    }
    keyed
}

/// Ranks that a step gives its targets, where it chose them: its options do not say them.
fn ranks(plan: &Plan, step: usize, block: &Block, targets: &[Target]) -> Option<String> {
    plan.steps[step].contract.produces.rank?;
    let rank = |target: &Target| plan.passes[step].rank(&block.sites[target.site]).ok().flatten();
    Some(format!("{:?}", targets.iter().map(rank).collect::<Vec<_>>()))
}

/// Options with their keys sorted (a TOML table of ours keeps them so).
pub(super) fn toml_text(table: &toml::Table) -> String {
    toml::to_string(table).unwrap_or_default()
}

/// True when the object is there and whole; one that is damaged is taken away and told of.
pub(crate) fn whole(stage: &Stage, key: &str, damaged: &mut Vec<Key>) -> bool {
    if !stage.contains(key) {
        return false;
    }
    let whole = matches!(stage.open_object(key), Ok(Some(_)));
    if !whole {
        damaged.push(key.to_owned());
    }
    whole
}
