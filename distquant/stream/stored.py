"""The components of one pre-quantized weight, read on demand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from distquant.checkpoint import TensorInfo
from distquant.stream.reader import Reader
from distquant.stream.rows import RowRange

TORCH_DTYPE = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""torch's dtype by safetensors' name."""


@dataclass
class StoredWeight:
    """`schemes.Stored` over a checkpoint's headers and a reader."""

    reader: Reader
    infos: dict[str, TensorInfo]
    """Header of each component."""

    def shape(self, component: str) -> tuple[int, ...]:
        return self.infos[component].shape

    def read(self, component: str, span: tuple[int, int] | None = None) -> Tensor:
        info = self.infos[component]
        rows = info.shape[0] if info.shape else 1
        row = info.nbytes // max(rows, 1)
        first, last = span or (0, rows)
        flat = self.rows(component, row, [(first, last)], (0, row))
        shape = (last - first, *info.shape[1:]) if info.shape else ()
        return flat.view(TORCH_DTYPE[info.dtype]).view(shape)

    def rows(
        self, component: str, row_bytes: int, segments: Iterable[tuple[int, int]], columns: tuple[int, int]
    ) -> Tensor:
        info, segments = self.infos[component], list(segments)
        width = columns[1] - columns[0]
        out = torch.empty(sum(b - a for a, b in segments) * width, dtype=torch.uint8)
        at = 0
        for a, b in segments:
            offset = info.offset + a * row_bytes
            piece = RowRange(info.name, info.file, offset, row_bytes, columns, b - a, 0, info.dtype)
            self.reader.read_rows(piece, out[at : at + piece.nbytes])
            at += piece.nbytes
        return out
