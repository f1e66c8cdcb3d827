"""Sending pieces: payloads share slots, a slot is free when all of it has been copied, and messages go together."""

from __future__ import annotations

import threading

import pytest

from distquant.errors import RankError
from distquant.loading.stream.copier import Copier
from distquant.loading.stream.load_state import LoadState
from distquant.loading.stream.messages import DATA, Message
from distquant.loading.stream.sender import TOGETHER, Sender
from distquant.loading.stream.staging_buffer import Slots, StagingBuffer

SIZE = 4096


class RecordingPeers:
    """Records posted messages, and at which flush they are sent."""

    def __init__(self) -> None:
        self.posted: list[tuple[int, int]] = []
        self.sent: list[list[tuple[int, int]]] = []

    def post(self, rank: int, message: Message) -> None:
        self.posted.append((rank, message.tensor))

    def flush(self) -> None:
        if self.posted:
            self.sent.append(self.posted)
            self.posted = []


@pytest.fixture
def parts():
    staging_buffer, load_state, peers = StagingBuffer(5, SIZE), LoadState(0.2), RecordingPeers()
    slots = Slots(range(2, 5), load_state.watch)
    copier = Copier(False, 0, load_state)
    yield Sender(copier, staging_buffer, slots, peers, load_state, lambda: RankError(7, "took nothing")), slots, peers
    staging_buffer.close()


def test_payloads_share_a_slot_until_it_is_full(parts):
    sender, _, _ = parts
    rooms = [sender.room(nbytes, 1) for nbytes in (1024, 2048, 1024, 64, SIZE)]
    slots = [slot for slot, _ in rooms]
    assert slots[0] == slots[1] == slots[2]
    assert len({slots[2], slots[3], slots[4]}) == 3
    inside = [offset - slot * SIZE for slot, offset in rooms]
    assert inside == [0, 1024, 3072, 0, 0]


def test_slot_is_free_when_every_receiver_is_done_with_all_of_it(parts):
    sender, slots, _ = parts
    first, _ = sender.room(SIZE // 2, 2)
    assert sender.room(SIZE // 2, 2)[0] == first
    others = [sender.room(SIZE, 1)[0] for _ in range(2)]
    assert sorted((first, *others)) == [2, 3, 4]
    slots.release(first, 3)
    assert not slots.any_free
    slots.release(first)
    assert slots.any_free
    assert sender.room(SIZE, 1)[0] == first


def test_slot_that_is_being_filled_is_not_free_though_all_of_it_was_taken(parts):
    sender, slots, _ = parts
    slot, _ = sender.room(64, 1)
    slots.release(slot)
    assert sender.room(64, 1) == (slot, slot * SIZE + 64)


def test_before_it_waits_for_a_slot_all_messages_are_sent(parts):
    sender, slots, peers = parts
    for number in range(3):
        slot, offset = sender.room(SIZE, 1)
        sender.send((1,), Message(DATA, slot, number, 1, 0, 1, offset))
    assert peers.sent == []
    later = threading.Timer(0.05, slots.release, (slot,))
    later.start()
    sender.room(SIZE, 1)
    later.join()
    assert peers.sent == [[(1, 0), (1, 1), (1, 2)]]


def test_rank_that_copies_nothing_is_named(parts):
    sender, _, _ = parts
    for _ in range(3):
        sender.room(SIZE, 1)
    with pytest.raises(RankError, match="rank 7 failed: took nothing"):
        sender.room(64, 1)


def test_messages_go_together(parts):
    sender, _, peers = parts
    for number in range(TOGETHER + 1):
        sender.send((1, 3), Message(DATA, tensor=number))
    assert [len(sent) for sent in peers.sent] == [2 * TOGETHER]
    sender.flush()
    assert peers.sent[1] == [(1, TOGETHER), (3, TOGETHER)]
