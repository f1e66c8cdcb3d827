"""The local module of methods without one: gradients, moves, casts, and what must not be lost unnoticed."""

from __future__ import annotations

import copy

import pytest
import torch

import distquant as dq
from distquant.quantization.linear.quantized_linear import QuantizedLinear, WriteError

QUANT = "int4"


@pytest.fixture
def model(kjv_tiny):
    return dq.load(kjv_tiny, quantization_config=QUANT)


def layer(model) -> QuantizedLinear:
    found = model.model.layers[0].mlp.up_proj
    assert type(found) is QuantizedLinear
    return found


def test_forward_and_gradient_are_those_of_the_dequantized_weight(model):
    module = layer(model)
    x = torch.randn(3, module.in_features, dtype=torch.float32, requires_grad=True)
    weight = module.weight.clone().float()
    module(x).square().sum().backward()
    twin = x.detach().clone().requires_grad_()
    torch.nn.functional.linear(twin, weight).square().sum().backward()
    assert torch.equal(x.grad, twin.grad)


def test_casts_and_copies_keep_what_the_format_stores(model):
    before = dq.fingerprint(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert dq.fingerprint(copy.deepcopy(model)) == before
    model.model.layers[0].mlp.to(torch.float16)
    for name, value in layer(model).state_dict().items():
        expected = state[f"model.layers.0.mlp.up_proj.{name}"]
        assert value.dtype == expected.dtype and torch.equal(value, expected), name


def test_merging_adapters_is_an_error_and_no_loss(model):
    """PEFT adds the adapter to `weight`, which is computed at every access: what is added would be gone."""
    from peft import LoraConfig, get_peft_model

    before = dq.fingerprint(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    for safe in (False, True):
        with pytest.raises(WriteError, match="dequantize=True"):
            adapted.merge_and_unload(safe_merge=safe)
    assert dq.fingerprint(adapted) == before


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.add_(1),
        lambda w: w.data.add_(1),
        lambda w: w.detach().zero_(),
        lambda w: w.__setitem__(0, 1),
        lambda w: w.__iadd__(1),
        lambda w: setattr(w, "data", torch.zeros(1)),
    ],
)
def test_every_way_of_writing_is_refused(model, write):
    with pytest.raises(WriteError):
        write(layer(model).weight)


def test_reading_gives_ordinary_tensors(model):
    weight = layer(model).weight
    for value in (weight + 1, weight.float(), weight @ weight.t(), weight.clone(), torch.cat([weight, weight])):
        assert type(value) is torch.Tensor
    copied = torch.empty(weight.shape, dtype=weight.dtype)
    copied.copy_(weight)
    assert torch.equal(copied, weight)
