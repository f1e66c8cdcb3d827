"""What is known about the machines that will hold the shards: measured by a runtime, declared by the user, or unknown.

An unknown is not a guess: the plan lists it as checked at load.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """Devices and packages as far as they are known; None means unknown until load."""

    device_type: str | None = None
    """`cpu`, `cuda`, ...; what one rank's device is."""
    device_count: int | None = None
    """Devices that the ranks can use."""
    capability: tuple[int, int] | None = None
    """Compute capability of the weakest device, for CUDA."""
    memory: int | None = None
    """Bytes that one rank may fill."""
    memory_source: str = "unknown"
    """Where `memory` comes from: `--max-memory`, a measurement, or unknown."""
    nodes: tuple[int, ...] = ()
    """The node of each rank (ranks of one node share memory); empty = unknown."""
    packages: dict[str, str] = field(default_factory=dict)
    """Installed versions by package name."""


_VERSIONS: dict[str, str] = {}
"""Of packages that were found: reading their metadata takes milliseconds each. One that is missing may come."""


def installed(package: str) -> str | None:
    """Version of an installed package, or None; nothing is imported."""
    if package not in _VERSIONS:
        try:
            _VERSIONS[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None
    return _VERSIONS[package]
