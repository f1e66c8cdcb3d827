"""Bytes come as the file has them, whatever the reads do: short ones, holes, past the page cache."""

from __future__ import annotations

import errno
import os
import threading

import pytest
from faulty import SIZE, Faulty, Short, buffered, rows, run, span
from hypothesis import given, settings
from hypothesis import strategies as st

import distquant.loading.stream.files as files_module
from distquant.errors import InputError
from distquant.loading.stream import page_cache
from distquant.loading.stream.files import MOST_TARGETS, Files, ReadError, resident_share
from distquant.planning.slots import PAGE

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)


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


LENGTHS = st.lists(st.sampled_from([0, 1, 3, 511, PAGE - 1, PAGE, PAGE + 1]), min_size=1, max_size=8)


@PROPERTY
@given(st.integers(0, PAGE), LENGTHS.filter(lambda lengths: sum(lengths) <= SIZE - PAGE), st.data())
def test_runs_with_short_reads(folder, data, offset, lengths, draw):
    """Several targets, one behind the other; a read may end within any of them, and no byte is read again."""
    script = [Short(n) for n in draw.draw(st.lists(st.sampled_from([1, 2, 510, PAGE, PAGE + 2]), max_size=9))]
    files = Faulty(folder, script=script)
    assert run(files, offset, lengths) == data[offset : offset + sum(lengths)]
    assert (files.stats.bytes, files.stats.retries) == (sum(lengths), 0)
    if not script and all(lengths):
        assert files.asked == [(offset, sum(lengths))], "one call is enough"
    assert [at for at, _ in files.asked] == sorted({at for at, _ in files.asked})
    files.close()


def test_run_of_more_targets_than_one_call_takes(folder, data):
    files = Faulty(folder)
    assert run(files, 5, [1] * (2 * MOST_TARGETS + 1)) == data[5 : 2 * MOST_TARGETS + 6]
    assert [wanted for _, wanted in files.asked] == [MOST_TARGETS, MOST_TARGETS, 1]
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


@pytest.mark.parametrize("lengths", [(100,), (PAGE + 700,), (511, 513, PAGE + 1), (2 * PAGE + 1,)])
def test_direct_reads_that_end_within_a_page_go_on_from_its_start(monkeypatch, direct, folder, data, slot, lengths):
    files = Faulty(folder, "direct", [Short(n) for n in lengths])
    files.is_direct("data.bin")
    honest = os.open(folder / "data.bin", os.O_RDONLY)  # a kernel would refuse the odd lengths that a script asks for
    monkeypatch.setattr(files, "_descriptor", lambda *_: honest)
    assert span(files, 77, 4 * PAGE, slot) == data[77 : 77 + 4 * PAGE]
    assert all(at % PAGE == 0 for at, _ in files.asked)
    os.close(honest)
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
    with open(tmp_path / "data.bin", "wb+") as file:
        file.write(os.urandom(4096 * PAGE + 7))
        file.flush()
        fd = file.fileno()
        os.fsync(fd)
        os.pread(fd, 4096 * PAGE + 7, 0)
        assert resident_share(fd) == 1.0
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        share = resident_share(fd)
        if share == 1.0:
            pytest.skip("this file system keeps pages, or cannot be asked")
        assert share <= 0.25
        assert resident_share(fd) <= 0.25, "asking reads nothing"


@pytest.mark.parametrize("reason", ["_may_ask", "_resident"])
def test_resident_share_where_the_kernel_does_not_answer(tmp_path, monkeypatch, reason):
    """Only the owner is told, or who may write, and not of all file systems; else a read tells."""

    def cannot_be_mapped(*_):
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(page_cache, reason, (lambda fd: False) if reason == "_may_ask" else cannot_be_mapped)
    with open(tmp_path / "data.bin", "wb+") as file:
        file.write(os.urandom(64 * PAGE))
        file.flush()
        assert resident_share(file.fileno()) == 1.0


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
            files.is_direct("nowhere.bin")
            files.read_run("nowhere.bin", 0, [memoryview(bytearray(10))], ["some.weight"])
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
