"""A tensor seen as rows, and where these rows are stored in the files. Pure arithmetic.

Rows are all dims but the last, columns are the last dim. A 1-D tensor has rows of one element.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter

from distquant.checkpoint import TensorInfo
from distquant.model.description import ROWS, Source
from distquant.sharding.partition import Partition, Segment


def rows_and_width(shape: Sequence[int]) -> tuple[int, int]:
    """Returns the number of rows of a tensor, and that of its columns."""
    width = shape[-1] if len(shape) > 1 else 1
    return (math.prod(shape) // width if width else 0), width


def row_segments(shape: Sequence[int], dim: int | None, partition: Partition | None, tp: int) -> tuple[Segment, ...]:
    """Returns the rows of which a position on tp keeps all or some columns, in local order."""
    rows = rows_and_width(shape)[0]
    if dim != 0 or partition is None or not shape:
        return ((0, rows),)
    # Dim 0 of a tensor of three dims or more counts several rows.
    per = rows // shape[0] if shape[0] else 0
    return tuple((a * per, b * per) for a, b in partition.segments(tp))


def column_segments(shape: Sequence[int], dim: int | None, partition: Partition | None, tp: int) -> tuple[Segment, ...]:
    """Returns the columns that a position on tp keeps of its rows, in local order."""
    width = rows_and_width(shape)[1]
    return partition.segments(tp) if dim not in (None, 0) and partition is not None else ((0, width),)


@dataclass(frozen=True, slots=True)
class RowRange:
    """Consecutive rows of one checkpoint tensor, or the same columns of each.

    Attributes:
        tensor: name in the checkpoint, for messages.
        file: file name.
        offset: byte offset of the first wanted byte in the file.
        stride: bytes from one row to the next.
        width: wanted bytes of each row.
        rows: number of rows.
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


class RowMap:
    """The rows of one parameter in the files.

    Args:
        shape: of the parameter, as the checkpoint stores it.
        sources: checkpoint tensors, or parts of them, that fill it.
        infos: headers of the checkpoint.

    Attributes:
        rows, width: of the parameter.
    """

    def __init__(self, shape: tuple[int, ...], sources: tuple[Source, ...], infos: Mapping[str, TensorInfo]):
        self.rows, self.width = rows_and_width(shape)
        self._given = shape, sources, infos

    @cached_property
    def placed(self) -> list[tuple[int, RowRange]]:
        """The rows of each source with their first row in the parameter, in row order."""
        # Found when they are first asked for: a rank has tens of thousands of tensors before it reads the first.
        shape, sources, infos = self._given
        return sorted((_placed(s, infos[s.tensor], shape) for s in sources), key=itemgetter(0))

    @property
    def dtypes(self) -> set[str]:
        return {source.dtype for _, source in self.placed}

    @property
    def files(self) -> set[str]:
        _, sources, infos = self._given
        return {infos[source.tensor].file for source in sources}

    def row_bytes(self) -> int:
        """Returns the bytes of a row, of the widest where sources differ in their dtype."""
        return max((source.stride for _, source in self.placed), default=0)

    def ranges(self, rows: Segment, columns: Segment) -> list[RowRange]:
        """Returns where the given columns of the given rows are stored, in row order."""
        stored = []
        for first, source in self.placed:
            start, stop = max(rows[0], first), min(rows[1], first + source.rows)
            if start >= stop:
                continue
            item = source.stride // max(self.width, 1)
            offset = source.offset + (start - first) * source.stride + columns[0] * item
            width = (columns[1] - columns[0]) * item
            stored.append(
                # Not by `replace`, which takes several times as long: there is one for each piece of a load.
                RowRange(source.tensor, source.file, offset, source.stride, width, stop - start, source.dtype)
            )
        return stored


def _placed(source: Source, info: TensorInfo, shape: tuple[int, ...]) -> tuple[int, RowRange]:
    """Returns the first row of a source in a parameter, and where its rows are stored."""
    width = rows_and_width(shape)[1]
    count, skipped = math.prod(info.shape) // width if width else 0, 0
    if source.take is not None and source.take[0] == ROWS:
        # Experts and their rows are one dim here, so the bounds are rows already.
        _, skipped, stop = source.take
        count = stop - skipped
    elif source.take is not None:
        per_index = count // info.shape[0]
        skipped, count = source.take[1] * per_index, (source.take[2] - source.take[1]) * per_index
    stride = width * (info.nbytes // max(math.prod(info.shape), 1))
    stored = RowRange(info.name, info.file, info.offset + skipped * stride, stride, stride, count, info.dtype)
    return _first_row(source.offset, shape), stored


def _first_row(offset: tuple[int, ...] | None, shape: tuple[int, ...]) -> int:
    """Returns the row of a parameter that an index into its dims stands for."""
    if offset is None:
        return 0
    if len(shape) == 1:
        return offset[0]
    # The last dim counts columns, so it does not move the row.
    strides = [math.prod(shape[i + 1 : -1]) if i < len(shape) - 1 else 0 for i in range(len(shape))]
    return sum(index * stride for index, stride in zip(offset, strides, strict=False))


def row_bytes_of(
    shape: tuple[int, ...],
    stored: tuple[int, ...],
    sources: tuple[Source, ...],
    infos: Mapping[str, TensorInfo],
    transposed: bool,
) -> tuple[tuple[int, int], ...]:
    """Returns (rows, bytes that each takes in the files), in row order: one pair, but for sources of several dtypes.

    Args:
        shape: logical shape.
        stored: shape of the sources together, before they are transposed.
        sources: checkpoint tensors that hold the rows.
        infos: headers of these.
        transposed: True if rows are stored as columns.
    """
    row_map = RowMap(stored[::-1] if transposed else stored, sources, infos)
    ranges = row_map.ranges((0, row_map.rows), (0, row_map.width))
    if transposed:  # a logical row is a column of the file, and they are all read together
        rows = rows_and_width(shape)[0]
        return ((rows, sum(each.nbytes for each in ranges) // max(rows, 1)),)
    runs: list[tuple[int, int]] = []
    for each in ranges:
        if runs and runs[-1][1] == each.width:
            runs[-1] = (runs[-1][0] + each.rows, each.width)
        else:
            runs.append((each.rows, each.width))
    return tuple(runs)
