"""Checkpoints that transformers saved quantized load under any width, with the bits of quantizing on the fly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import work
from upstream import PREQUANTIZED, their_model

FAMILIES = ("llama-gqa", "llama-tied", "phi3-packed", "llama-352", "llama-96")
FEWER = {"fp4": ("llama-352",), "nf4-dq in bfloat16 words": ("llama-352", "llama-96")}
"""Families of kinds that are stored as nf4 and nf4-dq, with other values or in other words."""
CASES = [(family, kind) for kind in PREQUANTIZED for family in FEWER.get(kind, FAMILIES)]


@pytest.fixture(scope="module")
def saved(model_of, tmp_path_factory):
    """Path of a family's checkpoint as transformers and bitsandbytes save it quantized."""
    root = tmp_path_factory.mktemp("prequantized")

    def path(family: str, kind: str) -> str:
        folder = root / f"{family}-{kind.replace(' ', '-')}"
        if not folder.exists():
            their_model(model_of(family), *PREQUANTIZED[kind]).save_pretrained(folder)
            assert "quantization_config" in json.loads((folder / "config.json").read_text())
        return str(folder)

    return path


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_prequantized_has_the_bits_of_on_the_fly_at_every_width(ranks, model_of, saved, family, kind):
    name, storage = PREQUANTIZED[kind]
    path, truth = saved(family, kind), work.fingerprint(model_of(family), work.bnb(name, storage=storage))
    assert work.fingerprint(path, None) == truth
    for width in (2, 3, 4):
        assert ranks.run(width, work.fingerprint, path, None, f"tp={width}") == [truth] * width


@pytest.mark.parametrize("kind", ["nf4-dq", "int8"])
def test_prequantized_answers_as_on_the_fly(ranks, model_of, saved, kind):
    greedy = {"do_sample": False}
    truth = ranks.run(2, work.tokens_as_stored, model_of("llama-gqa"), work.bnb(PREQUANTIZED[kind][0]), "tp=2", greedy)
    assert ranks.run(2, work.tokens_as_stored, saved("llama-gqa", kind), None, "tp=2", greedy) == truth


def test_prequantized_is_read_in_slices(ranks, saved):
    """Each rank reads its own codes: together hardly more than the file holds."""
    path = saved("llama-gqa", "nf4-dq")
    size = sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
    read = ranks.run(4, work.bytes_read, path, None, "tp=4")
    assert sum(read) < 1.5 * size
    assert max(read) < 0.5 * size
