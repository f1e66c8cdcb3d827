"""Values that ranks send each other, as bytes: written as pickles, and read without running anything.

A pickle may name any function, and reading it calls that function. Ranks read theirs from sockets. Whoever reaches one
could send something else, so only what ranks really send is read: plain data, errors, problems and reports.
"""

from __future__ import annotations

import importlib
import io
import pickle
from typing import Any

import torch
from torch import Tensor

from distquant.checkpoint.faults import HeaderFault
from distquant.environment import Environment
from distquant.errors import DistquantError, Problem, RankError
from distquant.loading.report import RankReport

CLASSES = (DistquantError, Problem, HeaderFault, RankReport, Environment)
"""Classes of values that are not plain data; those made from them are among them."""


def to_bytes(value: Any) -> Tensor:
    """Returns uint8 `[bytes]`."""
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def from_bytes(data: Tensor, rank: int) -> Any:
    """Returns the value that a rank has written; `data` is uint8 `[bytes]`.

    Raises:
        RankError: these bytes are none.
    """
    try:
        return _Reader(io.BytesIO(data.cpu().numpy().tobytes())).load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError, ImportError) as error:
        raise RankError(rank, f"sent something that ranks do not send ({error})") from None


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Returns a class that a value may have. Nothing outside distquant is imported."""
        if module.startswith("distquant.") and not module.endswith("__main__"):  # which would run the command line
            found = getattr(importlib.import_module(module), name, None)
            if isinstance(found, type) and issubclass(found, CLASSES):
                return found
        raise pickle.UnpicklingError(f"{module}.{name}")
