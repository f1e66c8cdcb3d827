"""How ranks of one node hand pieces to each other: shared memory for the bytes, sockets to say that they are there.

Messages go one way, are placed on arrival by a thread that waits for nothing else, and are answered by one byte-sized
word: the slot is free again. So whoever sends is served sooner or later, in whatever order the ranks work, and nothing
can deadlock. A rank that fails says so; one that dies closes its sockets, which the others notice at once.
"""

from __future__ import annotations

import mmap
import os
import selectors
import socket
import struct
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from distquant.errors import DistquantError, InputError, RankError
from distquant.loading.stream.staging_buffer import LoadState, StagingBuffer
from distquant.parallel.comm import Comm

DATA, ACK, FAILED, CLOSE = range(4)
HEADER = struct.Struct("<BxxxIIIQQQ")
"""Kind, slot, tensor, mask of components, first row, row after the last, offset in the sender's memory."""

AT_ONCE = 256 * HEADER.size
"""Bytes of messages that are taken from a socket at once."""

HELLO = struct.Struct("<IQ")
"""Rank, and bytes of its shared memory."""

CONNECT = 60.0
"""Seconds that a peer of the same node may take to connect."""


@dataclass(frozen=True, slots=True)
class Message:
    """Rows of a tensor that lie in the sender's memory.

    Of `ACK`, `stop` is how many pieces of a slot it is about, `offset` how many bytes were taken of them; of
    `FAILED`, `stop` is how many bytes of text follow.
    """

    kind: int
    slot: int = 0
    tensor: int = 0
    mask: int = 0
    start: int = 0
    stop: int = 0
    offset: int = 0

    def pack(self) -> bytes:
        return HEADER.pack(self.kind, self.slot, self.tensor, self.mask, self.start, self.stop, self.offset)


@dataclass(slots=True)
class Peer:
    """Another rank of the node: its socket, and its staging memory as far as this rank may read it."""

    rank: int
    socket: socket.socket
    memory: Tensor
    lock: threading.Lock
    left: bool = False
    posted: bytearray = field(default_factory=bytearray)
    """What is still to be sent."""
    heard: bytearray = field(default_factory=bytearray)
    """What has come of the next message."""

    def send(self, data: bytes) -> None:
        with self.lock:
            self.socket.sendall(data)


class MessageHandler(Protocol):
    """Who is told what peers say; called on the listening thread."""

    def begin(self) -> None:
        """The thread listens from now on."""

    def copy(self, peer: Peer, message: Message) -> int:
        """Copies what is kept of a piece out of the peer's memory; returns the bytes of it."""

    def arrived(self, message: Message) -> None:
        """The piece is in its place, and its sender knows it."""

    def freed(self, message: Message) -> None:
        """A peer is done with pieces in a slot of this rank's: `stop` of them, of which it took `offset` bytes."""


class Peers:
    """All other ranks of a node. `start` the listening thread, `leave` when all is done, `close` in any case."""

    def __init__(self, rank: int, staging_buffer: StagingBuffer, load_state: LoadState):
        self.rank, self.staging_buffer, self.load_state = rank, staging_buffer, load_state
        self.peers: dict[int, Peer] = {}
        self._thread: threading.Thread | None = None

    # -- meeting ---------------------------------------------------------------------------------------------------

    def connect(self, comm: Comm, node: tuple[int, ...]) -> None:
        """Meets the other ranks of the node. Every rank of the load must call it, also one that is alone on its node.

        Raises:
            InputError: ranks that were planned on one node share no memory.
        """
        if self.staging_buffer.fd is None:
            what = "this system has no memory that processes can share by descriptor (memfd)"
            raise InputError.one("environment", what, "Use Linux, or one process")
        folder = tempfile.mkdtemp(prefix="distquant-")
        path = os.path.join(folder, "s")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(len(node))
            listener.settimeout(CONNECT)
            try:
                paths = comm.collect(path)
                for other in node:
                    if other < self.rank:
                        self._handshake(self._connect(other, paths[other]), other)
                for other in node:
                    if other > self.rank:  # they come in any order
                        self._handshake(listener.accept()[0], other)
            except TimeoutError as error:
                missing = sorted(set(node) - self.peers.keys() - {self.rank})
                raise RankError(missing[0], f"did not connect to rank {self.rank} within {CONNECT:g} s") from error
            finally:
                os.unlink(path)
                os.rmdir(folder)

    def _connect(self, other: int, path: str) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(CONNECT)
        try:
            connection.connect(path)
        except (FileNotFoundError, ConnectionError, PermissionError) as error:
            connection.close()
            what = f"ranks {other} and {self.rank} are planned on one node, but share no memory ({error.strerror})"
            raise InputError.one("plan", what, "Plan again with the number of ranks that share a node") from error
        return connection

    def _handshake(self, connection: socket.socket, other: int) -> None:
        """Exchanges ranks and shared memory; `other` is who that may be."""
        assert self.staging_buffer.fd is not None
        connection.settimeout(CONNECT)
        data = b""
        fds: list[int] = []
        with suppress(ConnectionError):
            socket.send_fds(
                connection, [HELLO.pack(self.rank, self.staging_buffer.memory.numel())], [self.staging_buffer.fd]
            )
            data, fds, _, _ = socket.recv_fds(connection, HELLO.size, 1)
        if len(data) != HELLO.size:
            connection.close()
            raise RankError(other, "ended while ranks were meeting")
        rank, size = HELLO.unpack(data)
        shared = mmap.mmap(fds[0], size)
        os.close(fds[0])
        connection.settimeout(None)
        self.peers[rank] = Peer(rank, connection, torch.frombuffer(shared, dtype=torch.uint8), threading.Lock())

    # -- talking ---------------------------------------------------------------------------------------------------

    def start(self, handler: MessageHandler) -> None:
        """Listens from now on."""
        if self.peers:
            self._thread = threading.Thread(target=self._listen, args=(handler,), name="distquant-peers", daemon=True)
            self._thread.start()

    def send(self, rank: int, message: Message) -> None:
        """Sends a message now, after all that were posted."""
        self.post(rank, message)
        self._send_posted(self.peers[rank])

    def post(self, rank: int, message: Message) -> None:
        """Keeps a message until `flush`; messages to a rank arrive in the order in which they were posted."""
        self.peers[rank].posted += message.pack()

    def flush(self) -> None:
        """Sends what was posted."""
        for peer in self.peers.values():
            if peer.posted:
                self._send_posted(peer)

    def _send_posted(self, peer: Peer) -> None:
        data = bytes(peer.posted)
        peer.posted.clear()
        try:
            peer.send(data)
        except OSError as error:
            with self.load_state.watch:  # what the peer said before it left is still to be read
                self.load_state.watch.wait_for(
                    lambda: self.load_state.failure is not None or self.load_state.stopped, 5.0
                )
                failure = self.load_state.failure
            raise failure or RankError(peer.rank, "ended during the load") from error

    def leave(self) -> None:
        """Says that this rank has sent all it had to, and waits until the others have said so."""
        for peer in self.peers.values():
            self.send(peer.rank, Message(CLOSE))

        def late() -> RankError:
            rank = next(peer.rank for peer in self.peers.values() if not peer.left)
            return RankError(rank, f"was not done {self.load_state.timeout:g} s after rank {self.rank}")

        with self.load_state.watch:
            self.load_state.wait(lambda: all(peer.left for peer in self.peers.values()), late)

    def close(self, failure: BaseException | None = None, until: float | None = None) -> bool:
        """Ends the thread and the connections; on a failure tells the others what it was.

        Returns:
            Whether the thread has ended by a time (`time.monotonic`; None: no limit). If not, it keeps what it uses.
        """
        text = str(failure) if isinstance(failure, DistquantError) else f"{type(failure).__name__}: {failure}"
        for peer in self.peers.values():
            if failure is not None:
                said = text.encode()
                with suppress(OSError):
                    peer.socket.settimeout(1.0)  # a peer that does not read must not keep this one
                    peer.send(Message(FAILED, stop=len(said)).pack() + said)
            with suppress(OSError):
                peer.socket.shutdown(socket.SHUT_RDWR)
        if self._thread is not None:
            self._thread.join(None if until is None else max(until - time.monotonic(), 0))
            if self._thread.is_alive():
                return False
        for peer in self.peers.values():
            peer.socket.close()
        self.peers.clear()
        return True

    # -- listening -------------------------------------------------------------------------------------------------

    def _listen(self, handler: MessageHandler) -> None:
        handler.begin()
        with selectors.DefaultSelector() as selector:
            for peer in self.peers.values():
                selector.register(peer.socket, selectors.EVENT_READ, peer)
            while selector.get_map():
                for key, _ in selector.select():
                    peer = key.data
                    try:
                        going_on = self._receive(peer, handler)
                    except BaseException as error:
                        self.load_state.fail(error)
                        return
                    if not going_on:
                        selector.unregister(peer.socket)

    def _receive(self, peer: Peer, handler: MessageHandler) -> bool:
        """Takes the messages that are there; False when the peer has hung up."""
        try:
            data = peer.socket.recv(AT_ONCE)
        except OSError:
            data = b""
        if not data:
            if not peer.left and not self.load_state.stopped:
                self.load_state.fail(RankError(peer.rank, "ended during the load"))
            return False
        peer.heard += data
        pieces: list[Message] = []
        done: dict[int, list[int]] = {}
        while len(peer.heard) >= HEADER.size:
            message = Message(*HEADER.unpack_from(peer.heard))
            del peer.heard[: HEADER.size]
            if message.kind == DATA:
                counted = done.setdefault(message.slot, [0, 0])
                counted[0] += 1
                counted[1] += handler.copy(peer, message)
                pieces.append(message)
            elif message.kind == ACK:
                handler.freed(message)
            elif message.kind == FAILED:
                self._failed(peer, message.stop)
            else:
                with self.load_state.watch:
                    peer.left = True
                    self.load_state.watch.notify_all()
        if pieces:
            answers = (Message(ACK, slot=slot, stop=n, offset=taken) for slot, (n, taken) in done.items())
            with suppress(OSError):  # it may have left, and needs no slot any more
                peer.send(b"".join(answer.pack() for answer in answers))
            for message in pieces:
                handler.arrived(message)
        return True

    def _failed(self, peer: Peer, length: int) -> None:
        """What a peer says that failed; the last that it says."""
        rest = max(length - len(peer.heard), 0)
        said = bytes(peer.heard[:length]) + (_receive(peer.socket, rest) or b"")
        peer.heard.clear()
        text = said if len(said) == length else b"ended during the load"
        self.load_state.fail(_failure_of(peer.rank, text.decode()))


def _failure_of(rank: int, said: str) -> RankError:
    """A rank that stopped because another failed passes that one's name on."""
    if said.startswith("rank ") and " failed: " in said:
        name, _, rest = said.partition(" failed: ")
        return RankError(int(name.removeprefix("rank ")), rest)
    return RankError(rank, said)


def _receive(connection: socket.socket, count: int) -> bytes | None:
    """Exactly `count` bytes; None where the other side has hung up."""
    data = b""
    while len(data) < count:
        try:
            more = connection.recv(count - len(data))
        except OSError:
            return None
        if not more:
            return None
        data += more
    return data
