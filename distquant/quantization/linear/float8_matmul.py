"""Products in float8 e4m3, by kernels of torch and transformers, of weights that are kept in it.

A scale for each row, or one for all: what transformers 5.23 computes on a GPU for compressed-tensors
(`integrations/compressed_tensors.py`, `CompressedTensorsFP8Linear`). Every row of activations becomes float8 under
its own amax / 448, computed in float32, or under the scale that the checkpoint gives. FBGEMM's `f8f8bf16_rowwise`
multiplies and applies both scales where it is installed and runs (see `fbgemm_matmul.py`), and
`torch.nn.functional.scaled_mm` elsewhere: the same product of the same float8 numbers.

Tiles of 128 x 128: transformers' own `fp8_linear` (`integrations/finegrained_fp8.py`, DeepGEMM or Triton), where the
package `kernels` is installed, which fetches them. Activations become float8 under a scale for each 128 of a row.

A rank that holds part of the inputs quantizes its part of each row of activations under that part's amax: where a scale
is for the row, logits differ from those of another width by the method's own error. Weights are the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache

import torch
from torch import Tensor, nn

from distquant.accelerator.facts import reaches
from distquant.accelerator.names import runs_cuda_kernels
from distquant.options import Forward
from distquant.quantization.linear import fbgemm_matmul
from distquant.sharding.shard import Shard

LARGEST = torch.finfo(torch.float8_e4m3fn).max

CAPABILITY = (8, 9)
"""Least CUDA compute capability with float8."""

ALIGNMENT = 16
"""Alignment of inputs and outputs on a GPU (cuBLASLt's and CUTLASS' for float8)."""

TILE = (128, 128)


class Float8Kernel(Enum):
    """A kernel, by its name in reports."""

    SCALED_MM = "torch's scaled_mm"
    FBGEMM = "FBGEMM's f8f8bf16_rowwise"
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


class Float8Multiplier(ABC):
    """Ability of a method: its format means inputs to be float8, too."""

    @abstractmethod
    def float8_kernel(self, name: str) -> Float8Kernel | None:
        """The kernel that can multiply a parameter; None where it is stored in a form that none takes.

        `SCALED_MM` stands for all that multiply rows: `taken` decides between them.
        """

    @abstractmethod
    def float8_matmul(self, shard: Shard, components: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """`x @ W.T` by the weight's `float8_kernel`, `[..., out]` from `[..., in]`."""


def runs_float8(device: torch.device) -> bool:
    """Returns True if the device multiplies float8 by itself."""
    return reaches(device, CAPABILITY)


def missing(kernel: Float8Kernel, device: torch.device) -> str | None:
    """Reason why a kernel cannot run on a device; None where it can."""
    if device.type == "cpu" and kernel is Float8Kernel.SCALED_MM:
        return None
    if not runs_float8(device):
        return f"{kernel.value} does not run on {device}, it needs compute capability {'.'.join(map(str, CAPABILITY))}"
    return _tiles_missing() if kernel is Float8Kernel.TILES else None


@cache
def _tiles_missing() -> str | None:
    try:
        from transformers.integrations.finegrained_fp8 import load_finegrained_fp8_kernel

        load_finegrained_fp8_kernel()
    except Exception as error:  # no package, no network, no build: the report gives its own words
        return f"{Float8Kernel.TILES.value} lacks its kernel ({error})"
    return None


def taken(kernel: Float8Kernel, device: torch.device) -> tuple[Float8Kernel, str]:
    """Returns what multiplies in the place of a kernel on a device, and why nothing faster does where it might."""
    if kernel is not Float8Kernel.SCALED_MM or not runs_cuda_kernels(device):
        return kernel, ""
    reason = fbgemm_matmul.why_not(device)
    return (Float8Kernel.FBGEMM, "") if reason is None else (kernel, reason)


def is_float8(forward: Forward, kernel: Float8Kernel, shape: tuple[int, int], device: torch.device) -> bool:
    """Returns True if a kernel multiplies a weight `[out, in]` on a device."""
    if not forward.tries(Forward.FLOAT8, device) or missing(kernel, device) is not None:
        return False
    alignment = TILE[0] if kernel is Float8Kernel.TILES else ALIGNMENT if device.type != "cpu" else 1
    return not (shape[0] % alignment or shape[1] % alignment)


def float8_rows_matmul(x: Tensor, weight: Float8Rows) -> Tensor:
    """`x @ W.T` in the dtype of `x`, `[..., out]` from `[..., in]`; activations are rounded to float8."""
    rows = x.reshape(-1, x.shape[-1])
    scale = _scale(rows, weight.activation)
    codes = (rows.float() / scale).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    scales = weight.scale.view(-1).expand(len(weight.codes)).contiguous()
    if len(rows) and taken(Float8Kernel.SCALED_MM, x.device)[0] is Float8Kernel.FBGEMM:
        product = fbgemm_matmul.rows_product(codes, scale.view(-1), weight.codes, scales)
    else:
        product = _scaled_mm(codes, scale, weight.codes, scales.view(1, -1))
    return product.to(x.dtype).view(*x.shape[:-1], len(weight.codes))


def _scaled_mm(codes: Tensor, scale: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    row_wise = nn.functional.ScalingType.RowWise
    dtype = torch.float32 if codes.device.type == "cpu" else torch.bfloat16  # CUDA's kernel gives no other
    return nn.functional.scaled_mm(codes, weight.t(), scale, row_wise, scales, row_wise, output_dtype=dtype)


def _scale(rows: Tensor, given: Tensor | None) -> Tensor:
    """float32 `[rows, 1]`: the divisor of each row of activations."""
    if given is not None:
        return given.float().reshape(1, 1).expand(len(rows), 1).contiguous()
    amax = rows.abs().amax(dim=-1, keepdim=True).float()
    return torch.where(amax > 0, amax, 1.0) / LARGEST


def float8_tiles_matmul(x: Tensor, codes: Tensor, scale: Tensor, activation: Tensor | None) -> Tensor:
    """The same for float8 `[out, in]` with a scale for each tile, float32 or float8_e8m0fnu `[out / 128, in / 128]`."""
    from transformers.integrations.finegrained_fp8 import fp8_linear

    half = x if x.dtype in (torch.bfloat16, torch.float16) else x.bfloat16()
    return fp8_linear(half, codes, scale, list(TILE), None, activation).to(x.dtype)
