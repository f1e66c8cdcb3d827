"""Products of many experts at once, where the device has a kernel for them (`torch.nn.functional.grouped_mm`).

As many experts' weights are dequantized together as a bound allows, in forward and again in backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

AT_ONCE = 256 << 20
"""Bytes of dequantized weights that one grouped product may hold; of one expert at least."""

ALIGN = 16
"""Bytes that the kernel wants rows of both operands to be multiples of."""

Weights = list[tuple[Callable[[], Tensor], int]]
"""What gives an expert's weight `[out, in]`, and how many rows are its."""


def has_kernel(rows: Tensor, shape: tuple[int, int]) -> bool:
    """Whether rows `[n, in]` can be multiplied with weights of this shape `[out, in]` by one kernel on their device."""
    if rows.device.type != "cuda" or rows.dtype != torch.bfloat16 or not hasattr(nn.functional, "grouped_mm"):
        return False
    aligned = all(size * rows.element_size() % ALIGN == 0 for size in shape)
    return aligned and torch.cuda.get_device_capability(rows.device) >= (8, 0)


def grouped_product(rows: Tensor, weights: Weights, at_once: int = AT_ONCE) -> Tensor:
    """`[n, out]`: every run of rows times its own expert's weight, transposed; the gradient flows to the rows alone.

    Args:
        rows: `[n, in]`, expert after expert.
        weights: of the experts that were hit, in order; their counts add up to `n`.
        at_once: bytes of dequantized weights to hold at a time.
    """
    dequant_matmul: Tensor = _Grouped.apply(rows, weights, at_once)
    return dequant_matmul


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Weights, at_once: int) -> Tensor:
        ctx.weights, ctx.at_once = weights, at_once
        return torch.cat(
            [_multiply(part, dense.transpose(1, 2), ends) for part, dense, ends in _parts(rows, weights, at_once)]
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        parts = _parts(grad.contiguous(), ctx.weights, ctx.at_once)
        return torch.cat([_multiply(part, dense, ends) for part, dense, ends in parts]), None, None


def _parts(rows: Tensor, weights: Weights, at_once: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows of some experts, their weights `[experts, out, in]`, and where each one's rows end (int32)."""
    held: list[Tensor] = []
    counts: list[int] = []
    start = 0
    for number, (weight, count) in enumerate(weights):
        held.append(weight().to(rows.dtype))
        counts.append(count)
        full = (len(held) + 1) * held[0].nbytes > at_once
        if full or number == len(weights) - 1:
            ends = torch.tensor(counts, device=rows.device).cumsum(0).to(torch.int32)
            stop = start + sum(counts)
            yield rows[start:stop], torch.stack(held), ends
            start, held, counts = stop, [], []


def _multiply(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    found: Tensor = nn.functional.grouped_mm(rows, weights, offs=ends)
    return found
