"""The stored components of bitsandbytes' `Linear4bit`, by which its method and our own subclass both read it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distquant.quantization.algorithms.nested_absmax import Statistics


def components_of(module: Any) -> dict[str, Tensor]:
    """Components of a filled `Linear4bit`; nested statistics always with `nested_quant_map`."""
    weight = module.weight
    state, codes = weight.quant_state, weight.data.contiguous().view(torch.uint8).view(-1)
    if not state.nested:
        return {"": codes, "absmax": state.absmax.float()}
    second = state.state2
    return {"": codes, **Statistics(None, state.absmax, second.absmax, state.offset, second.code).components()}
