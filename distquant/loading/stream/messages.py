"""The messages that ranks of one node exchange, and a peer as it is seen from one rank: socket and shared memory."""

from __future__ import annotations

import socket
import struct
import threading
import time
from dataclasses import dataclass, field

from torch import Tensor

from distquant.errors import DistquantError, RankError, SilentRankError

DATA, ACK, FAILED, CLOSE = range(4)
HEADER = struct.Struct("<BxxxIIIQQQ")
"""The fields of `Message` in their order, little endian."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message. What its fields mean depends on its kind.

    - `DATA`: rows of a tensor are in the sender's memory.
    - `ACK`: pieces in a slot of the receiver's have been copied; `stop` is their number, `offset` the bytes taken.
    - `FAILED`: the load has failed; `tensor` is the rank that failed first, `stop` the bytes of text that follow, and
      `mask` 1 if that rank is silent.
    - `CLOSE`: the sender has sent all it had to.

    Attributes:
        kind: one of the four.
        slot: slot of the memory that the rows are in.
        tensor: index of the task.
        mask: components that are there, bit by bit.
        start, stop: the rows.
        offset: their first byte in the sender's memory.
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
    """True if it has sent all it had to."""
    posted: bytearray = field(default_factory=bytearray)
    """Messages that are still to be sent."""
    received: bytearray = field(default_factory=bytearray)
    """The beginning of the next message."""
    sent: int = 0
    """Pieces that this rank has sent it."""
    answered: int = 0
    """Pieces of these that it has copied."""
    heard: float = field(default_factory=time.monotonic)
    """When its last message came (`time.monotonic`)."""

    def send(self, data: bytes) -> None:
        """Sends all of `data`; threads may send at the same time."""
        with self.lock:
            self.socket.sendall(data)


def failure_message(rank: int, failure: BaseException) -> bytes:
    """Packs `FAILED` and its text. A rank that stops because another failed passes on that rank and its text."""
    if isinstance(failure, RankError):
        rank, text = failure.rank, failure.message
    elif isinstance(failure, DistquantError):
        text = str(failure)
    else:
        text = f"{type(failure).__name__}: {failure}"
    encoded = text.encode()
    silent = int(isinstance(failure, SilentRankError))
    return Message(FAILED, tensor=rank, stop=len(encoded), mask=silent).pack() + encoded
