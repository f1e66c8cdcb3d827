"""LLM.int8: int8 rows with one float32 absmax each; the weight passes through float16 first.

A row's absmax reaches over `in`, so whole rows are quantized, by the rank that reads them, and a shard that is split
along `in` keeps the absmax of every row. Weights are then exact. Activations are quantized per local row in forward,
so logits of such a shard differ by the method's own error.

Stored components of a shard: "" (int8 `[out, in]`) and "SCB" (float32 `[out]`, the rows' absmax).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distquant.config import Bnb8bitConfig
from distquant.errors import InputError, Problem
from distquant.kernels.protocol import Kernels
from distquant.quantization.bitsandbytes_base import BitsandbytesScheme
from distquant.quantization.codec import Stream
from distquant.quantization.module_selection import is_stack
from distquant.quantization.registry import register
from distquant.quantization.stored_checks import lacks, misshapen, wrong_dtypes
from distquant.quantization.stored_values import MAGNITUDES, Check
from distquant.sharding.layout import ALL, PLAIN_STEPS, Component, Layout
from distquant.sharding.shard import Shard
from distquant.sharding.tally import WHOLE_ROW

ROW_FORMAT = 0
"""The only weight format that bitsandbytes still writes: row-major."""


@register
class Bnb8bitScheme(BitsandbytesScheme):
    """`bnb.nn.Linear8bitLt` of local size."""

    name = "bitsandbytes_8bit"
    config_class = Bnb8bitConfig
    suffixes: ClassVar[Mapping[str, str]] = {"SCB": "SCB", "weight_format": "weight_format"}
    value_checks: ClassVar[Mapping[str, Check]] = {"SCB": MAGNITUDES}
    mark = "is_loaded_in_8bit"
    config: Bnb8bitConfig

    def layout(self, name: str, shape: tuple[int, ...], dtype: str) -> Layout:
        codes = Component(name="", dtype="int8", preferred_alignments=PLAIN_STEPS)
        return Layout(
            (codes, Component(name="SCB", dtype="float32", block_shape=(1, ALL), preferred_alignments=PLAIN_STEPS))
        )

    def notes(self, converted: Iterable[str]) -> Iterator[str]:
        stacks = [name for name in converted if is_stack(name)]
        if stacks:
            yield f"not applied: quantization of activations, in {len(stacks)} projections of experts"

    def check_stored(self, name: str, shape: tuple[int, ...], stored: dict[str, tuple[int, ...]]) -> list[Problem]:
        missing = [component or "weight" for component in ("", "SCB") if component not in stored]
        if missing:
            return [lacks(name, ", ".join(missing))]
        if stored["SCB"] != shape[:1] or stored[""] != shape:
            fault = f"int8 {list(stored[''])} with SCB {list(stored['SCB'])}, the model has {list(shape)}"
            return [Problem(name, fault, "The checkpoint is of another model; check config.json")]
        form = stored.get("weight_format", ())
        return [misshapen(name, "weight_format", form, ())] if math.prod(form) != 1 else []

    def check_dtypes(self, name: str, dtypes: dict[str, str]) -> list[Problem]:
        return wrong_dtypes(name, dtypes, {"": ("I8",), "SCB": ("F32",), "weight_format": ("U8",)})

    # -- modules ---------------------------------------------------------------------------------------------------

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

    def encode(self, name: str, rows: Tensor, out: dict[str, Tensor], ops: Kernels) -> None:
        ops.quantize_int8_rows(rows, codes=out[""].view(rows.shape), absmax=out["SCB"])

    def pack(self, shard: Shard, parts: dict[str, Tensor], ops: Kernels) -> dict[str, Tensor]:
        return {"": parts[""].view(shard.local_shape), "SCB": parts["SCB"]}

    def pack_prequantized(
        self, shard: Shard, parts: dict[str, Tensor], replicated: frozenset[str]
    ) -> dict[str, Tensor]:
        weight_format = int(parts["weight_format"].item()) if "weight_format" in parts else ROW_FORMAT
        if weight_format != ROW_FORMAT:
            fault = f"its weight_format is {weight_format}, only {ROW_FORMAT} (row) is supported"
            raise InputError.one(shard.name, fault, "Quantize the original again with a current bitsandbytes")
        return {"": parts[""].view(shard.local_shape), "SCB": parts["SCB"]}

    def fill(self, shard: Shard, module: nn.Module, components: Mapping[str, Tensor]) -> None:
        from bitsandbytes.nn import Int8Params

        codes, absmax = components[""], components["SCB"]
        module.weight = Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=absmax)

    def components(self, module: Any) -> dict[str, Tensor]:
        weight = module.weight
        return {"": weight.data, "SCB": weight.SCB if weight.SCB is not None else module.state.SCB}

    def dequantize(self, shard: Shard, components: Mapping[str, Tensor], dtype: torch.dtype, ops: Kernels) -> Tensor:
        scale = (components["SCB"].float() / 127).view(-1, 1)
        return components[""].float().mul_(scale).to(dtype)

    def fingerprint_streams(self, shard: Shard, components: Mapping[str, Tensor]) -> Iterable[Stream]:
        yield "code", components[""], 1
        yield "scale", components["SCB"].view(-1, 1), WHOLE_ROW
