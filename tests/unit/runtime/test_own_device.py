"""Ranks take the devices of their place on a node, and two on one device are told by name."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

import distquant as dq
from distquant.environment import Environment
from distquant.planning.runtime_memory import communicators, notes
from distquant.runtime import process_group
from distquant.runtime.collectives import collect, share
from distquant.runtime.measure import weakest
from distquant.runtime.own_device import (
    SHARED,
    VISIBLE_DEVICES,
    Place,
    check_places,
    hide_devices,
    number_on_node,
    place_of,
)
from distquant.sharding.mesh import Mesh

LAUNCHERS = ("LOCAL_RANK", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")


@pytest.fixture
def launched(monkeypatch):
    """Sets a launcher's variables, and no others."""

    def set_(**given: str) -> None:
        for name in LAUNCHERS:
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)

    return set_


NODES = (0, 1, 0, 1)
"""Ranks that a scheduler has dealt out in turn."""


@pytest.mark.parametrize(
    ("variables", "number"),
    [
        ({"LOCAL_RANK": "3", "SLURM_LOCALID": "2", "SLURM_STEP_NUM_TASKS": "4"}, 3),
        ({"SLURM_LOCALID": "2", "SLURM_STEP_NUM_TASKS": "4"}, 2),
        ({"SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"}, 1),  # one task, which has started all ranks itself
        ({"SLURM_LOCALID": "0"}, 1),
        ({}, 1),
    ],
)
def test_number_on_a_node_by_launcher_then_by_place(launched, variables, number):
    launched(**variables)
    assert number_on_node(2, NODES) == number


def test_each_rank_of_a_node_has_a_number_of_its_own(launched):
    launched()
    assert [number_on_node(rank, NODES) for rank in range(4)] == [0, 0, 1, 1]


def gpu(host: str, index: int, identity: str) -> Place:
    return Place(host, f"cuda:{index}", identity)


def test_ranks_on_one_device_are_all_named(monkeypatch):
    monkeypatch.delenv(SHARED, raising=False)
    places = [
        gpu("a", 0, "GPU-1"),
        gpu("a", 0, "GPU-2"),
        gpu("a", 0, "GPU-1"),
        gpu("b", 1, "GPU-3"),
        gpu("b", 1, "GPU-3"),
    ]
    with pytest.raises(dq.InputError) as caught:
        check_places(places)
    assert [problem.what for problem in caught.value.problems] == [
        "ranks 0, 2 all take cuda:0 of a (GPU-1)",
        "ranks 3, 4 all take cuda:1 of b (GPU-3)",
    ]
    monkeypatch.setenv(SHARED, "1")
    check_places(places)


def test_ranks_without_a_device_of_the_others_kind_are_named():
    places = [gpu("a", 0, "GPU-1"), Place("b", "cpu"), Place("b", "cpu")]
    with pytest.raises(dq.InputError) as caught:
        check_places(places)
    (problem,) = caught.value.problems
    assert problem.what == "ranks have devices of different kinds (cuda: rank 0 (a); cpu: ranks 1, 2 (b))"


def test_cpus_and_devices_without_a_name_may_be_shared():
    check_places([Place("a", "cpu"), Place("a", "cpu")])
    check_places([Place("a", "npu:0"), Place("a", "npu:0")])  # each may see its own alone
    assert place_of(torch.device("cpu")).identity is None


def test_workers_without_gpus_see_none(monkeypatch):
    for name in VISIBLE_DEVICES:
        monkeypatch.setenv(name, "0,1")
    hide_devices()
    assert {os.environ[name] for name in VISIBLE_DEVICES} == {""}


def test_the_weakest_rank_counts_and_differences_are_told():
    ranks = [
        Environment(device_type="cuda", capability=(9, 0), memory=80, memory_source="free on the device"),
        Environment(device_type="cuda", capability=(9, 0), memory=20, memory_source="free on the device"),
        Environment(device_type="cuda", capability=(8, 0), memory=40, memory_source="free on the device"),
    ]
    found = weakest(ranks)
    assert (found.memory, found.capability, found.differing) == (20, (8, 0), ((8, 0), (9, 0)))
    assert found.memory_source == "free on the device, rank 1 has least"
    same = weakest(ranks[:1] * 2)
    assert same == ranks[0]


@pytest.mark.parametrize(("mesh", "count"), [(1, 0), ("dp=4", 0), ("tp=2", 1), ("dp=2,tp=2", 1), ("ep=2,tp=2", 3)])
def test_communicators_of_a_model(mesh, count):
    assert communicators(Mesh.parse(mesh)) == count


def test_a_declared_limit_is_told_what_to_leave_free():
    def told(mesh: str, **fields) -> list[str]:
        return list(notes(Mesh.parse(mesh), Environment(memory=1 << 30, memory_source="max_memory", **fields)))

    nccl = "and NCCL about 688 MiB for each communicator (1); max_memory is to leave them free"
    assert told("tp=2", capability=(9, 0)) == [f"not counted: a CUDA context takes about 534 MiB, {nccl}"]
    alone = "not counted: a CUDA context takes about 534 MiB; max_memory is to leave them free"
    assert told("dp=2", device_type="cuda") == [alone]
    assert told("tp=2") == told("tp=2", device_type="cpu") == []
    measured = Environment(device_type="cuda", memory=1 << 30, memory_source="free on the device")
    assert list(notes(Mesh(), measured)) == []


@pytest.fixture
def gpus_only():
    """A default process group that takes tensors of GPUs alone, as a caller's of NCCL does."""
    dist.init_process_group("cuda:gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_callers_group_of_gpus_alone_gets_one_beside_it(gpus_only):
    with pytest.raises(RuntimeError, match="No backend type associated with device type cpu"):
        dist.broadcast(torch.zeros(1), 0)
    side = process_group.for_host_tensors()
    assert side is not None
    assert process_group.for_host_tensors() is side, "made once"
    assert (collect({"a": 1}, side), share([2], side)) == ([{"a": 1}], [2])
    # Groups of some ranks, too, are not of the default group's backend. `generate` shares a random state of the CPU.
    axis = process_group.GroupAxis(process_group.make_group([0], 60.0), (0,), 0)
    assert torch.equal(axis.broadcast(torch.get_rng_state()), torch.get_rng_state())


def test_a_group_that_takes_tensors_of_the_cpu_is_used_as_it_is():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert process_group.for_host_tensors() is None
    finally:
        dist.destroy_process_group()
