//! The rules at work.

use attar_tensor::{Granularity, QuantScheme};

use super::{
    Axis, Check, Level, Linear, Place, Profile, Repeat, Rule, Subject, TargetSpec, Violation,
};
use crate::{Role, Split};

/// Everything that breaks a rule of the profile, in the order of its rules.
pub fn check(subject: &Subject, profile: &Profile, target: &TargetSpec) -> Vec<Violation> {
    profile
        .rules
        .iter()
        .filter_map(|rule| {
            let places = places(subject, rule, target.tp);
            (!places.is_empty()).then(|| Violation {
                target: target.to_string(),
                subject: subject.name.clone(),
                rule: rule.id.clone(),
                level: rule.level,
                places,
                reason: rule.reason.clone(),
                remedy: rule.remedy.clone(),
                source: rule.source.clone(),
                unverified: rule.unverified.clone(),
            })
        })
        .collect()
}

fn place(name: impl Into<String>, what: impl Into<String>) -> Place {
    Place { name: name.into(), what: what.into() }
}

/// Where a rule is broken.
fn places(subject: &Subject, rule: &Rule, tp: usize) -> Vec<Place> {
    let holds =
        |layouts: &[String]| subject.layout.as_ref().is_some_and(|layout| layouts.contains(layout));
    let quantized =
        || subject.linears.iter().filter_map(|linear| linear.scheme.map(|scheme| (linear, scheme)));
    let key = |name: &str| subject.config.as_ref().map(|config| config.get(name));
    let is_true = |name: &str| {
        key(name).is_none_or(|value| value.and_then(serde_json::Value::as_bool) == Some(true))
    };
    let mut found = Vec::new();
    match &rule.check {
        Check::Layouts(want) => {
            if !want.containers.contains(&subject.container) {
                let readable = want.containers.join(", ");
                found.push(place(&subject.container, format!("this runtime reads {readable}")));
            } else if let Some(layout) = &subject.layout
                && !want.accepted.contains(layout)
            {
                let readable = if want.accepted.is_empty() {
                    "this runtime reads none of the layouts that can be written".to_owned()
                } else {
                    format!("this runtime reads {}", want.accepted.join(", "))
                };
                found.push(place(layout, readable));
            }
        }
        Check::Scheme(want) if holds(&want.layouts) => {
            for (linear, scheme) in quantized() {
                if want.when_bits.as_ref().is_some_and(|bits| !bits.contains(&scheme.bits)) {
                    continue;
                }
                let size = scheme.granularity.as_config();
                let odd = |n: usize| size > 0 && !(size as usize).is_multiple_of(n);
                let mut wrong = Vec::new();
                if lacks(want.bits.as_ref(), &scheme.bits) {
                    wrong.push(format!("{} bits", scheme.bits));
                }
                if lacks(want.group_sizes.as_ref(), &size) || want.group_multiple.is_some_and(odd) {
                    wrong.push(format!("group size {size}"));
                }
                if lacks(want.symmetric.as_ref(), &scheme.symmetric) {
                    wrong.push(if scheme.symmetric { "symmetric" } else { "asymmetric" }.into());
                }
                if let Some(have) = linear.scales.filter(|have| lacks(want.scales.as_ref(), have)) {
                    wrong.push(format!("scales in {have}"));
                }
                if !wrong.is_empty() {
                    let what = format!("{} ({})", wrong.join(", "), scheme.label());
                    found.push(place(&linear.name, what));
                }
            }
        }
        Check::ColumnOrder(want) if holds(&want.layouts) => {
            for (linear, _) in quantized().filter(|(linear, _)| linear.column_order == Some(true)) {
                if !want.accepted {
                    found.push(place(&linear.name, "its columns are in an order of their own"));
                } else if let Some(by) = &want.declared_by
                    && !is_true(by)
                {
                    let what = format!("its columns are ordered, but `{by}` is not true");
                    found.push(place(&linear.name, what));
                }
            }
        }
        Check::Fused(want) if holds(&want.layouts) => {
            for unit in units(subject, &want.together).iter().filter(|unit| unit.len() > 1) {
                if unit.iter().all(|linear| same(linear.scheme, unit[0].scheme)) {
                    continue;
                }
                let told = |linear: &&Linear| {
                    let scheme = linear.scheme.map_or("dense".to_owned(), QuantScheme::label);
                    format!("{} is {scheme}", last(&linear.name))
                };
                let what = unit.iter().map(told).collect::<Vec<_>>().join(", ");
                found.push(place(joined(unit), what));
            }
        }
        Check::Heads(_) => {
            if let Some(attention) = subject.attention {
                let (heads, kv) = (attention.heads, attention.kv_heads);
                if !heads.is_multiple_of(tp) {
                    found.push(place(
                        "query heads",
                        format!("{heads} do not split over {tp} ranks"),
                    ));
                }
                let dealt = if kv >= tp { kv.is_multiple_of(tp) } else { tp.is_multiple_of(kv) };
                if !dealt {
                    let what = format!("{kv} neither split nor repeat evenly over {tp} ranks");
                    found.push(place("key/value heads", what));
                }
            }
        }
        Check::Even(_) => {
            for linear in subject.linears.iter().filter(|linear| linear.role != Role::Head) {
                let (axis, size) = match Split::of(linear.role) {
                    Split::Columns => ("columns", linear.in_features),
                    _ => ("rows", linear.out_features),
                };
                if shard(subject, linear, tp).is_none() {
                    found.push(place(&linear.name, format!("{size} {axis} / {tp} is not even")));
                }
            }
        }
        Check::SplitGroups(want) if holds(&want.layouts) => {
            for (linear, scheme) in quantized() {
                let ordered = linear.column_order == Some(true);
                if ordered && want.repeated.contains(&Repeat::ColumnOrder) {
                    continue;
                }
                let Some((_, columns)) = shard(subject, linear, tp) else { continue };
                let (all, split) = (linear.in_features, columns != linear.in_features);
                match scheme.granularity {
                    Granularity::Channel if split && !want.repeated.contains(&Repeat::Channel) => {
                        let what = format!(
                            "{all} columns / {tp} = {columns}, but one scale holds for all {all}"
                        );
                        found.push(place(&linear.name, what));
                    }
                    Granularity::Group(size) if !columns.is_multiple_of(size) => {
                        let what = format!(
                            "{all} columns / {tp} = {columns}, which cuts a group of {size} \
                             (groups: {}, ranks: {tp})",
                            all / size
                        );
                        found.push(place(&linear.name, what));
                    }
                    _ => {}
                }
            }
        }
        Check::SplitPacking(want) if holds(&want.layouts) => {
            for (linear, scheme) in quantized() {
                if want.asymmetric_only && scheme.symmetric {
                    continue;
                }
                let Some((rows, columns)) = shard(subject, linear, tp) else { continue };
                let (size, axis) = match want.axis {
                    Axis::Input => (columns, "columns"),
                    Axis::Output => (rows, "rows"),
                };
                let word = per_word(scheme.bits);
                if linear.role != Role::Head && !size.is_multiple_of(word) {
                    let what = format!("{size} {axis} a rank, but {word} are packed together");
                    found.push(place(&linear.name, what));
                }
            }
        }
        Check::Align(want) if holds(&want.layouts) => {
            for unit in units(subject, &want.together) {
                let Some(scheme) = unit[0].scheme else { continue };
                if want.bits.as_ref().is_some_and(|bits| !bits.contains(&scheme.bits)) {
                    continue;
                }
                let shards: Option<Vec<_>> =
                    unit.iter().map(|linear| shard(subject, linear, tp)).collect();
                let Some(shards) = shards else { continue };
                let rows: usize = shards.iter().map(|(rows, _)| rows).sum();
                let columns = shards[0].1;
                let mut wrong = Vec::new();
                if !columns.is_multiple_of(want.in_multiple) {
                    wrong
                        .push(format!("{columns} columns, not a multiple of {}", want.in_multiple));
                }
                if !rows.is_multiple_of(want.out_multiple) && unit[0].role != Role::Head {
                    wrong.push(format!("{rows} rows, not a multiple of {}", want.out_multiple));
                }
                if !wrong.is_empty() {
                    found.push(place(joined(&unit), format!("a rank has {}", wrong.join(" and "))));
                }
            }
        }
        Check::Head(want) if holds(&want.layouts) => {
            for (linear, scheme) in quantized().filter(|(linear, _)| linear.role == Role::Head) {
                if !want.quantized {
                    found.push(place(&linear.name, format!("is {}", scheme.label())));
                } else if let Some(by) = &want.declared_by
                    && !is_true(by)
                {
                    let what = format!("is {}, but `{by}` is not true", scheme.label());
                    found.push(place(&linear.name, what));
                }
            }
        }
        Check::Embedding(want) if holds(&want.layouts) => {
            if subject.embedding_quantized && !want.quantized {
                found.push(place("model.embed_tokens", "is packed"));
            }
        }
        Check::Files(want) => {
            if let Some(files) = &subject.files {
                for names in &want.one_of {
                    if !names.iter().any(|name| files.contains(name)) {
                        found.push(place(names.join(" or "), "is missing"));
                    }
                }
            }
        }
        Check::Config(want) if holds(&want.layouts) => {
            if let Some(config) = &subject.config {
                for keys in &want.one_of {
                    if keys.iter().all(|key| config.get(key).is_none_or(serde_json::Value::is_null))
                    {
                        found.push(place(keys.join(" or "), "quantization_config lacks it"));
                    }
                }
            }
        }
        Check::Declared(want) if holds(&want.layouts) => {
            for linear in subject.linears.iter().filter(|linear| linear.role != Role::Head) {
                let what = match (linear.declared, linear.scheme.is_some()) {
                    (Some(true), false) => {
                        "quantization_config calls it quantized, but it is dense"
                    }
                    (Some(false), true) => "is packed, but quantization_config leaves it out",
                    _ => continue,
                };
                found.push(place(&linear.name, what));
            }
        }
        Check::TensorParallel(want) => {
            if tp > want.max {
                found.push(place("tp", format!("{tp} ranks, {} at most", want.max)));
            }
        }
        Check::Families(want) => {
            if !want.accepted.contains(&subject.family) {
                let what = format!("the runtime has {}", want.accepted.join(", "));
                found.push(place(format!("model_type {}", subject.family), what));
            }
        }
        // The rule is about another layout.
        Check::Factors(_) => {
            let two = |name: &String| place(name, "is written as down and up");
            found.extend(subject.factored.iter().map(two));
        }
        Check::Corrections(_) => {
            let corrected = |name: &String| place(name, "has a correction in adapter/");
            found.extend(subject.corrected.iter().map(corrected));
        }
        Check::Scheme(_)
        | Check::ColumnOrder(_)
        | Check::Fused(_)
        | Check::SplitGroups(_)
        | Check::SplitPacking(_)
        | Check::Align(_)
        | Check::Head(_)
        | Check::Embedding(_)
        | Check::Config(_)
        | Check::Declared(_) => {}
    }
    found
}

/// True when there is a list and the value is not in it.
fn lacks<T: PartialEq>(list: Option<&Vec<T>>, value: &T) -> bool {
    list.is_some_and(|list| !list.contains(value))
}

/// True when both are dense, or have the same bits, groups and symmetry.
fn same(a: Option<QuantScheme>, b: Option<QuantScheme>) -> bool {
    let numbers = |s: QuantScheme| (s.bits, s.granularity, s.symmetric, s.activations);
    a.map(numbers) == b.map(numbers)
}

/// Codes that fill whole 32-bit words.
fn per_word(bits: u8) -> usize {
    let (mut a, mut b) = (32usize, usize::from(bits));
    while b > 0 {
        (a, b) = (b, a % b);
    }
    32 / a
}

/// Rows and columns of one rank's part; `None` when the linear does not split evenly. Key/value heads
/// fewer than ranks are repeated. The output head splits by vocabulary, which runtimes pad.
fn shard(subject: &Subject, linear: &Linear, tp: usize) -> Option<(usize, usize)> {
    let (rows, columns) = (linear.out_features, linear.in_features);
    let even = |size: usize| size.is_multiple_of(tp).then(|| size / tp);
    match (Split::of(linear.role), subject.attention) {
        (Split::Vocab, _) => Some((rows.div_ceil(tp), columns)),
        (Split::KvRows, Some(attention)) if attention.kv_heads < tp => {
            Some((attention.head_dim, columns))
        }
        (Split::Columns, _) => even(columns).map(|columns| (rows, columns)),
        (Split::Rows | Split::KvRows, _) => even(rows).map(|rows| (rows, columns)),
    }
}

/// The linears of each block, those that a runtime makes one of together.
fn units<'a>(subject: &'a Subject, together: &[Vec<Role>]) -> Vec<Vec<&'a Linear>> {
    let set_of = |role: Role| together.iter().position(|roles| roles.contains(&role));
    let mut units: Vec<Vec<&Linear>> = Vec::new();
    for linear in &subject.linears {
        let set = set_of(linear.role);
        let fits = |unit: &Vec<&Linear>| {
            set.is_some() && unit[0].block == linear.block && set_of(unit[0].role) == set
        };
        match units.iter_mut().rev().find(|unit| fits(unit)) {
            Some(unit) => unit.push(linear),
            None => units.push(vec![linear]),
        }
    }
    units
}

fn last(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

/// `model.layers.0.self_attn.q_proj+k_proj+v_proj`.
fn joined(unit: &[&Linear]) -> String {
    let rest = unit[1..].iter().map(|linear| last(&linear.name));
    std::iter::once(unit[0].name.as_str()).chain(rest).collect::<Vec<_>>().join("+")
}

impl Violation {
    /// True when the runtime refuses the artifact.
    pub fn refuses(&self) -> bool {
        self.level == Level::Refuse
    }
}
