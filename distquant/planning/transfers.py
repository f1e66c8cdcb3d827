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
from distquant.sharding.partition import Cut
from distquant.sharding.row_layout import column_step, row_step
from distquant.sharding.shard import Shard


@dataclass(frozen=True, slots=True)
class Flow:
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
    dim: int | None
    cut: Cut | None
    components: tuple[Component, ...]
    whole: frozenset[str] = frozenset()
    step: int = 1
    apart: int | None = 1
    turned: bool = False
    entire: int = 0
    decoded: bool = False


def flows_of(
    tensor: TensorPlan, cut: Cut | None, scheme: Scheme, prequantized: bool, infos: Mapping[str, TensorInfo]
) -> Iterator[Flow]:
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
        turned = tensor.transposed
        apart = None if turned else 1
        flow = Flow(
            None, tensor.shape, tensor.dtype, tensor.sources, tensor.dim, cut, (component,), apart=apart, turned=turned
        )
        step = scheme.decodes(tensor.name)
        yield replace(flow, dtype=None, step=step, apart=None, decoded=True) if step else flow
        return
    shard = Shard(tensor.name, (tensor.shape[0], tensor.shape[1]), tensor.dtype, tensor.dim, cut)
    if prequantized:
        layout = {each.name: each for each in scheme.layout(tensor.name, shard.shape, tensor.dtype).components}
        whole = scheme.statistics(shard)
        for source in sorted(tensor.sources, key=lambda s: (infos[s.tensor].file, infos[s.tensor].offset)):
            part = None if source.component in whole else layout.get(source.component)
            yield _stored(source, infos[source.tensor], part, shard)
        return
    components = scheme.flowing(tensor.name, shard.shape, tensor.dtype)
    entire = scheme.entire(tensor.name, shard.shape)
    yield Flow(
        stored=None,
        shape=shard.shape,
        dtype=tensor.dtype,
        sources=tensor.sources,
        dim=tensor.dim,
        cut=cut,
        components=components,
        whole=scheme.statistics(shard),
        step=shard.shape[0] if entire else row_step(components, shard.shape),
        apart=None if tensor.transposed or entire else column_step(components, shard.shape),
        turned=tensor.transposed,
        entire=entire,
    )


def _stored(source: Source, info: TensorInfo, component: Component | None, shard: Shard) -> Flow:
    """A stored component: cut like the weight where its layout lets it, whole for every rank where not.

    `component` is None where the layout does not know it, and where every rank needs all of it.
    """
    name, count = source.component, taken(source, info.shape)
    flowing = Component(name=name, dtype="uint8")  # its dtype is that of the file
    part = None if component is None or component.gathered else _cut_part(component, shard)
    if part is None:
        return Flow(name, (count,), None, (source,), None, None, (flowing,), frozenset((name,)))
    shape, dim, cut = part
    if math.prod(shape) != count:
        what = f"{info.name} stores {count} elements, its layout has {math.prod(shape)}"
        raise InputError.one(shard.name, what, "Check that config.json belongs to the checkpoint")
    return Flow(name, shape, None, (source,), dim, cut, (flowing,))


def _cut_part(component: Component, shard: Shard) -> tuple[tuple[int, int], int | None, Cut | None] | None:
    """Stored rows and columns, and their cut; None where the cut does not fall between stored elements."""
    if component.flat:
        if shard.shape[1] % component.flat:
            return None
        component = replace(component, flat=0, spans=(1, component.flat))
    (rows, columns), dim, cut = component.shape(shard.shape), shard.dim, shard.cut
    if cut is None or dim is None or component.spans[dim] == ALL:
        return (rows, columns), None, None
    if not cut.legal(component.spans[dim]):
        return None

    def stored(start: int, stop: int) -> tuple[int, int]:
        found = component.slice(shard.shape, dim, start, stop)
        assert found is not None
        return found[1:]

    parts = tuple(tuple(stored(*segment) for segment in part) for part in cut.parts)
    return (rows, columns), 1 - dim if component.turned else dim, Cut(component.stored(dim, cut.size), parts)
