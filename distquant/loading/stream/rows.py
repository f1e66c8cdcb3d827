"""Where rows of a tensor lie in the files. Pure arithmetic.

Every tensor is seen as rows: all dims but the last, times the last (a 1-D tensor has rows of one element).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from distquant.checkpoint import TensorInfo
from distquant.model.description import ROWS, Source
from distquant.planning.read_assignment import rows_and_width
from distquant.sharding.partition import Segment


@dataclass(frozen=True, slots=True)
class RowRange:
    """Consecutive rows of one checkpoint tensor, or the same columns of each.

    Attributes:
        tensor: name in the checkpoint, for messages.
        file: file name.
        offset: byte offset of the first wanted byte in the file.
        stride: bytes from one row to the next.
        width: bytes of each row that are wanted.
        rows: how many rows.
        dtype: safetensors' name of the dtype.
    """

    tensor: str
    file: str
    offset: int
    stride: int
    width: int
    rows: int
    dtype: str

    @property
    def nbytes(self) -> int:
        return self.rows * self.width

    @property
    def contiguous(self) -> bool:
        return self.width == self.stride or self.rows == 1


@dataclass(frozen=True, slots=True)
class Placed:
    """A checkpoint tensor's rows within a parameter."""

    first: int
    rows: int
    skip: int
    """Rows of the checkpoint tensor that come before."""
    info: TensorInfo


class RowMap:
    """Finds the rows of one parameter in the files."""

    def __init__(self, shape: tuple[int, ...], sources: tuple[Source, ...], infos: Mapping[str, TensorInfo]):
        self.rows, self.width = rows_and_width(shape)
        self.placed = sorted((_placed(s, infos[s.tensor], shape) for s in sources), key=lambda p: p.first)

    @property
    def dtypes(self) -> set[str]:
        return {placed.info.dtype for placed in self.placed}

    def row_bytes(self) -> int:
        """Bytes of a row, the widest where sources differ."""
        return max((self.width * _item(placed.info) for placed in self.placed), default=0)

    def ranges(self, rows: Segment, columns: Segment) -> list[RowRange]:
        """The given columns of the given rows, in row order."""
        found = []
        for placed in self.placed:
            a, b = max(rows[0], placed.first), min(rows[1], placed.first + placed.rows)
            if a >= b:
                continue
            item = _item(placed.info)
            stride, width = self.width * item, (columns[1] - columns[0]) * item
            offset = placed.info.offset + (placed.skip + a - placed.first) * stride + columns[0] * item
            found.append(RowRange(placed.info.name, placed.info.file, offset, stride, width, b - a, placed.info.dtype))
        return found


def _item(info: TensorInfo) -> int:
    return info.nbytes // max(math.prod(info.shape), 1)


def _placed(source: Source, info: TensorInfo, shape: tuple[int, ...]) -> Placed:
    width = rows_and_width(shape)[1]
    count = math.prod(info.shape) // width if width else 0
    skip = 0
    if source.take is not None and source.take[0] == ROWS:
        _, skip, stop = source.take
        count = stop - skip
    elif source.take is not None:
        per_row = count // info.shape[0]
        skip, count = source.take[1] * per_row, (source.take[2] - source.take[1]) * per_row
    first = 0
    if source.offset is not None:
        strides = [math.prod(shape[i + 1 : -1]) if i < len(shape) - 1 else 0 for i in range(len(shape))]
        first = sum(at * stride for at, stride in zip(source.offset, strides, strict=False))
        if len(shape) == 1:
            first = source.offset[0]
    return Placed(first, count, skip, info)
