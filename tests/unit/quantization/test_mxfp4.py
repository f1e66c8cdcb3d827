"""`mxfp4`: stored as gpt-oss has it, quantized on the way as defined, refused where it cannot work."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import save_as_stored
from quantized import Tensors, rewrite
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import distquant as dq
from distquant.config import Mxfp4Config
from distquant.errors import InputError
from distquant.kernels import reference
from distquant.quantization import Shard
from distquant.quantization.linear.quantized_linear import QuantizedLinear
from distquant.quantization.registry import scheme_for
from distquant.sharding.partition import Partition, even_partition

METHOD = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
UP = "model.layers.0.mlp.up_proj"
IDS = torch.tensor([[5, 17, 99, 3, 42, 42, 8, 110]])


def stored(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight_blocks` `[N, K / 32, 16]` and `weight_scales` `[N, K / 32]`."""
    codes, scale = reference.quantize_mxfp4(weight)
    return codes.view(*scale.shape, 16), scale


def by_transformers(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`[N, K]`, as transformers dequantizes the one expert of a fused weight."""
    return convert_moe_packed_tensors(blocks[None], scales[None], dtype=dtype)[0].T.contiguous()


def split(name: str, weight: Tensor) -> Tensors:
    blocks, scales = stored(weight)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}


def linears(model: Any) -> dict[str, Any]:
    return {name: model.get_submodule(name) for name in model.distquant.plan.converted}


@pytest.fixture(scope="module")
def quantized(model_of, tmp_path_factory) -> Path:
    """A dense checkpoint whose projections are stored as gpt-oss stores an expert's."""
    folder = tmp_path_factory.mktemp("mxfp4") / "llama-352"
    shutil.copytree(model_of("llama-352"), folder)
    return rewrite(folder, METHOD, "_proj.", split)


@pytest.fixture
def spoiled(quantized: Path, tmp_path: Path) -> Callable[[Tensors | dict[str, Any]], Path]:
    """The checkpoint with changed tensors; None removes one."""

    def copy(changes: dict[str, Any]) -> Path:
        folder = tmp_path / "spoiled"
        shutil.copytree(quantized, folder)
        tensors = load_file(folder / "model.safetensors")
        for name, change in changes.items():
            value = tensors.pop(name, None)
            tensors |= {} if change is None else {name: change(value)}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return copy


# -- stored ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_stored_weights_are_held_as_they_are_and_dequantized_as_by_transformers(quantized: Path, dtype: str) -> None:
    model, tensors = dq.load(quantized, dtype=dtype), load_file(quantized / "model.safetensors")
    assert model.distquant.plan.memory[0].quantized == model.distquant.report.quantized_bytes
    assert len(linears(model)) == 14
    for name, module in linears(model).items():
        assert type(module) is QuantizedLinear
        blocks, scales = tensors[f"{name}.weight_blocks"], tensors[f"{name}.weight_scales"]
        assert torch.equal(module.components[""], blocks.flatten(1)), name
        assert torch.equal(module.components["scales"], scales), name
        expected = by_transformers(blocks, scales, getattr(torch, dtype))
        assert torch.equal(module.weight, expected) and module.weight.dtype == expected.dtype, name


def test_logits_are_those_of_the_dequantized_weights(quantized: Path) -> None:
    from transformers import AutoModelForCausalLM

    tensors = load_file(quantized / "model.safetensors")
    state = {name: value for name, value in tensors.items() if value.dtype != torch.uint8}
    for name in tensors:
        if name.endswith("_blocks"):
            scales = tensors[name.replace("_blocks", "_scales")]
            state[name.removesuffix("_blocks")] = by_transformers(tensors[name], scales, torch.bfloat16)
    model = dq.load(quantized)
    config = type(model.config).from_pretrained(quantized)
    del config.quantization_config
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    theirs.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, theirs(IDS).logits)
        assert torch.equal(dq.load(quantized, quantization_config={"dequantize": True, **METHOD})(IDS).logits,
                           theirs(IDS).logits)  # fmt: skip


def test_what_was_saved_once_loads_again(quantized: Path, tmp_path: Path) -> None:
    """Earlier versions saved linear layers; transformers does not read them, so a model now refuses."""
    model = dq.load(quantized)
    assert type(model.config.quantization_config).__name__ == "Mxfp4Config"
    save_as_stored(model, tmp_path)
    assert dq.fingerprint(dq.load(tmp_path)) == dq.fingerprint(model)


def test_scales_may_be_stored_as_float8(quantized: Path, spoiled) -> None:
    path = spoiled({f"{UP}.weight_scales": lambda scales: scales.view(torch.float8_e8m0fnu)})
    assert dq.fingerprint(dq.load(path)) == dq.fingerprint(dq.load(quantized))


def test_weights_that_are_stored_unquantized_stay_so(spoiled, model_of) -> None:
    """gpt-oss's attention, where its list of modules is not consulted."""
    weight = load_file(Path(model_of("llama-352")) / "model.safetensors")[f"{UP}.weight"]
    path = spoiled({f"{UP}.weight_blocks": None, f"{UP}.weight_scales": None, f"{UP}.weight": lambda _: weight})
    plan = dq.plan(path)
    assert UP not in plan.converted and len(plan.converted) == 13
    assert torch.equal(dq.load(path).get_submodule(UP).weight, weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{UP}.weight_scales": None}, "the checkpoint lacks scales of this quantized weight"),
        ({f"{UP}.weight_blocks": None}, "the checkpoint lacks weight of this quantized weight"),
        ({f"{UP}.weight_blocks": lambda b: b[:, :2].clone()}, r"weight is stored as \[352, 2, 16\], its config and"),
        ({f"{UP}.weight_blocks": lambda b: b.view(176, 8, 16)}, r"stored as \[176, 8, 16\], not as \[352, 4, 16\] or "),
        ({f"{UP}.weight_scales": lambda s: s.T.contiguous()}, r"scales is stored as \[4, 352\], not as \[352, 4\]"),
        ({f"{UP}.weight_blocks": lambda b: b.view(torch.int8)}, "weight is stored as I8, and must be U8"),
        ({f"{UP}.weight_scales": lambda s: s.float()}, "scales is stored as F32, and must be U8 or F8_E8M0"),
    ],
)
def test_damaged_files_are_refused_before_a_weight_is_read(changes, message, spoiled) -> None:
    with pytest.raises(InputError, match=rf"{UP}\.weight: .*({message})"):
        dq.plan(spoiled(changes))


# -- on the way --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("family", ["llama-352", "phi3-packed"])
def test_codes_and_scales_are_those_of_the_definition(model_of, family: str, dtype: str) -> None:
    path = model_of(family)
    weights = load_file(Path(path) / "model.safetensors")
    model = dq.load(path, quantization_config="mxfp4", dtype=dtype)
    assert linears(model)
    for name, module in linears(model).items():
        codes, scale = reference.quantize_mxfp4(weights[f"{name}.weight"].to(getattr(torch, dtype)))
        assert torch.equal(module.components[""], codes), name
        assert torch.equal(module.components["scales"], scale), name
    assert model.distquant.plan.memory[0].quantized == model.distquant.report.quantized_bytes


def test_modules_to_not_convert_are_plain_ones(model_of) -> None:
    """Patterns as gpt-oss's own configuration has them."""
    quant = {**METHOD, "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    plan = dq.plan(model_of("llama-gqa"), quantization_config=quant)
    assert len(plan.converted) == 6 and all(".mlp." in name for name in plan.converted)


def test_inputs_that_are_no_multiple_of_32_are_refused(copy_of) -> None:
    folder = copy_of("llama-gqa")
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "mlp" in name]:
        tensors[name] = tensors[name][:, :180].clone() if "down" in name else tensors[name][:180].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = (folder / "config.json").read_text().replace('"intermediate_size": 192', '"intermediate_size": 180')
    (folder / "config.json").write_text(config)
    with pytest.raises(InputError, match=r"0\.mlp\.down_proj\.weight: 180 inputs are not a multiple of 32") as caught:
        dq.plan(folder, quantization_config="mxfp4")
    (problem,) = caught.value.problems
    assert "(and 1 more alike: model.layers.1.mlp.down_proj.weight)" in problem.what
    quant = {**METHOD, "modules_to_not_convert": ["lm_head", "down_proj"]}
    assert len(dq.load(folder, quantization_config=quant).distquant.plan.converted) == 12


# -- slices ------------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 100), st.integers(1, 12), st.integers(0, 1), st.integers(1, 4), st.data())
def test_slicing_what_is_stored_slices_the_weight(rows, runs, dim, ranks, data) -> None:
    shape, scheme = (rows, 32 * runs), scheme_for(Mxfp4Config())
    layout = scheme.layout("m.weight", shape, "float32")
    partitions = [
        partition
        for alignment in layout.alignments(shape, dim)
        if (partition := even_partition(shape[dim], alignment, ranks)) is not None
    ]
    partition = data.draw(st.sampled_from(partitions)) if partitions else Partition(shape[dim], (((0, shape[dim]),),))
    generator = torch.Generator().manual_seed(rows * runs)
    bytes_of = {"": 256, "scales": 255}  # the last scale is NaN
    whole = {
        c.name: torch.randint(0, bytes_of[c.name], c.shape(shape), generator=generator, dtype=torch.uint8)
        for c in layout.components
    }
    truth = scheme.dequantize(Shard("m.weight", shape, "float32"), whole, torch.float32, reference)
    weight = torch.randn(shape, generator=generator)
    codes, scale = reference.quantize_mxfp4(weight)
    for rank in range(len(partition.parts)):
        shard = Shard("m.weight", shape, "float32", dim, partition, rank)

        def kept(name: str, value: Tensor, shard: Shard = shard, rank: int = rank) -> Tensor:
            parts = [layout.component(name).slice(shape, dim, a, b) for a, b in partition.segments(rank)]
            return torch.cat([value.narrow(at, start, stop - start) for at, start, stop in parts], parts[0][0])

        local = {name: kept(name, value) for name, value in whole.items()}
        assert all(value.shape == layout.component(name).shape(shard.local_shape) for name, value in local.items())
        expected = torch.cat([truth.narrow(dim, a, b - a) for a, b in partition.segments(rank)], dim)
        assert torch.equal(scheme.dequantize(shard, local, torch.float32, reference), expected)
        own = torch.cat([weight.narrow(dim, a, b - a) for a, b in partition.segments(rank)], dim)
        found = reference.quantize_mxfp4(own)
        assert torch.equal(found[0], kept("", codes)) and torch.equal(found[1], kept("scales", scale))
