//! The graph of a recipe's variants as text, as Graphviz, as JSON: what follows what, what is shared, and
//! what a later run could take from the work directory.

use std::fmt::Write;

use serde_json::{Value, json};

use super::{Plan, PlannedEmit, Variant};
use crate::Upstream;

/// A step that one or several variants run, in the place where they run it.
struct Node<'a> {
    /// Place in the recipe.
    number: usize,
    plan: &'a Plan,
    /// Index into [`Plan::steps`]; `None` for a pass on the whole model.
    at: Option<usize>,
    parent: Option<usize>,
    /// Variants that pass through it.
    variants: Vec<usize>,
}

/// Steps in the order of the recipe; a step's way back to the checkpoint is the same in every variant.
fn nodes(variants: &[(Variant, Plan)]) -> Vec<Node<'_>> {
    let mut nodes: Vec<Node<'_>> = Vec::new();
    for (index, (variant, plan)) in variants.iter().enumerate() {
        let mut parent = None;
        for &number in &variant.steps {
            let at = plan.steps.iter().position(|step| step.number == number);
            match nodes.iter_mut().find(|node| node.number == number) {
                Some(node) => node.variants.push(index),
                None => {
                    nodes.push(Node { number, plan, at, parent, variants: vec![index] });
                }
            }
            parent = Some(number);
        }
    }
    nodes.sort_by_key(|node| node.number);
    nodes
}

impl Node<'_> {
    fn label(&self) -> &str {
        match self.at {
            Some(at) => &self.plan.steps[at].label,
            None => self.model().map_or("", |step| &step.label),
        }
    }

    fn model(&self) -> Option<&super::ModelStep> {
        self.plan.model.iter().chain(&self.plan.last).find(|step| step.number == self.number)
    }

    /// `step[1] (gptq), w4 g128 sym, 224 sites`.
    fn describe(&self) -> String {
        let Some(at) = self.at else {
            return self.model().map_or_else(String::new, |s| format!("{}, {}", s.label, s.does));
        };
        let step = &self.plan.steps[at];
        let mut schemes: Vec<String> = step
            .targets
            .iter()
            .flatten()
            .filter(|_| step.contract.produces.numeric.is_some())
            .filter_map(|target| target.scheme)
            .map(attar_tensor::QuantScheme::label)
            .collect();
        schemes.sort();
        schemes.dedup();
        let scheme =
            if schemes.is_empty() { String::new() } else { format!(", {}", schemes.join(" / ")) };
        format!("{}{scheme}, {} sites", step.label, step.sites)
    }
}

fn place(emit: &PlannedEmit) -> String {
    let dir = emit.dir.as_ref().map_or_else(|| "the output".to_owned(), |dir| format!("{dir}/"));
    format!("{dir} ({}, {:.3} bits per weight)", emit.layout, emit.bits_per_weight)
}

/// What variants have in common, and what later runs could use.
fn sharing(variants: &[(Variant, Plan)], nodes: &[Node<'_>]) -> Vec<String> {
    let mut lines = Vec::new();
    let names = |node: &Node<'_>| {
        let names: Vec<_> =
            node.variants.iter().map(|&variant| variants[variant].0.name.as_str()).collect();
        names.join(", ")
    };
    for node in nodes.iter().filter(|node| node.variants.len() > 1) {
        let targets = |variant: usize| {
            let (variant, plan) = &variants[variant];
            debug_assert!(variant.steps.contains(&node.number), "a variant runs its nodes");
            let step = plan.steps.iter().find(|step| step.number == node.number);
            step.map(|step| &step.targets)
        };
        lines.push(if node.variants.iter().all(|&v| targets(v) == targets(node.variants[0])) {
            format!("{} runs once for {}", node.label(), names(node))
        } else {
            format!(
                "{} runs once per scheme that follows ({}): it prepares for that scheme",
                node.label(),
                names(node)
            )
        });
    }
    let calibrated = |upstream: Upstream| {
        let labels: Vec<_> = nodes
            .iter()
            .filter_map(|node| Some(&node.plan.steps[node.at?]))
            .filter(|s| !s.contract.needs.is_empty() && s.contract.upstream == upstream)
            .map(|step| step.label.clone())
            .collect();
        labels.join(", ")
    };
    let (original, compressed) = (calibrated(Upstream::Original), calibrated(Upstream::Compressed));
    if !original.is_empty() {
        lines.push(format!(
            "{original}: statistics of the original model, from one sweep; new bits or groups read all \
             of them again"
        ));
    }
    let given = calibrated(Upstream::Given);
    if !given.is_empty() {
        lines
            .push(format!("{given}: statistics from the importance matrix; nothing is calibrated"));
    }
    if !compressed.is_empty() {
        lines.push(format!(
            "{compressed}: statistics of compressed activations; new bits or groups read only those of \
             the first block again"
        ));
    }
    lines
}

/// What `attar plan` prints.
pub fn text(variants: &[(Variant, Plan)]) -> String {
    let mut out = String::new();
    write_text(&mut out, variants).expect("writing to a string does not fail");
    out
}

fn write_text(out: &mut String, variants: &[(Variant, Plan)]) -> std::fmt::Result {
    let nodes = nodes(variants);
    writeln!(out, "graph")?;
    writeln!(out, "  source")?;
    write_children(out, variants, &nodes, None, "  ")?;
    for line in sharing(variants, &nodes) {
        writeln!(out, "  - {line}")?;
    }
    for (variant, plan) in variants {
        if variants.len() > 1 {
            writeln!(out, "\n== {} ==", variant.name)?;
        } else {
            writeln!(out)?;
        }
        write!(out, "{plan}")?;
    }
    Ok(())
}

fn write_children(
    out: &mut String,
    variants: &[(Variant, Plan)],
    nodes: &[Node<'_>],
    parent: Option<usize>,
    indent: &str,
) -> std::fmt::Result {
    let steps: Vec<_> = nodes.iter().filter(|node| node.parent == parent).collect();
    let emits: Vec<_> = variants
        .iter()
        .filter(|(variant, _)| parent.is_some() && variant.steps.last().copied() == parent)
        .flat_map(|(_, plan)| &plan.emits)
        .collect();
    let count = steps.len() + emits.len();
    for (at, emit) in emits.iter().enumerate() {
        let last = at + 1 == count;
        writeln!(out, "{indent}{} => {}", if last { "`-" } else { "|-" }, place(emit))?;
    }
    for (at, node) in steps.iter().enumerate() {
        let last = emits.len() + at + 1 == count;
        writeln!(out, "{indent}{} {}", if last { "`-" } else { "|-" }, node.describe())?;
        let deeper = format!("{indent}{}", if last { "   " } else { "|  " });
        write_children(out, variants, nodes, Some(node.number), &deeper)?;
    }
    Ok(())
}

/// The graph in Graphviz' language.
pub fn dot(variants: &[(Variant, Plan)]) -> String {
    let quoted = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"");
    let mut out = String::from("digraph attar {\n  rankdir=LR;\n  source [shape=cylinder];\n");
    for node in nodes(variants) {
        let parent = node.parent.map_or("source".to_owned(), |parent| format!("step{parent}"));
        out.push_str(&format!(
            "  step{0} [shape=box, label=\"{1}\"];\n  {parent} -> step{0};\n",
            node.number,
            quoted(&node.describe())
        ));
    }
    for (index, (variant, plan)) in variants.iter().enumerate() {
        for (at, emit) in plan.emits.iter().enumerate() {
            let last = variant.steps.last().map_or(0, |&step| step);
            out.push_str(&format!(
                "  emit{index}_{at} [shape=folder, label=\"{}\"];\n  step{last} -> emit{index}_{at};\n",
                quoted(&place(emit))
            ));
        }
    }
    out.push('}');
    out
}

/// The plans of all variants.
pub fn to_json(variants: &[(Variant, Plan)]) -> Value {
    let nodes = nodes(variants);
    let sharing = sharing(variants, &nodes);
    let steps: Vec<_> = nodes
        .iter()
        .map(|node| {
            let names: Vec<_> =
                node.variants.iter().map(|&variant| variants[variant].0.name.clone()).collect();
            json!({
                "step": node.number,
                "after": node.parent,
                "label": node.label(),
                "variants": names,
            })
        })
        .collect();
    let plans: Vec<_> = variants
        .iter()
        .map(|(variant, plan)| json!({"name": variant.name, "steps": variant.steps, "work_directory": plan.stored(), "plan": plan}))
        .collect();
    json!({"graph": steps, "sharing": sharing, "variants": plans})
}
