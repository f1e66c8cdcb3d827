"""The transfers of a plan: runs of rows on their way from the files to the ranks that keep them.

A weight that is quantized on the way is one transfer, whose rows become several components. A tensor that stays as it
is is one transfer with one component. A weight that is stored quantized is one transfer for each stored component,
which is sharded by its layout. Planner and loader both work from these.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from distquant.checkpoint import TensorInfo
from distquant.errors import InputError
from distquant.model.description import Source, source_numel
from distquant.planning.expert_parallel import experts_of
from distquant.planning.load_plan import TensorPlan
from distquant.planning.row_map import row_bytes_of, rows_and_width
from distquant.quantization.scheme import Scheme
from distquant.sharding.layout import ALL, Component
from distquant.sharding.partition import Partition, Segment
from distquant.sharding.row_layout import column_step, row_step
from distquant.sharding.shard import Shard


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TransferKind:
    """Facts that transfers of alike experts share: there may be thousands of experts, and one kind.

    Attributes:
        component: of a weight that is stored quantized; None for every other tensor.
        shape: logical shape.
        dtype: torch's name of the dtype that rows are cast to; None = that of the file.
        shard_dim: dim of `shape` that is sharded.
        partition: its partition.
        components: what the rows become.
        replicated: names of the components that every rank gets for all rows.
        row_step: number of rows that are quantized together.
        column_step: multiples of columns that can be quantized without the rest of their row; None = whole rows only.
        single_reader: True if one rank must read all rows, to transpose them or to quantize them as one.
        decoded: True if rows are stored in another form than they are kept in, and all their columns are needed.
        row_bytes: (rows, bytes that each takes in the file), in row order.
    """

    component: str | None
    shape: tuple[int, ...]
    dtype: str | None
    shard_dim: int | None
    partition: Partition | None
    components: tuple[Component, ...]
    replicated: frozenset[str] = frozenset()
    row_step: int = 1
    column_step: int | None = 1
    single_reader: bool = False
    decoded: bool = False
    row_bytes: tuple[tuple[int, int], ...] = ()

    def nbytes(self, rows: Segment, columns: Segment) -> int:
        """Returns the bytes that these columns of these rows take in the files."""
        total = first = 0
        for count, nbytes in self.row_bytes:
            total += max(min(rows[1], first + count) - max(rows[0], first), 0) * nbytes
            first += count
        return total * (columns[1] - columns[0]) // max(rows_and_width(self.shape)[1], 1)


@dataclass(frozen=True, slots=True, eq=False)
class Transfer:
    """One run of rows, from the files to the ranks that keep them.

    Attributes:
        tensor: that it is for: an entry of the plan, or one expert of it as an entry of its own.
        stack: the plan's entry; `tensor` itself if it is not a stack of experts.
        expert: number of the expert; 0 if it is none.
        ep: position on ep that keeps the expert; None = every position.
        sources: checkpoint tensors that hold the rows.
        last: True for the last transfer of its tensor.
        kind: how its rows are laid out, divided and read.
    """

    tensor: TensorPlan
    stack: TensorPlan
    expert: int
    ep: int | None
    sources: tuple[Source, ...]
    last: bool
    kind: TransferKind

    @property
    def transposed(self) -> bool:
        """True if its rows are stored as columns."""
        return self.tensor.transposed


def transfers_of(
    tensors: Iterable[TensorPlan],
    partitions: Mapping[str, Partition],
    scheme: Scheme,
    prequantized: bool,
    infos: Mapping[str, TensorInfo],
) -> Iterator[Transfer]:
    """Yields the transfers of a plan in the order in which they are stored in the files.

    Args:
        tensors: of the plan.
        partitions: of the plan.
        scheme: of the plan.
        prequantized: True if the plan's quantized weights are stored so.
        infos: headers of the checkpoint, in the order of files and offsets.
    """
    known: dict[Any, tuple[TransferKind, ...]] = {}
    eps: dict[str, list[int]] = {}
    for stack, expert, tensor in _in_file_order(tensors, infos):
        stored = prequantized and tensor.scheme != "none"
        if stored:  # one transfer for each source, and files may have them in any order
            sources = tuple(sorted(tensor.sources, key=lambda s: (infos[s.tensor].file, infos[s.tensor].offset)))
            tensor = tensor if sources == tensor.sources else replace(tensor, sources=sources)
        key = (stack.name, *(_form(source, infos[source.tensor]) for source in tensor.sources))
        if key not in known:
            partition = partitions[tensor.partition] if tensor.partition else None
            known[key] = tuple(kinds_of(tensor, partition, scheme, prequantized, infos))
        ep = None
        if stack.experts is not None:
            if stack.experts not in eps:
                eps[stack.experts] = _positions(partitions[stack.experts])
            ep = eps[stack.experts][expert]
        for number, kind in enumerate(known[key]):
            sources = (tensor.sources[number],) if stored else tensor.sources
            yield Transfer(tensor, stack, expert, ep, sources, number + 1 == len(known[key]), kind)


def _in_file_order(
    tensors: Iterable[TensorPlan], infos: Mapping[str, TensorInfo]
) -> list[tuple[TensorPlan, int, TensorPlan]]:
    """Returns (entry of the plan, number of the expert, that expert as an entry), in the order of the files.

    An entry that is not a stack is its own only expert, with the number 0.
    """
    order = {name: place for place, name in enumerate(infos)}
    shapes = {name: info.shape for name, info in infos.items()}

    def place(item: tuple[TensorPlan, int, TensorPlan]) -> tuple[int, int]:
        return min((order[s.tensor], s.take[1] if s.take else 0) for s in item[2].sources)

    items = ((tensor, number, one) for tensor in tensors for number, one in enumerate(experts_of(tensor, shapes)))
    # An expert that the checkpoint lacks is reported elsewhere, together with every other problem.
    return sorted((item for item in items if item[2].sources), key=place)


def _form(source: Source, info: TensorInfo) -> tuple[Any, ...]:
    """Returns what two sources have in common whose rows are stored in the same form."""
    take = None if source.take is None else (source.take[0], source.take[2] - source.take[1])
    return source.component, source.offset, take, info.shape, info.dtype


def _positions(experts: Partition) -> list[int]:
    """Returns the position on ep that keeps each expert."""
    found = [0] * experts.size
    for ep in range(len(experts.parts)):
        for start, stop in experts.segments(ep):
            found[start:stop] = [ep] * (stop - start)
    return found


def kinds_of(
    tensor: TensorPlan, partition: Partition | None, scheme: Scheme, prequantized: bool, infos: Mapping[str, TensorInfo]
) -> Iterator[TransferKind]:
    """Yields the kinds of a tensor's transfers: one for each source if it is stored quantized, else one.

    Args:
        tensor: of the plan; no stack of experts.
        partition: its partition.
        scheme: of the plan.
        prequantized: True if the plan's quantized weights are stored so.
        infos: headers of its sources.
    """
    if tensor.scheme == "none":
        yield _plain(tensor, partition, scheme.plain_row_block(tensor.name), infos)
        return
    shard = Shard(tensor.name, (tensor.shape[0], tensor.shape[1]), tensor.dtype, tensor.shard_dim, partition)
    if not prequantized:
        yield _quantized(tensor, shard, scheme, infos)
        return
    layout = {each.name: each for each in scheme.layout(tensor.name, shard.shape, tensor.dtype).components}
    replicated = scheme.replicated_components(shard)
    for source in tensor.sources:
        component = None if source.component in replicated else layout.get(source.component)
        yield _stored(source, component, shard, infos)


def _plain(
    tensor: TensorPlan, partition: Partition | None, row_block: int, infos: Mapping[str, TensorInfo]
) -> TransferKind:
    """Returns the kind of a tensor that is not quantized, decoded from blocks of rows if `row_block` is not 0."""
    stored = infos[tensor.sources[0].tensor].shape if row_block else tensor.shape
    return TransferKind(
        component=None,
        shape=tensor.shape,
        dtype=None if row_block else tensor.dtype,
        shard_dim=tensor.shard_dim,
        partition=partition,
        components=(Component(name="", dtype=tensor.dtype),),
        row_step=row_block or 1,
        # A block of columns cannot be decoded without the rest of its row, nor a part of a row be transposed.
        column_step=None if tensor.transposed or row_block else 1,
        single_reader=tensor.transposed,
        decoded=bool(row_block),
        row_bytes=row_bytes_of(tensor.shape, stored, tensor.sources, infos, tensor.transposed),
    )


def _quantized(tensor: TensorPlan, shard: Shard, scheme: Scheme, infos: Mapping[str, TensorInfo]) -> TransferKind:
    """Returns the kind of a weight that is quantized on the way."""
    components = scheme.encoded_components(tensor.name, shard.shape, tensor.dtype)
    as_one = scheme.whole_weight_workspace(tensor.name, shard.shape) > 0
    return TransferKind(
        component=None,
        shape=shard.shape,
        dtype=tensor.dtype,
        shard_dim=tensor.shard_dim,
        partition=shard.partition,
        components=components,
        replicated=scheme.replicated_components(shard),
        row_step=shard.shape[0] if as_one else row_step(components, shard.shape),
        column_step=None if tensor.transposed or as_one else column_step(components, shard.shape),
        single_reader=tensor.transposed or as_one,
        row_bytes=row_bytes_of(shard.shape, shard.shape, tensor.sources, infos, tensor.transposed),
    )


def _stored(source: Source, component: Component | None, shard: Shard, infos: Mapping[str, TensorInfo]) -> TransferKind:
    """Returns the kind of a stored component: sharded like the weight where its layout allows it, else replicated.

    `component` is None where the layout does not know it, and where every rank needs all of it.
    """
    info = infos[source.tensor]
    count = source_numel(source, info.shape)
    part = None if component is None or component.replicated else _partition_part(component, shard)
    shape, dim, partition = part or ((count,), None, None)
    if math.prod(shape) != count:
        fault = f"{info.name} stores {count} elements, its layout has {math.prod(shape)}"
        raise InputError.one(shard.name, fault, "Check that config.json belongs to the checkpoint")
    return TransferKind(
        component=source.component,
        shape=shape,
        dtype=None,
        shard_dim=dim,
        partition=partition,
        components=(Component(name=source.component, dtype="uint8"),),  # the file has its dtype
        replicated=frozenset() if part else frozenset((source.component,)),
        row_bytes=row_bytes_of(shape, shape, (source,), infos, False),
    )


def _partition_part(component: Component, shard: Shard) -> tuple[tuple[int, int], int | None, Partition | None] | None:
    """Returns stored rows and columns, and the dim of them that is sharded with its partition.

    None where a boundary of the weight's partition is not one between stored elements.
    """
    if component.flat:
        # Blocks over the row-major weight are blocks of a row where they divide it; else they straddle rows.
        if shard.shape[1] % component.flat:
            return None
        component = replace(component, flat=0, block_shape=(1, component.flat))
    (rows, columns), dim, partition = component.shape(shard.shape), shard.shard_dim, shard.partition
    if partition is None or dim is None or component.block_shape[dim] == ALL:
        return (rows, columns), None, None
    if not partition.legal(component.block_shape[dim]):
        return None

    def stored(start: int, stop: int) -> Segment:
        found = component.slice(shard.shape, dim, start, stop)
        assert found is not None
        return found[1:]

    # The same partition, counted in stored elements; a transposed component has it on its other dim.
    parts = tuple(tuple(stored(*segment) for segment in part) for part in partition.parts)
    stored_dim = 1 - dim if component.transposed else dim
    return (rows, columns), stored_dim, Partition(component.stored(dim, partition.size), parts)
