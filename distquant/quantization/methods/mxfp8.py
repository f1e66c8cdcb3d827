"""MXFP8 (OCP Microscaling v1.0): float8 e4m3 with a power of two for each 32 inputs of a row.

As transformers 5.23 has it, which reads `mxfp8` with its fine-grained FP8 (`quantizers/auto.py`): tiles of `[1, 32]`,
`weight_scale_inv` `[N, ceil(K / 32)]` as float8_e8m0fnu or, in many files, as the same bytes under uint8 (U8). Files
that leave out `scale_fmt` mean "ue8m0". Quantized while it is loaded, the scale is the smallest power of two under
which no element is clamped (`Fp8Quantize`); the specification's own conversion takes `floor(log2(amax)) - 8`, which
clamps.
"""

from __future__ import annotations

from distquant.config import Mxfp8Config
from distquant.errors import Problem
from distquant.quantization.methods.fp8 import Fp8Scheme
from distquant.quantization.registry import register
from distquant.quantization.scheme import Context

TILE = (1, 32)


@register
class Mxfp8Scheme(Fp8Scheme):
    """`Fp8Scheme` with runs of 32 and ue8m0."""

    name = "mxfp8"
    config_class = Mxfp8Config

    @property
    def powers(self) -> bool:
        return True

    def validate(self, context: Context) -> list[Problem]:
        problems = super().validate(context)
        if self.block is not None and self.block != TILE:
            fault = f"{list(self.block)} is not the tile of MXFP8"
            problems.append(Problem("quantization_config.weight_block_size", fault, f"Give {list(TILE)}"))
        if self.config.scale_fmt != "ue8m0" and not context.prequantized:
            fault = f"{self.config.scale_fmt!r} is not MXFP8"
            problems.append(Problem("quantization_config.scale_fmt", fault, "Give 'ue8m0', or the short name mxfp8"))
        return problems
