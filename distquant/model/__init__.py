"""The model without weights: module types, shapes, ties, parallel plan and checkpoint names, as plain data.

Everything that depends on the version of `transformers` lives in this package.
"""

from distquant.model.as_stored import FLOATS, Kept, as_stored
from distquant.model.build import build, describe_model
from distquant.model.description import ROWS, STAR, Attention, Experts, Linear, ModelDescription, Param, Source, taken
from distquant.model.experts import EXPECTED, sources_by_expert, split_experts
from distquant.model.gguf import GgufNames, gguf_names, source_of, with_gguf_sources
from distquant.model.sidecars import model_file_problems, tokenizer_file_problems
from distquant.model.weight_mapping import tell_parts

__all__ = [
    "EXPECTED",
    "FLOATS",
    "ROWS",
    "STAR",
    "Attention",
    "Experts",
    "GgufNames",
    "Kept",
    "Linear",
    "ModelDescription",
    "Param",
    "Source",
    "as_stored",
    "build",
    "describe_model",
    "gguf_names",
    "model_file_problems",
    "source_of",
    "sources_by_expert",
    "split_experts",
    "taken",
    "tell_parts",
    "tokenizer_file_problems",
    "with_gguf_sources",
]
