"""Each expert has the bits of a linear of its own: bitsandbytes' own function, the method's linear, slices of the whole."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit
from moe_ranks import MESHES, METHODS, SOME, held_experts
from moe_reference import as_linear, weights_of
from work import same_bits

import distquant as dq
from distquant.loading.loader import scheme_of

FAMILIES = ("olmoe", "gpt-oss")
"""11 experts one by one, of rows that are no whole blocks; 5 transposed and interleaved in one tensor."""


def original_experts(path: str, quant: Any) -> dict[str, torch.Tensor]:
    """Every expert's weight as transformers loads it, by name, in bfloat16."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    stacks = [t.name for t in dq.plan(path, quantization_config=quant).tensors if t.experts is not None]
    weights = [name for name in stacks if name.endswith("weight")]
    return {name: weight.contiguous() for stack in weights for name, weight in weights_of(model, stack)}


@pytest.mark.parametrize("family", FAMILIES)
def test_nf4_has_the_codes_and_absmax_of_bitsandbytes(moe_of, family):
    """Its own function on a CPU, on each expert's weight by itself."""
    path = moe_of(family)
    held, originals = held_experts(path, METHODS["nf4"]), original_experts(path, METHODS["nf4"])
    assert held.keys() == originals.keys()
    for name, weight in originals.items():
        codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
        stored = held[name][1]
        assert same_bits(stored[""].view(-1), codes.view(-1)), name
        assert same_bits(stored["absmax"].view(-1), state.absmax.view(-1)), name


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_has_the_codes_of_bitsandbytes(moe_of, family):
    path = moe_of(family)
    held, originals = held_experts(path, "int8"), original_experts(path, "int8")
    for name, weight in originals.items():
        codes, scales, _ = int8_vectorwise_quant(weight.to(torch.float16))
        stored = held[name][1]
        assert same_bits(stored[""], codes), name
        assert same_bits(stored["SCB"].view(-1), scales.view(-1)), name


@pytest.mark.parametrize("method", [name for name in METHODS if name != "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_expert_means_what_a_linear_of_its_weight_does(moe_of, family, method):
    path, quant = moe_of(family), METHODS[method]
    held, originals = held_experts(path, quant), original_experts(path, quant)
    scheme = scheme_of(dq.plan(path, quantization_config=quant))
    assert held.keys() == originals.keys()
    for name, weight in originals.items():
        assert same_bits(held[name][0], as_linear(scheme, name, weight)), name


@pytest.mark.parametrize("mesh", SOME)
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_hold_slices_of_the_whole(ranks, moe_of, family, mesh):
    path = moe_of(family)
    jobs = [METHODS[method] for method in ("nf4-dq", "int8")]
    for quant in jobs:
        whole = held_experts(path, quant)
        plan = dq.plan(path, quantization_config=quant, mesh=mesh)
        stacks = {t.name: t for t in plan.tensors if t.experts is not None}
        seen: dict[str, int] = dict.fromkeys(whole, 0)
        for rank, held in enumerate(ranks.run(MESHES[mesh], held_experts, path, quant, mesh)):
            tp = plan.mesh.coordinates(rank)["tp"]
            for name, (weight, _) in held.items():
                stack = stacks[re.sub(r"\.experts\.\d+\.", ".experts.*.", name)]
                assert (stack.partition is not None) == ("tp" in mesh)
                expected = whole[name][0]
                if stack.partition is not None:
                    pieces = plan.partitions[stack.partition].segments(tp)
                    expected = torch.cat([expected.narrow(stack.shard_dim - 1, a, b - a) for a, b in pieces], stack.shard_dim - 1)
                assert torch.equal(weight, expected), f"{name} on rank {rank}"
                seen[name] += 1
        assert set(seen.values()) == {2 if "tp" in mesh else 1}
