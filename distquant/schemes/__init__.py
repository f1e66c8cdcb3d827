"""Quantization methods: one file each, with layout, execution and module."""

from distquant.schemes.base import Context, Quantizer, Scheme, Stored
from distquant.schemes.registry import SCHEMES, config_classes, register, scheme_for
from distquant.schemes.shard import Shard

__all__ = ["SCHEMES", "Context", "Quantizer", "Scheme", "Shard", "Stored", "config_classes", "register", "scheme_for"]
