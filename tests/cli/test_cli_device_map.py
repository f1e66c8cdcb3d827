"""One process with many devices: maps inferred on quantized sizes, maps as given, offload to CPU and disk."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from cli_runs import Command

import distquant as dq
from distquant import InputError

OFFLOADED = {
    "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "model.layers.0": "cpu",
    "model.layers.1": "disk", "model.layers.2": "disk", "model.layers.3": "disk", "lm_head": "disk",
}  # fmt: skip
"""Some layers of the trained example on disk."""

MIXED = {
    **OFFLOADED,
    "model.embed_tokens": 0,
    "model.rotary_emb": 0,
    "model.norm": 0,
    "model.layers.0": 0,
    "lm_head": 0,
}
"""The same on a GPU, three layers on disk."""

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
OFFLOAD_ALLOWED = {**NF4, "llm_int8_enable_fp32_cpu_offload": True}


def mapped(model: str, quant: Any, **memory: str) -> dict[str, str]:
    sizes = {key.removeprefix("gpu"): size for key, size in memory.items()}
    plan = dq.plan(model, quantization_config=quant, device_map="auto", max_memory=sizes)
    assert plan.device_map is not None
    return plan.device_map


def test_auto_puts_what_fits_on_the_first_device(kjv_tiny: str) -> None:
    assert mapped(kjv_tiny, "nf4", gpu0="1GiB", cpu="10GiB") == {"": "cuda:0"}


def test_auto_counts_quantized_bytes(kjv_tiny: str) -> None:
    """2.5 MiB in bf16, 1.4 MiB in NF4: only the quantized model fits into 2 MiB, less the tenth that is left free."""
    assert mapped(kjv_tiny, "nf4", gpu0="2MiB", cpu="10GiB") == {"": "cuda:0"}
    assert set(mapped(kjv_tiny, "none", gpu0="2MiB", cpu="10GiB").values()) == {"cuda:0", "cpu"}


def test_auto_overflows_to_cpu_and_disk(kjv_tiny: str) -> None:
    found = mapped(kjv_tiny, "none", gpu0="1MiB", cpu="1MiB")
    assert set(found.values()) == {"cuda:0", "cpu", "disk"}


def test_auto_divides_over_two_devices(kjv_tiny: str) -> None:
    assert set(mapped(kjv_tiny, "none", gpu0="10MiB", gpu1="10MiB").values()) == {"cuda:0", "cuda:1"}


def test_auto_says_nothing_of_devices_that_this_machine_lacks(kjv_tiny: str, command: Command) -> None:
    memory = json.dumps({"0": "1MiB", "1": "1GiB", "cpu": "1GiB"})
    done = command("plan", kjv_tiny, "--device-map", "auto", "--max-memory", memory)
    assert (done.code, done.err) == (0, "")
    assert "cuda:1" in done.out


def test_auto_on_this_machine_loads(kjv_tiny: str, command: Command) -> None:
    done = command("load", kjv_tiny, "--device-map", "auto", "--max-memory", "1GiB", "--quant", "nf4")
    assert done.code == 0
    model = dq.load(kjv_tiny, quantization_config="nf4")
    assert dq.fingerprint(model) in done.out


@pytest.mark.parametrize(
    ("memory", "words"),
    [({"gpu0": "1GiB"}, "invalid device 'gpu0'"), ({"0": "many"}, "invalid size 'many'")],
    ids=["no-device", "no-size"],
)
def test_memory_that_cannot_be(memory: dict[str, str], words: str, kjv_tiny: str) -> None:
    with pytest.raises(InputError, match=rf"^max_memory\['{next(iter(memory))}'\]: {words}\. "):
        dq.plan(kjv_tiny, device_map="auto", max_memory=memory)


def test_offload_of_bitsandbytes_must_be_allowed(kjv_tiny: str) -> None:
    pattern = (
        r"^device_map: modules on disk beside other devices stay unquantized.*Set llm_int8_enable_fp32_cpu_offload"
    )
    with pytest.raises(InputError, match=pattern):
        dq.plan(kjv_tiny, quantization_config=NF4, device_map=MIXED)


def test_offload_of_bitsandbytes_leaves_modules_unquantized_and_says_so(kjv_tiny: str) -> None:
    plan = dq.plan(kjv_tiny, quantization_config=OFFLOAD_ALLOWED, device_map=MIXED)
    assert {name.split(".")[2] for name in plan.converted} == {"0"}
    note = "left unquantized on cpu or disk: 21 linear modules (llm_int8_enable_fp32_cpu_offload)"
    assert note in plan.notes
    assert {t.name.split(".")[2] for t in plan.tensors if t.scheme != "none"} == {"0"}


def test_bitsandbytes_on_the_cpu_alone_is_quantized(kjv_tiny: str) -> None:
    model = dq.load(kjv_tiny, quantization_config="nf4", device_map="cpu")
    assert dq.fingerprint(model) == dq.fingerprint(dq.load(kjv_tiny, quantization_config="nf4"))


def test_a_device_may_not_get_more_than_its_memory(kjv_tiny: str) -> None:
    memory = {"0": "1MiB", "disk": "10GiB"}
    with pytest.raises(InputError, match=r"^device_map: cuda:0: its modules take 1\.38 MiB, max_memory allows 1"):
        dq.plan(kjv_tiny, quantization_config="none", device_map=MIXED, max_memory=memory)
    dq.plan(kjv_tiny, quantization_config="none", device_map=MIXED, max_memory={**memory, "0": "2MiB"})


@pytest.mark.parametrize("device_map", [{"model": "cpu", "lm_head": "disk"}, {"model": "disk", "lm_head": "cpu"}])
def test_tied_weights_are_not_parted_by_the_disk(device_map: dict[str, str], model_of) -> None:
    pattern = r"^device_map: lm_head\.weight is tied to model\.embed_tokens\.weight, .*\. Map both to one device$"
    with pytest.raises(InputError, match=pattern):
        dq.plan(model_of("llama-tied"), device_map=device_map)


def tokens(model: Any) -> list[int]:
    ids = torch.arange(3, 20)[None]
    return model.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist()


@pytest.fixture(scope="module")
def whole(kjv_tiny: str) -> Any:
    return dq.load(kjv_tiny, quantization_config="none")


@pytest.mark.parametrize("device_map", [{"": "cpu"}, OFFLOADED, {"": "disk"}], ids=["cpu", "cpu-and-disk", "disk"])
def test_unquantized_model_over_cpu_and_disk_generates(device_map: dict[str, str], kjv_tiny: str, whole: Any) -> None:
    model = dq.load(kjv_tiny, quantization_config="none", device_map=device_map)
    on_disk = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    assert bool(on_disk) == ("disk" in device_map.values())
    assert tokens(model) == tokens(whole)
    assert [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"] == on_disk


def test_folder_of_offloaded_weights_goes_with_the_model(kjv_tiny: str) -> None:
    import gc
    import os

    model = dq.load(kjv_tiny, quantization_config="none", device_map=OFFLOADED)
    folder = model._offload_folder.name
    assert os.listdir(folder)
    del model
    gc.collect()
    assert not os.path.exists(folder)


def test_fingerprint_of_a_model_on_disk(kjv_tiny: str, whole: Any) -> None:
    model = dq.load(kjv_tiny, quantization_config="none", device_map=OFFLOADED)
    assert dq.fingerprint(model) == dq.fingerprint(whole)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_maps_need_no_place_for_computed_buffers(place: str, kjv_tiny: str, whole: Any) -> None:
    given = {"model.embed_tokens": place, "model.layers": place, "model.norm": place, "lm_head": place}
    model = dq.load(kjv_tiny, quantization_config="none", device_map=given)
    assert model.distquant.plan.device_map == {**given, "model.rotary_emb": "cpu"}
    assert tokens(model) == tokens(whole)


def test_memory_may_name_the_disk(kjv_tiny: str) -> None:
    assert mapped(kjv_tiny, "none", cpu="1GiB", disk="1GiB") == {"": "cpu"}
    assert set(mapped(kjv_tiny, "none", cpu="1MiB", disk="1GiB").values()) == {"cpu", "disk"}
    with pytest.raises(InputError, match=r"^device_map: disk: its modules take .*, max_memory allows 1\.00 KiB"):
        mapped(kjv_tiny, "none", cpu="1MiB", disk="1KiB")
