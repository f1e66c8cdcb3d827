"""Text of `distquant doctor`: the machine's devices and packages, and for each method what works or is missing."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Iterator

from distquant.cli.terminal import table
from distquant.config import QuantizationConfig
from distquant.environment import Environment
from distquant.quantization import Context, Scheme
from distquant.units import format_bytes

HEADER = ("method", "names", "pre-quantized", "on the fly", "tp", "ep", "experts", "train", "state")
"""`experts`: how they are held when they are distributed over ep or sharded over tp."""
OPTIONAL = {"ray": "--runtime ray", "peft": "LoRA on loaded models"}
"""Packages that no method needs, and the feature that needs each."""


def doctor_parts(quant: str | None) -> list[str]:
    """Returns the lines and tables, for all methods or the one that `quant` names."""
    import torch

    from distquant.config import parse
    from distquant.quantization import config_classes, scheme_for
    from distquant.quantization.registry import discover
    from distquant.runtime import local
    from distquant.runtime.measure import host_memory, measure, packages, watched

    versions, environment = packages(), measure(local.device(), None)
    gpu = (
        f" {torch.cuda.get_device_name()}, capability {environment.capability}"
        if environment.device_type == "cuda"
        else ""
    )
    lines = [
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {os.cpu_count()} cores, "
        f"{format_bytes(host_memory())} free",
        f"device: {environment.device_type}{gpu}",
        "",
        table(("package", "version"), [(name, versions.get(name, "missing")) for name in watched()]),
        "",
    ]
    if quant:
        config = parse(quant, config_classes())
        assert config is not None
        schemes = [scheme_for(config)]
    else:
        schemes = [scheme(_example(scheme.config_class)) for scheme in discover().values()]
    rows, missing = [], []
    for scheme in schemes:
        problems = dict.fromkeys(_problems(scheme, environment))
        rows.append((*_abilities(scheme), "see below" if problems else "ready"))
        missing += [f"{scheme.name}: {problem}" for problem in problems]
    lines.append(table(HEADER, rows))
    lines += ["", *missing] if missing else []
    absent = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
    lines += [f"note: without {name}, {OPTIONAL[name]} is not available: pip install {name}" for name in absent]
    return lines


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


def _example(kind: type[QuantizationConfig]) -> QuantizationConfig:
    """Returns a configuration of a method: that of its first short name, or its defaults."""
    return kind(**next(iter(kind.short_names.values()), {}))


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
