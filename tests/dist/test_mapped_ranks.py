"""Ranks that map their weights have the bits of those that read them, and share the page cache's memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch.distributed as dist
import work
from upstream import PREQUANTIZED, their_model

import distquant as dq
import distquant.loading.mapped as mapped_module

MAPPED = {"io": "mapped"}


def run(ranks, path: str, mesh: str, **kwargs) -> list:
    """Reports of all ranks; their fingerprint is that of one rank that reads."""
    plan = dq.plan(path, mesh=mesh, **kwargs)
    results = ranks.run(plan.mesh.size, work.loaded, plan, MAPPED)
    assert {fingerprint for fingerprint, _ in results} == {work.fingerprint(path, None, io="buffered")}
    return [report for _, report in results]


@pytest.mark.parametrize(
    ("family", "mesh", "kwargs"),
    [
        ("llama-gqa", "tp=2", {}),
        ("llama-gqa", "tp=4", {}),  # two kv heads on four ranks
        ("llama-96", "tp=3", {}),
        ("phi3-packed", "tp=2", {}),  # rows of q, k and v in one weight: several runs for each rank
        ("llama-tied", "dp=2,tp=2", {"ranks_per_node": 2}),
    ],
)
def test_ranks_map_their_own_runs(ranks, model_of, family: str, mesh: str, kwargs) -> None:
    reports = run(ranks, model_of(family), mesh, **kwargs)
    assert all(report.mapped_bytes > 0 and report.bytes_read > 0 for report in reports)
    kept = [report.unquantized_bytes for report in reports]
    # The rest of what a rank keeps are columns, which no rank has as one run.
    assert all(report.mapped_bytes < nbytes for report, nbytes in zip(reports, kept, strict=True))


def test_replicas_map_everything(ranks, model_of) -> None:
    for report in run(ranks, model_of("llama-gqa"), "dp=2"):
        assert (report.bytes_read, report.bytes_sent, report.bytes_received) == (0, 0, 0)
        assert report.mapped_bytes == report.unquantized_bytes


@pytest.mark.parametrize("mesh", ["ep=2", "dp=2"])
def test_experts_are_read_and_the_rest_is_mapped(ranks, moe_of, mesh: str) -> None:
    for report in run(ranks, moe_of("mixtral"), mesh):
        assert report.mapped_bytes > 0
        assert report.bytes_read > 0


@pytest.mark.parametrize("kind", ["nf4-dq", "int8"])
def test_stored_components_are_mapped(ranks, model_of, tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    their_model(model_of("llama-gqa"), *PREQUANTIZED[kind]).save_pretrained(path)
    for report in run(ranks, str(path), "tp=2"):
        assert report.mapped_bytes  # the others begin where their kernels may not read them
    (alone,) = run(ranks, str(path), "tp=1")
    assert alone.mapped_bytes
    assert alone.mapped_bytes + alone.bytes_read >= alone.quantized_bytes + alone.unquantized_bytes


def _one_cannot(plan: dq.LoadPlan) -> tuple[str, object]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapped_module, "is_local", lambda fd: dist.get_rank() == 0)
        return work.loaded(plan)


def test_what_one_rank_cannot_map_all_read(ranks, model_of) -> None:
    """Each rank that keeps a row must know alike if it comes from another one."""
    path = model_of("llama-gqa")
    results = ranks.run(2, _one_cannot, dq.plan(path, mesh="dp=2"))
    assert {fingerprint for fingerprint, _ in results} == {work.fingerprint(path, None)}
    assert [report.mapped_bytes for _, report in results] == [0, 0]


def _memory(path: str, io: str) -> tuple[int, int]:
    """Bytes that a load adds to this process's proportional share of memory when all ranks have it, and its weights."""
    mesh = f"dp={dist.get_world_size()}"
    dq.load(path, mesh=mesh)  # what the first load of a process allocates for good
    dist.barrier()
    before = _share()
    dist.barrier()
    model = dq.load(path, mesh=mesh, io=io)
    weights = list(model.parameters())
    for value in weights:
        value.sum()
    dist.barrier()
    added = _share() - before
    dist.barrier()
    return added, sum(value.nbytes for value in weights)


def _share() -> int:
    return int(re.search(r"^Pss:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)[1]) * 1024


def test_two_ranks_take_the_memory_of_one(ranks, large: str) -> None:
    """Pages that no one writes to are in memory once: a rank's proportional share of them is half."""
    for io, times in (("mapped", 1), ("buffered", 2)):
        results = ranks.run(2, _memory, large, io)
        nbytes = results[0][1]
        assert abs(sum(share for share, _ in results) - times * nbytes) < 0.3 * nbytes, io


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> str:
    """So large that its weights stand out of what else a load allocates: 64 MiB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("large")
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 1, "vocab_size": 30_000}
    config = LlamaConfig(**shape, num_attention_heads=8, tie_word_embeddings=False, dtype="bfloat16")
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return str(folder)
