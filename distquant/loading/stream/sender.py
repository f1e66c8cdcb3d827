"""Sends pieces to other ranks: payloads one behind the other in slots, and the messages about them, several at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch

from distquant.errors import RankError
from distquant.loading.stream.copier import Copier
from distquant.loading.stream.load_state import LoadState
from distquant.loading.stream.messages import Message
from distquant.loading.stream.peers import Peers
from distquant.loading.stream.staging_buffer import Slots, StagingBuffer

TOGETHER = 8
"""Messages that are sent at once: their receiver is woken once for all."""


class Sender:
    """Gives room for payloads and sends messages about them. One thread uses it, and must `flush` before it waits.

    A payload that comes from a device is announced when it is there; meanwhile the thread goes on.

    Args:
        copier: copies payloads from devices.
        staging_buffer: the staging memory.
        slots: its slots to send from.
        peers: the other ranks.
        load_state: of the load.
        late: returns the error to raise when no slot comes back.
    """

    def __init__(
        self,
        copier: Copier,
        staging_buffer: StagingBuffer,
        slots: Slots,
        peers: Peers,
        load_state: LoadState,
        late: Callable[[], RankError],
    ):
        self._copier, self._staging_buffer, self._slots, self._peers = copier, staging_buffer, slots, peers
        self._load_state, self._late = load_state, late
        self._slot, self._filled, self._posted = -1, 0, 0
        self._coming: deque[tuple[torch.Event, torch.device, Callable[[], None]]] = deque()
        """Payloads that are on their way from a device, with what to do when they are there."""

    def room(self, nbytes: int, receivers: int) -> tuple[int, int]:
        """Returns slot and offset of memory that stays reserved until so many receivers are done with it.

        Waits, where all slots are in use, for ranks that still copy from them.
        """
        if self._slot < 0 or self._filled + nbytes > self._staging_buffer.slot_bytes:
            self._next_slot()
        self._slots.hold(self._slot, receivers)
        offset = self._slot * self._staging_buffer.slot_bytes + self._filled
        self._filled += nbytes
        return self._slot, offset

    def _next_slot(self) -> None:
        """Goes on in the next slot. The one before is free again when its receivers are done with it."""
        if self._slot >= 0:
            self._slots.release(self._slot)
        if not self._slots.any_free:
            # Receivers free only slots that they have heard of: a message that waits here would be waited for forever.
            self.flush()
        with self._load_state.watch:
            self._load_state.wait(lambda: self._slots.any_free, self._late, lambda: "waiting for a slot")
            self._slot = self._slots.take(1)
        self._filled = 0

    def send(self, receivers: Sequence[int], message: Message) -> None:
        """Sends a message to ranks: together with others, at the latest with the next `flush`."""
        for rank in receivers:
            self._peers.post(rank, message)
        self._posted += 1
        if self._posted == TOGETHER:
            self._send_posted()

    def when_written(self, event: torch.Event | None, device: torch.device, then: Callable[[], None]) -> None:
        """Calls `then`, which may send, when copies from a device are done (None: at once); at the latest in `flush`.

        Payloads are announced in the order in which their copies began.
        """
        if event is None:
            then()
        else:
            self._coming.append((event, device, then))

    def push(self) -> None:
        """Sends all messages whose payload is there, without waiting for others."""
        while self._coming and self._coming[0][0].query():
            self._coming.popleft()[2]()
        self._send_posted()

    def flush(self) -> None:
        """Sends all messages that were kept back, when their payloads are there."""
        while self._coming:
            event, device, _ = self._coming[0]
            self._copier.await_written(event, device)
            self._coming.popleft()[2]()
        self._send_posted()

    def _send_posted(self) -> None:
        self._posted = 0
        self._peers.flush()
