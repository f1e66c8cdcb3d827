"""What may have changed a file's bytes is seen, and what leaves them alone is no alarm."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from distquant.stamps import Stamp

CONTENT = b"0123456789"


def write(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(CONTENT[::-1])


def write_and_set_back(path: Path) -> None:
    before = path.stat()
    write(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_and_set_back(path: Path) -> None:
    before = path.stat()
    other = path.with_name("other")
    other.write_bytes(CONTENT[::-1])
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, path)


def cut(path: Path) -> None:
    os.truncate(path, 3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "it"
    made.write_bytes(CONTENT)
    os.utime(made, ns=(10**18, 10**18))  # long ago, so that each further writing has another time
    return made


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (write, r"it was last written at 2001-09-09 01:46:40\.000000\+00:00, and now at 20"),
        (cut, "it had 10 bytes, and has 3 now"),
        (write_and_set_back, "it was last changed at 20.*, and now at 20"),
        (replace_and_set_back, "another file has taken its place"),
        (os.utime, "it was last written at"),
    ],
)
def test_a_change_of_bytes_is_seen(change: Callable[[Path], None], told: str, path: Path) -> None:
    # The clock of a file system goes in steps, so an earlier time of change stands for a step that has passed.
    before = replace(Stamp.of(path), changed=Stamp.of(path).changed - 1)
    change(path)
    found = before.change(Stamp.of(path))
    assert found is not None and re.match(told, found), found


@pytest.mark.parametrize(
    "change", [lambda path: os.link(path, f"{path}2"), lambda path: path.chmod(0o600), lambda path: path.read_bytes()]
)
def test_what_leaves_the_bytes_alone_is_no_alarm(change: Callable[[Path], None], path: Path) -> None:
    before = Stamp.of(path)
    change(path)
    assert before.change(Stamp.of(path)) is None


def test_an_open_file_that_lost_its_name_is_no_alarm(path: Path) -> None:
    with open(path, "rb") as file:
        before = Stamp.of(file.fileno())
        path.unlink()
        assert before.change(Stamp.of(file.fileno())) is None


def test_a_new_number_alone_is_no_alarm(path: Path) -> None:
    """Some file systems of networks number a file anew when they have forgotten it."""
    before = Stamp.of(path)
    assert before.change(replace(before, inode=before.inode + 1)) is None


def test_any_number_is_a_time(path: Path) -> None:
    before = Stamp.of(path)
    found = before.change(replace(before, written=10**30))
    assert found is not None and found.endswith(f"and now at {10**30} ns")
