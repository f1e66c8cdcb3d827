"""Experts dealt out and cut, from the plans of two versions of transformers as their configurations spell them."""

from __future__ import annotations

import pytest
from parallel_plans import BLOCKS, INT8, NF4

from distquant.model.description import ExpertsDescription, ModelDescription, Param, Projection
from distquant.model.experts import split_experts
from distquant.planning import Partition
from distquant.planning.expert_parallel import expert_rules, plan_experts
from distquant.planning.tensor_parallel import ParallelPlan
from distquant.sharding.layout import Component, Layout, plain
from distquant.sharding.mesh import Mesh

ATTENTION = {
    "model.layers.*.self_attn.q_proj": "colwise",
    "model.layers.*.self_attn.k_proj": "colwise",
    "model.layers.*.self_attn.v_proj": "colwise",
    "model.layers.*.self_attn.o_proj": "rowwise",
}
MIXTRAL_TP = {
    **ATTENTION,
    "model.layers.*.mlp.experts.gate_up_proj": "packed_colwise",
    "model.layers.*.mlp.experts.down_proj": "rowwise",
    "model.layers.*.mlp.experts": "moe_tp_experts",
}
LLAMA4_TP = {
    **ATTENTION,
    "model.layers.*.feed_forward.shared_expert.gate_proj": "colwise",
    "model.layers.*.feed_forward.shared_expert.up_proj": "colwise",
    "model.layers.*.feed_forward.shared_expert.down_proj": "rowwise",
    "model.layers.*.feed_forward.experts.gate_up_proj": "packed_rowwise",
    "model.layers.*.feed_forward.experts.down_proj": "colwise",
    "model.layers.*.feed_forward.experts": "moe_tp_experts",
    "model.layers.*.feed_forward.gate_proj": "colwise",
    "model.layers.*.feed_forward.up_proj": "colwise",
    "model.layers.*.feed_forward.down_proj": "rowwise",
}
PLANS: dict[tuple[str, str], tuple[dict[str, str], dict[str, str]]] = {
    ("mixtral", "5.17"): (
        MIXTRAL_TP,
        {
            "model.layers.*.mlp.gate": "ep_router",
            "model.layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
            "model.layers.*.mlp.experts.down_proj": "grouped_gemm",
            "model.layers.*.mlp.experts": "moe_tp_experts",
        },
    ),
    ("mixtral", "5.23"): (
        MIXTRAL_TP,
        {
            "model.layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
            "model.layers.*.mlp.experts.down_proj": "grouped_gemm",
            "model.layers.*.mlp.experts": "ep_dispatch_experts",
        },
    ),
    ("gpt_oss", "5.17"): (
        {"lm_head": "colwise_gather_output"},
        {
            "model.layers.*.mlp.router": "ep_router",
            "model.layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
            "model.layers.*.mlp.experts.gate_up_proj_bias": "grouped_gemm",
            "model.layers.*.mlp.experts.down_proj": "grouped_gemm",
            "model.layers.*.mlp.experts.down_proj_bias": "grouped_gemm",
            "model.layers.*.mlp.experts": "moe_tp_experts",
        },
    ),
    ("gpt_oss", "5.23"): (
        {"lm_head": "colwise_gather_output"},
        {
            "model.layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
            "model.layers.*.mlp.experts.gate_up_proj_bias": "grouped_gemm",
            "model.layers.*.mlp.experts.down_proj": "grouped_gemm",
            "model.layers.*.mlp.experts.down_proj_bias": "grouped_gemm",
            "model.layers.*.mlp.experts": "ep_dispatch_experts",
        },
    ),
    ("llama4", "5.17"): (
        LLAMA4_TP,
        {
            **ATTENTION,
            "model.layers.*.feed_forward.experts.gate_up_proj": "grouped_gemm",
            "model.layers.*.feed_forward.experts.down_proj": "grouped_gemm",
            "model.layers.*.feed_forward.gate_proj": "colwise",
            "model.layers.*.feed_forward.up_proj": "colwise",
            "model.layers.*.feed_forward.down_proj": "rowwise",
            "model.layers.*.feed_forward.router": "ep_router",
        },
    ),
    ("llama4", "5.23"): (LLAMA4_TP, {}),
}
"""(Model, version) -> its tensor- and its expert-parallel plan: transformers 5.17.0 and 5.23.0, `base_model_tp_plan`
and `base_model_ep_plan` of `models/<model>/configuration_<model>.py` under the prefix of the causal language model
(gpt-oss: `_tp_plan` of `modeling_gpt_oss.py`)."""

MODULES = {"mixtral": "mlp.experts", "gpt_oss": "mlp.experts", "llama4": "feed_forward.experts"}
COUNT, INTERMEDIATE, HIDDEN = 8, 352, 256


def form_of(model: str, layer: int = 0, intermediate: int = INTERMEDIATE) -> ExpertsDescription:
    """The experts of a model, as `description.experts` describes them."""
    down = Projection("down_proj", "down_proj", HIDDEN, intermediate, shard_dim=1)
    packed = Projection("gate_up_proj", "gate_up_proj", 2 * intermediate, HIDDEN)
    gate = Projection("gate_proj", "gate_up_proj", intermediate, HIDDEN)
    up = Projection("up_proj", "gate_up_proj", intermediate, HIDDEN, intermediate)
    name = f"model.layers.{layer}.{MODULES[model]}"
    if model == "mixtral":
        return ExpertsDescription(name, COUNT, intermediate, (gate, up, down))
    if model == "gpt_oss":
        return ExpertsDescription(
            name, COUNT, intermediate, (packed, down), transposed=True, interleaved=True, bias=True
        )
    return ExpertsDescription(name, COUNT, intermediate, (packed, down), transposed=True, dense=True)


def skeleton_of(model: str, layers: int = 2, intermediate: int = INTERMEDIATE) -> ModelDescription:
    """A skeleton of nothing but experts, split into stacks."""
    experts = {form.name: form for form in (form_of(model, layer, intermediate) for layer in range(layers))}
    params = {}
    for name, form in experts.items():
        for leaf in {projection.parameter for projection in form.projections}:
            for suffix in ("", "_bias") if form.bias else ("",):
                params[f"{name}.{leaf}{suffix}"] = Param(f"{name}.{leaf}{suffix}", (COUNT, 1, 1), "bfloat16")
    whole = ModelDescription(
        model_type=model,
        architecture=model,
        params=params,
        tied={},
        sources={},
        unexpected=(),
        missing=(),
        linears={},
        attentions={},
        embeddings=(),
        input_embedding=None,
        output_embedding=None,
        experts=experts,
        tp_plan={},
        ep_plan={},
        default_skip=(),
    )
    return split_experts(whole, experts, {})


def planned(model: str, version: str, mesh: str, layout: Layout = NF4, intermediate: int = INTERMEDIATE):
    """The plan of a model's experts under the rules of a version."""
    description, parallel = skeleton_of(model, intermediate=intermediate), ParallelPlan()
    modules, plans = list(description.experts), PLANS[model, version]
    plan_experts(description, modules, Mesh.parse(mesh), plans, lambda name: layout, parallel)
    return parallel


@pytest.mark.parametrize("mesh", ["ep=2", "ep=3", "tp=2", "ep=2,tp=2", "ep=3,tp=5", "dp=2,ep=8"])
@pytest.mark.parametrize("model", MODULES)
def test_both_versions_become_the_same(model, mesh):
    old, new = (planned(model, version, mesh) for version in ("5.17", "5.23"))
    assert (old.experts, old.stacks, old.partitions) == (new.experts, new.stacks, new.partitions)
    told = [[(rule.pattern, rule.became, rule.reason, rule.modules) for rule in plan.rules] for plan in (old, new)]
    assert told[0] == told[1]


ASKED = {
    ("mixtral", "5.17"): (
        "gate_up_proj: packed_colwise, down_proj: rowwise, experts: moe_tp_experts",
        "gate: ep_router, gate_up_proj: grouped_gemm, down_proj: grouped_gemm, experts: moe_tp_experts",
        "gate: ep_router, gate_up_proj: grouped_gemm + packed_colwise, down_proj: grouped_gemm + rowwise, "
        "experts: moe_tp_experts",
    ),
    ("mixtral", "5.23"): (
        "gate_up_proj: packed_colwise, down_proj: rowwise, experts: moe_tp_experts",
        "gate_up_proj: grouped_gemm, down_proj: grouped_gemm, experts: ep_dispatch_experts",
        "gate_up_proj: grouped_gemm + packed_colwise, down_proj: grouped_gemm + rowwise, "
        "experts: ep_dispatch_experts + moe_tp_experts",
    ),
    ("gpt_oss", "5.17"): (
        "no rule",
        "router: ep_router, gate_up_proj: grouped_gemm, gate_up_proj_bias: grouped_gemm, down_proj: grouped_gemm, "
        "down_proj_bias: grouped_gemm, experts: moe_tp_experts",
        "router: ep_router, gate_up_proj: grouped_gemm, gate_up_proj_bias: grouped_gemm, down_proj: grouped_gemm, "
        "down_proj_bias: grouped_gemm, experts: moe_tp_experts",
    ),
    ("llama4", "5.17"): (
        "gate_up_proj: packed_rowwise, down_proj: colwise, experts: moe_tp_experts",
        "gate_up_proj: grouped_gemm, down_proj: grouped_gemm, router: ep_router",
        "gate_up_proj: grouped_gemm + packed_rowwise, down_proj: grouped_gemm + colwise, router: ep_router, "
        "experts: moe_tp_experts",
    ),
    ("llama4", "5.23"): (
        "gate_up_proj: packed_rowwise, down_proj: colwise, experts: moe_tp_experts",
        "no rule",
        "gate_up_proj: packed_rowwise, down_proj: colwise, experts: moe_tp_experts",
    ),
}
"""What the table of rules says was asked for: under tp, under ep, under both."""


@pytest.mark.parametrize(("model", "version"), ASKED)
def test_what_was_asked_is_told(model, version):
    for mesh, asked in zip(("tp=2", "ep=2", "ep=2,tp=2"), ASKED[model, version], strict=True):
        (rule,) = planned(model, version, mesh).rules
        assert (rule.pattern, rule.modules) == (f"model.layers.*.{MODULES[model]}", 2)
        assert rule.asked == asked, mesh


def test_what_became_of_it_is_told():
    found = {mesh: planned("mixtral", "5.23", mesh).rules[0] for mesh in ("ep=3", "tp=2", "ep=3,tp=2")}
    became = {mesh: (rule.became, rule.reason) for mesh, rule in found.items()}
    assert became["ep=3"] == ("experts 3+3+2", "whole experts")
    assert became["tp=2"] == ("every expert, features 192+160", "features in multiples of 32")
    assert became["ep=3,tp=2"] == ("experts 3+3+2, features 192+160", "whole experts; features in multiples of 32")


@pytest.mark.parametrize(("model", "version"), PLANS)
def test_rules_of_other_modules_are_left_to_them(model, version):
    description = skeleton_of(model)
    for plan in PLANS[model, version]:
        (found,) = expert_rules(description, plan).values()
        assert all(".experts" in rule or style == "ep_router" for rule, style in found.items())
        assert not [rule for rule in plan.keys() - found.keys() if ".experts" in rule or plan[rule] == "ep_router"]


@pytest.mark.parametrize(("ranks", "expected"), [(2, [4, 4]), (3, [3, 3, 2]), (5, [2, 2, 2, 1, 1]), (8, [1] * 8)])
def test_experts_are_dealt_out_whole_and_in_order(ranks, expected):
    plan = planned("mixtral", "5.23", f"ep={ranks}")
    for shard in plan.experts.values():
        dealt = plan.partitions[shard.ep_partition]
        assert dealt.lengths == expected
        assert shard.partition is None
        assert [segment for part in dealt.parts for segment in part] == sorted(s for part in dealt.parts for s in part)
    assert plan.stacks == {}


# -- cuts inside an expert ---------------------------------------------------------------------------------------------

PLAIN = plain("bfloat16")


def rows_of(form: ExpertsDescription, projection: Projection, features: list[int]) -> list[int]:
    """Elements of a projection's cut dim that belong to these intermediate features."""
    if projection.shard_dim == 1 or projection.out_features == form.intermediate:
        return features
    if form.interleaved:
        return [row for feature in features for row in (2 * feature, 2 * feature + 1)]
    return [*features, *(form.intermediate + feature for feature in features)]


def held(partition: Partition, rank: int) -> list[int]:
    return [element for start, stop in partition.segments(rank) for element in range(start, stop)]


LAYOUTS = {"nf4": NF4, "int8": INT8, "fp8": BLOCKS, "plain": PLAIN}
CASES = [(model, layout, size) for model in MODULES for layout in LAYOUTS for size in (352, 384)]
CASES.remove(("llama4", "fp8", 352))  # it has no cut, see below


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(("model", "layout", "intermediate"), CASES)
def test_projections_of_an_expert_share_one_cut(model, layout, ranks, intermediate):
    layout = LAYOUTS[layout]
    form, plan = form_of(model, 0, intermediate), planned(model, "5.23", f"tp={ranks}", layout, intermediate)
    inside = plan.experts[form.name].partition
    assert inside is not None
    for projection in form.projections:
        dim, key = plan.stacks[f"{form.name}.*.{projection.name}"]
        steps = layout.alignments((projection.out_features, projection.in_features), dim)
        assert dim == projection.shard_dim
        assert any(plan.partitions[key].legal(step) for step in steps)
        for rank in range(ranks):
            assert held(plan.partitions[key], rank) == rows_of(form, projection, held(plan.partitions[inside], rank))


@pytest.mark.parametrize(
    ("layout", "intermediate", "ranks", "expected"),
    [
        (NF4, 384, 2, [192, 192]),  # whole blocks of 64
        (NF4, 352, 2, [192, 160]),  # a row is 5.5 of them, 11 of 32
        (NF4, 96, 3, [32, 32, 32]),
        (BLOCKS, 352, 2, [256, 96]),  # the last tile is ragged
        (BLOCKS, 2048, 5, [512, 384, 384, 384, 384]),
        (INT8, 352, 3, [128, 112, 112]),
        (INT8, 40, 3, [16, 16, 8]),
        (INT8, 30, 4, [8, 8, 7, 7]),  # finer than 16 where that leaves too few
    ],
)
def test_features_are_dealt_out_in_units(layout, intermediate, ranks, expected):
    plan = planned("mixtral", "5.23", f"tp={ranks}", layout, intermediate)
    (shard, other) = plan.experts.values()
    assert shard == other
    assert plan.partitions[shard.partition].lengths == expected


@pytest.mark.parametrize(
    ("model", "layout", "intermediate", "ranks", "reason"),
    [
        ("mixtral", BLOCKS, 352, 4, "352 features are fewer than 4 multiples of 128"),
        ("mixtral", NF4, 96, 4, "96 features are fewer than 4 multiples of 32"),
        ("gpt_oss", BLOCKS, 96, 2, "96 features are fewer than 2 multiples of 128"),
        ("mixtral", NF4, 100, 2, "100 features, which the quantization blocks of down_proj do not divide"),
        (
            "llama4",
            BLOCKS,
            352,
            2,
            "no partition of gate and up, 352 features each, is aligned with the quantization blocks of gate_up_proj",
        ),
    ],
)
def test_experts_without_a_cut_stay_whole_and_the_reason_is_told(model, layout, intermediate, ranks, reason):
    for ep, dealt in ((1, "every expert"), (2, "experts 4+4")):
        plan = planned(model, "5.23", f"ep={ep},tp={ranks}", layout, intermediate)
        assert plan.stacks == {}
        assert {shard.partition for shard in plan.experts.values()} == {None}
        (rule,) = plan.rules
        assert rule.became == f"{dealt}, replicated over tp"
        assert rule.reason.endswith(reason)


def test_layers_of_other_layouts_get_other_cuts_and_a_line_each():
    """The first layer in tiles, the second left as it is."""
    description, parallel = skeleton_of("mixtral"), ParallelPlan()
    modules, plans = list(description.experts), PLANS["mixtral", "5.23"]
    layout_of = {"0": BLOCKS, "1": PLAIN}
    plan_experts(description, modules, Mesh.parse("tp=2"), plans, lambda name: layout_of[name.split(".")[2]], parallel)
    assert [parallel.partitions[shard.partition].lengths for shard in parallel.experts.values()] == [
        [256, 96],
        [176, 176],
    ]
    assert [(rule.became, rule.modules) for rule in parallel.rules] == [
        ("every expert, features 256+96", 1),
        ("every expert, features 176+176", 1),
    ]


def test_cut_of_one_projection_may_be_the_strictest():
    """Words of eight outputs in gate and up alone bind down's inputs too."""
    eight = Layout((Component(name="", dtype="int32", block_shape=(8, 1)),))
    description, parallel = skeleton_of("mixtral", intermediate=40), ParallelPlan()
    modules, plans = list(description.experts), PLANS["mixtral", "5.23"]
    free = Layout((Component(name="", dtype="bfloat16"),))
    plan_experts(
        description,
        modules,
        Mesh.parse("tp=3"),
        plans,
        lambda name: free if name.endswith("down_proj") else eight,
        parallel,
    )
    assert [parallel.partitions[shard.partition].lengths for shard in parallel.experts.values()] == [[16, 16, 8]] * 2
