"""torchao's own tensors: made of rows by its quantization, and put together again of stored components."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distquant.kernels.protocol import Kernels

SCALE, ZERO = "_weight_scale", "_weight_zero_point"
"""Components beside the codes, which are ""."""

INT8, FLOAT8, INTX = "Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor"


@dataclass(frozen=True, slots=True)
class TorchaoTensors:
    """The tensors that one configuration makes.

    Attributes:
        config: torchao's own configuration object.
        kind: name of the tensor class.
        group: weights that share a scale: `"row"`, `"tensor"`, or as many of a row.
    """

    config: Any
    kind: str
    group: str | int

    @property
    def granularity(self) -> Any:
        """torchao's granularity of weights; where there are two, the first is that of activations."""
        given = self.config.granularity
        return given[-1] if isinstance(given, (list, tuple)) else given

    def quantize(self, rows: Tensor) -> dict[str, Tensor]:
        """Components of a matrix of the load dtype, by torchao."""
        from torchao.quantization import Float8Tensor, Int8Tensor, IntxUnpackedToInt8Tensor
        from torchao.quantization.quantize_.common import KernelPreference

        config = self.config
        if self.kind == FLOAT8:
            # The same kernel everywhere: AUTO would take another library's where that is installed.
            kernel = KernelPreference.TORCH
            made = Float8Tensor.from_hp(rows, config.weight_dtype, self.granularity, kernel_preference=kernel)
            return {"": _without_nan(made.qdata, made.scale), SCALE: made.scale}
        if self.kind == INT8:
            reduced = bool(getattr(config, "reduce_range", False))
            made = Int8Tensor.from_hp(rows, self.granularity, reduce_range=reduced)
        else:
            block = (1, rows.shape[1] if self.group == "row" else self.group)
            made = IntxUnpackedToInt8Tensor.from_hp(rows, block, config.weight_dtype, mapping_type=config.mapping_type)
        return {"": made.qdata, SCALE: made.scale, ZERO: made.zero_point}

    def encode_rows(self, rows: Tensor, codes: Tensor, scales: Tensor, ops: Kernels) -> None:
        """Fills codes `[rows, columns]` and scales, float32 `[rows, 1]`, of rows with a scale each.

        The bits of `Float8Tensor.from_hp` and `Int8Tensor.from_hp` of torchao 0.18 (`_choose_scale_float8` and
        `_quantize_affine_float8`, `choose_qparams_affine` and `quantize_affine` in `quantization/quant_primitives.py`):
        scales are computed in the weight's dtype, quotients in float32.
        """
        extreme = ops.block_amax(rows, (1, None)).to(rows.dtype)
        if self.kind == FLOAT8:
            scales.copy_(extreme / torch.finfo(codes.dtype).max)
            ops.encode_scaled_rows(rows, scales, codes.dtype, codes=codes)
            return
        half = 2 if getattr(self.config, "reduce_range", False) else 1
        low, high = -128 // half, 127 // half
        smallest = torch.finfo(torch.float32).eps
        scales.copy_((extreme / ((high - low) / 2)).clamp_(min=smallest))
        ops.encode_scaled_rows(rows, scales, codes.dtype, inverse=True, low=low, high=high, codes=codes)

    def tensor(self, shape: tuple[int, int], dtype: torch.dtype, components: Mapping[str, Tensor]) -> Tensor:
        """torchao's tensor of that shape, as its own `quantize_` would have built it of a weight of `dtype`."""
        from torchao.quantization import Float8Tensor, Int8Tensor, IntxUnpackedToInt8Tensor
        from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

        config, (rows, columns), codes = self.config, shape, components[""]
        block = [rows, columns] if self.group == "tensor" else [1, columns if self.group == "row" else int(self.group)]
        if self.kind == FLOAT8:
            return Float8Tensor(codes, components[SCALE], block_size=block, dtype=dtype)
        if self.kind == INTX:
            target, scale, zero = config.weight_dtype, components[SCALE], components[ZERO]
            return IntxUnpackedToInt8Tensor(codes, scale, zero, target, tuple(block), dtype, None)
        activations, reduced = None, False
        if type(config).__name__ == "Int8DynamicActivationInt8WeightConfig":
            granularity = config.granularity
            granularity = granularity[0] if isinstance(granularity, (list, tuple)) else granularity
            reduced = bool(config.reduce_range)
            activations = QuantizeTensorToInt8Kwargs(granularity, config.act_mapping_type, reduced)
        return Int8Tensor(
            codes,
            components[SCALE],
            block,
            dtype,
            zero_point=components[ZERO],
            act_quant_kwargs=activations,
            reduce_range=reduced,
        )


def _without_nan(codes: Tensor, scale: Tensor) -> Tensor:
    """float8 codes `[rows, columns]`, zeros where the scale (`[rows or 1, groups]`) is zero."""
    empty = scale == 0
    if not bool(empty.any()):
        return codes
    spread = empty.repeat_interleave(codes.shape[1] // empty.shape[1], 1).expand(codes.shape)
    return codes.view(torch.uint8).masked_fill(spread, 0).view(codes.dtype)
