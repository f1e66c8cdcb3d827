"""GGUF files: the values of transformers' own loader, kept in blocks, with one fingerprint at every width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ggufs
import lora
import pytest
import torch
import work
from test_adapters import compare

import distquant as dq
from distquant.checkpoint.gguf import BLOCKS

DATA = Path(__file__).parents[1] / "data" / "gguf"
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
MIXED = {"ffn_down": "Q6_K", "attn_v": "Q5_K", "token_embd": "Q4_K", "output.weight": "Q6_K", "weight": "Q4_K"}


@pytest.fixture(scope="module")
def file_of(model_of, tmp_path_factory):
    """Path of a family's checkpoint as a GGUF file; `wide` has rows of 256 for K-types."""
    import models

    root = tmp_path_factory.mktemp("gguf")
    models.FAMILIES["wide"] = ("llama", WIDE)
    models.FAMILIES["wide-qwen2"] = ("qwen2", WIDE)

    def path(family: str, kinds: Any, architecture: str = "llama") -> str:
        name = kinds if isinstance(kinds, str) else "mixed"
        file = root / f"{family}-{name}.gguf"
        return str(file if file.exists() else ggufs.write_gguf(Path(model_of(family)), file, kinds, architecture))

    yield path
    for family in ("wide", "wide-qwen2"):
        models.FAMILIES.pop(family)


def theirs(path: str) -> Any:
    """transformers' model of a file, dequantized."""
    from transformers import AutoModelForCausalLM, GgufConfig

    file = Path(path)
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )


def dense(model: Any) -> dict[str, torch.Tensor]:
    """Every weight as values, by the parameter's name."""
    found = {name: value.detach() for name, value in model.named_parameters()}
    quantized = {n: m for n, m in model.named_modules() if type(m).__name__ == "QuantizedLinear"}
    return found | {f"{name}.weight": module.weight for name, module in quantized.items()}


def same_weights(path: str, **kwargs: Any) -> None:
    ours, upstream = dense(dq.load(path, **kwargs)), dict(theirs(path).named_parameters())
    assert ours.keys() == upstream.keys()
    for name, value in upstream.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("kind", BLOCKS)
def test_weights_are_those_of_transformers(file_of, kind):
    same_weights(file_of("wide", kind))


def test_every_tensor_has_its_own_type(file_of):
    path = file_of("wide", MIXED)
    same_weights(path)
    model = dq.load(path)
    assert model.model.layers[0].mlp.down_proj.components[""].shape == (256, 512 // 256 * 210)
    assert type(model.model.embed_tokens) is torch.nn.Embedding


@pytest.mark.parametrize("kind", ["Q4_0", "mixed"])
def test_dequantize_gives_plain_modules(file_of, kind):
    path, asked = file_of("wide", MIXED if kind == "mixed" else kind), {"quant_method": "gguf", "dequantize": True}
    same_weights(path, quantization_config=asked)
    model = dq.load(path, quantization_config=asked)
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear


def test_an_architecture_without_conversion(file_of):
    same_weights(file_of("wide-qwen2", "Q8_0", "qwen2"))


@pytest.mark.parametrize("kind", [*BLOCKS, "mixed"])
def test_fingerprint_is_the_same_at_every_width(ranks, file_of, kind):
    path = file_of("wide", MIXED if kind == "mixed" else kind)
    whole = work.fingerprint(path, None)
    for width in (2, 3, 4):
        assert ranks.run(width, work.fingerprint, path, None, f"tp={width}") == [whole] * width


def test_dequantized_on_the_way_is_the_same_at_every_width(ranks, file_of):
    path, asked = file_of("wide", MIXED), {"quant_method": "gguf", "dequantize": True}
    whole = work.fingerprint(path, asked)
    for width in (2, 3):
        assert ranks.run(width, work.fingerprint_staged, path, asked, f"tp={width}", "1KiB") == [whole] * width


def test_misaligned_cuts_are_moved_and_bytes_are_planned(ranks, file_of):
    """352 inputs are 11 blocks of 32: over two ranks 6 and 5."""
    path = file_of("llama-352", "Q4_0")
    plan = dq.plan(path, mesh="tp=2")
    assert plan.partitions[plan.modules["model.layers.0.mlp.down_proj"].partition].lengths == [192, 160]
    found = ranks.run(2, work.loaded, plan)
    assert [report.quantized_bytes for _, report in found] == [row.quantized for row in plan.memory]
    assert sum(report.bytes_read for _, report in found) < Path(path).stat().st_size
    assert {fingerprint for fingerprint, _ in found} == {work.fingerprint(path, None)}


def logits(path: str, mesh: str | None) -> torch.Tensor:
    with torch.no_grad():
        return dq.load(path, mesh=mesh)(torch.tensor(work.IDS)).logits


def test_logits_are_those_of_transformers_at_every_width(ranks, file_of):
    path = file_of("wide", MIXED)
    with torch.no_grad():
        upstream = theirs(path)(torch.tensor(work.IDS)).logits
    for width in (1, 2, 3):
        for found in ranks.run(width, logits, path, f"tp={width}"):
            torch.testing.assert_close(found, upstream, rtol=1e-4, atol=1e-4)


def test_adapters_learn_as_on_one_rank(ranks, file_of):
    path = file_of("wide", MIXED)
    whole = lora.train(path, None, None)
    compare(path, None, "tp=2", ranks.run(2, lora.train, path, None, "tp=2"), whole)


def test_golden_file(ranks):
    """A file that the package gguf wrote (`tests/data/make_gguf.py`), loaded here and by transformers."""
    path = str(DATA / "tiny.gguf")
    same_weights(path)
    whole = work.fingerprint(path, None)
    assert ranks.run(2, work.fingerprint, path, None, "tp=2") == [whole] * 2


def test_refusals(model_of, file_of, tmp_path):
    file_of("wide", "Q4_0")  # the family is written
    folder = Path(model_of("wide"))
    with pytest.raises(dq.InputError, match="'gemma2' weights are stored in another form"):
        dq.plan(str(ggufs.write_gguf(folder, tmp_path / "gemma.gguf", "Q4_0", "gemma2")))
    with pytest.raises(dq.InputError, match="'gguf' is a format of files"):
        dq.plan(str(folder), quantization_config={"quant_method": "gguf"})
    with pytest.raises(dq.InputError, match="architecture nonsense is not supported"):
        dq.plan(str(ggufs.write_gguf(folder, tmp_path / "nonsense.gguf", "Q4_0", "nonsense")))
