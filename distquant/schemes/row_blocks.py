"""Rows a few at a time, for methods that torch's operations quantize: each of these reads and writes all of them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

AT_ONCE = 1 << 18
"""Elements whose float32 values stay in the cache of a core from one operation to the next."""


def row_blocks(rows: Tensor) -> Iterator[slice]:
    """Consecutive rows of a matrix on the CPU that lie in the cache together; elsewhere all rows at once."""
    step = max(AT_ONCE // max(rows.shape[1], 1), 1) if rows.device.type == "cpu" else max(len(rows), 1)
    for start in range(0, len(rows), step):
        yield slice(start, start + step)
