"""Declares how a scheme's stored components cover the logical weight. Alignments, slices and sizes follow from that.

A component (codes, absmax, row scales, ...) gives its block shape: for each dim of the logical weight `[out, in]`, the
logical elements that one stored element covers. `ALL` means that it reduces over the whole dim. Three more words cover
all formats: `stored_per_block`, where a block takes several stored elements (32 values of 3 bits in 3 integers, a GGUF
block in 34 bytes); `transposed`, where the component is stored `[in, out]`; and `flat`, where blocks run over the
row-major weight and may straddle rows (bitsandbytes).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from distquant.dtypes import DTYPE_BYTES

ALL = -1
"""Block size of a component that reduces over the whole dim."""

PLAIN_STEPS = (16, 1)
"""Alignments of dims without blocks: matrix kernels prefer multiples of 16, and any boundary is exact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One stored tensor of a quantized weight.

    Attributes:
        name: suffix of the parameter's name in a checkpoint ("" for the codes, "absmax", "SCB", ...).
        dtype: torch's name of the stored dtype.
        block_shape: logical elements that one block covers, per dim; `ALL` reduces over the dim.
        stored_per_block: stored elements that a block takes, per dim; () = one each. Where the block is `ALL`, any part
            of the dim needs all of them (scales that an index selects from).
        transposed: True if the dims of the stored tensor are in reverse order, `[in, out]`.
        flat: if not 0, logical elements per stored element along the row-major weight (`block_shape` is then unused).
        preferred_alignments: alignments that are preferred or still possible, best first. For a flat component, the
            block sizes in which a local shard can store it without changing a value. To be partitioned along `in`, the
            rows of a weight must be multiples of one of them.
        replicated: True for a statistic that the ranks compute together (or each read in full): it never limits a
            partition.
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
        """Returns the stored shape for a logical weight of this shape (1-D for flat components)."""
        if self.flat:
            return (-(-math.prod(weight) // self.flat),)
        sizes = tuple(self.stored(dim, size) for dim, size in enumerate(weight))
        return sizes[::-1] if self.transposed else sizes

    def stored(self, dim: int, size: int) -> int:
        """Returns the stored elements of the first `size` logical ones of a dim: full blocks, but at its end."""
        block = self.block_shape[dim]
        return (1 if block == ALL else -(-size // block)) * self._stored_per_block(dim)

    def _stored_per_block(self, dim: int) -> int:
        return self.stored_per_block[dim] if self.stored_per_block else 1

    def nbytes(self, weight: tuple[int, ...]) -> int:
        """Returns the stored bytes for a logical weight of this shape."""
        return math.prod(self.shape(weight)) * DTYPE_BYTES[self.dtype]

    def alignments(self, weight: tuple[int, ...], dim: int) -> tuple[int, ...]:
        """Returns the alignments of `dim` at which every local stored element comes from one global one."""
        if not self.flat:
            block = self.block_shape[dim]
            # A component that reduces over the dim has one element for all of it, wherever the dim is divided.
            return (1,) if block == ALL else tuple(s for s in self.preferred_alignments if s % block == 0) or (block,)
        row = math.prod(weight[dim + 1 :])
        if dim == 0:
            # The fewest rows after which a block ends just where a row does: lcm(flat, row) / row.
            return (self.flat // math.gcd(self.flat, row),)
        # Along `in` a shard takes a part of every row: blocks must not straddle rows, and smaller ones may be stored.
        return tuple(block for block in (self.preferred_alignments or (self.flat,)) if weight[dim] % block == 0)

    def slice(self, weight: tuple[int, ...], dim: int, start: int, stop: int) -> tuple[int, int, int] | None:
        """Returns the stored elements under `weight[..., start:stop, ...]` along `dim`.

        Returns:
            (dim of the component, start, stop); None where they are not one range: the whole component is then needed.
        """
        if not self.flat:
            # A value that reduces over the dim belongs to every part of it.
            if self.block_shape[dim] == ALL:
                return None
            # `dim` counts the logical dims; a transposed component stores them in reverse order.
            stored_dim = len(weight) - 1 - dim if self.transposed else dim
            # Round outwards: a block that the slice covers in part is needed in full.
            first = start // self.block_shape[dim] * self._stored_per_block(dim)
            return stored_dim, first, self.stored(dim, stop)
        # Rows are one run of a row-major weight, so they are one range; a part of each row is one range per row.
        if dim != 0:
            return None
        row = math.prod(weight[1:])
        return (0, start * row // self.flat, -(-stop * row // self.flat))


@dataclass(frozen=True, slots=True)
class Layout:
    """All components of a scheme for one weight; the first holds the codes."""

    components: tuple[Component, ...]

    def alignments(self, weight: tuple[int, ...], dim: int) -> tuple[int, ...]:
        """Returns the legal alignments of `dim`, the preferred first; () where the dim cannot be partitioned exactly.

        Each is the lcm over all components. Components with several alignments are combined level by level: all
        preferred ones first, then all finest ones.
        """
        limiting = (component for component in self.components if not component.replicated)
        lists = [component.alignments(weight, dim) for component in limiting]
        if any(not steps for steps in lists):
            return ()
        levels = max((len(steps) for steps in lists), default=0)
        combined = (math.lcm(*(steps[min(level, len(steps) - 1)] for steps in lists)) for level in range(levels))
        return tuple(dict.fromkeys(combined)) or (1,)

    def nbytes(self, weight: tuple[int, ...]) -> int:
        """Returns the stored bytes of all components for a logical weight of this shape."""
        return sum(component.nbytes(weight) for component in self.components)

    def component(self, name: str) -> Component:
        """Returns the component of that name; raises KeyError if the scheme stores none."""
        for component in self.components:
            if component.name == name:
                return component
        raise KeyError(name)


def plain(dtype: str, dims: int = 2) -> Layout:
    """Returns the layout of a plain weight: one stored element for each logical one, preferably aligned to 16."""
    return Layout((Component(name="", dtype=dtype, block_shape=(1,) * dims, preferred_alignments=PLAIN_STEPS),))
