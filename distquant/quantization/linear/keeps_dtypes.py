"""The base of modules whose buffers are components as a format stores them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self


class KeepsDtypes(nn.Module):
    """Casts of the model (`.half()`, `.to(dtype)`) leave its buffers alone: their dtypes are the format's."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept, self._buffers = self._buffers, {}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            moved = fn(value) if value is not None else None
            same = moved is None or value is None or moved.dtype == value.dtype
            self._buffers[name] = moved if same else value.to(moved.device)  # type: ignore[union-attr]
        return self
