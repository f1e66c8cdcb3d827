"""Turns the tensors of a plan into the tasks of one node, and makes the memory that they end in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial as bind
from typing import Any

import torch

from distquant.checkpoint import TensorInfo
from distquant.loading.sinks import BandSink, Home
from distquant.loading.stream.rows import RowMap
from distquant.loading.stream.tasks import TORCH_DTYPE, Task
from distquant.planning.expert_parallel import Piece, owner_of, pieces_of
from distquant.planning.load_plan import LoadPlan, TensorPlan
from distquant.planning.read_assignment import Dealer, column_segments, node_columns, row_segments, rows_and_width
from distquant.planning.transfers import Flow, flows_of
from distquant.quantization import Scheme
from distquant.sharding.row_layout import band_of


@dataclass(frozen=True, slots=True)
class Job:
    """A task, with the tensor (or the expert) and the flow that it is for; `last` of its tensor's."""

    task: Task
    piece: Piece
    flow: Flow
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
    dealer, index = Dealer(plan.mesh, node), 0
    shapes = {name: info.shape for name, info in infos.items()}
    places: dict[int, tuple[int, ...]] = {}
    for rank in node:
        ep = plan.mesh.coordinates(rank)["ep"]
        places[ep] = (*places.get(ep, ()), rank)
    for piece in pieces_of(plan.tensors, shapes):
        tensor, keepers = piece.tensor, node
        if piece.stack.experts is not None:
            keepers = places.get(owner_of(plan.cuts[piece.stack.experts], piece.number), ())
            if not keepers:
                continue
        cut = plan.cuts[tensor.cut] if tensor.cut else None
        flows = list(flows_of(tensor, cut, scheme, plan.prequantized, infos))
        for number, flow in enumerate(flows, 1):
            task = _task(index, tensor, flow, dealer, keepers, infos, device_of(tensor.name))
            if tensor.scheme != "none" and flow.stored is None:
                task.encode = bind(scheme.encode, tensor.name, ops=ops_of(task.device))
            elif flow.decoded:
                task.encode = bind(scheme.decode, tensor.name, ops=ops_of(task.device))
            yield Job(task, piece, flow, number == len(flows))
            index += 1


def _task(
    index: int,
    tensor: TensorPlan,
    flow: Flow,
    dealer: Dealer,
    keepers: tuple[int, ...],
    infos: Mapping[str, TensorInfo],
    device: torch.device,
) -> Task:
    rows = rows_and_width(flow.shape)[0]
    positions = [dealer.positions[rank] for rank in keepers]
    columns = node_columns(flow.shape, flow.dim, flow.cut, positions, flow.apart)
    stored = infos[flow.sources[0].tensor].shape if flow.decoded else flow.shape
    row_map = RowMap(stored[::-1] if flow.turned else stored, flow.sources, infos)
    row_bytes = row_map.row_bytes()
    if not flow.decoded:
        row_bytes = row_bytes * (columns[1] - columns[0]) // max(row_map.width, 1)
    parts = dealer.deal(flow.shape, flow.dim, flow.cut, row_bytes, flow.step, flow.turned or flow.entire > 0, keepers)
    dtype = getattr(torch, flow.dtype) if flow.dtype else TORCH_DTYPE[infos[flow.sources[0].tensor].dtype]
    # What a rank gets whole is told apart only where that differs from what it keeps.
    whole = flow.whole if flow.stored is None else frozenset()
    shape = (rows, columns[1] - columns[0])
    bands = [band_of(component, shape, component.name in whole) for component in flow.components]
    if flow.stored is not None:
        bands = [replace(band, dtype=dtype) for band in bands]
    return Task(
        index=index,
        name=tensor.name,
        rows=row_map,
        columns=(0, row_map.width) if flow.turned or flow.decoded else columns,
        step=flow.step,
        bands=tuple(bands),
        parts=parts,
        keepers=keepers,
        dtype=dtype,
        encode=None,
        turned=flow.turned,
        device=device,
    )


def sink_of(job: Job, tp: int, partial: bool, home: Home | None) -> BandSink:
    """Memory for what a position on tp keeps.

    Args:
        job: of this rank's node.
        tp: position on the tp axis.
        partial: whether other nodes read rows of it, too.
        home: gives the memory that is there for a component.
    """
    task, flow = job.task, job.flow
    rows = row_segments(flow.shape, flow.dim, flow.cut, tp)
    kept = column_segments(flow.shape, flow.dim, flow.cut, tp)
    width = rows_and_width(flow.shape)[1]
    columns = (0, width) if task.turned or flow.decoded else task.columns
    return BandSink(task.bands, columns, width, rows, kept, task.device, partial, home)
