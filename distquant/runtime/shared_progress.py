"""Progress of ranks that share nothing but a store: each writes its own there, and rank 0 shows them all."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_group, _get_default_store

from distquant.options import LoadProgress
from distquant.progress import Viewer

EVERY = 0.5
"""Seconds between two messages of a rank."""

_loads: WeakKeyDictionary[dist.ProcessGroup, Iterator[int]] = WeakKeyDictionary()
"""Numbers the loads in a process group; its ranks load in the same order, whatever each did in an earlier group."""


class SharedProgress:
    """Takes a rank's progress as rows arrive. All ranks of the default process group make one for each load.

    Nothing is written unless rank 0 shows it.

    Args:
        viewer: on rank 0, shows the progress of all ranks; None elsewhere, and where nothing is shown.
    """

    def __init__(self, viewer: Viewer | None):
        self.rank, self._world = dist.get_rank(), dist.get_world_size()
        number = next(_loads.setdefault(_get_default_group(), itertools.count()))
        self._store = dist.PrefixStore(f"distquant/progress/{number}", _get_default_store())
        self._last, self._shown = 0.0, viewer is not None
        self._asked = self._shown
        if viewer is not None:
            # Before the others ask: they load after a collective that this rank takes part in.
            for rank in range(self._world):
                self._store.set(str(rank), json.dumps(LoadProgress()))
            viewer.follow(self.everyone)

    def __call__(self, seen: LoadProgress) -> None:
        now = time.monotonic()
        if now - self._last < EVERY and seen.done < seen.total:
            return
        self._last = now
        if not self._asked:
            self._asked, self._shown = True, self._store.check(["0"])
        if not self._shown:
            return
        self._store.set(str(self.rank), json.dumps(seen))

    def everyone(self) -> list[LoadProgress]:
        """Returns the progress of all ranks, as far as they have told."""
        texts = self._store.multi_get([str(rank) for rank in range(self._world)])
        return [LoadProgress(*json.loads(text)) for text in texts]
