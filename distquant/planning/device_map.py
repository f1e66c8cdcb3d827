"""Device maps for one process with many devices: given by the user, or inferred by accelerate from quantized sizes.

accelerate measures a model's parameters, and knows nothing of what they become. So it gets a copy of the model on
`meta` whose converted weights have as many bytes as they will take.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from distquant.accelerator.names import device_name, device_number, device_type
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
    kind: str | None = None,
) -> dict[str, str] | None:
    """Returns the complete map, module -> device; None if it is invalid.

    Args:
        model: on `meta`.
        asked: one of `AUTO`, one device, or a dict.
        max_memory: device -> bytes, or None for what accelerate measures.
        quantized: bytes that each converted module's weight takes.
        adjust: the scheme's `adjust_max_memory`.
        problems: gets an incomplete map, unknown modules and devices, and invalid sizes.
        kind: type of the devices that are given by number; None: of CUDA's.
    """
    from accelerate.utils import check_device_map

    if isinstance(asked, str) and asked in AUTO:
        return _infer(model, asked, max_memory, quantized, adjust, problems, kind)
    given = asked if isinstance(asked, dict) else {"": asked}
    device_map = {key: device_name(value, kind) for key, value in given.items()}
    invalid = [(key, device) for key, device in device_map.items() if not is_device(device)]
    for key, device in invalid:
        problem = f"invalid device {device!r} (for {key or 'the whole model'})"
        problems.add("device_map", problem, "Give 'auto', 'cpu', 'disk', or the number of a GPU")
    if invalid:
        return None
    try:
        with _without_accelerate_warnings():
            check_device_map(model, device_map)
    except ValueError as error:
        problems.add("device_map", one_line(error), "Give every module a device; '' stands for the whole model")
        return None
    # accelerate ignores entries that name nothing, so a typo would go unnoticed.
    names = _names(model)
    for key in device_map:
        if key and not any(name == key or name.startswith(key + ".") for name in names):
            problems.add("device_map", f"{key!r} names no module of {type(model).__name__}", "Remove or correct it")
    return _with_computed_buffers(model, device_map)


def _with_computed_buffers(model: PreTrainedModel, device_map: dict[str, str]) -> dict[str, str]:
    """Returns a map that also has a device for modules with computed buffers alone (rotary embeddings)."""
    # `check_device_map` asks for what a state dict has, and computed buffers are not in it.
    complete, main = dict(device_map), main_place(device_map)
    for name, _ in model.named_buffers():
        if place_of(complete, name) is None:
            owner = name.rpartition(".")[0]
            # An entry for a module with children would decide about theirs as well.
            has_children = any(True for _ in model.get_submodule(owner).children())
            complete[name if has_children else owner] = main
    return complete


def _infer(
    model: PreTrainedModel,
    way: str,
    max_memory: Any,
    quantized: Mapping[str, int],
    adjust: Callable[[int], int],
    problems: Problems,
    kind: str | None,
) -> dict[str, str] | None:
    """Returns the map that accelerate infers from the sizes that weights will have."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory, get_max_memory

    resized = _with_quantized_sizes(model, quantized)
    no_split = list(model._no_split_modules or [])
    try:
        declared = read_memory(max_memory, kind)
    except InputError as error:
        problems.extend(error.problems)
        return None
    # The disk takes what is left, and accelerate has no limit for it; `check_memory` compares it afterwards.
    limits = None if declared is None else {device_number(k): v for k, v in declared.items() if k != "disk"}
    with _without_accelerate_warnings():
        memory = get_max_memory(limits)
        if way != "sequential":
            low_zero = way == "balanced_low_0"
            memory = get_balanced_memory(resized, memory, no_split_module_classes=no_split, low_zero=low_zero)
        # In transformers' order: balance first, then leave free what the scheme needs on each device.
        memory = {key: adjust(value) for key, value in memory.items()}
        inferred = infer_auto_device_map(resized, max_memory=memory, no_split_module_classes=no_split)
    return {key: device_name(value, kind) for key, value in inferred.items()}


@contextmanager
def _without_accelerate_warnings() -> Iterator[None]:
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
    """Returns a copy of the model on `meta` whose converted weights have as many bytes as they will take."""
    import torch

    resized = copy.deepcopy(model)
    # A module's own parameters hold all projections of its experts; the stacks below take their place.
    fused = {name.partition(f".{STAR}.")[0] for name in quantized if STAR in name}
    for name in fused:
        resized.get_submodule(name)._parameters.clear()
    for name, nbytes in quantized.items():
        module, _, projection = name.partition(f".{STAR}.")
        weight = torch.nn.Parameter(torch.empty(nbytes, dtype=torch.uint8, device="meta"), requires_grad=False)
        setattr(resized.get_submodule(module), projection or "weight", weight)
    resized.tie_weights()  # a weight that was replaced is no longer tied, and both would be counted
    return resized


def memory_by_device(max_memory: Any, kind: str | None) -> Mapping[Any, Any] | None:
    """Returns `max_memory` by device; a single size is that of the first device."""
    if max_memory is None or isinstance(max_memory, Mapping):
        return max_memory
    return {"cpu" if kind == "cpu" else 0: max_memory}


def memory_limits(max_memory: Any, device_map: Mapping[str, str]) -> dict[str, int]:
    """Returns the bytes that each device of a map may hold, as far as `max_memory` limits them.

    A single size is that of every device but the disk. Raises `InputError` for invalid sizes.
    """
    if max_memory is None or isinstance(max_memory, Mapping):
        return read_memory(max_memory, device_type(main_place(device_map))) or {}
    return dict.fromkeys(set(device_map.values()) - {"disk"}, parse_bytes(max_memory, "max_memory"))


def read_memory(given: Mapping[Any, Any] | None, kind: str | None) -> dict[str, int] | None:
    """Returns device -> bytes; a number is a device of type `kind` (`accelerator.names.device_name`).

    Raises `InputError` with every entry of an invalid device or size.
    """
    if given is None:
        return None
    problems, sizes = Problems(), dict[str, int]()
    for key, value in given.items():
        device, where = device_name(key, kind), f"max_memory[{key!r}]"
        if not is_device(device):
            problems.add(where, f"invalid device {key!r}", "Give 'cpu', 'disk', or the number of a GPU")
            continue
        try:
            sizes[device] = parse_bytes(value, where)
        except InputError as error:
            problems.extend(error.problems)
    problems.raise_if_any()
    return sizes


def check_memory(
    sizes: Iterable[tuple[str, int]], device_map: Mapping[str, str], limits: Mapping[str, int], problems: Problems
) -> None:
    """Checks that no device gets more than its limit; `sizes` are (parameter, finished bytes)."""
    needed: dict[str, int] = {}
    for name, nbytes in sizes:
        device = place_of(device_map, name)
        if device is not None:
            needed[device] = needed.get(device, 0) + nbytes
    for device, nbytes in needed.items():
        if nbytes > limits.get(device, nbytes):
            problem = f"its modules take {format_bytes(nbytes)}, max_memory allows {format_bytes(limits[device])}"
            problems.add(f"device_map: {device}", problem, "Move modules to another device, or allow more memory")


def is_device(name: str) -> bool:
    """Returns True if weights can be stored there: `cpu`, `disk`, `cuda:0` and their like."""
    import torch

    if name == "disk":
        return True
    try:
        return torch.device(name).type != "meta"
    except RuntimeError:
        return False


def _names(model: PreTrainedModel) -> list[str]:
    """Returns the paths of all modules and parameters."""
    return [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
