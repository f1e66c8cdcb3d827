"""Quantization methods: one file each, with layout, execution and module."""

from distquant.schemes.base import Context, Scheme
from distquant.schemes.registry import SCHEMES, config_classes, register, scheme_for
from distquant.schemes.shard import Shard

__all__ = ["SCHEMES", "Context", "Scheme", "Shard", "config_classes", "register", "scheme_for"]
