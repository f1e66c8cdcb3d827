"""A file that a user has named is written whole or not at all, and what cannot be written is known before the work."""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from distquant.errors import InputError
from distquant.left_behind import made_folder
from distquant.outputs import output_problem, write_output

TEXT = "it is written\n"


@contextmanager
def files_of(nbytes: int) -> Iterator[None]:
    """Lets no file of this process grow past a size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_is_written_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "out"
    for text in (TEXT, "again"):
        assert output_problem("--out", path) is None
        write_output("--out", path, text)
        assert path.read_text() == text
        assert os.listdir(tmp_path) == ["out"]


def test_a_look_leaves_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "out"
    assert output_problem("--out", path) is None
    assert os.listdir(tmp_path) == []
    path.write_text(TEXT)
    assert output_problem("--out", path) is None
    assert path.read_text() == TEXT


def test_a_disk_that_fills_up_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text(TEXT)
    with files_of(100):
        problem = output_problem("--out", path)
        with pytest.raises(InputError, match=r"^--out: .*out cannot be written \(File too large\)\. Give the name of"):
            write_output("--out", path, "x" * 101)
    assert problem is not None and "cannot be written" in problem.what
    assert path.read_text() == TEXT
    assert os.listdir(tmp_path) == ["out"]


def test_permissions_and_links_stay(tmp_path: Path) -> None:
    path, link = tmp_path / "out", tmp_path / "link"
    path.touch(mode=0o640)
    link.symlink_to("out")
    write_output("--out", link, TEXT)
    assert link.is_symlink()
    assert path.read_text() == TEXT
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    mask = os.umask(0)
    os.umask(mask)
    write_output("--out", tmp_path / "new", TEXT)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("", r"'' cannot be written \(no file is named\)"),
        ("none/out", r"the folder .*/none does not exist\. Create it"),
        ("folder", r"folder is a folder\. Give the name of a file"),
        ("file/out", r"file/out cannot be written \(Not a directory\)"),
        ("loop", r"loop cannot be written \(Too many levels of symbolic links\)"),
        ("o" * 300, r"cannot be written \(File name too long\)"),
        ("zero\0byte", r"cannot be written \(embedded null byte\)"),
        ("/proc/self/stat/out", r"cannot be written \(Not a directory\)"),
        ("/proc/nothing", r"cannot be written|does not exist"),
    ],
)
def test_what_cannot_be_written_is_told_before(name: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    path = os.path.join(tmp_path, name) if name else ""
    problem = output_problem("--out", path)
    assert problem is not None
    with pytest.raises(InputError, match=f"^--out: .*{told}") as caught:
        write_output("--out", path, TEXT)
    assert caught.value.problems == (problem,)


def test_a_pipe_and_a_device_are_written_to(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(InputError, match=r"pipe cannot be written \(nobody reads this pipe\)"):
        write_output("--out", path, TEXT)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    assert output_problem("--out", path) is None
    write_output("--out", path, TEXT)
    assert os.read(reader, 100) == TEXT.encode()
    os.close(reader)
    for device in ("/dev/null", "/dev/full"):
        before = os.stat(device)
        assert output_problem("--out", device) is None
        if device == "/dev/null":
            write_output("--out", device, TEXT)
        else:
            with pytest.raises(InputError, match=r"full cannot be written \(No space left on device\)\. Make room"):
                write_output("--out", device, TEXT)
        assert os.stat(device).st_ino == before.st_ino, "it is still the device"


def test_half_a_character_is_spelled_out(tmp_path: Path) -> None:
    write_output("--out", tmp_path / "out", "a\udcffb")
    assert (tmp_path / "out").read_text() == "a\\udcffb"


def test_no_place_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"^TMPDIR: no folder .* made \(No such file or directory\)\. Set TMPDIR"):
        made_folder()
