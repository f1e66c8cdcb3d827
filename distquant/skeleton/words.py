"""What a planner needs to know about a model, with neither torch nor transformers in it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Source:
    """One checkpoint tensor, or a part of it, that goes into a model parameter.

    Attributes:
        tensor: name in the checkpoint.
        component: "" for the weight itself, else the component of a quantized weight that it stores.
        offset: where its first element lies in the parameter, one index a dim; None = it fills the parameter.
        take: (dim, start, stop) of the checkpoint tensor that is meant; None = all of it.
    """

    tensor: str
    component: str = ""
    offset: tuple[int, ...] | None = None
    take: tuple[int, int, int] | None = None


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter or persistent buffer: its logical shape and the dtype that it is loaded in (torch's name)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    buffer: bool = False


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear module. `transposed` marks GPT-2's Conv1D, whose weight is stored `[in, out]`."""

    name: str
    out_features: int
    in_features: int
    bias: bool
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Attention:
    """An attention module whose heads may be dealt out over ranks."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """The whole model as data. Names are module or parameter paths."""

    model_type: str
    architecture: str
    params: dict[str, Param]
    """Every parameter and persistent buffer; of tied ones only the source."""
    tied: dict[str, str]
    """Tied parameter -> the parameter that it shares."""
    sources: dict[str, tuple[Source, ...]]
    """Where each parameter's values lie in the checkpoint; empty without a checkpoint."""
    unexpected: tuple[str, ...]
    """Checkpoint tensors that the model has no place for."""
    missing: tuple[str, ...]
    """Parameters that the checkpoint lacks."""
    linears: dict[str, Linear]
    attentions: dict[str, Attention]
    embeddings: tuple[str, ...]
    input_embedding: str | None
    output_embedding: str | None
    experts: tuple[str, ...]
    """Modules that hold fused experts as 3-D parameters."""
    tp_plan: dict[str, str]
    """The model's own tensor-parallel plan: module pattern (`*` for the layer number) -> style."""
    ep_plan: dict[str, str]
    default_skip: tuple[str, ...]
    """Modules that are not quantized unless asked for: output head, tied weights (as transformers decides)."""
    no_split: tuple[str, ...] = ()
    """Class names of modules that a device map must keep whole."""
    modules: tuple[str, ...] = field(default=())
    """Paths of all modules."""


def wildcard(name: str) -> str:
    """The path with its layer numbers as `*`, the way parallel plans spell it."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
