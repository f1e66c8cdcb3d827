"""torchao: the bits of its own `quantize_`, its own files, slices, and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from flowed import filled, same
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import distquant as dq
from distquant.config import TorchaoConfig
from distquant.quantization import Shard, scheme_for
from distquant.quantization.methods.torchao import SCALE, ZERO, TorchaoScheme
from distquant.sharding.partition import even_partition

torchao = pytest.importorskip("torchao.quantization")
DATA = Path(__file__).parents[2] / "data" / "torchao"
GOLDEN = ("int8-row", "int8-tensor", "fp8-row", "fp8-tensor", "int4-group")
IDS = torch.tensor([[5, 17, 99, 3, 42], [90, 2, 31, 77, 12]])


def configs() -> dict[str, Any]:
    from torchao.quantization import MappingType, PerGroup, PerTensor
    from torchao.quantization import quant_api as api

    group = PerGroup(32)
    return {
        "int8": api.Int8WeightOnlyConfig(),
        "int8-tensor": api.Int8WeightOnlyConfig(granularity=PerTensor()),
        "int8-group": api.Int8WeightOnlyConfig(granularity=group),
        "int8-dynamic": api.Int8DynamicActivationInt8WeightConfig(),
        "int8-dynamic-reduced": api.Int8DynamicActivationInt8WeightConfig(reduce_range=True),
        "int8-dynamic-tensor": api.Int8DynamicActivationInt8WeightConfig(granularity=PerTensor()),
        "fp8": api.Float8WeightOnlyConfig(),
        "fp8-tensor": api.Float8WeightOnlyConfig(granularity=PerTensor()),
        "fp8-group": api.Float8WeightOnlyConfig(granularity=group),
        "fp8-e5m2": api.Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2),
        "int4": api.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=group),
        "int4-row": api.IntxWeightOnlyConfig(weight_dtype=torch.int4),
        "int3-asymmetric": api.IntxWeightOnlyConfig(
            weight_dtype=torch.int3, granularity=group, mapping_type=MappingType.ASYMMETRIC
        ),
    }


NAMES = tuple(configs())


def scheme_of(name: str) -> TorchaoScheme:
    found = scheme_for(TorchaoConfig.from_dict({"quant_method": "torchao", "quant_type": configs()[name]}))
    assert isinstance(found, TorchaoScheme)
    return found


def theirs(name: str, weight: torch.Tensor) -> Any:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    torchao.quantize_(linear, configs()[name])
    return linear


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_bits_and_forward_equal_those_of_torchao(name, dtype):
    torch.manual_seed(0)
    weight = (torch.randn(48, 96) * torch.rand(48, 1)).to(getattr(torch, dtype))
    scheme, them = scheme_of(name), theirs(name, weight)
    module = filled(scheme, Shard("m.weight", (48, 96), dtype), weight, step=7)
    assert type(module) is nn.Linear
    assert type(module.weight) is type(them.weight)
    for field in ("qdata", "scale", *(["zero_point"] if hasattr(them.weight, "zero_point") else [])):
        assert same(getattr(module.weight, field), getattr(them.weight, field)), field
    for field in them.weight.tensor_attribute_names + getattr(them.weight, "optional_tensor_attribute_names", []):
        mine, its = getattr(module.weight, field), getattr(them.weight, field)
        assert (list(mine) == list(its)) if field == "block_size" else mine == its, field
    x = torch.randn(2, 3, 96, dtype=weight.dtype)
    assert torch.equal(module(x), them(x))


@pytest.mark.parametrize("name", ["fp8", "fp8-tensor", "fp8-group"])
def test_zeros_stay_zeros_in_float8(name):
    weight = torch.randn(8, 64, dtype=torch.bfloat16)
    weight[3] = 0
    weight = weight * 0 if name == "fp8-tensor" else weight
    module = filled(scheme_of(name), Shard("m.weight", (8, 64), "bfloat16"), weight, step=8)
    found = module.weight.dequantize()
    assert bool(found.isfinite().all())
    assert bool((found[3] == 0).all())


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from([name for name in NAMES if "dynamic" not in name]),
    rows=st.integers(1, 40),
    groups=st.integers(2, 6),
    dim=st.sampled_from([0, 1]),
    ranks=st.integers(2, 4),
    step=st.integers(1, 9),
    seed=st.integers(0, 5),
)
def test_shards_dequantize_to_slices_of_the_whole(name, rows, groups, dim, ranks, step, seed):
    weight = torch.randn(rows, groups * 32, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    scheme, shape = scheme_of(name), (rows, groups * 32)
    alignment = scheme.layout("m.weight", shape, "bfloat16").alignments(shape, dim)[-1]
    partition = even_partition(shape[dim], alignment, ranks)
    if partition is None:
        return
    whole = theirs(name, weight).weight.dequantize()
    for rank in range(ranks):
        shard = Shard("m.weight", shape, "bfloat16", dim, partition, rank)
        expected = torch.cat([whole.narrow(dim, a, b - a) for a, b in partition.segments(rank)], dim)
        assert torch.equal(filled(scheme, shard, weight, step).weight.dequantize(), expected)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GOLDEN)
def test_files_of_transformers_load_as_transformers_loads_them(kind):
    from transformers import AutoModelForCausalLM

    them = AutoModelForCausalLM.from_pretrained(DATA / kind, dtype=torch.bfloat16)
    model = dq.load(DATA / kind)
    for name in model.distquant.plan.converted:
        mine, its = model.get_submodule(name).weight, them.get_submodule(name).weight
        assert type(mine) is type(its)
        assert same(mine.qdata, its.qdata)
        assert same(mine.scale, its.scale)
        assert list(mine.block_size) == list(its.block_size)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, them(IDS).logits)


def test_what_is_saved_is_what_transformers_saves(tmp_path):
    dq.load(DATA / "int8-row").save_pretrained(tmp_path)
    mine, its = (load_file(folder / "model.safetensors") for folder in (tmp_path, DATA / "int8-row"))
    assert mine.keys() == its.keys()
    assert all(same(mine[name], its[name]) for name in mine)


def test_other_codes_than_the_configuration_says_are_refused(tmp_path):
    folder = shutil.copytree(DATA / "int8-row", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    other = json.loads((DATA / "fp8-row" / "config.json").read_text())["quantization_config"]
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": other}))
    with pytest.raises(dq.InputError, match=r"q_proj\.weight: weight is stored as I8, and must be F8_E4M3 \(and 6"):
        dq.plan(folder)


@pytest.mark.parametrize(
    ("component", "message"), [(SCALE, "lacks _weight_scale"), (ZERO, "lacks _weight_zero_point"), (None, "act_pre")]
)
def test_missing_and_unknown_components_are_told_before_loading(tmp_path, component, message):
    folder = shutil.copytree(DATA / "int8-row", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    module = "model.layers.0.mlp.up_proj."
    if component:
        del tensors[module + component]
    else:
        tensors[module + "_weight_act_pre_scale"] = torch.ones(64)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(dq.InputError, match=rf"up_proj.*{message}"):
        dq.plan(folder)


def test_what_cannot_work_is_refused_with_what_to_take(model_of):
    from torchao.quantization import PerGroup, PerRow
    from torchao.quantization import quant_api as api

    def refusal(kind: Any, **more: Any) -> str:
        quant = {"quant_method": "torchao", "quant_type": kind, **more}
        with pytest.raises(dq.InputError) as caught:
            dq.plan(model_of("llama-352"), quantization_config=quant)
        return str(caught.value)

    assert "IntxWeightOnlyConfig" in refusal(api.Int4WeightOnlyConfig())
    assert "Float8WeightOnlyConfig" in refusal(api.Float8DynamicActivationFloat8WeightConfig())
    assert "embeddings" in refusal(api.Int8WeightOnlyConfig(), include_input_output_embeddings=True)
    assert "for each column" in refusal(api.Int8WeightOnlyConfig(granularity=PerRow(0)))
    old = {"default": {"_type": "Int8WeightOnlyConfig", "_version": 1, "_data": {"version": 1}}}
    assert "has been removed" in refusal(old)
    hqq = api.IntxWeightOnlyConfig(weight_dtype=torch.int4, intx_choose_qparams_algorithm="hqq_scale_only")
    assert "intx_choose_qparams_algorithm" in refusal(hqq)
    uneven = refusal(api.Int8WeightOnlyConfig(granularity=PerGroup(128)))
    assert "down_proj" in uneven
    assert "352" in uneven
