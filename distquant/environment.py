"""Facts about the machines that will hold the shards: measured by a runtime, declared by the user, or unknown.

An unknown is not a guess: the plan lists it as checked at load.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """Devices and packages as far as they are known; None means unknown until load."""

    device_type: str | None = None
    """Type of a rank's device: `cpu`, `cuda`, ..."""
    device_count: int | None = None
    """Devices that the ranks can use."""
    capability: tuple[int, int] | None = None
    """Compute capability of the weakest device, for CUDA."""
    memory: int | None = None
    """Bytes that one rank may fill."""
    memory_source: str = "unknown"
    """Source of `memory`: `max_memory`, a measurement, or unknown."""
    nodes: tuple[int, ...] = ()
    """The node of each rank (ranks of one node share memory); empty = unknown."""
    packages: dict[str, str] = field(default_factory=dict)
    """Installed versions by package name."""


_VERSIONS: dict[str, str] = {}
"""Versions of installed packages: reading metadata takes milliseconds each. A missing package is looked up again."""


def installed(package: str) -> str | None:
    """Returns the version of an installed package, or None; nothing is imported."""
    if package not in _VERSIONS:
        try:
            _VERSIONS[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None
    return _VERSIONS[package]
