"""Turns the tensors of a plan into the tasks of one node, and makes the memory that they end in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial as bind
from typing import Any

import torch

from distquant.checkpoint import TensorInfo
from distquant.loading.shard_buffer import Allocator, ShardBuffer
from distquant.loading.stream.rows import RowMap
from distquant.loading.stream.tasks import TORCH_DTYPE, Task
from distquant.planning.expert_parallel import Piece, owner_of, pieces_of
from distquant.planning.load_plan import LoadPlan, TensorPlan
from distquant.planning.read_assignment import ReadAssigner, column_segments, node_columns, row_segments, rows_and_width
from distquant.planning.transfers import Transfer, transfers_of
from distquant.quantization import Encoder, PlainDecoder, Scheme
from distquant.sharding.row_layout import row_layout_of


@dataclass(frozen=True, slots=True)
class Job:
    """A task, with the tensor (or the expert) and the flow that it is for; `last` of its tensor's."""

    task: Task
    piece: Piece
    transfer: Transfer
    last: bool

    @property
    def tensor(self) -> TensorPlan:
        return self.piece.tensor


def jobs_of(
    plan: LoadPlan,
    scheme: Scheme,
    node: tuple[int, ...],
    infos: Mapping[str, TensorInfo],
    device_of: Callable[[str], torch.device],
    ops_of: Callable[[torch.device], Any],
) -> Iterator[Job]:
    """The jobs of a node in the order of the files; the same on every one of its ranks. Experts of others are left out.

    Args:
        plan: the whole plan.
        scheme: the plan's.
        node: ranks of the node.
        infos: headers of the checkpoint.
        device_of: where a tensor is quantized and kept.
        ops_of: kernels of a device.
    """
    assigner, index = ReadAssigner(plan.mesh, node), 0
    shapes = {name: info.shape for name, info in infos.items()}
    places: dict[int, tuple[int, ...]] = {}
    for rank in node:
        ep = plan.mesh.coordinates(rank)["ep"]
        places[ep] = (*places.get(ep, ()), rank)
    for piece in pieces_of(plan.tensors, shapes):
        tensor, owners = piece.tensor, node
        if piece.stack.experts is not None:
            owners = places.get(owner_of(plan.partitions[piece.stack.experts], piece.number), ())
            if not owners:
                continue
        partition = plan.partitions[tensor.partition] if tensor.partition else None
        transfers = list(transfers_of(tensor, partition, scheme, plan.prequantized, infos))
        for number, transfer in enumerate(transfers, 1):
            task = _task(index, tensor, transfer, assigner, owners, infos, device_of(tensor.name))
            if tensor.scheme != "none" and transfer.stored is None:
                assert isinstance(scheme, Encoder), "the planner lets no other scheme quantize"
                task.encode = bind(scheme.encode, tensor.name, ops=ops_of(task.device))
            elif transfer.decoded:
                assert isinstance(scheme, PlainDecoder), "only these have a `plain_row_block`"
                task.encode = bind(scheme.decode, tensor.name, ops=ops_of(task.device))
            yield Job(task, piece, transfer, number == len(transfers))
            index += 1


def _task(
    index: int,
    tensor: TensorPlan,
    transfer: Transfer,
    assigner: ReadAssigner,
    owners: tuple[int, ...],
    infos: Mapping[str, TensorInfo],
    device: torch.device,
) -> Task:
    rows = rows_and_width(transfer.shape)[0]
    positions = [assigner.positions[rank] for rank in owners]
    columns = node_columns(transfer.shape, transfer.shard_dim, transfer.partition, positions, transfer.apart)
    stored = infos[transfer.sources[0].tensor].shape if transfer.decoded else transfer.shape
    row_map = RowMap(stored[::-1] if transfer.transposed else stored, transfer.sources, infos)
    row_bytes = row_map.row_bytes()
    if not transfer.decoded:
        row_bytes = row_bytes * (columns[1] - columns[0]) // max(row_map.width, 1)
    parts = assigner.assign_reads(
        transfer.shape,
        transfer.shard_dim,
        transfer.partition,
        row_bytes,
        transfer.step,
        transfer.transposed or transfer.whole_weight_workspace > 0,
        owners,
    )
    dtype = getattr(torch, transfer.dtype) if transfer.dtype else TORCH_DTYPE[infos[transfer.sources[0].tensor].dtype]
    # What a rank gets whole is told apart only where that differs from what it keeps.
    whole = transfer.whole if transfer.stored is None else frozenset()
    shape = (rows, columns[1] - columns[0])
    row_layouts = [row_layout_of(component, shape, component.name in whole) for component in transfer.components]
    if transfer.stored is not None:
        row_layouts = [replace(row_layout, dtype=dtype) for row_layout in row_layouts]
    return Task(
        index=index,
        name=tensor.name,
        rows=row_map,
        columns=(0, row_map.width) if transfer.transposed or transfer.decoded else columns,
        step=transfer.step,
        row_layouts=tuple(row_layouts),
        parts=parts,
        owners=owners,
        dtype=dtype,
        encode=None,
        transposed=transfer.transposed,
        device=device,
    )


def sink_of(job: Job, tp: int, partial: bool, home: Allocator | None) -> ShardBuffer:
    """Memory for what a position on tp keeps.

    Args:
        job: of this rank's node.
        tp: position on the tp axis.
        partial: whether other nodes read rows of it, too.
        home: gives the memory that is there for a component.
    """
    task, transfer = job.task, job.transfer
    rows = row_segments(transfer.shape, transfer.shard_dim, transfer.partition, tp)
    kept = column_segments(transfer.shape, transfer.shard_dim, transfer.partition, tp)
    width = rows_and_width(transfer.shape)[1]
    columns = (0, width) if task.transposed or transfer.decoded else task.columns
    return ShardBuffer(task.row_layouts, columns, width, rows, kept, task.device, partial, home)
