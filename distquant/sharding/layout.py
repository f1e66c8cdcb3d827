"""How a scheme's stored components cover the logical weight; units and slices follow from it, none is written by hand.

A component (codes, absmax, row scales, ...) says for each dim of the logical weight `[out, in]` how many logical
elements one stored element spans. More words: `ALL`, where it reduces over a whole dim; `words`, where a span is stored
in several elements (32 values of 3 bits in 3 integers, a GGUF block in 34 bytes); `transposed`, where it is stored
`[in, out]`; and `flat`, where runs of elements are counted over the row-major weight and may straddle rows
(bitsandbytes). From that follow the unit at which a dim may be cut, the slice of each component for a slice of the
weight, and the bytes that a shape takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from distquant.dtypes import DTYPE_BYTES

ALL = -1
"""Span of a component that reduces over the whole dim."""

PLAIN_STEPS = (16, 1)
"""Steps at which unblocked dims are cut: matrix kernels like multiples of 16, any boundary is exact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One stored tensor of a quantized weight.

    Attributes:
        name: what follows the parameter's name in a checkpoint ("" for the codes, "absmax", "SCB", ...).
        dtype: torch's name of the stored dtype.
        spans: logical elements that one stored element covers, per dim; `ALL` reduces over the dim.
        words: stored elements that a span takes, per dim; () = one each. Where the span is `ALL`, they are needed
            whole for any part of the dim (scales that an index gathers).
        turned: whether the dims of the stored tensor are in reverse order, `[in, out]`.
        flat: if not 0, logical elements per stored element along the row-major weight (`block_shape` is then unused).
        cuts: steps at which a cut is preferred or still possible, best first. For a flat component they are the block
            sizes in which a local shard can store it without changing a value; a row of the weight must be a multiple
            of one of them to be cut along `in`.
        gathered: a statistic that the ranks work out together (or that is read whole): it never limits a cut.
    """

    name: str
    dtype: str
    block_shape: tuple[int, ...] = (1, 1)
    stored_per_block: tuple[int, ...] = ()
    transposed: bool = False
    flat: int = 0
    preferred_alignments: tuple[int, ...] = ()
    replicated: bool = False

    def shape(self, weight: tuple[int, ...]) -> tuple[int, ...]:
        """Stored shape for a logical weight of this shape (1-D for flat components)."""
        if self.flat:
            return (-(-math.prod(weight) // self.flat),)
        sizes = tuple(self.stored(dim, size) for dim, size in enumerate(weight))
        return sizes[::-1] if self.transposed else sizes

    def stored(self, dim: int, size: int) -> int:
        """Stored elements of the first `size` logical ones of a dim; whole spans, but at the end of the dim."""
        span = self.block_shape[dim]
        return (1 if span == ALL else -(-size // span)) * self._stored_per_block(dim)

    def _stored_per_block(self, dim: int) -> int:
        return self.stored_per_block[dim] if self.stored_per_block else 1

    def nbytes(self, weight: tuple[int, ...]) -> int:
        """Stored bytes for a logical weight of this shape."""
        return math.prod(self.shape(weight)) * DTYPE_BYTES[self.dtype]

    def alignments(self, weight: tuple[int, ...], dim: int) -> tuple[int, ...]:
        """Steps at which `dim` may be cut so that every local stored element comes from one global one."""
        if not self.flat:
            span = self.block_shape[dim]
            return (1,) if span == ALL else tuple(s for s in self.preferred_alignments if s % span == 0) or (span,)
        row = math.prod(weight[dim + 1 :])
        if dim == 0:
            return (self.flat // math.gcd(self.flat, row),)
        return tuple(block for block in (self.preferred_alignments or (self.flat,)) if weight[dim] % block == 0)

    def slice(self, weight: tuple[int, ...], dim: int, start: int, stop: int) -> tuple[int, int, int] | None:
        """The stored elements under `weight[..., start:stop, ...]` along `dim`, as (dim of the component, start, stop).

        None where the slice is not one range of the component: the whole component is then needed.
        """
        if not self.flat:
            if self.block_shape[dim] == ALL:
                return None
            at = len(weight) - 1 - dim if self.transposed else dim
            return at, start // self.block_shape[dim] * self._stored_per_block(dim), self.stored(dim, stop)
        if dim != 0:
            return None
        row = math.prod(weight[1:])
        return (0, start * row // self.flat, -(-stop * row // self.flat))


@dataclass(frozen=True, slots=True)
class Layout:
    """All components of a scheme for one weight; the first holds the codes."""

    components: tuple[Component, ...]

    def alignments(self, weight: tuple[int, ...], dim: int) -> tuple[int, ...]:
        """Legal units of `dim`, the preferred first; empty where the dim cannot be cut exactly.

        A unit is the lcm over all components. Components with several legal steps are combined level by level: all
        preferred ones first, then all finest ones.
        """
        limiting = (component for component in self.components if not component.replicated)
        lists = [component.alignments(weight, dim) for component in limiting]
        if any(not steps for steps in lists):
            return ()
        levels = max((len(steps) for steps in lists), default=0)
        found = (math.lcm(*(steps[min(level, len(steps) - 1)] for steps in lists)) for level in range(levels))
        return tuple(dict.fromkeys(found)) or (1,)

    def nbytes(self, weight: tuple[int, ...]) -> int:
        """Stored bytes of all components for a logical weight of this shape."""
        return sum(component.nbytes(weight) for component in self.components)

    def component(self, name: str) -> Component:
        """The component of that name; KeyError if the scheme stores none."""
        for component in self.components:
            if component.name == name:
                return component
        raise KeyError(name)


def plain(dtype: str, dims: int = 2) -> Layout:
    """A weight as it is: one stored element a logical element, cut at multiples of 16 where there are enough."""
    return Layout((Component(name="", dtype=dtype, block_shape=(1,) * dims, preferred_alignments=PLAIN_STEPS),))
