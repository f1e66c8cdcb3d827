"""Files that change between their header and the end of a load, and direct reads that are tried with passing errors."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from faulty import span

import distquant.loading.stream.files as files_module
from distquant.errors import InputError
from distquant.loading.stream.files import PAUSES, RETRIED, Files, ReadError
from distquant.planning.slots import PAGE
from distquant.stamps import Stamp

CHANGED = r"data\.bin: the file was changed after its header was read \(.*\)\. Load again when nothing writes to it$"


def overwrite(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(b"other")


def replace(path: Path) -> None:
    beside = path.with_name("beside")
    beside.write_bytes(bytes(path.stat().st_size))
    os.replace(beside, path)


def cut(path: Path) -> None:
    os.truncate(path, PAGE)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "data.bin"
    made.write_bytes(os.urandom(3 * PAGE))
    os.utime(made, ns=(10**18, 10**18))
    return made


def stamped(path: Path, mode: str) -> Files:
    return Files(path.parent, mode, {path.name: Stamp.of(path)})


@pytest.mark.parametrize("mode", ["buffered", "auto", "direct"])
@pytest.mark.parametrize("change", [overwrite, replace, cut])
def test_a_change_before_the_opening_is_refused(mode: str, change: Callable, path: Path, slot, request) -> None:
    if mode == "direct":
        request.getfixturevalue("direct")
    files = stamped(path, mode)
    change(path)
    for _ in range(2):  # also for whoever asks again
        with pytest.raises(ReadError, match=CHANGED):
            span(files, 0, 10, slot)
    files.close()


@pytest.mark.parametrize("mode", ["buffered", "auto"])
def test_a_change_after_the_last_read_is_refused(mode: str, path: Path, slot) -> None:
    files = stamped(path, mode)
    span(files, 0, 10, slot)
    files.check_unchanged()
    overwrite(path)
    with pytest.raises(ReadError, match=CHANGED):
        files.check_unchanged()
    files.close()


def test_a_file_that_ends_early_because_it_was_cut_says_so(path: Path, slot) -> None:
    files = stamped(path, "buffered")
    span(files, 0, 10, slot)
    cut(path)
    with pytest.raises(ReadError, match=rf"{CHANGED[:-1]}"):
        span(files, 0, 2 * PAGE, slot)
    files.close()


@pytest.mark.parametrize("change", [replace, Path.unlink])
def test_an_open_file_that_lost_its_place_is_read_to_its_end(change: Callable, path: Path, slot) -> None:
    """Its bytes are still those that the header describes."""
    content = path.read_bytes()
    files = stamped(path, "buffered")
    span(files, 0, 10, slot)
    change(path)
    assert span(files, 0, 3 * PAGE, slot) == content
    files.check_unchanged()
    files.close()


class Probed(Files):
    """Direct reads fail with the errors of a script at first."""

    def __init__(self, folder: Path, mode: str, script: list[int]):
        super().__init__(folder, mode)
        self.script = script

    def _probe(self, fd: int) -> int:  # type: ignore[override]
        if self.script:
            number = self.script.pop(0)
            raise OSError(number, os.strerror(number))
        return super()._probe(fd)


@pytest.mark.parametrize("mode", ["auto", "direct"])
@pytest.mark.parametrize("number", sorted(RETRIED))
def test_a_passing_error_says_nothing_about_direct_reads(direct, folder, pauses, monkeypatch, mode, number) -> None:
    monkeypatch.setattr(files_module, "resident_share", lambda fd: 0.0)
    files = Probed(folder, mode, [number, number])
    assert files.is_direct("data.bin")
    assert pauses == list(PAUSES[:2])
    assert files.stats.retries == 2
    files.close()


def test_an_error_that_stays_is_not_blamed_on_direct_reads(direct, folder, pauses) -> None:
    files = Probed(folder, "direct", [errno.EIO] * 9)
    with pytest.raises(ReadError, match=r"data\.bin at byte 0: Input/output error, after 3 new tries$"):
        files.is_direct("data.bin")
    assert len(pauses) == len(PAUSES)
    files.close()
    files = Probed(folder, "direct", [errno.ENXIO])
    with pytest.raises(ReadError, match=r"data\.bin at byte 0: No such device or address$"):
        files.is_direct("data.bin")
    files.close()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_refusal_is_not_tried_again(direct, folder, pauses, number) -> None:
    files = Probed(folder, "direct", [number])
    with pytest.raises(InputError, match=r"^io: .*data\.bin cannot be read with O_DIRECT \(.*\)\. Use io='auto'"):
        files.is_direct("data.bin")
    assert pauses == []
    files.close()


@pytest.mark.parametrize("script", [[errno.EINVAL], [errno.EIO] * 9])
def test_auto_goes_through_the_page_cache_then(direct, folder, data, slot, pauses, monkeypatch, script) -> None:
    monkeypatch.setattr(files_module, "resident_share", lambda fd: 0.0)
    files = Probed(folder, "auto", script)
    assert span(files, 3, 900, slot) == data[3:903]
    assert files.stats.direct == 0
    files.close()


@pytest.mark.parametrize("mode", ["buffered", "direct"])
def test_a_pipe_in_a_files_place_is_told_as_one(mode: str, path: Path) -> None:
    path.unlink()
    os.mkfifo(path)
    files = Files(path.parent, mode)
    with pytest.raises(ReadError, match=r"data\.bin: it is a named pipe, and must be a regular file"):
        files.is_direct("data.bin")
        files.open("data.bin")
    files.close()


def test_opening_is_tried_again(folder, data, slot, pauses, monkeypatch) -> None:
    opened, script = files_module.open_file, [errno.ESTALE, errno.EIO]

    def failing(path: Path, flags: int = 0) -> int:
        if script and str(path).endswith("data.bin"):
            number = script.pop()
            raise OSError(number, os.strerror(number))
        return opened(path, flags)

    monkeypatch.setattr(files_module, "open_file", failing)
    files = Files(folder, "buffered")
    assert span(files, 0, 100, slot) == data[:100]
    assert len(pauses) == 2
    files.close()
