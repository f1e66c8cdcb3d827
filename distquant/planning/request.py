"""Reads the options of a user; all invalid ones are reported together."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Any

from distquant.config import QuantizationConfig, parse
from distquant.config.resolve import ON_UNSUPPORTED
from distquant.dtypes import LOAD_DTYPES, dtype_name
from distquant.errors import InputError, Problems
from distquant.options import DISPATCH, Model, PlanOptions
from distquant.sharding.mesh import Mesh
from distquant.units import parse_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Request(PlanOptions):
    """A model, and the options to plan it with, as the user gave them; `make_plan` checks all of them."""

    model: Model


@dataclass(frozen=True, slots=True)
class Given:
    """The values of a request; the default where one is not valid."""

    mesh: Mesh
    staging: int
    dtype: str | None
    config: QuantizationConfig | None
    dispatch: str


@contextmanager
def collected(problems: Problems) -> Iterator[None]:
    """Adds the problems of an `InputError` to `problems`, and goes on."""
    try:
        yield
    except InputError as error:
        problems.extend(error.problems)


def read_request(
    request: Request, problems: Problems, classes: Iterable[type[QuantizationConfig]] | None = None
) -> Given:
    """Reads the options that can be judged without a checkpoint; adds the others to `problems`.

    Args:
        request: as the user gave it.
        problems: gets what is invalid.
        classes: the known configuration classes; None = those of all schemes, for which torch is imported.
    """
    mesh, staging, dtype, config = Mesh(), 0, None, None
    with collected(problems):
        check_model(request.model)
    with collected(problems):
        mesh = Mesh.parse(request.mesh)
    with collected(problems):
        staging = parse_bytes(request.staging, "staging")
    with collected(problems):
        dtype = _dtype_name(request.dtype)
    with collected(problems):
        _check_sizes(request)
    with collected(problems):
        _check_on_unsupported(request.on_unsupported)
    with collected(problems):
        config = parse(request.quantization_config, classes if classes is not None else _of_all_schemes())
    if request.dispatch not in DISPATCH:
        problems.add("dispatch", f"unknown value {request.dispatch!r}", f"Give one of {', '.join(map(repr, DISPATCH))}")
    return Given(mesh, staging, dtype, config, request.dispatch)


def _of_all_schemes() -> list[type[QuantizationConfig]]:
    from distquant.quantization import config_classes

    return config_classes()


def check_model(model: Any) -> None:
    """Raises `InputError` if a model is given as neither path nor id."""
    if isinstance(model, (str, PathLike)):
        return
    fix = "Give the folder of a checkpoint, a GGUF file, or the id of a model in the Hugging Face cache"
    raise InputError.one("model", f"{reprlib.repr(model)} ({type(model).__name__}) is neither a path nor an id", fix)


def _check_sizes(request: Request) -> None:
    """Raises `InputError` if a size or number is invalid, or would be ignored."""
    if request.ranks_per_node is not None and request.ranks_per_node < 1:
        raise InputError.one("ranks_per_node", f"invalid number {request.ranks_per_node}", "Give 1 or more")
    for name, value in (("context", request.context), ("batch", request.batch)):
        if value is not None and value < 1:
            raise InputError.one(name, f"invalid number {value}", "Give 1 or more")
    if not isinstance(request.max_memory, Mapping):
        if request.max_memory is not None:
            parse_bytes(request.max_memory, "max_memory")
    elif request.device_map is None:
        fault = f"sizes of {', '.join(map(str, request.max_memory))} are given without a device_map"
        raise InputError.one("max_memory", fault, "Give one size for every rank, or device_map='auto'")


def _check_on_unsupported(value: Any) -> None:
    if value not in ON_UNSUPPORTED:
        known = ", ".join(map(repr, ON_UNSUPPORTED))
        raise InputError.one("on_unsupported", f"unknown value {value!r}", f"Give one of {known}")


def _dtype_name(dtype: Any) -> str | None:
    if dtype is None or (isinstance(dtype, str) and dtype.strip().lower() == "auto"):
        return None
    name = dtype_name(dtype)
    if name not in LOAD_DTYPES:
        raise InputError.one("dtype", f"cannot load in {dtype!r}", f"Use {', '.join(LOAD_DTYPES)} or auto")
    return name
