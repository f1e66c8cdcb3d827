"""Ranks that connect, exchange pieces and leave: over real sockets and shared memory, within one process."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from world import Meeting, ThreadComm, nothing_left_behind

import distquant.loading.stream.handshake as handshake_module
from distquant.errors import InputError, RankError
from distquant.loading.stream.handshake import HELLO, handshake
from distquant.loading.stream.load_state import LoadState
from distquant.loading.stream.messages import ACK, DATA, HEADER, Message, Peer, failure_message
from distquant.loading.stream.peers import Peers
from distquant.loading.stream.staging_buffer import StagingBuffer


@pytest.fixture(autouse=True)
def nothing_left():
    with nothing_left_behind():
        yield


def on_threads(*functions) -> list[object]:
    """Runs functions on threads; returns what each returned or raised."""
    found: list[object] = [None] * len(functions)

    def call(index: int) -> None:
        try:
            found[index] = functions[index]()
        except Exception as error:
            found[index] = error.with_traceback(None)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    return found


class Deaf:
    """Handles no message."""

    def begin(self) -> None: ...

    def copy(self, peer: Peer, message: Message) -> int:
        return 0

    def arrived(self, message: Message) -> None: ...

    def freed(self, message: Message) -> None: ...


class Notes(Deaf):
    """Records the messages that it handles."""

    def __init__(self) -> None:
        self.copied: dict[int, list[int]] = {}
        self.pieces = 0
        self.freed_slots: list[tuple[int, int, int]] = []

    def copy(self, peer: Peer, message: Message) -> int:
        self.copied[peer.rank] = peer.memory[message.offset : message.offset + 8].tolist()
        return 8

    def arrived(self, message: Message) -> None:
        self.pieces += 1

    def freed(self, message: Message) -> None:
        self.freed_slots.append((message.slot, message.stop, message.offset))


def test_piece_is_seen_by_all_and_its_slot_comes_back():
    meeting, count = Meeting(3), 3

    def rank(number: int):
        staging_buffer, load_state = StagingBuffer(2, 4096), LoadState(120)
        peers, notes = Peers(number, staging_buffer, load_state), Notes()
        peers.connect(ThreadComm(number, meeting, 120), (0, 1, 2))
        peers.start(notes)
        staging_buffer.slot(1)[:8] = torch.arange(8, dtype=torch.uint8) + 10 * number
        for other in range(count):
            if other != number:
                peers.send(
                    other, Message(DATA, slot=1, tensor=3, mask=1, start=0, stop=8, offset=staging_buffer.slot_bytes)
                )
        give_up = time.monotonic() + 120
        while (notes.pieces, len(notes.freed_slots)) != (2, 2) and time.monotonic() < give_up:
            time.sleep(0.002)
        peers.leave()
        peers.close()
        staging_buffer.close()
        return notes.copied, notes.freed_slots

    for number, found in enumerate(on_threads(*(lambda n=n: rank(n) for n in range(count)))):
        assert found == (
            {n: [10 * n + i for i in range(8)] for n in range(count) if n != number},
            [(1, 1, 8), (1, 1, 8)],
        )


def test_a_thread_that_hangs_is_left_behind_with_what_it_uses():
    """As one that copies to a device which stands still: the load's timeout holds for it, too."""
    meeting, let_go = Meeting(2), threading.Event()

    class Stuck(Deaf):
        def copy(self, peer: Peer, message: Message) -> int:
            assert let_go.wait(30)
            return int(peer.memory[message.offset])

    def rank(number: int):
        staging_buffer = StagingBuffer(1, 4096)
        peers = Peers(number, staging_buffer, LoadState(20))
        peers.connect(ThreadComm(number, meeting, 20), (0, 1))
        peers.start(Stuck())
        staging_buffer.slot(0)[0] = 7
        peers.send(1 - number, Message(DATA, stop=1))
        meeting.collect(number, None)
        time.sleep(0.2)  # for the thread to begin
        ended = peers.close(None, time.monotonic() + 0.2)
        threads = meeting.collect(number, peers._thread)
        let_go.set()
        for thread in threads:
            thread.join(30)
        staging_buffer.close()
        return ended, peers._thread.is_alive()

    assert on_threads(lambda: rank(0), lambda: rank(1)) == [(False, False), (False, False)]


def test_rank_that_does_not_come_is_named(monkeypatch):
    monkeypatch.setattr(handshake_module, "CONNECT", 0.3)
    staging_buffer = StagingBuffer(1, 10)
    peers = Peers(0, staging_buffer, LoadState(5))
    with pytest.raises(RankError, match=r"rank 1 failed: did not connect to rank 0 within 0\.3 s"):
        peers.connect(ThreadComm(0, Meeting(1), 5), (0, 1))
    peers.close()
    staging_buffer.close()


def test_ranks_that_share_no_folder_are_an_input_error():
    class Elsewhere:
        def collect(self, value):
            return ["/nowhere/at/all", value]

    staging_buffer = StagingBuffer(1, 10)
    peers = Peers(1, staging_buffer, LoadState(5))
    with pytest.raises(InputError, match="ranks 0 and 1 are planned on one node, but share no memory"):
        peers.connect(Elsewhere(), (0, 1))
    peers.close()
    staging_buffer.close()


@contextmanager
def pair(rank: int, load_state: LoadState) -> Iterator[tuple[Peers, socket.socket]]:
    """Rank 1 with one peer, and that peer's end of the socket."""
    ours, theirs = socket.socketpair()
    peers = Peers(1, StagingBuffer(1, 10), load_state)
    peers.peers[rank] = Peer(rank, ours, torch.empty(0, dtype=torch.uint8), threading.Lock())
    try:
        yield peers, theirs
    finally:
        theirs.close()
        peers.close()
        peers.staging_buffer.close()


def in_the_end(condition) -> bool:
    give_up = time.monotonic() + 120
    while not condition() and time.monotonic() < give_up:
        time.sleep(0.002)
    return condition()


def test_pieces_that_come_together_are_answered_together():
    """One answer for each slot: how many pieces of it, and how many bytes were taken."""
    with pair(0, LoadState(120)) as (peers, theirs):
        notes = Notes()
        pieces = [Message(DATA, slot=slot, start=i) for i, slot in enumerate((2, 2, 3, 2))]
        theirs.sendall(b"".join(piece.pack() for piece in pieces))
        peers.start(notes)
        assert in_the_end(lambda: notes.pieces == 4)
        answers = theirs.recv(1000)
        found = [Message(*HEADER.unpack_from(answers, at)) for at in range(0, len(answers), HEADER.size)]
        assert [(m.kind, m.slot, m.stop, m.offset) for m in found] == [(ACK, 2, 3, 24), (ACK, 3, 1, 8)]


def test_messages_may_come_byte_by_byte():
    load_state = LoadState(120)
    with pair(0, load_state) as (peers, theirs):
        notes = Notes()
        peers.start(notes)
        for byte in Message(DATA, slot=1).pack() + failure_message(0, OSError("no disk")):
            theirs.sendall(bytes([byte]))
            time.sleep(0.0005)
        assert in_the_end(lambda: load_state.failure is not None)
        assert str(load_state.failure) == "rank 0 failed: OSError: no disk"
        assert notes.pieces == 1


def test_posted_messages_are_sent_by_flush_and_before_any_that_follow():
    with pair(0, LoadState(120)) as (peers, theirs):
        theirs.settimeout(120)
        peers.post(0, Message(DATA, tensor=1))
        peers.post(0, Message(DATA, tensor=2))
        peers.flush()
        peers.flush()
        assert len(theirs.recv(1000)) == 2 * HEADER.size
        peers.post(0, Message(DATA, tensor=3))
        peers.send(0, Message(DATA, tensor=4))
        sent = theirs.recv(1000)
        assert [Message(*HEADER.unpack_from(sent, at)).tensor for at in (0, HEADER.size)] == [3, 4]


def test_rank_that_dies_is_named():
    load_state = LoadState(120)
    with pair(4, load_state) as (peers, theirs):
        peers.start(Deaf())
        theirs.close()
        with pytest.raises(RankError, match="rank 4 failed: ended during the load"), load_state.watch:
            load_state.wait(lambda: False, TimeoutError)


def test_failure_carries_the_rank_that_failed_first():
    """Rank 0 stops because rank 2 failed; so does any rank that receives it from rank 0."""
    load_state = LoadState(120)
    with pair(0, load_state) as (peers, theirs):
        peers.start(Deaf())
        theirs.sendall(failure_message(0, RankError(2, "ValueError: boom")))
        with pytest.raises(RankError, match="rank 2 failed: ValueError: boom"), load_state.watch:
            load_state.wait(lambda: False, TimeoutError)


def test_rank_that_left_is_not_blamed_for_the_error_it_sent(monkeypatch):
    """It sent its error and closed its socket. A send fails here before the listening thread has read the error."""
    receive = Peers._receive
    monkeypatch.setattr(Peers, "_receive", lambda *arguments: time.sleep(0.2) or receive(*arguments))
    load_state = LoadState(120)
    with pair(0, load_state) as (peers, theirs):
        peers.start(Deaf())
        theirs.sendall(failure_message(0, RankError(2, "ValueError: boom")))
        theirs.shutdown(socket.SHUT_RDWR)
        with pytest.raises(RankError, match="rank 2 failed: ValueError: boom"):
            peers.send(0, Message(DATA))


def test_rank_that_ends_during_the_handshake_is_named():
    """The one that ended, not the one that noticed; and its socket is closed."""
    ours, theirs = socket.socketpair()
    staging_buffer = StagingBuffer(1, 10)
    theirs.sendall(HELLO.pack(0, 4096)[:3])
    theirs.shutdown(socket.SHUT_WR)
    try:
        with pytest.raises(RankError) as caught:
            handshake(ours, 1, staging_buffer, 0)
        assert caught.value.rank == 0
        assert ours.fileno() == -1
    finally:
        ours.close()
        theirs.close()
        staging_buffer.close()


def test_handshakes_leave_no_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    meeting = Meeting(2)

    def rank(number: int):
        staging_buffer, load_state = StagingBuffer(1, 10), LoadState(120)
        peers = Peers(number, staging_buffer, load_state)
        peers.connect(ThreadComm(number, meeting, 120), (0, 1))
        peers.start(Deaf())
        peers.leave()
        peers.close()
        staging_buffer.close()

    assert on_threads(lambda: rank(0), lambda: rank(1)) == [None, None]
    assert os.listdir(tmp_path) == []
