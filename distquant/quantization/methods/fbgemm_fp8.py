"""FBGEMM's FP8: float8 e4m3 rows with one float32 scale each; the weight passes through bfloat16 first.

Stored as transformers 5.23 does (`integrations/fbgemm_fp8.py`, `FbgemmFp8Linear`): `weight` float8_e4m3fn `[N, K]`,
`weight_scale` float32 `[N, 1]`. Quantized by the definition of `torch.ops.fbgemm.quantize_fp8_per_row`
(see `kernels/reference/fp8.py`), which takes bfloat16 only and exists for GPUs only: `fbgemm-gpu-cpu` lacks it.
FBGEMM's Triton form, `quantize_fp8_row`, has other bits: it multiplies by 448 / amax (1.8.0, measured on a CPU).

A row's scale reaches over `in`, so whole rows are quantized, by the rank that reads them, and a shard that is split
along `in` keeps the scale of every row. In forward activations are float8, too, on a GPU that has it (see
`float8_matmul.py`; FBGEMM bounds their scale by `activation_scale_ub`, which is not done here). Elsewhere the weight
is dequantized and multiplied with the activations as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from distquant.config import FbgemmFp8Config
from distquant.errors import Problem
from distquant.kernels.protocol import Kernels
from distquant.quantization.codec import Encoder, Stream
from distquant.quantization.linear.float8_matmul import Float8Kernel, Float8Multiplier, Float8Rows, float8_rows_matmul
from distquant.quantization.registry import register
from distquant.quantization.stored_checks import SCALE_DTYPES, in_other_dims, wrong_dtypes
from distquant.quantization.stored_values import MAGNITUDES, Check
from distquant.quantization.weight_only import WeightOnlyScheme
from distquant.sharding.layout import ALL, PLAIN_STEPS, Component, Layout
from distquant.sharding.shard import Shard
from distquant.sharding.tally import WHOLE_ROW

SCALE = "weight_scale"
ROWS = (1, None)


@register
class FbgemmFp8Scheme(WeightOnlyScheme, Encoder, Float8Multiplier):
    """float8 e4m3 rows and their scales in a `QuantizedLinear`."""

    name = "fbgemm_fp8"
    config_class = FbgemmFp8Config
    suffixes: ClassVar[Mapping[str, str]] = {SCALE: SCALE}
    value_checks: ClassVar[Mapping[str, Check]] = {SCALE: MAGNITUDES}
    config: FbgemmFp8Config

    def layout(self, name: str, shape: tuple[int, ...], dtype: str) -> Layout:
        codes = Component(name="", dtype="float8_e4m3fn", preferred_alignments=PLAIN_STEPS)
        return Layout(
            (codes, Component(name=SCALE, dtype="float32", block_shape=(1, ALL), preferred_alignments=PLAIN_STEPS))
        )

    def check_stored(self, name: str, shape: tuple[int, ...], stored: dict[str, tuple[int, ...]]) -> list[Problem]:
        problems = super().check_stored(name, shape, stored)
        if not problems and stored[""] != shape:
            problems.append(in_other_dims(name, "", stored[""], shape))
        return problems

    def check_dtypes(self, name: str, dtypes: dict[str, str]) -> list[Problem]:
        return wrong_dtypes(name, dtypes, {"": ("F8_E4M3",), SCALE: SCALE_DTYPES})

    def encode(self, name: str, rows: Tensor, out: dict[str, Tensor], ops: Kernels) -> None:
        codes, scale = out[""].view(rows.shape), out[SCALE].view(-1, 1)
        ops.quantize_fp8_rows(rows.to(torch.bfloat16), codes=codes, scale=scale)

    def pack_prequantized(
        self, shard: Shard, parts: dict[str, Tensor], replicated: frozenset[str]
    ) -> dict[str, Tensor]:
        return self.shaped(shard, {**parts, SCALE: parts[SCALE].float()})

    def dequantize(self, shard: Shard, components: Mapping[str, Tensor], dtype: torch.dtype, ops: Kernels) -> Tensor:
        return ops.dequantize_fp8(components[""], components[SCALE], ROWS, dtype)

    def float8_kernel(self, name: str) -> Float8Kernel | None:
        return Float8Kernel.SCALED_MM

    def float8_matmul(self, shard: Shard, components: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return float8_rows_matmul(x, Float8Rows(components[""], components[SCALE]))

    def fingerprint_streams(self, shard: Shard, components: Mapping[str, Tensor]) -> Iterable[Stream]:
        yield "code", components[""], 1
        yield "scale", components[SCALE], WHOLE_ROW
