"""Bytes come as the file has them, whatever the reads do: short ones, passing errors, holes, past the page cache."""

from __future__ import annotations

import errno
import os
import threading

import pytest
import torch
from faulty import END, Faulty, Short
from hypothesis import given, settings
from hypothesis import strategies as st

import distquant.stream.files as files_module
from distquant.errors import InputError
from distquant.stream.arena import PAGE, Arena
from distquant.stream.files import PAUSES, RETRIED, SLACK, Files, ReadError, resident_share

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)
SIZE = 5 * PAGE + 123


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("files")
    (path / "data.bin").write_bytes(torch.randint(0, 256, (SIZE,), dtype=torch.uint8).numpy().tobytes())
    return path


@pytest.fixture(scope="module")
def data(folder) -> bytes:
    return (folder / "data.bin").read_bytes()


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """The pauses that were asked for; none is made."""
    made: list[float] = []
    monkeypatch.setattr(files_module.time, "sleep", made.append)
    return made


@pytest.fixture(scope="module")
def slot():
    arena = Arena(1, SIZE + SLACK)
    yield arena.slot(0)
    arena.close()


@pytest.fixture(scope="module")
def direct(folder) -> None:
    """Skips where the file system takes no direct reads."""
    files = Files(folder, "direct")
    try:
        files.is_direct("data.bin")
    except InputError as error:
        pytest.skip(str(error))
    finally:
        files.close()


def buffered(files: Files, offset: int, count: int) -> bytes:
    target = bytearray(count)
    files.read("data.bin", offset, memoryview(target), "some.weight")
    return bytes(target)


def rows(files: Files, offset: int, stride: int, width: int, count: int) -> bytes:
    target = bytearray(width * count)
    files.read_rows("data.bin", offset, stride, memoryview(target), width, "some.weight")
    return bytes(target)


def span(files: Files, offset: int, count: int, slot: torch.Tensor) -> bytes:
    slot.zero_()
    return files.read_span("data.bin", offset, count, slot, "some.weight").numpy().tobytes()


# -- short reads -------------------------------------------------------------------------------------------------------


@PROPERTY
@given(st.integers(0, SIZE - 1), st.data())
def test_short_reads(folder, data, offset, draw):
    count = draw.draw(st.integers(0, SIZE - offset))
    script = [Short(n) for n in draw.draw(st.lists(st.sampled_from([1, 2, 511, PAGE - 1, PAGE, PAGE + 1]), max_size=9))]
    files = Faulty(folder, script=script)
    assert buffered(files, offset, count) == data[offset : offset + count]
    assert (files.stats.bytes, files.stats.direct, files.stats.retries) == (count, 0, 0)
    files.close()


@PROPERTY
@given(st.integers(0, 4000), st.integers(1, 64), st.integers(1, 300), st.integers(1, 40), st.data())
def test_rows_with_short_reads(folder, data, offset, width, more, count, draw):
    stride = width + more
    script = draw.draw(st.lists(st.one_of(st.none(), st.integers(1, width).map(Short)), max_size=20))
    files = Faulty(folder, script=script)
    expected = b"".join(data[offset + i * stride :][:width] for i in range(count))
    assert rows(files, offset, stride, width, count) == expected
    assert files.stats.bytes == width * count
    files.close()


@PROPERTY
@given(st.integers(0, SIZE - 1), st.data())
def test_direct_short_reads(direct, folder, data, slot, offset, draw):
    """A short read past the page cache may end anywhere; the next must start on a page."""
    count = draw.draw(st.integers(1, SIZE - offset))
    script = [Short(n) for n in draw.draw(st.lists(st.sampled_from([PAGE, 2 * PAGE, 3 * PAGE]), max_size=4))]
    files = Faulty(folder, "direct", script)
    assert span(files, offset, count, slot) == data[offset : offset + count]
    assert files.stats.direct == files.stats.bytes >= count
    assert all(at % PAGE == 0 and wanted % PAGE == 0 for at, wanted in files.asked)
    files.close()


@pytest.mark.parametrize("lengths", [(100,), (PAGE + 700,), (511, 513, PAGE + 1), (2 * PAGE + 1, 1)])
def test_direct_reads_that_end_within_a_page_go_on_from_its_start(monkeypatch, direct, folder, data, slot, lengths):
    files = Faulty(folder, "direct", [Short(n) for n in lengths])
    files.is_direct("data.bin")
    honest = os.open(folder / "data.bin", os.O_RDONLY)  # a kernel would refuse the odd lengths that a script asks for
    monkeypatch.setattr(files, "_opened", lambda *_: honest)
    assert span(files, 77, 4 * PAGE, slot) == data[77 : 77 + 4 * PAGE]
    assert all(at % PAGE == 0 for at, _ in files.asked)
    os.close(honest)
    files.close()


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", sorted(RETRIED))
@pytest.mark.parametrize("way", ["read", "rows"])
def test_passing_errors_are_read_again(folder, data, pauses, number, way):
    files = Faulty(folder, script=[number, Short(3), number])
    found = buffered(files, 40, 500) if way == "read" else rows(files, 40, 500, 100, 3)
    assert found == (data[40:540] if way == "read" else b"".join(data[40 + i * 500 :][:100] for i in range(3)))
    assert files.stats.retries == 2
    assert pauses == list(PAUSES[:2])
    files.close()


@pytest.mark.parametrize("way", ["read", "rows", "direct"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ETIMEDOUT])
def test_errors_that_last_are_told(request, folder, slot, pauses, number, way):
    if way == "direct":
        request.getfixturevalue("direct")
    files = Faulty(folder, "direct" if way == "direct" else "buffered", [number] * 50)
    ways = {
        "read": lambda: buffered(files, PAGE, 500),
        "rows": lambda: rows(files, PAGE, 500, 100, 3),
        "direct": lambda: span(files, PAGE, 500, slot),
    }
    with pytest.raises(ReadError) as caught:
        ways[way]()
    told = str(caught.value)
    for word in ("data.bin", f"byte {PAGE}", "some.weight", os.strerror(number), f"{len(PAUSES)} new tries"):
        assert word in told
    assert pauses == list(PAUSES)
    assert len(files.asked) == len(PAUSES) + 1 == files.stats.retries + 1
    files.close()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EBADF, errno.EINVAL, errno.ENOSPC])
@pytest.mark.parametrize("way", ["read", "rows"])
def test_other_errors_are_final(folder, pauses, number, way):
    files = Faulty(folder, script=[number])
    with pytest.raises(ReadError, match=r"data\.bin at byte 7 \(some\.weight\): ") as caught:
        buffered(files, 7, 500) if way == "read" else rows(files, 7, 500, 100, 3)
    assert os.strerror(number) in str(caught.value)
    assert "tries" not in str(caught.value)
    assert (len(files.asked), pauses, files.stats.retries) == (1, [], 0)
    files.close()


@pytest.mark.parametrize("way", ["read", "rows"])
def test_stale_handle_is_opened_again(folder, data, pauses, monkeypatch, way):
    """The server forgot the handle: what it gave out before must not be used any more, nor another file's number."""
    files, opened = Faulty(folder, script=[None, errno.ESTALE]), []
    opening = os.open
    monkeypatch.setattr(files_module.os, "open", lambda *a: opened.append(opening(*a)) or opened[-1])
    buffered(files, 0, 10)
    blocker = opening(folder, os.O_RDONLY)
    try:
        if way == "read":
            assert buffered(files, 10, 50) == data[10:60]
        else:
            assert rows(files, 10, 50, 20, 4) == b"".join(data[10 + i * 50 :][:20] for i in range(4))
    finally:
        os.close(blocker)
    assert len(opened) == 2
    files.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[-1])


class StaleOnce(Files):
    """A read of thread `slow` is in the kernel while another finds the handle stale and opens the file again."""

    def __init__(self, folder):
        super().__init__(folder)
        self.inside, self.reopened, self.others = threading.Event(), threading.Event(), []

    def _preadv(self, fd, target, offset):
        if threading.current_thread().name == "slow":
            self.inside.set()
            assert self.reopened.wait(10)
        elif not self.others:
            self.others.append(None)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        self.reopened.set()
        return super()._preadv(fd, target, offset)

    def _forget(self, file, direct):
        super()._forget(file, direct)
        self.others = [os.open(self.folder / "other.bin", os.O_RDONLY)]  # takes the number if that is free again

    def close(self):
        super().close()
        os.close(self.others[0])


def test_stale_handle_while_another_thread_reads(tmp_path, data, pauses):
    """Its handle must not be closed under it: the number may already mean another file."""
    (tmp_path / "data.bin").write_bytes(data)
    (tmp_path / "other.bin").write_bytes(bytes(len(data)))
    files, found = StaleOnce(tmp_path), []
    slow = threading.Thread(target=lambda: found.append(result_of(buffered, files, 0, 100)), name="slow")
    slow.start()
    assert files.inside.wait(10)
    assert buffered(files, 5, 10) == data[5:15]
    slow.join(10)
    assert found == [data[:100]]
    files.close()


def result_of(function, *args):
    try:
        return function(*args)
    except Exception as error:
        return error


# -- the end of a file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["read", "rows"])
def test_file_that_ends_early_is_told(folder, way):
    files = Faulty(folder)
    with pytest.raises(
        ReadError, match=rf"data\.bin at byte {SIZE} \(some\.weight\): the file ends 20 bytes too early"
    ):
        buffered(files, SIZE - 30, 50) if way == "read" else rows(files, SIZE - 30, 50, 50, 1)
    files.close()


def test_end_in_the_middle_is_told(folder):
    files = Faulty(folder, script=[Short(30), END])
    with pytest.raises(ReadError, match=r"byte 130 .* ends 20 bytes too early"):
        buffered(files, 100, 50)
    files.close()


@pytest.mark.parametrize("size", [PAGE, PAGE + 904])
def test_file_that_ends_early_is_told_past_the_page_cache(direct, tmp_path, slot, size):
    """Also where the end is within a page: the same bytes must not be read again and again."""
    (tmp_path / "data.bin").write_bytes(bytes(size))
    files = Faulty(tmp_path, "direct", [None] * 20 + [errno.EBADF] * 20)
    with pytest.raises(ReadError, match="too early"):
        span(files, 100, 3 * PAGE, slot)
    files.close()


# -- past the page cache, and holes ------------------------------------------------------------------------------------


@PROPERTY
@given(st.integers(0, SIZE - 1), st.data())
def test_direct_and_buffered_agree(direct, folder, data, slot, offset, draw):
    count = draw.draw(st.integers(1, SIZE - offset))
    past, through = Files(folder, "direct"), Files(folder, "buffered")
    assert span(past, offset, count, slot) == span(through, offset, count, slot) == data[offset : offset + count]
    first, last = offset // PAGE * PAGE, min(-(-(offset + count) // PAGE) * PAGE, SIZE)
    assert past.stats.direct == past.stats.bytes == last - first
    assert (through.stats.direct, through.stats.bytes) == (0, count)
    past.close()
    through.close()


@pytest.mark.parametrize("mode", ["buffered", "direct"])
def test_files_with_holes(request, tmp_path, slot, mode):
    if mode == "direct":
        request.getfixturevalue("direct")
    with open(tmp_path / "data.bin", "wb") as file:
        file.seek(PAGE + 50)
        file.write(b"island")
        file.truncate(4 * PAGE)
    files = Files(tmp_path, mode)
    expected = bytes(PAGE + 50) + b"island" + bytes(3 * PAGE - 56)
    for offset, count in ((0, 4 * PAGE), (PAGE + 48, 10), (3 * PAGE - 1, PAGE + 1)):
        assert span(files, offset, count, slot) == expected[offset : offset + count]
    files.close()


def test_resident_share(tmp_path):
    path = tmp_path / "data.bin"
    path.write_bytes(os.urandom(64 * PAGE))
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.pread(fd, 64 * PAGE, 0)
    assert resident_share(fd) == 1.0
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    share = resident_share(fd)
    os.close(fd)
    if share == 1.0:
        pytest.skip("this file system keeps pages, or cannot be asked")
    assert share <= 0.25


# -- how files are read ------------------------------------------------------------------------------------------------


def refuses(fd: int) -> None:
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def test_direct_that_the_file_system_refuses(folder, monkeypatch):
    monkeypatch.setattr(Files, "_probe", staticmethod(refuses))
    files = Files(folder, "direct")
    with pytest.raises(InputError, match=r"data\.bin cannot be read with O_DIRECT .*io='auto' or 'buffered'"):
        files.is_direct("data.bin")
    files.close()


@pytest.mark.parametrize(("resident", "refused", "expected"), [(0.0, True, 0), (0.0, False, 1), (1.0, False, 0)])
def test_auto_reads_what_is_in_memory_through_the_cache(
    direct, folder, data, slot, monkeypatch, resident, refused, expected
):
    if refused:
        monkeypatch.setattr(Files, "_probe", staticmethod(refuses))
    monkeypatch.setattr(files_module, "resident_share", lambda fd: resident)
    files = Files(folder, "auto")
    assert span(files, 5, 900, slot) == data[5:905]
    assert files.is_direct("data.bin") == bool(expected)
    assert bool(files.stats.direct) == bool(expected)
    files.close()


def test_missing_file(folder):
    for mode in ("buffered", "auto", "direct"):
        files = Files(folder, mode)
        with pytest.raises((ReadError, InputError), match=r"nowhere\.bin.*No such file"):
            files.read_span("nowhere.bin", 0, 10, torch.empty(PAGE + SLACK, dtype=torch.uint8), "some.weight")
        files.close()


def test_close_leaves_no_descriptor(folder, slot):
    before = set(os.listdir("/proc/self/fd"))
    for mode in ("buffered", "auto"):
        files = Files(folder, mode)
        span(files, 0, 100, slot)
        files.close()
    assert set(os.listdir("/proc/self/fd")) == before


def test_counters_under_threads(folder):
    files = Files(folder)
    threads = [threading.Thread(target=lambda: [buffered(files, 0, 7) for _ in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (files.stats.bytes, files.stats.calls) == (4 * 200 * 7, 800)
    files.close()
