"""GPTQ, AWQ and AutoRound's packings: one fingerprint at every width, shards that are valid tensors of their formats."""

from __future__ import annotations

import shutil
from pathlib import Path

import packed_ranks
import pytest
import torch
import work
from packed_words import Kind, dense_weight, rewrite_packed, store_dense

import distquant as dq
from distquant.quantization.linear.gptqmodel_matmul import missing

ROUNDING = 2e-5
"""As in `test_logits`."""

ACT_ORDER = Kind(act_order=True)
KINDS: dict[str, tuple[str, Kind]] = {
    "gptq v1": ("llama-352", Kind()),
    "gptq v1 gqa": ("llama-gqa", Kind(group=64)),
    "gptq v2 2 bits": ("llama-352", Kind(bits=2, v1=False)),
    "gptq v1 3 bits": ("llama-352", Kind(bits=3)),
    "gptq v2 8 bits packed": ("phi3-packed", Kind(bits=8, v1=False)),
    "gptq one group": ("llama-352", Kind(group=-1)),
    "gptq ragged group": ("llama-352", Kind(group=128)),
    "gptq act order": ("llama-352", ACT_ORDER),
    "gptq act order packed": ("phi3-packed", ACT_ORDER),
    "gptq act order 3 bits ragged": ("llama-352", Kind(bits=3, group=64, act_order=True)),
    "gptq dynamic": ("llama-gqa", Kind(own={"down_proj": {"bits": 8, "group_size": 64}, "q_proj": {"desc_act": True}})),
    "gptq biases": ("qwen2-biases", Kind(index=False)),
    "awq": ("llama-352", Kind(method="awq")),
    "awq packed": ("phi3-packed", Kind(method="awq", group=128)),
    "awq one group": ("qwen2-biases", Kind(method="awq", group=-1)),
    "auto-round gptq": (
        "llama-gqa",
        Kind(method="auto-round", packing="auto_round:auto_gptq", index=False, own={"o_proj": {"bits": 8}}),
    ),
    "auto-round own": ("llama-352", Kind(method="auto-round", packing="auto_round:tritonv2", index=False, v1=False)),
    "auto-round awq": ("llama-352", Kind(method="auto-round", packing="auto_round:auto_awq")),
}


@pytest.fixture(scope="module")
def packed(model_of, tmp_path_factory):
    """Paths of a stored checkpoint and of its dense float32 twin."""
    root = tmp_path_factory.mktemp("packed")

    def paths(name: str) -> tuple[str, str]:
        family, kind = KINDS[name]
        folder, twin = root / name.replace(" ", "-"), root / f"{name.replace(' ', '-')}-dense"
        if not folder.exists():
            shutil.copytree(model_of(family), folder)
            shutil.copytree(model_of(family), twin)
            store_dense(twin, rewrite_packed(folder, kind))
        return str(folder), str(twin)

    return paths


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", KINDS)
def test_stored_checkpoints_have_one_fingerprint_at_every_width(ranks, packed, name):
    path, _ = packed(name)
    whole = work.fingerprint(path, None)
    for width in (3, 4):
        assert ranks.run(width, work.fingerprint, path, None, f"tp={width}") == [whole] * width


@pytest.mark.parametrize("name", KINDS)
def test_logits_equal_those_of_the_dense_weights(ranks, packed, name):
    path, twin = packed(name)
    truth = work.logits(twin, "none")
    assert distance(packed_ranks.logits(path), truth) < ROUNDING
    for found in ranks.run(2, packed_ranks.logits, path, "tp=2"):
        assert distance(found, truth) < ROUNDING


@pytest.mark.parametrize("name", KINDS)
def test_shards_are_tensors_of_their_format(ranks, packed, name):
    """Every shard, unpacked by itself with the index that it stores, is the slice of the whole weight.

    That two ranks have the fingerprint of one is seen here too.
    """
    path, _ = packed(name)
    kind = KINDS[name][1]
    plan = dq.plan(path, mesh="tp=2")
    tensors = {tensor.name.removesuffix(".weight"): tensor for tensor in plan.tensors}
    whole, _, _, fingerprint = packed_ranks.stored(path, None)
    for rank, (shards, nbytes, planned, own) in enumerate(ranks.run(2, packed_ranks.stored, path, None, "tp=2")):
        assert (nbytes, own) == (planned, fingerprint)
        assert shards.keys() == whole.keys()
        for module, shard in shards.items():
            tensor, packing = tensors[module], kind.of(module)
            assert shard.keys() == whole[module].keys()
            assert ("g_idx" in shard) == (kind.method == "gptq")
            dense = dense_weight(whole[module], packing)
            assert tensor.partition is not None and tensor.shard_dim is not None, f"{module} is not cut"
            pieces = [dense.narrow(tensor.shard_dim, a, b - a) for a, b in plan.partitions[tensor.partition].segments(rank)]
            assert torch.equal(dense_weight(shard, packing), torch.cat(pieces, tensor.shard_dim)), module


ON_THE_WAY = {
    "gptq-rtn": "gptq-rtn",
    "g32": {"quant_method": "gptq", "bits": 4, "group_size": 32},
    "asymmetric v2": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "checkpoint_format": "gptq_v2"},
    "2 bits": {"quant_method": "gptq", "bits": 2, "group_size": 32, "sym": False},
    "3 bits": {"quant_method": "gptq", "bits": 3, "group_size": 32, "sym": False},
    "8 bits": {"quant_method": "gptq", "bits": 8, "group_size": 64},
    "one group": {"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": False},
    "awq g32": {"quant_method": "awq", "bits": 4, "group_size": 32},
    "awq symmetric": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": False},
    "awq one group": {"quant_method": "awq", "bits": 4, "group_size": -1},
}


PACKED = ("g32", "asymmetric v2", "3 bits", "awq g32")
"""Of packed projections: cuts within qkv and gate_up meet each packing; other widths and groups are packed alike."""
ROUNDED = [("llama-352", (3, 4), name) for name in ON_THE_WAY] + [("phi3-packed", (3,), name) for name in PACKED]


@pytest.mark.parametrize(("family", "widths", "name"), ROUNDED)
def test_rounding_on_the_way_has_one_fingerprint_at_every_width(ranks, model_of, family, widths, name):
    path, quant = model_of(family), ON_THE_WAY[name]
    whole = work.fingerprint(path, quant)
    for width in widths:
        assert ranks.run(width, work.fingerprint, path, quant, f"tp={width}") == [whole] * width
    assert ranks.run(2, work.fingerprint_staged, path, quant, "tp=2", "1KiB") == [whole] * 2


@pytest.mark.parametrize("name", ["3 bits", "awq g32"])
def test_what_one_rank_saves_loads_again_at_every_width(ranks, model_of, tmp_path, name):
    model = dq.load(model_of("llama-gqa"), quantization_config=ON_THE_WAY[name])
    model.save_pretrained(tmp_path)
    whole = dq.fingerprint(model)
    assert dq.fingerprint(dq.load(tmp_path)) == whole
    assert ranks.run(3, work.fingerprint, str(tmp_path), None, "tp=3") == [whole] * 3


def test_stored_checkpoints_are_read_in_slices(ranks, packed):
    path, _ = packed("gptq v1")
    size = (Path(path) / "model.safetensors").stat().st_size
    read = ranks.run(4, work.bytes_read, path, None, "tp=4")
    assert sum(read) < 1.1 * size
    assert max(read) < 0.5 * size


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("gptq v1", "TorchAtenLinear: 14"),
        ("gptq v2 2 bits", "TorchLinear: 14"),
        ("awq", "TorchAtenAwqLinear: 14"),
        ("auto-round own", "TorchAtenLinear: 14"),
    ],
)
def test_gptqmodel_multiplies_each_rank_s_part(ranks, packed, name, kernel):
    """All is computed in bfloat16, by the ATen kernels with scales in it, too, and errs as ours does in bfloat16."""
    if (reason := missing()) is not None:
        pytest.skip(reason)
    path, _ = packed(name)
    whole, exact = dq.load(path, dtype="bfloat16"), packed_ranks.logits(path)
    with torch.no_grad():
        own = distance(whole(torch.tensor(work.IDS)).logits.float(), exact)
    for logits, told, fingerprint in ranks.run(2, packed_ranks.by_gptqmodel, path, "tp=2"):
        assert told == f"gptqmodel's {kernel} modules"
        assert distance(logits, exact) < 2 * own < 0.2
        assert fingerprint == dq.fingerprint(whole)


def test_gptqmodel_refuses_parts_of_groups_on_every_rank(ranks, packed):
    if (reason := missing()) is not None:
        pytest.skip(reason)
    path, _ = packed("gptq act order")
    for error in ranks.run(2, work.error_of, packed_ranks.by_gptqmodel, path, "tp=2"):
        assert isinstance(error, dq.InputError)
        assert "4 weights): inputs are split and in the order of their activations" in str(error)
