"""The tables of the page: every rule, rank, tensor and partition, to be searched and sorted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from distquant.cli.page.folding import TensorGroup
from distquant.cli.page.markup import Html, cell, table, tag
from distquant.cli.page.memory import needed
from distquant.cli.page.weights import division, storage
from distquant.planning import LoadPlan
from distquant.planning.read_strategy import OWN, SCATTER, SHARED
from distquant.planning.summary import heads_of
from distquant.units import format_bytes

MOST_RANKS, MOST_TENSORS = 1024, 4096
"""Rows that a table has of these; of more, there is a row for each group, which names all its members."""
SHOWN = ("shape", "dtype", "scheme", "shard_dim", "partition", "experts")
"""Facts of a tensor that its texts depend on."""
READ = {OWN: "own slices", SHARED: "in shares", SCATTER: "scattered"}
"""Ways of reading in words, those of `REASONS`, by the name of the strategy."""
MOST_PARTS = 64
"""Ranks whose segments a row of a partition lists."""


def all_tables(plan: LoadPlan, groups: Sequence[TensorGroup]) -> Iterable[Html]:
    """Yields the tables, each behind a line that opens it."""
    if plan.rules:
        rules = [(tag("code", r.pattern), r.asked, r.became, r.modules, r.reason) for r in plan.rules]
        header = ("rule", "asked", "became", "modules", "why")
        yield _folded("Rules of the model's parallel plan", header, rules, ("modules",), is_open=True)
    if plan.device_map is not None:
        places = [(tag("code", module or "(everything)"), place) for module, place in plan.device_map.items()]
        yield _folded("Device map", ("module", "device"), places)
    yield _ranks(plan)
    yield _tensors(plan, groups)
    if plan.partitions:
        yield _partitions(plan)
    config = [(tag("code", key), tag("code", json.dumps(value))) for key, value in sorted(_config(plan).items())]
    yield _folded("Quantization configuration", ("option", "value"), config)


def _config(plan: LoadPlan) -> dict[str, object]:
    return {**plan.quantization_config, **plan.selection}


def _folded(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[object]],
    numbers: Sequence[str] = (),
    is_open: bool = False,
) -> Html:
    count = tag("span", f"{len(rows):,} row{'s' * (len(rows) != 1)}", class_="dim")
    return tag("details", tag("summary", title, " ", count), table(header, rows, title, numbers), open=is_open)


def _ranks(plan: LoadPlan) -> Html:
    sizes = ("to read", "quantized", "unquantized", "to load", "to generate")
    header = ("rank", "position", "node", "parameters", *sizes, "heads")
    rows = [
        (
            m.rank,
            ", ".join(
                f"{axis} {number}"
                for axis, number in plan.mesh.coordinates(m.rank).items()
                if getattr(plan.mesh, axis) > 1
            ),
            plan.nodes[m.rank],
            f"{m.parameters:,}",
            *(
                cell(format_bytes(size), size)
                for size in (m.read, m.quantized, m.unquantized, rank.loading, rank.generating)
            ),
            heads_of(plan, m.rank),
        )
        for m, rank in zip(plan.memory[:MOST_RANKS], needed(plan), strict=False)
    ]
    title = "Ranks" if len(plan.memory) <= MOST_RANKS else f"Ranks: the first {MOST_RANKS:,} of {len(plan.memory):,}"
    return _folded(title, header, rows, ("rank", "node", "parameters", *sizes))


def _tensors(plan: LoadPlan, groups: Sequence[TensorGroup]) -> Html:
    is_whole = len(plan.tensors) <= MOST_TENSORS
    listed = (
        [(tensor.name, "", tensor) for tensor in plan.tensors]
        if is_whole
        else [(group.pattern, group.label, group.tensor) for group in groups]
    )
    texts: dict[object, tuple[str, str]] = {}
    rows = []
    for name, label, tensor in listed:
        # With a device map the texts name each tensor's device.
        name_too = tensor.name if plan.device_map is not None else ""
        alike = name_too, *(getattr(tensor, fact) for fact in SHOWN)
        if alike not in texts:
            texts[alike] = storage(plan, tensor), division(plan, tensor)
        shape = " × ".join(f"{size:,}" for size in tensor.shape)
        rows.append(
            (name, *([] if is_whole else [label]), shape, *texts[alike], tensor.partition or "", READ[tensor.reading])
        )
    header = ("name", *([] if is_whole else ["where"]), "shape", "stored", "division", "partition", "read")
    title = "Tensors" if is_whole else f"Tensors: {len(plan.tensors):,} in groups"
    return _folded(title, header, rows)


def _partitions(plan: LoadPlan) -> Html:
    rows = []
    for key, partition in plan.partitions.items():
        parts = ["+".join(f"{start}-{stop - 1}" for start, stop in part) for part in partition.parts]
        more = f", ... ({len(parts)} ranks)" if len(parts) > MOST_PARTS else ""
        least, most = min(partition.lengths), max(partition.lengths)
        each = f"{most:,}" if least == most else f"{least:,} to {most:,}"
        rows.append((key, f"{partition.size:,}", len(parts), each, ", ".join(parts[:MOST_PARTS]) + more))
    return _folded(
        "Partitions", ("partition", "size", "parts", "each", "elements of each part"), rows, ("size", "parts")
    )
