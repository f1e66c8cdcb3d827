"""Quantization methods: one file each, with layout, execution and module."""

from distquant.quantization.registry import SCHEMES, config_classes, register, scheme_for
from distquant.quantization.scheme import Context, Scheme
from distquant.sharding.shard import Shard

__all__ = ["SCHEMES", "Context", "Scheme", "Shard", "config_classes", "register", "scheme_for"]
