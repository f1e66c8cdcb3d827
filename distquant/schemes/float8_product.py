"""Products in float8, by torch's own kernel, for weights in float8 e4m3 with a scale for each row or for all.

What transformers 5.23 computes on a GPU for compressed-tensors (`integrations/compressed_tensors.py`,
`CompressedTensorsFP8Linear`): every row of activations becomes float8 under its own amax / 448, found in float32, or
under the scale that the checkpoint gives; `torch.nn.functional.scaled_mm` multiplies and applies both scales. FBGEMM's
`f8f8bf16_rowwise` is the same product.

A rank that holds part of the inputs quantizes its part of each row of activations under that part's amax: logits then
differ from those of another width by the method's own error. Weights are the same bits, as everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distquant.options import Forward

LARGEST = torch.finfo(torch.float8_e4m3fn).max

CAPABILITY = (8, 9)
"""Least CUDA compute capability with float8."""

MULTIPLE = 16
"""What inputs and outputs must be multiples of on a GPU (cuBLASLt's and CUTLASS' alignment of float8)."""


@dataclass(frozen=True, slots=True)
class Float8Rows:
    """A weight for `scaled_mm`.

    Attributes:
        codes: float8_e4m3fn `[out, in]`.
        scale: float32 `[out, 1]` or `[1, 1]`.
        activation: float32 scale of all activations, one element; None = each row has its own.
    """

    codes: Tensor
    scale: Tensor
    activation: Tensor | None = None


def runs_float8(device: torch.device) -> bool:
    """Whether the device multiplies float8 by itself."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= CAPABILITY


def is_float8(forward: Forward, shape: tuple[int, int], device: torch.device) -> bool:
    """Whether a weight `[out, in]` on a device is multiplied in float8, where its method could be."""
    if forward is Forward.DEQUANTIZE or (forward is Forward.AUTO and not runs_float8(device)):
        return False
    return device.type != "cuda" or not (shape[0] % MULTIPLE or shape[1] % MULTIPLE)


def multiply(x: Tensor, weight: Float8Rows) -> Tensor:
    """`x @ W.T` in the dtype of `x`, `[..., out]` from `[..., in]`; activations are rounded to float8."""
    by = nn.functional.ScalingType.RowWise
    rows = x.reshape(-1, x.shape[-1])
    scale = _scale(rows, weight.activation)
    codes = (rows.float() / scale).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    scales = weight.scale.t().expand(1, len(weight.codes)).contiguous()
    dtype = torch.float32 if x.device.type == "cpu" else torch.bfloat16  # CUDA's kernel gives no other
    found = nn.functional.scaled_mm(codes, weight.codes.t(), scale, by, scales, by, output_dtype=dtype)
    return found.to(x.dtype).view(*x.shape[:-1], -1)


def _scale(rows: Tensor, given: Tensor | None) -> Tensor:
    """float32 `[rows, 1]`: what each row of activations is divided by."""
    if given is not None:
        return given.float().reshape(1, 1).expand(len(rows), 1).contiguous()
    amax = rows.abs().amax(dim=-1, keepdim=True).float()
    return torch.where(amax > 0, amax, 1.0) / LARGEST
