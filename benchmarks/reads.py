"""Counts the bytes of a mixture of experts that each rank reads, from the loader's calls to the system.

The loader's own open files record every read (file, first byte, bytes), and the reads are matched with the tensors of
the checkpoint's headers. Checkpoints have one tensor for each expert's projection, as Mixtral's on the hub.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from checkpoints import places
from contestants import Contestant, Measured

OWN, OTHERS, REST = "own experts", "other ranks' experts", "everything else"
KINDS = (OWN, OTHERS, REST)

Read = tuple[str, int, int]
"""(file, first byte, bytes)"""


def recording(path: str, contestant: Contestant, rank: int, run: Callable[[], Measured]) -> Callable[[], Measured]:
    """Returns a load that also counts the bytes of its reads by kind."""
    own, there = mine(path, contestant, rank), places(path)

    def recorded_run() -> Measured:
        with recorded() as reads:
            figures = run()
        return replace(figures, reads=by_kind(reads, there, own))

    return recorded_run


@contextmanager
def recorded() -> Iterator[list[Read]]:
    """Yields the list to which the loader's reads are added meanwhile."""
    from distquant.loading import loader
    from distquant.loading.stream.files import Files

    reads: list[Read] = []

    class Recorded(Files):
        def _preadv(self, fd: int, targets: Sequence[memoryview], offset: int) -> int:
            count = super()._preadv(fd, targets, offset)
            reads.append((os.readlink(f"/proc/self/fd/{fd}"), offset, count))
            return count

    loader.Files = Recorded  # type: ignore[misc]
    try:
        yield reads
    finally:
        loader.Files = Files  # type: ignore[misc]


def mine(path: str, contestant: Contestant, rank: int) -> range:
    """Returns the numbers of the experts that the plan assigns to a rank."""
    import distquant as dq

    plan = dq.plan(path, quantization_config=contestant.quant, mesh=contestant.mesh, dtype="bfloat16")
    partition = plan.partitions[next(iter(plan.experts.values())).ep_partition]
    ((first, last),) = partition.segments(plan.mesh.coordinates(rank)["ep"])
    return range(first, last)


def by_kind(reads: Iterable[Read], there: dict[str, list[tuple[int, int, str]]], own: range) -> dict[str, int]:
    """Counts the bytes of tensors that were read; bytes that were read twice count twice.

    Args:
        reads: reads of a load.
        there: places of the tensors (`checkpoints.places`).
        own: numbers of the rank's experts.
    """
    nbytes = dict.fromkeys(KINDS, 0)
    for file, first, count in reads:
        tensors = there[file]
        index = max(bisect_right(tensors, first, key=lambda tensor: tensor[0]) - 1, 0)
        while index < len(tensors) and tensors[index][0] < first + count:
            start, stop, name = tensors[index]
            number = re.search(r"\.experts\.(\d+)\.", name)
            kind = REST if number is None else OWN if int(number[1]) in own else OTHERS
            nbytes[kind] += max(min(stop, first + count) - max(start, first), 0)
            index += 1
    return nbytes
