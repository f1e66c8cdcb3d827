"""MXFP4 (OCP Microscaling v1.0): e2m1 codes, two a byte, with a power of two for each 32 inputs of a row.

Stored, for a weight `[N, K]`, as gpt-oss has each of its experts (transformers 5.23, `integrations/mxfp4.py`):

    weight_blocks    uint8 `[N, K / 32, 16]`: codes, the even input in the low nibble
    weight_scales    uint8 `[N, K / 32]`: e8m0, byte `b` is 2^(b - 127)

Experts that are stored together have one dim more before these, under the name of their fused parameter:
`gate_up_proj_blocks`, `gate_up_proj_scales`. transformers 5.23 knows no other weights in MXFP4; `weight_blocks` and
`weight_scales` are its coming names of experts that are stored one by one (pull request 48137). `weight` (as
`[N, K / 2]`) and `scales` are read as well: so the local module calls its buffers, and so earlier versions saved them.

The definition of quantization is in `kernels/reference/mxfp4.py`. Runs of 32 depend on nothing else, so a partition
between them is exact by itself. In forward the weight is dequantized and multiplied with the activations as they are,
in their dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from distquant.config import Mxfp4Config
from distquant.errors import Problem
from distquant.kernels.protocol import Kernels
from distquant.quantization.codec import Encoder, Stream
from distquant.quantization.registry import register
from distquant.quantization.stored_checks import in_other_dims, wrong_dtypes
from distquant.quantization.stored_values import Check, exponents
from distquant.quantization.weight_only import WeightOnlyScheme
from distquant.sharding.layout import PLAIN_STEPS, Component, Layout
from distquant.sharding.shard import Shard

SCALES = "scales"
RUN, PER_BYTE = 32, 2


@register
class Mxfp4Scheme(WeightOnlyScheme, Encoder):
    """e2m1 codes and their e8m0 scales in a `QuantizedLinear`."""

    name = "mxfp4"
    config_class = Mxfp4Config
    suffixes: ClassVar[Mapping[str, str]] = {"weight_blocks": "", "weight_scales": SCALES, SCALES: SCALES}
    value_checks: ClassVar[Mapping[str, Check]] = {SCALES: exponents}
    fused_suffixes: ClassVar[Mapping[str, str]] = {"_blocks": "", "_scales": SCALES}

    # -- deciding --------------------------------------------------------------------------------------------------

    def layout(self, name: str, shape: tuple[int, ...], dtype: str) -> Layout:
        codes = Component(name="", dtype="uint8", block_shape=(1, PER_BYTE), preferred_alignments=PLAIN_STEPS)
        return Layout(
            (codes, Component(name=SCALES, dtype="uint8", block_shape=(1, RUN), preferred_alignments=PLAIN_STEPS))
        )

    def check_weight(self, name: str, shape: tuple[int, ...]) -> list[Problem]:
        if shape[-1] % RUN == 0:
            return []
        fault = f"{shape[-1]} inputs are not a multiple of {RUN}, the inputs that share a scale"
        return [Problem(name, fault, "Leave this module out (modules_to_not_convert), or choose another method")]

    def check_stored(self, name: str, shape: tuple[int, ...], stored: dict[str, tuple[int, ...]]) -> list[Problem]:
        problems = self.check_weight(name, shape) or super().check_stored(name, shape, stored)
        rows, columns = shape
        runs = (rows, columns // RUN)
        forms = {"": ((*runs, RUN // PER_BYTE), (rows, columns // PER_BYTE)), SCALES: (runs,)}
        for component, allowed in forms.items() if not problems else ():
            if stored[component] not in allowed:
                problems.append(in_other_dims(name, component, stored[component], *allowed))
        return problems

    def check_dtypes(self, name: str, dtypes: dict[str, str]) -> list[Problem]:
        return wrong_dtypes(name, dtypes, {"": ("U8",), SCALES: ("U8", "F8_E8M0")})

    # -- codec and modules -----------------------------------------------------------------------------------------

    def unsaved(self, model: nn.Module) -> str | None:
        return "transformers reads MXFP4 for experts only, not for linear layers"

    def encode(self, name: str, rows: Tensor, out: dict[str, Tensor], ops: Kernels) -> None:
        ops.quantize_mxfp4(rows, codes=out[""], scale=out[SCALES])

    def pack_prequantized(
        self, shard: Shard, parts: dict[str, Tensor], replicated: frozenset[str]
    ) -> dict[str, Tensor]:
        return self.shaped(shard, {name: value.view(torch.uint8) for name, value in parts.items()})

    def dequantize(self, shard: Shard, components: Mapping[str, Tensor], dtype: torch.dtype, ops: Kernels) -> Tensor:
        return ops.dequantize_mxfp4(components[""], components[SCALES], dtype)

    def fingerprint_streams(self, shard: Shard, components: Mapping[str, Tensor]) -> Iterable[Stream]:
        """Yields bytes of two codes, which no partition divides, and scales by their bytes."""
        yield "code", components[""], PER_BYTE
        yield "scale", components[SCALES], RUN
