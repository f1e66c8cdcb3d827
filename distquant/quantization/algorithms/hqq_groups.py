"""The groups of a weight under HQQ: their shape, where it may be partitioned, and its codes as hqq packs them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distquant.config.hqq import HqqWeight
from distquant.sharding.layout import ALL
from distquant.sharding.shard import Shard

PER_WORD = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}
"""Codes in a stored integer, by bits."""


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of a weight `[out, in]`.

    Attributes:
        shape: of the weight.
        bits: of a code.
        axis: 1 = along the rows, 0 = striding them.
        size: elements of a group as it is quantized.
    """

    shape: tuple[int, int]
    bits: int
    axis: int
    size: int

    @classmethod
    def of(cls, weight: HqqWeight, shape: tuple[int, ...]) -> Groups:
        """The groups of a weight of that shape; without a group size, the row (axis 1) or column (0)."""
        rows, columns = shape
        size = weight.group_size or (columns if weight.axis == 1 else rows)
        return cls((rows, columns), weight.nbits, weight.axis, size)

    @property
    def fine(self) -> int:
        """Elements of the groups that a shard keeps, a divisor of `size` and of the row (axis 1) or column (0)."""
        return math.gcd(self.size, self.shape[self.axis])

    @property
    def period(self) -> int:
        """Rows after which the groups repeat (axis 0)."""
        return self.shape[0] // self.fine

    @property
    def width(self) -> int:
        """Columns that share a scale (axis 1); `ALL` where it is the row."""
        return ALL if self.fine == self.shape[1] else self.fine

    @property
    def row_alignment(self) -> int:
        """Rows between which the weight may be partitioned: codes that are packed together stay together."""
        padded = self.bits == 3  # the only bits whose last words may be partly empty
        return (self.period if self.axis == 0 else 1) * (1 if padded else PER_WORD[self.bits])

    def repeated(self, values: Tensor) -> Tensor:
        """One value for each fine group, flat, from one for each group."""
        times = self.size // self.fine
        flat = values.reshape(-1)
        return flat.repeat_interleave(times) if self.axis == 1 else flat.repeat(times)

    def grouped(self, local: tuple[int, int]) -> tuple[int, int]:
        """Shape of a local part's codes as hqq groups them; the local group size is that of `axis`."""
        rows, columns = local
        if self.axis == 0:
            return rows // self.period, self.period * columns
        size = columns if self.width == ALL else self.fine
        return rows * columns // max(size, 1), size

    def stored_groups(self) -> tuple[int, int]:
        """Shape of the whole weight's codes as hqq groups them."""
        count = math.prod(self.shape) // self.size
        return (count, self.size) if self.axis == 1 else (self.size, count)

    def packed_shape(self, grouped: tuple[int, int]) -> tuple[int, int]:
        """Shape of `W_q`."""
        return -(-grouped[0] // PER_WORD[self.bits]), grouped[1]

    def pack(self, codes: Tensor, local: tuple[int, int]) -> Tensor:
        """`W_q` of a local part's codes uint8."""
        from hqq.core.quantize import Quantizer

        packed: Tensor = Quantizer.pack[Quantizer.bit_to_packing[self.bits]](codes.reshape(self.grouped(local)))
        return packed.contiguous()

    def unpack(self, words: Tensor, grouped: tuple[int, int]) -> Tensor:
        """Codes uint8, of the shape that hqq groups them in, of a `W_q`; what fills its last words is left out."""
        from hqq.core.quantize import Quantizer

        codes: Tensor = Quantizer.unpack[Quantizer.bit_to_packing[self.bits]](words, dtype=torch.uint8)
        return codes[: grouped[0]]

    def local_values(self, values: Tensor, shard: Shard) -> Tensor:
        """Of one value for each fine group of the whole weight, those of a shard's groups."""
        if self.axis == 0:
            return sliced(values.view(self.period, -1), shard.columns)
        columns: tuple[tuple[int, int], ...] = ((0, 1),)
        if self.width != ALL:
            columns = tuple((a // self.fine, -(-b // self.fine)) for a, b in shard.columns)
        return sliced(values.view(self.shape[0], -1), columns, shard.rows)

    def metadata(self, local: tuple[int, int], components: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
        """The dict by which hqq reads the packed codes of a local part."""
        from hqq.core.quantize import Quantizer

        packing = Quantizer.bit_to_packing[self.bits]
        return {
            "nbits": self.bits,
            "group_size": self.grouped(local)[self.axis],
            "shape": torch.Size(local),
            "scale": components["scale"],
            "zero": components["zero"],
            "axis": self.axis,
            "packing": packing,
            "unpack_view_dtype": Quantizer.unpack_view_dtype[packing],
            "view_as_float": False,
            "quant_scale": False,
            "quant_zero": False,
            "compute_dtype": dtype,
        }


def sliced(
    values: Tensor, columns: tuple[tuple[int, int], ...], rows: tuple[tuple[int, int], ...] | None = None
) -> Tensor:
    """Of `[rows, columns]` the segments of columns, and then of rows where they are given."""
    for dim, segments in ((1, columns), (0, rows)):
        if segments is not None:
            values = torch.cat([values.narrow(dim, a, b - a) for a, b in segments], dim)
    return values
