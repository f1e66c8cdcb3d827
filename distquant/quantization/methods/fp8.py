"""Fine-grained FP8 (DeepSeek-V3, arXiv:2412.19437): float8 e4m3 with a scale for each tile, or one for the tensor.

Stored as transformers 5.23 does (`integrations/finegrained_fp8.py`, `FP8Linear` and `Fp8Quantize`), for a weight
`[N, K]` and `weight_block_size` `[n, k]`:

    weight              float8_e4m3fn `[N, K]`
    weight_scale_inv    `[ceil(N / n), ceil(K / k)]`, float32, or float8_e8m0fnu under `scale_fmt` "ue8m0"; the last
                        tiles of a dim may be ragged. What dequantization multiplies with. float32 `[]` without tiles
    activation_scale    float32 `[]`, only under the static `activation_scheme`

The configuration gives the tile, since with ragged tails several tiles fit one shape. Files also hold scales as
bfloat16 or float16, powers of two as float32 (DeepSeek-V3.1) and exponents as bytes (U8); these are brought into the
form above without changing a value. A weight without a scale in such a file is an unquantized one. AutoFP8 writes
`weight_scale` and `input_scale` of one element, without a tile in the configuration.

Quantized while it is loaded, a weight has the bits of `Fp8Quantize` where tiles divide it; ragged ones, which that
leaves unquantized, are defined in `kernels/reference/fp8.py`. With one scale for the tensor, rows are passed on as they
are, with each row's amax; every rank then casts its part under the largest.

In forward the weight is dequantized and multiplied with the activations as they are, as transformers does on a CPU.
On a GPU with float8 and the kernel, activations are float8, too (`float8_matmul.py`), under `activation_scale` where
it is stored: with one scale for the tensor, and with tiles of 128 x 128.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from distquant.config import Fp8Config, torch_dtype
from distquant.errors import InputError, Problem
from distquant.kernels.protocol import Kernels
from distquant.quantization.codec import Encoder, Stream
from distquant.quantization.linear.float8_matmul import (
    TILE,
    Float8Kernel,
    Float8Multiplier,
    Float8Rows,
    float8_rows_matmul,
    float8_tiles_matmul,
)
from distquant.quantization.registry import register
from distquant.quantization.scheme import Context
from distquant.quantization.stored_checks import SCALE_DTYPES, in_other_dims, wrong_dtypes
from distquant.quantization.stored_values import DIVISORS, MAGNITUDES, Check, exponents
from distquant.quantization.weight_only import WeightOnlyScheme
from distquant.sharding.layout import ALL, PLAIN_STEPS, Component, Layout
from distquant.sharding.shard import Shard
from distquant.sharding.tally import WHOLE_ROW

if TYPE_CHECKING:
    from distquant.checkpoint import TensorInfo
    from distquant.config import QuantizationConfig
    from distquant.config.fp8 import Float8Config

SCALE, ACTIVATION, AMAX = "weight_scale_inv", "activation_scale", "amax"
AUTOFP8_SCALE, AUTOFP8_ACTIVATION = "weight_scale", "input_scale"
"""The same scales in files of AutoFP8 and of vLLM's other tools."""
POWERS = ("F8_E8M0", "U8")
"""Safetensors' dtypes of scales that are exponents."""


@register
class Fp8Scheme(WeightOnlyScheme, Encoder, Float8Multiplier):
    """float8 e4m3 and its scales in a `QuantizedLinear`."""

    name = "fp8"
    config_class: ClassVar[type[Float8Config]] = Fp8Config
    suffixes: ClassVar[Mapping[str, str]] = {
        SCALE: SCALE,
        ACTIVATION: ACTIVATION,
        AUTOFP8_SCALE: SCALE,
        AUTOFP8_ACTIVATION: ACTIVATION,
    }
    of_activations: ClassVar[frozenset[str]] = frozenset((ACTIVATION,))
    value_checks: ClassVar[Mapping[str, Check]] = {SCALE: lambda values: _scale_fault(values), ACTIVATION: DIVISORS}
    config: Float8Config

    @property
    def block(self) -> tuple[int, int] | None:
        """Rows and columns of a tile; None = one scale for the tensor."""
        return self.config.weight_block_size

    @property
    def powers(self) -> bool:
        """True if scales are powers of two."""
        return self.config.scale_fmt == "ue8m0"

    # -- layout rules ----------------------------------------------------------------------------------------------

    def layout(self, name: str, shape: tuple[int, ...], dtype: str) -> Layout:
        kind = "float8_e8m0fnu" if self.powers else "float32"
        components = [
            Component(name="", dtype="float8_e4m3fn", preferred_alignments=PLAIN_STEPS),
            Component(name=SCALE, dtype=kind, block_shape=self.block or (ALL, ALL), preferred_alignments=PLAIN_STEPS),
        ]
        if self.config.activation_scheme == "static":
            components.append(Component(name=ACTIVATION, dtype="float32", block_shape=(ALL, ALL)))
        return Layout(tuple(components))

    def config_as_stored(self, tensors: Mapping[str, TensorInfo]) -> QuantizationConfig:
        """AutoFP8 writes no `weight_block_size` and one scale for each weight, which then is the weight's."""
        scales = {name: info for name, info in tensors.items() if name.endswith((f".{SCALE}", f".{AUTOFP8_SCALE}"))}
        single = bool(scales) and all(math.prod(info.shape) == 1 for info in scales.values())
        if self.block is None or not single or self.powers:
            return self.config
        weights = [tensors.get(f"{name.rpartition('.')[0]}.weight") for name in scales]
        rows, columns = self.block
        larger = any(info and (info.shape[0] > rows or info.shape[-1] > columns) for info in weights)
        flat = any(len(info.shape) < 2 for info in scales.values())
        return replace(self.config, weight_block_size=None) if larger or flat else self.config

    def validate(self, context: Context) -> list[Problem]:
        config, problems = self.config, super().validate(context)
        if self.block is None and self.powers:
            fault = "'ue8m0' is for tiles, and weight_block_size is null"
            problems.append(
                _problem("scale_fmt", fault, "Give weight_block_size, such as [128, 128], or scale_fmt 'float'")
            )
        if config.modules_to_convert:
            fault = f"{list(config.modules_to_convert)} names further modules, only linear ones are converted here"
            problems.append(_problem("modules_to_convert", fault, "Leave it out"))
        if config.expert_dtype != "fp8":
            fault = f"experts stored as {config.expert_dtype!r} are not supported"
            problems.append(
                _problem("expert_dtype", fault, "Load a checkpoint with experts in fp8, or an unquantized one")
            )
        if config.activation_scheme == "static" and not context.prequantized:
            fault = "'static' needs scales that were calibrated on activations, an unquantized checkpoint has none"
            problems.append(_problem("activation_scheme", fault, "Give 'dynamic'"))
        return problems

    def check_stored(self, name: str, shape: tuple[int, ...], stored: dict[str, tuple[int, ...]]) -> list[Problem]:
        problems = super().check_stored(name, shape, stored)
        if ACTIVATION in stored and self.config.activation_scheme != "static":
            fault = f"{ACTIVATION} is stored, and activation_scheme is {self.config.activation_scheme!r}"
            problems.append(Problem(name, fault, "Set activation_scheme to 'static' in config.json"))
        for component in () if problems else ("", SCALE) if self.block else ("",):
            expected = self.layout(name, shape, "float32").component(component).shape(shape)
            if stored[component] != expected:
                problems.append(in_other_dims(name, component, stored[component], expected))
        return problems

    def check_dtypes(self, name: str, dtypes: dict[str, str]) -> list[Problem]:
        allowed = {"": ("F8_E4M3",), SCALE: (*SCALE_DTYPES, *POWERS), ACTIVATION: SCALE_DTYPES}
        return wrong_dtypes(name, dtypes, allowed)

    # -- codec -----------------------------------------------------------------------------------------------------

    def encoded_components(self, name: str, shape: tuple[int, int], dtype: str) -> tuple[Component, ...]:
        if self.block is not None:
            # Nothing here calibrates activations: `validate` refuses the static scheme, with all other problems.
            return tuple(c for c in self.layout(name, shape, dtype).components if c.name != ACTIVATION)
        return Component(name="", dtype=dtype), Component(name=AMAX, dtype="float32", block_shape=(1, ALL))

    def replicated_components(self, shard: Shard) -> frozenset[str]:
        return frozenset((AMAX,)) if self.block is None else frozenset()

    def encode(self, name: str, rows: Tensor, out: dict[str, Tensor], ops: Kernels) -> None:
        if self.block is None:
            out[""].view(rows.shape).copy_(rows)
            out[AMAX].copy_(ops.block_amax(rows, (1, None)).view(-1))
            return
        codes, grid = out[""].view(rows.shape), [-(-size // n) for size, n in zip(rows.shape, self.block, strict=True)]
        quantize = ops.quantize_fp8_ue8m0 if self.powers else ops.quantize_fp8
        quantize(rows, self.block, codes=codes, scale=out[SCALE].view(grid))

    def pack(self, shard: Shard, parts: dict[str, Tensor], ops: Kernels) -> dict[str, Tensor]:
        if self.block is not None:
            return self.shaped(shard, parts)
        amax = parts[AMAX].amax().view(1, 1)
        codes, scale = ops.encode_fp8(parts[""].view(shard.local_shape), amax, (None, None))
        return {"": codes, SCALE: scale.view(())}

    def pack_prequantized(
        self, shard: Shard, parts: dict[str, Tensor], replicated: frozenset[str]
    ) -> dict[str, Tensor]:
        components = self.shaped(shard, {**parts, SCALE: self._scale(shard, parts[SCALE])})
        if ACTIVATION in components:
            components[ACTIVATION] = components[ACTIVATION].view(()).float()
        return components if self.block is not None else {**components, SCALE: components[SCALE].view(())}

    def _scale(self, shard: Shard, stored: Tensor) -> Tensor:
        """Stored scales in the layout's dtype, of the same values."""
        scale = stored.view(torch.float8_e8m0fnu) if stored.dtype == torch.uint8 else stored
        dtype = torch_dtype(self.layout(shard.name, shard.shape, shard.dtype).component(SCALE).dtype)
        converted = scale.to(dtype)
        # e8m0 holds powers of two alone: a cast that changes a value would change every weight of its tile.
        if self.powers and scale.dtype != dtype and not torch.equal(converted.float(), scale.float()):
            fault = f"its {SCALE} has values that are not powers of two, and scale_fmt is 'ue8m0'"
            raise InputError.one(shard.name, fault, "Set scale_fmt to 'float' in config.json")
        return converted

    def dequantize(self, shard: Shard, components: Mapping[str, Tensor], dtype: torch.dtype, ops: Kernels) -> Tensor:
        scale = components[SCALE].float()
        if self.block is None:
            return ops.dequantize_fp8(components[""], scale.view(1, 1), (None, None), dtype)
        return ops.dequantize_fp8(components[""], scale, self.block, dtype)

    def float8_kernel(self, name: str) -> Float8Kernel | None:
        if self.block is None:
            return Float8Kernel.SCALED_MM
        return Float8Kernel.TILES if self.block == TILE else None

    def float8_matmul(self, shard: Shard, components: Mapping[str, Tensor], x: Tensor) -> Tensor:
        codes, scale, activation = components[""], components[SCALE], components.get(ACTIVATION)
        if self.block is None:
            return float8_rows_matmul(x, Float8Rows(codes, scale.view(1, 1), activation))
        return float8_tiles_matmul(x, codes, scale, activation)

    def fingerprint_streams(self, shard: Shard, components: Mapping[str, Tensor]) -> Iterable[Stream]:
        codes = components[""]
        yield "code", codes, 1
        if self.block is None:
            yield "scale", components[SCALE].float().expand(len(codes), 1), WHOLE_ROW
        else:
            rows = components[SCALE].float().repeat_interleave(self.block[0], dim=0)
            yield "scale", rows[: len(codes)], self.block[1]
        if ACTIVATION in components:
            yield ACTIVATION, components[ACTIVATION].expand(len(codes), 1), WHOLE_ROW


def _problem(field: str, fault: str, fix: str) -> Problem:
    return Problem(f"quantization_config.{field}", fault, fix)


def _scale_fault(values: Tensor) -> str | None:
    """Scales are floats, or exponents as bytes."""
    return exponents(values) if values.dtype == torch.uint8 else MAGNITUDES(values)
