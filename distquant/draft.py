"""A plan in the making: what the coordinator has decided so far, and the sizes that follow from it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from distquant.checkpoint import Checkpoint
from distquant.layout import DTYPE_BYTES
from distquant.mesh import Mesh
from distquant.planning.load_plan import RankMemory, TensorPlan
from distquant.planning.parallel import ParallelPlan
from distquant.schemes import Scheme, Shard
from distquant.skeleton import Skeleton, Source


@dataclass(kw_only=True)
class Draft:
    """What is known of a load before it is frozen as a `LoadPlan`."""

    checkpoint: Checkpoint
    scheme: Scheme
    mesh: Mesh
    staging: int
    prequantized: bool
    skeleton: Skeleton
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
            return math.prod(shard.local_shape), self.scheme.shard_nbytes(shard)
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

    def memory(self) -> Iterator[RankMemory]:
        """The memory table, a row a rank. Ranks with the same tp position share their sizes."""
        sizes: dict[Any, tuple[int, int]] = {}
        rows: dict[int, RankMemory] = {}
        stored = {tensor.name: self._stored_bytes(tensor) for tensor in self.tensors}
        for rank in range(self.mesh.size):
            tp = self.mesh.coordinates(rank)["tp"]
            if tp not in rows:
                rows[tp] = self._row(tp, sizes, stored)
            row = rows[tp]
            yield RankMemory(rank, row.parameters, row.read, row.quantized, row.unquantized, row.staging)

    def _row(self, tp: int, sizes: dict[Any, tuple[int, int]], stored: dict[str, int]) -> RankMemory:
        parameters = read = quantized = unquantized = 0
        for tensor in self.tensors:
            key = (tensor.shape, tensor.dtype, tensor.scheme, tensor.dim, tensor.cut, tp if tensor.cut else None)
            if key not in sizes:
                sizes[key] = self.local(tensor, tp)
            count, nbytes = sizes[key]
            parameters += count
            if tensor.scheme == "none":
                unquantized += nbytes
            else:
                quantized += nbytes
            if tensor.scheme != "none" and self.prequantized:
                read += nbytes
            else:
                read += stored[tensor.name] * count // max(math.prod(tensor.shape), 1)
        return RankMemory(tp, parameters, read, quantized, unquantized, self.staging)

    def _stored_bytes(self, tensor: TensorPlan) -> int:
        """Bytes of a whole tensor in the checkpoint."""
        total = 0
        for source in tensor.sources:
            info = self.checkpoint.tensors[source.tensor]
            total += self.taken(source) * info.nbytes // max(math.prod(info.shape), 1)
        return total
