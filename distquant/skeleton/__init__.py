"""The model without weights: module types, shapes, ties, parallel plan and checkpoint names, as plain data.

Everything that depends on the version of `transformers` lives in this package.
"""

from distquant.skeleton.build import build, build_skeleton
from distquant.skeleton.gguf import GgufNames, gguf_names, source_of, with_gguf_sources
from distquant.skeleton.stored import FLOATS, Kept, as_stored
from distquant.skeleton.words import Attention, Linear, Param, Skeleton, Source

__all__ = [
    "FLOATS",
    "Attention",
    "GgufNames",
    "Kept",
    "Linear",
    "Param",
    "Skeleton",
    "Source",
    "as_stored",
    "build",
    "build_skeleton",
    "gguf_names",
    "source_of",
    "with_gguf_sources",
]
