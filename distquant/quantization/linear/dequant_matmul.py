"""The product with a weight that is kept quantized, for all modules that dequantize in forward."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from distquant.kernels.choice import Kernel, choose


@cache
def ops_on(device: torch.device) -> Any:
    """The kernels that run in forward on a device."""
    return choose(Kernel.AUTO, device).ops


def dequant_matmul(
    x: Tensor, weight: Callable[[], Tensor], forward: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """`x @ W.T` in the dtype of `x`; the gradient flows to `x` alone, through `W`.

    Args:
        x: `[..., in]`.
        weight: gives `W`, `[out, in]` of any float dtype, whenever it is called: in forward, and again in backward, so
            that nothing of it is kept in between.
        forward: gives the product of `x` where a kernel computes it without `W`.
    """
    return _DequantMatmul.apply(x, weight, forward)


class _DequantMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Callable[[], Tensor], forward: Callable[[Tensor], Tensor] | None
    ) -> Tensor:
        ctx.weight = weight
        if forward is not None:
            return forward(x)
        return nn.functional.linear(x, weight().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ ctx.weight().to(grad.dtype), None, None
