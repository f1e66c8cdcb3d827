"""The fingerprint: a 128-bit digest of a quantized model that does not depend on how many ranks hold it.

Every logical element counts with its code and with the exact float32 scale that the kernel will use, wherever they are
stored. An element's code is multiplied by two pseudo-random odd 64-bit numbers, one for its row and one for its column,
drawn from the parameter's name; the products are summed modulo 2^64, in two lanes with independent numbers. Sums are
linear, so each rank adds what it owns and the ranks' sums add up. Uneven partitions, repeated kv heads (counted for
their first holder), finer local blocks and un-nested statistics all give the same number. Two models that differ in any
code or scale collide with a probability of about 2^-64 or less. It proves equality against accidents, not attackers.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from distquant.sharding.partition import Segment

WHOLE_ROW = -1
"""Span of a value that stands for a whole row, whatever part of it a rank holds."""

LANES = 2
MASK = (1 << 64) - 1
TILE = 1 << 20
"""Elements hashed at a time; bounds the int64 temporaries."""

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtype that shows the bits of elements of that many bytes."""


@lru_cache(maxsize=64)
def _numbers(key: str, start: int, stop: int) -> Tensor:
    """Returns odd pseudo-random numbers, int64, of positions `[start, stop)` (SplitMix64, Steele et al. 2014)."""
    seed = np.uint64(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little"))
    with np.errstate(over="ignore"):
        z = seed + np.arange(start + 1, stop + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = (z ^ (z >> np.uint64(31))) | np.uint64(1)
    return torch.from_numpy(z.view(np.int64))


class Tally:
    """One parameter's part of the fingerprint, as far as this rank holds it."""

    def __init__(self, name: str):
        self.name = name
        self.lanes = [0] * LANES

    def add(self, stream: str, values: Tensor, rows: Segment, columns: Segment, span: int = 1) -> None:
        """Counts `values[i, j]` for logical row `rows[0] + i` and columns `columns[0] + j * span ...` of that span.

        Args:
            stream: kind of the values (`code`, `scale`); streams do not mix.
            values: integers, or floats that count by their bits; `[rows, ceil(columns / span)]`.
            rows: global rows that the values cover.
            columns: global columns that the values cover.
            span: columns that one value stands for.
        """
        # Exact bits, not values: a sum of floats would depend on its order, and so on how a weight is divided.
        if values.is_floating_point():
            values = values.contiguous().view(BITS[values.element_size()])
        per_tile = max(TILE // max(values.shape[1], 1), 1)
        for lane in range(LANES):
            # The numbers depend on logical positions alone, so any rank that holds an element adds the same product.
            key = f"{lane}/{stream}/{self.name}"
            row_numbers = _numbers(key + "/row", *rows).to(values.device)
            column_numbers = _spanned(_numbers(key + "/column", *columns), span).to(values.device)
            total = 0
            for first in range(0, values.shape[0], per_tile):
                tile = values[first : first + per_tile].to(torch.int64)
                # int64 wraps around on overflow, which is just the sum modulo 2^64.
                sums = (tile * column_numbers).sum(1)
                # Factor out the row's number: one product per element in place of two.
                total += int((sums * row_numbers[first : first + per_tile]).sum())
            self.lanes[lane] = (self.lanes[lane] + total) & MASK

    def shard(
        self,
        stream: str,
        values: Tensor,
        shape: tuple[int, int],
        dim: int | None,
        owned: tuple[tuple[Segment, int], ...],
        span: int = 1,
    ) -> None:
        """Counts a component of a rank's part of a weight.

        Args:
            stream: kind of the values.
            values: `[local rows, ceil(local columns / span)]`.
            shape: of the whole weight, `[out, in]`.
            dim: dim that is partitioned; None = none.
            owned: segments of that dim (of the rows, if None) that this rank counts, each with its local start.
            span: local columns that one value stands for; `WHOLE_ROW` = all of them.
        """
        for (start, stop), local in owned:
            if dim != 1:
                # A rank with all columns of its rows: a value of a whole row stands for all of them.
                width = shape[1] if span == WHOLE_ROW else span
                self.add(stream, values[local : local + stop - start], (start, stop), (0, shape[1]), width)
            elif span == WHOLE_ROW:
                # Every rank holds the row's value, and counts it for its own columns: the sums add up to the row's.
                self.add(stream, values, (0, shape[0]), (start, stop), stop - start)
            else:
                part = values[:, local // span : -(-(local + stop - start) // span)]
                self.add(stream, part, (0, shape[0]), (start, stop), span)

    def tensor(self, values: Tensor, owned: tuple[tuple[Segment, int], ...], dim: int) -> None:
        """Counts a plain tensor by its bits: `owned` segments of `dim`, each with its local start."""
        flat = values.detach().reshape(-1, values.shape[-1]) if values.dim() > 1 else values.detach().reshape(-1, 1)
        rows_per = flat.shape[0] // values.shape[0] if values.dim() and values.shape[0] else 1
        for (start, stop), local in owned:
            length = stop - start
            if dim == 0:
                part = flat[local * rows_per : (local + length) * rows_per]
                self.add("code", _bits(part), (start * rows_per, stop * rows_per), (0, flat.shape[1]))
            else:
                self.add("code", _bits(flat[:, local : local + length]), (0, flat.shape[0]), (start, stop))

    def again(self, lanes: list[int]) -> None:
        """Adds the sums of another tally of this parameter."""
        self.lanes = [(mine + theirs) & MASK for mine, theirs in zip(self.lanes, lanes, strict=True)]

    def constant(self, text: str) -> None:
        """Counts a fact about the whole parameter (scheme, shape, dtype); call it on one rank only."""
        digest = hashlib.blake2b(f"{self.name}\0{text}".encode(), digest_size=8 * LANES).digest()
        for lane in range(LANES):
            part = int.from_bytes(digest[8 * lane : 8 * lane + 8], "little")
            self.lanes[lane] = (self.lanes[lane] + part) & MASK


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().view(BITS[values.element_size()])


def _spanned(numbers: Tensor, span: int) -> Tensor:
    """Returns the sums of runs of `span` numbers; the last run may be short."""
    if span == 1:
        return numbers
    padded = torch.nn.functional.pad(numbers, (0, -len(numbers) % span))
    return padded.view(-1, span).sum(1)


def combine(parts: list[list[int]]) -> str:
    """Returns 32 hex digits from the lanes of all ranks and parameters."""
    lanes = [sum(part[lane] for part in parts) & MASK for lane in range(LANES)]
    return "".join(f"{lane:016x}" for lane in lanes)
