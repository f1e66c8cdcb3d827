"""The truth about quantized experts: transformers' own model, each expert's weights put through the method as a linear's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import work
from torch import Tensor, nn

import distquant as dq
from distquant.kernels import reference
from distquant.loading.loader import scheme_of
from distquant.quantization import Scheme, Shard


def quantized_linear(scheme: Scheme, name: str, weight: Tensor) -> tuple[nn.Module, Shard]:
    """The method's own module for an `nn.Linear` of this weight `[out, in]`, quantized whole on one rank."""
    shape = (weight.shape[0], weight.shape[1])
    shard = Shard(name, shape, str(weight.dtype).removeprefix("torch."))
    flowing = scheme.encoded_components(name, shape, shard.dtype)
    parts = {c.name: torch.empty(c.shape(shape), dtype=getattr(torch, c.dtype)).view(-1) for c in flowing}
    scheme.encode(name, weight.contiguous(), parts, reference)
    module = scheme.module(nn.Linear(shape[1], shape[0], bias=False, device="meta"), shard)
    scheme.load_encoded(shard, module, parts, reference)
    return module, shard


def as_linear(scheme: Scheme, name: str, weight: Tensor) -> Tensor:
    """What a linear of this weight means once it is quantized, `[out, in]` in the weight's dtype."""
    module, shard = quantized_linear(scheme, name, weight)
    return scheme.dequantized(module, shard, reference).clone().to(weight.dtype)


def weights_of(model: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Name and value `[out, in]` of a plan's weight in transformers' model: one, or one for each expert of a stack."""
    if ".*." not in name:
        yield name, model.get_parameter(name).data
        return
    owner, _, leaf = name.partition(".*.")
    experts, projection = model.get_submodule(owner), leaf.removesuffix(".weight")
    for number in range(len(experts.down_proj)):
        parts = {part: value.data[number] for part, value in experts.named_parameters() if part.endswith("_proj")}
        wide, down = parts.get("gate_up_proj"), parts["down_proj"]
        if wide is not None and wide.shape[1] == 2 * down.shape[0]:
            parts = {part: value.t() for part, value in parts.items()}
        elif wide is not None:
            parts["gate_proj"], parts["up_proj"] = wide.chunk(2)
        yield name.replace("*", str(number), 1), parts[projection]


def reference_model(path: str, quant: Any) -> Any:
    """transformers' model in float32, with the values that the quantized weights of a plan mean."""
    from transformers import AutoModelForCausalLM

    plan = dq.plan(path, quantization_config=quant, dtype="float32")
    scheme = scheme_of(plan)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for tensor in plan.tensors:
        if tensor.scheme != "none":
            for name, weight in weights_of(model, tensor.name):
                weight.copy_(as_linear(scheme, name, weight))
    return model


def reference_logits(path: str, quant: Any) -> Tensor:
    with torch.no_grad():
        return reference_model(path, quant)(torch.tensor(work.IDS)).logits
