"""Quantization configurations under Hugging Face's names, and the pure logic of detecting and merging them."""

from distquant.config.base import QuantizationConfig
from distquant.config.bitsandbytes import Bnb4bitConfig, Bnb8bitConfig
from distquant.config.none import NoneConfig
from distquant.config.resolve import Merged, detect, merge, parse
from distquant.config.selection import ModuleSelection
from distquant.config.values import torch_dtype

__all__ = [
    "Bnb4bitConfig",
    "Bnb8bitConfig",
    "Merged",
    "ModuleSelection",
    "NoneConfig",
    "QuantizationConfig",
    "detect",
    "merge",
    "parse",
    "torch_dtype",
]
