"""Tokens become text piece by piece: joined, the pieces are what decoding all tokens at once gives."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from distquant.runtime.answer import TextPieces

TEXTS = [
    "In the beginning God created the heaven and the earth.\n\n And the earth",
    "naïve 你好 🎉🎉, 한국어 — «ок»",
    "  two  spaces,\ttabs\nand lines \n",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", ["", "And God said"])
def test_pieces_are_the_text(kjv_tiny: str, text: str, prompt: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(kjv_tiny)
    context = tokenizer(prompt).input_ids if prompt else []
    tokens = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    found: list[str] = []
    pieces = TextPieces(tokenizer, context, found.append)
    pieces.put(torch.tensor([context]))
    for token in tokens:
        pieces.put(torch.tensor([token]))
    pieces.end()
    whole = tokenizer.decode(context + tokens, skip_special_tokens=True)
    assert prompt + "".join(found) == whole
    assert pieces.text == "".join(found)
    assert not any("\ufffd" in piece for piece in found)
    if text:
        assert len(found) > len(text) / 8, "held back without need"


def test_an_incomplete_character_is_handed_over_at_the_end(kjv_tiny: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(kjv_tiny)
    tokens = tokenizer("a🎉", add_special_tokens=False).input_ids[:-1]
    found: list[str] = []
    pieces = TextPieces(tokenizer, [], found.append)
    pieces.put(torch.tensor([[0]]))
    for token in tokens:
        pieces.put(torch.tensor([token]))
    assert found == ["a"]
    pieces.end()
    assert "".join(found) == tokenizer.decode(tokens)
