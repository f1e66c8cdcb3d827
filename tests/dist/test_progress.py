"""Rank 0 sees the progress of all ranks, and nobody writes any where it is not shown."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import progressing
import pytest

from distquant.options import LoadProgress

SCRIPT = """
import sys, time, torch
torch.set_num_threads(1)
import distquant as dq
from distquant.loading.stream.engine import Engine

finish = Engine._finish_arrived


def slowly(self):
    finish(self)
    time.sleep(0.03)


Engine._finish_arrived = slowly
if __name__ == "__main__":
    {load}
"""
"""A load that takes long enough to be looked at."""


def test_rank_0_sees_all_ranks(ranks):
    seen = [[(1, 8, "read"), (2, 8, "quantize"), (3, 8, "")], [(4, 8, "read"), (5, 8, "read"), (6, 8, "read")]]
    found, *others = ranks.run(3, progressing.share, seen)
    nothing = [LoadProgress()] * 3
    assert found == [part for each in seen for part in (nothing, [LoadProgress(*one) for one in each])]
    assert others == [[], []]


def test_nothing_is_written_that_nobody_shows(ranks):
    assert ranks.run(2, progressing.share_with_nobody) == [False, False]


def on_terminal(command: list[str], folder: Path) -> str:
    """What a command writes to a terminal of 100 columns."""
    master, slave = pty.openpty()
    variables = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=slave, stderr=slave, env=variables, cwd=folder)
    os.close(slave)
    found = b""
    while True:
        try:
            found += os.read(master, 4096)
        except OSError:
            break
    os.close(master)
    assert process.wait(60) == 0, found.decode()
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", found.decode())


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LOADS = {
    "local": ("dq.load(sys.argv[1], quantization_config='nf4')", [sys.executable], 1),
    "torchrun": ("dq.load(sys.argv[1], quantization_config='nf4', mesh='tp=2')", TORCHRUN, 2),
    "ray": ("dq.ray.load(sys.argv[1], quantization_config='nf4', mesh='tp=2').close()", [sys.executable], 2),
}
"""The load, what runs it, and its ranks."""


@pytest.mark.parametrize("runtime", ["local", "torchrun", pytest.param("ray", marks=pytest.mark.wide)])
def test_a_terminal_shows_every_rank(kjv_tiny, tmp_path, runtime):
    load, command, count = LOADS[runtime]
    (tmp_path / "script.py").write_text(SCRIPT.replace("{load}", load))
    text = on_terminal([*command, "script.py", kjv_tiny], tmp_path)
    for rank in range(count):
        assert re.search(rf"rank {rank} .*%", text), text
    assert "planning" in text
    if runtime == "ray":
        assert "starting 2 workers" in text


def test_progress_false_shows_nothing(kjv_tiny, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT.replace("{load}", "dq.load(sys.argv[1], progress=False)"))
    assert on_terminal([sys.executable, "script.py", kjv_tiny], tmp_path) == ""
