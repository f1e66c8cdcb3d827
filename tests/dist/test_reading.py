"""Each byte is read once a node, whatever the mesh; the way it is read leaves no trace; a rank that ends is named."""

from __future__ import annotations

import json
import shutil
import tempfile
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
import work
from ranks import Ranks

import distquant as dq
from distquant.checkpoint import open_checkpoint
from distquant.errors import InputError
from distquant.kernels.choice import choose
from distquant.loading.stream.files import Files
from distquant.loading.stream.stage_timer import STAGES
from distquant.planning.row_map import column_segments, row_segments, rows_and_width

QUANTS = ("none", "nf4-dq", "int8")
BUFFERED = {"io": "buffered"}
CASES = [
    ("llama-gqa", "tp=2"),
    ("llama-gqa", "tp=4"),  # two kv heads on four ranks
    ("llama-gqa", "dp=2"),
    ("llama-gqa", "dp=2,tp=2"),
    ("llama-96", "tp=4"),  # kv heads that one rank repeats, absmax blocks that straddle rows
    ("phi3-packed", "tp=2"),
    ("phi3-packed", "dp=2,tp=2"),
    ("llama-tied", "tp=2"),
]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> str:
    """Stored `[in, out]`: read as it is, turned, and quantized."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2") / "model"
    torch.manual_seed(0)
    shape = {"vocab_size": 100, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=1, eos_token_id=2)).save_pretrained(folder)
    return str(folder)


def run(ranks, plan: dq.LoadPlan, **kwargs) -> tuple[str, list]:
    """The fingerprint of all ranks, and their reports."""
    found = ranks.run(plan.mesh.size, work.loaded, plan, kwargs)
    assert len({fingerprint for fingerprint, _ in found}) == 1
    return found[0][0], [report for _, report in found]


def weight_bytes(path: str) -> int:
    """Bytes of all tensors; the models here use every one."""
    return sum(info.nbytes for info in open_checkpoint(path).tensors.values())


def read_once(ranks, path: str, quant: str, mesh: str) -> list:
    plan = dq.plan(path, quantization_config=quant, mesh=mesh)
    fingerprint, reports = run(ranks, plan, **BUFFERED)
    assert fingerprint == work.fingerprint(path, quant)
    assert sum(report.bytes_read for report in reports) == weight_bytes(path)
    assert [report.bytes_read for report in reports] == [row.read for row in plan.memory]
    assert [report.direct_bytes for report in reports] == [0] * len(reports)
    assert_handed_over(reports)
    return reports


def assert_handed_over(reports: list) -> None:
    """What is taken was sent; a piece is taken by at most all other ranks."""
    sent, received = (sum(getattr(r, name) for r in reports) for name in ("bytes_sent", "bytes_received"))
    assert (sent > 0) == (received > 0)
    assert received <= sent * max(len(reports) - 1, 0)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize(("family", "mesh"), CASES)
def test_each_byte_is_read_once(ranks, model_of, family, mesh, quant):
    read_once(ranks, model_of(family), quant, mesh)


@pytest.mark.parametrize("quant", QUANTS)
def test_each_byte_of_turned_weights_is_read_once(ranks, gpt2, quant):
    read_once(ranks, gpt2, quant, "dp=2")


def test_replicas_hand_over_half_of_the_model_each(ranks, model_of):
    """Weights that stay as they are: what one read, the other gets, and not a byte more."""
    path = model_of("llama-gqa")
    reports = read_once(ranks, path, "none", "dp=2")
    assert [r.bytes_sent for r in reports] == [r.bytes_read for r in reports]
    assert [r.bytes_received for r in reports] == [r.bytes_read for r in reversed(reports)]
    assert max(r.bytes_read for r in reports) < 0.7 * weight_bytes(path)


def test_a_lone_rank_hands_over_nothing(model_of):
    report = dq.load(model_of("llama-gqa"), quantization_config="nf4-dq").distquant.report
    assert (report.bytes_sent, report.bytes_received) == (0, 0)


# -- nodes -------------------------------------------------------------------------------------------------------------


def kept_on(plan: dq.LoadPlan, node: int, itemsize: int = 2) -> int:
    """Bytes that a node must read: rows of which its ranks keep something, and the run of columns that they need."""
    positions = [plan.mesh.coordinates(rank)["tp"] for rank, its in enumerate(plan.nodes) if its == node]
    total = 0
    for tensor in plan.tensors:
        partition = plan.partitions[tensor.partition] if tensor.partition else None
        rows, columns = set(), set()
        for tp in positions:
            rows |= {r for a, b in row_segments(tensor.shape, tensor.shard_dim, partition, tp) for r in range(a, b)}
            columns |= {c for a, b in column_segments(tensor.shape, tensor.shard_dim, partition, tp) for c in (a, b)}
        assert max(columns, default=0) <= rows_and_width(tensor.shape)[1]
        total += len(rows) * (max(columns) - min(columns)) * itemsize
    return total


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("per_node", [1, 2, 3])
@pytest.mark.parametrize("family", ["llama-gqa", "llama-96"])
def test_nodes_read_what_they_keep(ranks, model_of, family, per_node, quant):
    path = model_of(family)
    plan = dq.plan(path, quantization_config=quant, mesh="tp=4", ranks_per_node=per_node)
    fingerprint, reports = run(ranks, plan, **BUFFERED)
    assert fingerprint == work.fingerprint(path, quant)
    assert [report.bytes_read for report in reports] == [row.read for row in plan.memory]
    for node in set(plan.nodes):
        read = sum(report.bytes_read for report in reports if plan.nodes[report.rank] == node)
        assert kept_on(plan, node) <= read <= weight_bytes(path)
        if quant == "none":
            assert read == kept_on(plan, node)


def test_ranks_alone_on_their_nodes_hand_over_nothing_unquantized(ranks, model_of):
    plan = dq.plan(model_of("llama-gqa"), quantization_config="none", mesh="tp=2", ranks_per_node=1)
    _, reports = run(ranks, plan)
    assert [(r.bytes_sent, r.bytes_received) for r in reports] == [(0, 0), (0, 0)]


# -- how ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", QUANTS)
def test_reading_past_the_page_cache_leaves_no_trace(ranks, model_of, quant):
    path = model_of("llama-gqa")
    files = Files(Path(path), "direct")
    try:
        files.is_direct("model.safetensors")
    except InputError as error:
        pytest.skip(str(error))
    finally:
        files.close()
    plan = dq.plan(path, quantization_config=quant, mesh="tp=2", staging="512KiB")
    fingerprint, reports = run(ranks, plan, io="direct")
    assert fingerprint == work.fingerprint(path, quant)
    assert all(report.direct_bytes > 0 for report in reports)


@pytest.mark.parametrize("quant", ["nf4-dq", "int8"])
def test_kernels_leave_no_trace(ranks, model_of, quant):
    path = model_of("llama-96")
    plan = dq.plan(path, quantization_config=quant, mesh="tp=2")
    automatic = choose("auto", torch.device("cpu")).kernel.value  # `cpu` where the native kernels are built
    for kernel in {"reference", automatic, "auto"}:
        fingerprint, reports = run(ranks, plan, kernel=kernel)
        assert fingerprint == work.fingerprint(path, quant)
        name = automatic if kernel == "auto" else kernel
        assert all(report.kernel.startswith(name) for report in reports), [report.kernel for report in reports]


@pytest.mark.parametrize("quant", ["none", "nf4-dq"])
def test_trace(ranks, model_of, tmp_path, quant):
    file = tmp_path / "trace.json"
    plan = dq.plan(model_of("llama-gqa"), quantization_config=quant, mesh="tp=2")
    fingerprint, reports = run(ranks, plan, trace=str(file), **BUFFERED)
    assert fingerprint == work.fingerprint(model_of("llama-gqa"), quant)
    events = json.loads(file.read_text())["traceEvents"]
    work_done = [event for event in events if event["ph"] == "X"]
    names = {(e["pid"], e["args"]["name"]) for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    assert names == {(rank, stage) for rank in (0, 1) for stage in STAGES}
    assert {event["cat"] for event in work_done} == {"read", "place", "exchange"} | (
        {"quantize", "copy"} if quant != "none" else set()
    )
    for rank, report in enumerate(reports):
        mine = [event for event in work_done if event["pid"] == rank]
        assert sum(e["args"]["bytes"] for e in mine if e["cat"] == "read") == report.bytes_read
        assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in mine)
        assert all(STAGES[event["tid"]] == event["cat"] for event in mine)
        for stage in STAGES:
            busy = sum(event["dur"] for event in mine if event["cat"] == stage) / 1e6
            assert busy == pytest.approx(report.stages[stage], abs=1e-6)


# -- ranks that end ----------------------------------------------------------------------------------------------------


def planned(path: str, mesh: str) -> dq.LoadPlan:
    return dq.plan(path, quantization_config="nf4-dq", mesh=mesh, staging="128KiB")


@pytest.mark.parametrize("fault", [ValueError("boom"), KeyboardInterrupt("boom")])
def test_rank_that_raises_is_named_on_all(ranks, model_of, fault):
    """Also Ctrl-C on one rank. No thread, file or memory is left on any, and the ranks can load again."""
    plan = planned(model_of("llama-gqa"), "tp=3")
    kind = type(fault).__name__
    for rank, (raised, text, left) in enumerate(ranks.run(3, work.load_with_a_fault, plan, 1, fault)):
        assert (raised, text) == ((kind, "boom") if rank == 1 else ("RankError", f"rank 1 failed: {kind}: boom"))
        assert left == []
    run(ranks, plan)


class Mortal(Ranks):
    """Ranks of which some may die: the others' answers are waited for all the same."""

    def run_survivors(self, world: int, function, *arguments, timeout: float = 300) -> dict[int, object]:
        self._start(world)
        pipes = {rank: pipe for rank, (_, pipe) in enumerate(self._workers)}
        folder = tempfile.mkdtemp()
        for rank, pipe in pipes.items():
            pipe.send((function, arguments, rank, world, f"{folder}/store", 1))
        found: dict[int, object] = {}
        while len(found) < world:
            ready = wait([pipe for rank, pipe in pipes.items() if rank not in found], timeout)
            assert ready, f"only ranks {sorted(found)} have ended within {timeout} s"
            for rank, pipe in pipes.items():
                if pipe in ready:
                    try:
                        found[rank] = pipe.recv()[1]
                    except EOFError:
                        found[rank] = None
        shutil.rmtree(folder)
        return found


def test_rank_that_is_killed_is_named_on_the_others(model_of):
    """Not by the timeout, which is that of a cluster, and would be told in other words."""
    pool = Mortal()
    try:
        found = pool.run_survivors(3, work.load_and_be_killed, planned(model_of("llama-gqa"), "tp=3"), 1)
    finally:
        pool.close()
    assert found[1] is None
    for rank in (0, 2):
        assert found[rank] == ("RankError", "rank 1 failed: ended during the load")
