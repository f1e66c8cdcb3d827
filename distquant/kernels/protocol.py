"""The interface of kernels: functions that schemes call, the same in every implementation.

`distquant.kernels.reference` defines each function, with its shapes, dtypes and errors; the others must be bit-equal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Block = tuple["int | None", "int | None"]
"""Rows and columns that share a scale; None: all of that dim."""


class Kernels(Protocol):
    """A module of kernels; see `distquant.kernels.reference`."""

    def block_absmax(self, weight: Tensor, blocksize: int, *, absmax: Tensor | None = None) -> Tensor: ...

    def block_amax(self, weight: Tensor, block: Block) -> Tensor: ...

    def blockwise_absmax(self, values: Tensor, blocksize: int, *, absmax: Tensor | None = None) -> Tensor: ...

    def code_values(self, quant_type: str, device: torch.device | str = "cpu") -> Tensor: ...

    def dequantize_4bit(
        self,
        codes: Tensor,
        absmax: Tensor,
        blocksize: int,
        quant_type: str,
        shape: tuple[int, ...],
        dtype: torch.dtype = ...,
    ) -> Tensor: ...

    def dequantize_blockwise(self, codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int) -> Tensor: ...

    def dequantize_fp8(self, codes: Tensor, scale: Tensor, block: Block, dtype: torch.dtype = ...) -> Tensor: ...

    def dequantize_groups(
        self, codes: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, dtype: torch.dtype = ...
    ) -> Tensor: ...

    def dequantize_mxfp4(self, codes: Tensor, scale: Tensor, dtype: torch.dtype = ...) -> Tensor: ...

    def encode_4bit(
        self,
        weight: Tensor,
        absmax: Tensor,
        blocksize: int,
        quant_type: str,
        ragged: bool = False,
        *,
        codes: Tensor | None = None,
    ) -> Tensor: ...

    def encode_fp8(
        self, weight: Tensor, amax: Tensor, block: Block, *, codes: Tensor | None = None, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...

    def encode_int8_rows(self, weight: Tensor, absmax: Tensor, out: Tensor | None = None) -> Tensor: ...

    def encode_scaled_rows(
        self,
        weight: Tensor,
        scale: Tensor,
        dtype: torch.dtype,
        *,
        inverse: bool = False,
        rounded: bool = False,
        low: int = -128,
        high: int = 127,
        codes: Tensor | None = None,
    ) -> Tensor: ...

    def quantize_4bit(
        self,
        weight: Tensor,
        blocksize: int,
        quant_type: str,
        *,
        codes: Tensor | None = None,
        absmax: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def quantize_blockwise(
        self, values: Tensor, code: Tensor, blocksize: int, *, codes: Tensor | None = None, absmax: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...

    def quantize_fp8(
        self, weight: Tensor, block: Block, *, codes: Tensor | None = None, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...

    def quantize_fp8_rows(
        self, weight: Tensor, *, codes: Tensor | None = None, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...

    def quantize_fp8_ue8m0(
        self, weight: Tensor, block: Block, *, codes: Tensor | None = None, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...

    def quantize_groups(
        self,
        weight: Tensor,
        group_size: int,
        bits: int,
        symmetric: bool,
        *,
        codes: Tensor | None = None,
        scale: Tensor | None = None,
        zero: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]: ...

    def quantize_int8_rows(
        self, weight: Tensor, *, codes: Tensor | None = None, absmax: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...

    def quantize_mxfp4(
        self, weight: Tensor, *, codes: Tensor | None = None, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...

    def row_absmax(self, weight: Tensor, *, absmax: Tensor | None = None) -> Tensor: ...

    def unpack_4bit(self, packed: Tensor) -> Tensor: ...
