"""A file of random bytes, and what tests of reading it share."""

from __future__ import annotations

import pytest
import torch
from faulty import SIZE

import distquant.loading.stream.files as files_module
from distquant.errors import InputError
from distquant.loading.stream.files import Files
from distquant.loading.stream.staging_buffer import StagingBuffer
from distquant.planning.slots import SLACK


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
    staging_buffer = StagingBuffer(1, SIZE + SLACK)
    yield staging_buffer.slot(0)
    staging_buffer.close()


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
