"""Random plans on ranks that are threads: the right values, each byte read once a node, no deadlock, nothing left."""

from __future__ import annotations

import random
from threading import BrokenBarrierError

import pytest
import torch
from expected import expected, needed
from plans import Plans, Tiles, random_scheme
from world import World, sometimes

import distquant.loading.stream.files as files_module
import distquant.planning.read_assignment as reading
from distquant.checkpoint import TensorInfo
from distquant.errors import InputError, RankError
from distquant.model.description import Source
from distquant.planning import Partition, even_partition
from distquant.planning.load_plan import TensorPlan
from distquant.planning.read_assignment import nodes_of
from distquant.sharding.layout import Component
from distquant.sharding.mesh import Mesh

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
    return World(mesh, tensors=plans.tensors, values=plans.values, partitions=plans.partitions, scheme=plans.scheme,
                 folder=folder, infos=infos, **chosen)  # fmt: skip


def assert_right(world: World) -> None:
    """Every rank has the slices of the whole tensors, and read the bytes that its node needs."""
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


def test_random_plans_are_of_every_kind(tmp_path):
    """The seeds above cover all kinds."""
    found = set()
    for seed in range(36):
        (tmp_path / str(seed)).mkdir()
        world = random_world(seed, tmp_path / str(seed))
        found |= {f"{world.mesh.dp} x {world.mesh.tp}", f"{len(set(world.nodes))} nodes", f"staging {world.staging}"}
        found |= {"statistics"} if world.scheme.whole else set()
        for tensor in world.tensors:
            found |= {
                f"dim {tensor.shard_dim}",
                f"{len(tensor.sources)} sources",
                tensor.scheme,
                f"{len(tensor.shape)} dims",
            }
            found |= {"transposed"} if tensor.transposed else set()
            found |= {"repeated"} if tensor.partition and world.partitions[tensor.partition].repeated else set()
    expected_kinds = {"1 x 1", "1 x 2", "1 x 3", "2 x 1", "2 x 2", "2 x 3", "1 nodes", "2 nodes"}
    expected_kinds |= {"statistics", "dim None", "dim 0", "dim 1", "1 sources", "2 sources", "none", "tiles"}
    expected_kinds |= {"1 dims", "2 dims", "3 dims", "transposed", "repeated"}
    expected_kinds |= {f"staging {size}" for size in STAGINGS}
    assert expected_kinds <= found


def lying_at(folder, start: int, mesh: Mesh, mode: str, cast: bool) -> World:
    """Three bfloat16 and right behind them float32, from a byte of a file that is a multiple of nothing."""
    values = {"a": torch.arange(3).bfloat16(), "b": torch.arange(40).float(), "c": torch.arange(12).bfloat16()}
    raw = {name: value.view(torch.uint8).numpy().tobytes() for name, value in values.items()}
    (folder / "0.bin").write_bytes(bytes(start) + b"".join(raw.values()))
    infos, tensors = {}, []
    for name, value in values.items():
        kind = "F32" if name == "b" else "BF16"
        infos[name] = TensorInfo(
            name=name, dtype=kind, shape=value.shape, file="0.bin", offset=start, nbytes=len(raw[name])
        )
        start += len(raw[name])
        dtype = "float32" if cast == (name != "b") else "bfloat16"
        tensors.append(TensorPlan(name, tuple(value.shape), dtype, "none", (Source(name),)))
    values = {tensor.name: values[tensor.name].to(getattr(torch, tensor.dtype)) for tensor in tensors}
    return World(mesh, (0,) * mesh.size, tensors, values, {}, Tiles(()), folder, infos, 1 << 20, mode=mode)


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("mode", ["buffered", "direct"])
@pytest.mark.parametrize("mesh", [Mesh(), Mesh(dp=2)])
@pytest.mark.parametrize("start", [16, 18, 19])
def test_tensors_that_lie_across_the_grid_of_their_elements(tmp_path, start, mesh, mode, cast):
    """The format lets them: a header of any length, and tensors of any dtype one behind the other."""
    world = lying_at(tmp_path, start, mesh, mode, cast)
    if mode == "direct":
        files = files_module.Files(tmp_path, "direct")
        try:
            files.is_direct("0.bin")
        except InputError as error:
            pytest.skip(str(error))
        finally:
            files.close()
    world.run()
    assert_right(world)


@pytest.mark.parametrize(
    "partition", [even_partition(8, 1, 2), Partition(4, (((0, 1), (2, 3)), ((1, 2), (3, 4)))).scaled(2)]
)
def test_transposed_weight_that_is_partitioned_over_its_rows(tmp_path, partition):
    """Its rows are columns of the file: the rank that reads them reads all, and sends what others keep."""
    value = torch.arange(8 * 6).reshape(8, 6).float()
    (tmp_path / "0.bin").write_bytes(value.T.contiguous().numpy().tobytes())
    infos = {"t": TensorInfo(name="t", dtype="F32", shape=(6, 8), file="0.bin", offset=0, nbytes=value.nbytes)}
    tensors = [TensorPlan("t", (8, 6), "float32", "tiles", (Source("t"),), 0, "t", True)]
    scheme = Tiles((Component(name="", dtype="uint8"),))
    world = World(
        Mesh(tp=2), (0, 0), tensors, {"t": value}, {"t": partition}, scheme, tmp_path, infos, 1 << 20, timeout=2.0
    )
    world.run()
    assert_right(world)
    assert_read_once(world)
