"""A plan in the making: what the coordinator has decided so far, and the sizes that follow from it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from distquant.checkpoint import Checkpoint
from distquant.model import Kept, ModelDescription, Source, taken
from distquant.planning.expert_parallel import ALL_REDUCE, experts_of, first_expert
from distquant.planning.load_plan import RankMemory, TensorPlan
from distquant.planning.read_assignment import bytes_read
from distquant.planning.slots import READ_SLOTS, SEND_SLOTS, SLACK
from distquant.planning.tensor_parallel import ParallelPlan
from distquant.planning.transfers import transfers_of
from distquant.quantization import Scheme, Shard
from distquant.sharding.layout import DTYPE_BYTES
from distquant.sharding.mesh import Mesh


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
    description: ModelDescription
    stacked: tuple[str, ...] = ()
    """Modules of experts that the skeleton has split into stacks."""
    skipped: dict[str, Any] | None = None
    """The checkpoint's quantization config, where its method is left out."""
    kept: Kept = field(default_factory=Kept)
    """What is then planned as it is stored."""
    converted: list[str] = field(default_factory=list)
    """Modules that the scheme replaces."""
    offloaded: set[str] = field(default_factory=set)
    """Modules that the device map leaves unquantized."""
    device_map: dict[str, str] | None = None
    dispatch: str = ALL_REDUCE
    """How tokens reach experts on other ranks of ep."""
    parallel: ParallelPlan = field(default_factory=ParallelPlan)
    tensors: tuple[TensorPlan, ...] = ()

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each checkpoint tensor."""
        return {name: info.shape for name, info in self.checkpoint.tensors.items()}

    def local(self, tensor: TensorPlan, tp: int, ep: int = 0) -> tuple[int, int]:
        """Elements and bytes of a rank's part of a tensor."""
        if tensor.experts is not None:
            count, nbytes = self.local(first_expert(tensor), tp)
            held = self.parallel.partitions[tensor.experts].length(ep)
            return count * held, nbytes * held
        partition = self.parallel.partitions[tensor.partition] if tensor.partition else None
        if tensor.scheme != "none":
            shard = self.shard(tensor, tp)
            count = math.prod(shard.local_shape)
            return count, count * DTYPE_BYTES[tensor.dtype] if self.dequantize else self.scheme.shard_nbytes(shard)
        count = math.prod(tensor.shape)
        if partition is not None:
            count = count // partition.size * partition.length(tp)
        return count, count * DTYPE_BYTES.get(tensor.dtype, 4)

    def shard(self, tensor: TensorPlan, tp: int) -> Shard:
        """One rank's part of a linear weight."""
        partition = self.parallel.partitions[tensor.partition] if tensor.partition else None
        return Shard(tensor.name, (tensor.shape[0], tensor.shape[1]), tensor.dtype, tensor.shard_dim, partition, tp)

    def taken(self, source: Source) -> int:
        """Elements of a checkpoint tensor that a source takes."""
        return taken(source, self.checkpoint.tensors[source.tensor].shape)

    def whole_weight_workspace(self) -> list[tuple[TensorPlan, int]]:
        """Tensors that one rank quantizes as one, with the bytes that this takes beside the staging asked for."""
        found = []
        for tensor in self.tensors:
            if tensor.scheme == "none" or self.prequantized:
                continue
            if tensor.experts is not None:
                tensor = next(experts_of(tensor, self.shapes))
            working = self.scheme.whole_weight_workspace(tensor.name, (tensor.shape[0], tensor.shape[1]))
            if working:
                read = sum(self.taken(s) * self._item(s) for s in tensor.sources)
                flowing = self.scheme.encoded_components(tensor.name, (tensor.shape[0], tensor.shape[1]), tensor.dtype)
                slot = max(read, sum(c.nbytes(tensor.shape) for c in flowing)) + 2 * SLACK
                found.append((tensor, max((READ_SLOTS + SEND_SLOTS) * slot - self.staging, 0) + working))
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
                one = first_expert(tensor)
                layout = self.scheme.layout(one.name, one.shape, one.dtype)
            key = (
                tensor.shape,
                tensor.dtype,
                tensor.scheme,
                tensor.shard_dim,
                tensor.partition,
                tensor.experts,
                layout,
            )
            first.setdefault(key, tensor)
            counts[key] += 1
        return [(tensor, counts[key]) for key, tensor in first.items()]

    def memory(self) -> Iterator[RankMemory]:
        """The memory table, a row a rank. Ranks at the same place on tp and ep share their sizes."""
        alike = self.alike()
        infos, partitions = self.checkpoint.tensors, self.parallel.partitions
        transfers = transfers_of(self.tensors, partitions, self.scheme, self.prequantized, infos)
        read = bytes_read(transfers, self.mesh, self.nodes)
        staging = self.staging + max(
            [nbytes for _, nbytes in self.whole_weight_workspace()] + self._unfinished(alike), default=0
        )
        rows: dict[tuple[int, int], RankMemory] = {}
        for rank in range(self.mesh.size):
            at = self.mesh.coordinates(rank)
            place = (at["tp"], at["ep"])
            if place not in rows:
                rows[place] = replace(self._row(*place, alike), staging=staging)
            yield replace(rows[place], rank=rank, read=read[rank])

    def _unfinished(self, alike: list[tuple[TensorPlan, int]]) -> list[int]:
        """Bytes that weights take as they arrive, where they become something else once they are there."""
        found = []
        for tensor, _ in alike:
            if tensor.scheme == "none" or self.prequantized:
                continue
            one = first_expert(tensor)
            shape = (one.shape[0], one.shape[1])
            stored = {c.name: c.nbytes(shape) for c in self.scheme.layout(one.name, shape, one.dtype).components}
            statistics = self.scheme.replicated_components(Shard(one.name, shape, one.dtype))
            arriving = sum(
                component.nbytes(shape)
                for component in self.scheme.encoded_components(one.name, shape, one.dtype)
                if component.name not in statistics and component.nbytes(shape) != stored.get(component.name)
            )
            largest = max(self.local(one, tp)[0] for tp in range(self.mesh.tp))
            found.append(arriving * largest // math.prod(shape))
        return found

    def _row(self, tp: int, ep: int, alike: list[tuple[TensorPlan, int]]) -> RankMemory:
        """Sizes of a place on tp and ep; what is read depends on the rank."""
        parameters = quantized = unquantized = 0
        for tensor, times in alike:
            count, nbytes = self.local(tensor, tp, ep)
            parameters += count * times
            if tensor.scheme == "none" or self.dequantize:
                unquantized += nbytes * times
            else:
                quantized += nbytes * times
        return RankMemory(tp, parameters, 0, quantized, unquantized, self.staging)
