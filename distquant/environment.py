"""Facts about the machines that will hold the shards: measured by a runtime, declared by the user, or unknown.

An unknown is not a guess: the plan lists it as checked at load.
"""

from __future__ import annotations

import importlib.metadata
import os
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """Devices and packages as far as they are known; None means unknown until load."""

    device_type: str | None = None
    """Type of a rank's device: `cpu`, `cuda`, ..."""
    device_count: int | None = None
    """Devices that the ranks can use."""
    capability: tuple[int, int] | None = None
    """Compute capability of the weakest device, for CUDA."""
    differing: tuple[tuple[int, int], ...] = ()
    """All capabilities of the ranks' devices, if they differ."""
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


ENTRY_POINTS = "distquant.quantization"
"""Entry points under which other packages offer quantization methods."""
OLD_ENTRY_POINTS = "distquant.schemes"
"""The group's name up to 0.1; still read, with a warning."""


def offered_methods() -> list[importlib.metadata.EntryPoint]:
    """Returns the entry points of other packages' quantization methods, none of them loaded."""
    return [
        entry for group in (ENTRY_POINTS, OLD_ENTRY_POINTS) for entry in importlib.metadata.entry_points(group=group)
    ]


def is_rank() -> bool:
    """Returns True if a launcher has started this process as a rank.

    A rank of one without an address is alone: schedulers and notebooks set RANK and WORLD_SIZE=1 for any process.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return False
    return os.environ["WORLD_SIZE"].strip() != "1" or "MASTER_ADDR" in os.environ


CGROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Returns the CPU cores that this process may use: those of its affinity mask, within its cgroup's CPU limit."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        cores = os.cpu_count() or 1
    limit = cpu_limit()
    return cores if limit is None else max(min(cores, int(limit)), 1)


def cpu_limit(cgroups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Returns the cores' worth of time that cgroups grant this process, or None without a limit.

    Reads `cpu.max` of version 2 in the process's group and all groups around it; else the quota of version 1. In a
    container the own group is often mounted as the root.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return None
    limits = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        group = path.strip("/")
        if not controllers:
            parents = [group, *(str(parent) for parent in Path(group).parents)]
            limits += [_share(cgroups / parent / "cpu.max") for parent in dict.fromkeys((*parents, ""))]
        elif "cpu" in controllers.split(","):
            for folder in (cgroups / "cpu" / group, cgroups / "cpu"):
                limits.append(_share(folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us"))
    known = [limit for limit in limits if limit is not None]
    return min(known, default=None)


def _share(*files: Path) -> float | None:
    """Returns quota / period, which stand in one file or two; None where there is no limit."""
    try:
        quota, period = (int(number) for file in files for number in file.read_text().split())
    except (OSError, ValueError):  # no such file, or `max`
        return None
    return quota / period if quota > 0 and period > 0 else None


def rank_threads(ranks: int) -> int:
    """Returns the threads that each of `ranks` ranks on this machine computes with.

    That is `OMP_NUM_THREADS` where it is set, as for torch itself, and an equal part of the usable cores otherwise.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    return max(usable_cores() // ranks, 1)
