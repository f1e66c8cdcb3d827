"""Predicts a load over the devices of one node, by counting; nothing here has run on a GPU.

    python benchmarks/devices.py FOLDER:MESH[:QUANT] [...] [--storage 50] [--note TEXT] [--out FILE]

FOLDER is a checkpoint, of which only config and headers are read, so sparse files do. QUANT is left out where the
checkpoint is loaded as it is stored. All ranks of the mesh share a node, each with a device.

The counts are exact: they are those of the planner and of the engine's own pieces. What a piece costs Python is
measured on the simulated device of the tests (`tests/sim`), in a load of the small example model, where the number of
copies is compared with the count. Everything else is arithmetic with the bandwidths declared in `COSTS`. "Before" is
the way of a load up to version 1.0: the listening thread copies every piece of a peer to the device and waits.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import ROOT, SMALL, fresh, machine, table, write

COSTS = {
    "storage": (50e9, "bytes/s of a node, all ranks together", "the aim of this benchmark"),
    "pinned": (50e9, "bytes/s to or from a device", "PCIe 5.0 x16 has 63e9 in its specification"),
    "pageable": (6e9, "bytes/s to or from a device", "the driver copies twice; one thread's copy of the second"),
    "host": (10e9, "bytes/s that one thread copies or adds up in memory", "a core of a server of 2023"),
    "latency": (8e-6, "s for a copy that is waited for", "CUDA's launch, copy and synchronization"),
    "launches": (100e-6, "s to launch the kernels of a piece", "ten launches"),
    "table": (2e-3, "s to make the table of second-level codes", "measured on a CPU; before: for every weight"),
}
"""Name -> (value, unit, source). None of them was measured on the node that they stand for."""

PACKAGES = ("distquant", "torch", "transformers")
GB = 1e9


@dataclass
class Counts:
    """The work of one rank in a load."""

    start: float = 0.0
    """CPU seconds of plan and tasks."""
    read: int = 0
    pieces: int = 0
    encoded: int = 0
    """Pieces that are quantized."""
    to_device: tuple[int, int] = (0, 0)
    """Pieces that go to the device as they were read, and their bytes: to be quantized, or kept by this rank alone."""
    sent: tuple[int, int] = (0, 0)
    """Components that other ranks get, and their bytes."""
    received: Counter[str] = field(default_factory=Counter)
    """Components of pieces of other ranks, by what the rank keeps of them: all (statistics), columns, or rows."""
    bytes: Counter[str] = field(default_factory=Counter)
    """Bytes that it keeps of these."""
    uploads: tuple[int, int] = (0, 0)
    """Components that are gathered on the host, and their bytes."""
    nested: tuple[int, int] = (0, 0)
    """Weights whose statistics are averaged, and their bytes."""
    tensors: int = 0


def count(folder: str, mesh: str, quant: str | None, rank: int = 0, staging: str | None = None) -> Counts:
    """Counts what a rank of one node does; the others do about the same."""
    import torch

    import distquant as dq
    from distquant.checkpoint import open_checkpoint
    from distquant.garbage_collection import without_collector
    from distquant.loading.loader import scheme_of
    from distquant.loading.node_tasks import tasks_of
    from distquant.loading.stream.budget import Budget
    from distquant.loading.stream.tasks import chunks_of, kept_bytes

    options: dict[str, Any] = {"quantization_config": quant} if quant else {}
    options |= {"staging": staging} if staging else {}
    dq.plan(SMALL, quantization_config=quant or "none")  # imports
    dq.plan(folder, mesh=mesh, ranks_per_node=1024, **options)  # imports of the architecture
    begun = time.process_time()
    plan = dq.plan(folder, mesh=mesh, ranks_per_node=1024, **options)
    planned = time.process_time() - begun
    infos, scheme, device = open_checkpoint(folder).tensors, scheme_of(plan), torch.device("cuda", 0)
    node = tuple(range(plan.mesh.size))
    begun = time.process_time()
    with without_collector():
        tasks = list(tasks_of(plan, scheme, node, infos, lambda _: device, lambda _: None))
    counts = Counts(start=planned + time.process_time() - begun)
    budget = Budget.of(plan.staging, tasks)
    for task in tasks:
        if not task.is_for(rank):
            continue
        counts.tensors += 1
        for row_layout in task.row_layouts:
            if row_layout.name in task.on_host:
                counts.uploads = _plus(counts.uploads, kept_bytes(task.transfer.kind, row_layout))
            if row_layout.replicated:
                counts.nested = _plus(counts.nested, row_layout.nbytes(0, row_layout.rows))
        for reader in {read.reader for read in task.reads}:
            for chunk in chunks_of(task, reader, budget.piece):
                _add(counts, chunk, rank, reader)
    return counts


def _plus(counted: tuple[int, int], nbytes: int) -> tuple[int, int]:
    return counted[0] + 1, counted[1] + nbytes


def _add(counts: Counts, chunk: Any, rank: int, reader: int) -> None:
    """Counts a piece that a rank reads, or gets a part of."""
    from distquant.dtypes import TORCH_NAMES

    task, shared = chunk.task, len(chunk.read.owners) > 1
    last = min(chunk.stop, task.row_layouts[0].rows)
    sizes = [
        (row_layout, row_layout.nbytes(min(chunk.start, last), last))
        for row_layout in task.row_layouts
        if (row_layout.replicated and (task.owners is None or len(task.owners) > 1)) or shared
    ]
    if reader == rank:
        counts.pieces += 1
        counts.read += chunk.nbytes
        counts.encoded += task.encode is not None
        stored = TORCH_NAMES[chunk.ranges[0].dtype]
        unchanged = task.encode is None and stored == str(task.dtype).partition(".")[2] and not task.transposed
        if not (unchanged and shared):
            counts.to_device = _plus(counts.to_device, chunk.nbytes)
        for _, nbytes in sizes:
            counts.sent = _plus(counts.sent, nbytes)
        return
    for row_layout, nbytes in sizes:
        kind = task.transfer.kind
        if row_layout.replicated:
            form = "statistics"
        elif rank not in chunk.read.owners:
            continue
        elif kind.partition is not None and kind.shard_dim != 0:
            form, nbytes = "columns", nbytes // len(kind.partition.parts)
        else:
            form = "rows"
        counts.received[form] += 1
        counts.bytes[form] += nbytes


# -- the simulated device ----------------------------------------------------------------------------------------------


def simulate(quant: str, ranks: int, staging: str) -> dict[str, Any]:
    """Loads the small model onto simulated devices; returns counts, and seconds of a CPU for pieces."""
    sys.path.insert(0, str(ROOT / "tests" / "sim"))
    import simulated

    controls = simulated.register(simulated.built())
    import torch

    torch.set_num_threads(1)
    controls.set_cost(50e9, 6e9, 0.0)
    from on_sim_node import on_one_node

    from distquant.loading.stream.emitter import Emitter
    from distquant.loading.stream.peers import Peers
    from distquant.loading.stream.receiver import Receiver

    spent: dict[Any, list[float]] = {}

    def timed(owner: Any, name: str) -> None:
        function = getattr(owner, name)
        seconds = spent[function] = []

        def call(*arguments: Any) -> Any:
            begun = time.thread_time()
            result = function(*arguments)
            seconds.append(time.thread_time() - begun)
            return result

        setattr(owner, name, call)

    consume, copy, receive = Emitter.consume, Receiver.copy, Peers._receive
    for owner, name in ((Emitter, "consume"), (Receiver, "copy"), (Peers, "_receive")):
        timed(owner, name)
    found = on_one_node(str(SMALL), quant, ranks, staging, 0.0)
    # What messages cost is that of all of them, for each piece that one is about.
    found["seconds"] = {
        "piece": sum(spent[consume]) / len(spent[consume]),
        "received": sum(spent[receive]) / len(spent[copy]),
    }
    return found


# -- the prediction ----------------------------------------------------------------------------------------------------


def stages(counts: Counts, ranks: int, seconds: dict[str, float], before: bool) -> dict[str, float]:
    """Returns the seconds of what runs at once in a load: the longest is the critical path."""
    cost = {name: value for name, (value, _, _) in COSTS.items()}
    received, kept = sum(counts.received.values()), sum(counts.bytes.values())
    python = counts.pieces * seconds["piece"] + counts.encoded * cost["launches"]
    mean = counts.nested[1] / cost["host"]
    listener = received * seconds["received"]
    if before:
        main = python + mean + counts.sent[0] * cost["latency"] + counts.sent[1] / cost["pinned"]
        main += counts.nested[0] * (cost["table"] + 2 * cost["latency"]) + counts.nested[1] / cost["pageable"]
        listener += received * cost["latency"] + kept / cost["pageable"]
        to_device = counts.read
    else:
        main = python + mean + counts.uploads[1] / ranks / cost["host"]  # its own pieces, from slots
        listener += kept / cost["host"]
        to_device = counts.to_device[1] + counts.uploads[1]
    return {
        "storage": counts.read * ranks / cost["storage"],
        "main thread": main,
        "listening thread": listener,
        "Python's lock": python + received * seconds["received"],
        "copies to the device": to_device / cost["pinned"],
        "copies from the device": counts.sent[1] / cost["pinned"],
    }


def synchronizations(counts: Counts, before: bool) -> int:
    """Returns how often the host waits for a device, but for constants and the end."""
    return sum(counts.received.values()) + counts.sent[0] + 2 * counts.nested[0] if before else 0


def page(cases: list[tuple[str, int, Counts]], sim: dict[str, Any], small: list[Counts], note: str, load: float) -> str:
    """Returns the page of results in Markdown."""
    command = f"python benchmarks/devices.py {' '.join(name_of_argument(each) for each in sys.argv[1:])}"
    seconds = sim["seconds"]
    asynchronous = sim["counts"]["H2D pinned async"][0]
    predicted = sum(each.to_device[0] + each.uploads[0] for each in small)
    counted = [[name, *_numbers(counts)] for name, _, counts in cases]
    rows = []
    for name, ranks, counts in cases:
        for when in ("before", "after"):
            each_stage = stages(counts, ranks, seconds, when == "before")
            longest = max(each_stage, key=lambda stage: each_stage[stage])
            waits = synchronizations(counts, when == "before")
            pageable = (sum(counts.received.values()) + counts.nested[0]) if when == "before" else 0
            times = [f"{each:.2f}" for each in each_stage.values()]
            total = counts.start + each_stage[longest]
            rows.append([f"{name}, {when}", *times, longest, f"{total:.2f}", f"{waits:,}", f"{pageable:,}"])
    header = ["load", *stages(small[0], 1, seconds, False), "critical", "with start", "waits", "pageable copies"]
    return "\n\n".join(
        [
            "# Loads over the devices of a node: simulated",
            f"**Predicted by counting. Nothing here was measured on a GPU.** `benchmarks/devices.py`, "
            f"{datetime.date.today()}. {machine(load, PACKAGES)}",
            f"Command: `{command}`.",
            *([note] if note else []),
            "Seconds of what runs at once; the longest is the critical path, to which the start (that of now) "
            "is added. Waits are those of the host for a device, and pageable copies those of pieces, of a rank and "
            "without a constant few. Both threads run Python, one at a time:",
            table(header, rows),
            "What a rank does. `start` is the CPU time of plan and tasks on this machine, before the first read:",
            table(["load", "start s", "GB read", "pieces", "statistics", "columns", "rows", "uploads"], counted),
            "Bandwidths of the node that is assumed:",
            table(["cost", "value", "unit", "source"], [[n, f"{v:g}", u, s] for n, (v, u, s) in COSTS.items()]),
            f"Measured on the simulated device: {seconds['piece'] * 1e6:.0f} us of a CPU for a piece, "
            f"{seconds['received'] * 1e6:.0f} us for a piece of a peer. Copies to its devices in a load of the small "
            f"example: {asynchronous:,}, predicted {predicted:,}; pieces: {sim['pieces']:,}, predicted "
            f"{sum(each.pieces for each in small):,}.",
        ]
    )


def name_of_argument(argument: str) -> str:
    """Returns an argument without the folders above a checkpoint, which are this machine's own."""
    return shlex.quote(argument.rpartition("/")[2] if ":" in argument else argument)


def _numbers(counts: Counts) -> list[str]:
    received = [f"{counts.received[form]:,}" for form in ("statistics", "columns", "rows")]
    return [f"{counts.start:.2f}", f"{counts.read / GB:.1f}", f"{counts.pieces:,}", *received, f"{counts.uploads[0]:,}"]


def main() -> None:
    """Counts every load that is named, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loads", nargs="+", metavar="FOLDER:MESH[:QUANT]")
    parser.add_argument("--storage", type=float, default=50, help="GB/s of the node's storage")
    parser.add_argument("--note", default="", help="a paragraph for the page")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    COSTS["storage"] = (arguments.storage * GB, *COSTS["storage"][1:])
    cases, load = [], os.getloadavg()[0]
    for each in arguments.loads:
        folder, mesh, *quant = each.split(":")
        ranks = 1
        for axis in mesh.split(","):
            ranks *= int(axis.partition("=")[2])
        counts = fresh(count, folder, mesh, quant[0] if quant else None)
        cases.append((f"{Path(folder).name} {' '.join(quant)} {mesh}", ranks, counts))
    sim = fresh(simulate, "none", 4, "128KiB")
    small = [fresh(count, str(SMALL), "tp=4", "none", rank, "128KiB") for rank in range(4)]
    out = arguments.out or ROOT / "benchmarks" / "results" / f"devices_simulated_{datetime.date.today()}.md"
    write(page(cases, sim, small, arguments.note, load), "devices", str(out))


if __name__ == "__main__":
    main()
