"""Shared parts of the pages of `methods.py`: model, machine and versions, and the names of methods."""

from __future__ import annotations

import datetime
import importlib.metadata
import sys

from checkpoints import describe
from common import machine

PACKAGES = (
    "distquant", "torch", "transformers", "accelerate", "bitsandbytes", "compressed-tensors", "torchao",
    "optimum-quanto", "hqq",
)  # fmt: skip


def about(path: str, load: float) -> str:
    """Describes model, machine, versions and kernels."""
    installed = {distribution.metadata["Name"] for distribution in importlib.metadata.distributions()}
    known = tuple(name for name in PACKAGES if name in installed)
    return f"{describe(path)}\n\n{machine(load, known)}\nKernels of distquant: {kernels()}."


def kernels() -> str:
    """Describes the kernels that `auto` takes here: seconds depend on them."""
    import torch

    from distquant.kernels.choice import choose

    return choose("auto", torch.device("cpu")).reason.partition(",")[0]


def today() -> str:
    return datetime.date.today().isoformat()


def check_known(only: list[str] | None, names: list[str] | tuple[str, ...]) -> None:
    unknown = [name for name in only or () if name not in names]
    if unknown:
        sys.exit(f"--only: {', '.join(unknown)} not among {', '.join(names)}")
