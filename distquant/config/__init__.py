"""Quantization configurations under Hugging Face's names, and the pure logic of detecting and merging them."""

from distquant.config.auto_round import AutoRoundConfig
from distquant.config.base import QuantizationConfig
from distquant.config.bitsandbytes import Bnb4bitConfig, Bnb8bitConfig
from distquant.config.codebooks import AqlmConfig, HiggsConfig, SpqrConfig, VptqConfig
from distquant.config.compressed_tensors import CompressedTensorsConfig
from distquant.config.delegated import (
    BitnetConfig,
    EetqConfig,
    GemmaConfig,
    MetalConfig,
    QuarkConfig,
    SinqConfig,
)
from distquant.config.float4 import FouroversixConfig, FpQuantConfig, Nvfp4Config
from distquant.config.fp8 import FbgemmFp8Config, Fp8Config, Mxfp8Config
from distquant.config.frozen import FrozenDict
from distquant.config.gguf import GgufConfig
from distquant.config.gptq import AwqConfig, GptqConfig
from distquant.config.hqq import HqqConfig
from distquant.config.mxfp4 import Mxfp4Config
from distquant.config.none import NoneConfig
from distquant.config.quantization_group import QuantizationArgs, QuantizationGroup
from distquant.config.quanto import QuantoConfig
from distquant.config.resolve import Merged, detect, merge, parse
from distquant.config.selection import ModuleSelection
from distquant.config.torchao import TorchaoConfig
from distquant.config.values import torch_dtype
from distquant.config.vocabulary import Precision

CONFIG_CLASSES: tuple[type[QuantizationConfig], ...] = (
    NoneConfig, Bnb4bitConfig, Bnb8bitConfig, GptqConfig, AwqConfig, AutoRoundConfig, CompressedTensorsConfig,
    Fp8Config, Mxfp8Config, Mxfp4Config, FbgemmFp8Config, QuantoConfig, TorchaoConfig, HqqConfig, GgufConfig,
    AqlmConfig, BitnetConfig, EetqConfig, FouroversixConfig, FpQuantConfig, GemmaConfig, HiggsConfig, MetalConfig,
    Nvfp4Config, QuarkConfig, SinqConfig, SpqrConfig, VptqConfig,
)  # fmt: skip
"""Every method that has a configuration here, in the order of the schemes that load them (`quantization.registry`)."""

__all__ = [
    "CONFIG_CLASSES",
    "AqlmConfig",
    "AutoRoundConfig",
    "AwqConfig",
    "BitnetConfig",
    "Bnb4bitConfig",
    "Bnb8bitConfig",
    "CompressedTensorsConfig",
    "EetqConfig",
    "FbgemmFp8Config",
    "FouroversixConfig",
    "Fp8Config",
    "FpQuantConfig",
    "FrozenDict",
    "GemmaConfig",
    "GgufConfig",
    "GptqConfig",
    "HiggsConfig",
    "HqqConfig",
    "Merged",
    "MetalConfig",
    "ModuleSelection",
    "Mxfp4Config",
    "Mxfp8Config",
    "NoneConfig",
    "Nvfp4Config",
    "Precision",
    "QuantizationArgs",
    "QuantizationConfig",
    "QuantizationGroup",
    "QuantoConfig",
    "QuarkConfig",
    "SinqConfig",
    "SpqrConfig",
    "TorchaoConfig",
    "VptqConfig",
    "detect",
    "merge",
    "parse",
    "torch_dtype",
]
