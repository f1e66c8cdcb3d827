"""Parameters built on `meta` get no initial values; others do."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from distquant.model.uninitialized import Uninitialized


class Drawn(TorchDispatchMode):
    """Counts the random numbers that are asked for."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func.overloadpacket in (torch.ops.aten.uniform_, torch.ops.aten.normal_)
        return func(*args, **(kwargs or {}))


def test_nothing_is_drawn_on_meta():
    with Drawn() as drawn:
        nn.Linear(3, 2, device="cpu")
        assert drawn.calls
        drawn.calls = 0
        with torch.device("meta"), Uninitialized():
            linear, embedding = nn.Linear(3, 2), nn.Embedding(5, 2)
        assert drawn.calls == 0
    assert linear.weight.is_meta and linear.weight.shape == (2, 3)
    assert embedding.weight.is_meta and embedding.weight.shape == (5, 2)


def test_what_is_not_on_meta_is_initialized():
    values = torch.zeros(4)
    with torch.device("meta"), Uninitialized():
        assert nn.init.ones_(values) is values
        assert nn.init.constant_(tensor=values, val=2.0) is values
    assert values.tolist() == [2.0] * 4
