"""Errors of a disk or network: those that pass are waited out, those that last are reported, no handle is lost."""

from __future__ import annotations

import errno
import os
import threading

import pytest
from faulty import END, SIZE, Faulty, Short, buffered, rows, run, span

import distquant.loading.stream.files as files_module
from distquant.loading.stream.files import PAUSES, RETRIED, Files, ReadError
from distquant.planning.slots import PAGE

# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", sorted(RETRIED))
@pytest.mark.parametrize("way", ["read", "run", "rows"])
def test_passing_errors_are_read_again(folder, data, pauses, number, way):
    files = Faulty(folder, script=[number, number, Short(3), None, number, number])
    if way == "read":
        assert buffered(files, 40, 500) == data[40:540]
    elif way == "run":
        assert run(files, 40, [100, 300, 100]) == data[40:540]
    else:
        assert rows(files, 40, 500, 100, 5) == b"".join(data[40 + i * 500 :][:100] for i in range(5))
    assert len(pauses) == files.stats.retries >= 1
    assert set(pauses) <= set(PAUSES)
    files.close()


def test_every_new_try_is_counted_and_waited_for(folder, data, pauses):
    files = Faulty(folder, script=[errno.EIO, Short(3), errno.EAGAIN, errno.EIO])
    assert buffered(files, 40, 500) == data[40:540]
    assert files.stats.retries == 3
    assert pauses == list(PAUSES)
    files.close()


@pytest.mark.parametrize("way", ["read", "run", "rows", "direct"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ETIMEDOUT])
def test_errors_that_last_are_reported(request, folder, slot, pauses, number, way):
    if way == "direct":
        request.getfixturevalue("direct")
    files = Faulty(folder, "direct" if way == "direct" else "buffered", [number] * 50)
    ways = {
        "read": lambda: buffered(files, PAGE, 500),
        "run": lambda: run(files, PAGE, [300, 200]),
        "rows": lambda: rows(files, PAGE, 500, 100, 3),
        "direct": lambda: span(files, PAGE, 500, slot),
    }
    with pytest.raises(ReadError) as caught:
        ways[way]()
    message = str(caught.value)
    for word in ("data.bin", f"byte {PAGE}", "some.weight", os.strerror(number), f"{len(PAUSES)} new tries"):
        assert word in message
    assert pauses == list(PAUSES)
    assert files.stats.retries == len(PAUSES) <= len(files.asked) <= len(PAUSES) + 2
    files.close()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EBADF, errno.EINVAL, errno.ENOSPC])
@pytest.mark.parametrize("way", ["read", "run", "rows"])
def test_other_errors_are_final(folder, pauses, number, way):
    files = Faulty(folder, script=[number] + [None] * (way != "rows") + [number] * 20)
    ways = {
        "read": lambda: buffered(files, 7, 500),
        "run": lambda: run(files, 7, [0, 200, 300]),
        "rows": lambda: rows(files, 7, 500, 100, 3),
    }
    with pytest.raises(ReadError, match=r"data\.bin at byte 7 \((some|1)\.weight\): ") as caught:
        ways[way]()
    assert os.strerror(number) in str(caught.value)
    assert "tries" not in str(caught.value)
    assert len(files.asked) <= 2
    assert (pauses, files.stats.retries) == ([], 0)
    files.close()


class Stale(Files):
    """The server forgets the handle after the first read; a newly opened one is good."""

    def __init__(self, folder):
        super().__init__(folder)
        self.reads = 0

    def _preadv(self, fd, targets, offset):
        self.reads += 1
        if self.reads > 1 and len(self.opened) == 1:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return super()._preadv(fd, targets, offset)


@pytest.mark.parametrize("way", ["read", "rows"])
def test_stale_handle_is_opened_again(folder, data, pauses, monkeypatch, way):
    files, opening = Stale(folder), os.open
    files.opened = opened = []
    monkeypatch.setattr(files_module.os, "open", lambda *a: opened.append(opening(*a)) or opened[-1])
    before = set(os.listdir("/proc/self/fd"))
    assert buffered(files, 0, 10) == data[:10]
    if way == "read":
        assert buffered(files, 10, 50) == data[10:60]
    else:
        assert rows(files, 10, 50, 20, 4) == b"".join(data[10 + i * 50 :][:20] for i in range(4))
    assert len(opened) == 2
    files.close()
    assert set(os.listdir("/proc/self/fd")) == before


class StaleOnce(Files):
    """A read of thread `slow` is in the kernel while another finds the handle stale and opens the file again."""

    def __init__(self, folder):
        super().__init__(folder)
        self.inside, self.reopened, self.others = threading.Event(), threading.Event(), []

    def _preadv(self, fd, targets, offset):
        if threading.current_thread().name == "slow":
            self.inside.set()
            assert self.reopened.wait(10)
        elif not self.others:
            self.others.append(None)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        self.reopened.set()
        return super()._preadv(fd, targets, offset)

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
def test_file_that_ends_early_is_reported(folder, way):
    files = Faulty(folder)
    with pytest.raises(
        ReadError, match=rf"data\.bin at byte {SIZE} \(some\.weight\): the file ends 20 bytes too early"
    ):
        buffered(files, SIZE - 30, 50) if way == "read" else rows(files, SIZE - 30, 50, 50, 1)
    files.close()


def test_end_of_a_run_names_the_tensor_that_it_is_in(folder):
    files = Faulty(folder, script=[Short(130), END])
    with pytest.raises(ReadError, match=r"byte 230 \(2\.weight\): the file ends 70 bytes too early"):
        run(files, 100, [50, 50, 60, 40])
    files.close()


def test_end_in_the_middle_is_reported(folder):
    files = Faulty(folder, script=[Short(30), END])
    with pytest.raises(ReadError, match=r"byte 130 .* ends 20 bytes too early"):
        buffered(files, 100, 50)
    files.close()


@pytest.mark.parametrize("size", [PAGE, PAGE + 904])
def test_file_that_ends_early_is_reported_past_the_page_cache(direct, tmp_path, slot, size):
    """Also where the end is within a page: the same bytes must not be read again and again."""
    (tmp_path / "data.bin").write_bytes(bytes(size))
    files = Faulty(tmp_path, "direct", [None] * 20 + [errno.EBADF] * 20)
    with pytest.raises(ReadError, match="too early"):
        span(files, 100, 3 * PAGE, slot)
    files.close()
