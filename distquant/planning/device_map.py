"""Device maps for one process with many devices, by accelerate, on quantized sizes."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from distquant.errors import InputError, Problems, one_line
from distquant.model import STAR
from distquant.sharding.device_map import main_place, place_of
from distquant.units import format_bytes, parse_bytes

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
        max_memory: device -> bytes, or None for what accelerate measures.
        quantized: bytes that each converted module's weight takes.
        adjust: the scheme's `adjust_max_memory`.
        problems: gets a map that is incomplete or memory that does not suffice.
    """
    from accelerate.utils import check_device_map

    if isinstance(asked, str) and asked in AUTO:
        return _infer(model, asked, max_memory, quantized, adjust, problems)
    given = asked if isinstance(asked, dict) else {"": asked}
    found = {key: _device(value) for key, value in given.items()}
    strange = [(key, value) for key, value in found.items() if not is_device(value)]
    for key, value in strange:
        what = f"{value!r} (for {key or 'the whole model'}) is no device"
        problems.add("device_map", what, "Give 'auto', 'cpu', 'disk', or the number of a GPU")
    if strange:
        return None
    try:
        with _declared_devices():
            check_device_map(model, found)
    except ValueError as error:
        problems.add("device_map", one_line(error), "Give every module a device; '' stands for the whole model")
        return None
    unknown = [key for key in found if key and not any(n == key or n.startswith(key + ".") for n in _names(model))]
    for key in unknown:
        problems.add("device_map", f"{key!r} names no module of {type(model).__name__}", "Remove or correct it")
    return _with_computed_buffers(model, found)


def _with_computed_buffers(model: PreTrainedModel, device_map: dict[str, str]) -> dict[str, str]:
    """A map that also has a place for modules with computed buffers alone (rotary embeddings): the main one."""
    found, main = dict(device_map), main_place(device_map)
    for name, _ in model.named_buffers():
        if place_of(found, name) is None:
            owner = name.rpartition(".")[0]
            found[name if any(True for _ in model.get_submodule(owner).children()) else owner] = main
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
        declared = read_memory(max_memory)
    except InputError as error:
        problems.extend(error.problems)
        return None
    # The disk takes what is left, and accelerate knows no limit for it; `check_memory` compares what is given.
    limits = None if declared is None else {_accelerate_key(k): v for k, v in declared.items() if k != "disk"}
    with _declared_devices():
        memory = get_max_memory(limits)
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
    fused = {name.partition(f".{STAR}.")[0] for name in quantized if STAR in name}
    for name in fused:
        sized.get_submodule(name)._parameters.clear()
    for name, nbytes in quantized.items():
        module, _, projection = name.partition(f".{STAR}.")
        weight = torch.nn.Parameter(torch.empty(nbytes, dtype=torch.uint8, device="meta"), requires_grad=False)
        setattr(sized.get_submodule(module), projection or "weight", weight)
    sized.tie_weights()
    return sized


def read_memory(given: Mapping[Any, Any] | None) -> dict[str, int] | None:
    """Device -> bytes; raises `InputError` with every entry that names no device or no size."""
    if given is None:
        return None
    problems, found = Problems(), {}
    for key, value in given.items():
        device, where = _device(key), f"max_memory[{key!r}]"
        if not is_device(device):
            problems.add(where, f"{key!r} is no device", "Give 'cpu', 'disk', or the number of a GPU")
            continue
        try:
            found[device] = parse_bytes(value, where)
        except InputError as error:
            problems.extend(error.problems)
    problems.raise_if_any()
    return found


def check_memory(
    sizes: Iterable[tuple[str, int]], device_map: Mapping[str, str], limits: Mapping[str, int], problems: Problems
) -> None:
    """Tells every device that gets more than its limit; `sizes` are (parameter, finished bytes)."""
    needed: dict[str, int] = {}
    for name, nbytes in sizes:
        device = place_of(device_map, name)
        if device is not None:
            needed[device] = needed.get(device, 0) + nbytes
    for device, nbytes in needed.items():
        if nbytes > limits.get(device, nbytes):
            what = f"its modules take {format_bytes(nbytes)}, max_memory allows {format_bytes(limits[device])}"
            problems.add(f"device_map: {device}", what, "Move modules to another device, or allow more memory")


def is_device(name: str) -> bool:
    """Whether weights can lie there: `cpu`, `disk`, `cuda:0` and their like."""
    import torch

    if name == "disk":
        return True
    try:
        return torch.device(name).type != "meta"
    except RuntimeError:
        return False


def _accelerate_key(device: str) -> int | str:
    """accelerate calls a GPU by its number."""
    return int(device.removeprefix("cuda:")) if device.startswith("cuda:") else device


def _device(value: Any) -> str:
    return f"cuda:{value}" if isinstance(value, int) or str(value).isdigit() else str(value)


def _names(model: PreTrainedModel) -> list[str]:
    return [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
