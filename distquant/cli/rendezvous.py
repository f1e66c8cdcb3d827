"""A rendezvous for ranks that the command line starts: a store that only this machine can reach.

The rendezvous of torch listen on all interfaces, and unpickle anything that is written there. One machine needs
neither: the number of ranks is known, and the ranks need only the store that the launcher serves.
"""

from __future__ import annotations

from typing import Any

from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from distquant.runtime.process_group import LOOPBACK, serve

BACKEND = "distquant-loopback"
"""Name under which torch's launcher finds this rendezvous."""


class LoopbackRendezvous(RendezvousHandler):
    """One launcher, whose store its ranks share; it does not start them a second time."""

    def __init__(self, parameters: RendezvousParameters):
        self._id = parameters.run_id
        self._store = serve(LOOPBACK)

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        return RendezvousInfo(self._store, 0, 1, RendezvousStoreInfo(LOOPBACK, self._store.port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> Any:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._id

    def shutdown(self) -> bool:
        return True


def register() -> str:
    """Makes the rendezvous known to torch's launcher; returns its name."""
    rendezvous_handler_registry.register(BACKEND, LoopbackRendezvous)
    return BACKEND
