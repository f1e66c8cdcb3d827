"""quanto: the bits of its own modules, its own files, its order of packed codes, slices, and refusals."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import quanto_unpack  # noqa: F401
import torch
from flowed import filled, same
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import distquant as dq
from distquant.config import QuantoConfig
from distquant.quantization import Shard
from distquant.quantization.methods.quanto import SCALE, SHIFT, QuantoScheme, group_of, pack_parts, unpack_parts
from distquant.sharding.partition import even_partition

quanto = pytest.importorskip("optimum.quanto")
DATA = Path(__file__).parents[2] / "data" / "quanto"
KINDS = ("int8", "float8", "int4", "int2")
IDS = torch.tensor([[5, 17, 99, 3, 42], [90, 2, 31, 77, 12]])


def theirs(kind: str, weight: torch.Tensor) -> Any:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    types = {"int8": quanto.qint8, "float8": quanto.qfloat8, "int4": quanto.qint4, "int2": quanto.qint2}
    module = quanto.QLinear.from_module(linear, weights=types[kind])
    module.freeze()
    return module


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("columns", [64, 96, 256, 352, 144])
@pytest.mark.parametrize("kind", KINDS)
def test_bits_and_forward_equal_those_of_quanto(kind, columns, dtype):
    torch.manual_seed(0)
    weight = (torch.randn(48, columns) * torch.rand(48, 1)).to(getattr(torch, dtype))
    them = theirs(kind, weight)
    module = filled(QuantoScheme(QuantoConfig(weights=kind)), Shard("m.weight", (48, columns), dtype), weight, step=7)
    mine, its = module.state_dict(), them.state_dict()
    assert mine.keys() == its.keys()
    repacked = "TinyGemm" in type(them.weight).__name__
    for name in mine:
        if repacked and name == "weight._shift":  # kept as a rounded product with the scale
            assert torch.allclose(mine[name], its[name], rtol=1e-2)
        else:
            assert same(mine[name], its[name]), name
    assert module.weight_group_size == them.weight_group_size
    x = torch.randn(2, 3, columns, dtype=weight.dtype)
    if repacked:
        distance = (module(x) - them(x)).norm() / them(x).norm()
        assert distance < 2e-2  # its kernel multiplies in bfloat16
    else:
        assert torch.equal(module(x), them(x))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_one_value_come_out_as_they_are(kind):
    weight = torch.randn(6, 64, dtype=torch.bfloat16)
    weight[2] = 0
    weight[4] = 0.5
    shard = Shard("m.weight", (6, 64), "bfloat16")
    found = filled(QuantoScheme(QuantoConfig(weights=kind)), shard, weight, 6).weight.dequantize()
    assert bool((found[2] == 0).all())
    assert torch.allclose(found[4], weight[4], rtol=2e-2)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(2, 40),
    columns=st.sampled_from([32, 96, 160, 192, 256, 144]),
    dim=st.sampled_from([0, 1]),
    ranks=st.integers(2, 4),
    step=st.integers(1, 9),
    seed=st.integers(0, 5),
)
def test_shards_dequantize_to_slices_of_the_whole(kind, rows, columns, dim, ranks, step, seed):
    """On the fly, and cut from what quanto stores of the whole."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    scheme, shape = QuantoScheme(QuantoConfig(weights=kind)), (rows, columns)
    partition = even_partition(
        shape[dim], scheme.layout("m.weight", shape, "float32").alignments(shape, dim)[-1], ranks
    )
    if partition is None:
        return
    them = theirs(kind, weight)
    whole, stored = them.weight.dequantize(), them.state_dict()
    for rank in range(ranks):
        shard = Shard("m.weight", shape, "float32", dim, partition, rank)
        module = filled(scheme, shard, weight, step)
        expected = torch.cat([whole.narrow(dim, a, b - a) for a, b in partition.segments(rank)], dim)
        assert torch.equal(module.weight.dequantize(), expected)
        if scheme.grouped:
            mine = scheme.components(module)
            parts = {
                "": stored["weight._data._data"].view(-1),
                SCALE: mine[SCALE].view(-1),
                SHIFT: mine[SHIFT].view(-1),
            }
            parts |= {name: stored[name] for name in ("input_scale", "output_scale")}
            adopted = scheme.pack_prequantized(shard, parts, frozenset(("",)))
            assert torch.equal(adopted[""], mine[""])
            assert scheme.shard_nbytes(shard) == sum(value.nbytes for value in adopted.values())


@given(rows=st.integers(1, 30), columns=st.integers(1, 5), bits=st.sampled_from([2, 4]))
def test_packing_is_quantos(rows, columns, bits):
    from optimum.quanto.tensor.packed import pack_weights

    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
    assert torch.equal(pack_parts(codes, bits), pack_weights(codes, bits))
    assert torch.equal(unpack_parts(pack_parts(codes, bits), bits, rows), codes)


@pytest.mark.parametrize("rows", [3, 4])
def test_stored_shapes_are_those_of_whole_packed_rows(rows):
    scheme = QuantoScheme(QuantoConfig(weights="int4"))
    stored = {SCALE: (rows, 1), SHIFT: (rows, 1), "input_scale": (), "output_scale": ()}
    assert scheme.check_stored("m.weight", (rows, 64), {**stored, "": (2, 64)}) == []
    [problem] = scheme.check_stored("m.weight", (rows, 64), {**stored, "": (3, 64)})
    assert "[3, 64]" in problem.what


@given(columns=st.integers(1, 1000))
def test_groups_are_those_of_quanto(columns):
    module = quanto.QLinear(columns, 2, bias=False, weights=quanto.qint4, device="meta")
    assert group_of(columns) == module.weight_group_size


def test_a_copy_shares_no_memory():
    shard = Shard("m.weight", (8, 96), "bfloat16")
    module = filled(QuantoScheme(QuantoConfig(weights="int4")), shard, torch.randn(8, 96).bfloat16(), 8)
    twin = copy.deepcopy(module)
    before = module.weight.dequantize().clone()
    twin.weight._scale.zero_()
    assert torch.equal(module.weight.dequantize(), before)
    assert not torch.equal(twin.weight.dequantize(), before)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_quanto_load_as_quanto_loads_them(kind):
    them = quanto.QuantizedModelForCausalLM.from_pretrained(str(DATA / kind))
    model = dq.load(DATA / kind)
    assert len(model.distquant.plan.converted) == 7
    for name in model.distquant.plan.converted:
        mine, its = model.get_submodule(name).state_dict(), them._wrapped.get_submodule(name).state_dict()
        assert mine.keys() == its.keys()
        assert all(same(mine[key], its[key]) for key in mine)
    for name in model.distquant.plan.converted:
        weight = them._wrapped.get_submodule(name).weight
        if kind == "int8":  # mapped at odd bytes of the file, where torch 2.13's int8 product of AVX-512 crashes
            weight._data = weight._data.clone()
    with torch.no_grad():
        mine, its = model(IDS).logits, them(IDS).logits
    assert (mine - its.to(mine.dtype)).norm() / its.norm() < 2e-2  # quanto computes in float32 what was not quantized


def test_names_of_the_state_are_those_of_the_file():
    stored = load_file(DATA / "int4" / "model.safetensors")
    assert set(stored) <= set(dq.load(DATA / "int4").state_dict())


def test_mixed_kinds_and_activations_are_refused(tmp_path, model_of):
    folder = shutil.copytree(DATA / "int8", tmp_path / "model")
    found = json.loads((folder / "quanto_qmap.json").read_text())
    found["model.layers.0.mlp.up_proj"]["weights"] = "qint4"
    (folder / "quanto_qmap.json").write_text(json.dumps(found))
    with pytest.raises(dq.InputError, match="'int4, int8' is not allowed"):
        dq.plan(folder)
    quant = {"quant_method": "quanto", "weights": "int8", "activations": "int8"}
    with pytest.raises(dq.InputError, match=r"activations.*calibration"):
        dq.plan(model_of("llama-352"), quantization_config=quant)


@pytest.mark.parametrize(("kind", "whole"), [("int8", False), ("int4", True)])
def test_the_plan_says_that_packed_weights_go_whole(kind, whole):
    notes = dq.plan(DATA / kind, mesh="tp=2").notes
    assert any(note.startswith("taken whole by every rank") for note in notes) == whole


def test_other_codes_than_the_map_says_are_refused(tmp_path):
    folder = shutil.copytree(DATA / "int8", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight._data"] = tensors["model.layers.0.mlp.up_proj.weight._data"].short()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(dq.InputError, match=r"up_proj.weight: weight is stored as I16, and must be I8"):
        dq.plan(folder)


def test_a_broken_map_is_refused(tmp_path):
    folder = shutil.copytree(DATA / "int8", tmp_path / "model")
    (folder / "quanto_qmap.json").write_text("[1]")
    with pytest.raises(dq.InputError, match=r"quanto_qmap.json.*not a JSON object"):
        dq.plan(folder)
