"""`fp8`, `mxfp8` and `fbgemm_fp8`: stored and quantized as transformers has them, refused where they cannot work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Quantize

import distquant as dq
from distquant.config import FbgemmFp8Config, Fp8Config, Mxfp8Config
from distquant.errors import InputError
from distquant.kernels import reference
from distquant.quantization import Shard
from distquant.quantization.registry import scheme_for
from distquant.sharding.layout import Component
from distquant.sharding.partition import Partition, even_partition

DATA = Path(__file__).resolve().parents[2] / "data"
GOLDEN = ("fp8/blocks", "fp8/ue8m0", "fp8/deepseek-v3", "fp8/tensor", "mxfp8", "fbgemm_fp8")
BY_UPSTREAM = ("fp8/blocks", "fp8/ue8m0", "fp8/tensor", "mxfp8")
"""Those that transformers loads on a CPU; it infers tiles from shapes, which ragged ones mislead."""
TILES = {"quant_method": "fp8", "weight_block_size": [32, 32]}
IDS = torch.tensor([[5, 17, 99, 3, 42, 42, 8, 110]])


def linears(model: Any) -> dict[str, Any]:
    return {name: model.get_submodule(name) for name in model.distquant.plan.converted}


def same_bits(a: Tensor, b: Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def upstream(weight: Tensor, tile: tuple[int, int] | None, scale_fmt: str = "float") -> tuple[Tensor, Tensor]:
    """Codes and scales of transformers, which takes no ragged tiles: of the weight with zeros around it."""
    tile = tile or (weight.shape[0], weight.shape[1])
    rows, columns = (-size % part for size, part in zip(weight.shape, tile, strict=True))
    config = SimpleNamespace(weight_block_size=tile, scale_fmt=scale_fmt)
    padded = torch.nn.functional.pad(weight, (0, columns, 0, rows))
    found = Fp8Quantize(SimpleNamespace(quantization_config=config)).convert({"m.weight": padded})
    return found["m.weight"][: weight.shape[0], : weight.shape[1]], found["m.weight_scale_inv"]


def scale_name(module: Any) -> str:
    (name,) = (name for name in module.components if "scale" in name and name != "activation_scale")
    return name


@pytest.fixture
def spoiled(tmp_path: Path) -> Callable[..., Path]:
    """A golden checkpoint with changed tensors (None removes one) and configuration (None leaves a key out)."""

    def copy(name: str, tensors: dict[str, Any] | None = None, **config: Any) -> Path:
        folder = tmp_path / name.replace("/", "-")
        shutil.copytree(DATA / name, folder)
        stored = load_file(folder / "model.safetensors")
        for key, change in (tensors or {}).items():
            found = None if change is None else change(stored.get(key))
            stored = {k: v for k, v in stored.items() if k != key} | ({} if found is None else {key: found})
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
        written = json.loads((folder / "config.json").read_text())
        quantization = {**written["quantization_config"], **config}
        written["quantization_config"] = {k: v for k, v in quantization.items() if v is not None or k in TILES}
        (folder / "config.json").write_text(json.dumps(written))
        return folder

    return copy


# -- stored ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_checkpoints_are_held_as_they_are_stored(name: str) -> None:
    stored = load_file(DATA / name / "model.safetensors")
    model = dq.load(DATA / name)
    state = model.state_dict()
    assert model.distquant.plan.memory[0].quantized == model.distquant.report.quantized_bytes
    assert len(linears(model)) == 7 + name.endswith("v3")
    for key, value in stored.items():
        if value.dtype == torch.uint8:
            value = value.view(torch.float8_e8m0fnu)
        assert same_bits(state[key], value), key
    assert not [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_meta]


@pytest.mark.parametrize("name", BY_UPSTREAM)
def test_golden_weights_and_logits_are_those_of_transformers(name: str) -> None:
    """On a CPU transformers dequantizes to bfloat16 at load."""
    from transformers import AutoModelForCausalLM

    theirs, ours = AutoModelForCausalLM.from_pretrained(DATA / name, dtype=torch.bfloat16), dq.load(DATA / name)
    for path, module in linears(ours).items():
        assert same_bits(module.weight, theirs.get_submodule(path).weight.data), path
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_weights_are_products_of_codes_and_scales(name: str) -> None:
    ours = dq.load(DATA / name, dtype="float32")
    stored = load_file(DATA / name / "model.safetensors")
    ragged = 0
    for path, module in linears(ours).items():
        scale = stored[f"{path}.{scale_name(module)}"]
        scale = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
        tile = {"fp8/tensor": tuple(module.weight.shape), "mxfp8": (1, 32), "fbgemm_fp8": (1, module.in_features)}
        rows, columns = tile.get(name, (32, 32))
        ragged += module.in_features % columns > 0
        spread = torch.atleast_2d(scale).repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        expected = stored[f"{path}.weight"].float() * spread[: module.out_features, : module.in_features]
        assert torch.equal(module.weight, expected), path
    assert (ragged > 0) == (name == "fp8/deepseek-v3")


@pytest.mark.parametrize("name", GOLDEN)
def test_what_is_saved_loads_again(name: str, tmp_path: Path) -> None:
    model = dq.load(DATA / name)
    model.save_pretrained(tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == load_file(DATA / name / "model.safetensors").keys()
    assert dq.fingerprint(dq.load(tmp_path)) == dq.fingerprint(model)
    if name in BY_UPSTREAM:
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_of_16_bits_are_widened(dtype: torch.dtype, spoiled) -> None:
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    model = dq.load(spoiled("fp8/blocks", {name: lambda scale: scale.to(dtype)}))
    expected = load_file(DATA / "fp8/blocks" / "model.safetensors")[name].to(dtype).float()
    assert same_bits(model.get_submodule("model.layers.0.mlp.up_proj").weight_scale_inv, expected)


def test_powers_of_two_may_be_stored_as_float32(spoiled) -> None:
    """As DeepSeek-V3.1 does under `scale_fmt` "ue8m0"."""
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    path = spoiled("fp8/ue8m0", {name: lambda scale: scale.float()})
    assert dq.fingerprint(dq.load(path)) == dq.fingerprint(dq.load(DATA / "fp8/ue8m0"))


def test_float32_scales_that_are_no_powers_of_two_are_refused(spoiled) -> None:
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    path = spoiled("fp8/ue8m0", {name: lambda scale: scale.float() * 1.5})
    with pytest.raises(
        InputError, match=r"up_proj\.weight: its weight_scale_inv has values that are not powers of two"
    ):
        dq.load(path)


def test_exponents_without_their_scale_fmt_keep_their_value(spoiled) -> None:
    path = spoiled("fp8/ue8m0", scale_fmt="float")
    model = dq.load(path)
    assert model.get_submodule("model.layers.0.mlp.up_proj").weight_scale_inv.dtype == torch.float32
    whole = dq.load(DATA / "fp8/ue8m0")
    assert torch.equal(model(IDS).logits, whole(IDS).logits)


def test_a_weight_without_a_scale_stays_unquantized(spoiled) -> None:
    module = "model.layers.0.mlp.up_proj"
    changes = {f"{module}.weight": lambda weight: weight.bfloat16(), f"{module}.weight_scale_inv": None}
    plan = dq.plan(spoiled("fp8/blocks", changes))
    assert module not in plan.converted and len(plan.converted) == 6
    (tensor,) = (tensor for tensor in plan.tensors if tensor.name == f"{module}.weight")
    assert (tensor.scheme, tensor.dtype) == ("none", "bfloat16")


def test_modules_to_not_convert_are_plain_ones(model_of) -> None:
    quant = {**TILES, "modules_to_not_convert": ["lm_head", ".*mlp"]}
    plan = dq.plan(model_of("llama-gqa"), quantization_config=quant)
    assert plan.converted and all("self_attn" in name for name in plan.converted)


# -- on the way --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "quant",
    [
        {**TILES},
        {**TILES, "scale_fmt": "ue8m0"},
        {**TILES, "weight_block_size": [48, 80]},
        {**TILES, "weight_block_size": [48, 80], "scale_fmt": "ue8m0"},
        "fp8",
        "fp8-tensor",
        "mxfp8",
    ],
)
@pytest.mark.parametrize("family", ["llama-352", "phi3-packed"])
def test_codes_and_scales_are_those_of_transformers(model_of, family: str, quant: Any, dtype: str) -> None:
    """float32 weights here are bfloat16 ones, cast; see `kernels/reference/fp8.py` for logarithms of others."""
    path = model_of(family)
    model, weights = dq.load(path, quantization_config=quant, dtype=dtype), load_file(Path(path) / "model.safetensors")
    config = model.distquant.scheme.config
    for name, module in linears(model).items():
        codes, scale = upstream(weights[f"{name}.weight"], config.weight_block_size, config.scale_fmt)
        assert same_bits(module.components[""], codes), name
        assert same_bits(module.weight_scale_inv, scale if config.weight_block_size else scale.view(())), name


def test_rows_are_those_of_fbgemm(model_of) -> None:
    """Its function exists for GPUs only; this is its definition, with divisions in float32."""
    path = model_of("llama-352")
    weights = load_file(Path(path) / "model.safetensors")
    for name, module in linears(dq.load(path, quantization_config="fbgemm_fp8")).items():
        weight = weights[f"{name}.weight"].float()
        scale = (weight.abs().amax(1, keepdim=True).double() / 448).float()
        assert same_bits(module.weight_scale, scale), name
        assert same_bits(module.components[""], (weight.double() / scale.double()).float().to(torch.float8_e4m3fn))


def test_fbgemm_quantizes_what_bfloat16_is_left_of_a_weight(copy_of) -> None:
    folder = copy_of("llama-gqa")
    weights = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] *= 1.001
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    module = dq.load(folder, quantization_config="fbgemm_fp8", dtype="float32").get_submodule(name[:-7])
    codes, scale = reference.quantize_fp8_rows(weights[name].bfloat16())
    assert same_bits(module.components[""], codes) and same_bits(module.weight_scale, scale)
    assert not same_bits(scale, reference.quantize_fp8_rows(weights[name])[1])


# -- refused -----------------------------------------------------------------------------------------------------------

UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        ("fp8/blocks", {f"{UP}.weight_scale_inv": lambda s: s[:, :1].clone()}, r"_scale_inv is stored as \[3, 1\]"),
        ("fp8/blocks", {f"{UP}.weight_scale_inv": lambda s: s.T.contiguous()}, r"stored as \[2, 3\], not as \[3, 2\]"),
        ("fp8/blocks", {f"{UP}.weight": lambda w: w.T.contiguous()}, r"stored as \[64, 96\], not as \[96, 64\]"),
        ("fp8/blocks", {f"{UP}.weight": lambda w: w.to(torch.float8_e5m2)}, r"stored as F8_E5M2, and must be F8_E4M3"),
        ("fp8/blocks", {f"{UP}.weight": lambda w: w.view(torch.int8)}, r"weight is stored as I8, and must be F8_E4M3"),
        ("fp8/blocks", {f"{UP}.weight_scale_inv": lambda s: s.to(torch.int32)}, r"stored as I32, and must be F32 or "),
        ("fp8/blocks", {f"{UP}.weight_scale_inv": None}, r"lacks weight_scale_inv of this quantized weight"),
        ("fp8/blocks", {f"{UP}.activation_scale": lambda _: torch.ones(())}, r"_scale is stored, and .*'dynamic'"),
        ("fp8/tensor", {f"{UP}.activation_scale": None}, r"lacks activation_scale of this quantized weight"),
        ("fp8/tensor", {f"{UP}.weight_scale_inv": lambda _: torch.ones(2)}, r"weight_scale_inv is stored as \[2\]"),
        ("fbgemm_fp8", {f"{UP}.weight_scale": None}, r"lacks weight_scale of this quantized weight"),
        ("fbgemm_fp8", {f"{UP}.weight": lambda w: w.T.contiguous()}, r"stored as \[64, 96\], not as \[96, 64\]"),
        ("fbgemm_fp8", {f"{UP}.weight": lambda w: w.to(torch.float8_e5m2)}, r"stored as F8_E5M2, and must be F8_E4M3"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused_before_a_weight_is_read(name, tensors, message, spoiled) -> None:
    with pytest.raises(InputError, match=rf"{UP}\.weight: .*{message}"):
        dq.plan(spoiled(name, tensors))


def test_all_problems_are_told_at_once(spoiled) -> None:
    gate = UP.replace("up", "gate")
    changes = {f"{UP}.weight_scale_inv": lambda s: s[:1].clone(), f"{gate}.weight": lambda w: w.to(torch.float8_e5m2)}
    with pytest.raises(InputError) as caught:
        dq.plan(spoiled("fp8/blocks", changes, modules_to_convert=["embed_tokens"], expert_dtype="fp4"))
    told = {problem.where for problem in caught.value.problems}
    fields = {f"quantization_config.{field}" for field in ("modules_to_convert", "expert_dtype")}
    assert told == {f"{UP}.weight", f"{gate}.weight", *fields}


def test_a_tile_that_the_config_does_not_state_is_not_inferred(spoiled) -> None:
    with pytest.raises(InputError, match=r"weight_scale_inv is stored as \[3, 2\], its config and shape need \[1, 1\]"):
        dq.plan(spoiled("fp8/blocks", weight_block_size=[128, 128]))


@pytest.mark.parametrize(
    ("quant", "message"),
    [
        ({**TILES, "activation_scheme": "static"}, r"activation_scheme: 'static' needs scales that were calibrated"),
        ({**TILES, "weight_block_size": None, "scale_fmt": "ue8m0"}, r"scale_fmt: 'ue8m0' is for tiles"),
        ({**TILES, "modules_to_convert": ["embed_tokens"]}, r"modules_to_convert: \['embed_tokens'\] names further"),
        ({**TILES, "expert_dtype": "fp4"}, r"expert_dtype: experts stored as 'fp4' are not supported"),
        (
            {"quant_method": "mxfp8", "weight_block_size": [128, 128]},
            r"weight_block_size: \[128, 128\] is not the tile of MXFP8",
        ),
        ({"quant_method": "mxfp8", "scale_fmt": "float"}, r"scale_fmt: 'float' is not MXFP8"),
    ],
)
def test_what_cannot_be_quantized_is_refused(quant, message, model_of) -> None:
    with pytest.raises(InputError, match=rf"quantization_config\.{message}"):
        dq.plan(model_of("llama-gqa"), quantization_config=quant)


# -- slices ------------------------------------------------------------------------------------------------------------

CONFIGS = [
    Fp8Config(weight_block_size=(32, 16)),
    Fp8Config(weight_block_size=(3, 128), scale_fmt="ue8m0"),
    Fp8Config(weight_block_size=None, activation_scheme="static"),
    Mxfp8Config(weight_block_size=(1, 32), scale_fmt="ue8m0"),
    FbgemmFp8Config(),
]


def components_of(scheme: Any, shape: tuple[int, int], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for component in scheme.layout("m.weight", shape, "float32").components:
        size = component.shape(shape)
        values = torch.randn(size, generator=generator).abs() * 3 if component.name else torch.randn(size) * 100
        found[component.name] = values.to(getattr(torch, component.dtype))
    return found


def sliced(component: Component, value: Tensor, shard: Shard) -> Tensor:
    """What a shard holds of a stored component."""
    dim = shard.shard_dim
    parts = [component.slice(shard.shape, dim, a, b) for a, b in shard.partition.segments(shard.rank)]
    if None in parts:
        return value
    return torch.cat([value.narrow(at, start, stop - start) for at, start, stop in parts], parts[0][0])


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(CONFIGS), st.integers(1, 200), st.integers(1, 300), st.integers(0, 1), st.integers(1, 4), st.data()
)
def test_slicing_what_is_stored_slices_the_weight(config, rows, columns, dim, ranks, data) -> None:
    shape, scheme = (rows, columns), scheme_for(config)
    layout = scheme.layout("m.weight", shape, "float32")
    partitions = [
        partition
        for alignment in layout.alignments(shape, dim)
        if (partition := even_partition(shape[dim], alignment, ranks)) is not None
    ]
    partition = data.draw(st.sampled_from(partitions)) if partitions else Partition(shape[dim], (((0, shape[dim]),),))
    whole = components_of(scheme, shape, rows * columns)
    truth = scheme.dequantize(Shard("m.weight", shape, "float32"), whole, torch.float32, reference)
    for rank in range(len(partition.parts)):
        shard = Shard("m.weight", shape, "float32", dim, partition, rank)
        local = {c.name: sliced(c, whole[c.name], shard) for c in layout.components}
        assert all(value.shape == layout.component(name).shape(shard.local_shape) for name, value in local.items())
        expected = torch.cat([truth.narrow(dim, a, b - a) for a, b in partition.segments(rank)], dim)
        assert torch.equal(scheme.dequantize(shard, local, torch.float32, reference), expected)


def test_the_plan_counts_what_a_scale_of_the_tensor_waits_for(model_of) -> None:
    """Rows stay in 16 bits until the last one has told its largest magnitude."""
    tiles, whole = (
        dq.plan(model_of("llama-352"), quantization_config=quant, mesh="tp=2", dtype="bfloat16", staging="1MiB")
        for quant in ("fp8", "fp8-tensor")
    )
    assert [row.staging for row in tiles.memory] == [2**20] * 2
    assert [row.staging for row in whole.memory] == [2**20 + 2 * 176 * 128] * 2
