"""The description of a model for the planner, as plain data without torch and transformers."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

STAR = "*"
"""Stands for an expert's number in the name of a stack of experts."""

ROWS = -1
"""A dim of `Source.take` that means the first two dims together: experts and their rows."""


@dataclass(frozen=True, slots=True)
class Source:
    """One checkpoint tensor, or a part of it, that goes into a model parameter.

    Attributes:
        tensor: name in the checkpoint.
        component: "" for the weight itself, else the component of a quantized weight.
        offset: place of its first element in the parameter, one index a dim; None = it fills the parameter.
        take: (dim, start, stop) of the checkpoint tensor; None = all of it. `ROWS` as dim joins the first two.

    Sources of a stack of experts have the expert's number first in `offset`; without an offset they hold all experts.
    """

    tensor: str
    component: str = ""
    offset: tuple[int, ...] | None = None
    take: tuple[int, int, int] | None = None


def source_numel(source: Source, shape: tuple[int, ...]) -> int:
    """Counts the elements that a source takes from a checkpoint tensor of this shape."""
    if source.take is None:
        return math.prod(shape)
    dim, start, stop = source.take
    size = math.prod(shape[:2]) if dim == ROWS else shape[dim]
    return math.prod(shape) // size * (stop - start)


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter or persistent buffer, with its logical shape and the dtype in which it is loaded (torch's name)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    buffer: bool = False


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear module, or one projection of all experts of a module.

    Attributes:
        name: path of the module; for experts with a star for the expert's number.
        out_features, in_features: sizes of the logical weight `[out, in]`.
        bias: True if it has a bias.
        transposed: True if its weight is stored `[in, out]`, as that of GPT-2's Conv1D.
        experts: number of experts; 0 for a module.
    """

    name: str
    out_features: int
    in_features: int
    bias: bool
    transposed: bool = False
    experts: int = 0


@dataclass(frozen=True, slots=True)
class Projection:
    """One projection of every expert of a module: a stack of weights `[expert, out, in]`.

    Attributes:
        name: last part of its path: `gate_proj`, `up_proj`, `gate_up_proj` or `down_proj`.
        parameter: the module's own parameter that holds it.
        out_features, in_features: sizes of one expert's weight.
        start: its first output in that parameter.
        shard_dim: its dim of the experts' intermediate size: 0 (`out`) or 1 (`in`).
    """

    name: str
    parameter: str
    out_features: int
    in_features: int
    start: int = 0
    shard_dim: int = 0


@dataclass(frozen=True, slots=True)
class ExpertsDescription:
    """A module of fused experts in the common form: parameters `[expert, out, in]`, an activation between two of them.

    Attributes:
        name: path of the module.
        count: number of experts.
        intermediate: features between the projections.
        projections: projections in the order in which they are applied.
        transposed: True if the module's own parameters are `[expert, in, out]`.
        interleaved: True if gate and up alternate row by row; otherwise gate is stored before up.
        bias: True if each projection has a bias, the parameter `<parameter>_bias`.
        dense: True if it is called with every token for every expert (Llama-4), not with the router's choice.
    """

    name: str
    count: int
    intermediate: int
    projections: tuple[Projection, ...]
    transposed: bool = False
    interleaved: bool = False
    bias: bool = False
    dense: bool = False


@dataclass(frozen=True, slots=True)
class MergedComponent:
    """A stored component of one expert's weight, which the model holds merged with others in one parameter.

    Attributes:
        tensor: name in the checkpoint.
        component: name of the component of the quantized weight.
        expert: number of the expert.
        index: place among the weights that are merged along the outputs (0 gate, 1 up).
    """

    tensor: str
    component: str
    expert: int
    index: int


@dataclass(frozen=True, slots=True)
class Attention:
    """An attention module whose heads can be distributed over ranks.

    Attributes:
        name: path of the module.
        heads, kv_heads: number of query heads and of kv heads.
        head_dim: features of a head.
        together: query heads that stay on one rank, because their q, k and v are one block of a packed projection.
    """

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    together: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
    """A model as data. Names are module or parameter paths."""

    model_type: str
    architecture: str
    params: dict[str, Param]
    """Every parameter and persistent buffer; of tied ones only the source."""
    tied: dict[str, str]
    """Tied parameter -> the parameter that it shares."""
    sources: dict[str, tuple[Source, ...]]
    """Parameter -> its checkpoint tensors; empty without a checkpoint."""
    unexpected: tuple[str, ...]
    """Checkpoint tensors without a place in the model."""
    missing: tuple[str, ...]
    """Parameters that the checkpoint lacks."""
    unconverted: tuple[str, ...] = ()
    """Parameters that the checkpoint has in a form that cannot be converted, which has been reported."""
    forced: dict[str, str] = field(default_factory=dict)
    """Parameter that is not loaded in the model's dtype -> what decides that, as a clause for a note."""
    linears: dict[str, Linear]
    attentions: dict[str, Attention]
    embeddings: tuple[str, ...]
    input_embedding: str | None
    output_embedding: str | None
    experts: dict[str, ExpertsDescription]
    """Modules of fused experts with a known form."""
    tp_plan: dict[str, str]
    """The model's own tensor-parallel plan: module pattern (`*` for the layer number) -> style."""
    ep_plan: dict[str, str]
    default_skip: tuple[str, ...]
    """Modules that are not quantized by default: output head, tied weights (as transformers decides)."""
    no_split: tuple[str, ...] = ()
    """Class names of modules that a device map must not split."""
    modules: tuple[str, ...] = field(default=())
    """Paths of all modules."""
    unknown_experts: dict[str, str] = field(default_factory=dict)
    """Modules with 3-D parameters of an unknown form -> their class and shapes."""
    parts: dict[str, tuple[MergedComponent, ...]] = field(default_factory=dict)
    """Parameter -> components of quantized weights that are merged into it."""


def wildcard(name: str) -> str:
    """Returns the path with `*` for layer numbers, as parallel plans spell it."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
