"""What flows for a tensor of a plan: rows of which shape, cut how, in which components.

A weight that is quantized on the way flows as one run of rows that becomes several components; a tensor that stays as
it is as one run with one component; a weight that is stored quantized as one run for each stored component, cut by
its layout. Planner and loader both work from this.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from distquant.checkpoint import TensorInfo
from distquant.errors import InputError
from distquant.model.description import Source, taken
from distquant.planning.load_plan import TensorPlan
from distquant.quantization.scheme import Scheme
from distquant.sharding.layout import ALL, Component
from distquant.sharding.partition import Partition
from distquant.sharding.row_layout import column_step, row_step
from distquant.sharding.shard import Shard


@dataclass(frozen=True, slots=True)
class Transfer:
    """One run of rows.

    Attributes:
        stored: component of a weight that is stored quantized; None for every other tensor.
        shape: of what flows, `[rows, columns]` once seen as rows.
        dtype: torch's name of the dtype that rows are cast to; None = as they are stored.
        sources: checkpoint tensors that hold the rows.
        dim: dim of `shape` that is cut.
        cut: its cut.
        components: what the rows become.
        whole: names of the components that every rank gets for all rows.
        step: rows that belong together.
        apart: columns at which rows may be taken apart; None = only whole rows.
        turned: whether rows are stored as columns.
        entire: bytes that the rank takes that reads and quantizes all rows at once; 0 = rows may come in pieces.
        decoded: whether rows are stored in another form than they are kept in, and all columns of them are needed.
    """

    stored: str | None
    shape: tuple[int, ...]
    dtype: str | None
    sources: tuple[Source, ...]
    shard_dim: int | None
    partition: Partition | None
    components: tuple[Component, ...]
    whole: frozenset[str] = frozenset()
    step: int = 1
    apart: int | None = 1
    transposed: bool = False
    whole_weight_workspace: int = 0
    decoded: bool = False


def transfers_of(
    tensor: TensorPlan, partition: Partition | None, scheme: Scheme, prequantized: bool, infos: Mapping[str, TensorInfo]
) -> Iterator[Transfer]:
    """The flows of a tensor, in the order of the file.

    Args:
        tensor: of the plan.
        cut: its cut.
        scheme: of the plan.
        prequantized: whether the plan's quantized weights are stored so.
        infos: headers of its sources.
    """
    if tensor.scheme == "none":
        component = Component(name="", dtype=tensor.dtype)
        transposed = tensor.transposed
        apart = None if transposed else 1
        transfer = Transfer(
            None,
            tensor.shape,
            tensor.dtype,
            tensor.sources,
            tensor.shard_dim,
            partition,
            (component,),
            apart=apart,
            transposed=transposed,
        )
        step = scheme.plain_row_block(tensor.name)
        yield replace(transfer, dtype=None, step=step, apart=None, decoded=True) if step else transfer
        return
    shard = Shard(tensor.name, (tensor.shape[0], tensor.shape[1]), tensor.dtype, tensor.shard_dim, partition)
    if prequantized:
        layout = {each.name: each for each in scheme.layout(tensor.name, shard.shape, tensor.dtype).components}
        whole = scheme.replicated_components(shard)
        for source in sorted(tensor.sources, key=lambda s: (infos[s.tensor].file, infos[s.tensor].offset)):
            part = None if source.component in whole else layout.get(source.component)
            yield _stored(source, infos[source.tensor], part, shard)
        return
    components = scheme.encoded_components(tensor.name, shard.shape, tensor.dtype)
    entire = scheme.whole_weight_workspace(tensor.name, shard.shape)
    yield Transfer(
        stored=None,
        shape=shard.shape,
        dtype=tensor.dtype,
        sources=tensor.sources,
        shard_dim=tensor.shard_dim,
        partition=partition,
        components=components,
        whole=scheme.replicated_components(shard),
        step=shard.shape[0] if entire else row_step(components, shard.shape),
        apart=None if tensor.transposed or entire else column_step(components, shard.shape),
        transposed=tensor.transposed,
        whole_weight_workspace=entire,
    )


def _stored(source: Source, info: TensorInfo, component: Component | None, shard: Shard) -> Transfer:
    """A stored component: cut like the weight where its layout lets it, whole for every rank where not.

    `component` is None where the layout does not know it, and where every rank needs all of it.
    """
    name, count = source.component, taken(source, info.shape)
    flowing = Component(name=name, dtype="uint8")  # its dtype is that of the file
    part = None if component is None or component.replicated else _partition_part(component, shard)
    if part is None:
        return Transfer(name, (count,), None, (source,), None, None, (flowing,), frozenset((name,)))
    shape, dim, partition = part
    if math.prod(shape) != count:
        what = f"{info.name} stores {count} elements, its layout has {math.prod(shape)}"
        raise InputError.one(shard.name, what, "Check that config.json belongs to the checkpoint")
    return Transfer(name, shape, None, (source,), dim, partition, (flowing,))


def _partition_part(component: Component, shard: Shard) -> tuple[tuple[int, int], int | None, Partition | None] | None:
    """Stored rows and columns, and their cut; None where the cut does not fall between stored elements."""
    if component.flat:
        if shard.shape[1] % component.flat:
            return None
        component = replace(component, flat=0, block_shape=(1, component.flat))
    (rows, columns), dim, partition = component.shape(shard.shape), shard.shard_dim, shard.partition
    if partition is None or dim is None or component.block_shape[dim] == ALL:
        return (rows, columns), None, None
    if not partition.legal(component.block_shape[dim]):
        return None

    def stored(start: int, stop: int) -> tuple[int, int]:
        found = component.slice(shard.shape, dim, start, stop)
        assert found is not None
        return found[1:]

    parts = tuple(tuple(stored(*segment) for segment in part) for part in partition.parts)
    return (
        (rows, columns),
        1 - dim if component.transposed else dim,
        Partition(component.stored(dim, partition.size), parts),
    )
