"""Symmetric int8 in groups along the input: a complete quantization method for distquant, in one file.

    scale = max |w| / 127 over a group of 32 inputs of one row        float32 [out, ceil(in / 32)]
    code  = round(w / scale), halves to even                          int8    [out, in]

A scale depends on its own group only, so a partition between groups is exact by itself: no statistic crosses it, and
ranks exchange nothing while they quantize. Both are computed in float32, element by element, so the pieces in which
rows arrive leave no trace either. The module dequantizes in forward; it is meant to be read, not to be fast.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distquant.config import QuantizationConfig
from distquant.errors import Problem
from distquant.quantization import Encoder, QuantizedScheme, Shard, Stream, register
from distquant.sharding.layout import PLAIN_STEPS, Component, Layout

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
            yield Problem("quantization_config.group_size", f"invalid size {self.group_size}", "Give 32, or 1 or more")


class Int8GroupsLinear(nn.Module):
    """A linear layer of codes and scales.

    weight: int8 `[out, in]`; weight_scale: float32 `[out, ceil(in / group_size)]`; bias: unchanged.
    """

    def __init__(self, in_features: int, out_features: int, group_size: int, bias: nn.Parameter | None):
        super().__init__()
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        codes = torch.empty(out_features, in_features, dtype=torch.int8, device="meta")
        self.weight = nn.Parameter(codes, requires_grad=False)
        scales = torch.empty(out_features, -(-in_features // group_size), device="meta")
        self.register_buffer("weight_scale", scales)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        weight = dequantize(self.weight, self.weight_scale, self.group_size, x.dtype)
        return nn.functional.linear(x, weight, self.bias)


def dequantize(codes: Tensor, scales: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """`[out, in]`: code * scale in float32, then rounded to `dtype`."""
    scale_of_each = scales.repeat_interleave(group_size, dim=1)[:, : codes.shape[1]]
    return (codes.float() * scale_of_each).to(dtype)


@register
class Int8GroupsScheme(QuantizedScheme, Encoder):
    """`Int8GroupsLinear` of local size, with the components "" (the codes) and "weight_scale"."""

    name = "int8_groups"
    config_class = Int8GroupsConfig
    config: Int8GroupsConfig

    # Layout rules. The coordinator asks: where may a weight be partitioned, and how large is a part?

    def layout(self, name: str, shape: tuple[int, ...], dtype: str) -> Layout:
        """One code an element; a scale covers one row and a group of inputs. Alignments and memory follow from it."""
        codes = Component(name="", dtype="int8", preferred_alignments=PLAIN_STEPS)
        scales = Component(name="weight_scale", dtype="float32", block_shape=(1, self.config.group_size))
        return Layout((codes, scales))

    # Codec. Ranks call `encode` with whole rows, and the others with the components of their own shard.

    def encode(self, name: str, rows: Tensor, out: dict[str, Tensor], ops: Any) -> None:
        """Computes codes and scales of rows. The rank that reads them calls this and sends each owner its part."""
        count, columns = rows.shape
        padded = nn.functional.pad(rows.float(), (0, -columns % self.config.group_size))
        groups = padded.view(count, -1, self.config.group_size)
        scales = groups.abs().amax(dim=2) / LARGEST
        divisors = scales.masked_fill(scales == 0, 1).unsqueeze(2)  # a group of zeros has codes of zero
        out["weight_scale"].copy_(scales.view(-1))
        codes = torch.round(groups / divisors).to(torch.int8).view(count, -1)[:, :columns]
        out[""].view(count, columns).copy_(codes)

    def dequantize(self, shard: Shard, components: Mapping[str, Tensor], dtype: torch.dtype, ops: Any) -> Tensor:
        """The weight of a shard; `dequantize=True` loads it instead of the module."""
        return dequantize(components[""], components["weight_scale"], self.config.group_size, dtype)

    def fingerprint_streams(self, shard: Shard, components: Mapping[str, Tensor]) -> Iterable[Stream]:
        """Codes, one a column, and scales, one for `group_size` columns."""
        yield "code", components[""], 1
        yield "scale", components["weight_scale"], self.config.group_size

    # Module factory. Ranks make a module of their shard's size, and fill it when all its rows have come.

    def module(self, linear: nn.Module, shard: Shard) -> nn.Module:
        out_features, in_features = shard.local_shape
        return Int8GroupsLinear(in_features, out_features, self.config.group_size, linear.bias)

    def fill(self, shard: Shard, module: Any, components: Mapping[str, Tensor]) -> None:
        module.weight = nn.Parameter(components[""], requires_grad=False)
        module.weight_scale = components["weight_scale"]

    def components(self, module: Any) -> dict[str, Tensor]:
        return {"": module.weight.data, "weight_scale": module.weight_scale}
