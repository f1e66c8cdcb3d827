"""The plan as text: three lines that say if it fits, the changes that make it fit, and short forms."""

from __future__ import annotations

import re
from typing import Any

import pytest

import distquant as dq
from distquant.planning.generation_memory import CacheGroup
from distquant.units import parse_bytes

SIZE = r"[\d.]+ [KMG]?i?B"


def lines(plan: dq.LoadPlan) -> list[str]:
    return str(plan).splitlines()[:3]


def test_three_lines_say_what_is_needed(kjv_tiny: str) -> None:
    weights, generation, fits = lines(dq.plan(kjv_tiny, quantization_config="nf4-dq", mesh="tp=2"))
    assert re.fullmatch(
        rf"weights     {SIZE} on each of 2 devices at most \(rank 1\); load buffer 64.06 MiB.*", weights
    )
    shown = rf"generation  {SIZE} more: KV cache 512.00 KiB \(context 1,024, batch 1\), activations about {SIZE}"
    assert re.fullmatch(shown, generation)
    assert re.fullmatch(rf"fits        needs {SIZE} on each device, such as one of 4 GB; give max_memory.*", fits)


def test_one_device_that_has_enough(kjv_tiny: str) -> None:
    plan = dq.plan(kjv_tiny, max_memory="1GiB", context=64, batch=3)
    assert plan.fits() is True
    assert plan.fits(context=1024, batch=1000) is False
    weights, generation, fits = lines(plan)
    assert "on one device;" in weights
    assert "(context 64, batch 3)" in generation
    assert re.fullmatch(rf"fits        yes: {SIZE} of 1.00 GiB \(max_memory\)", fits)


def test_without_a_limit_nobody_knows(kjv_tiny: str) -> None:
    assert dq.plan(kjv_tiny).fits() is None


def test_a_shorter_context_that_is_offered_fits_and_a_longer_one_does_not(kjv_tiny: str) -> None:
    plan = dq.plan(kjv_tiny, max_memory="100MiB", batch=64, quantization_config="none")
    offer = re.search(r"fits        no: needs .*Smallest change that fits: context (\d+) \(needs", lines(plan)[2])
    assert offer is not None, lines(plan)
    context = int(offer.group(1))
    assert plan.fits(context) is True
    assert plan.fits(context + 256) is False


def refusal(model: str, **options: Any) -> str:
    with pytest.raises(dq.InputError) as caught:
        dq.plan(model, **options)
    (problem,) = caught.value.problems
    return str(problem)


def change(text: str, kind: str) -> tuple[str, int]:
    """Returns the offered change of a kind, and the bytes that it says a device needs."""
    offer = re.search(rf"{kind} (\S+) \(needs ([\d.]+) ([KMG]iB)\)", text)
    assert offer is not None, text
    return offer.group(1), parse_bytes(offer.group(2) + offer.group(3))


def needed(plan: dq.LoadPlan) -> int:
    return max(device.needed for device in plan.memory_for())


def test_larger_tp_and_other_methods_that_are_offered_fit(model_of) -> None:
    """Planning with the change gives the bytes that were announced, but for the digits that are shown."""
    path, options = model_of("llama-352"), {"staging": "1KiB", "context": 8}
    limit = dq.plan(path, **options).memory_for()[0].weights * 4 // 5
    options["max_memory"] = limit
    text = refusal(path, **options)
    mesh, bytes_there = change(text, "mesh")
    wider = dq.plan(path, mesh=mesh, **options)
    assert wider.fits() is True
    assert needed(wider) == pytest.approx(bytes_there, rel=0.01)
    name, bytes_there = change(text, "quantization")
    smaller = dq.plan(path, quantization_config=name, **options)
    assert smaller.fits() is True
    assert needed(smaller) == pytest.approx(bytes_there, rel=0.01)


def test_a_smaller_load_buffer_that_is_offered_fits(kjv_tiny: str) -> None:
    text = refusal(kjv_tiny, max_memory="40MiB", context=8)
    assert "load buffer" in text
    staging, _ = change(text, r"load buffer \(staging\)")
    assert dq.plan(kjv_tiny, max_memory="40MiB", context=8, staging=staging).fits() is True


def test_a_method_that_the_checkpoint_has_is_not_changed(model_of, tmp_path) -> None:
    dq.load(model_of("llama-gqa"), quantization_config="nf4").save_pretrained(tmp_path)
    assert "quantization" not in refusal(str(tmp_path), max_memory="1KiB", context=8).replace("quantized", "")


@pytest.mark.parametrize("option", ["context", "batch"])
def test_numbers_below_one_are_invalid(kjv_tiny: str, option: str) -> None:
    with pytest.raises(dq.InputError, match=f"{option}: invalid number 0. Give 1 or more"):
        dq.plan(kjv_tiny, **{option: 0})
    with pytest.raises(dq.InputError, match=f"{option}: invalid number 0. Give 1 or more"):
        dq.plan(kjv_tiny).memory_for(**{option: 0})


def test_estimates_are_neither_in_the_json_nor_in_the_digest(kjv_tiny: str) -> None:
    plan, other = dq.plan(kjv_tiny), dq.plan(kjv_tiny, context=7, batch=2)
    assert (plan.digest, plan.to_json()) == (other.digest, other.to_json())
    assert "estimates" not in plan.to_json()


def test_a_plan_from_json_says_what_it_lacks(kjv_tiny: str) -> None:
    plan = dq.LoadPlan.from_json(dq.plan(kjv_tiny, mesh="tp=2").to_json())
    assert "read from JSON" in str(plan)
    with pytest.raises(dq.InputError, match="read from JSON, which holds no estimates of memory"):
        plan.memory_for()


def test_short_forms(kjv_tiny: str) -> None:
    plan = dq.plan(kjv_tiny, quantization_config="nf4", mesh="tp=2")
    assert repr(plan) == f"LoadPlan(LlamaForCausalLM, bitsandbytes, mesh tp=2, digest {plan.digest[:16]})"
    assert len(str(plan)) < 6000
    page = plan._repr_html_()
    assert len(page) < 8000
    assert page.count("<tr>") == 3
    assert "KV cache" in page.partition("<details>")[0]


def test_html_is_escaped(kjv_tiny: str, tmp_path) -> None:
    folder = tmp_path / "<b>model"
    folder.symlink_to(kjv_tiny)
    page = dq.plan(str(folder))._repr_html_()
    assert "<b>" not in page
    assert "&lt;b&gt;model" in page


def test_words_of_the_inside_are_not_in_the_text(kjv_tiny: str) -> None:
    text = str(dq.plan(kjv_tiny, quantization_config="nf4-dq", mesh="tp=2"))
    for word in ("staging", "busy", "place", "dealt", "units of", "lies in"):
        assert not re.search(rf"\b{word}\b", text), word


def test_devices_of_a_map_have_lines_of_their_own(model_of) -> None:
    path = model_of("llama-352")
    half = dq.plan(path).memory_for()[0].weights // 2
    device_map = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1, "lm_head": 1}
    plan = dq.plan(path, device_map=device_map, max_memory={0: 2 * half, 1: "60MiB"}, context=64)
    first, second = plan.memory_for()
    assert (first.name, second.name) == ("cuda:0", "cuda:1")
    assert (first.limit, second.limit) == (2 * half, 60 << 20)
    total = sum(device.cache for device in plan.memory_for())
    assert total == dq.plan(path, context=64).memory_for()[0].cache
    weights, generation, fits = lines(plan)
    assert "cuda:0" in weights and "cuda:1" in weights
    assert "cuda:1" in generation
    assert fits.split()[1] in ("yes:", "no:")


def test_a_window_bounds_the_cache() -> None:
    group = CacheGroup(layers=1, token_bytes=10, window=8, state_bytes=3)
    assert [group.layer_bytes(context, 2) for context in (1, 7, 8, 100)] == [26, 146, 146, 146]
