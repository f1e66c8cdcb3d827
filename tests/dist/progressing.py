"""What ranks do in tests of the progress that they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.distributed as dist

from distquant.options import LoadProgress
from distquant.runtime.shared_progress import SharedProgress


class Viewer:
    """Keeps the source that it is to follow."""

    source: Callable[[], Sequence[LoadProgress]]

    def __call__(self, ranks: Sequence[LoadProgress]) -> None:
        raise AssertionError("nobody tells, all are asked")

    def follow(self, source: Callable[[], Sequence[LoadProgress]]) -> None:
        self.source = source


def share(seen: list[list[tuple[int, int, str]]]) -> list[list[LoadProgress]]:
    """Loads as often as `seen` has entries; each rank is as far as its entry says. Returns what rank 0 sees, each time
    before and after."""
    found, rank = [], dist.get_rank()
    for each in seen:
        viewer = Viewer() if rank == 0 else None
        progress = SharedProgress(viewer)
        dist.barrier()
        if viewer is not None:
            found.append(list(viewer.source()))
        dist.barrier()
        progress(LoadProgress(*each[rank]))
        dist.barrier()
        if viewer is not None:
            found.append(list(viewer.source()))
    return found


def share_with_nobody() -> bool:
    """Returns True if this rank writes its progress, though rank 0 shows nothing."""
    progress = SharedProgress(None)
    dist.barrier()
    progress(LoadProgress(1, 2, "read"))
    dist.barrier()
    return bool(progress._store.check([str(dist.get_rank())]))
