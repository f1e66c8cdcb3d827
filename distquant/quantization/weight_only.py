"""What methods share whose weights are kept as the format stores them and dequantized in forward.

Such a method declares its layout and says how its components become a weight. Slices, sizes, the local module, the
checks of stored shapes and the load of pre-quantized checkpoints follow. A method that also quantizes on the way fills
`encode`, and `pack` where what flows from rank to rank is not yet what is stored.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distquant.errors import Problem
from distquant.quantization.linear.quantized_linear import QuantizedLinear
from distquant.quantization.scheme import Scheme, Stream
from distquant.sharding.shard import Shard

FLOATS = ("F32", "BF16", "F16")
"""Safetensors' dtypes that scales may have."""


class WeightOnlyScheme(Scheme):
    """`QuantizedLinear` of local size. Components have the names of their checkpoints; "" is `weight`."""

    stacks: ClassVar[bool] = True
    unmoved: ClassVar[Mapping[str, str]] = {}

    # -- what a method says ----------------------------------------------------------------------------------------

    @abstractmethod
    def dequantize(self, shard: Shard, components: Mapping[str, Tensor], dtype: torch.dtype, ops: Any) -> Tensor:
        """The weight, `dtype` `shard.local_shape`, from its components in their stored local shapes."""

    @abstractmethod
    def fingerprint_streams(self, shard: Shard, components: Mapping[str, Tensor]) -> Iterable[Stream]:
        """What the fingerprint counts: unpacked codes, and scales and zeros as the kernel uses them."""

    def pack(self, shard: Shard, parts: dict[str, Tensor], ops: Any) -> dict[str, Tensor]:
        """The stored local components, from what flowed (flat); by default what flowed is what is stored."""
        return self.shaped(shard, parts)

    def pack_prequantized(self, shard: Shard, parts: dict[str, Tensor], whole: frozenset[str]) -> dict[str, Tensor]:
        """The local components, from those of a pre-quantized weight (flat); `whole` are those that were not cut."""
        return self.shaped(shard, parts)

    def float8_matmul(self, shard: Shard, components: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """`x @ W.T` by the weight's `float8_kernel`, `[..., out]` from `[..., in]`."""
        raise NotImplementedError(f"{self.name} has no weights for products in float8")

    # -- what follows ----------------------------------------------------------------------------------------------

    def stored_shape(self, component: str, shard: Shard, dtype: str | None = None) -> tuple[int, ...]:
        """Shape of a component of the shard."""
        found = self.layout(shard.name, shard.local_shape, dtype or shard.dtype).component(component)
        return found.shape(shard.local_shape)

    def shaped(self, shard: Shard, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Flat components in the local shapes of the layout; what the layout does not know is left out."""
        known = {component.name: component for component in self.layout(*self._local(shard)).components}
        return {
            name: value.view(known[name].shape(shard.local_shape)) for name, value in parts.items() if name in known
        }

    @classmethod
    def quantizes(cls) -> bool:
        return cls.encode is not WeightOnlyScheme.encode

    def check_stored(self, name: str, shape: tuple[int, ...], stored: dict[str, tuple[int, ...]]) -> list[Problem]:
        found = []
        for component in self.layout(name, shape, "float32").components:
            label = component.name or "weight"
            if component.name not in stored:
                what = f"the checkpoint lacks {label} of this quantized weight"
                found.append(Problem(name, what, "Download the checkpoint again, or quantize the original"))
                continue
            expected = component.shape(shape)
            if math.prod(stored[component.name]) != math.prod(expected):
                what = (
                    f"{label} is stored as {list(stored[component.name])}, its config and shape need {list(expected)}"
                )
                found.append(Problem(name, what, "The checkpoint is of another model or method; check config.json"))
        return found

    def module(self, linear: nn.Module, shard: Shard) -> nn.Module:
        module = QuantizedLinear(self, shard, linear.bias)  # type: ignore[arg-type]
        components = self.layout(*self._local(shard)).components
        module.take(
            {
                c.name: torch.empty(c.shape(shard.local_shape), dtype=getattr(torch, c.dtype), device="meta")
                for c in components
            }
        )
        return module

    def encode(self, name: str, rows: Tensor, out: dict[str, Tensor], ops: Any) -> None:
        raise NotImplementedError(f"{self.name} is not quantized on the way")

    def load_encoded(self, shard: Shard, module: Any, parts: dict[str, Tensor], ops: Any) -> None:
        module.take(self.pack(shard, parts, ops))

    def load_prequantized(self, shard: Shard, module: Any, parts: dict[str, Tensor], whole: frozenset[str]) -> None:
        module.take(self.pack_prequantized(shard, parts, whole))

    def components(self, module: Any) -> dict[str, Tensor]:
        return module.components

    def finish_model(self, model: Any) -> None:
        mark_quantized(model, self)

    @staticmethod
    def _local(shard: Shard) -> tuple[str, tuple[int, int], str]:
        return shard.name, shard.local_shape, shard.dtype


def wrong_dtypes(name: str, dtypes: Mapping[str, str], allowed: Mapping[str, tuple[str, ...]]) -> list[Problem]:
    """Stored components whose dtype (safetensors' spelling) is none of those allowed."""
    return [
        Problem(
            name,
            f"{component or 'weight'} is stored as {dtypes[component]}, and must be {' or '.join(kinds)}",
            "The checkpoint is of another method or damaged; check config.json",
        )
        for component, kinds in allowed.items()
        if component in dtypes and dtypes[component] not in kinds
    ]


def mark_quantized(model: Any, scheme: Scheme) -> None:
    """What `from_pretrained` leaves on a quantized model, as far as transformers knows the method."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoQuantizationConfig

    from distquant.quantization.quantizer import Quantizer

    written = scheme.config.to_dict()
    if written.get("quant_method") in AUTO_QUANTIZATION_CONFIG_MAPPING:
        found = AutoQuantizationConfig.from_dict(written)
        model.config.quantization_config = found
        model.hf_quantizer = Quantizer(found, scheme.unsaved(model) is None)
        model.is_quantized, model.quantization_method = True, found.quant_method


def unpacked(words: Tensor, bits: int, dim: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Unsigned values (int32) packed along `dim` into integers, the lowest bits first.

    Args:
        words: integers of 8 or 32 bits.
        bits: 2, 4 or 8 of each value.
        dim: which dim grows by `word bits / bits`.
        order: of the values in a word, where it is not ascending: `order[i]` is the slot that holds value `i`.
    """
    per_word = words.element_size() * 8 // bits
    slots = torch.arange(per_word) if order is None else torch.tensor(order)
    shifts = (slots * bits).to(words.device, torch.int32)
    spread = words.movedim(dim, -1).to(torch.int32).unsqueeze(-1) >> shifts & ((1 << bits) - 1)
    return spread.flatten(-2).movedim(-1, dim)
