"""The smallest changes of a request that make it fit its devices. Each is found by planning with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from distquant.planning.generation_memory import Alternative, Estimates
from distquant.planning.planned import Planned

TP_SIZES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Sizes of tp that are tried: what machines have."""

METHODS = ("int8", "nf4", "nf4-dq")
"""Short names of methods that are tried, from most bits to fewest; they take any shape, and need no calibration."""

BUFFERS = ("128MiB", "32MiB", "8MiB", "1MiB")
"""Budgets of the load buffer that are tried."""

ROUND_CONTEXT = 256
"""Longest contexts are multiples of this where they are longer."""

HOPELESS = 0.5
"""A tp is not tried if its even share of the weights, times this, is more than the limit: shares may be uneven."""

Replan = Callable[[Mapping[str, Any]], Estimates | None]
"""Plans again with changed options; None where that cannot work."""


def with_changes(planned: Planned, estimates: Estimates, replan: Replan) -> Estimates:
    """Returns the estimates with the changes that make it fit; as they are if it fits, or no limit is known."""
    if all(device.fits is not False for device in estimates.memory()):
        return estimates
    changes = [_context(estimates)]
    if planned.device_map is None:
        changes.append(_first(_buffers(estimates), estimates, replan))
        changes.append(_first(_meshes(planned, estimates), estimates, replan))
        if not planned.prequantized:
            changes.append(_first(_methods(), estimates, replan))
    return replace(estimates, alternatives=tuple(change for change in changes if change is not None))


def _context(estimates: Estimates) -> Alternative | None:
    """Returns the longest context that fits, if loading does."""
    context = estimates.longest_context(estimates.batch)
    if context is None:
        return None
    if context > ROUND_CONTEXT:
        context -= context % ROUND_CONTEXT
    return Alternative(f"context {context}", estimates.worst(context).needed)


def _buffers(estimates: Estimates) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields smaller load buffers, where only loading does not fit."""
    devices = estimates.memory()
    if all(device.limit is None or device.generating <= device.limit for device in devices):
        yield from ((f"load buffer (staging) {size}", {"staging": size}) for size in BUFFERS)


def _meshes(planned: Planned, estimates: Estimates) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields larger sizes of tp."""
    mesh, worst = planned.mesh, estimates.worst()
    if not planned.description.tp_plan:
        return
    for tp in TP_SIZES:
        share = worst.weights * mesh.tp / tp * HOPELESS
        if tp > mesh.tp and worst.limit is not None and share <= worst.limit:
            changed = replace(mesh, tp=tp)
            yield f"mesh {changed}", {"mesh": changed}


def _methods() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields methods, from most bits to fewest."""
    yield from ((f"quantization {name}", {"quantization_config": name}) for name in METHODS)


def _first(
    candidates: Iterator[tuple[str, dict[str, Any]]], estimates: Estimates, replan: Replan
) -> Alternative | None:
    """Returns the first change with which every device fits; None if there is none."""
    for text, change in candidates:
        other = replan(change)
        if other is not None and all(device.fits for device in other.memory(estimates.context, estimates.batch)):
            return Alternative(text, other.worst(estimates.context, estimates.batch).needed)
    return None
