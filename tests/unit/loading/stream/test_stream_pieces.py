"""Work in pieces, slots and batches; and the reader: in order, ahead, never further than its slots."""

from __future__ import annotations

import random
import threading
import time
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import distquant.loading.stream.tasks as tasks_module
from distquant.checkpoint import TensorInfo
from distquant.errors import RankError
from distquant.loading.stream.budget import Budget
from distquant.loading.stream.engine import cores_of_a_rank
from distquant.loading.stream.files import Files, ReadError
from distquant.loading.stream.load_state import LoadState
from distquant.loading.stream.reader import AHEAD, Reader
from distquant.loading.stream.stage_timer import StageTimer
from distquant.loading.stream.staging_buffer import Slots, StagingBuffer
from distquant.loading.stream.tasks import Chunk, Task, batches, chunks_of
from distquant.model.description import Source
from distquant.planning.load_plan import TensorPlan
from distquant.planning.read_assignment import ReadItem
from distquant.planning.row_map import RowMap
from distquant.planning.slots import ALIGN, PAGE, READ_SLOTS, SEND_SLOTS, SLACK, SLOT
from distquant.planning.transfers import Transfer, TransferKind
from distquant.sharding.layout import ALL, Component
from distquant.sharding.row_layout import row_layout_of, row_step

PROPERTY = settings(deadline=None, derandomize=True, max_examples=150)

component = st.sampled_from(
    [
        Component(name="", dtype="uint8", block_shape=(1, 1)),
        Component(name="a", dtype="float32", flat=16),
        Component(name="b", dtype="float32", block_shape=(1, ALL)),
        Component(name="c", dtype="int16", block_shape=(3, 4)),
    ]
)


def task_of(index: int, shape, dtype: str, start: int, found, reads=None, columns=None, transposed=False) -> Task:
    """A task over one checkpoint tensor at byte `start` of a file."""
    name, item = f"t{index}", {"BF16": 2, "F32": 4, "U8": 1}[dtype]
    stored = shape[::-1] if transposed else shape
    info = TensorInfo(
        name=name, dtype=dtype, shape=stored, file="f.bin", offset=start, nbytes=shape[0] * shape[1] * item
    )
    rows = RowMap(stored, (Source(name),), {name: info})
    columns = columns or (0, rows.width)
    width = shape[1] if transposed else columns[1] - columns[0]
    row_layouts = tuple(row_layout_of(each, (shape[0], width)) for each in found)
    reads = reads or [ReadItem(0, (0, shape[0]), (0,))]
    tensor = TensorPlan(name, shape, "float32", "none", (Source(name),), transposed=transposed)
    kind = TransferKind(
        component=None,
        shape=shape,
        dtype="float32",
        shard_dim=None,
        partition=None,
        components=tuple(found),
        row_step=row_step(found, shape),
    )
    transfer = Transfer(tensor, tensor, 0, None, tensor.sources, True, kind)
    return Task(index, transfer, rows, columns, reads, row_layouts, torch.float32)


@st.composite
def tasks(draw, index: int = 0, start: int = 0) -> Task:
    shape = draw(st.tuples(st.integers(1, 60), st.integers(1, 40)))
    found = draw(st.lists(component, min_size=1, max_size=2, unique_by=lambda c: c.name))
    step, dtype = row_step(found, shape), draw(st.sampled_from(["BF16", "F32", "U8"]))
    edges = sorted(
        {0, shape[0], *(e for e in draw(st.lists(st.integers(0, 20).map(lambda i: i * step))) if e < shape[0])}
    )
    reads = [ReadItem(draw(st.integers(0, 1)), (a, b), (0, 1)) for a, b in zip(edges, edges[1:])]  # noqa: B905, RUF007
    return task_of(index, shape, dtype, start, found, reads)


# -- pieces ------------------------------------------------------------------------------------------------------------


@PROPERTY
@given(tasks(), st.integers(1, 4000))
def test_pieces_cover_rows_once_in_whole_steps(task, capacity):
    read: list[int] = []
    for rank in (0, 1):
        mine = [row for read in task.reads if read.reader == rank for row in range(*read.rows)]
        found = []
        for chunk in chunks_of(task, rank, capacity):
            assert chunk.read.rows[0] <= chunk.start < chunk.stop <= chunk.read.rows[1]
            assert chunk.start % task.step == 0
            assert chunk.stop % task.step == 0 or chunk.stop == chunk.read.rows[1]
            payload = task.payload(chunk.start, chunk.stop, -1)[1]
            if chunk.stop - chunk.start > task.step:
                assert max(chunk.nbytes, payload) <= capacity
            found += range(chunk.start, chunk.stop)
        assert found == mine
        read += found
    assert sorted(read) == list(range(task.row_layouts[0].rows))


@PROPERTY
@given(st.lists(tasks(), min_size=1, max_size=4), st.integers(0, 1 << 21))
def test_every_piece_fits_a_slot(found, staging):
    """Also where one step of rows is larger than the budget: slots are then as large as that."""
    budget = Budget.of(staging, found)
    for task in found:
        for chunk in chunks_of(task, 0, budget.piece):
            assert chunk.nbytes <= budget.largest
            payload, nbytes = task.payload(chunk.start, chunk.stop, -1)
            assert nbytes + SLACK <= budget.slot
            assert sum(size for _, _, size in payload) <= nbytes
            ends = [(at, at + size) for _, at, size in payload]
            assert all(b <= c for (_, b), (c, _) in pairwise(ends))
    assert budget.piece <= SLOT


@pytest.mark.parametrize("staging", [1 << 20, 8 << 20, 64 << 20, 1 << 30])
def test_slots_keep_to_the_staging_budget(staging):
    """Where the smallest pieces fit, all slots together take what the user gave, but for ends of pages."""
    budget = Budget.of(staging, [task_of(0, (60, 40), "F32", 0, [Component(name="", dtype="uint8")])])
    staging_buffer = StagingBuffer(READ_SLOTS + SEND_SLOTS, budget.slot)
    assert staging_buffer.slot_bytes * staging_buffer.slots <= staging + staging_buffer.slots * PAGE
    assert staging_buffer.slot(staging_buffer.slots - 1).numel() >= budget.largest + SLACK
    staging_buffer.close()


@pytest.mark.parametrize("capacity", [1, 100, 700, 100_000])
def test_transposed_tensor_is_read_as_it_is_stored(capacity):
    """Rows of the file, all of them, by the one rank that transposes it."""
    task = task_of(0, (24, 10), "F32", 0, [Component(name="", dtype="uint8")], transposed=True)
    found = [row for chunk in chunks_of(task, 0, capacity) for row in range(chunk.start, chunk.stop)]
    assert found == list(range(10))


# -- batches -----------------------------------------------------------------------------------------------------------


@PROPERTY
@given(st.data(), st.integers(1, 2000))
def test_batches_past_the_page_cache_join_neighbours_only(data, capacity):
    """Nothing is lost, nothing changes its order, and a batch is one run of bytes that fits, or a single piece."""
    chunks: list[Chunk] = []
    at = 0
    for index in range(data.draw(st.integers(0, 5))):
        at += data.draw(st.sampled_from([0, 0, 8]))
        task = data.draw(tasks(index, at))
        at += sum(piece.nbytes for piece in task.rows.ranges((0, task.rows.rows), (0, task.rows.width)))
        chunks += chunks_of(task, 0, capacity)
    for chunk in chunks:
        chunk.direct = True
    found = list(batches(iter(chunks), capacity))
    assert [chunk for batch in found for chunk in batch] == chunks
    for batch in found:
        assert batch
        if len(batch) > 1:
            assert sum(chunk.nbytes for chunk in batch) <= capacity
            spans = [chunk.span for chunk in batch]
            assert all(a[0] == b[0] and a[2] == b[1] for a, b in pairwise(spans))
        assert [chunk.slot_offset for chunk in batch] == [0, *accumulate(chunk.nbytes for chunk in batch)][:-1]
    for batch, following in pairwise(found):
        last, first = batch[-1], following[0]
        if last.span[2] == first.span[1]:
            assert sum(chunk.nbytes for chunk in (*batch, first)) > capacity, "neighbours that fit were read separately"


def slot_bytes(batch: list[Chunk]) -> int:
    """Bytes of a slot that a batch takes: each piece begins on a multiple of `ALIGN`, and none lies on another."""
    end = 0
    for chunk in batch:
        if chunk.into is None:
            assert chunk.slot_offset == -(-end // ALIGN) * ALIGN
            end = chunk.slot_offset + chunk.nbytes
    return end


@PROPERTY
@given(st.data(), st.integers(1, 2000))
def test_batches_through_the_page_cache_take_what_fits(data, capacity):
    """Wherever it lies in the files: what shares a slot fits into it, and what has a place of its own has a limit."""
    chunks: list[Chunk] = []
    for index in range(data.draw(st.integers(0, 6))):
        chunks += chunks_of(data.draw(tasks(index, 8 * index)), 0, capacity)
    largest = max((chunk.nbytes for chunk in chunks), default=0)  # a slot has room for any piece
    capacity, placed = max(capacity, largest), largest + data.draw(st.sampled_from([0, 100, 10_000]))
    for chunk in chunks:
        if data.draw(st.booleans()):
            chunk.into = lambda: torch.empty(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks_module, "PLACED", placed)
        found = list(batches(iter(chunks), capacity))

    def fits(batch: list[Chunk]) -> bool:
        straight = sum(chunk.nbytes for chunk in batch if chunk.into is not None)
        end = 0
        for chunk in batch:
            if chunk.into is None:
                end = -(-end // ALIGN) * ALIGN + chunk.nbytes
        return end <= capacity and straight <= placed

    assert [chunk for batch in found for chunk in batch] == chunks
    for batch in found:
        assert len(batch) == 1 or fits(batch)
        assert len(batch) == 1 or slot_bytes(batch) <= capacity
    for batch, following in pairwise(found):
        assert not fits([*batch, following[0]]), "batches that fit together were read separately"


def test_past_and_through_the_page_cache_are_separate_batches():
    chunks = list(chunks_of(task_of(0, (6, 8), "F32", 0, [Component(name="", dtype="uint8")]), 0, 100))
    chunks[0].direct = True
    assert [len(batch) for batch in batches(iter(chunks), 10_000)] == [1, len(chunks) - 1]
    assert len(chunks) > 2


def test_columns_are_not_one_run():
    task = task_of(0, (6, 8), "F32", 0, [Component(name="", dtype="uint8")], columns=(2, 6))
    chunks = list(chunks_of(task, 0, 100))
    assert [(chunk.start, chunk.stop, chunk.span) for chunk in chunks] == [(0, 2, None), (2, 4, None), (4, 6, None)]
    assert [len(batch) for batch in batches(iter(chunks), 10_000)] == [3]


# -- the reader --------------------------------------------------------------------------------------------------------


class Slow(Files):
    """Reads take a random while; counts those in flight."""

    def __init__(self, folder, seed: int, hang: threading.Event | None = None):
        super().__init__(folder, "buffered")
        self.hang = hang
        self.chance, self.guard, self.reading, self.most, self.begun = random.Random(seed), threading.Lock(), 0, 0, 0

    def _preadv(self, fd, targets, offset):
        with self.guard:
            self.reading += 1
            self.begun += 1
            self.most = max(self.most, self.reading)
            pause = self.chance.random() * 0.003
        time.sleep(pause)
        if self.hang is not None:
            assert self.hang.wait(20)
        found = super()._preadv(fd, targets, offset)
        with self.guard:
            self.reading -= 1
        return found


def no_slot() -> RankError:
    return RankError(1, "has not copied")


class Running:
    """A reader over many small pieces of one file, each a batch of its own."""

    def __init__(self, folder, seed: int = 0, slots: int = 3, threads: int = 2, count: int = 40, hang=None):
        self.data = bytes(random.Random(seed).randbytes(count * 64))
        (folder / "f.bin").write_bytes(self.data)
        task = task_of(0, (count, 64), "U8", 0, [Component(name="", dtype="uint8")])
        self.files, self.load_state, self.staging_buffer = (
            Slow(folder, seed, hang),
            LoadState(0.2 if hang else 20),
            StagingBuffer(slots, 64 + SLACK),
        )
        self.slots = Slots(range(slots), self.load_state.watch)
        found = batches(chunks_of(task, 0, 1), 64)
        self.reader = Reader(
            self.files, self.staging_buffer, self.slots, self.load_state, StageTimer(), found, threads, no_slot
        )

    def close(self) -> None:
        self.load_state.stop()
        assert self.reader.join()
        self.files.close()
        self.staging_buffer.close()


@pytest.mark.parametrize("threads", [0, 1, 2, 4])
@pytest.mark.parametrize("slots", [1, 3])
def test_reader_keeps_the_order(tmp_path, threads, slots):
    running, found, starts = Running(tmp_path, threads, slots, threads), b"", []
    for batch in running.reader:
        for chunk in batch:
            found += chunk.raw.numpy().tobytes()
            starts.append(chunk.start)
            chunk.raw = None
            running.slots.release(chunk.slot)
    assert starts == list(range(40))
    assert found == running.data
    assert running.files.most <= min(max(threads, 1), slots)
    running.close()


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_reader_waits_for_slots(tmp_path, slots):
    """A consumer that gives nothing back holds the reads back: never more of them than slots."""
    running = Running(tmp_path, slots=slots)
    held = []
    for number, batch in enumerate(running.reader):
        held.append(batch)
        if len(held) == slots:
            time.sleep(0.01)
            assert running.files.begun == number + 1, "a read began without a slot"
            for each in held:
                running.slots.release(each[0].slot)
            held = []
    running.close()


def test_reader_does_not_run_far_ahead_of_reads_into_place(tmp_path):
    """What needs no slot is held back, too."""
    running = Running(tmp_path, count=1)
    task = task_of(0, (40, 64), "U8", 0, [Component(name="", dtype="uint8")])
    (tmp_path / "f.bin").write_bytes(bytes(40 * 64))
    chunks = list(chunks_of(task, 0, 1))
    for chunk in chunks:
        chunk.into = lambda: torch.empty(64, dtype=torch.uint8)
    files, load_state = Slow(tmp_path, 1), LoadState(20)
    reader = Reader(
        files,
        running.staging_buffer,
        Slots(range(1), load_state.watch),
        load_state,
        StageTimer(),
        batches(iter(chunks), 64),
        2,
        no_slot,
    )
    for number, _ in enumerate(reader):
        time.sleep(0.001)
        assert files.begun <= number + 1 + AHEAD
    reader.join()
    files.close()
    running.close()


@pytest.mark.parametrize("threads", [0, 2])
def test_reader_passes_errors_on(tmp_path, threads):
    running = Running(tmp_path, threads=threads)
    with open(tmp_path / "f.bin", "r+b") as file:
        file.truncate(0)
    with pytest.raises(ReadError, match=r"f\.bin .*t0"):
        for batch in running.reader:
            running.slots.release(batch[0].slot)
    running.close()


@pytest.mark.parametrize("threads", [0, 2])
def test_reader_stops_with_the_load(tmp_path, threads):
    running = Running(tmp_path, threads=threads)
    taken = next(iter(running.reader))
    assert taken[0].start == 0
    running.load_state.stop()
    assert list(running.reader) == []
    running.reader.join()
    running.close()


def test_reader_without_threads_reads_nothing_ahead(tmp_path):
    running = Running(tmp_path, threads=0)
    for number, batch in enumerate(running.reader):
        assert running.files.begun == number + 1
        running.slots.release(batch[0].slot)
    running.close()


def test_reader_without_threads_ends_at_failures_and_when_ranks_hold_its_slots(tmp_path):
    running = Running(tmp_path, slots=1, threads=0)
    running.load_state.timeout = 0.1
    batches_read = iter(running.reader)
    next(batches_read)
    with pytest.raises(RankError, match="rank 1 failed: has not copied"):
        next(batches_read)
    running.load_state.fail(RankError(1, "is gone"))
    with pytest.raises(RankError, match="is gone"):
        next(iter(running.reader))
    running.close()


def test_reader_whose_reads_do_not_return_gives_up(tmp_path):
    hang = threading.Event()
    running = Running(tmp_path, count=2, hang=hang)
    try:
        with pytest.raises(ReadError, match=r"f\.bin at byte 0 \(t0\): .* not come back for 0\.2 s"):
            next(iter(running.reader))
    finally:
        hang.set()
        running.close()


@pytest.mark.parametrize(
    ("machine", "bound", "limit", "ranks", "cores"),
    [
        *((2, 2, None, 2, 1), (2, 2, None, 1, 2), (64, 64, None, 8, 8), (64, 8, None, 8, 8), (2, 2, None, 3, 0)),
        *((64, 64, 4.0, 2, 2), (64, 64, 1.5, 2, 0), (64, 8, 4.0, 1, 4), (4, 4, 32.0, 2, 2)),
    ],
)
def test_cores_of_a_rank_are_those_it_is_bound_to_or_its_share(monkeypatch, machine, bound, limit, ranks, cores):
    monkeypatch.setattr("distquant.loading.stream.engine.cpu_limit", lambda: limit)
    monkeypatch.setattr("os.cpu_count", lambda: machine)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(bound)))
    assert cores_of_a_rank(ranks) == cores
