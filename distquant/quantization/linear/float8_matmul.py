"""Products in float8 e4m3, by kernels of torch and transformers, of weights that are kept in it.

A scale for each row, or one for all: what transformers 5.23 computes on a GPU for compressed-tensors
(`integrations/compressed_tensors.py`, `CompressedTensorsFP8Linear`). Every row of activations becomes float8 under
its own amax / 448, found in float32, or under the scale that the checkpoint gives; `torch.nn.functional.scaled_mm`
multiplies and applies both scales. FBGEMM's `f8f8bf16_rowwise` is the same product.

Tiles of 128 x 128: transformers' own `fp8_linear` (`integrations/finegrained_fp8.py`, DeepGEMM or Triton), where the
package `kernels` is installed, which fetches them. Activations become float8 under a scale for each 128 of a row.

A rank that holds part of the inputs quantizes its part of each row of activations under that part's amax: where a scale
is for the row, logits differ from those of another width by the method's own error. Weights are the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cache

import torch
from torch import Tensor, nn

from distquant.options import Forward

LARGEST = torch.finfo(torch.float8_e4m3fn).max

CAPABILITY = (8, 9)
"""Least CUDA compute capability with float8."""

MULTIPLE = 16
"""What inputs and outputs must be multiples of on a GPU (cuBLASLt's and CUTLASS' alignment of float8)."""

TILE = (128, 128)


class Float8Kernel(Enum):
    """What multiplies, as reports name it."""

    SCALED_MM = "torch's scaled_mm"
    TILES = "transformers' fp8_linear"


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


def missing(kernel: Float8Kernel, device: torch.device) -> str | None:
    """Why a kernel cannot run on a device; None where it can."""
    if device.type == "cpu" and kernel is Float8Kernel.SCALED_MM:
        return None
    if not runs_float8(device):
        return f"{kernel.value} does not run on {device}, it needs compute capability {'.'.join(map(str, CAPABILITY))}"
    return _why_no_tiles() if kernel is Float8Kernel.TILES else None


@cache
def _why_no_tiles() -> str | None:
    try:
        from transformers.integrations.finegrained_fp8 import load_finegrained_fp8_kernel

        load_finegrained_fp8_kernel()
    except Exception as error:  # no package, no network, no build: what it is, is told
        return f"{Float8Kernel.TILES.value} lacks its kernel ({error})"
    return None


def is_float8(forward: Forward, kernel: Float8Kernel, shape: tuple[int, int], device: torch.device) -> bool:
    """Whether a kernel multiplies a weight `[out, in]` on a device."""
    if not forward.tries(Forward.FLOAT8, device) or missing(kernel, device) is not None:
        return False
    multiple = TILE[0] if kernel is Float8Kernel.TILES else MULTIPLE if device.type == "cuda" else 1
    return not (shape[0] % multiple or shape[1] % multiple)


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


def multiply_tiles(x: Tensor, codes: Tensor, scale: Tensor, activation: Tensor | None) -> Tensor:
    """The same for float8 `[out, in]` with a scale for each tile, float32 or float8_e8m0fnu `[out / 128, in / 128]`."""
    from transformers.integrations.finegrained_fp8 import fp8_linear

    half = x if x.dtype in (torch.bfloat16, torch.float16) else x.bfloat16()
    return fp8_linear(half, codes, scale, list(TILE), None, activation).to(x.dtype)
