"""On one rank every stored bit is what transformers and bitsandbytes store; on two, every shard is a slice of that."""

from __future__ import annotations

import pytest
import torch
import work
from upstream import effective_absmax, quantized_modules, their_model

import distquant as dq

SHAPES = ("llama-gqa", "phi3-packed", "llama-352", "llama-96", "neox-per-head")


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
@pytest.mark.parametrize("name", ["nf4", "nf4-dq", "fp4", "fp4-dq"])
@pytest.mark.parametrize("family", SHAPES)
def test_codes_and_absmax_of_4bit_equal_those_of_transformers(model_of, family, name, storage):
    path = model_of(family)
    theirs = quantized_modules(their_model(path, name, storage))
    ours = quantized_modules(dq.load(path, quantization_config=work.bnb(name, storage=storage)))
    assert ours.keys() == theirs.keys()
    for module, them in theirs.items():
        us = ours[module]
        assert work.same_bits(us.weight.data, them.weight.data), module
        assert work.same_bits(effective_absmax(us), effective_absmax(them)), module
        state, their_state = us.weight.quant_state, them.weight.quant_state
        assert (state.shape, state.dtype, state.blocksize) == (
            their_state.shape,
            their_state.dtype,
            their_state.blocksize,
        )
        if state.nested:
            assert work.same_bits(state.absmax, their_state.absmax)
            assert work.same_bits(state.state2.absmax, their_state.state2.absmax)
            assert work.same_bits(state.offset, their_state.offset)


@pytest.mark.parametrize("family", SHAPES)
def test_codes_and_absmax_of_int8_equal_those_of_transformers(model_of, family):
    path = model_of(family)
    theirs = quantized_modules(their_model(path, "int8"))
    ours = quantized_modules(dq.load(path, quantization_config="int8"))
    assert ours.keys() == theirs.keys()
    for module, them in theirs.items():
        assert work.same_bits(ours[module].weight.data, them.weight.data), module
        assert work.same_bits(ours[module].weight.SCB, them.weight.SCB), module


@pytest.mark.parametrize("name", ["nf4", "nf4-dq", "int8"])
def test_trained_weights_equal_those_of_transformers(kjv_llama, name):
    theirs = quantized_modules(their_model(kjv_llama, name))
    ours = quantized_modules(dq.load(kjv_llama, quantization_config=work.bnb(name)))
    for module, them in theirs.items():
        assert work.same_bits(ours[module].weight.data, them.weight.data), module
        if name != "int8":
            assert work.same_bits(effective_absmax(ours[module]), effective_absmax(them)), module


@pytest.mark.parametrize("name", ["nf4-dq", "fp4", "int8"])
@pytest.mark.parametrize("family", SHAPES)
def test_shards_dequantize_to_slices_of_the_whole(ranks, model_of, family, name):
    path, quant = model_of(family), work.bnb(name)
    whole = work.dequantized_weights(path, quant)
    shards = ranks.run(2, work.dequantized_weights, path, quant, "tp=2")
    plan = dq.plan(path, quantization_config=quant, mesh="tp=2")
    tensors = [t for t in plan.tensors if t.scheme != "none"]
    assert {f"{module}.weight" for module in whole} == {t.name for t in tensors}
    for tensor in tensors:
        module = tensor.name.removesuffix(".weight")
        for rank, shard in enumerate(shards):
            pieces = [whole[module].narrow(tensor.shard_dim, a, b - a) for a, b in plan.partitions[tensor.partition].segments(rank)]
            assert torch.equal(shard[module], torch.cat(pieces, tensor.shard_dim)), f"{module} on rank {rank}"


@pytest.mark.parametrize("name", ["none", "nf4", "nf4-dq", "int8"])
def test_what_one_rank_saves_loads_in_transformers(model_of, tmp_path, name):
    model = dq.load(model_of("llama-gqa"), quantization_config=work.bnb(name))
    model.save_pretrained(tmp_path)
    theirs = their_model(str(tmp_path))
    ours, found = quantized_modules(model), quantized_modules(theirs)
    assert ours.keys() == found.keys()
    for module, us in ours.items():
        assert work.same_bits(us.weight.data, found[module].weight.data), module
    assert dq.fingerprint(dq.load(tmp_path)) == dq.fingerprint(model)
