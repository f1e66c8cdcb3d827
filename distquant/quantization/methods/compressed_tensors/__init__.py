"""The compressed-tensors format: groups of modules, each with its own precision and way of storing weights."""

from distquant.quantization.methods.compressed_tensors.scheme import CompressedTensorsScheme

__all__ = ["CompressedTensorsScheme"]
