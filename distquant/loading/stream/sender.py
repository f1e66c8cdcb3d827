"""What a rank hands to others: payloads one behind the other in slots, and the messages about them, several at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from distquant.errors import RankError
from distquant.loading.stream.peers import Message, Peers
from distquant.loading.stream.staging_buffer import LoadState, Slots, StagingBuffer

TOGETHER = 8
"""Messages that are sent at once: whoever gets them is woken once for all."""


class Sender:
    """Gives room for payloads and tells peers of them. Used by one thread, which must `flush` before it waits.

    Args:
        arena: the staging memory.
        slots: of it, those to send from.
        peers: the other ranks.
        board: of the load.
        late: who is to blame when no slot comes back.
    """

    def __init__(
        self,
        staging_buffer: StagingBuffer,
        slots: Slots,
        peers: Peers,
        load_state: LoadState,
        late: Callable[[], RankError],
    ):
        self._arena, self._slots, self._peers, self._board, self._late = staging_buffer, slots, peers, load_state, late
        self._slot, self._filled, self._told = -1, 0, 0

    def room(self, nbytes: int, receivers: int) -> tuple[int, int]:
        """Slot and offset of memory that stays as it is until so many receivers are done with it.

        Waits for ranks that still copy from all slots.
        """
        if self._slot < 0 or self._filled + nbytes > self._arena.slot_bytes:
            self._open()
        self._slots.hold(self._slot, receivers)
        offset = self._slot * self._arena.slot_bytes + self._filled
        self._filled += nbytes
        return self._slot, offset

    def _open(self) -> None:
        """Goes on in the next slot. The one before is free again when its receivers are done with it."""
        if self._slot >= 0:
            self._slots.release(self._slot)
        if not self._slots.any_free:
            self.flush()
        with self._board.watch:
            self._board.wait(lambda: self._slots.any_free, self._late)
            self._slot = self._slots.take(1)
        self._filled = 0

    def tell(self, receivers: Sequence[int], message: Message) -> None:
        """Tells ranks of a piece: together with others, at the latest with the next `flush`."""
        for rank in receivers:
            self._peers.post(rank, message)
        self._told += 1
        if self._told == TOGETHER:
            self.flush()

    def flush(self) -> None:
        """Sends what has been told so far."""
        self._told = 0
        self._peers.flush()
