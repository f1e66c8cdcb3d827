"""The one module that bitsandbytes lacks: a `Linear4bit` whose rows are no multiple of its block."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from distquant.kernels.choice import Kernel, choose


@cache
def _ops(device: torch.device) -> Any:
    return choose(Kernel.AUTO, device).ops


class _Dequantized(torch.autograd.Function):
    """`x @ W.T` with a weight that is dequantized in forward and again in backward, never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
        ctx.module = module
        return nn.functional.linear(x, dequantized(module).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ dequantized(ctx.module).to(grad.dtype), None


def dequantized(module: nn.Module) -> Tensor:
    """The weight of a `Linear4bit` by the flat definition, `[out, in]`, in the dtype that it was quantized from."""
    weight: Any = module.weight
    ops, state = _ops(weight.device), weight.quant_state
    absmax = state.absmax
    if state.nested:
        second = state.state2
        absmax = ops.dequantize_blockwise(absmax, second.absmax, second.code, second.blocksize) + state.offset
    codes = weight.data.contiguous().view(torch.uint8)
    return ops.dequantize_4bit(
        codes, absmax.float(), state.blocksize, state.quant_type, tuple(state.shape), dtype=state.dtype
    )


class StraddlingLinear4bit(Linear4bit):
    """A `Linear4bit` whose rows are no multiple of the block, where upstream's CPU kernel reads the wrong absmax."""

    def forward(self, x: Tensor) -> Tensor:
        inputs = x.to(self.compute_dtype) if self.compute_dtype is not None else x
        output = _Dequantized.apply(inputs, self)
        if self.bias is not None:
            output = output + self.bias.to(output.dtype)
        return output.to(x.dtype)
