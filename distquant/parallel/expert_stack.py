"""One projection of this rank's experts, quantized: the stored components of all of them as stacks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from distquant.config import torch_dtype
from distquant.memory import MEMORY
from distquant.quantization import QuantizedScheme, Shard
from distquant.quantization.linear.dequant_matmul import ops_on
from distquant.quantization.linear.keeps_dtypes import KeepsDtypes


class ExpertStack(KeepsDtypes):
    """One projection of this rank's experts, quantized: its components, `[experts, ...]` each, as buffers.

    Args:
        scheme: knows the format.
        shards: this rank's part of each of its experts, in order.
    """

    _is_hf_initialized = True

    def __init__(self, scheme: QuantizedScheme, shards: list[Shard]):
        super().__init__()
        self.scheme, self.shards = scheme, shards
        self.names: dict[str, str] = {}
        """Buffer -> its component; torch allows no dots in the names of buffers."""

    def __len__(self) -> int:
        return len(self.shards)

    def home(self, name: str, number: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns memory for `count` elements of a component of a local expert, flat: a part of the stack's."""
        if name not in self.__dict__.setdefault("homes", {}):
            self.__dict__["homes"][name] = MEMORY.empty(len(self) * count, dtype, device).view(len(self), count)
        memory: Tensor = self.__dict__["homes"][name][number]
        return memory

    def take(self, number: int, components: Mapping[str, Tensor]) -> None:
        """Holds the components of a local expert; those that lie in the stack's own memory stay where they are."""
        for name, value in components.items():
            leaf = name.replace(".", "_") or "weight"
            if leaf not in self._buffers:
                self.register_buffer(leaf, self._stack_like(name, number, value))
                self.names[leaf] = name
            stack = self._buffers[leaf]
            assert stack is not None
            own = stack[number]
            if own.data_ptr() != value.data_ptr():
                own.copy_(value)

    def _stack_like(self, name: str, number: int, value: Tensor) -> Tensor:
        """Returns memory for a component of all experts: the stack's own, if one expert's value is already there."""
        home = self.__dict__.get("homes", {}).get(name)
        shape = (len(self), *value.shape)
        in_place = home is not None and home[number].data_ptr() == value.data_ptr() and value.numel() == home.shape[1]
        return home.view(value.dtype).view(shape) if in_place else value.new_empty(shape)

    def release_unused(self) -> None:
        """Frees memory that no component uses; call it when all experts are there."""
        self.__dict__.pop("homes", None)

    def components(self, number: int) -> dict[str, Tensor]:
        """Returns the stored components of a local expert, by name."""
        stored = ((name, value) for name, value in self._buffers.items() if value is not None)
        return {self.names[name]: value[number] for name, value in stored}

    def dequantized(self, number: int) -> Tensor:
        """Returns a local expert's weight, `[local out, local in]` in the dtype that it was quantized from."""
        shard, components = self.shards[number], self.components(number)
        ops = ops_on(next(iter(components.values())).device)
        return self.scheme.dequantize(shard, components, torch_dtype(shard.dtype), ops)

    def forward(self, number: int) -> Tensor:
        """Does the same as `dequantized`, but as a call of the module: hooks that move its components then run."""
        return self.dequantized(number)

    def extra_repr(self) -> str:
        rows, columns = self.shards[0].local_shape
        return f"experts={len(self)}, in_features={columns}, out_features={rows}, scheme={self.scheme.name}"
