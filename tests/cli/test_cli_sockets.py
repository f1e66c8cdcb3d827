"""What listens while ranks of one machine load: nothing that another machine could reach."""

from __future__ import annotations

import socket
import subprocess
import sys
from contextlib import ExitStack

import pytest
from listening import heard, on_loopback, own_environment

TALK = ["--prompt", "In the beginning", "--max-new-tokens", "60"]


def command(model: str, runtime: str) -> list[str]:
    return ["-m", "distquant", "load", model, "--quant", "nf4", "--mesh", "tp=2", "--runtime", runtime, *TALK]


def heard_of(commands: list[list[str]], environments: list[dict[str, str]]) -> list[set[tuple[str, int, int]]]:
    """What Python processes that end well listened at."""
    with ExitStack() as stack:
        runs = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, *arguments],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    env=own_environment(**own),
                )
            )
            for arguments, own in zip(commands, environments, strict=True)
        ]
        found = heard(runs)
        errors = [run.stderr.read().decode() for run in runs if run.stderr is not None]
    assert [run.returncode for run in runs] == [0] * len(runs), "\n".join(error[-3000:] for error in errors)
    return found


@pytest.mark.parametrize("runtime", ["torchrun", "ray"])
def test_ranks_of_one_machine_listen_on_loopback_only(kjv_tiny, runtime):
    (found,) = heard_of([command(kjv_tiny, runtime)], [{}])
    assert len({process for _, _, process in found}) > 1, "neither the store nor a rank was seen"
    assert [one for one in sorted(found) if not on_loopback(one[0])] == []


@pytest.mark.wide
def test_under_torchrun_nothing_but_its_own_store_listens_elsewhere(kjv_tiny):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    (found,) = heard_of([[*torchrun, *command(kjv_tiny, "torchrun")]], [{}])
    open_to_all = {process for address, _, process in found if not on_loopback(address)}
    ranks = {process for address, _, process in found if on_loopback(address)}
    assert len(open_to_all) == 1, "torchrun's own"
    assert len(ranks - open_to_all) == 2


@pytest.mark.wide
def test_ranks_that_meet_where_variables_say_listen_there_only(kjv_tiny):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    found = heard_of([command(kjv_tiny, "torchrun")] * 2, [{**meet, "RANK": str(rank)} for rank in range(2)])
    assert any(one[1] == port for one in found[0]), "rank 0's store was not seen"
    assert [one for own in found for one in sorted(own) if not on_loopback(one[0])] == []
