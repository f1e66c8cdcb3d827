"""The registry of schemes: one dict, one decorator, and an entry-point group for third parties."""

from __future__ import annotations

import importlib
from importlib.metadata import EntryPoint
from typing import TypeVar

from distquant.config import QuantizationConfig
from distquant.environment import ENTRY_POINTS, OLD_ENTRY_POINTS, offered_methods
from distquant.errors import InputError
from distquant.model import ModuleNames
from distquant.old_names import warn_old_name
from distquant.process_state import changing_process_state
from distquant.quantization.scheme import Scheme

METHODS = (
    "none",
    "bitsandbytes_4bit",
    "bitsandbytes_8bit",
    "gptq",
    "awq",
    "auto_round",
    "compressed_tensors",
    "fp8",
    "mxfp8",
    "mxfp4",
    "fbgemm_fp8",
    "quanto",
    "torchao",
    "hqq",
    "gguf",
)
BUILT_IN = (*(f"distquant.quantization.methods.{method}" for method in METHODS), "distquant.quantization.delegated")

SCHEMES: dict[str, type[Scheme]] = {}
"""Scheme by name."""

S = TypeVar("S", bound=type[Scheme])
_discovered = False


def register(scheme: S) -> S:
    """Registers a class under its `name`, as a decorator. A second class of the same name is an error."""
    known = SCHEMES.setdefault(scheme.name, scheme)
    if known is not scheme:
        raise InputError.one(
            f"{scheme.__module__}.{scheme.__qualname__}",
            f"registers the scheme {scheme.name!r}, which {known.__module__} already provides",
            "Give it another name or uninstall one of the packages",
        )
    return scheme


@changing_process_state()
def discover() -> dict[str, type[Scheme]]:
    """Returns all schemes: the built-in ones and those of installed packages."""
    global _discovered
    if not _discovered:
        _discovered = True
        for module in BUILT_IN:
            importlib.import_module(module)
        # One order in messages, whichever method was imported first.
        for name in sorted(SCHEMES, key=lambda name: (_place(SCHEMES[name].__module__), name)):
            SCHEMES[name] = SCHEMES.pop(name)
        for entry in offered_methods():
            _load(entry)
    return SCHEMES


def _place(module: str) -> int:
    """Returns the place of a scheme's module, or of the package around it, among the built-in ones."""
    places = (number for number, known in enumerate(BUILT_IN) if f"{module}.".startswith(f"{known}."))
    return next(places, len(BUILT_IN))


def _load(entry: EntryPoint) -> None:
    """Registers a third party's scheme."""
    if entry.group == OLD_ENTRY_POINTS:
        warn_old_name(f"entry point {entry.name!r}: the group {OLD_ENTRY_POINTS}", ENTRY_POINTS)
    try:
        register(entry.load())
    except (ImportError, AttributeError) as error:
        raise InputError.one(
            f"entry point {entry.name!r} of group {entry.group}",
            f"{entry.value} cannot be loaded ({error})",
            "Repair or uninstall the package that declares it",
        ) from error


def config_classes() -> list[type[QuantizationConfig]]:
    """The configuration class of every scheme."""
    return [scheme.config_class for scheme in discover().values()]


def scheme_for(config: QuantizationConfig, names: ModuleNames | None = None) -> Scheme:
    """The scheme of a configuration; `names` are those of the model's modules, where they are known."""
    for kind in discover().values():
        if kind.config_class is type(config):
            scheme = kind(config)
            scheme.names = names or scheme.names
            return scheme
    raise InputError.one("quantization_config", f"no scheme takes {type(config).__name__}", "Register one")
