"""The model without weights: module types, shapes, ties, parallel plan and checkpoint names, as plain data.

Everything that depends on the version of `transformers` lives in this package.
"""

from distquant.model.as_stored import PLAIN_FLOATS, QuantizedTensors, as_stored
from distquant.model.build import build, describe_model
from distquant.model.cache import CacheLayer, Decoder, describe_decoder
from distquant.model.config_numbers import number_problems
from distquant.model.description import (
    ROWS,
    STAR,
    Attention,
    ExpertsDescription,
    Linear,
    MergedComponent,
    ModelDescription,
    Param,
    Source,
    source_numel,
)
from distquant.model.experts import EXPECTED, sources_by_expert, split_experts
from distquant.model.gguf import GgufNames, gguf_names, source_of, with_gguf_sources
from distquant.model.module_names import ModuleNames
from distquant.model.sidecars import model_file_problems, tokenizer_file_problems
from distquant.model.weight_mapping import Placer, check_merged_components

__all__ = [
    "EXPECTED",
    "PLAIN_FLOATS",
    "ROWS",
    "STAR",
    "Attention",
    "CacheLayer",
    "Decoder",
    "ExpertsDescription",
    "GgufNames",
    "Linear",
    "MergedComponent",
    "ModelDescription",
    "ModuleNames",
    "Param",
    "Placer",
    "QuantizedTensors",
    "Source",
    "as_stored",
    "build",
    "check_merged_components",
    "describe_decoder",
    "describe_model",
    "gguf_names",
    "model_file_problems",
    "number_problems",
    "source_numel",
    "source_of",
    "sources_by_expert",
    "split_experts",
    "tokenizer_file_problems",
    "with_gguf_sources",
]
