"""Which bytes of a mixture of experts each rank reads, seen where the loader asks the system for them.

The loader's own open files write down every read (file, first byte, bytes), and the reads are laid over the tensors
of the checkpoint's headers. Checkpoints have one tensor for each expert's projection, as hubs have Mixtral's.
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
    """A load that tells the bytes of its reads by kind, too."""
    own, there = mine(path, contestant, rank), places(path)

    def recorded_run() -> Measured:
        with recorded() as reads:
            found = run()
        return replace(found, reads=by_kind(reads, there, own))

    return recorded_run


@contextmanager
def recorded() -> Iterator[list[Read]]:
    """The list that the loader's reads go to meanwhile."""
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
    """Numbers of the experts that the plan gives to a rank."""
    import distquant as dq

    plan = dq.plan(path, quantization_config=contestant.quant, mesh=contestant.mesh, dtype="bfloat16")
    dealt = plan.partitions[next(iter(plan.experts.values())).dealt]
    ((first, last),) = dealt.segments(plan.mesh.coordinates(rank)["ep"])
    return range(first, last)


def by_kind(reads: Iterable[Read], there: dict[str, list[tuple[int, int, str]]], own: range) -> dict[str, int]:
    """Bytes of tensors that were read, those that were read twice counted twice.

    Args:
        reads: of a load.
        there: the tensors' places (`checkpoints.places`).
        own: numbers of the rank's experts.
    """
    found = dict.fromkeys(KINDS, 0)
    for file, first, count in reads:
        tensors = there[file]
        at = max(bisect_right(tensors, first, key=lambda tensor: tensor[0]) - 1, 0)
        while at < len(tensors) and tensors[at][0] < first + count:
            start, stop, name = tensors[at]
            number = re.search(r"\.experts\.(\d+)\.", name)
            kind = REST if number is None else OWN if int(number[1]) in own else OTHERS
            found[kind] += max(min(stop, first + count) - max(start, first), 0)
            at += 1
    return found
