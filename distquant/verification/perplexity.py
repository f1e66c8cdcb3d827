"""Perplexity: the cost of quantization in one number."""

from __future__ import annotations

import math
from typing import Any

import torch

WINDOW = 256
"""Tokens per window; windows do not overlap, and each is scored from its second token on."""


def perplexity(model: Any, tokenizer: Any, text: str, window: int = WINDOW) -> float:
    """Returns exp of the mean negative log-likelihood of `text` in windows of `window` tokens.

    On a sharded model all ranks must call it, and all get the same answer.

    Args:
        model: a causal language model of `transformers`.
        tokenizer: its tokenizer.
        text: at least two tokens long.
        window: tokens that the model sees at a time.
    """
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens, perplexity needs 2 or more")
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, window):
            part = ids[start : start + window].unsqueeze(0).to(model.device)
            if part.shape[1] < 2:
                break
            logits = model(part).logits[0, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits, part[0, 1:], reduction="sum")
            total, count = total + float(losses), count + part.shape[1] - 1
    return math.exp(total / count)
