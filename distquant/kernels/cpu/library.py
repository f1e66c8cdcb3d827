"""The shared library of native kernels: loaded once, and called for one instruction set."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from distquant.errors import InputError

ISAS = ("portable", "avx2", "avx512")
"""Instruction sets in ascending order; the index is the library's number for it (`Isa` in `kernels.hpp`)."""

VARIABLE = "DISTQUANT_CPU_ISA"
"""Environment variable that forces an instruction set."""

FLOATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""The library's number for each dtype of weights (`Float` in `kernels.hpp`)."""

COMPUTED, GIVEN = 0, 1
"""The origin of statistics: computed from the weight, or given (`Statistics` in `kernels.hpp`)."""

CODES = {torch.int8: 0, torch.float8_e4m3fn: 1}
"""The library's number for the codes of scaled rows (`Codes` in `kernels.hpp`)."""

NO_ISA, NO_MEMORY = 1, 2
"""Results of a function that did nothing (`Status` in `interface.hpp`)."""

INTERFACE = 4
"""Version of the library's functions as they are called here (`kInterface` in `interface.hpp`)."""

BYTES = 2**63 - 1
"""The largest size: sizes are passed to the library as int64."""


def _load() -> ctypes.CDLL:
    path = Path(__file__).with_name("_native.so")
    if not path.exists():
        raise ImportError(
            f"distquant's native CPU kernels were not built ({path.name} is not in {path.parent}). "
            "Install distquant again where a C++17 compiler (g++ or clang++) is found: `pip install .` or `make venv`"
        )
    native = ctypes.CDLL(str(path))
    if native.distquant_interface() != INTERFACE:
        raise ImportError(
            f"{path} was built from other sources. Install distquant again: `pip install .` or `make venv`"
        )
    return native


_native = _load()


def available() -> tuple[str, ...]:
    """Returns the instruction sets that this build and this machine have, in ascending order."""
    return tuple(name for number, name in enumerate(ISAS) if _native.distquant_has(ctypes.c_int64(number)))


def _first_choice() -> str:
    wanted, there = os.environ.get(VARIABLE), available()
    if wanted and wanted not in there:
        raise InputError.one(VARIABLE, f"{wanted!r} cannot run here", f"This machine has {', '.join(there)}; unset it")
    return wanted or there[-1]


_isa: str | None = None


def isa() -> str:
    """Returns the instruction set of the running kernels: `avx512`, `avx2` or `portable`.

    Raises:
        InputError: `DISTQUANT_CPU_ISA` names one that this machine or build lacks.
    """
    global _isa
    if _isa is None:
        _isa = _first_choice()
    return _isa


@contextmanager
def running(name: str) -> Iterator[None]:
    """Runs the kernels of another instruction set in the process, inside the context. For tests and measurements."""
    global _isa
    before, _isa = isa(), name
    try:
        yield
    finally:
        _isa = before


def call(function: str, *arguments: Tensor | int | None) -> None:
    """Calls `distquant_<function>` for the chosen instruction set with the number of threads that torch has.

    A tensor is passed by its address and must be contiguous, None as the null address, a dtype's number as int.
    """
    # Only addresses are passed on: `arguments` keeps the tensors alive until the call, without the lock, returns.
    native: list[ctypes.c_int64 | ctypes.c_void_p] = []
    for argument in (ISAS.index(isa()), torch.get_num_threads(), *arguments):
        if isinstance(argument, int):
            native.append(ctypes.c_int64(argument))
        else:
            native.append(ctypes.c_void_p(None if argument is None else argument.data_ptr()))
    status = getattr(_native, f"distquant_{function}")(*native)
    if status == NO_ISA:
        raise InputError.one(VARIABLE, f"{isa()!r} cannot run here", f"This machine has {', '.join(available())}")
    if status == NO_MEMORY:
        raise MemoryError(f"{function}: no memory for temporaries")


def flat(tensor: Tensor, name: str) -> Tensor:
    """Returns `tensor` as a contiguous weight.

    Raises:
        ValueError: it is not on the CPU, or has a dtype that the kernels do not take.
    """
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} is {tensor.dtype}; the CPU kernels take float32, float16 and bfloat16")
    return on_cpu(tensor, name)


def on_cpu(tensor: Tensor, name: str, dtype: torch.dtype | None = None, count: int | None = None) -> Tensor:
    """Returns `tensor`, contiguous.

    Raises:
        ValueError: it is not on the CPU, not of `dtype`, or has fewer than `count` elements.
    """
    # The library trusts addresses and sizes: whatever passes here must be safe to read.
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}; the CPU kernels take tensors on the CPU")
    if dtype is not None and tensor.dtype is not dtype:
        raise ValueError(f"{name} is {tensor.dtype}, not {dtype}")
    if count is not None and tensor.numel() < count:
        raise ValueError(f"{name} has {tensor.numel()} elements, not the {count} that are needed")
    return tensor.contiguous()


def matrix(weight: Tensor) -> tuple[Tensor, int, int]:
    """Returns a contiguous weight, its rows and columns; raises ValueError as `flat`, and if it is not a matrix."""
    if weight.dim() != 2:
        raise ValueError(f"the weight has shape {list(weight.shape)}, not that of a matrix")
    return flat(weight, "the weight"), weight.shape[0], weight.shape[1]


def positive(value: int, name: str) -> int:
    """Returns `value`; raises ValueError if it is less than 1 or does not fit the library."""
    if not 1 <= value <= BYTES:
        raise ValueError(f"{name} is {value}, not at least 1")
    return value
