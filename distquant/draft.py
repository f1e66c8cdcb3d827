"""A plan in the making: what the coordinator has decided so far, and the sizes that follow from it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from distquant.checkpoint import Checkpoint
from distquant.layout import DTYPE_BYTES
from distquant.mesh import Mesh
from distquant.planning.load_plan import RankMemory, TensorPlan
from distquant.planning.parallel import ParallelPlan
from distquant.planning.reading import Dealer, node_columns, rows_and_width
from distquant.schemes import Scheme, Shard
from distquant.schemes.flow import Flow, flows_of
from distquant.skeleton import Kept, Skeleton, Source

SLOTS, SLACK = 8, 4 * 4096
"""Pieces that the engine stages at once, each as large as the largest that cannot be divided, and what is added."""


@dataclass(kw_only=True)
class Draft:
    """What is known of a load before it is frozen as a `LoadPlan`."""

    checkpoint: Checkpoint
    scheme: Scheme
    mesh: Mesh
    staging: int
    nodes: tuple[int, ...]
    """The node of each rank."""
    prequantized: bool
    dequantize: bool
    """Whether stored quantized weights become ordinary ones."""
    skeleton: Skeleton
    skipped: dict[str, Any] | None = None
    """The checkpoint's quantization config, where its method is left out."""
    kept: Kept = field(default_factory=Kept)
    """What is then planned as it is stored."""
    converted: list[str] = field(default_factory=list)
    """Modules that the scheme replaces."""
    offloaded: set[str] = field(default_factory=set)
    """Modules that the device map leaves unquantized."""
    device_map: dict[str, str] | None = None
    parallel: ParallelPlan = field(default_factory=ParallelPlan)
    tensors: tuple[TensorPlan, ...] = ()

    def local(self, tensor: TensorPlan, tp: int) -> tuple[int, int]:
        """Elements and bytes of one rank's part of a tensor."""
        cut = self.parallel.cuts[tensor.cut] if tensor.cut else None
        if tensor.scheme != "none":
            shard = self.shard(tensor, tp)
            count = math.prod(shard.local_shape)
            return count, count * DTYPE_BYTES[tensor.dtype] if self.dequantize else self.scheme.shard_nbytes(shard)
        count = math.prod(tensor.shape)
        if cut is not None:
            count = count // cut.size * cut.length(tp)
        return count, count * DTYPE_BYTES.get(tensor.dtype, 4)

    def shard(self, tensor: TensorPlan, tp: int) -> Shard:
        """One rank's part of a linear weight."""
        cut = self.parallel.cuts[tensor.cut] if tensor.cut else None
        return Shard(tensor.name, (tensor.shape[0], tensor.shape[1]), tensor.dtype, tensor.dim, cut, tp)

    def taken(self, source: Source) -> int:
        """Elements of a checkpoint tensor that a source takes."""
        shape = self.checkpoint.tensors[source.tensor].shape
        if source.take is None:
            return math.prod(shape)
        dim, start, stop = source.take
        return math.prod(shape) // shape[dim] * (stop - start)

    def entire(self) -> list[tuple[TensorPlan, int]]:
        """Tensors that one rank quantizes as one, with the bytes that this takes beside the staging asked for."""
        found = []
        for tensor in self.tensors:
            if tensor.scheme == "none" or self.prequantized:
                continue
            working = self.scheme.entire(tensor.name, (tensor.shape[0], tensor.shape[1]))
            if working:
                read = sum(self.taken(s) * self._item(s) for s in tensor.sources)
                flowing = self.scheme.flowing(tensor.name, (tensor.shape[0], tensor.shape[1]), tensor.dtype)
                slot = max(read, sum(c.nbytes(tensor.shape) for c in flowing)) + SLACK
                found.append((tensor, max(SLOTS * slot - self.staging, 0) + working))
        return found

    def _item(self, source: Source) -> int:
        info = self.checkpoint.tensors[source.tensor]
        return info.nbytes // max(math.prod(info.shape), 1)

    def alike(self) -> list[tuple[TensorPlan, int]]:
        """Tensors of equal sizes on every rank, as (one of them, how many).

        A model of many layers has few kinds of tensors, and sums over ranks need each kind once.
        """
        first: dict[Any, TensorPlan] = {}
        counts: Counter[Any] = Counter()
        for tensor in self.tensors:
            layout = None  # a method may store weights of one shape in several ways
            if tensor.scheme != "none":
                layout = self.scheme.layout(tensor.name, tensor.shape, tensor.dtype)
            key = (tensor.shape, tensor.dtype, tensor.scheme, tensor.dim, tensor.cut, layout)
            first.setdefault(key, tensor)
            counts[key] += 1
        return [(tensor, counts[key]) for key, tensor in first.items()]

    def memory(self) -> Iterator[RankMemory]:
        """The memory table, a row a rank. Ranks with the same tp position share their sizes."""
        alike, read = self.alike(), self._reads()
        staging = self.staging + max((nbytes for _, nbytes in self.entire()), default=0)
        rows = [replace(self._row(tp, alike), staging=staging) for tp in range(self.mesh.tp)]
        for rank in range(self.mesh.size):
            row = rows[self.mesh.coordinates(rank)["tp"]]
            yield replace(row, rank=rank, read=read[rank])

    def _row(self, tp: int, alike: list[tuple[TensorPlan, int]]) -> RankMemory:
        """Sizes of a tp position; what is read depends on the rank."""
        parameters = quantized = unquantized = 0
        for tensor, times in alike:
            count, nbytes = self.local(tensor, tp)
            parameters += count * times
            if tensor.scheme == "none" or self.dequantize:
                unquantized += nbytes * times
            else:
                quantized += nbytes * times
        return RankMemory(tp, parameters, 0, quantized, unquantized, self.staging)

    def _reads(self) -> list[int]:
        """Bytes that each rank is dealt; nodes whose ranks have the same positions are dealt the same."""
        read, dealt = [0] * self.mesh.size, {}
        flows = [(flow, self._stored_bytes(flow)) for tensor in self.tensors for flow in self._flows(tensor)]
        for node in sorted(set(self.nodes)):
            ranks = tuple(rank for rank, its in enumerate(self.nodes) if its == node)
            key = tuple(self.mesh.coordinates(rank)["tp"] for rank in ranks)
            if key not in dealt:
                dealt[key] = list(self._dealt(ranks, flows).values())
            for rank, nbytes in zip(ranks, dealt[key], strict=True):
                read[rank] = nbytes
        return read

    def _flows(self, tensor: TensorPlan) -> Iterator[Flow]:
        cut = self.parallel.cuts[tensor.cut] if tensor.cut else None
        return flows_of(tensor, cut, self.scheme, self.prequantized, self.checkpoint.tensors)

    def _dealt(self, ranks: tuple[int, ...], flows: list[tuple[Flow, int]]) -> dict[int, int]:
        """Bytes that each rank of one node reads."""
        dealer = Dealer(self.mesh, ranks)
        for flow, nbytes in flows:
            rows, width = rows_and_width(flow.shape)
            a, b = node_columns(flow.shape, flow.dim, flow.cut, dealer.positions.values(), flow.apart)
            row_bytes = nbytes * (b - a) // max(rows * width, 1)
            dealer.deal(flow.shape, flow.dim, flow.cut, row_bytes, flow.step, flow.turned or flow.entire > 0)
        return dealer.loads

    def _stored_bytes(self, flow: Flow) -> int:
        """Bytes of a whole flow in the checkpoint."""
        total = 0
        for source in flow.sources:
            info = self.checkpoint.tensors[source.tensor]
            total += self.taken(source) * info.nbytes // max(math.prod(info.shape), 1)
        return total
