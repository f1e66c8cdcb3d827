"""Reads ahead of the consumer, several reads in flight, into slots of the staging memory and never further.

Threads take the next batch and its slot in order, read without holding Python's lock, and the consumer gets the batches
in that order. No read begins without a free slot, so a slow consumer holds the reads back. Without threads the consumer
reads for itself, one batch after the other: right where a thread would only take turns with it on the same core.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

from distquant.errors import RankError
from distquant.loading.stream.files import Files, ReadError
from distquant.loading.stream.load_state import LoadState
from distquant.loading.stream.stage_timer import StageTimer
from distquant.loading.stream.staging_buffer import Slots, StagingBuffer
from distquant.loading.stream.tasks import Chunk
from distquant.planning.row_map import RowRange
from distquant.threads import start_thread

AHEAD = 8
"""Batches that may wait for the consumer, including those that were read straight into place."""


class Reader:
    """Iterates over filled batches. `stop` the load state and `join` before the files are closed.

    Args:
        files: to read from.
        staging_buffer: the staging memory.
        slots: its slots to read into.
        load_state: of the load.
        timer: of the stages.
        batches: chunks that are read at once, in order.
        threads: reads in flight; 0 = the consumer reads.
        no_slot: returns the error to raise when no slot comes back.
    """

    def __init__(
        self,
        files: Files,
        staging_buffer: StagingBuffer,
        slots: Slots,
        load_state: LoadState,
        timer: StageTimer,
        batches: Iterator[list[Chunk]],
        threads: int,
        no_slot: Callable[[], RankError],
    ):
        self._files, self._staging_buffer, self._slots = files, staging_buffer, slots
        self._load_state, self._timer, self._batches, self._no_slot = load_state, timer, batches, no_slot
        self._order = threading.Lock()
        """Held by the thread that takes the next batch."""
        self._begun = self._taken = 0
        """Batches whose read has begun, and batches that the consumer has got."""
        self._ended = False
        """True if the last batch has begun."""
        self._reading: dict[int, Chunk] = {}
        """First chunk of each batch that a thread is reading."""
        self._ready: dict[int, list[Chunk]] = {}
        """Batches that wait for the consumer."""
        self._threads = [
            threading.Thread(target=self._work, name=f"distquant-reader-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            start_thread(thread)

    def __iter__(self) -> Iterator[list[Chunk]]:
        return self._read_ahead() if self._threads else self._read_here()

    def _read_here(self) -> Iterator[list[Chunk]]:
        while begun := self._begin():
            number, batch = begun
            start = time.perf_counter()
            self._read(batch)
            self._timer.waited += time.perf_counter() - start
            self._taken = number + 1
            yield batch

    def _read_ahead(self) -> Iterator[list[Chunk]]:
        while True:
            start = time.perf_counter()
            with self._load_state.watch:
                if not self._load_state.wait(self._next_is_ready, self._late, self._doing):
                    return
                if self._taken not in self._ready:
                    return
                batch = self._ready.pop(self._taken)
                self._taken += 1
                self._load_state.watch.notify_all()
            self._timer.waited += time.perf_counter() - start
            yield batch

    @property
    def ready(self) -> bool:
        """True if the next batch is there, or if the consumer itself reads it."""
        return not self._threads or self._taken in self._ready

    def join(self, until: float | None = None) -> bool:
        """Waits for the threads; returns False if a read has not come back by a time (`time.monotonic`).

        Its memory must not vanish then.
        """
        for thread in self._threads:
            thread.join(None if until is None else max(until - time.monotonic(), 0))
        return not any(thread.is_alive() for thread in self._threads)

    def _next_is_ready(self) -> bool:
        return self._taken in self._ready or (self._ended and self._taken == self._begun)

    def _late(self) -> ReadError | RankError:
        where = self._next_read()
        if where is None:
            return self._no_slot()
        return ReadError(f"{where}: the read has not come back for {self._load_state.timeout:g} s")

    def _doing(self) -> str:
        where = self._next_read()
        return "waiting for a slot" if where is None else f"reading {where}"

    def _next_read(self) -> str | None:
        """Returns what the consumer waits for; None if its read has not begun, because no slot is free."""
        chunk = self._reading.get(self._taken)
        if chunk is None:
            return None
        piece = chunk.ranges[0]
        return f"{piece.file} at byte {piece.offset} ({piece.tensor})"

    def _work(self) -> None:
        try:
            while True:
                # One thread at a time takes batch and slot: a later batch that got the last slot would block the
                # earlier one, which the consumer needs first.
                with self._order:
                    begun = self._begin()
                if begun is None:
                    return
                number, batch = begun
                self._reading[number] = batch[0]
                self._read(batch)
                with self._load_state.watch:
                    del self._reading[number]
                    self._ready[number] = batch
                    self._load_state.watch.notify_all()
        except BaseException as error:
            self._load_state.fail(error)

    def _begin(self) -> tuple[int, list[Chunk]] | None:
        """Takes the next batch and its slot; returns None at the end or when the load stops."""
        load_state = self._load_state
        if self._ended:
            return None
        batch = next(self._batches, None)
        with load_state.watch:
            if batch is None:
                self._ended = True
                load_state.watch.notify_all()
                return None
            in_slot = [chunk for chunk in batch if chunk.into is None]

            def room() -> bool:
                # Reads into place need no slot, and would run ahead without the first condition.
                return self._begun - self._taken < AHEAD and (not in_slot or self._slots.any_free)

            if not self._wait(room):
                return None
            if in_slot:
                slot = self._slots.take(len(in_slot))
                for chunk in in_slot:
                    chunk.slot = slot
            self._begun += 1
            return self._begun - 1, batch

    def _wait(self, room: Callable[[], bool]) -> bool:
        """Waits, with the condition held, until `room`; returns False if the load ends before.

        A thread waits without limit, because the consumer may work as long as it likes. The consumer itself waits only
        for other ranks to copy, and so for the timeout.
        """
        load_state = self._load_state
        if not self._threads:
            return load_state.wait(room, self._no_slot, lambda: "waiting for a slot")
        load_state.watch.wait_for(lambda: room() or load_state.stopped or load_state.failure is not None)
        return not load_state.stopped and load_state.failure is None

    def _read(self, batch: list[Chunk]) -> None:
        start = time.perf_counter()
        nbytes = sum(chunk.nbytes for chunk in batch)
        if batch[0].direct:
            self._read_span(batch, nbytes)
        else:
            self._read_runs(batch)
        self._timer.add("read", start, batch[0].task.name, nbytes)

    def _read_span(self, batch: list[Chunk], nbytes: int) -> None:
        """Reads chunks that are neighbours in a file into a slot, past the page cache."""
        first = batch[0]
        assert first.span is not None
        file, offset, _ = first.span
        slot = self._staging_buffer.slot(first.slot)
        view = self._files.read_span(file, offset, nbytes, slot, first.ranges[0].tensor)
        for chunk in batch:
            chunk.raw = view[chunk.slot_offset : chunk.slot_offset + chunk.nbytes]

    def _read_runs(self, batch: list[Chunk]) -> None:
        """Reads chunks into a slot or their place, through the page cache: one read for all that are neighbours."""
        wanted = []
        for chunk in batch:
            if chunk.into is not None:
                chunk.raw = chunk.into()
            else:
                chunk.raw = self._staging_buffer.slot(chunk.slot)[chunk.slot_offset : chunk.slot_offset + chunk.nbytes]
            view, begin = memoryview(chunk.raw.numpy().data), 0
            for piece in chunk.ranges:
                wanted.append((piece, view[begin : begin + piece.nbytes]))
                begin += piece.nbytes
        # In the order of the file, ranges of several chunks and tensors often join into one run of bytes.
        wanted.sort(key=lambda each: (each[0].file, each[0].offset))
        run: list[tuple[RowRange, memoryview]] = []
        for piece, view in wanted:
            if not piece.contiguous:
                self._files.read_rows(piece.file, piece.offset, piece.stride, view, piece.width, piece.tensor)
                continue
            if run and (run[-1][0].file, run[-1][0].offset + run[-1][0].nbytes) != (piece.file, piece.offset):
                self._read_run(run)
                run = []
            run.append((piece, view))
        if run:
            self._read_run(run)

    def _read_run(self, run: list[tuple[RowRange, memoryview]]) -> None:
        first = run[0][0]
        self._files.read_run(first.file, first.offset, [view for _, view in run], [piece.tensor for piece, _ in run])
