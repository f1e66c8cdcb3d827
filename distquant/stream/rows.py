"""Where the rows of a rank's shard lie in the files. Pure arithmetic.

Every tensor is seen as rows: all dims but the last, times the last (a 1-D tensor has rows of one element). A cut of the
first dim selects ranges of rows, a cut of the last dim selects the same bytes of every row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from distquant.checkpoint import TensorInfo
from distquant.planning.cuts import Segment
from distquant.skeleton.words import Source


@dataclass(frozen=True, slots=True)
class RowRange:
    """Consecutive rows of one checkpoint tensor that go to consecutive local rows.

    Attributes:
        tensor: name in the checkpoint, for messages.
        file: file name.
        offset: byte offset of the first row in the file.
        row_bytes: bytes from one row to the next.
        keep: bytes `[start, stop)` of each row that are wanted.
        rows: how many rows.
        local: local row of the first.
        dtype: safetensors' name of the dtype.
    """

    tensor: str
    file: str
    offset: int
    row_bytes: int
    keep: tuple[int, int]
    rows: int
    local: int
    dtype: str

    @property
    def nbytes(self) -> int:
        return self.rows * (self.keep[1] - self.keep[0])

    def part(self, first: int, rows: int) -> RowRange:
        """`rows` rows from the `first` on."""
        at = self.offset + first * self.row_bytes
        return RowRange(self.tensor, self.file, at, self.row_bytes, self.keep, rows, self.local + first, self.dtype)


def row_ranges(
    shape: tuple[int, ...],
    sources: tuple[Source, ...],
    infos: Mapping[str, TensorInfo],
    dim: int | None,
    segments: tuple[Segment, ...],
) -> Iterator[RowRange]:
    """The rows of a parameter's shard in local order.

    Args:
        shape: of the whole parameter.
        sources: checkpoint tensors that fill it, as `skeleton.names` places them.
        infos: headers of those tensors.
        dim: dim that is cut (0 or the last); None = everything is wanted.
        segments: the rank's segments of that dim.
    """
    width = shape[-1] if len(shape) > 1 else 1
    per_first = math.prod(shape[1:-1])
    rows = math.prod(shape) // width if width else 0
    cut_rows = dim == 0 and bool(shape)
    wanted = [(a * per_first, b * per_first) for a, b in segments] if cut_rows else [(0, rows)]
    columns = segments[0] if dim not in (None, 0) else (0, width)
    placed = sorted(_placed(source, infos[source.tensor], shape) for source in sources)
    local = 0
    for start, stop in wanted:
        for first, count, skip, name in placed:
            a, b = max(start, first), min(stop, first + count)
            if a < b:
                info = infos[name]
                item = info.nbytes // max(math.prod(info.shape), 1)
                keep = (columns[0] * item, columns[1] * item)
                offset = info.offset + (skip + a - first) * width * item
                yield RowRange(name, info.file, offset, width * item, keep, b - a, local + a - start, info.dtype)
        local += stop - start


def _placed(source: Source, info: TensorInfo, shape: tuple[int, ...]) -> tuple[int, int, int, str]:
    """(first row in the parameter, rows, rows of the checkpoint tensor to skip, name)."""
    width = shape[-1] if len(shape) > 1 else 1
    count = math.prod(info.shape) // width if width else 0
    skip = 0
    if source.take is not None:
        per_row = count // info.shape[0]
        skip, count = source.take[1] * per_row, (source.take[2] - source.take[1]) * per_row
    first = 0
    if source.offset is not None:
        strides = [math.prod(shape[i + 1 : -1]) if i < len(shape) - 1 else 0 for i in range(len(shape))]
        first = sum(at * stride for at, stride in zip(source.offset, strides, strict=False))
        if len(shape) == 1:
            first = source.offset[0]
    return first, count, skip, source.tensor
