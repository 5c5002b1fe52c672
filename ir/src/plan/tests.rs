//! Toy graph, fake passes and layouts.

use attar_tensor::{
    DType, LayoutError, LayoutId, LayoutSpec, LinearSpec, PartHeader, TensorHeader,
};

use attar_tensor::ScaleGrid::{Bf16, F16, F16AndBf16};

use super::*;
use crate::recipe::Step;
use crate::{
    AttentionShape, Block, BlockState, BlockStats, Cost, FormChange, FormSet, Norm, PassContext,
    PassError, PassReport, Site, Sparsity,
};

#[derive(Debug)]
struct Fake(&'static str);

impl Pass for Fake {
    fn name(&self) -> &'static str {
        self.0
    }

    fn contract(&self) -> Contract {
        let plain = Contract {
            accepts: FormSet::DENSE_FLOAT,
            produces: FormChange::QUANTIZE,
            needs: Needs::empty(),
            upstream: Upstream::Compressed,
            touches: Touches::Sites,
            looks_ahead: false,
        };
        match self.0 {
            "rtn" => plain,
            "weighed" => Contract { needs: Needs::SQUARE_SUM, ..plain },
            "prune" => Contract {
                produces: FormChange { sparsity: Some(Sparsity::Masked), ..FormChange::NONE },
                ..plain
            },
            "prune24" => Contract {
                produces: FormChange {
                    sparsity: Some(Sparsity::NM { n: 2, m: 4 }),
                    ..FormChange::NONE
                },
                ..plain
            },
            "sparse" => {
                Contract { accepts: FormSet::DENSE_FLOAT | FormSet::MASKED | FormSet::NM, ..plain }
            }
            "gptq" => Contract { needs: Needs::HESSIAN, ..plain },
            "awq" => Contract {
                produces: FormChange::NONE,
                needs: Needs::HESSIAN | Needs::ABS_MEAN,
                touches: Touches::Folds,
                looks_ahead: true,
                ..plain
            },
            other => panic!("no fake pass {other}"),
        }
    }

    fn takes(&self, scheme: QuantScheme) -> Result<(), &'static str> {
        if self.0 == "sparse" || scheme.block().is_none() { Ok(()) } else { Err("affine only") }
    }

    fn cost(&self, block: &Block, targets: &[Target], _: &Limits) -> Cost {
        let weights: usize = targets.iter().map(|t| block.sites[t.site].weights()).sum();
        Cost { flops: weights as f64, peak_bytes: weights, scratch_bytes: 0 }
    }

    fn apply(
        &self,
        _: &PassContext<'_>,
        _: &[Target],
        _: &mut BlockState,
        _: &mut BlockStats,
    ) -> Result<PassReport, PassError> {
        unreachable!("planning runs no pass")
    }
}

/// Stores codes as they are; scales as f16 or as the source; one layout has 4 bits only.
#[derive(Debug)]
struct FakeLayout {
    id: &'static str,
    f16: bool,
    four_bits_only: bool,
    zero_min: u8,
}

impl LayoutSpec for FakeLayout {
    fn id(&self) -> LayoutId {
        LayoutId(self.id)
    }

    fn parts(&self, linear: &LinearSpec) -> Result<Vec<PartHeader>, LayoutError> {
        let layout = self.id();
        let (bits, rows) = (linear.scheme.bits, linear.out_features);
        if self.four_bits_only && bits != 4 {
            return Err(LayoutError::Bits { layout, bits, supported: "4" });
        }
        let groups = linear.scheme.groups(linear.in_features).expect("checked before");
        let packed = vec![rows, linear.in_features * usize::from(bits) / 8];
        Ok(vec![
            PartHeader { suffix: "packed", dtype: DType::U8, shape: packed },
            PartHeader {
                suffix: "scales",
                dtype: self.scale_dtype(linear.source_dtype),
                shape: vec![rows, groups],
            },
        ])
    }

    fn scale_dtype(&self, source: DType) -> DType {
        if self.f16 { DType::F16 } else { source }
    }

    fn zero_min(&self) -> u8 {
        self.zero_min
    }
}

/// A block type, whatever its blocks divide.
#[derive(Debug)]
struct FakeBlocks(BlockType);

impl LayoutSpec for FakeBlocks {
    fn id(&self) -> LayoutId {
        LayoutId(self.0.name())
    }

    fn parts(&self, linear: &LinearSpec) -> Result<Vec<PartHeader>, LayoutError> {
        let row = linear.in_features.div_ceil(self.0.size()) * self.0.bytes();
        let shape = vec![linear.out_features, row];
        Ok(vec![PartHeader { suffix: "blocks", dtype: DType::U8, shape }])
    }

    fn scale_dtype(&self, _: DType) -> DType {
        DType::F16
    }

    fn block_type(&self) -> Option<BlockType> {
        Some(self.0)
    }

    fn own_scheme(&self, _: usize) -> Option<QuantScheme> {
        Some(self.0.scheme())
    }

    fn fuses_siblings(&self) -> bool {
        false
    }
}

const CT: FakeLayout =
    FakeLayout { id: "compressed-tensors", f16: false, four_bits_only: false, zero_min: 0 };
const GPTQ: FakeLayout = FakeLayout { id: "gptq", f16: true, four_bits_only: false, zero_min: 1 };
const AWQ: FakeLayout = FakeLayout { id: "awq", f16: true, four_bits_only: true, zero_min: 0 };

const HIDDEN: usize = 64;
const MLP: usize = 192;

fn block(index: usize) -> Block {
    let prefix = format!("model.layers.{index}.");
    let site = |name: &str, role, out_features, in_features| Site {
        name: format!("{prefix}{name}"),
        role,
        out_features,
        in_features,
        bias: false,
        dtype: DType::BF16,
    };
    let norm = |name: &str| Norm { tensor: format!("{prefix}{name}.weight"), width: HIDDEN };
    let sites = vec![
        site("self_attn.q_proj", Role::Query, HIDDEN, HIDDEN),
        site("self_attn.k_proj", Role::Key, HIDDEN, HIDDEN),
        site("self_attn.v_proj", Role::Value, HIDDEN, HIDDEN),
        site("self_attn.o_proj", Role::AttentionOutput, HIDDEN, HIDDEN),
        site("mlp.gate_proj", Role::Gate, MLP, HIDDEN),
        site("mlp.up_proj", Role::Up, MLP, HIDDEN),
        site("mlp.down_proj", Role::Down, HIDDEN, MLP),
    ];
    let norms = vec![norm("input_layernorm"), norm("post_attention_layernorm")];
    let attention = Some(AttentionShape { heads: 4, kv_heads: 4, head_dim: 16 });
    Block::coupled(index, prefix.clone(), (sites, norms), attention, true)
}

fn graph() -> ModelGraph {
    let blocks: Vec<_> = (0..3).map(block).collect();
    ModelGraph {
        family: "toy".to_owned(),
        hidden: HIDDEN,
        vocab: 512,
        context: 256,
        epilogue: Block::coupled(
            blocks.len(),
            String::new(),
            (
                vec![Site {
                    name: "lm_head".to_owned(),
                    role: Role::Head,
                    out_features: 512,
                    in_features: HIDDEN,
                    bias: false,
                    dtype: DType::BF16,
                }],
                vec![Norm { tensor: "model.norm.weight".to_owned(), width: HIDDEN }],
            ),
            None,
            false,
        ),
        blocks,
        embedding: "lm_head.weight".to_owned(),
        tied: true,
    }
}

/// The embedding is stored as `lm_head.weight` only.
fn source(graph: &ModelGraph) -> Vec<TensorHeader> {
    let header = |name: String, shape| TensorHeader { name, dtype: DType::BF16, shape };
    let mut headers = Vec::new();
    for block in graph.all_blocks() {
        for site in &block.sites {
            let shape = vec![site.out_features, site.in_features];
            headers.push(header(format!("{}.weight", site.name), shape));
        }
        for norm in &block.norms {
            headers.push(header(norm.tensor.clone(), vec![norm.width]));
        }
    }
    headers.sort_by(|a, b| a.name.cmp(&b.name));
    headers
}

fn plan_within(recipe: &Recipe, tokens: usize, budget: Budget) -> Result<Plan, PlanErrors> {
    plan_given(recipe, tokens, budget, None)
}

const FAKES: [&str; 7] = ["rtn", "gptq", "awq", "weighed", "prune", "prune24", "sparse"];

fn plan_given(
    recipe: &Recipe,
    tokens: usize,
    budget: Budget,
    given: Option<Given>,
) -> Result<Plan, PlanErrors> {
    let name = |step: &Step| FAKES.into_iter().find(|n| *n == step.pass);
    let passes = recipe
        .steps
        .iter()
        .map(|step| Box::new(Fake(name(step).expect("a fake pass"))) as Box<dyn Pass>);
    let graph = graph();
    let headers = source(&graph);
    let blocks = BlockType::ALL.map(FakeBlocks);
    let mut layouts: Vec<&dyn LayoutSpec> = vec![&CT, &GPTQ, &AWQ];
    layouts.extend(blocks.iter().map(|block| block as &dyn LayoutSpec));
    let variant = variants(recipe)?.remove(0);
    PassGraph::new(graph, passes.collect(), &variant.recipe, &layouts, &headers, tokens)
        .numbered(&variant)
        .with_budget(budget)
        .with_given(given)
        .check()
}

fn plan_of(recipe: &Recipe, tokens: usize) -> Result<Plan, PlanErrors> {
    plan_within(recipe, tokens, Budget::default())
}

fn plan(text: &str) -> Result<Plan, PlanErrors> {
    plan_of(&Recipe::parse(text).unwrap(), 1024)
}

fn refusal(text: &str) -> String {
    plan(text).expect_err("the plan must refuse").to_string()
}

const GPTQ_STEP: &str = "[[step]]\npass = \"gptq\"\nscheme = { bits = 4, group_size = 32 }\n";
const EMIT: &str = "[[emit]]\nlayout = \"gptq\"\n";

#[test]
fn a_chain_with_two_emits_is_told_in_full() {
    let text = "
calibration = { context = 512 }
[[step]]
pass = \"awq\"
sites = \"mlp.*\"
[[step]]
pass = \"gptq\"
scheme = { bits = 4, group_size = 32, symmetric = false }
[[emit]]
layout = \"gptq\"
[[emit]]
layout = \"compressed-tensors\"
";
    insta::assert_snapshot!(plan(text).unwrap().render());
}

#[test]
fn data_free_plans_need_two_tensors() {
    let recipe = Recipe {
        emits: vec![crate::recipe::Emit::new("awq")],
        ..Recipe::preset("rtn-w4", -1).unwrap()
    };
    let plan = plan_of(&recipe, 0).unwrap();
    assert!(!plan.calibrates());
    let copy = plan.memory.moments.iter().find(|m| m.what == "copy").unwrap();
    assert_eq!(copy.total(), 512 * HIDDEN * 2 + copy.base);
    assert!(plan.memory.moments.iter().all(|m| m.stream + m.statistics + m.activations == 0));
    assert_eq!((plan.work.forward, plan.work.hessian), (0.0, 0.0));
    insta::assert_snapshot!(plan.render());
}

#[test]
fn rounds_separate_folds_and_join_neighbours() {
    let text = format!(
        "[[step]]\npass = \"awq\"\nsites = \"mlp.*\"\n\
         [[step]]\npass = \"rtn\"\nsites = \"self_attn.*\"\nscheme = {{ bits = 4, group_size = 32 }}\n\
         [[step]]\npass = \"gptq\"\nsites = \"layers.0.mlp.*\"\nscheme = {{ bits = 3, group_size = 64 }}\n\
         [[step]]\npass = \"rtn\"\nsites = [\"layers.1.mlp.*\", \"layers.2.mlp.*\"]\nscheme = {{ bits = 8, group_size = 64 }}\n{EMIT}"
    );
    let plan = plan(&text).unwrap();
    let both = Needs::HESSIAN | Needs::ABS_MEAN;
    let rounds = plan.rounds(0);
    assert_eq!(rounds.len(), 2);
    assert!(rounds[0].whole && rounds[0].steps == [0]);
    assert_eq!(rounds[0].needs, [Needs::empty(), Needs::empty(), both, both]);
    assert!(!rounds[1].whole && rounds[1].steps == [1, 2]);
    assert_eq!(rounds[1].needs[3], Needs::HESSIAN);
    assert_eq!(plan.rounds(1)[1].steps, [1, 3]);
    assert!(plan.rounds(3).is_empty());
    // What awq is told is the scheme of the step that will quantize the site.
    assert_eq!(plan.steps[0].targets[0][0].scheme.unwrap().bits, 3);
    assert_eq!(plan.steps[0].targets[1][0].scheme.unwrap().bits, 8);
}

#[test]
fn work_counts_one_staged_forward_and_one_hessian_per_input() {
    let plan = plan(&format!("{GPTQ_STEP}{EMIT}")).unwrap();
    let tokens = 1024.0;
    let forward: f64 = plan.graph.blocks.iter().map(|b| b.forward_flops(1024, 256)).sum();
    // The last block's down projection feeds nobody.
    let unread = (2 * HIDDEN * MLP) as f64 * tokens;
    assert!((plan.work.forward - (forward - unread)).abs() < 1.0);
    let channels = (3 * HIDDEN * HIDDEN + MLP * MLP) as f64;
    assert!((plan.work.hessian - 3.0 * channels * tokens).abs() < 1.0);
    let step = |place: &str| {
        let of = |m: &&Moment| m.what == "step[0] (gptq)" && m.place == place;
        plan.memory.moments.iter().find(of).unwrap()
    };
    let down = step(plan.graph.blocks[0].inputs[3].name);
    assert_eq!(down.statistics, 4 * MLP * MLP + 20 * MLP);
    // Beside the residual stream lies what down_proj reads.
    assert_eq!(down.stream, 4 * 1024 * (HIDDEN + MLP));
    assert_eq!(step(plan.graph.blocks[0].inputs[2].name).stream, 4 * 1024 * HIDDEN);
}

#[test]
fn a_tied_embedding_is_written_under_its_own_name() {
    let text = format!("{GPTQ_STEP}{EMIT}");
    let plain = plan(&text).unwrap();
    let names =
        |plan: &Plan| plan.emits[0].tensors.iter().map(|t| t.name.clone()).collect::<Vec<_>>();
    assert!(!plain.untied);
    assert!(names(&plain).contains(&"model.embed_tokens.weight".to_owned()));
    assert!(!names(&plain).iter().any(|name| name.starts_with("lm_head")));
    let head = text.replace("[[emit]]", "[[step]]\npass = \"rtn\"\nsites = \"lm_head\"\nkeep = []\nscheme = { bits = 8, group_size = 64 }\n[[emit]]");
    let untied = plan(&head).unwrap();
    assert!(untied.untied && untied.notes.iter().any(|note| note.contains("not tied")));
    for name in ["model.embed_tokens.weight", "lm_head.packed", "lm_head.scales"] {
        assert!(names(&untied).contains(&name.to_owned()), "{name}");
    }
    assert!(untied.emits[0].bits_per_weight > plain.emits[0].bits_per_weight);
}

#[test]
fn sizes_are_exact() {
    let plan = plan(&format!("{GPTQ_STEP}{EMIT}")).unwrap();
    let weights = plan.graph.block_weights();
    let emit = &plan.emits[0];
    // 4 bits and an f16 per 32 weights.
    assert!((emit.bits_per_weight - 4.5).abs() < 1e-12);
    assert_eq!(emit.linear_bytes * 8, weights * 9 / 2);
    let rest = 512 * HIDDEN * 2 + 7 * HIDDEN * 2;
    assert_eq!(emit.tensor_bytes, emit.linear_bytes + rest);
}

#[test]
fn grids_narrow_to_what_all_emits_store() {
    let scheme = |layouts: &[&str]| {
        let text = layouts.join("\"\n[[emit]]\nlayout = \"");
        let emits = format!("[[emit]]\nlayout = \"{text}\"\n");
        let plan = plan(&format!("{GPTQ_STEP}{emits}")).unwrap();
        (plan.sites[0].scheme.unwrap(), plan.notes.len())
    };
    let (only_ct, notes) = scheme(&["compressed-tensors"]);
    assert_eq!((only_ct.scale_grid, only_ct.zero_min, notes), (Bf16, 0, 0));
    let (only_gptq, notes) = scheme(&["gptq"]);
    assert_eq!((only_gptq.scale_grid, only_gptq.zero_min, notes), (F16, 1, 0));
    let (both, notes) = scheme(&["compressed-tensors", "gptq"]);
    assert_eq!((both.scale_grid, both.zero_min, notes), (F16AndBf16, 1, 1));
}

#[test]
fn every_uneven_group_is_listed_with_both_numbers() {
    let text = format!("{}{EMIT}", GPTQ_STEP.replace("32", "128"));
    let error = refusal(&text);
    assert!(error.contains("group_size 128 does not divide in_features of"), "{error}");
    for index in 0..3 {
        for site in ["self_attn.q_proj (64)", "self_attn.o_proj (64)", "mlp.down_proj (192)"] {
            assert!(error.contains(&format!("model.layers.{index}.{site}")), "{site}: {error}");
        }
    }
}

#[test]
fn everything_wrong_is_told_at_once() {
    let text = "
[[step]]
pass = \"awq\"
sites = \"mpl.*\"
[[step]]
pass = \"gptq\"
sites = \"self_attn.*\"
scheme = { bits = 3, group_size = 48 }
[[emit]]
layout = \"awk\"
";
    let errors = plan_of(&Recipe::parse(text).unwrap(), 0).unwrap_err().0;
    assert!(errors.len() >= 5, "{errors:?}");
    insta::assert_snapshot!(PlanErrors(errors));
}

#[test]
fn refusals() {
    let rtn = "[[step]]\npass = \"rtn\"\nscheme = { bits = 4, group_size = 32 }\n";
    let awq = "[[step]]\npass = \"awq\"\n";
    let cases: &[(&str, String, &str)] = &[
        (
            "pattern",
            format!("{}{EMIT}", GPTQ_STEP.replace("scheme", "sites = \"*.q_prj\"\nscheme")),
            "sites pattern `*.q_prj` matches no site; the nearest are model.layers.0.self_attn.q_proj",
        ),
        (
            "keep pattern",
            format!("{}{EMIT}", GPTQ_STEP.replace("scheme", "keep = \"layer.0.*\"\nscheme")),
            "keep pattern `layer.0.*` matches no site",
        ),
        (
            "kept head",
            format!(
                "{}{EMIT}",
                GPTQ_STEP.replace("scheme", "sites = [\"*\", \"lm_head\"]\nscheme")
            ),
            "all that pattern `lm_head` selects is held by `keep`",
        ),
        (
            "layout",
            format!("{}{}", rtn.replace("bits = 4", "bits = 3"), EMIT.replace("gptq", "awq")),
            "layout awq stores 4 bits, not 3",
        ),
        (
            "siblings",
            format!("{}{EMIT}", rtn.replace("scheme", "sites = [\"*.q_proj\"]\nscheme")),
            "self_attn.q_proj is w4 g32 sym, model.layers.0.self_attn.k_proj is float",
        ),
        (
            "order",
            format!("{rtn}{GPTQ_STEP}{EMIT}"),
            "step[1] (gptq): cannot take weights that are quantized, dense, full rank (made so by step[0] (rtn))",
        ),
        ("look-ahead", format!("{awq}{EMIT}"), "none follows on model.layers.0.self_attn.q_proj"),
        (
            "folds",
            format!(
                "{}{awq}sites = \"down_proj\"\n{}{EMIT}",
                rtn.replace(
                    "scheme",
                    "sites = [\"up_proj\", \"gate_proj\", \"self_attn.*\"]\nscheme"
                ),
                rtn.replace("scheme", "sites = \"down_proj\"\nscheme"),
            ),
            "would fold scales into model.layers.0.mlp.up_proj, model.layers.1.mlp.up_proj, model.layers.2.mlp.up_proj, already quantized by step[0] (rtn)",
        ),
        ("no emit", GPTQ_STEP.to_owned(), "the result of step[0] (gptq) is never emitted"),
        ("no step", EMIT.to_owned(), "the recipe has no [[step]]"),
        (
            "layout name",
            format!("{GPTQ_STEP}{}", EMIT.replace("gptq", "gtpq")),
            "unknown layout `gtpq`; did you mean `gptq`?",
        ),
        (
            "container",
            format!("{GPTQ_STEP}{EMIT}container = \"gguf\"\n"),
            "emit[0]: layout gptq lies in container safetensors, not in gguf",
        ),
        (
            "unknown container",
            format!("{GPTQ_STEP}{EMIT}container = \"onnx\"\n"),
            "unknown container `onnx`; known: safetensors",
        ),
        ("same dir", format!("{GPTQ_STEP}{EMIT}{EMIT}"), "emit[0] and emit[1] both write to gptq"),
        ("of", format!("{GPTQ_STEP}{EMIT}of = \"x\"\n"), "emit[0].of: no step has the id `x`"),
        (
            "of an earlier step",
            format!("{awq}id = \"scale\"\n{GPTQ_STEP}{EMIT}of = \"scale\"\n"),
            "the result of step[1] (gptq) is never emitted",
        ),
        (
            "upstream of no use",
            format!("{rtn}{EMIT}").replace("scheme", "upstream = \"original\"\nscheme"),
            "step[0] (rtn): reads no statistics, so its `upstream` would be ignored",
        ),
        (
            "duplicate id",
            format!("{awq}id = \"a\"\n{GPTQ_STEP}id = \"a\"\n{EMIT}"),
            "step[1].id: `a` is already the id of step[0]",
        ),
        (
            "no scheme",
            format!("[[step]]\npass = \"gptq\"\n{EMIT}"),
            "step[0] (gptq): quantizes but has no scheme",
        ),
        (
            "scheme of no use",
            format!("{awq}scheme = {{ bits = 4 }}\n{GPTQ_STEP}{EMIT}"),
            "step[0] (awq): does not quantize",
        ),
    ];
    for (name, text, expected) in cases {
        // Keys of a step must stand before its tables; the cases append them behind.
        let error = refusal(text);
        assert!(error.contains(expected), "{name}: {error}");
    }
    let recipe = Recipe::parse(&format!("{GPTQ_STEP}{EMIT}")).unwrap();
    let error = plan_of(&recipe, 0).unwrap_err().to_string();
    assert!(error.contains("needs calibration data (hessian)"), "{error}");
}

#[test]
fn named_chains_are_accepted() {
    let awq = "[[step]]\npass = \"awq\"\nid = \"a\"\n";
    let text = format!("{awq}{GPTQ_STEP}after = \"a\"\nid = \"b\"\n{EMIT}of = \"b\"\n");
    assert_eq!(plan(&text).unwrap().steps[1].label, "step[1] (gptq, id b)");
}

#[test]
fn a_budget_takes_the_fastest_way_that_keeps_it_or_names_the_smallest() {
    let recipe = Recipe::parse(&format!("{GPTQ_STEP}{EMIT}")).unwrap();
    let within = |memory| {
        let budget = Budget { memory, threads: 4, ..Budget::default() };
        plan_within(&recipe, 1 << 16, budget)
    };
    let free = within(None).unwrap();
    assert_eq!(free.limits, Limits::unbounded(4));
    let roomy = within(Some(1 << 40)).unwrap();
    assert_eq!((roomy.limits.threads, roomy.scratch_bytes), (4, 0));
    assert_eq!(roomy.memory, free.memory);
    let error = within(Some(1 << 20)).unwrap_err();
    let [PlanError::Memory { budget, wanted, smallest, .. }] = error.0[..] else {
        panic!("{error}")
    };
    assert_eq!((budget, wanted), (1 << 20, free.memory.peak()));
    assert!(error.to_string().contains("give --memory "), "{error}");
    // What is named can be kept, and nothing below it.
    let least = within(Some(smallest)).unwrap();
    assert_eq!((least.memory.peak(), least.limits.threads), (smallest, 1));
    assert!(least.scratch_bytes > 0 && within(Some(smallest - 1)).is_err());
    // Between the two, activations go before threads do.
    let tight = within(Some(wanted - 1)).unwrap();
    assert!(tight.limits.threads == 4 && tight.limits.beside == 0 && tight.limits.stream > 0);
    for plan in [&roomy, &tight, &least] {
        assert!(plan.memory.moments.iter().all(|m| m.total() <= plan.memory.peak()));
    }
    insta::assert_snapshot!(least.render());
}

/// A float-minimum or codebook type has no exact zero beside other weights: pruned weights would come to life.
#[test]
fn pruned_zeros_are_refused_by_types_without_an_exact_zero() {
    for prune in ["prune", "prune24"] {
        for block in BlockType::ALL {
            let text = format!(
                "[[step]]\npass = \"{prune}\"\nsites = \"mlp.*\"\n[[step]]\npass = \"sparse\"\n\
                 [[emit]]\nlayout = \"{block}\"\ncontainer = \"gguf\"\n"
            );
            let found = plan(&text).err().map(|errors| errors.0).unwrap_or_default();
            let refused = found.iter().find(|error| {
                matches!(error, PlanError::PassScheme { reason, .. } if reason.contains("pruned"))
            });
            assert_eq!(refused.is_some(), !block.has_zero(), "{prune} {block}");
            let Some(error) = refused else { continue };
            // The site, what made it so, and what to do; sites that were not pruned are not named.
            let told = error.to_string();
            assert!(told.contains("step[1] (sparse)"), "{told}");
            assert!(told.contains("model.layers.0.mlp.up_proj"), "{told}");
            assert!(told.contains("emit a type with an exact zero"), "{told}");
            assert!(!told.contains("self_attn"), "{told}");
        }
    }
    let without: Vec<&str> =
        BlockType::ALL.into_iter().filter(|ty| !ty.has_zero()).map(BlockType::name).collect();
    for name in ["q4_k", "q2_k", "q5_k", "q4_1", "q5_1", "iq4_nl", "iq4_xs"] {
        assert!(without.contains(&name), "{name}");
    }
    for name in ["q4_0", "q5_0", "q8_0", "q3_k", "q6_k"] {
        assert!(!without.contains(&name), "{name}");
    }
}

#[test]
fn a_file_of_statistics_stands_for_calibration_where_it_has_all_that_is_needed() {
    let weighed = "[[step]]\npass = \"weighed\"\nsites = [\"*\", \"lm_head\"]\nkeep = []\n\
                   scheme = { bits = 4, group_size = 32 }\n";
    let given = |text: &str, tokens, head| {
        let given = Given { needs: Needs::SQUARE_SUM, head };
        plan_given(&Recipe::parse(text).unwrap(), tokens, Budget::default(), Some(given))
    };
    let plain = format!("{weighed}{EMIT}");
    let error = plan_of(&Recipe::parse(&plain).unwrap(), 0).unwrap_err().to_string();
    assert!(error.contains("needs calibration data (square sum)"), "{error}");
    for head in [true, false] {
        let plan = given(&plain, 0, head).unwrap();
        assert!(!plan.calibrates());
        let rounds = plan.rounds(0);
        assert_eq!((rounds.len(), rounds[0].upstream), (1, Upstream::Given));
        assert!(!rounds[0].observes() && rounds[0].needs.iter().all(|n| *n == Needs::SQUARE_SUM));
        // What it does not know of the head is done without, and told.
        let last = &plan.rounds(plan.graph.blocks.len())[0];
        assert_eq!(last.needs[0].is_empty(), !head);
        assert_eq!(plan.notes.iter().any(|note| note.contains("output head,")), !head);
    }
    // Another step still calibrates; one that names its upstream does, too.
    let error = given(&format!("[[step]]\npass = \"awq\"\n{plain}"), 0, true).unwrap_err();
    assert!(error.to_string().contains("step[0] (awq): needs calibration data"), "{error}");
    let both = given(&format!("[[step]]\npass = \"awq\"\n{plain}"), 64, true).unwrap();
    assert!(both.calibrates() && both.rounds(0)[1].upstream == Upstream::Given);
    let own = plain.replace("scheme", "upstream = \"original\"\nscheme");
    let error = given(&own, 64, true).unwrap_err().to_string();
    assert!(error.contains("no step reads it"), "{error}");
    let error = given(&format!("{GPTQ_STEP}{EMIT}"), 64, true).unwrap_err().to_string();
    assert!(error.contains("no step reads it") && error.contains("step[0] (gptq)"), "{error}");
}
