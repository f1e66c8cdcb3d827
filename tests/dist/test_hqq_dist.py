"""HQQ: the bits of hqq itself at every width, quantized on the way and stored, and what comes out is its own module."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import work
from safetensors.torch import load_file, save_file

import distquant as dq

DATA = Path(__file__).parents[1] / "data" / "hqq"
KINDS: dict[str, dict[str, Any]] = {
    "4 bits": {"nbits": 4, "group_size": 64, "axis": 1},
    "8 bits": {"nbits": 8, "group_size": 128, "axis": 1},
    "3 bits": {"nbits": 3, "group_size": 32, "axis": 1},
    "2 bits strided": {"nbits": 2, "group_size": 16, "axis": 0},
    "3 bits strided": {"nbits": 3, "group_size": 64, "axis": 0},
    "1 bit": {"nbits": 1, "group_size": 16, "axis": 1},
    "4 bits strided": {"nbits": 4, "group_size": 64, "axis": 0},
    "a row a group": {"nbits": 4, "group_size": None, "axis": 1},
    "a column a group": {"nbits": 8, "group_size": None, "axis": 0},
    "rounded only": {"nbits": 4, "group_size": 64, "axis": 1, "optimize": False},
}


def config(kind: str) -> dict[str, Any]:
    return {"quant_method": "hqq", **KINDS[kind]}


@cache
def theirs(weight: str, kind: str) -> Any:
    """hqq's own module of a weight in a file (`file:name`)."""
    from hqq.core.quantize import HQQLinear, hqq_base_quant_config

    file, _, name = weight.rpartition(":")
    tensor = load_file(file)[name]
    fields = dict(KINDS[kind])
    optimize = fields.pop("optimize", True)
    params = hqq_base_quant_config(**fields)
    params["weight_quant_params"]["optimize"] = optimize
    linear = torch.nn.Linear(*tensor.shape[::-1], bias=False)
    linear.weight = torch.nn.Parameter(tensor, requires_grad=False)
    return HQQLinear(linear, params, compute_dtype=tensor.dtype, device="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_hqq(model_of, kind):
    path = model_of("llama-352")
    model = dq.load(path, quantization_config=config(kind))
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.k_proj"):
        ours, upstream = model.get_submodule(name), theirs(f"{path}/model.safetensors:{name}.weight", kind)
        x = torch.randn(3, ours.in_features, dtype=torch.bfloat16)
        assert type(ours) is type(upstream)
        assert torch.equal(ours.dequantize(), upstream.dequantize())
        assert torch.equal(ours(x), upstream(x))
        if ours.meta["group_size"] == upstream.meta["group_size"]:  # else groups straddle rows, and ours are finer
            mine, other = ours.state_dict(), upstream.state_dict()
            assert mine.keys() == other.keys()
            assert all(torch.equal(torch.as_tensor(mine[key]), torch.as_tensor(other[key])) for key in other)


@pytest.mark.parametrize("kind", KINDS)
def test_fingerprint_is_the_same_at_every_width(ranks, model_of, kind):
    path = model_of("llama-352")
    whole = work.fingerprint(path, config(kind))
    for width in (2, 3, 4):
        assert ranks.run(width, work.fingerprint, path, config(kind), f"tp={width}") == [whole] * width


@pytest.mark.parametrize("kind", ["4 bits", "2 bits strided"])
@pytest.mark.parametrize("family", ["llama-96", "phi3-packed"])
def test_every_family_has_one_fingerprint(ranks, model_of, family, kind):
    path = model_of(family)
    whole = work.fingerprint(path, config(kind))
    for width in (2, 3):
        assert ranks.run(width, work.fingerprint, path, config(kind), f"tp={width}") == [whole] * width


@pytest.mark.parametrize("kind", KINDS)
def test_projections_are_cut(model_of, kind):
    """Without this, equal fingerprints would prove nothing: replicas are equal too."""
    plan = dq.plan(model_of("llama-352"), quantization_config=config(kind), mesh="tp=2")
    assert [name for name in plan.converted if name not in plan.modules] == []


@pytest.mark.parametrize("kind", KINDS)
def test_finished_bytes_are_planned(ranks, model_of, kind):
    path = model_of("llama-352")
    plan = dq.plan(path, quantization_config=config(kind), mesh="tp=3")
    reports = [report for _, report in ranks.run(3, work.loaded, plan)]
    assert [report.quantized_bytes for report in reports] == [row.quantized for row in plan.memory]


def test_the_plan_says_what_quantizing_whole_costs(ranks, model_of):
    plan = dq.plan(model_of("llama-352"), quantization_config=config("4 bits"), mesh="tp=2", staging="1KiB")
    largest = 352 * 128
    assert [row.staging for row in plan.memory] == [8 * (2 * largest + 16384) + 10 * largest] * 2
    assert any(note.startswith("quantized whole by one rank of a node: 14 weights") for note in plan.notes)
    for _, report in ranks.run(2, work.loaded, plan):
        assert 1024 < report.staging_bytes <= 8 * (2 * largest + 16384)


def test_the_plan_says_that_packed_weights_go_whole(saved):
    plan = dq.plan(saved("llama-352", "4 bits"), mesh="tp=2")
    assert any(note.startswith("taken whole by every rank, which keeps its part: 14 weights") for note in plan.notes)


def test_small_staging_and_threads_leave_no_trace(ranks, model_of):
    path, quant = model_of("llama-352"), config("4 bits")
    whole = work.fingerprint(path, quant)
    assert ranks.run(2, work.fingerprint_staged, path, quant, "tp=2", "1KiB") == [whole] * 2
    assert ranks.run(2, work.fingerprint, path, quant, "tp=2", threads=2) == [whole] * 2


def test_dynamic_config_names_the_modules(model_of):
    quant = {
        "quant_method": "hqq",
        "dynamic_config": {"mlp.up_proj": {"nbits": 8, "group_size": 32}, "self_attn.q_proj": {"nbits": 2, "axis": 0}},
    }
    model = dq.load(model_of("llama-gqa"), quantization_config=quant)
    found = {n: m.meta["nbits"] for n, m in model.named_modules() if hasattr(m, "W_q")}
    layers = [f"model.layers.{i}" for i in range(2)]
    assert found == {
        **{f"{layer}.mlp.up_proj": 8 for layer in layers},
        **{f"{layer}.self_attn.q_proj": 2 for layer in layers},
    }


def test_refusals_name_the_module_and_the_reason(model_of):
    path = model_of("llama-96")
    with pytest.raises(dq.InputError, match=r"model\.layers\.0\.self_attn\.k_proj.weight: its 4608 elements are not a multiple of group_size 1000"):
        dq.plan(path, quantization_config={"quant_method": "hqq", "group_size": 1000})
    with pytest.raises(dq.InputError, match="view_as_float"):
        dq.plan(path, quantization_config={"quant_method": "hqq", "view_as_float": True})


# -- stored quantized --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(model_of, tmp_path_factory):
    """A family's checkpoint as hqq stores it: every projection is its own `HQQLinear`, saved by its `state_dict`."""
    root = tmp_path_factory.mktemp("hqq")

    def path(family: str, kind: str) -> str:
        folder, source = root / f"{family}-{kind.replace(' ', '-')}", Path(model_of(family))
        if not folder.exists():
            tensors = {}
            for name, tensor in load_file(source / "model.safetensors").items():
                if name.endswith("_proj.weight"):
                    state = theirs(f"{source / 'model.safetensors'}:{name}", kind).state_dict()
                    prefix = name.removesuffix("weight")
                    tensors |= {prefix + key: torch.as_tensor(value).contiguous() for key, value in state.items()}
                else:
                    tensors[name] = tensor
            shutil.copytree(source, folder)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            described = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(described | {"quantization_config": config(kind)}))
        return str(folder)

    return path


@pytest.mark.parametrize("kind", KINDS)
def test_stored_has_the_bits_of_on_the_fly_at_every_width(ranks, model_of, saved, kind):
    path, truth = saved("llama-352", kind), work.fingerprint(model_of("llama-352"), config(kind))
    assert work.fingerprint(path, None) == truth
    for width in (2, 3):
        assert ranks.run(width, work.fingerprint, path, None, f"tp={width}") == [truth] * width


def test_the_packed_form_is_read_once_a_node(ranks, saved):
    path = saved("llama-352", "4 bits")
    size = sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
    assert sum(ranks.run(3, work.bytes_read, path, None, "tp=3")) < 1.2 * size


def test_a_stored_parameter_that_contradicts_the_config(saved, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(saved("llama-352", "4 bits"), folder)
    described = json.loads((folder / "config.json").read_text())
    described["quantization_config"] |= {"nbits": 8, "group_size": 32}
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(dq.InputError, match=r"k_proj.*W_q is stored as \[64, 64\], its config and shape need 8192"):
        dq.plan(str(folder))
    described["quantization_config"] |= {"nbits": 4, "group_size": 64, "axis": 0}
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(dq.InputError, match=r"axis is stored as \[1\], the configuration means \[0\]"):
        dq.load(str(folder))


@pytest.mark.parametrize("kind", ["4-bits", "2-bits-strided"])
def test_golden_files(ranks, kind):
    """Files that hqq wrote (`tests/data/make_hqq.py`), loaded here and by hqq."""
    from hqq.core.quantize import HQQLinear

    path = DATA / kind
    model, stored = dq.load(str(path)), load_file(path / "model.safetensors")
    names = [name.removesuffix(".W_q") for name in stored if name.endswith(".W_q")]
    assert sorted(names) == sorted(model.distquant.plan.converted)
    for name in names:
        upstream = HQQLinear(None, None, compute_dtype=torch.bfloat16, device="cpu", initialize=False)
        prefix = name + "."
        upstream.load_state_dict({k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)})
        ours = model.get_submodule(name)
        assert torch.equal(ours.dequantize(), upstream.dequantize())
        x = torch.randn(2, 5, ours.in_features, dtype=torch.bfloat16)
        assert torch.equal(ours(x), upstream(x))
    whole = dq.fingerprint(model)
    for width in (2, 3):
        assert ranks.run(width, work.fingerprint, str(path), None, f"tp={width}") == [whole] * width


# -- the model works ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["4 bits", "2 bits strided"])
def test_logits_are_the_same_at_every_width(ranks, model_of, kind):
    path = model_of("llama-352")
    (whole,) = ranks.run(1, logits, path, config(kind), None)
    for width in (2, 3):
        for found in ranks.run(width, logits, path, config(kind), f"tp={width}"):
            torch.testing.assert_close(found, whole, rtol=0, atol=2e-4)


def logits(path: str, quant: Any, mesh: str | None) -> torch.Tensor:
    with torch.no_grad():
        return dq.load(path, quantization_config=quant, mesh=mesh, dtype="float32")(torch.tensor(work.IDS)).logits


def lora_gradients(path: str, quant: Any, mesh: str | None) -> dict[str, float]:
    """Norms of the gradients of adapters that no rank cuts (summed over ranks by the loader's hooks)."""
    import lora

    model = dq.load(path, quantization_config=quant, mesh=mesh, dtype="float32")
    wrapped = lora.wrap(model)
    lora.fill(model)
    wrapped(torch.tensor(work.IDS), labels=torch.tensor(work.IDS)).loss.backward()
    return {
        f"{module}.{side}": float(parameter.grad.norm())
        for (module, side), parameter in lora.adapters(model).items()
        if lora.partition_of(model.distquant.plan, module, side) is None or mesh is None
    }


def test_adapters_train_on_it(ranks, model_of):
    path, quant = model_of("llama-gqa"), config("4 bits")
    (whole,) = ranks.run(1, lora_gradients, path, quant, None)
    assert whole and all(norm > 0 for norm in whole.values())
    for found in ranks.run(2, lora_gradients, path, quant, "tp=2"):
        assert found and all(abs(norm - whole[name]) < 1e-4 + 1e-3 * whole[name] for name, norm in found.items())
