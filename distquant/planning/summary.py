"""A plan as text for people: the first three lines say if it fits, all others why."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from distquant.planning.generation_memory import DeviceMemory, Estimates
from distquant.planning.read_strategy import REASONS
from distquant.sharding.heads import HeadPartition
from distquant.sharding.mesh import Mesh
from distquant.tables import table
from distquant.units import format_bytes

SHOWN_RANKS = 16
"""Ranks that a table lists; of more, the first and last are shown."""

SHOWN_DEVICES = 4
"""Devices of a device map that the first lines name; of more, the one that needs most."""

DEVICE_GB = (4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 141, 180, 192, 288)
"""Sizes in which devices are sold."""

FREE_OF_GB = 0.95 * 2**30
"""Bytes that are free on a device for each GB of its name: drivers keep some."""


class Plan(Protocol):
    """The fields of `LoadPlan` that the text is about."""

    # Here and not imported: a plan prints itself, so its module imports this one.
    @property
    def model(self) -> str: ...
    @property
    def architecture(self) -> str: ...
    @property
    def mesh(self) -> Mesh: ...
    @property
    def dtype(self) -> str: ...
    @property
    def quantization_config(self) -> Mapping[str, Any]: ...
    @property
    def prequantized(self) -> bool: ...
    @property
    def tensors(self) -> Sequence[Any]: ...
    @property
    def heads(self) -> Mapping[str, HeadPartition]: ...
    @property
    def rules(self) -> Sequence[Any]: ...
    @property
    def notes(self) -> Sequence[str]: ...
    @property
    def memory(self) -> Sequence[Any]: ...
    @property
    def device_map(self) -> Mapping[str, str] | None: ...
    @property
    def check_at_load(self) -> Sequence[str]: ...
    @property
    def estimates(self) -> Estimates | None: ...
    @property
    def digest(self) -> str: ...


def plan_text(plan: Plan) -> str:
    """Returns the whole plan as text."""
    parts = [*headline(plan), "", *identity(plan), "", _memory_table(plan)]
    if plan.mesh.size > 1:
        reading = Counter(tensor.reading for tensor in plan.tensors)
        parts += ["", *(f"{count:,} tensors {REASONS[way]}" for way, count in reading.items())]
    if plan.rules:
        rows = [(r.pattern, r.asked, r.became, str(r.modules), r.reason) for r in plan.rules]
        parts += ["", table(RULE_HEADER, rows)]
    if plan.device_map is not None:
        parts += ["", table(("module", "device"), [(k or "(everything)", v) for k, v in plan.device_map.items()])]
    notes = [f"note: {note}" for note in plan.notes]
    notes += [f"checked at load: {item}" for item in plan.check_at_load]
    return "\n".join([*parts, "", *notes] if notes else parts)


RULE_HEADER = ("modules", "the model's plan", "sharded as", "count", "reason")


def identity(plan: Plan) -> list[str]:
    """Returns what is loaded, by which method and onto which ranks, in two lines."""
    quantization = plan.quantization_config.get("quant_method", "none")
    stored = "as the checkpoint stores it" if plan.prequantized else f"from {plan.dtype}"
    ranks = "1 rank" if plan.mesh.size == 1 else f"{plan.mesh.size} ranks"
    return [
        f"{plan.architecture} from {plan.model}",
        f"quantization {quantization} {stored}, mesh {plan.mesh} ({ranks}), plan {plan.digest[:16]}",
    ]


def plan_repr(plan: Plan) -> str:
    """Returns the plan in one short line."""
    method = plan.quantization_config.get("quant_method", "none")
    return f"LoadPlan({plan.architecture}, {method}, mesh {plan.mesh}, digest {plan.digest[:16]})"


def plan_html_fragment(plan: Plan) -> str:
    """Returns the first lines of the plan for a notebook, and the rest to unfold."""
    rows = "".join(
        f'<tr><th style="text-align:left">{html.escape(name)}</th>'
        f'<td style="text-align:left">{html.escape(text)}</td></tr>'
        for name, text in _lines(plan)
    )
    title = html.escape(", ".join(identity(plan)))
    return (
        f"<div><div>{title}</div><table>{rows}</table>"
        f"<details><summary>details</summary><pre>{html.escape(plan_text(plan))}</pre></details></div>"
    )


# -- the first three lines ---------------------------------------------------------------------------------------------


def headline(plan: Plan) -> list[str]:
    """Returns the three lines that say how much memory a device needs, and if it has that."""
    lines = _lines(plan)
    width = max(len(name) for name, _ in lines)
    return [f"{name.ljust(width)}  {text}" for name, text in lines]


def _lines(plan: Plan) -> list[tuple[str, str]]:
    """Returns the name and the text of each of the three lines."""
    estimates = plan.estimates
    if estimates is None:
        worst = max(plan.memory, key=lambda row: row.finished)
        again = "plan again from the checkpoint to see it"
        return [
            ("weights", f"{format_bytes(worst.finished)} {_on_each(plan.mesh.size, f'rank {worst.rank}')}"),
            ("generation", f"not in a plan that was read from JSON: {again}"),
            ("fits", f"not in a plan that was read from JSON: {again}"),
        ]
    devices = estimates.memory()
    return [
        ("weights", _weights(plan, estimates, devices)),
        ("generation", _generation(plan, estimates, devices)),
        ("fits", _fits(plan, estimates, devices)),
    ]


def _on_each(size: int, largest: str, equal: bool = False) -> str:
    if size == 1:
        return "on one device"
    return f"on each of {size} devices" if equal else f"on each of {size} devices at most ({largest})"


def _named(devices: Sequence[DeviceMemory], amount: Any) -> str:
    """Returns an amount of each device of a device map; of many, of the one that has most."""
    ordered = sorted(devices, key=amount, reverse=True)
    shown = devices if len(devices) <= SHOWN_DEVICES else ordered[:1]
    more = f" (most of {len(devices)} devices)" if len(shown) < len(devices) else ""
    return ", ".join(f"{device.name} {format_bytes(amount(device))}" for device in shown) + more


def _weights(plan: Plan, estimates: Estimates, devices: Sequence[DeviceMemory]) -> str:
    host = " of host memory" if plan.device_map is not None else ""
    buffer = f"; load buffer {format_bytes(estimates.load_buffer)}{host}, given back when loading ends"
    if not estimates.load_buffer:
        buffer = ""
    if plan.device_map is not None:
        return _named(devices, lambda device: device.weights) + buffer
    worst = max(devices, key=lambda device: device.weights)
    equal = len({device.weights for device in devices}) == 1
    return f"{format_bytes(worst.weights)} {_on_each(plan.mesh.size, worst.name, equal)}{buffer}"


def _generation(plan: Plan, estimates: Estimates, devices: Sequence[DeviceMemory]) -> str:
    if not estimates.decoded:
        return "not estimated: the cache of this model is not known"
    asked = f"context {estimates.context:,}, batch {estimates.batch:,}"
    missing = f"; without the cache of {len(estimates.uncounted)} layers of unknown kind" if estimates.uncounted else ""
    if plan.device_map is not None:
        running = [device for device in devices if device.cache or device.activations]
        cache = _named(running, lambda device: device.cache)
        work = _named(running, lambda device: device.activations)
        return f"KV cache {cache} ({asked}); activations about {work}{missing}"
    worst = max(devices, key=lambda device: device.generating)
    total = format_bytes(worst.cache + worst.activations)
    return (
        f"{total} more: KV cache {format_bytes(worst.cache)} ({asked}), "
        f"activations about {format_bytes(worst.activations)}{missing}"
    )


def _fits(plan: Plan, estimates: Estimates, devices: Sequence[DeviceMemory]) -> str:
    if plan.device_map is not None and any(device.limit is not None for device in devices):
        return _fits_map(estimates, devices)
    worst = estimates.worst()
    if worst.limit is None:
        if plan.device_map is not None:
            return f"needs {_named(devices, lambda device: device.needed)}; give max_memory to compare"
        needed = int(max(worst.loading / estimates.reserve, worst.generating))
        return f"needs {format_bytes(needed)} on each device{_sold_as(needed)}; give max_memory to compare"
    limit = f"{format_bytes(worst.limit)} ({estimates.limit_source})"
    if worst.fits:
        return f"yes: {format_bytes(worst.needed)} of {limit}"
    return f"no: needs {format_bytes(worst.needed)}, the limit is {limit}. {change_text(estimates)}"


def change_text(estimates: Estimates) -> str:
    """Returns the changes that make it fit, in words."""
    if not estimates.alternatives:
        return "No shorter context, larger tp or smaller method was found that fits"
    changes = [f"{each.change} (needs {format_bytes(each.needed)})" for each in estimates.alternatives]
    return f"Smallest change that fits: {', or '.join(changes)}"


def _fits_map(estimates: Estimates, devices: Sequence[DeviceMemory]) -> str:
    full = [device for device in devices if device.fits is False]
    texts = [
        f"{device.name} {format_bytes(device.needed)}"
        + (f" of {format_bytes(device.limit)}" if device.limit is not None else " (no limit given)")
        for device in (full or devices)[:SHOWN_DEVICES]
    ]
    if full:
        changes = change_text(estimates) if estimates.alternatives else "Move modules to other devices"
        return f"no: needs {', '.join(texts)}. {changes}"
    return f"yes: {', '.join(texts)}"


def _sold_as(needed: int) -> str:
    """Returns the smallest usual size of a device that has this much memory."""
    size = next((size for size in DEVICE_GB if needed <= size * FREE_OF_GB), None)
    return f", such as one of {size} GB" if size else ", which is more than any device has"


# -- details -----------------------------------------------------------------------------------------------------------


def _memory_table(plan: Plan) -> str:
    if plan.device_map is not None and plan.estimates is not None:
        return _device_table(plan.estimates.memory())
    by_rank = {rank: device for device in plan.estimates.memory() for rank in device.ranks} if plan.estimates else {}
    rows = [_memory_row(row, by_rank.get(row.rank)) for row in plan.memory]
    if len(rows) > SHOWN_RANKS:
        rows = [*rows[: SHOWN_RANKS // 2], ("...",) * len(rows[0]), *rows[-SHOWN_RANKS // 2 :]]
    header = ["rank", "parameters", "to read", "quantized", "unquantized", "loading"]
    header += ["KV cache", "activations", "needs"] if by_rank else ["at most"]
    heads = {row.rank: heads_of(plan, row.rank) for row in plan.memory[:SHOWN_RANKS]}
    lines = [f"rank {rank}: {text}" for rank, text in heads.items() if text]
    return "\n".join([table(header, rows), *(["", *lines] if lines else [])])


def _memory_row(row: Any, device: DeviceMemory | None) -> tuple[str, ...]:
    sizes = [row.read, row.quantized, row.unquantized]
    if device is None:
        sizes += [row.staging, row.peak]
    else:
        sizes += [device.load_buffer + device.load_workspace, device.cache, device.activations, device.needed]
    return (f"{row.rank}", f"{row.parameters:,}", *map(format_bytes, sizes))


def _device_table(devices: Sequence[DeviceMemory]) -> str:
    rows = [
        (
            device.name,
            *map(format_bytes, (device.weights, device.cache, device.activations, device.needed)),
            "unknown" if device.limit is None else format_bytes(device.limit),
        )
        for device in devices
    ]
    return table(("device", "weights", "KV cache", "activations", "needs", "limit"), rows)


def heads_of(plan: Plan, rank: int) -> str:
    """Returns the rank's attention heads in words, for each kind of attention."""
    tp = plan.mesh.coordinates(rank)["tp"]
    return "; ".join(heads.describe(tp) for heads in plan.heads.values())
