"""Random plans on ranks that are threads: the right values, each byte read once a node, no deadlock, nothing left."""

from __future__ import annotations

import random
from threading import BrokenBarrierError

import pytest
import torch
from expected import expected, needed
from plans import Plans, random_scheme
from world import World, sometimes

import distquant.planning.reading as reading
import distquant.stream.files as files_module
from distquant.errors import RankError
from distquant.mesh import Mesh
from distquant.planning.reading import nodes_of

STAGINGS = [1, 64, 66 << 10, 70 << 10, 100 << 10, 1 << 20]
"""Bytes: none at all, a few hundred bytes a piece, and plenty."""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Tensors of a few hundred bytes are divided as if they were large, and retries do not wait."""
    monkeypatch.setattr(reading, "SHARE", 128)
    monkeypatch.setattr(files_module, "PAUSES", (0.001, 0.001, 0.001))


def random_world(seed: int, folder, **fixed) -> World:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    mesh = fixed.pop("mesh", None) or Mesh(dp=chance.choice([1, 1, 2]), tp=chance.randint(1, 3))
    plans = Plans(chance, random_scheme(chance), mesh.tp, fixed.pop("aligned", True))
    for _ in range(fixed.pop("count", None) or chance.randint(1, 9)):
        plans.add()
    infos = plans.write(folder)
    if chance.random() < 0.3:
        chance.shuffle(plans.tensors)
    chosen = {
        "nodes": nodes_of(mesh.size, chance.choice([None, None, 1, 2, 3])),
        "staging": chance.choice(STAGINGS),
        "delay": chance.choice([0, 0.001, 0.004]),
        "short": chance.random() < 0.3,
        "seed": seed,
        **fixed,
    }
    return World(mesh, tensors=plans.tensors, values=plans.values, cuts=plans.cuts, scheme=plans.scheme,
                 folder=folder, infos=infos, **chosen)  # fmt: skip


def assert_right(world: World) -> None:
    """Every rank has what slicing the whole tensors gives, and read what its node needs."""
    errors = [outcome.error for outcome in world.outcomes if outcome.error is not None]
    for error in sorted(errors, key=lambda e: isinstance(e, (BrokenBarrierError, RankError))):
        raise error
    for rank, outcome in enumerate(world.outcomes):
        assert outcome.order == list(range(len(world.tensors)))
        for tensor in world.tensors:
            for name, values in expected(world, tensor, rank).items():
                found = outcome.memory[tensor.name][name]
                assert torch.equal(found, values), f"rank {rank}: {tensor} {name!r}"


def assert_read_once(world: World) -> None:
    for node in set(world.nodes):
        wanted = needed(world, node)
        for file, found in world.counters[node].items():
            if world.short or world.mode == "direct":
                assert ((found > 0) >= (wanted[file] > 0)).all()
            else:
                assert (found == wanted[file]).all()
        if world.mode == "buffered":
            read = sum(o.read for rank, o in enumerate(world.outcomes) if world.nodes[rank] == node)
            assert read == sum(int(counts.sum()) for counts in wanted.values())


def delays(seed: int, seconds: float):
    chance = random.Random(seed)
    return lambda rank, place, tensor: sometimes(chance, seconds if place != "read" else 0)


@pytest.mark.parametrize("seed", range(36))
def test_random_plans(tmp_path, seed):
    world = random_world(seed, tmp_path, hook=delays(seed, random.Random(seed).choice([0, 0.002, 0.006])))
    world.run()
    assert_right(world)
    assert_read_once(world)
