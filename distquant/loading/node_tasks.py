"""Turns the transfers of a plan into the tasks of one node, and makes the memory that they end in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial as bind
from typing import Any

import torch

from distquant.checkpoint import TensorInfo
from distquant.loading.shard_buffer import Allocator, ShardBuffer
from distquant.loading.stream.gathering import GatheringMemory
from distquant.loading.stream.tasks import Encode, Task, kept_bytes
from distquant.planning.load_plan import LoadPlan
from distquant.planning.node_rows import Layouts, NodeRows, node_rows
from distquant.planning.read_assignment import NodeReads, reads_of_node
from distquant.planning.row_map import column_segments, row_segments, rows_and_width
from distquant.planning.transfers import Transfer, transfers_of
from distquant.quantization import Encoder, PlainDecoder, Scheme
from distquant.sharding.row_layout import RowLayout


def tasks_of(
    plan: LoadPlan,
    scheme: Scheme,
    node: tuple[int, ...],
    infos: Mapping[str, TensorInfo],
    device_of: Callable[[str], torch.device],
    ops_of: Callable[[torch.device], Any],
) -> Iterator[Task]:
    """Yields the tasks of a node in the order of the files, the same on each of its ranks.

    Args:
        plan: the whole plan. Experts that no rank of the node keeps are left out.
        scheme: of the plan.
        node: ranks of the node.
        infos: headers of the checkpoint.
        device_of: gives the device that a tensor is quantized and kept on.
        ops_of: gives the kernels of a device.
    """
    transfers = transfers_of(plan.tensors, plan.partitions, scheme, plan.prequantized, infos)
    layouts: Layouts = {}
    for index, assigned in enumerate(reads_of_node(transfers, plan.mesh, node)):
        device = device_of(assigned.transfer.tensor.name)
        encode = _encode(assigned.transfer, scheme, device, ops_of)
        rows = node_rows(assigned.transfer, assigned.columns, infos, layouts)
        on_host = frozenset[str]() if device.type == "cpu" else _on_host(assigned, rows.row_layouts, plan.staging)
        yield _task(index, assigned, rows, device, encode, on_host)


def _encode(
    transfer: Transfer, scheme: Scheme, device: torch.device, ops_of: Callable[[torch.device], Any]
) -> Encode | None:
    """Returns what turns rows into components; None where they stay as they are."""
    if transfer.kind.decoded:
        assert isinstance(scheme, PlainDecoder), "only these have a `plain_row_block`"
        return bind(scheme.decode, transfer.tensor.name, ops=ops_of(device))
    if transfer.tensor.scheme != "none" and transfer.kind.component is None:
        assert isinstance(scheme, Encoder), "the planner lets no other scheme quantize"
        return bind(scheme.encode, transfer.tensor.name, ops=ops_of(device))
    return None


def _task(
    index: int,
    assigned: NodeReads,
    rows: NodeRows,
    device: torch.device,
    encode: Encode | None,
    on_host: frozenset[str],
) -> Task:
    transfer, owners, _, reads = assigned
    return Task(
        index=index,
        transfer=transfer,
        rows=rows.rows,
        columns=rows.columns,
        reads=reads,
        row_layouts=rows.row_layouts,
        dtype=rows.dtype,
        encode=encode,
        device=device,
        owners=owners,
        on_host=on_host,
    )


def _on_host(assigned: NodeReads, row_layouts: tuple[RowLayout, ...], staging: int) -> frozenset[str]:
    """Returns the components of a tensor that ranks with devices gather on the host.

    They come from other ranks of the node, and so through host memory, in pieces of a few rows or columns. Statistics
    are always gathered; all else if every row is shared, and if it fits the budget.
    """
    if len(assigned.owners) < 2:
        return frozenset()
    shared = all(len(read.owners) > 1 for read in assigned.reads)
    kind = assigned.transfer.kind
    return frozenset(
        row_layout.name
        for row_layout in row_layouts
        if row_layout.replicated or (shared and kept_bytes(kind, row_layout) <= staging)
    )


def buffer_for(
    task: Task, tp: int, partial: bool, allocator: Allocator | None, gathering: GatheringMemory | None = None
) -> ShardBuffer:
    """Returns memory for what a position on tp keeps of a transfer.

    Args:
        task: of this rank's node.
        tp: position on the tp axis.
        partial: True if other nodes read some of its rows, too.
        allocator: gives the memory of a component that is there already.
        gathering: gives host memory for the components that are gathered.
    """
    kind = task.transfer.kind
    rows = row_segments(kind.shape, kind.shard_dim, kind.partition, tp)
    kept = column_segments(kind.shape, kind.shard_dim, kind.partition, tp)
    width = rows_and_width(kind.shape)[1]
    columns = (0, width) if task.transposed or kind.decoded else task.columns
    on_host = task.on_host if gathering is not None else frozenset[str]()
    return ShardBuffer(
        task.row_layouts, columns, width, rows, kept, task.device, partial, allocator, on_host, gathering
    )
