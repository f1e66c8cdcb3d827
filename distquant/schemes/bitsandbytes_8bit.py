"""LLM.int8: int8 rows with one float32 absmax each; the weight passes through float16 first.

A row's absmax reaches over `in`, so a shard that is cut along `in` takes the maximum over the ranks before it
quantizes (a maximum does not round) and keeps the absmax of every row. Weights are then exact. Activations are
quantized per local row in forward, so logits of such a shard differ by the method's own error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from distquant import hostmem
from distquant.config import Bnb8bitConfig
from distquant.errors import InputError, Problem
from distquant.kernels import reference
from distquant.layout import ALL, PLAIN_STEPS, Component, Layout
from distquant.schemes.base import Quantizer, Stored
from distquant.schemes.bitsandbytes import BitsandbytesScheme
from distquant.schemes.registry import register
from distquant.schemes.shard import Shard
from distquant.tally import WHOLE_ROW

if TYPE_CHECKING:
    from distquant.comm import Axis
    from distquant.tally import Tally

ROW_FORMAT = 0
"""The only weight format that bitsandbytes still writes: row-major."""


@register
class Bnb8bitScheme(BitsandbytesScheme):
    """`bnb.nn.Linear8bitLt` of local size."""

    name = "bitsandbytes_8bit"
    config_class = Bnb8bitConfig
    suffixes: ClassVar[Mapping[str, str]] = {"SCB": "SCB", "weight_format": "weight_format"}
    mark = "is_loaded_in_8bit"
    config: Bnb8bitConfig

    def layout(self, shape: tuple[int, ...], dtype: str) -> Layout:
        codes = Component(name="", dtype="int8", cuts=PLAIN_STEPS)
        return Layout((codes, Component(name="SCB", dtype="float32", spans=(1, ALL), cuts=PLAIN_STEPS)))

    def check_weight(self, name: str, shape: tuple[int, ...]) -> list[Problem]:
        return []

    def check_stored(self, name: str, shape: tuple[int, ...], stored: dict[str, tuple[int, ...]]) -> list[Problem]:
        missing = [component or "weight" for component in ("", "SCB") if component not in stored]
        if missing:
            what = f"the checkpoint lacks {', '.join(missing)} of this quantized weight"
            return [Problem(name, what, "Download the checkpoint again, or quantize the original")]
        if stored["SCB"] != shape[:1] or stored[""] != shape:
            what = f"int8 {list(stored[''])} with SCB {list(stored['SCB'])}, the model has {list(shape)}"
            return [Problem(name, what, "The checkpoint is of another model; check config.json")]
        return []

    # -- executing -------------------------------------------------------------------------------------------------

    def module(self, linear: nn.Module, shard: Shard) -> nn.Module:
        import bitsandbytes as bnb

        out_features, in_features = shard.local_shape
        return bnb.nn.Linear8bitLt(
            in_features,
            out_features,
            bias=linear.bias is not None,
            has_fp16_weights=False,
            threshold=self.config.llm_int8_threshold,
            device="meta",
        )

    def quantizer(self, shard: Shard, module: nn.Module, axis: Axis, device: Any) -> Quantizer:
        return _Quantizer(self, shard, module, axis, device)

    def restore(self, shard: Shard, module: nn.Module, stored: Stored, device: Any) -> None:
        columns = shard.shape[1]
        ((a, b),) = shard.columns
        codes = stored.rows("", columns, shard.rows, (a, b)).view(torch.int8).view(shard.local_shape)
        absmax = torch.cat([stored.read("SCB", segment) for segment in shard.rows])
        try:
            found = int(stored.read("weight_format").item())
        except KeyError:
            found = ROW_FORMAT
        if found != ROW_FORMAT:
            what = f"its weight_format is {found}, only {ROW_FORMAT} (row) is supported"
            raise InputError.one(shard.name, what, "Quantize the original again with a current bitsandbytes")
        self.fill(module, codes.to(device), absmax.to(device))

    def fill(self, module: nn.Module, codes: Tensor, absmax: Tensor) -> None:
        """Puts codes (int8 `[out, in]`) and row absmax (float32 `[out]`) into a `Linear8bitLt`."""
        from bitsandbytes.nn import Int8Params

        module.weight = Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=absmax)

    def tally(self, module: nn.Module, shard: Shard, tally: Tally) -> None:
        weight: Any = module.weight
        state: Any = module.state
        absmax = weight.SCB if weight.SCB is not None else state.SCB
        tally.shard("code", weight.data, shard.shape, shard.dim, shard.owned)
        tally.shard("scale", absmax.view(-1, 1), shard.shape, shard.dim, shard.owned, span=WHOLE_ROW)


class _Quantizer:
    """Quantizes rows as they come; under a cut along `in` their absmax are first reduced over the axis."""

    def __init__(self, scheme: Bnb8bitScheme, shard: Shard, module: nn.Module, axis: Axis, device: Any):
        self.scheme, self.shard, self.module, self.axis = scheme, shard, module, axis
        self.codes = hostmem.empty(shard.local_shape, torch.int8, device)
        self.absmax = torch.empty(shard.local_shape[0], dtype=torch.float32, device=device)

    def update(self, rows: Tensor, start: int) -> None:
        rows = rows.to(torch.float16)
        absmax = reference.row_absmax(rows)
        if self.shard.dim == 1:
            # As integers: non-negative floats order the same, and a NaN stays one.
            self.axis.all_reduce(absmax.view(torch.int32), "max")
        reference.quantize_int8_rows(rows, absmax, out=self.codes[start : start + len(rows)])
        self.absmax[start : start + len(rows)] = absmax

    def finish(self) -> None:
        self.scheme.fill(self.module, self.codes, self.absmax)
