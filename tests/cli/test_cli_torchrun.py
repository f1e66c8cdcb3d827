"""`--runtime torchrun` from end to end: ranks that the command line starts, and what is told when one fails."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import Command, Run, tells

import distquant as dq

SPOIL = """
import os, signal, time

what, rank = os.environ["SPOIL"].split(":")

def preadv(fd, buffers, offset, flags=0):
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError(5, "Input/output error")

if os.environ.get("RANK") == rank:
    if what == "late":
        time.sleep(8)
    else:
        os.preadv = preadv
"""
"""sitecustomize.py: on one rank reading fails, or ends the process; or that rank starts long after the others."""


@pytest.fixture
def spoil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`spoil("read:1")`: makes reading fail on rank 1 of the ranks that are started from now on."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SPOIL)

    def set_it(how: str) -> None:
        monkeypatch.setenv("PYTHONPATH", str(folder))
        monkeypatch.setenv("SPOIL", how)

    return set_it


def last_words(run: Run) -> Run:
    """The run without the progress that came before its failure, which must be all that it wrote."""
    lines = [line for line in run.err.splitlines() if not line.startswith(("loading: rank 0 ", "status: "))]
    return Run(run.code, run.out, "\n".join(lines) + "\n")


def test_load_starts_the_ranks_itself(kjv_tiny: str, command: Command, workdir: Path) -> None:
    arguments = ["--prompt", "In the beginning", "--max-new-tokens", "4", "--report", "report.json"]
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    done = command("load", kjv_tiny, "--quant", "nf4-dq", "--mesh", "tp=2", "--runtime", "torchrun", *arguments)
    assert done.code == 0
    assert {number: signal.getsignal(number) for number in signal.valid_signals()} == handlers
    report = json.loads((workdir / "report.json").read_text())
    assert (report["runtime"], report["mesh"], report["world_size"]) == ("torchrun", "tp=2", 2)
    assert [rank["rank"] for rank in report["ranks"]] == [0, 1]
    assert report["fingerprint"] == dq.fingerprint(dq.load(kjv_tiny, quantization_config="nf4-dq"))
    assert "\nIn the beginning" in done.out
    assert all(line.startswith("note: ") for line in done.err.splitlines())


def test_failure_of_a_rank_is_told_once(kjv_tiny: str, refused: Command, spoil) -> None:
    spoil("read:1")
    done = last_words(refused("load", kjv_tiny, "--mesh", "tp=2", "--runtime", "torchrun", "--io", "buffered"))
    assert (done.code, done.out) == (2, "")
    assert done.message.startswith("rank 1: model-00001-of-00003.safetensors at byte ")
    assert done.message.endswith("(model.embed_tokens.weight): Input/output error, after 3 new tries")


def test_killed_rank_is_named(kjv_tiny: str, refused: Command, spoil) -> None:
    spoil("kill:1")
    done = refused("load", kjv_tiny, "--mesh", "tp=2", "--runtime", "torchrun")
    tells(last_words(done), r"^rank 1: was killed by signal 9, and the other ranks were stopped\. If memory ran out")


def test_mesh_that_is_not_the_world_is_told_once(kjv_tiny: str, workdir: Path, spoil) -> None:
    """Under a launcher of the user's: what torch's launcher writes itself is its own. Rank 0 starts late here."""
    spoil("late:0")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    wanted = ["-m", "distquant", "load", kjv_tiny, "--mesh", "tp=3", "--quant", "nf5", "--report", "out.json"]
    done = subprocess.run([*launcher, *wanted], cwd=workdir, capture_output=True, text=True, timeout=600)
    told = done.stderr[done.stderr.index("distquant: ") :].splitlines()
    assert told[:2] == [
        "distquant: 2 problems:",
        "  1. mesh: tp=3 needs 3 ranks, the launcher started 2. Start 3 ranks, or give a mesh of 2",
    ]
    known = "Did you mean 'nf4'? Known names: none, nf4, nf4-dq, fp4, fp4-dq, int8, "
    assert told[2].startswith(f"  2. quantization_config: unknown quantization 'nf5'. {known}")
    assert done.stderr.count("needs 3 ranks") == 1
    assert "exitcode  : 2" in done.stderr
    assert "[rank" not in done.stderr
    assert list(workdir.iterdir()) == []
