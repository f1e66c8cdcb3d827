"""Files under a command: weights that change, outputs that cannot be written, and machines that lack something."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_runs import Command, tells

import distquant as dq
from distquant.cli.lacks import lack_of
from distquant.errors import InputError, RankError
from distquant.loading import loader
from distquant.loading.stream.files import Files

SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture
def model(kjv_tiny: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kjv_tiny, tmp_path / "model"))


def overwrite(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))


def swap(path: Path) -> None:
    beside = path.with_name("beside")
    shutil.copy(path, beside)
    overwrite(beside)
    os.replace(beside, path)


@pytest.mark.parametrize("change", [overwrite, swap])
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_weights_that_change_after_their_header(
    change: Callable, quant: str, model: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Files.__init__

    def changed(self: Files, *arguments: object) -> None:
        change(model / SHARD)
        begin(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Files, "__init__", changed)
    run = command("load", model, "--quant", quant, "--report", "out.json")
    assert run.code == 2
    assert not os.path.exists("out.json")
    assert run.message.startswith(f"rank 0: {model / SHARD}: the file was changed after its header was read (it was ")


def test_weights_that_change_under_transformers(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods that are not ours are loaded by transformers, which opens the files by itself."""
    plan = dq.plan(model)
    checkpoint = loader.open_planned(plan, loader_comm(), None)
    loader.check_paths(checkpoint)
    swap(model / SHARD)
    with pytest.raises(dq.DistquantError, match=f"{SHARD}: the file was changed after its header was read"):
        loader.check_paths(checkpoint)


def loader_comm() -> object:
    from distquant.parallel.comm import SoloComm

    return SoloComm()


def test_outputs_that_fail_after_the_work(kjv_tiny: str, command: Command) -> None:
    for arguments in (("plan", "--json"), ("plan", "--html"), ("load", "--report"), ("load", "--trace")):
        run = command(arguments[0], kjv_tiny, arguments[1], "/dev/full")
        assert (run.code, run.out) == (2, "")
        where = arguments[1].removeprefix("--") if arguments[1] == "--trace" else arguments[1]
        assert run.message == (
            f"{where}: /dev/full cannot be written (No space left on device). Make room there, or give another path"
        )


def test_all_outputs_are_looked_at_before_the_work(kjv_tiny: str, command: Command) -> None:
    run = command("plan", kjv_tiny, "--json", "no/out", "--html", "")
    assert (run.code, run.out) == (2, "")
    assert [problem.split(":")[0] for problem in run.problems] == ["--json", "--html"]
    tells(command("load", kjv_tiny, "--trace", "no/out"), r"^trace: the folder .*/no does not exist\. Create it, or")


def test_no_room_for_modules_on_the_disk(kjv_tiny: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"^TMPDIR: no folder for temporary files can be made"):
        dq.load(kjv_tiny, device_map={"": "cpu", "model.layers.0": "disk"})


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), r"^memory: this process gets no more memory \(MemoryError\)\. Free some"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "^memory: "),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "^memory: "),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), r"^memory: .*libtorch_cpu\.so"),
        (RuntimeError("can't start new thread"), r"^threads: this process gets no more threads \(can't start"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "^threads: "),
        (
            OSError(errno.EMFILE, "Too many open files", "some/file"),
            r"^files: .*\(Too many open files: some/file\)\. R",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "some/file"), r"^disk: .*some/file"),
    ],
)
def test_what_a_machine_lacks_is_told(
    error: Exception, told: str, kjv_tiny: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(loader, "open_planned", fail)
    tells(command("load", kjv_tiny, "--quant", "nf4"), told)


@pytest.mark.parametrize(
    "error", [RuntimeError("shape '[1]' is invalid"), OSError(errno.EBADF, "Bad file descriptor"), RankError(0, "died")]
)
def test_other_errors_are_no_lack(error: Exception) -> None:
    assert lack_of(error) is None
