"""quanto's linear layer as distquant fills it: of a shard's size, and one that can be copied."""

from __future__ import annotations

import copy
from typing import Any

import torch
from optimum.quanto import QLinear, QTensor


class ShardLinear(QLinear):
    """A `QLinear` that `copy.deepcopy` works on: quanto 0.2.7's tensors cannot be cloned without dequantizing them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardLinear:
        weight: Any = self.weight
        if isinstance(weight, QTensor):
            memo[id(weight)] = torch.nn.Parameter(_cloned(weight), requires_grad=weight.requires_grad)
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made


def _cloned(tensor: Any) -> Any:
    """A copy of a tensor subclass, made of copies of the plain tensors in it."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return tensor.detach().clone()
    names, meta = tensor.__tensor_flatten__()
    inner = {name: _cloned(getattr(tensor, name)) for name in names}
    return type(tensor).__tensor_unflatten__(inner, meta, tensor.size(), tensor.stride())
