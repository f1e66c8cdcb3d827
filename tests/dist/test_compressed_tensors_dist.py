"""compressed-tensors at every width, against the library's own files, and back to transformers."""

from __future__ import annotations

import json
from pathlib import Path

import compressed
import lora
import pytest
import torch
import work

import distquant as dq

DATA = Path(__file__).parents[1] / "data" / "compressed_tensors"
GOLDEN = ("int4", "int4-zeros", "int8-w8a8", "int8-naive", "fp8-static", "fp8-block", "mixed")
ON_THE_WAY = ("int4", "int4-zeros", "int8-w8a8", "int8-naive", "fp8-block")
ROUNDING = 2e-5
"""Of float32 sums in another order, see test_logits.py."""
LEARNING = 5e-5
"""The same for gradients, see test_adapters.py."""


PACKED = ("int4-zeros", "fp8-tensor", "fp8-blocks", "mixed")
"""Ways of packed projections: zero points, a statistic of the whole weight, tiles, and several groups."""
CASES = [("llama-352", way) for way in compressed.WAYS] + [("phi3-packed", way) for way in PACKED]


@pytest.mark.parametrize(("family", "way"), CASES)
def test_fingerprint_and_bytes_on_the_way_at_every_width(ranks, model_of, family, way):
    path, quant = model_of(family), compressed.WAYS[way]
    whole, planned, held = compressed.loaded(path, quant)
    assert planned == held
    for width in (2, 3, 4):
        found = ranks.run(width, compressed.loaded, path, quant, f"tp={width}")
        assert [fingerprint for fingerprint, *_ in found] == [whole] * width
        assert all(planned == held for _, planned, held in found)


@pytest.mark.parametrize("way", compressed.WAYS)
@pytest.mark.parametrize("family", ["llama-352", "phi3-packed"])
def test_every_projection_is_cut(model_of, family, way):
    """Without this, equal fingerprints would prove nothing."""
    plan = dq.plan(model_of(family), quantization_config=compressed.WAYS[way], mesh="tp=2")
    assert [t.name for t in plan.tensors if t.scheme != "none" and t.partition is None] == []


@pytest.mark.parametrize("quant", ["int4", compressed.BLOCKS])
def test_groups_and_blocks_of_128_with_biases(ranks, model_of, quant):
    path = model_of("qwen2-biases")
    whole, *_ = compressed.loaded(path, quant)
    assert [found for found, *_ in ranks.run(2, compressed.loaded, path, quant, "tp=2")] == [whole] * 2
    plan = dq.plan(path, quantization_config=quant, mesh="tp=2")
    partitions = {t.name: plan.partitions[t.partition].lengths for t in plan.tensors if t.scheme != "none" and t.partition}
    assert partitions["model.layers.0.mlp.down_proj.weight"] == [128, 128]
    truth = compressed.logits(path, quant)
    for found in ranks.run(2, compressed.logits, path, quant, "tp=2"):
        assert float((found - truth).abs().max() / truth.abs().max()) < ROUNDING


def test_misaligned_cuts_are_moved(model_of):
    plan = dq.plan(model_of("llama-352"), quantization_config=compressed.WAYS["int4"], mesh="tp=2")
    tensor = next(t for t in plan.tensors if t.name == "model.layers.0.mlp.down_proj.weight")
    assert plan.partitions[tensor.partition].lengths == [192, 160]


def test_ways_have_different_fingerprints(model_of):
    found = {way: compressed.loaded(model_of("llama-gqa"), quant)[0] for way, quant in compressed.WAYS.items()}
    assert len(set(found.values())) == len(found)


@pytest.mark.parametrize("way", ["int4-zeros", "int8-tensor", "fp8-blocks"])
def test_small_staging_leaves_no_trace(ranks, model_of, way):
    path, quant = model_of("llama-352"), compressed.WAYS[way]
    found = ranks.run(2, work.fingerprint_staged, path, quant, "tp=2", "1KiB")
    assert found == [compressed.loaded(path, quant)[0]] * 2


# -- files of the library ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GOLDEN)
def test_golden_files_at_every_width(ranks, kind):
    path = str(DATA / kind)
    whole, planned, held = compressed.loaded(path, None)
    assert planned == held
    for width in (2, 3, 4):
        found = ranks.run(width, compressed.loaded, path, None, f"tp={width}")
        assert [fingerprint for fingerprint, *_ in found] == [whole] * width
        assert all(planned == held for _, planned, held in found)


@pytest.mark.parametrize("kind", ON_THE_WAY)
def test_on_the_way_gives_the_bits_of_the_golden_files(kind):
    stored = json.loads((DATA / kind / "config.json").read_text())["quantization_config"]
    ours, files = compressed.state(str(DATA / "unquantized"), stored), compressed.state(str(DATA / kind), None)
    assert ours.keys() == files.keys()
    assert [name for name in ours if not work.same_bits(ours[name], files[name])] == []


@pytest.mark.parametrize("kind", GOLDEN)
def test_golden_weights_and_logits_are_those_of_transformers(kind):
    path, zeros = str(DATA / kind), kind == "int4-zeros"
    them = compressed.theirs(path, torch.bfloat16, dequantize=zeros)
    for name, weight in compressed.dequantized(path).items():
        assert torch.equal(weight, them.get_submodule(name).weight), name
    if not zeros:  # their dequantized weights are in the dtype of the file, so float32 would differ
        them = compressed.theirs(path, torch.float32)
        with torch.no_grad():
            truth = them(torch.tensor(work.IDS) % them.config.vocab_size).logits
        assert float((compressed.logits(path, None) - truth).abs().max() / truth.abs().max()) < ROUNDING


@pytest.mark.parametrize("kind", ["int4-zeros", "fp8-static", "mixed"])
def test_golden_logits_over_two_ranks(ranks, kind):
    whole = compressed.logits(str(DATA / kind), None)
    for found in ranks.run(2, compressed.logits, str(DATA / kind), None, "tp=2"):
        assert float((found - whole).abs().max() / whole.abs().max()) < ROUNDING


@pytest.mark.parametrize("kind", GOLDEN)
def test_one_rank_holds_the_tensors_of_the_file(kind):
    from safetensors.torch import load_file

    state, stored = compressed.state(str(DATA / kind), None), load_file(DATA / kind / "model.safetensors")
    assert state.keys() - {"lm_head.weight"} == stored.keys()
    assert [name for name in stored if not work.same_bits(state[name], stored[name])] == []


def test_shards_hold_their_own_shape(ranks):
    name = "model.layers.0.mlp.down_proj.weight_"
    states = ranks.run(2, compressed.state, str(DATA / "int4-zeros"), None, "tp=2")
    assert [state[name + "shape"].tolist() for state in states] == [[64, 64], [64, 32]]
    assert [tuple(state[name + "packed"].shape) for state in states] == [(64, 8), (64, 4)]
    assert [tuple(state[name + "zero_point"].shape) for state in states] == [(8, 2), (8, 1)]
    assert not any(value.is_meta for state in states for value in state.values())


# -- back to transformers, and training --------------------------------------------------------------------------------


@pytest.mark.parametrize("way", compressed.WAYS)
def test_what_one_rank_saves_loads_in_transformers(model_of, tmp_path, way):
    quant, zeros = compressed.WAYS[way], way == "int4-zeros"
    model = dq.load(model_of("llama-gqa"), quantization_config=quant)
    model.save_pretrained(tmp_path)
    assert dq.fingerprint(dq.load(tmp_path)) == dq.fingerprint(model)
    them = compressed.theirs(str(tmp_path), torch.bfloat16, dequantize=zeros)
    for name in model.distquant.plan.converted:
        assert torch.equal(model.get_submodule(name).weight, them.get_submodule(name).weight), name
    with torch.no_grad():
        ids = torch.tensor(work.IDS)
        assert torch.equal(model(ids).logits, them(ids).logits)


@pytest.mark.parametrize("way", ["int4", "fp8-blocks", "mixed"])
def test_lora_learns_what_it_does_on_one_rank(ranks, model_of, way):
    path, quant = model_of("llama-gqa"), compressed.WAYS[way]
    logits, loss, gradients = compressed.train(path, quant)
    plan = dq.plan(path, quantization_config=quant, mesh="tp=2")
    for rank, (theirs, their_loss, found) in enumerate(ranks.run(2, compressed.train, path, quant, "tp=2")):
        assert float((theirs - logits).abs().max() / logits.abs().max()) < LEARNING
        assert their_loss == pytest.approx(loss, rel=LEARNING)
        for (module, side), truth in gradients.items():
            assert truth.abs().max() > 1e-6
            partition = lora.partition_of(plan, module, side)
            parts = [truth.narrow(partition[0], a, b - a) for a, b in partition[1].segments(rank)] if partition else [truth]
            expected = torch.cat(parts, partition[0] if partition else 0)
            assert float((found[module, side] - expected).abs().max() / truth.abs().max()) < LEARNING
