"""The arguments of `plan`, `load` and `ray.load`, and the flags of the command line: read as people spell them, and
checked as far as that needs no torch, which takes seconds to import.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import fields
from typing import Any

from distquant.accelerator.names import first_device
from distquant.checkpoint import open_checkpoint
from distquant.config import CONFIG_CLASSES, QuantizationConfig
from distquant.config.resolve import resolve, respelled
from distquant.environment import offered_methods
from distquant.errors import InputError, Problems
from distquant.options import KERNELS, Aliases, PlanOptions, RunOptions, select
from distquant.planning.request import Request, collected, read_request
from distquant.sharding.mesh import AXES, Mesh, is_number, world_problem
from distquant.whole_numbers import whole_number

ALIASES = tuple(Aliases.__annotations__)

BITS = {"load_in_4bit": "nf4", "load_in_8bit": "int8"}
"""The short names that flags of transformers stand for."""

ELSEWHERE = {
    "quant": "quantization_config",
    "quantization": "quantization_config",
    "qconfig": "quantization_config",
    "tensor_parallel_size": "tp",
    "tp_size": "tp",
    "data_parallel_size": "dp",
    "expert_parallel_size": "ep",
    "num_gpus": "tp",
    "devices": "device_map",
    "model_path": "model",
    "pretrained_model_name_or_path": "model",
    "download_dir": "cache_dir",
}
"""Arguments of other libraries -> ours."""

NEEDLESS = {
    "low_cpu_mem_usage": "weights never pass through more memory than `staging`",
    "local_files_only": "nothing is ever downloaded",
    "use_safetensors": "nothing but safetensors and GGUF is read",
    "token": "nothing is ever downloaded; run `hf download` with it",
    "force_download": "nothing is ever downloaded; run `hf download --force-download`",
    "tp_plan": "the model's own plan is taken as soon as tp is above 1",
    "num_processes": "ranks are started by a launcher",
}
"""Arguments of other libraries that have nothing to say here, and the reason."""

OF_OTHERS = {
    "device_map": "Ray workers hold one device each",
    "device": "Ray workers hold one device each",
    "ranks_per_node": "it is an argument of plan alone, because a load measures it",
    "capability": "it is an argument of plan alone, because a load measures it",
    "resources": "it is an argument of ray.load",
    "threads": "it is an argument of ray.load; set OMP_NUM_THREADS, or call torch.set_num_threads",
    "schedule_timeout": "it is an argument of ray.load",
    "progress": "a plan reads headers only",
    **{option.name: "it changes how a load runs, and nothing in a plan" for option in fields(RunOptions)},
}
"""Arguments that another function of ours has, and the reason why this one has not."""

log = logging.getLogger("distquant")


def read_arguments(function: str, given: Mapping[str, Any], runs: bool = True) -> tuple[Request, RunOptions]:
    """Returns the request and the way to run that a public function was called with.

    Args:
        function: its name, for messages.
        given: its arguments, with those of other names under `aliases`.
        runs: True if the function takes the options of `RunOptions`.

    Raises:
        InputError: with every problem that is known without torch.
    """
    problems, arguments = Problems(), dict(given)
    aliases = arguments.pop("aliases")
    readable = [name for name in ALIASES if name != "device" or "device_map" in arguments]
    known = [*arguments, *readable]
    for name in aliases:
        if name not in readable:
            problems.add(name, f"{function} has no argument of this name", _advice(name, known))
    notes = fold(arguments, {name: value for name, value in aliases.items() if name in readable}, problems)
    options = select(RunOptions, arguments) if runs else {}
    check_early(arguments.pop("model"), [select(PlanOptions, arguments)], options, problems)
    log_notes(notes)
    return Request(model=given["model"], **select(PlanOptions, arguments)), RunOptions(**options)


def _advice(name: str, known: list[str]) -> str:
    if name in ELSEWHERE:
        return f"Write {ELSEWHERE[name]}"
    if name in NEEDLESS:
        return f"Leave it out: {NEEDLESS[name]}"
    if name in OF_OTHERS and name not in known:
        return f"Leave it out: {OF_OTHERS[name]}"
    near = difflib.get_close_matches(name, known, 1)
    return f"Did you mean {near[0]}?" if near else f"It has {', '.join(known)}"


# -- spellings ---------------------------------------------------------------------------------------------------------


def fold(options: MutableMapping[str, Any], aliases: Mapping[str, Any], problems: Problems) -> list[str]:
    """Puts aliases into the options that they stand for; returns what the user should know of that.

    Args:
        options: `PlanOptions` by name, and maybe more; changed.
        aliases: `Aliases` by name.
        problems: gets aliases that contradict each other or an option.
    """
    notes: list[str] = []
    given = {name: value for name, value in aliases.items() if value is not None and value is not False}
    bits = [name for name in BITS if name in given]
    if len(bits) == 2:
        problems.add("load_in_4bit", "load_in_4bit and load_in_8bit are both given", "Give one of them")
    elif bits:
        name = BITS[bits[0]]
        if _set(options, "quantization_config", name, f"{bits[0]}=True", problems):
            notes.append(f"{bits[0]} is read as quantization_config={name!r} (--quant {name})")
    if "torch_dtype" in given:
        _set(options, "dtype", given["torch_dtype"], f"torch_dtype={given['torch_dtype']}", problems)
    axes = {axis: given[axis] for axis in AXES if axis in given}
    if axes:
        text = ",".join(f"{axis}={size}" for axis, size in axes.items())
        _set(options, "mesh", text, text, problems)
    if "device" in given:
        if options.get("mesh") is not None:
            fault = f"{str(given['device'])!r} is given with a mesh, whose ranks have a device each"
            problems.add("device", fault, "Leave it out; CUDA_VISIBLE_DEVICES hides devices")
        else:
            _set(options, "device_map", _device(given["device"]), f"device={given['device']}", problems)
    return notes + [note for name in options for note in _notes(name, options[name])]


def _set(options: MutableMapping[str, Any], option: str, value: Any, spelled: str, problems: Problems) -> bool:
    """Sets an option that an alias stands for, unless the option is given as well."""
    present = options.get(option)
    if present is not None and not (option == "dtype" and present == "auto"):
        problems.add(option, f"{present!r} is given, and {spelled} as well", "Give one of them")
        return False
    options[option] = value
    return True


def _device(device: Any) -> Any:
    """Returns a device as a device map has it: a number as it is, a `torch.device` as text, `cuda` as its first."""
    return device if isinstance(device, int) else first_device(str(device).strip())


def _notes(name: str, value: Any) -> list[str]:
    """Returns what the user should know of an option's spelling, if it could have meant something else."""
    if name == "quantization_config":
        short = respelled(value, [short for cls in CONFIG_CLASSES for short in cls.short_names])
        return [f"{value!r} is read as quantization_config={short!r} (--quant {short})"] if short else []
    if name == "mesh" and is_number(value) and (ranks := whole_number(str(value).strip()) or 0) > 1:
        return [f"{str(value).strip()!r} is read as mesh='tp={ranks}' (--mesh tp={ranks})"]
    if name in ("max_memory", "staging"):
        match = re.fullmatch(r"\s*([\d.]+)\s*([KMGTP])\s*", str(value), re.IGNORECASE)
        if match:
            number, unit = match[1], match[2].upper()
            return [f"{name}={value!r} is read as {number}{unit}B, a power of 1000; {number}{unit}iB is more"]
    return []


def log_notes(notes: list[str]) -> None:
    """Logs notes as warnings, on one rank, and each once."""
    for note in unreported(notes):
        if os.environ.get("RANK", "0") == "0":
            log.warning(note)


def unreported(notes: list[str]) -> list[str]:
    """Returns the notes that this process has not reported yet, and counts them as reported."""
    new = [note for note in notes if note not in _logged]
    _logged.update(new)
    return new


_logged: set[str] = set()


# -- checks ------------------------------------------------------------------------------------------------------------


def check_early(
    model: Any, requests: list[dict[str, Any]], run: Mapping[str, Any], problems: Problems | None = None
) -> None:
    """Raises `InputError` with every problem that is known without torch; of files only where there is another one.

    Args:
        model: as given.
        requests: `PlanOptions` by name; several of them where several meshes are compared.
        run: `RunOptions` by name.
        problems: what is known already.
    """
    problems = problems if problems is not None else Problems()
    classes, config = early_classes(), None
    for options in requests:
        config = read_request(Request(model=model, **options), problems, classes).config
    with collected(problems):
        RunOptions(**run)
    if run.get("kernel", KERNELS[0]) not in KERNELS:
        problems.add("kernel", f"unknown kernels {run['kernel']!r}", f"Take one of {', '.join(KERNELS)}")
    if problems and isinstance(model, (str, os.PathLike)):
        with collected(problems):
            first = Request(model=model, **requests[0])
            checkpoint = open_checkpoint(model, revision=first.revision, cache_dir=first.cache_dir)
            resolve(checkpoint.config, config, classes, first.on_unsupported)
    problems.raise_if_any()


def check_world(mesh: Mesh, world: int) -> None:
    """Raises `InputError` if the mesh needs another number of ranks than the launcher has started."""
    if (problem := world_problem(mesh, world)) is not None:
        raise InputError([problem])


def early_classes() -> tuple[type[QuantizationConfig], ...]:
    """Returns the known configuration classes, without torch unless another package offers methods."""
    if "distquant.quantization" not in sys.modules and not offered_methods():
        return CONFIG_CLASSES
    from distquant.quantization import config_classes

    return tuple(config_classes())
