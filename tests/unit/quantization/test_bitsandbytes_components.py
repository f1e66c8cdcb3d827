"""bitsandbytes without a module: components of shards against the library's own weight, cut after dequantizing."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

from distquant.config import Bnb4bitConfig, Bnb8bitConfig
from distquant.errors import InputError
from distquant.kernels import reference
from distquant.kernels.choice import Kernel, choose
from distquant.quantization import Scheme, Shard, scheme_for
from distquant.quantization.algorithms.nested_absmax import dynamic_map, keeps_nesting, local_block
from distquant.sharding.partition import Partition
from distquant.sharding.tally import Tally

NAME = "model.layers.0.mlp.experts.3.gate_proj.weight"
CUTS: dict[str, tuple[tuple[int, int], int | None, tuple[int, ...]]] = {
    "whole": ((256, 128), None, ()),
    "whole 96": ((64, 96), None, ()),
    "whole 352": ((32, 352), None, ()),
    "rows, nesting kept": ((256, 128), 0, (128,)),
    "rows, nesting lost": ((256, 128), 0, (96, 160)),
    "rows of 96": ((64, 96), 0, (22,)),
    "rows of 352": ((32, 352), 0, (14,)),
    "columns": ((256, 128), 1, (64,)),
    "columns of 96": ((64, 96), 1, (32,)),
    "columns of 352": ((32, 352), 1, (160,)),
}
"""Shape, the dim that is cut, and where."""
NESTED = {"nf4": False, "nf4-dq": True}


def shards_of(case: str) -> list[Shard]:
    shape, dim, edges = CUTS[case]
    if dim is None:
        return [Shard(NAME, shape, "float32")]
    bounds = (0, *edges, shape[dim])
    partition = Partition(shape[dim], tuple(((a, b),) for a, b in pairwise(bounds)))
    return [Shard(NAME, shape, "float32", dim, partition, rank) for rank in range(len(partition.parts))]


def weight_of(case: str) -> Tensor:
    shape = CUTS[case][0]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return weight * torch.rand(shape[0], 1, generator=torch.Generator().manual_seed(2))


def kept(whole: Tensor, shard: Shard) -> Tensor:
    (a, b), (c, d) = shard.rows[0], shard.columns[0]
    return whole[a:b, c:d]


def packed(codes: Tensor) -> Tensor:
    flat = codes.reshape(-1)
    return flat[::2] << 4 | flat[1::2]


def bnb4(quant: str) -> Scheme:
    return scheme_for(Bnb4bitConfig(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=NESTED[quant]))


def theirs(quant: str, weight: Tensor) -> tuple[Tensor, Any]:
    """bitsandbytes' codes and state, from blocks as rows: its CPU kernel is right where blocks do not straddle them."""
    return bnb.functional.quantize_4bit(
        weight.view(-1, 64), blocksize=64, quant_type="nf4", compress_statistics=NESTED[quant]
    )


def dense(quant: str, weight: Tensor) -> Tensor:
    return bnb.functional.dequantize_4bit(*theirs(quant, weight)).view(weight.shape)


def flown(scheme: Scheme, shard: Shard, weight: Tensor) -> dict[str, Tensor]:
    """What a rank gets of a weight of 4 bits."""
    out = {"": torch.empty(weight.numel() // 2, dtype=torch.uint8), "absmax": torch.empty(weight.numel() // 64)}
    scheme.encode(NAME, weight, out, reference)
    codes, absmax = reference.unpack_4bit(out[""]).view(weight.shape), out["absmax"]
    if not scheme.replicated_components(shard) and shard.shard_dim == 0:
        absmax = absmax[slice(*(row * shard.shape[1] // 64 for row in shard.rows[0]))]
    elif not scheme.replicated_components(shard) and shard.shard_dim == 1:
        absmax = absmax.view(len(weight), -1)[:, slice(*(column // 64 for column in shard.columns[0]))].reshape(-1)
    return {"": packed(kept(codes, shard)), "absmax": absmax.clone()}


def empty(scheme: Scheme, shard: Shard) -> Any:
    out, into = shard.local_shape
    return scheme.module(nn.Linear(into, out, bias=False, device="meta"), shard)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("case", CUTS)
@pytest.mark.parametrize("quant", NESTED)
def test_four_bits_of_shards_are_slices_of_the_librarys_weight(quant: str, case: str) -> None:
    scheme, weight, shards = bnb4(quant), weight_of(case), shards_of(case)
    expected, sums, whole = dense(quant, weight), Tally(NAME), Tally(NAME)
    for shard in shards:
        found = scheme.pack(shard, flown(scheme, shard, weight), reference)
        nested = NESTED[quant] and keeps_nesting(shard)
        assert found.keys() == {"", "absmax", *(("nested_absmax", "nested_offset") if nested else ())}
        assert found[""].dtype == torch.uint8 and found[""].shape == (shard.local_shape[0] * shard.local_shape[1] // 2,)
        assert found["absmax"].dtype == (torch.uint8 if nested else torch.float32)
        assert sum(value.nbytes for value in found.values()) - 4 * nested == scheme.shard_nbytes(shard)
        for ops in (reference, choose(Kernel.AUTO, torch.device("cpu")).ops):
            assert torch.equal(scheme.dequantize(shard, found, torch.float32, ops), kept(expected, shard))
        module = empty(scheme, shard)
        scheme.load_encoded(shard, module, flown(scheme, shard, weight), reference)
        stored = scheme.components(module)
        stored.pop("nested_quant_map", None)
        assert same(stored, found)
        assert torch.equal(scheme.dequantized(module, shard, reference), kept(expected, shard))
        for stream, values, span in scheme.fingerprint_streams(shard, found):
            sums.shard(stream, values, shard.shape, shard.shard_dim, shard.owned, span=span)
    one = Shard(NAME, CUTS[case][0], "float32")
    module = empty(scheme, one)
    scheme.load_encoded(one, module, flown(scheme, one, weight), reference)
    scheme.tally(module, one, whole)
    assert sums.lanes == whole.lanes


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_codes_are_bytes_however_the_module_stores_them(storage: str) -> None:
    (shard,), weight = shards_of("whole"), weight_of("whole")
    scheme = scheme_for(Bnb4bitConfig(bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=storage))
    module = empty(scheme, shard)
    scheme.load_encoded(shard, module, flown(scheme, shard, weight), reference)
    assert module.weight.dtype == getattr(torch, storage)
    assert same(scheme.components(module), scheme.pack(shard, flown(scheme, shard, weight), reference))


def stored_parts(quant: str, shard: Shard, weight: Tensor) -> dict[str, Tensor]:
    """A weight as bitsandbytes saves it, its codes cut and the rest whole."""
    codes, state = theirs(quant, weight)
    state.shape = weight.shape
    parts = {name.rpartition(".")[2]: value for name, value in state.as_dict(packed=True).items()}
    state_name = next(name for name in parts if name.startswith("bitsandbytes__"))
    codes = reference.unpack_4bit(codes.view(-1)).view(weight.shape)
    return {**parts, "quant_state": parts.pop(state_name), "": packed(kept(codes, shard))}


@pytest.mark.parametrize("case", CUTS)
@pytest.mark.parametrize("quant", NESTED)
def test_four_bits_of_a_checkpoint_are_adopted_as_they_are_packed(quant: str, case: str) -> None:
    scheme, weight = bnb4(quant), weight_of(case)
    for shard in shards_of(case):
        parts = stored_parts(quant, shard, weight)
        found = scheme.pack_prequantized(shard, dict(parts), frozenset(parts) - {""})
        assert same(found, scheme.pack(shard, flown(scheme, shard, weight), reference))
        module = empty(scheme, shard)
        scheme.load_prequantized(shard, module, dict(parts), frozenset(parts) - {""})
        assert module.weight.quant_state.blocksize == local_block(shard)
        assert torch.equal(scheme.dequantized(module, shard, reference), kept(dense(quant, weight), shard))


def test_values_of_another_machine_are_kept() -> None:
    """Second-level codes mean what the checkpoint says, where that is not what this machine computes."""
    (shard,), weight, scheme = shards_of("whole"), weight_of("whole"), bnb4("nf4-dq")
    parts = stored_parts("nf4-dq", shard, weight)
    values = torch.nextafter(dynamic_map(torch.device("cpu")), torch.tensor(2.0))
    parts["nested_quant_map"] = values.clone()
    found = scheme.pack_prequantized(shard, dict(parts), frozenset(parts))
    assert torch.equal(found["nested_quant_map"], values)
    module = empty(scheme, shard)
    scheme.load_prequantized(shard, module, dict(parts), frozenset(parts))
    state = module.weight.quant_state
    assert torch.equal(state.state2.code, values)
    assert same(scheme.components(module), found)
    absmax = values[parts["absmax"].long()] * parts["nested_absmax"].repeat_interleave(256)[:512] + state.offset
    codes = reference.code_values("nf4")[reference.unpack_4bit(parts[""]).long()]
    expected = (codes.view(-1, 64) * absmax.view(-1, 1)).view(shard.shape)
    assert torch.equal(scheme.dequantize(shard, found, torch.float32, reference), expected)
    assert not torch.equal(expected, dense("nf4-dq", weight))


def test_a_state_that_contradicts_the_config_is_an_error() -> None:
    (shard,), weight, scheme = shards_of("whole"), weight_of("whole"), bnb4("nf4")
    parts = stored_parts("nf4", shard, weight)
    state = json.loads(bytes(parts["quant_state"].tolist()))
    for key, value in (("blocksize", 128), ("quant_type", "fp4"), ("shape", [128, 256])):
        wrong = torch.tensor(list(json.dumps({**state, key: value}).encode()), dtype=torch.uint8)
        with pytest.raises(InputError, match=f"quant_state has {key}="):
            scheme.pack_prequantized(shard, {**parts, "quant_state": wrong}, frozenset())


@pytest.mark.parametrize("case", CUTS)
def test_int8_of_shards_are_slices_of_the_librarys_weight(case: str) -> None:
    scheme, weight = scheme_for(Bnb8bitConfig()), weight_of(case)
    codes, absmax, _ = bnb.functional.int8_vectorwise_quant(weight.half())
    expected, sums, whole = codes.float() * (absmax / 127).view(-1, 1), Tally(NAME), Tally(NAME)
    out = {"": torch.empty(weight.numel(), dtype=torch.int8), "SCB": torch.empty(len(weight))}
    scheme.encode(NAME, weight, out, reference)
    for shard in shards_of(case):
        rows = slice(*shard.rows[0])
        parts = {"": kept(out[""].view(weight.shape), shard).reshape(-1), "SCB": out["SCB"][rows].clone()}
        found = scheme.pack(shard, dict(parts), reference)
        assert {name: (value.dtype, tuple(value.shape)) for name, value in found.items()} == {
            "": (torch.int8, shard.local_shape),
            "SCB": (torch.float32, shard.local_shape[:1]),
        }
        assert sum(value.nbytes for value in found.values()) == scheme.shard_nbytes(shard)
        assert same(scheme.pack_prequantized(shard, {**parts, "weight_format": torch.tensor(0)}, frozenset()), found)
        assert torch.equal(scheme.dequantize(shard, found, torch.float32, reference), kept(expected, shard))
        module = empty(scheme, shard)
        scheme.load_encoded(shard, module, dict(parts), reference)
        assert same(scheme.components(module), found)
        assert torch.equal(scheme.dequantized(module, shard, reference), kept(expected, shard))
        for stream, values, span in scheme.fingerprint_streams(shard, found):
            sums.shard(stream, values, shard.shape, shard.shard_dim, shard.owned, span=span)
    one = Shard(NAME, CUTS[case][0], "float32")
    module = empty(scheme, one)
    scheme.load_encoded(one, module, out, reference)
    scheme.tally(module, one, whole)
    assert sums.lanes == whole.lanes


def test_another_format_of_int8_is_an_error() -> None:
    (shard,) = shards_of("whole")
    parts = {"": torch.zeros(shard.shape, dtype=torch.int8).view(-1), "SCB": torch.ones(shard.shape[0])}
    with pytest.raises(InputError, match="weight_format is 2"):
        scheme_for(Bnb8bitConfig()).pack_prequantized(shard, {**parts, "weight_format": torch.tensor(2)}, frozenset())
