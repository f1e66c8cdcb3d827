"""The example of 0.1 as it was, with the words of that version: it must work for one release more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distquant.config import QuantizationConfig
from distquant.errors import Problem
from distquant.layout import PLAIN_STEPS, Component, Layout
from distquant.schemes import Scheme, Shard, register

LARGEST = 127
"""Largest code; -128 is not used, so that codes are symmetric."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8GroupsConfig(QuantizationConfig):
    """One scale for each group of inputs of a row."""

    quant_method: ClassVar[str] = "int8_groups"
    skip_field: ClassVar[str | None] = "modules_to_not_convert"
    short_names: ClassVar[Mapping[str, Mapping[str, Any]]] = {"int8-g32": {}, "int8-g128": {"group_size": 128}}

    group_size: int = 32
    """Inputs that share a scale; the last group of a row may be shorter."""
    modules_to_not_convert: tuple[str, ...] | None = None
    """Patterns of modules to leave as they are; None leaves the choice to the model (its output head)."""

    def _value_problems(self) -> Iterable[Problem]:
        if self.group_size < 1:
            yield Problem("quantization_config.group_size", f"{self.group_size} is no size", "Give 32, or 1 or more")


class Int8GroupsLinear(nn.Module):
    """A linear layer of codes and scales.

    weight: int8 `[out, in]`; weight_scale: float32 `[out, ceil(in / group_size)]`; bias: as it was.
    """

    def __init__(self, in_features: int, out_features: int, group_size: int, bias: nn.Parameter | None):
        super().__init__()
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        codes = torch.empty(out_features, in_features, dtype=torch.int8, device="meta")
        self.weight = nn.Parameter(codes, requires_grad=False)
        scales = torch.empty(out_features, -(-in_features // group_size), device="meta")
        self.register_buffer("weight_scale", scales)
        self.register_parameter("bias", bias)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """`[out, in]`: code * scale in float32, then rounded to `dtype`."""
        scales = self.weight_scale.repeat_interleave(self.group_size, dim=1)[:, : self.in_features]
        return (self.weight.float() * scales).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dequantized(x.dtype), self.bias)


@register
class Int8GroupsScheme(Scheme):
    """`Int8GroupsLinear` of local size."""

    name = "int8_groups"
    config_class = Int8GroupsConfig
    config: Int8GroupsConfig

    # The coordinator asks this: where may a weight be cut, and how large is a part?

    def layout(self, name: str, shape: tuple[int, ...], dtype: str) -> Layout:
        """One code an element; a scale spans one row and a group of inputs. Units and memory follow from it."""
        codes = Component(name="", dtype="int8", cuts=PLAIN_STEPS)
        scales = Component(name="weight_scale", dtype="float32", spans=(1, self.config.group_size))
        return Layout((codes, scales))

    def converts(self, skeleton: Any) -> list[str]:
        return [name for name in super().converts(skeleton) if not name.endswith("no_such_module")]

    # Ranks call these: `encode` with whole rows, the others with their own shard.

    def module(self, linear: nn.Module, shard: Shard) -> nn.Module:
        out_features, in_features = shard.local_shape
        return Int8GroupsLinear(in_features, out_features, self.config.group_size, linear.bias)

    def encode(self, name: str, rows: Tensor, out: dict[str, Tensor], ops: Any) -> None:
        """Codes and scales of rows; the rank that reads them calls this, and the others get what they keep."""
        count, columns = rows.shape
        padded = nn.functional.pad(rows.float(), (0, -columns % self.config.group_size))
        groups = padded.view(count, -1, self.config.group_size)
        scales = groups.abs().amax(dim=2) / LARGEST
        divisors = scales.masked_fill(scales == 0, 1).unsqueeze(2)  # a group of zeros has codes of zero
        out["weight_scale"].copy_(scales.view(-1))
        codes = torch.round(groups / divisors).to(torch.int8).view(count, -1)[:, :columns]
        out[""].view(count, columns).copy_(codes)

    def complete(self, shard: Shard, module: Any, parts: dict[str, Tensor], ops: Any) -> None:
        """Takes what came of the shard's rows, in order."""
        rows, columns = shard.local_shape
        module.weight = nn.Parameter(parts[""].view(rows, columns), requires_grad=False)
        module.weight_scale = parts["weight_scale"].view(rows, -1)

    def dequantized(self, module: Any, shard: Shard, ops: Any) -> Tensor:
        """What `dequantize=True` loads instead of the module."""
        return module.dequantized(getattr(torch, shard.dtype))

    def tally(self, module: Any, shard: Shard, tally: Any) -> None:
        """Counts what this rank owns, at its place in the whole weight."""
        tally.shard("code", module.weight, shard.shape, shard.dim, shard.owned)
        tally.shard("scale", module.weight_scale, shard.shape, shard.dim, shard.owned, span=self.config.group_size)
