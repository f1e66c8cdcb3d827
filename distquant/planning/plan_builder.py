"""The second stage of planning: a load that is divided over the ranks, and the sizes that follow from that."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from distquant.dtypes import DTYPE_BYTES
from distquant.model import Source
from distquant.planning.described import Described
from distquant.planning.expert_parallel import experts_of, first_expert
from distquant.planning.load_plan import RankMemory, TensorPlan
from distquant.planning.read_assignment import NodeReads, bytes_read
from distquant.planning.slots import READ_SLOTS, SEND_SLOTS, SLACK
from distquant.planning.tensor_parallel import ParallelPlan
from distquant.planning.transfers import transfers_of
from distquant.quantization import Shard


@dataclass(frozen=True, kw_only=True)
class Partitioned(Described):
    """A described load, and how its tensors are divided over the ranks."""

    parallel: ParallelPlan
    tensors: tuple[TensorPlan, ...]
    """In the order of files and offsets."""

    def local_size(self, tensor: TensorPlan, tp: int, ep: int = 0) -> tuple[int, int]:
        """Returns elements and bytes of a rank's part of a tensor."""
        if tensor.experts is not None:
            count, nbytes = self.local_size(first_expert(tensor), tp)
            experts = self.parallel.partitions[tensor.experts].length(ep)
            return count * experts, nbytes * experts
        if tensor.scheme != "none":
            shard = self.shard(tensor, tp)
            count = math.prod(shard.local_shape)
            return count, count * DTYPE_BYTES[tensor.dtype] if self.dequantize else self.scheme.shard_nbytes(shard)
        count = math.prod(tensor.shape)
        if tensor.partition:
            partition = self.parallel.partitions[tensor.partition]
            count = count // partition.size * partition.length(tp)
        return count, count * DTYPE_BYTES.get(tensor.dtype, 4)

    def shard(self, tensor: TensorPlan, tp: int) -> Shard:
        """Returns one rank's part of a linear weight."""
        partition = self.parallel.partitions[tensor.partition] if tensor.partition else None
        return Shard(tensor.name, (tensor.shape[0], tensor.shape[1]), tensor.dtype, tensor.shard_dim, partition, tp)

    def kinds(self) -> list[tuple[TensorPlan, int]]:
        """Returns the kinds of tensors that have equal sizes on every rank, as (one of the kind, how many).

        A model of many layers has few kinds of tensors, and sums over ranks need each kind once.
        """
        examples: dict[Any, TensorPlan] = {}
        counts: Counter[Any] = Counter()
        for tensor in self.tensors:
            layout = None
            if tensor.scheme != "none":
                # A method may store weights of one shape in several ways.
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
            examples.setdefault(key, tensor)
            counts[key] += 1
        return [(tensor, counts[key]) for key, tensor in examples.items()]

    # -- memory --------------------------------------------------------------------------------------------------------

    def memory_rows(self, observe: Callable[[list[NodeReads]], None]) -> Iterator[RankMemory]:
        """Yields the memory table, a row a rank; `observe` is called with what each node reads."""
        kinds, infos = self.kinds(), self.checkpoint.tensors
        transfers = transfers_of(self.tensors, self.parallel.partitions, self.scheme, self.prequantized, infos)
        read = bytes_read(transfers, self.mesh, self.nodes, observe)
        # Tensors pass one at a time, so the largest need of any is added once.
        beside = max([n for _, n in self.whole_weight_workspace()] + self.encoded_buffers(kinds), default=0)
        rows: dict[tuple[int, int], RankMemory] = {}
        for rank in range(self.mesh.size):
            coordinates = self.mesh.coordinates(rank)
            tp, ep = coordinates["tp"], coordinates["ep"]
            # Ranks at the same position on tp and ep (replicas over dp) keep the same; what they read differs.
            if (tp, ep) not in rows:
                rows[tp, ep] = self._memory_row(tp, ep, kinds, self.staging + beside)
            yield replace(rows[tp, ep], rank=rank, read=read[rank])

    def _memory_row(self, tp: int, ep: int, kinds: list[tuple[TensorPlan, int]], staging: int) -> RankMemory:
        """Returns the sizes of a position on tp and ep; rank and bytes read are left to the caller."""
        parameters = quantized = unquantized = 0
        for tensor, times in kinds:
            count, nbytes = self.local_size(tensor, tp, ep)
            parameters += count * times
            if tensor.scheme == "none" or self.dequantize:
                unquantized += nbytes * times
            else:
                quantized += nbytes * times
        return RankMemory(
            rank=0, parameters=parameters, read=0, quantized=quantized, unquantized=unquantized, staging=staging
        )

    def whole_weights(self) -> Iterator[tuple[TensorPlan, int]]:
        """Yields the tensors that one rank quantizes as one, with the bytes that `encode` takes for that."""
        for tensor in self.tensors:
            if tensor.scheme == "none" or self.prequantized:
                continue
            one = first_expert(tensor)
            workspace = self.scheme.whole_weight_workspace(one.name, (one.shape[0], one.shape[1]))
            if workspace:
                yield tensor, workspace

    def whole_weight_workspace(self) -> list[tuple[TensorPlan, int]]:
        """Returns the tensors that one rank quantizes as one, with the bytes that this takes beside the staging."""
        needs = []
        for tensor, workspace in self.whole_weights():
            if tensor.experts is not None:
                tensor = next(experts_of(tensor, self.shapes))
            shape = (tensor.shape[0], tensor.shape[1])
            read = sum(self.taken(source) * self._item_bytes(source) for source in tensor.sources)
            encoded = self.scheme.encoded_components(tensor.name, shape, tensor.dtype)
            # All slots grow to the largest piece, which is then this weight, stored or encoded.
            slot = max(read, sum(component.nbytes(shape) for component in encoded)) + 2 * SLACK
            beyond_staging = max((READ_SLOTS + SEND_SLOTS) * slot - self.staging, 0)
            needs.append((tensor, beyond_staging + workspace))
        return needs

    def _item_bytes(self, source: Source) -> int:
        """Returns the bytes of one stored element."""
        info = self.checkpoint.tensors[source.tensor]
        return info.nbytes // max(math.prod(info.shape), 1)

    def encoded_buffers(self, kinds: list[tuple[TensorPlan, int]]) -> list[int]:
        """Returns the bytes of buffers for components that the finished weight stores in another form.

        They stand beside the finished weight until all its rows have come.
        """
        buffers = []
        for tensor, _ in kinds:
            if tensor.scheme == "none" or self.prequantized:
                continue
            one = first_expert(tensor)
            shape = (one.shape[0], one.shape[1])
            stored = {c.name: c.nbytes(shape) for c in self.scheme.layout(one.name, shape, one.dtype).components}
            replicated = self.scheme.replicated_components(Shard(one.name, shape, one.dtype))
            # A component of the same size becomes the stored one without a copy.
            arriving = sum(
                component.nbytes(shape)
                for component in self.scheme.encoded_components(one.name, shape, one.dtype)
                if component.name not in replicated and component.nbytes(shape) != stored.get(component.name)
            )
            largest = max(self.local_size(one, tp)[0] for tp in range(self.mesh.tp))
            buffers.append(arriving * largest // math.prod(shape))
        return buffers
