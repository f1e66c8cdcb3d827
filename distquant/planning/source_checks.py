"""Checks that the checkpoint's tensors can fill the model's parameters: components, dtypes and shapes, from headers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from distquant.errors import Problem, Problems, folded
from distquant.model import PLAIN_FLOATS, ROWS, Linear, Param, Source, sources_by_expert
from distquant.planning.described import Described
from distquant.planning.expert_parallel import expert_name

LISTED = 20
"""Problems that are listed; the others are counted."""

OTHER_CHECKPOINT = "The checkpoint is of another model or method; check config.json"


@dataclass(frozen=True, slots=True)
class _Filling:
    """A parameter, or one expert's part of a stack, and the checkpoint tensors that fill it.

    Attributes:
        param: with the shape of an unquantized tensor of it in the checkpoint.
        logical: its shape for the method, `[out, in]` for a weight.
        sources: the tensors.
        quantized: True if the scheme holds it.
        as_stored: True if it keeps the form in which a skipped method stores it.
    """

    param: Param
    logical: tuple[int, ...]
    sources: tuple[Source, ...]
    quantized: bool
    as_stored: bool


def check_sources(described: Described, refused: bool, problems: Problems) -> None:
    """Adds the problems of parameters that their checkpoint tensors cannot fill, each cause once.

    Args:
        described: the load.
        refused: True if the way in which weights are stored is not supported: there is no more to say of those.
        problems: gets them.
    """
    description = described.description
    weights, kept = {f"{name}.weight" for name in described.converted}, set(described.kept.weights)
    found: list[Problem] = []
    for name, param in description.params.items():
        if name not in description.sources or (refused and name in weights):
            continue
        filling = _Filling(param, param.shape, description.sources[name], name in weights, name in kept)
        linear = description.linears.get(name.rpartition(".")[0])
        if linear is not None and linear.experts:
            found += _stack_problems(described, filling, linear)
        else:
            if filling.quantized and linear is not None and linear.transposed:
                filling = replace(filling, logical=param.shape[::-1])
            found += _problems(described, filling)
    # A checkpoint of another model has the same fault in each of thousands of parameters.
    kinds = folded(found)
    problems.extend(kinds[:LISTED])
    if len(kinds) > LISTED:
        problem = f"{len(kinds) - LISTED} more kinds of parameters cannot be filled from its tensors"
        problems.add(str(described.checkpoint.path), problem, OTHER_CHECKPOINT)


def _stack_problems(described: Described, stack: _Filling, linear: Linear) -> Iterator[Problem]:
    """Yields the problems of a stack of experts, each once under the name of the first expert that has it."""
    name, (count, *rest) = stack.param.name, stack.param.shape
    for source in stack.sources:
        shape = described.shapes[source.tensor]
        # A source without an offset holds all experts, so its first dim counts them.
        if source.offset is None and shape[:1] != (count,):
            problem = f"{source.tensor} has shape {list(shape)}, the config has {count} experts"
            yield Problem(name, problem, OTHER_CHECKPOINT)
            return
    logical = tuple(rest)
    # Weights of some families are stored `[in, out]` each; biases have one dim.
    stored = logical[::-1] if linear.transposed and len(logical) == 2 else logical
    checked = set()
    for number, sources in enumerate(sources_by_expert(stack.sources, count, described.shapes)):
        infos = [(source, described.checkpoint.tensors[source.tensor]) for source in sources]
        kind = tuple((s.component, s.take is None, described.taken(s), info.shape, info.dtype) for s, info in infos)
        if sources and kind not in checked:  # experts are alike, and there may be thousands
            checked.add(kind)
            shape = logical if stack.quantized else stored
            param = replace(stack.param, name=expert_name(name, number), shape=shape)
            yield from _problems(described, replace(stack, param=param, logical=logical, sources=sources))


def _problems(described: Described, filling: _Filling) -> Iterator[Problem]:
    """Yields reasons why tensors cannot fill a parameter."""
    name, scheme, tensors = filling.param.name, described.scheme, described.checkpoint.tensors
    infos = {source.component: tensors[source.tensor] for source in filling.sources}
    shapes = {source.component: _taken_shape(source, tensors[source.tensor].shape) for source in filling.sources}
    # What the method has stored, the method judges. Everything below is about ordinary tensors.
    if (filling.quantized and described.prequantized) or scheme.plain_row_block(name):
        yield from scheme.check_stored(name, filling.logical, shapes)
        yield from scheme.check_dtypes(name, {component: info.dtype for component, info in infos.items()})
        return
    components = sorted(component for component in infos if component)
    if components:
        # Its shapes would only say the same again.
        problem = f"is stored quantized ({', '.join(components)}), the config leaves it unquantized"
        yield Problem(name, problem, OTHER_CHECKPOINT)
        return
    if not filling.as_stored and filling.param.dtype.startswith(("float", "bfloat")):
        yield from _dtype_problems(described, filling)
    for source in filling.sources:
        if source.offset is not None and len(source.offset) > 1 and source.offset[-1] != 0:
            problem = f"{source.tensor} is concatenated along the input dim, which cannot be streamed"
            yield Problem(name, problem, "Convert the checkpoint with save_pretrained first")
    # Only one tensor that is the parameter must have its shape. Of parts, the shapes were compared when they were
    # placed, and only their number of elements is left to check.
    (first, *others), shape = filling.sources, shapes[""]
    is_one = not others and first.offset is None and first.take is None
    count = sum(map(described.taken, filling.sources))
    if (is_one and shape != filling.param.shape) or count != math.prod(filling.param.shape):
        problem = f"the checkpoint has shape {list(shape)}, the model {list(filling.param.shape)}"
        yield Problem(name, problem, OTHER_CHECKPOINT)
    elif filling.quantized:
        yield from scheme.check_weight(name, filling.logical)


def _dtype_problems(described: Described, filling: _Filling) -> Iterator[Problem]:
    """Yields the tensors of a floating-point parameter that hold codes of a quantization that nobody has named."""
    name, tensors = filling.param.name, described.checkpoint.tensors
    coded = [source.tensor for source in filling.sources if tensors[source.tensor].dtype not in PLAIN_FLOATS]
    if not coded:
        return
    others = f" (and {len(coded) - 1} more)" if len(coded) > 1 else ""
    info = tensors[coded[0]]
    stored = f"{coded[0]}{others} is stored as {info.dtype}"
    is_expert = any(name.startswith(f"{module}.") for module in described.description.experts)
    if described.prequantized and is_expert and len(info.shape) == 3:
        # The config is right there, so `OTHER_CHECKPOINT` would mislead.
        problem = f"{stored}: experts that are quantized in one tensor are read in MXFP4's form only"
        yield Problem(name, problem, "Take a checkpoint with a tensor for each expert, or an unquantized one")
    else:
        yield Problem(name, f"{stored}, which no quantization in config.json explains", OTHER_CHECKPOINT)


def _taken_shape(source: Source, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of what a source takes, without the dim of one element by which an expert is taken."""
    if source.take is None:
        return shape
    dim, start, stop = source.take
    if dim == ROWS:
        return (stop - start, *shape[2:])
    if dim == 0 and stop - start == 1 and len(shape) > 1:
        return shape[1:]
    return (*shape[:dim], stop - start, *shape[dim + 1 :])
