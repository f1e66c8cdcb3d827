"""Another user of the machine can neither read nor write what a load keeps in temporary folders."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distquant.cli.chat import _listener

NOBODY = 65534

OF_TORCH = "torchinductor_"
"""Beginning of the name of the folder in which torch's compiler keeps its cache, made as the umask says."""

pytestmark = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="to become another user needs root"
)


@pytest.fixture
def shared_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for temporary files that everyone may enter and write, as /tmp is; new files are open to everyone."""
    before = os.umask(0)
    try:
        with tempfile.TemporaryDirectory(dir="/tmp") as folder:
            os.chmod(folder, 0o1777)
            monkeypatch.setenv("TMPDIR", folder)
            monkeypatch.setattr(tempfile, "tempdir", folder)
            yield Path(folder)
    finally:
        os.umask(before)


def reach(folder: str, end: Any, report: Any) -> None:
    """As another user, looks until it shall end; reports what was there, and what could be read, written, called."""
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    seen: set[str] = set()
    open_to_us: set[str] = set()
    while True:
        last = end.is_set()
        for root, folders, files in os.walk(folder):
            folders[:] = [name for name in folders if not name.startswith(OF_TORCH)]
            for name in (*folders, *files):
                path = os.path.join(root, name)
                seen.add(name)
                if any(os.access(path, mode) for mode in (os.R_OK, os.W_OK, os.X_OK)):
                    open_to_us.add(path)
        if last:
            break
        end.wait(0.01)
    report.send((seen, open_to_us))


def reached(folder: Path, during: Any) -> tuple[set[str], set[str]]:
    """Names that another user saw in a folder, and paths that it could open, while something was done."""
    context = multiprocessing.get_context("fork")
    end, (results, report) = context.Event(), context.Pipe(duplex=False)
    other = context.Process(target=reach, args=(str(folder), end, report))
    other.start()
    try:
        during()
    finally:
        end.set()
        assert results.poll(60), "the other user's process says nothing"
        found: tuple[set[str], set[str]] = results.recv()
        other.join()
    return found


def test_what_is_open_is_found(shared_folder: Path) -> None:
    def write() -> None:
        (shared_folder / "open").write_text("text")

    assert reached(shared_folder, write) == ({"open"}, {str(shared_folder / "open")})


def test_the_socket_of_a_chat(shared_folder: Path) -> None:
    def talk() -> None:
        with _listener() as listener, socket.socket(socket.AF_UNIX) as other:
            assert (os.stat(os.path.dirname(listener.getsockname())).st_mode & 0o777) == 0o700
            other.connect(listener.getsockname())  # for this user it is open

    assert reached(shared_folder, talk)[1] == set()


@pytest.mark.wide
def test_whatever_a_load_over_ranks_leaves_meanwhile(shared_folder: Path, kjv_tiny: str) -> None:
    def load() -> None:
        command = ["load", kjv_tiny, "--quant", "nf4", "--mesh", "tp=2", "--prompt", "In the beginning"]
        subprocess.run([sys.executable, "-m", "distquant", *command], check=True, capture_output=True)

    seen, open_to_us = reached(shared_folder, load)
    assert any(name.startswith("distquant-") for name in seen), "the other user saw nothing to try"
    assert open_to_us == set()
    assert [name for name in os.listdir(shared_folder) if not name.startswith(OF_TORCH)] == []
