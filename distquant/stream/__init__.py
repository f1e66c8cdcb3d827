"""Bytes from safetensors files: where a rank's rows lie, and a reader that streams them within a budget."""

from distquant.stream.reader import Chunk, Reader, ReadStats
from distquant.stream.rows import RowRange, row_ranges

__all__ = ["Chunk", "ReadStats", "Reader", "RowRange", "row_ranges"]
