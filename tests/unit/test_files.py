"""What shall be a file: links are followed, and whatever would never end is refused without a byte of it read."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from distquant.files import check_file, open_file, read_file, read_text

LIMIT = 100


@pytest.fixture(params=["folder", "pipe", "device", "socket"])
def no_file(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    path, listening = tmp_path / "it", None
    match request.param:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "socket":
            listening = socket.socket(socket.AF_UNIX)
            listening.bind(os.path.relpath(path))  # its name may have 107 characters
    yield path
    if listening is not None:
        listening.close()


def test_what_is_no_file_is_named_and_not_opened(no_file: Path, request: pytest.FixtureRequest) -> None:
    kind = request.node.callspec.params["no_file"]
    for reads in (check_file, open_file, lambda path: read_file(path, LIMIT), lambda path: read_text(path, LIMIT)):
        with pytest.raises(OSError, match=rf"it is a .*{kind}, and must be a regular file"):
            reads(no_file)


def test_a_pipe_that_takes_a_files_place_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at it and the opening; no descriptor is left."""
    path, before = tmp_path / "it", len(os.listdir("/proc/self/fd"))
    path.write_bytes(b"")
    looked = os.stat

    def swap(name: Path) -> os.stat_result:
        found = looked(name)
        path.unlink()
        os.mkfifo(path)
        return found

    monkeypatch.setattr(os, "stat", swap)
    with pytest.raises(OSError, match="it is a named pipe"):
        open_file(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_has_as_many_bytes_as_the_limit_at_most(tmp_path: Path) -> None:
    path, link = tmp_path / "it", tmp_path / "link"
    link.symlink_to("it")
    path.write_bytes(b"\r\n" * (LIMIT // 2))
    assert read_file(link, LIMIT) == path.read_bytes()
    assert read_text(link, LIMIT) == "\n" * (LIMIT // 2)
    path.write_bytes(bytes(LIMIT + 1))
    with pytest.raises(OSError, match=f"it has {LIMIT + 1} bytes or more, and at most {LIMIT} are read"):
        read_file(link, LIMIT)


def test_a_file_whose_size_the_system_does_not_know_ends_at_the_limit() -> None:
    assert os.stat("/proc/self/maps").st_size == 0
    with pytest.raises(OSError, match="at most 10 are read"):
        read_file("/proc/self/maps", 10)
