"""Connects the ranks of a node: each pair gets a socket, and each rank a view of the others' staging memory."""

from __future__ import annotations

import mmap
import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from distquant.errors import InputError, RankError
from distquant.left_behind import made_folder
from distquant.loading.stream.load_state import LoadState
from distquant.loading.stream.messages import Peer
from distquant.loading.stream.staging_buffer import StagingBuffer
from distquant.parallel.comm import MISSED, Comm

HELLO = struct.Struct("<IQ")
"""Rank, and bytes of its shared memory."""

SOCKET = "s"
"""Name of a rank's socket in its temporary folder."""

CONNECT = 60.0
"""Seconds that a peer of the same node may take to connect."""


def connections(
    rank: int, staging_buffer: StagingBuffer, comm: Comm, node: tuple[int, ...], load_state: LoadState
) -> Iterator[Peer]:
    """Yields the other ranks of a node as they connect. Every rank of the load must call it, also one that is alone.

    Raises:
        InputError: ranks that were planned on one node share no memory.
        RankError: a rank did not connect, or ended meanwhile.
    """
    if staging_buffer.fd is None:
        problem = "this system has no memory that processes can share by descriptor (memfd)"
        raise InputError.one("environment", problem, "Use Linux, or one process")
    missing = set(node) - {rank}
    patience = min(CONNECT, load_state.timeout)
    with made_folder() as folder, socket.socket(socket.AF_UNIX) as listener:
        with _short(folder) as path:
            listener.bind(path)
        listener.listen(len(node))
        listener.settimeout(patience)
        try:
            # All ranks listen before any connects, because `collect` returns only when every rank has called it.
            folders = comm.collect(folder)
            # Each pair needs one socket: the higher rank connects, the lower accepts, so nobody waits in a circle.
            for other in node:
                if other < rank:
                    connection = _connect(rank, other, folders[other], patience)
                    peer = handshake(connection, rank, staging_buffer, other, load_state.timeout)
                    missing.discard(peer.rank)
                    yield peer
            for other in node:
                if other > rank:
                    # They come in any order: `other` is named only if one ends before it has sent its own rank.
                    peer = handshake(listener.accept()[0], rank, staging_buffer, other, load_state.timeout)
                    missing.discard(peer.rank)
                    yield peer
        except TimeoutError as error:
            late = RankError(min(missing), f"did not connect to rank {rank} within {patience:g} s")
            raise load_state.silent(MISSED) or late from error


@contextmanager
def _short(folder: str) -> Iterator[str]:
    """Yields a path of the socket in a folder. A socket's path has 107 bytes at most, and TMPDIR may be longer."""
    opened = os.open(folder, os.O_PATH)
    try:
        yield f"/proc/self/fd/{opened}/{SOCKET}"
    finally:
        os.close(opened)


def _connect(rank: int, other: int, folder: str, patience: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(patience)
    try:
        with _short(folder) as path:
            connection.connect(path)
    except (FileNotFoundError, ConnectionError, PermissionError) as error:
        # The path exists on this machine only: where it cannot be reached, the ranks are on different machines.
        connection.close()
        problem = f"ranks {other} and {rank} are planned on one node, but share no memory ({error.strerror})"
        raise InputError.one("plan", problem, "Plan again with the number of ranks that share a node") from error
    return connection


def handshake(
    connection: socket.socket, rank: int, staging_buffer: StagingBuffer, other: int, timeout: float = CONNECT
) -> Peer:
    """Exchanges ranks and shared memory over a new connection.

    Args:
        connection: to the peer.
        rank: this rank.
        staging_buffer: this rank's, which the peer may read from now on.
        other: rank to name if the peer ends before it has sent its own.
        timeout: seconds that a message to the peer may take.
    """
    assert staging_buffer.fd is not None
    connection.settimeout(min(CONNECT, timeout))
    data = b""
    fds: list[int] = []
    # A peer that has ended resets the connection: that shows as a short greeting, and is reported as one error below.
    with suppress(ConnectionError):
        # The descriptor travels with the greeting, so the memory needs no name that could outlive the ranks.
        socket.send_fds(connection, [HELLO.pack(rank, staging_buffer.memory.numel())], [staging_buffer.fd])
        data, fds, _, _ = socket.recv_fds(connection, HELLO.size, 1)
    if len(data) != HELLO.size:
        connection.close()
        raise RankError(other, "ended during the handshake")
    peer_rank, size = HELLO.unpack(data)
    shared = mmap.mmap(fds[0], size)
    os.close(fds[0])  # the mapping keeps the memory
    connection.settimeout(timeout)  # a peer that is stopped reads nothing
    return Peer(peer_rank, connection, torch.frombuffer(shared, dtype=torch.uint8), threading.Lock())
