"""Ranks of a launcher take a device each, and two on one device are told by name."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import simulated

HERE = Path(__file__).resolve().parent


@pytest.mark.wide
def test_ranks_of_a_launcher_take_a_device_each(model_of):
    if simulated.compiler() is None:
        pytest.skip("no C++ compiler (g++) to build the simulated device with")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, str(HERE / "launched.py"), str(simulated.built()), model_of("llama-gqa")]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        running = []
        for rank in range(2):
            own = {**os.environ, **common, "RANK": str(rank), "OTHER": str(1 - rank)}
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            running.append(stack.enter_context(subprocess.Popen(command, env=own, **pipes)))
        outputs = [each.communicate(timeout=240) for each in running]
    assert [each.returncode for each in running] == [0, 0], outputs
    ranks = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    told = f"devices: ranks 0, 1 all take sim:0 of {socket.gethostname()} (SIM-0). Start one rank for each device, "
    assert all(each[0][0].startswith(told) for each in ranks)
    by_place, by_slurm, shared = ([each[case][0] for each in ranks] for case in (1, 2, 3))
    assert (by_place, by_slurm, shared) == (["sim:0", "sim:1"], ["sim:1", "sim:0"], ["sim:0", "sim:0"])
    assert len({part[1] for each in ranks for part in each[1:]}) == 1
