"""The store at which ranks meet before they have a process group. It listens at one address only."""

from __future__ import annotations

import datetime
import errno
import os
import socket
from typing import NamedTuple

import torch.distributed as dist

from distquant.errors import InputError, Problems, one_line
from distquant.parallel.comm import DEFAULT_TIMEOUT
from distquant.runtime import addresses


class Meeting(NamedTuple):
    """The store at which ranks meet, and this rank's place among them."""

    store: dist.Store
    rank: int
    world_size: int


def serve(address: str, port: int = 0) -> dist.TCPStore:
    """Opens the store at which ranks meet, at this address only; torch's own would listen at all addresses.

    Args:
        address: name or address of this machine.
        port: 0 = any that is free.

    Raises:
        OSError: nothing can listen there.
    """
    family, *_, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not in use by connections that have ended
        listener.bind(where)
        listener.listen(socket.SOMAXCONN)
        own, port = listener.getsockname()[:2]
        return dist.TCPStore(  # owns the descriptor from now on
            own, port, None, True, wait_for_workers=False, master_listen_fd=listener.detach()
        )


def connect(address: str, port: int, timeout: float = DEFAULT_TIMEOUT) -> dist.TCPStore:
    """Returns the store that another rank serves, once it does."""
    return dist.TCPStore(address, port, None, False, datetime.timedelta(seconds=timeout))


def meet(timeout: float | None = None, interface: str | None = None) -> Meeting:
    """Opens the store at which a launcher's ranks meet: torchrun's, or one of rank 0's own.

    Args:
        timeout: seconds that a rank waits for the others.
        interface: name of the network interface that ranks listen on; None: that which leads to the others.

    Raises:
        InputError: there is no such interface, or ranks cannot meet where the environment says.
    """
    check_launcher()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    seconds = DEFAULT_TIMEOUT if timeout is None else timeout
    place = addresses.place_ranks(interface, host)
    try:
        if by_launcher():
            return Meeting(connect(host, port, seconds), rank, world)
        addresses.check_reached(place, host)
        if rank != 0:
            return Meeting(connect(place, port, seconds), rank, world)
        own = addresses.own(place, interface)
        store = serve(own, port)
        if own != place:
            connect(place, port, seconds)  # the others will: it must lead here
    except (OSError, dist.DistNetworkError) as error:
        raise _unreachable(error) from error
    return Meeting(store, rank, world)


def by_launcher() -> bool:
    """Returns True if the launcher serves the store, as torchrun and `distquant load` do."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)


def _unreachable(error: Exception) -> InputError:
    """Returns the error of ranks that cannot meet where the environment says."""
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    if getattr(error, "errno", None) == errno.EADDRINUSE:
        fix = "Set MASTER_PORT to a free one; torchrun --standalone finds one itself"
        return InputError.one("MASTER_PORT", f"another process listens at {address} already", fix)
    fault = f"rank {os.environ.get('RANK')} cannot meet the others at {address} ({one_line(error)})"
    return InputError.one("MASTER_ADDR", fault, "Set MASTER_ADDR and MASTER_PORT to where rank 0 runs")


def check_launcher() -> None:
    """Checks the variables by which a launcher tells a process its place among several ranks.

    Raises:
        InputError: some are missing, or no numbers.
    """
    problems, needed = Problems(), ("RANK", "WORLD_SIZE", "MASTER_PORT")
    fix = "Start ranks with torchrun, which sets it, or set it as torch.distributed's env:// wants it"
    for name in (*needed, "MASTER_ADDR"):
        value = os.environ.get(name)
        if not value:
            problems.add(name, "not set, and this process is one of several ranks", fix)
        elif name in needed and not value.strip().isdigit():
            problems.add(name, f"{value!r} is not a number", fix)
    problems.raise_if_any()
