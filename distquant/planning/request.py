"""What a user asks for, and how it is read: everything that is wrong with it is told together."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from distquant.config import QuantizationConfig, parse
from distquant.config.resolve import ON_UNSUPPORTED
from distquant.dtypes import LOAD_DTYPES
from distquant.errors import InputError, Problems
from distquant.planning.expert_parallel import ALL_REDUCE, DISPATCH
from distquant.quantization import config_classes
from distquant.sharding.mesh import Mesh
from distquant.units import parse_bytes

DEFAULT_STAGING = "512MiB"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the user asked for, as given; `make_plan` checks all of it."""

    model: str | os.PathLike[str]
    quantization_config: Any = None
    mesh: Any = None
    device_map: Any = None
    max_memory: Any = None
    dtype: Any = None
    staging: str | int = DEFAULT_STAGING
    ranks_per_node: int | None = None
    """Ranks that share a node, where nobody has measured it."""
    dispatch: str = ALL_REDUCE
    """How tokens reach experts on other ranks of ep (`planning.experts.DISPATCH`)."""
    on_unsupported: str = "error"
    trust_remote_code: bool = False
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class Given:
    """What could be read of a request; the default where it could not."""

    mesh: Mesh
    staging: int
    dtype: str | None
    config: QuantizationConfig | None
    dispatch: str


@contextmanager
def collected(problems: Problems) -> Iterator[None]:
    """Adds what an `InputError` tells to `problems`, and goes on."""
    try:
        yield
    except InputError as error:
        problems.extend(error.problems)


def read_request(request: Request, problems: Problems) -> Given:
    """Reads what needs no checkpoint to be understood; `problems` gets what cannot be."""
    mesh, staging, dtype, config = Mesh(), 0, None, None
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
        config = parse(request.quantization_config, config_classes())
    if request.dispatch not in DISPATCH:
        what = f"{request.dispatch!r} is no way for tokens to reach experts on other ranks"
        problems.add("dispatch", what, f"Give one of {', '.join(map(repr, DISPATCH))}")
    return Given(mesh, staging, dtype, config, request.dispatch)


def _check_sizes(request: Request) -> None:
    """Raises `InputError` where `max_memory` or `ranks_per_node` is no size, or would be ignored."""
    if request.ranks_per_node is not None and request.ranks_per_node < 1:
        what = f"{request.ranks_per_node} ranks cannot share a node"
        raise InputError.one("ranks_per_node", what, "Give 1 or more")
    if not isinstance(request.max_memory, Mapping):
        if request.max_memory is not None:
            parse_bytes(request.max_memory, "max_memory")
    elif request.device_map is None:
        what = f"sizes of {', '.join(map(str, request.max_memory))} are given without a device_map"
        raise InputError.one("max_memory", what, "Give one size for every rank, or device_map='auto'")


def _check_on_unsupported(given: Any) -> None:
    if given not in ON_UNSUPPORTED:
        what = f"{given!r} is no way to treat a checkpoint whose method is not supported"
        raise InputError.one("on_unsupported", what, f"Give one of {', '.join(map(repr, ON_UNSUPPORTED))}")


def _dtype_name(dtype: Any) -> str | None:
    if dtype is None or dtype == "auto":
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in LOAD_DTYPES:
        raise InputError.one("dtype", f"cannot load in {dtype!r}", f"Use {', '.join(LOAD_DTYPES)} or auto")
    return name
