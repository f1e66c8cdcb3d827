"""Stored components without a module: whatever can be kept as a stack of experts, and which experts are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distquant.config import parse
from distquant.environment import Environment
from distquant.kernels import reference
from distquant.model.description import Linear, ModelDescription, Param, Source
from distquant.model.module_names import ModuleNames
from distquant.quantization import Context, Scheme, Shard, config_classes, scheme_for
from distquant.quantization.registry import discover
from distquant.sharding.mesh import Mesh
from distquant.sharding.tally import Tally

QUANTS = (
    "nf4", "nf4-dq", "fp4", "int8", "fp8", "fp8-tensor", "fp8-row", "fbgemm_fp8", "mxfp8", "int4", "gptq-rtn",
    "awq-rtn", "mxfp4", "quanto-int8", "quanto-int4", "torchao-int8", "torchao-fp8",
)  # fmt: skip
OUT, INTO = 128, 256


def scheme_of(quant: Any) -> Scheme:
    config = parse(quant, config_classes())
    assert config is not None
    return scheme_for(config)


def flown(scheme: Scheme, shard: Shard, weight: Tensor) -> dict[str, Tensor]:
    """What flows of a weight that is not cut; flat."""
    flowing = scheme.encoded_components(shard.name, shard.shape, shard.dtype)
    parts = {c.name: torch.empty(c.shape(shard.shape), dtype=getattr(torch, c.dtype)).view(-1) for c in flowing}
    scheme.encode(shard.name, weight, parts, reference)
    return parts


def test_all_that_claim_to_be_stackable_are_looked_at_here() -> None:
    mine = {type(scheme_of(quant)) for quant in QUANTS}
    others = {cls.name for cls in discover().values() if cls.stacks and cls.quantizes() and cls not in mine}
    assert others == {"auto-round"}  # it stores what GPTQ and AWQ do


@pytest.mark.parametrize("quant", QUANTS)
def test_a_stack_of_components_is_each_module(quant: str) -> None:
    """Components of two experts lie in one tensor each; what is read of a slice is what a module of its own holds."""
    scheme, stack = scheme_of(quant), {}
    assert scheme.stacks
    weights = torch.randn(2, OUT, INTO, generator=torch.Generator().manual_seed(0)).bfloat16()
    weights[1] *= 7
    shards = [Shard(f"model.layers.0.mlp.experts.{n}.up_proj.weight", (OUT, INTO), "bfloat16") for n in range(2)]
    for number, (shard, weight) in enumerate(zip(shards, weights, strict=True)):
        for name, value in scheme.pack(shard, flown(scheme, shard, weight), reference).items():
            held = stack.setdefault(name, torch.empty((2, *value.shape), dtype=value.dtype))
            assert held.dtype == value.dtype
            held[number].copy_(value)
    assert sum(value.nbytes for value in stack.values()) == pytest.approx(2 * scheme.shard_nbytes(shards[0]), rel=0.01)
    for number, (shard, weight) in enumerate(zip(shards, weights, strict=True)):
        module = scheme.module(nn.Linear(INTO, OUT, bias=False, device="meta"), shard)
        scheme.load_encoded(shard, module, flown(scheme, shard, weight), reference)
        components = {name: value[number] for name, value in stack.items()}
        dense = scheme.dequantize(shard, components, torch.bfloat16, reference)
        assert dense.dtype == torch.bfloat16 and dense.shape == (OUT, INTO)
        assert torch.equal(dense, scheme.dequantized(module, shard, reference))
        assert (dense - weight).norm() < 0.2 * weight.norm()
        mine, its = Tally(shard.name), Tally(shard.name)
        for stream, values, span in scheme.fingerprint_streams(shard, components):
            mine.shard(stream, values, shard.shape, None, shard.owned, span=span)
        scheme.tally(module, shard, its)
        assert mine.lanes == its.lanes != [0, 0]


# -- which experts a configuration means -------------------------------------------------------------------------------

STACK, DENSE = "model.layers.0.mlp.experts.*.{}", "model.layers.0.self_attn.q_proj"
PROJECTIONS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
EXPERTS = 4


def skeleton_of(*components: str) -> ModelDescription:
    """A layer with a dense module and experts, and a checkpoint with a tensor for each expert and component."""
    linears = {name: Linear(name, 64, 64, False) for name in (DENSE, *map(STACK.format, PROJECTIONS))}
    sources = {f"{DENSE}.weight": tuple(Source(f"{DENSE}.{c}", c) for c in components)}
    for mine, theirs in PROJECTIONS.items():
        modules = [f"model.layers.0.block_sparse_moe.experts.{n}.{theirs}" for n in range(EXPERTS)]
        sources[f"{STACK.format(mine)}.weight"] = tuple(Source(f"{m}.{c}", c) for m in modules for c in components)
    shapes = {name: (EXPERTS, 64, 64) if "*" in name else (64, 64) for name in linears}
    return ModelDescription(
        model_type="mixtral", architecture="MixtralForCausalLM", tied={}, sources=sources, unexpected=(), missing=(),
        params={f"{name}.weight": Param(f"{name}.weight", shape, "bfloat16") for name, shape in shapes.items()},
        linears=linears, attentions={}, embeddings=(), input_embedding=None, output_embedding=None,
        experts={}, tp_plan={}, ep_plan={}, default_skip=(),
    )  # fmt: skip


ALL_OF_THEM = {DENSE, *map(STACK.format, PROJECTIONS)}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}


def compressed(*targets: str, ignore: tuple[str, ...] = ()) -> dict[str, Any]:
    group = {"targets": list(targets), "weights": INT4}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group},
            "ignore": list(ignore)}  # fmt: skip


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "packing_format": "auto_gptq"}
FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32]}
DOWN = STACK.format("down_proj")

SELECTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...], set[str]]] = {
    "fp8": (FP8, ("", "weight_scale_inv"), ALL_OF_THEM),
    "awq": ({"quant_method": "awq", "bits": 4}, ("qweight", "qzeros", "scales"), ALL_OF_THEM),
    "gptq": (GPTQ, ("qweight", "qzeros", "scales"), ALL_OF_THEM),
    "gptq leaves out by number": (
        {**GPTQ, "dynamic": {r"-:.*\.experts\.\d+\.down": {}}},
        ("qweight",),
        ALL_OF_THEM - {DOWN},
    ),
    "gptq names modules of the checkpoint": (
        {**GPTQ, "modules_in_block_to_quantize": [[f"block_sparse_moe.experts.{n}.w2" for n in range(EXPERTS)]]},
        ("qweight",),
        {DOWN},
    ),
    "auto-round": ({**ROUND, "extra_config": {DENSE: {"bits": 8}}}, ("qweight",), ALL_OF_THEM),
    "auto-round leaves out by name": (
        {**ROUND, "extra_config": {DOWN.replace("*", str(n)): {"bits": 16} for n in range(EXPERTS)}},
        ("qweight",),
        ALL_OF_THEM - {DOWN},
    ),
    "compressed-tensors": (compressed("Linear"), ("weight_packed", "weight_scale"), ALL_OF_THEM),
    "compressed-tensors by number": (
        compressed(r"re:.*experts\.\d+\.(gate|up)_proj$"),
        ("weight_packed",),
        ALL_OF_THEM - {DOWN, DENSE},
    ),
    "compressed-tensors ignores by name": (
        compressed("Linear", ignore=tuple(DOWN.replace("*", str(n)) for n in range(EXPERTS))),
        ("weight_packed",),
        ALL_OF_THEM - {DOWN},
    ),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ("",), ALL_OF_THEM),
}  # fmt: skip


def context_of(description: ModelDescription) -> Context:
    return Context(environment=Environment(), mesh=Mesh(), description=description, device_map=None, prequantized=True)


@pytest.mark.parametrize("case", SELECTIONS)
def test_rules_for_modules_choose_whole_stacks(case: str) -> None:
    quant, components, expected = SELECTIONS[case]
    scheme, description = scheme_of(quant), skeleton_of(*components)
    scheme.names = ModuleNames(description.sources, wrapped=True)
    assert set(scheme.select_modules(description)) == expected
    found = scheme.validate(context_of(description))
    assert [problem for problem in found if "experts" in str(problem)] == []


OF_ONE = r"model.layers.0.mlp.experts.2.up_proj"
APART: dict[str, dict[str, Any]] = {
    "gptq": {**GPTQ, "dynamic": {r"+:.*\.experts\.[2]\.up_proj": {"bits": 8}}},
    "gptq leaves one out": {**GPTQ, "dynamic": {r"-:.*\.experts\.2\.up_proj": {}}},
    "auto-round": {**ROUND, "extra_config": {OF_ONE: {"bits": 8}}},
    "compressed-tensors": compressed("Linear", ignore=(OF_ONE,)),
}


@pytest.mark.parametrize("case", APART)
def test_rules_that_tell_experts_apart_are_an_error(case: str) -> None:
    found = map(str, scheme_of(APART[case]).validate(context_of(skeleton_of("qweight"))))
    expected = r"stores model.layers.0.mlp.experts.2.up_proj in another way than model.layers.0.mlp.experts.0.up_proj"
    assert len([problem for problem in found if expected in problem]) == 1


def test_every_expert_is_stored_as_the_stack_says() -> None:
    scheme = scheme_of({**GPTQ, "dynamic": {r"+:.*\.experts\.\d+\.up_proj": {"bits": 8}}})
    stack, expert = (STACK.format("up_proj").replace("*", star) + ".weight" for star in ("*", "3"))
    assert scheme.layout(stack, (64, 64), "bfloat16") == scheme.layout(expert, (64, 64), "bfloat16")
    assert scheme.layout(expert, (64, 64), "bfloat16") != scheme.layout(f"{DENSE}.weight", (64, 64), "bfloat16")
