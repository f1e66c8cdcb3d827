"""What a planner needs to know about a model, with neither torch nor transformers in it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

STAR = "*"
"""Stands for an expert's number in the name of a stack of experts."""

ROWS = -1
"""As the dim of a `Source.take`: the first two dims, experts and their rows, taken together."""


@dataclass(frozen=True, slots=True)
class Source:
    """One checkpoint tensor, or a part of it, that goes into a model parameter.

    Attributes:
        tensor: name in the checkpoint.
        component: "" for the weight itself, else the component of a quantized weight that it stores.
        offset: where its first element lies in the parameter, one index a dim; None = it fills the parameter.
        take: (dim, start, stop) of the checkpoint tensor that is meant; None = all of it. `ROWS` for dim takes
            the first two together.

    Sources of a stack of experts have the expert's number first in `offset`; without an offset they hold all experts.
    """

    tensor: str
    component: str = ""
    offset: tuple[int, ...] | None = None
    take: tuple[int, int, int] | None = None


def taken(source: Source, shape: tuple[int, ...]) -> int:
    """Elements that a source takes of a checkpoint tensor of this shape."""
    if source.take is None:
        return math.prod(shape)
    dim, start, stop = source.take
    whole = math.prod(shape[:2]) if dim == ROWS else shape[dim]
    return math.prod(shape) // whole * (stop - start)


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter or persistent buffer: its logical shape and the dtype that it is loaded in (torch's name)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    buffer: bool = False


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear module. `transposed` marks GPT-2's Conv1D, whose weight is stored `[in, out]`.

    `experts` above 0 marks one projection of that many experts; its name has a star for the expert's number.
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
        out_features, in_features: of one expert.
        start: its first output in that parameter.
        dim: its dim that is the experts' intermediate size: 0 (`out`) or 1 (`in`).
    """

    name: str
    parameter: str
    out_features: int
    in_features: int
    start: int = 0
    shard_dim: int = 0


@dataclass(frozen=True, slots=True)
class Experts:
    """A module of fused experts in the common form: parameters `[expert, out, in]`, an activation between two of them.

    Attributes:
        name: path of the module.
        count: of experts.
        intermediate: features between the projections.
        projections: in the order in which they are applied.
        transposed: whether the module's own parameters are `[expert, in, out]`.
        interleaved: whether gate and up alternate row by row; else gate lies before up.
        bias: whether each projection has a bias, the parameter `<parameter>_bias`.
        dense: whether it is called with every token for every expert (Llama-4), not with the router's choice.
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
class Part:
    """A stored component of one expert's weight, which the model holds merged with others in one parameter.

    Attributes:
        tensor: name in the checkpoint.
        component: of the quantized weight.
        expert: number of the expert.
        index: which of the weights that are merged along the outputs (0 gate, 1 up).
    """

    tensor: str
    component: str
    expert: int
    index: int


@dataclass(frozen=True, slots=True)
class Attention:
    """An attention module whose heads may be dealt out over ranks."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
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
    experts: dict[str, Experts]
    """Modules of fused experts whose form is known."""
    tp_plan: dict[str, str]
    """The model's own tensor-parallel plan: module pattern (`*` for the layer number) -> style."""
    ep_plan: dict[str, str]
    default_skip: tuple[str, ...]
    """Modules that are not quantized unless asked for: output head, tied weights (as transformers decides)."""
    no_split: tuple[str, ...] = ()
    """Class names of modules that a device map must keep whole."""
    modules: tuple[str, ...] = field(default=())
    """Paths of all modules."""
    unknown_experts: dict[str, str] = field(default_factory=dict)
    """Modules with 3-D parameters of a form that is not known -> what was found."""
    parts: dict[str, tuple[Part, ...]] = field(default_factory=dict)
    """Parameter -> components of quantized weights that are merged into it."""


def wildcard(name: str) -> str:
    """The path with its layer numbers as `*`, the way parallel plans spell it."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
