"""What rows flow into when they are not quantized on the way: final memory, or a transposition first."""

from __future__ import annotations

import torch
from torch import Tensor

from distquant.schemes import Quantizer


class Placer:
    """Takes the rows of an unquantized tensor into its final memory."""

    def __init__(self, target: Tensor):
        self.target = target
        self.rows = target.view(-1, target.shape[-1]) if target.dim() > 1 else target.view(-1, 1)

    def update(self, rows: Tensor, start: int) -> None:
        self.rows[start : start + len(rows)] = rows.to(self.target.device)

    def finish(self) -> None:
        pass


class Transposer:
    """Gathers a weight that is stored `[in, out]` (GPT-2), then hands it to the quantizer the right way round."""

    def __init__(self, stored: tuple[int, int], dtype: torch.dtype, inner: Quantizer):
        self.whole, self.inner = torch.empty(stored, dtype=dtype), inner

    def update(self, rows: Tensor, start: int) -> None:
        self.whole[start : start + len(rows)] = rows

    def finish(self) -> None:
        self.inner.update(self.whole.t().contiguous(), 0)
        self.inner.finish()
