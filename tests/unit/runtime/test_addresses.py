"""The address and the interface that ranks listen on."""

from __future__ import annotations

import os
import re
import socket

import psutil
import pytest
from listening import listening, on_loopback

from distquant.errors import InputError
from distquant.runtime import addresses, meeting

VARIABLES = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES")


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Those of a rank of two that runs here, without what else a launcher sets; all are put back."""
    for name in (*VARIABLES, *addresses.NAMED, "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    with socket.socket() as free:
        free.bind((addresses.LOOPBACK, 0))
        port = str(free.getsockname()[1])
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_interfaces_are_those_of_this_machine() -> None:
    known = {
        name: {one.address.partition("%")[0] for one in found if one.family in (socket.AF_INET, socket.AF_INET6)}
        for name, found in psutil.net_if_addrs().items()
    }
    assert {name: set(found) for name, found in addresses.interfaces().items()} == {
        name: found for name, found in known.items() if found
    }
    assert addresses.interface_of("127.0.0.1") == addresses.interface_of("127.0.1.1") == "lo"
    assert addresses.interface_of("203.0.113.7") is None


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.1.1", "localhost"])
def test_a_store_listens_where_it_is_told_only(host: str) -> None:
    before = listening(psutil.Process())
    store = meeting.serve(host)
    opened = listening(psutil.Process()) - before
    assert [on_loopback(address) for address, _, _ in opened] == [True]
    meeting.connect(host, store.port, 10).set("key", "value")
    assert store.get("key") == b"value"


def test_rank_0_listens_where_the_others_go_only(variables: pytest.MonkeyPatch) -> None:
    before = listening(psutil.Process())
    store, rank, world = meeting.meet(10)
    assert (rank, world, store.port) == (0, 2, int(os.environ["MASTER_PORT"]))
    assert [on_loopback(address) for address, _, _ in listening(psutil.Process()) - before] == [True]
    assert os.environ[addresses.GLOO] == "lo"


def test_an_address_of_nobody_is_named(variables: pytest.MonkeyPatch) -> None:
    variables.setenv("MASTER_ADDR", "nobody.invalid")
    with pytest.raises(InputError, match=r"^MASTER_ADDR: rank 0 cannot meet the others at nobody\.invalid:"):
        meeting.meet(1)


def test_loopback_is_refused_where_ranks_are_elsewhere(variables: pytest.MonkeyPatch) -> None:
    variables.setenv("LOCAL_WORLD_SIZE", "1")
    fault = "MASTER_ADDR: 'localhost' is this machine alone (loopback), and some ranks are on others"
    with pytest.raises(InputError, match=re.escape(fault)):
        meeting.meet(1)


@pytest.mark.parametrize("variable", ["interface", addresses.GLOO])
def test_an_unknown_interface_is_named(variables: pytest.MonkeyPatch, variable: str) -> None:
    interface = "eth99" if variable == "interface" else None
    if interface is None:
        variables.setenv(variable, "eth99")
    fault = rf"^{variable}: 'eth99' is not a network interface with an address on .* here: lo"
    with pytest.raises(InputError, match=fault):
        meeting.meet(1, interface=interface)


WHERE = {
    (): None,
    (("LOCAL_WORLD_SIZE", "2"),): True,
    (("LOCAL_WORLD_SIZE", "1"),): False,
    (("OMPI_COMM_WORLD_LOCAL_SIZE", "1"),): False,
    (("SLURM_STEP_NUM_TASKS", "2"), ("SLURM_STEP_NUM_NODES", "1")): True,
    (("SLURM_STEP_NUM_TASKS", "2"), ("SLURM_STEP_NUM_NODES", "2")): False,
    (("SLURM_STEP_NUM_TASKS", "1"), ("SLURM_STEP_NUM_NODES", "1")): None,
}
"""What launchers set -> whether all ranks are here."""


@pytest.mark.parametrize("given", WHERE, ids=str)
def test_launchers_say_whether_all_ranks_are_here(
    variables: pytest.MonkeyPatch, given: tuple[tuple[str, str], ...]
) -> None:
    for name, value in given:
        variables.setenv(name, value)
    assert addresses.all_here() is WHERE[given]


def test_interfaces_that_the_user_has_named_are_kept(variables: pytest.MonkeyPatch) -> None:
    variables.setenv("LOCAL_WORLD_SIZE", "2")
    variables.setenv(addresses.GLOO, "lo")
    variables.setenv(addresses.NCCL, "eth7")
    addresses.place_ranks(None, "localhost")
    assert (os.environ[addresses.GLOO], os.environ[addresses.NCCL]) == ("lo", "eth7")
    addresses.place_ranks("lo", "localhost")
    assert (os.environ[addresses.GLOO], os.environ[addresses.NCCL]) == ("lo", "lo")
