"""Exchanges pieces between the ranks of one node: shared memory for the bytes, sockets for the messages about them.

Messages go one way. A thread that waits for nothing else copies each piece on arrival, and answers with one short
message: the slot is free again. So every sender is served sooner or later, in whatever order the ranks work, and
nothing can deadlock. A rank that fails sends its error; one that dies closes its sockets, which the others notice at
once.
"""

from __future__ import annotations

import selectors
import socket
import threading
import time
from contextlib import suppress
from typing import Protocol

from distquant.errors import RankError, SilentRankError
from distquant.loading.stream.handshake import connections
from distquant.loading.stream.load_state import LoadState
from distquant.loading.stream.messages import ACK, CLOSE, DATA, FAILED, HEADER, Message, Peer, failure_message
from distquant.loading.stream.staging_buffer import StagingBuffer
from distquant.parallel.comm import MISSED, Comm
from distquant.threads import start_thread

AT_ONCE = 256 * HEADER.size
"""Bytes of messages that are taken from a socket at once."""

LAST_WORDS = 5.0
"""Seconds that a rank waits for the error of a peer that no longer receives."""

UNREAD = 1.0
"""Seconds that a rank tries to send its own error to a peer that does not read."""


class MessageHandler(Protocol):
    """Handles messages of peers; called on the listening thread."""

    def begin(self) -> None:
        """Prepares the thread, once, before it listens."""

    def copy(self, peer: Peer, message: Message) -> int:
        """Copies the part of a piece that this rank keeps out of the peer's memory; returns its bytes."""

    def arrived(self, message: Message) -> None:
        """Counts a piece that has been copied, after its sender has the answer."""

    def freed(self, message: Message) -> None:
        """Releases pieces in a slot of this rank's: `stop` of them, of which a peer took `offset` bytes."""


class Peers:
    """All other ranks of a node. `start` the listening thread, `leave` when all is done, `close` in any case."""

    def __init__(self, rank: int, staging_buffer: StagingBuffer, load_state: LoadState):
        self.rank, self.staging_buffer, self.load_state = rank, staging_buffer, load_state
        self.peers: dict[int, Peer] = {}
        self._thread: threading.Thread | None = None

    def connect(self, comm: Comm, node: tuple[int, ...]) -> None:
        """Connects to the other ranks of the node. Every rank of the load must call it, also one that is alone there.

        Raises:
            InputError: ranks that were planned on one node share no memory.
            RankError: a rank did not connect, or ended meanwhile.
        """
        for peer in connections(self.rank, self.staging_buffer, comm, node, self.load_state):
            self.peers[peer.rank] = peer

    # -- sending ---------------------------------------------------------------------------------------------------

    def start(self, handler: MessageHandler) -> None:
        """Starts the listening thread."""
        if self.peers:
            self._thread = threading.Thread(target=self._listen, args=(handler,), name="distquant-peers", daemon=True)
            start_thread(self._thread)

    def send(self, rank: int, message: Message) -> None:
        """Sends a message now, after all that were posted."""
        self.post(rank, message)
        self._send_posted(self.peers[rank])

    def post(self, rank: int, message: Message) -> None:
        """Keeps a message until `flush`; messages to a rank arrive in the order in which they were posted."""
        peer = self.peers[rank]
        peer.posted += message.pack()
        peer.sent += message.kind == DATA

    def flush(self) -> None:
        """Sends all messages that were posted."""
        for peer in self.peers.values():
            if peer.posted:
                self._send_posted(peer)

    def _send_posted(self, peer: Peer) -> None:
        data = bytes(peer.posted)
        peer.posted.clear()
        try:
            peer.send(data)
        except TimeoutError as error:
            raise self.load_state.silent(MISSED) or self._late("has read no message") from error
        except OSError as error:
            # A peer that fails sends its error before it closes. The listening thread may not have read it yet, and
            # that error names the cause, which this one does not.
            state = self.load_state
            with state.watch:
                state.watch.wait_for(lambda: state.failure is not None or state.stopped, LAST_WORDS)
                failure = state.failure
            raise failure or _died(peer) from error

    def no_slot(self) -> RankError:
        """Returns the error for a slot that does not come back: it names the rank that copies from it for longest."""
        return self._late("has not copied from the load buffer")

    def _late(self, fault: str) -> RankError:
        waiting = f"{self.load_state.timeout:g} s, and rank {self.rank} is waiting for a slot"
        owing = [peer for peer in self.peers.values() if peer.sent > peer.answered] or list(self.peers.values())
        peer = min(owing, key=lambda each: each.heard)
        return RankError(peer.rank, f"{fault} of rank {self.rank} for {waiting}")

    def leave(self) -> None:
        """Sends `CLOSE` to all peers, and waits for theirs: until then they may copy from this rank's memory."""
        for peer in self.peers.values():
            self.send(peer.rank, Message(CLOSE))

        def late() -> RankError:
            rank = next(peer.rank for peer in self.peers.values() if not peer.left)
            return RankError(rank, f"was not done {self.load_state.timeout:g} s after rank {self.rank}")

        with self.load_state.watch:
            self.load_state.wait(
                lambda: all(peer.left for peer in self.peers.values()),
                late,
                lambda: "waiting for the others to end",
            )

    def close(self, failure: BaseException | None = None, until: float | None = None) -> bool:
        """Ends the thread and the connections; sends a failure to the others first.

        Returns:
            True if the thread has ended by a time (`time.monotonic`; None: no limit). If not, its sockets stay open.
        """
        for peer in self.peers.values():
            if failure is not None:
                with suppress(OSError):
                    peer.socket.settimeout(UNREAD)
                    peer.send(failure_message(self.rank, failure))
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
        """Handles the messages that are there; returns False when the peer has closed its socket."""
        try:
            data = peer.socket.recv(AT_ONCE)
        except OSError:
            data = b""
        if not data:
            if not peer.left and not self.load_state.stopped:
                self.load_state.fail(_died(peer))
            return False
        peer.received += data
        peer.heard = time.monotonic()
        pieces: list[Message] = []
        copied: dict[int, list[int]] = {}  # slot -> pieces that were copied from it, and bytes that were kept of them
        while len(peer.received) >= HEADER.size:
            message = Message(*HEADER.unpack_from(peer.received))
            del peer.received[: HEADER.size]
            if message.kind == DATA:
                counts = copied.setdefault(message.slot, [0, 0])
                counts[0] += 1
                counts[1] += handler.copy(peer, message)
                pieces.append(message)
            elif message.kind == ACK:
                peer.answered += message.stop
                handler.freed(message)
            elif message.kind == FAILED:
                self._failed(peer, message)
            else:
                with self.load_state.watch:
                    peer.left = True
                    self.load_state.watch.notify_all()
        if pieces:
            # One answer for each slot and not for each piece: every message wakes the peer's thread.
            answers = (Message(ACK, slot=slot, stop=n, offset=taken) for slot, (n, taken) in copied.items())
            with suppress(OSError):  # it may have left, and needs no slot any more
                peer.send(b"".join(answer.pack() for answer in answers))
            # Answer first, count then: the last count may end the load here, and close the socket under the answer.
            for message in pieces:
                handler.arrived(message)
        return True

    def _failed(self, peer: Peer, message: Message) -> None:
        """Receives the error of a peer, which is the last that it sends."""
        length = message.stop
        rest = max(length - len(peer.received), 0)
        text = bytes(peer.received[:length]) + (_receive_exactly(peer.socket, rest) or b"")
        peer.received.clear()
        complete = len(text) == length
        kind = SilentRankError if message.mask else RankError
        self.load_state.fail(kind(message.tensor, text.decode()) if complete else _died(peer))


def _died(peer: Peer) -> RankError:
    return RankError(peer.rank, "ended during the load")


def _receive_exactly(connection: socket.socket, count: int) -> bytes | None:
    """Receives `count` bytes; returns None where the other side has closed its socket."""
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
