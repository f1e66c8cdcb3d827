"""The third interface of a method: the local modules that hold stored components."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from distquant.quantization.linear.state import state_of
from distquant.sharding.shard import Shard

if TYPE_CHECKING:
    from torch import Tensor, nn


class ModuleFactory(ABC):
    """Makes local modules, fills them and reads them back."""

    constants: ClassVar[frozenset[str]] = frozenset()
    """Entries of a module's `state_dict` that describe how it is stored; reports do not count them as weights."""

    @abstractmethod
    def module(self, linear: nn.Module, shard: Shard) -> nn.Module:
        """Makes an empty module of the shard's size that takes `linear`'s place, with all its parameters on `meta`.

        It takes over `linear.bias`, which the loader fills, and reads `self.bias` in `forward` and nowhere else: a
        row-parallel module's bias is hidden during `forward` and added once, after the sum over ranks.
        """

    @abstractmethod
    def fill(self, shard: Shard, module: nn.Module, components: Mapping[str, Tensor]) -> None:
        """Puts packed components into an empty module; the memory is the module's to keep."""

    @abstractmethod
    def components(self, module: nn.Module) -> dict[str, Tensor]:
        """Reads the stored components back from a filled module."""

    def held_nbytes(self, module: nn.Module) -> int:
        """Bytes that a module holds of its weight."""
        return sum(value.nbytes for name, value in state_of(module) if name not in self.constants and name != "bias")

    def finish_model(self, model: nn.Module) -> None:  # noqa: B027  (most methods need no mark)
        """Sets the marks by which the ecosystem knows a model quantized by this method."""

    def unsaved(self, model: nn.Module) -> str | None:
        """Reason why `from_pretrained` would not load what `save_pretrained` writes of a model; None where it does."""
        return None
