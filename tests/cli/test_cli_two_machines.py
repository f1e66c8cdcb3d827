"""Ranks of two machines listen at the addresses by which they reach each other, and at no other.

The machines are two network namespaces, each with an interface of its own beside loopback. Both have the name of this
machine, and that name is often loopback's: the addresses that gloo and torch would choose lead nowhere, or everywhere.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from listening import heard, on_loopback, own_environment

pytestmark = [
    pytest.mark.wide,
    pytest.mark.skipif(
        not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("ip") is None,
        reason="network namespaces need root and iproute2",
    ),
]

PORT = "29517"
TALK = ["--prompt", "In the beginning", "--max-new-tokens", "60"]


def addresses(count: int = 2) -> list[str]:
    return [f"10.213.77.{number}" for number in range(1, count + 1)]


@pytest.fixture(scope="module")
def machines() -> Iterator[list[str]]:
    """Names of two network namespaces; each is joined to the other by the interface of its own name."""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    names = [f"dq{os.getpid()}{letter}" for letter in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
        for name, address in zip(names, addresses(), strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", name)
            for interface in (name, "lo"):
                ip("-n", name, "link", "set", interface, "up")
    except subprocess.CalledProcessError as error:
        _remove(names)
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode().strip()}")
    yield names
    _remove(names)


def _remove(names: list[str]) -> None:
    for name in names:  # the interfaces go with them
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def run_on(
    machines: list[str], commands: list[list[str]], variables: list[dict[str, str]]
) -> list[set[tuple[str, int, int]]]:
    """Runs a Python command on each machine; returns what each listened at."""
    with ExitStack() as stack:
        runs = [
            stack.enter_context(
                subprocess.Popen(
                    ["ip", "netns", "exec", machine, sys.executable, *arguments],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    env=own_environment(**own),
                )
            )
            for machine, arguments, own in zip(machines, commands, variables, strict=True)
        ]
        found = heard(runs)
        errors = [run.stderr.read().decode() for run in runs if run.stderr is not None]
    assert [run.returncode for run in runs] == [0, 0], "\n".join(error[-3000:] for error in errors)
    return found


def load(model: str, *more: str) -> list[str]:
    words = ["-m", "distquant", "load", model, "--quant", "nf4", "--mesh", "tp=2", "--runtime", "torchrun"]
    return [*words, "--timeout", "60", *TALK, *more]


def as_rank(rank: int, address: str) -> dict[str, str]:
    """Variables as a script for srun sets them for a rank that is alone on its machine."""
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return {**place, "MASTER_ADDR": address, "MASTER_PORT": PORT}


def hosts(found: list[set[tuple[str, int, int]]]) -> list[set[str]]:
    return [{address for address, _, _ in own} for own in found]


def test_ranks_listen_where_the_others_are(machines: list[str], kjv_tiny: str) -> None:
    first, second = addresses()
    variables = [as_rank(rank, first) for rank in range(2)]
    found = run_on(machines, [load(kjv_tiny)] * 2, variables)
    assert hosts(found) == [{first}, {second}]
    assert any(port == int(PORT) for _, port, _ in found[0]), "rank 0's store was not seen"


def test_an_interface_is_named_where_the_address_is_loopback(machines: list[str], kjv_tiny: str) -> None:
    """As on a machine whose name is loopback's, or where a controller gives rank 0 `localhost`."""
    first, second = addresses()
    commands = [load(kjv_tiny, "--interface", machine) for machine in machines]
    found = run_on(machines, commands, [as_rank(0, "localhost"), as_rank(1, first)])
    assert hosts(found) == [{first}, {second}]


def test_under_torchrun_ranks_listen_where_the_others_are(machines: list[str], kjv_tiny: str) -> None:
    """torchrun's own store is open to all networks. It has no option for that."""
    first, second = addresses()
    torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    torchrun += ["--rdzv-endpoint", f"{first}:{PORT}"]
    own_options = [["--local-addr", address, "--rdzv-conf", f"is_host={address == first}"] for address in addresses()]
    commands = [[*torchrun, *own, *load(kjv_tiny)] for own in own_options]
    found = run_on(machines, commands, [{}, {}])
    everywhere = [{process for address, _, process in own if address in ("::", "0.0.0.0")} for own in found]
    assert [len(processes) for processes in everywhere] == [1, 0], "torchrun's own, on the first machine"
    ranks = [
        {address for address, _, process in own if process not in everywhere[0] and not on_loopback(address)}
        for own in found
    ]
    assert ranks == [{first}, {second}]
