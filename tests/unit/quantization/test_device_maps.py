"""Weights that are moved for each forward: equal to a load without a map, or refused in the plan, as the table says."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from safetensors.torch import load_file

import distquant as dq
from distquant.config import parse
from distquant.loading.loader import scheme_of
from distquant.loading.offload import Offloaded
from distquant.quantization import Scheme, config_classes
from distquant.quantization.bitsandbytes_base import BitsandbytesScheme
from distquant.quantization.registry import discover

pytestmark = pytest.mark.wide

REPOSITORY = Path(__file__).resolve().parents[3]
DATA = REPOSITORY / "tests" / "data"
KJV = REPOSITORY / "examples" / "models" / "kjv-tiny"

NAMES = sorted({name for kind in config_classes() for name in kind.short_names} - {"nvfp4", "torchao-int4"})
"""All that run on a CPU."""
STORED = sorted(str(path.relative_to(DATA)) for path in [*DATA.rglob("config.json"), *DATA.rglob("*.gguf")])
FOLDERS = [f"data/{name.removesuffix('/config.json')}" for name in STORED]
DISK: dict[str, Any] = {"": "disk"}
MIXED: dict[str, Any] = {"": "cpu", "model.layers.0": "disk", "model.layers.0.input_layernorm": "cpu"}
"""With places inside others."""
MAPS = {"disk": DISK, "mixed": MIXED}


def arguments(case: str) -> tuple[str, Any]:
    return (str(DATA / case.removeprefix("data/")), None) if case in FOLDERS else (str(KJV), case)


def load(case: str, device_map: dict[str, Any] | None = None) -> Any:
    path, quant = arguments(case)
    return dq.load(path, quantization_config=quant, device_map=device_map)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 20)[None]).logits


@cache
def scheme_in(case: str) -> Scheme:
    path, quant = arguments(case)
    return scheme_of(dq.plan(path, quantization_config=quant))


@cache
def whole(case: str) -> tuple[torch.Tensor, str]:
    model = load(case)
    return logits(model), dq.fingerprint(model)


def same(model: Any, case: str) -> None:
    expected, fingerprint = whole(case)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), expected)  # a hook that spoils a weight does so when it takes it away
    assert dq.fingerprint(model) == fingerprint


@pytest.mark.parametrize(
    ("case", "kind"), [*((case, "disk") for case in [*NAMES, *FOLDERS]), *((case, "mixed") for case in NAMES)]
)
def test_on_disk_equal_or_refused(case: str, kind: str) -> None:
    device_map = MAPS[kind]
    scheme = scheme_in(case)
    if "disk" in scheme.unmoved or isinstance(scheme, BitsandbytesScheme):
        path, quant = arguments(case)
        with pytest.raises(dq.InputError, match=r"^device_map: .*disk"):
            dq.plan(path, quantization_config=quant, device_map=device_map)
        return
    model = load(case, device_map)
    attention = model.model.layers[0].self_attn

    def is_there() -> set[bool]:
        return {not value.is_meta for value in (*attention.parameters(), *attention.buffers())}

    assert is_there() == {False}
    same(model, case)
    assert is_there() == {False}


@pytest.mark.parametrize("case", [*NAMES, *FOLDERS])
def test_accelerates_hooks_without_offloading(case: str) -> None:
    model = load(case)
    accelerate.dispatch_model(model, {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True)
    same(model, case)


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize(
    "case", ["none", "fp8", "gptq-rtn", "mxfp4", "int4", "torchao-int8", "torchao-fp8", "data/gguf/tiny.gguf"]
)
def test_accelerates_cpu_offload(case: str, buffers: bool) -> None:
    """What a map with CPU beside a GPU does, without a GPU."""
    assert "cpu" not in scheme_in(case).unmoved
    model = load(case)
    same(accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=buffers), case)


@pytest.mark.parametrize("case", [name for name in NAMES if name not in ("none",)])
def test_cpu_beside_a_gpu_is_planned_or_refused(case: str) -> None:
    scheme = scheme_in(case)
    path, quant = arguments(case)
    device_map = {"": 0, "model.layers.0": "cpu"}
    if "cpu" in scheme.unmoved:
        told = rf"^device_map: model\.layers\.0\..* more of {scheme.name} cannot be on cpu beside cuda:0: .* none, "
        with pytest.raises(dq.InputError, match=told):
            dq.plan(path, quantization_config=quant, device_map=device_map)
    elif not isinstance(scheme, BitsandbytesScheme):
        assert dq.plan(path, quantization_config=quant, device_map=device_map).device_map == {
            **device_map,
            "": "cuda:0",
        }


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_bitsandbytes_on_disk_stays_unquantized_where_that_is_allowed(quant: str) -> None:
    config = parse(quant, config_classes())
    given = {**config.to_dict(), "llm_int8_enable_fp32_cpu_offload": True}
    model = dq.load(KJV, quantization_config=given, device_map=DISK)
    assert torch.equal(logits(model), whole("none")[0])
    assert dq.fingerprint(model) == whole("none")[1]


@pytest.mark.parametrize("family", ["mixtral", "deepseek-v3", "nemotron-h"])
def test_mixtures_on_disk(family: str, moe_of: Any) -> None:
    """Routers of DeepSeek-V3 and Nemotron-H have a buffer that is read outside of their forward."""
    path = moe_of(family)
    plain, on_disk = dq.load(path), dq.load(path, device_map=DISK)
    for _ in range(2):
        assert torch.equal(logits(on_disk), logits(plain))
    assert dq.fingerprint(on_disk) == dq.fingerprint(plain)


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("quant", ["fp8", "mxfp4", "torchao-int8"])
def test_quantized_experts_by_accelerates_cpu_offload(quant: str, buffers: bool, moe_of: Any) -> None:
    plain, moved = (dq.load(moe_of("mixtral"), quantization_config=quant) for _ in range(2))
    accelerate.cpu_offload(moved, execution_device=torch.device("cpu"), offload_buffers=buffers)
    assert torch.equal(logits(moved), logits(plain))
    assert dq.fingerprint(moved) == dq.fingerprint(plain)


@pytest.mark.parametrize("quant", ["quanto-int8", "quanto-int4"])
def test_experts_in_components_with_dots_in_their_names(quant: str, moe_of: Any) -> None:
    model = dq.load(moe_of("mixtral"), quantization_config=quant)
    dense = dq.load(moe_of("mixtral"))
    stack = model.model.layers[0].mlp.experts.stack("down_proj")
    expected = dense.model.layers[0].mlp.experts.down_proj[3]
    assert (stack.dequantized(3) - expected).abs().max() < expected.abs().max() / 4


def files_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("device_map", MAPS.values(), ids=MAPS.keys())
@pytest.mark.parametrize("case", ["none", "fp8", "mxfp8", "data/compressed_tensors/int8-w8a8", "data/gptq/v1-4bit"])
def test_saving_what_is_on_disk(case: str, device_map: dict[str, Any], tmp_path: Path) -> None:
    """The stored checkpoints tie their embeddings, too."""
    load(case).save_pretrained(tmp_path / "plain")
    load(case, device_map).save_pretrained(tmp_path / "disk")
    expected, found = files_of(tmp_path / "plain"), files_of(tmp_path / "disk")
    assert found.keys() == expected.keys() and not any("stored_weight" in name for name in found)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name].view(torch.uint8), value.view(torch.uint8)), name


def test_dequantized_on_disk() -> None:
    given = {"quantization_config": {"dequantize": True}}
    plain, on_disk = (
        dq.load(DATA / "fp8" / "blocks", **given),
        dq.load(DATA / "fp8" / "blocks", **given, device_map=DISK),
    )
    assert torch.equal(logits(on_disk), logits(plain))
    assert dq.fingerprint(on_disk) == dq.fingerprint(plain)


def test_state_dicts_name_stored_weights_as_checkpoints_do() -> None:
    one, other = load("fp8"), load("fp8")
    module = one.model.layers[0].mlp.up_proj
    state = {name: value.clone() for name, value in one.state_dict().items()}
    assert state["model.layers.0.mlp.up_proj.weight"].dtype == torch.float8_e4m3fn
    assert all(getattr(module, name) is value for name, value in module.named_buffers())
    for value in other.model.layers[0].mlp.up_proj.components.values():
        value.view(torch.uint8).zero_()
    other.load_state_dict(state)
    assert dq.fingerprint(other) == dq.fingerprint(one)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight"'):
        module.load_state_dict({name: value for name, value in module.state_dict().items() if name != "weight"})


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float8_e8m0fnu,
        torch.int32,
        torch.uint8,
        torch.bool,
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(), (0, 3), (4, 6)], ids=str)
def test_every_dtype_lies_on_disk(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    value = torch.randint(0, 2, shape, dtype=torch.uint8).to(dtype)
    offloaded = Offloaded()
    offloaded.write("a.b", value)
    found = offloaded["a.b"]
    assert found.dtype == dtype and found.shape == value.shape
    assert torch.equal(found.view(-1).view(torch.uint8), value.view(-1).view(torch.uint8))


def test_the_table_of_methods_says_what_the_schemes_do() -> None:
    """Compares the columns of docs/methods.md on experts and device maps with the schemes, a row a method."""
    lines = (REPOSITORY / "docs" / "methods.md").read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| `quant_method` |"))
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start : lines.index("", start)]]
    head, _, *rows = table
    listed = {row[0].strip("`"): dict(zip(head, row, strict=True)) for row in rows}
    schemes = {name: scheme for name, scheme in discover().items() if not scheme.delegated}
    assert listed.keys() == schemes.keys()
    for name, scheme in schemes.items():
        row, experts = listed[name], "yes" if scheme.stacks else "no" if name == "gguf" else "plain"
        assert row["experts"] == experts, name
        for place, column in (("cpu", "on CPU beside GPUs"), ("disk", "on disk")):
            bitsandbytes = issubclass(scheme, BitsandbytesScheme)
            assert row[column] == ("unquantized" if bitsandbytes else "no" if place in scheme.unmoved else "yes"), name
