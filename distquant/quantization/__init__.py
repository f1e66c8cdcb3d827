"""Quantization methods: one file each in `methods`, on the interfaces of `scheme`, `codec` and `module_factory`."""

from distquant.quantization.codec import Codec, Encoder, PlainDecoder, Stream
from distquant.quantization.module_factory import ModuleFactory
from distquant.quantization.quantized_scheme import QuantizedScheme
from distquant.quantization.registry import SCHEMES, config_classes, register, scheme_for
from distquant.quantization.scheme import Context, Scheme
from distquant.quantization.weight_only import refused_config
from distquant.sharding.shard import Shard

__all__ = [
    "SCHEMES",
    "Codec",
    "Context",
    "Encoder",
    "ModuleFactory",
    "PlainDecoder",
    "QuantizedScheme",
    "Scheme",
    "Shard",
    "Stream",
    "config_classes",
    "refused_config",
    "register",
    "scheme_for",
]
