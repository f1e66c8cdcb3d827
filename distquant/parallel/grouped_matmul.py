"""Multiplies rows with many experts at once, where the device has a kernel for it (`torch.nn.functional.grouped_mm`).

As many experts' weights are dequantized together as a bound allows, in forward and again in backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from distquant.accelerator.facts import reaches

AT_ONCE = 256 << 20
"""Bytes of dequantized weights that one grouped product may hold; of one expert at least."""

ALIGN = 16
"""Alignment in bytes that the kernel needs for the rows of both operands."""

CAPABILITY = (8, 0)
"""Least CUDA compute capability that the kernel runs on."""

Weights = list[tuple[Callable[[], Tensor], int]]
"""For each expert a function that returns its weight `[out, in]`, and how many rows it has."""


def has_kernel(rows: Tensor, shape: tuple[int, int]) -> bool:
    """Returns True if one kernel on their device multiplies rows `[n, in]` with weights of this shape `[out, in]`."""
    if rows.dtype != torch.bfloat16 or not hasattr(nn.functional, "grouped_mm"):
        return False
    aligned = all(size * rows.element_size() % ALIGN == 0 for size in shape)
    return aligned and reaches(rows.device, CAPABILITY)


def grouped_matmul(rows: Tensor, weights: Weights, at_once: int = AT_ONCE) -> Tensor:
    """Returns `[n, out]`: each run of rows times its expert's weight, transposed; gradients flow to the rows alone.

    Args:
        rows: `[n, in]`, sorted by expert.
        weights: of the experts that were hit, in order; their counts add up to `n`.
        at_once: bytes of dequantized weights to hold at a time.
    """
    outputs: Tensor = _Grouped.apply(rows, weights, at_once)
    return outputs


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Weights, at_once: int) -> Tensor:
        # Keep the functions, not their weights: backward dequantizes again, so no weight outlives its product.
        ctx.weights, ctx.at_once = weights, at_once
        return torch.cat(
            [_multiply(part, dense.transpose(1, 2), ends) for part, dense, ends in _parts(rows, weights, at_once)]
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        parts = _parts(grad.contiguous(), ctx.weights, ctx.at_once)
        return torch.cat([_multiply(part, dense, ends) for part, dense, ends in parts]), None, None


def _parts(rows: Tensor, weights: Weights, at_once: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields rows of some experts, their weights `[experts, out, in]`, and the ends of each one's rows (int32)."""
    held: list[Tensor] = []
    counts: list[int] = []
    start = 0
    for number, (weight, count) in enumerate(weights):
        held.append(weight().to(rows.dtype))
        counts.append(count)
        # Stop before the next weight would exceed the bound; all have one shape, and one alone is always allowed.
        full = (len(held) + 1) * held[0].nbytes > at_once
        if full or number == len(weights) - 1:
            ends = torch.tensor(counts, device=rows.device).cumsum(0).to(torch.int32)
            stop = start + sum(counts)
            yield rows[start:stop], torch.stack(held), ends
            start, held, counts = stop, [], []


def _multiply(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    outputs: Tensor = nn.functional.grouped_mm(rows, weights, offs=ends)
    return outputs
