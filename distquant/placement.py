"""Device maps for one process with many devices, by accelerate, on quantized sizes."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from distquant.errors import InputError, Problems
from distquant.facts import parse_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AUTO = ("auto", "balanced", "balanced_low_0", "sequential")


def infer_device_map(
    model: PreTrainedModel,
    asked: Any,
    max_memory: Any,
    quantized: Mapping[str, int],
    adjust: Callable[[int], int],
    problems: Problems,
) -> dict[str, str] | None:
    """Module -> device, complete.

    Args:
        model: on `meta`.
        asked: "auto" and its kin, one device, or a dict.
        max_memory: bytes per device (dict), or None for what accelerate measures.
        quantized: bytes that each converted module's weight takes.
        adjust: the scheme's `adjust_max_memory`.
        problems: gets a map that is incomplete or memory that does not suffice.
    """
    from accelerate.utils import check_device_map

    if isinstance(asked, str) and asked in AUTO:
        return _infer(model, asked, max_memory, quantized, adjust, problems)
    given = asked if isinstance(asked, dict) else {"": asked}
    found = {key: _device(value) for key, value in given.items()}
    try:
        check_device_map(model, found)
    except ValueError as error:
        first = str(error).splitlines()[0]
        problems.add("device_map", first, "Give every module a device; '' stands for the whole model")
        return None
    unknown = [key for key in found if key and not any(n == key or n.startswith(key + ".") for n in _names(model))]
    for key in unknown:
        problems.add("device_map", f"{key!r} names no module of {type(model).__name__}", "Remove or correct it")
    return found


def _infer(
    model: PreTrainedModel,
    kind: str,
    max_memory: Any,
    quantized: Mapping[str, int],
    adjust: Callable[[int], int],
    problems: Problems,
) -> dict[str, str] | None:
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory, get_max_memory

    sized = _with_quantized_sizes(model, quantized)
    no_split = list(model._no_split_modules or [])
    try:
        declared = _memory(max_memory)
    except InputError as error:
        problems.extend(error.problems)
        return None
    with _declared_devices():
        memory = get_max_memory(declared)
        if kind != "sequential":
            low_zero = kind == "balanced_low_0"
            memory = get_balanced_memory(sized, memory, no_split_module_classes=no_split, low_zero=low_zero)
        memory = {key: adjust(value) for key, value in memory.items()}
        found = infer_auto_device_map(sized, max_memory=memory, no_split_module_classes=no_split)
    return {key: _device(value) for key, value in found.items()}


@contextmanager
def _declared_devices() -> Iterator[None]:
    """Lets a plan name devices that this machine lacks, without accelerate's warning about each."""
    logger = logging.getLogger("accelerate.utils.modeling")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _with_quantized_sizes(model: PreTrainedModel, quantized: Mapping[str, int]) -> PreTrainedModel:
    """A copy of the model on `meta` whose converted weights have as many bytes as they will take."""
    import torch

    sized = copy.deepcopy(model)
    for name, nbytes in quantized.items():
        weight = torch.empty(nbytes, dtype=torch.uint8, device="meta")
        sized.get_submodule(name).weight = torch.nn.Parameter(weight, requires_grad=False)
    sized.tie_weights()
    return sized


def _memory(given: Any) -> dict[Any, int] | None:
    if given is None:
        return None
    entries = given if isinstance(given, dict) else {0: given}
    return {(int(k) if str(k).isdigit() else k): parse_bytes(v, f"max_memory[{k!r}]") for k, v in entries.items()}


def _device(value: Any) -> str:
    return f"cuda:{value}" if isinstance(value, int) or str(value).isdigit() else str(value)


def _names(model: PreTrainedModel) -> list[str]:
    return [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
