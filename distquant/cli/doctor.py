"""Text of `distquant doctor`: the machine's devices and packages, and for each method what works or is missing."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from typing import TYPE_CHECKING

from distquant.config import QuantizationConfig
from distquant.environment import Environment, installed, usable_cores
from distquant.errors import InputError
from distquant.quantization import Context, Scheme
from distquant.tables import table
from distquant.units import format_bytes

if TYPE_CHECKING:
    import torch

HEADER = ("method", "names", "pre-quantized", "on the fly", "tp", "ep", "experts", "train", "state")
"""`experts`: how they are held when they are distributed over ep or sharded over tp."""
OPTIONAL = {
    "ray": "--runtime ray",
    "peft": "LoRA on loaded models",
    "compressed-tensors": "reading saved int4 and fp8-row models with transformers",
    "gptqmodel": "--forward gptqmodel (for GPTQ and AWQ on GPUs)",
}
"""Packages that no method needs, and the feature that needs each."""


def doctor_parts(quant: str | None) -> list[str]:
    """Returns the lines and tables, for all methods or the one that `quant` names."""
    from distquant.config import parse
    from distquant.quantization import config_classes, scheme_for
    from distquant.quantization.registry import discover
    from distquant.runtime import local
    from distquant.runtime.measure import host_memory, measure, watched

    names = list(dict.fromkeys((*watched(), *OPTIONAL)))
    versions, device = {name: installed(name) for name in names}, local.device()
    environment = measure(device, None)
    lines = [
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {_cores()}, "
        f"{format_bytes(host_memory())} free",
        *device_lines(device, environment.capability),
        "",
        table(("package", "version"), [(name, version or "missing") for name, version in versions.items()]),
        "",
    ]
    if quant:
        config = parse(quant, config_classes())
        assert config is not None
        methods = [{name_of(config): scheme_for(config)}]
    else:
        methods = [_by_name(scheme) for scheme in discover().values()]
    rows, missing = [], []
    for schemes in methods:
        problems = {name: list(dict.fromkeys(_problems(scheme, environment))) for name, scheme in schemes.items()}
        rows.append((*_abilities(next(iter(schemes.values()))), _state(problems)))
        missing += _grouped(next(iter(schemes.values())).name, problems)
    lines.append(table(HEADER, rows))
    lines += ["", *missing] if missing else []
    absent = [name for name in OPTIONAL if versions[name] is None]
    lines += [f"note: without {name}, {OPTIONAL[name]} is not available: pip install {name}" for name in absent]
    return lines


def device_lines(device: torch.device, capability: tuple[int, int] | None) -> list[str]:
    """Returns a device's name, and what was tried on it: what a load would otherwise be the first to find out."""
    from distquant.accelerator import host_memory
    from distquant.accelerator.facts import device_label
    from distquant.accelerator.names import runs_cuda_kernels

    if device.type == "cpu":
        return ["device: cpu"]
    known = f", capability {capability}" if capability is not None else ""
    lines = [f"device: {device.type} {device_label(device)}{known}"]
    failure = host_memory.trial(device)
    slow = "loads are right, but wait for each copy to the device"
    lines.append(f"host memory: not pinned: {failure}; {slow}" if failure else "host memory: can be pinned")
    if runs_cuda_kernels(device):
        lines.append(_triton(device))
    return lines


def _triton(device: torch.device) -> str:
    """Returns the state of Triton's kernels on a device, for people."""
    from distquant.kernels.choice import Kernel, choose
    from distquant.kernels.compiler_trial import triton_problem

    try:
        choose(Kernel.TRITON, device)
    except InputError as error:
        return f"Triton: {error.problems[0].what}. {error.problems[0].fix}"
    problem = triton_problem(device)
    return "Triton: compiles and runs" if problem is None else f"Triton: {problem.what}. {problem.fix}"


def _abilities(scheme: Scheme) -> tuple[str, ...]:
    """Returns a row of the table: everything that a method can do, on any machine."""
    names = ", ".join(scheme.config_class.short_names) or "-"
    partition, train = ("no", "as transformers") if scheme.delegated else ("yes", "adapters")
    experts = "-" if scheme.delegated else "quantized" if scheme.stacks else "plain"
    return (
        scheme.name,
        names,
        _yes(scheme.reads_stored()),
        _yes(scheme.quantizes()),
        partition,
        partition,
        experts,
        train,
    )


def _cores() -> str:
    usable, all_of_them = usable_cores(), os.cpu_count() or 1
    return f"{all_of_them} cores" + (f" ({usable} of them usable here)" if usable < all_of_them else "")


def _by_name(scheme: type[Scheme]) -> dict[str, Scheme]:
    """Returns a method with the configuration of each short name, or with its defaults where it has none."""
    kind = scheme.config_class
    return {name: scheme(kind(**values)) for name, values in (kind.short_names or {scheme.name: {}}).items()}


def name_of(config: QuantizationConfig) -> str:
    """Returns the short name of a configuration, or its method where no name means it."""
    same = (name for name, values in config.short_names.items() if type(config)(**values) == config)
    return next(same, config.quant_method)


def _state(problems: dict[str, list[str]]) -> str:
    """Returns the state of a method: some of its names may work where others do not."""
    failing = [name for name, found in problems.items() if found]
    if len(failing) == len(problems):
        return "see below"
    return f"ready, not {', '.join(failing)}" if failing else "ready"


def _grouped(method: str, problems: dict[str, list[str]]) -> list[str]:
    """Returns a line for each problem, under the names that have it, or the method's if all of several have it."""
    names: dict[str, list[str]] = {}
    for name, found in problems.items():
        for problem in found:
            names.setdefault(problem, []).append(name)
    several = len(problems) if len(problems) > 1 else None
    return [f"{method if len(having) == several else ', '.join(having)}: {each}" for each, having in names.items()]


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _problems(scheme: Scheme, environment: Environment) -> Iterator[str]:
    """Yields the reasons why a method cannot run on this machine, whatever the checkpoint."""
    from distquant.model import ModelDescription
    from distquant.model.description import Linear
    from distquant.sharding.mesh import Mesh

    name = "layers.0.proj"  # for methods that ask whether their patterns match something
    linears = {name: Linear(name, 4096, 4096, False)}
    small = ModelDescription(
        model_type="", architecture="", params={}, tied={}, sources={}, unexpected=(), missing=(), linears=linears,
        attentions={}, embeddings=(), input_embedding=None, output_embedding=None, experts={}, tp_plan={}, ep_plan={},
        default_skip=(),
    )  # fmt: skip
    context = Context(
        environment=environment, mesh=Mesh(), description=small, device_map=None, prequantized=not scheme.quantizes()
    )
    return (f"{problem.what}. {problem.fix}" for problem in scheme.validate(context))
