"""Modules of fused experts: their form, and each of their projections as a stack of linear weights.

transformers holds experts as 3-D parameters (`integrations/moe.py`, `use_experts_implementation`): gate and up of each
expert one after the other in `gate_up_proj [E, 2I, H]`, and `down_proj [E, H, I]`. gpt-oss and Llama-4 hold both
transposed, gpt-oss with gate and up alternating. Here an expert's projection is a linear weight like any other, named
`<module>.<expert>.<projection>.weight`. The weights of all experts are a stack, with a star for the number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from distquant.model.description import (
    ROWS,
    STAR,
    ExpertsDescription,
    Linear,
    ModelDescription,
    Param,
    Projection,
    Source,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DENSE = {"Llama4TextExperts"}
"""Classes that are called with every token for every expert; they lack the marks of the common form."""

EXPECTED = (
    "gate_up_proj (or up_proj) and down_proj, 3-D with the experts first, marked by transformers' "
    "use_experts_implementation"
)


def experts_of(model: PreTrainedModel) -> tuple[dict[str, ExpertsDescription], dict[str, str]]:
    """Returns the modules of fused experts by path, and those of an unknown form -> their class and shapes."""
    known, unknown = {}, {}
    for name, module in model.named_modules():
        shapes = {leaf: tuple(p.shape) for leaf, p in module.named_parameters(recurse=False)}
        if _holds_experts(name, module, shapes.values()):
            form = form_of(name, module, shapes)
            if form is None:
                unknown[name] = f"{type(module).__name__} with {_described(shapes)}"
            else:
                known[name] = form
    return known, unknown


def _holds_experts(name: str, module: Any, shapes: Iterable[tuple[int, ...]]) -> bool:
    """Returns True if a module owns weights of several experts: 3-D ones, or 2-D ones below a path with `experts`.

    DBRX has such 2-D weights, with the rows of all experts. Kernels of convolutions (Mamba) are not experts, nor are
    vectors with leading dims of one element (RWKV).
    """
    from torch import nn
    from torch.nn.modules.conv import _ConvNd

    if isinstance(module, nn.Linear | nn.Embedding | _ConvNd):
        return False
    inside = "experts" in name.split(".")
    return any((len(shape) == 3 and min(shape) > 1) or (len(shape) == 2 and inside) for shape in shapes)


def form_of(name: str, module: Any, shapes: Mapping[str, tuple[int, ...]]) -> ExpertsDescription | None:
    """Returns the form of a module that owns parameters of these shapes, or None if it is not the common form."""
    dense = type(module).__name__ in DENSE
    marked = isinstance(getattr(module, "is_transposed", None), bool)
    gate = bool(getattr(module, "has_gate", True))
    bias = bool(getattr(module, "has_bias", False))
    first = "gate_up_proj" if gate else "up_proj"
    weights = {first, "down_proj"}
    # A parameter beyond these would be left unread or unquantized, so such a module is of an unknown form.
    if not (dense or marked) or shapes.keys() != weights | ({f"{w}_bias" for w in weights} if bias else set()):
        return None
    transposed = dense or module.is_transposed
    count, *_ = shapes[first]
    wide, hidden = shapes[first][:0:-1] if transposed else shapes[first][1:]
    hidden_out, intermediate = shapes["down_proj"][:0:-1] if transposed else shapes["down_proj"][1:]
    if hidden_out != hidden or wide != intermediate * (2 if gate else 1) or shapes["down_proj"][0] != count:
        return None
    # The first attribute changes what the module computes. A bias would have to be split with gate and up.
    if getattr(module, "has_post_expert_norm", False) or (bias and gate and not transposed):
        return None
    interleaved = gate and not getattr(module, "is_concatenated", True)
    # Gate and up are separate stacks only if each is a block of rows; otherwise their rows must stay together.
    columns: tuple[Projection, ...]
    if gate and not transposed and not interleaved:
        columns = (
            Projection("gate_proj", first, intermediate, hidden),
            Projection("up_proj", first, intermediate, hidden, intermediate),
        )
    else:
        columns = (Projection(first, first, wide, hidden),)
    down = Projection("down_proj", "down_proj", hidden, intermediate, shard_dim=1)
    return ExpertsDescription(name, count, intermediate, (*columns, down), transposed, interleaved, bias, dense)


def stack_name(module: str, projection: str) -> str:
    """Returns the path of one projection of all experts of a module."""
    return f"{module}.{STAR}.{projection}"


def split_experts(
    description: ModelDescription, modules: Iterable[str], tensors: Mapping[str, tuple[int, ...]]
) -> ModelDescription:
    """Replaces the parameters of these modules by one stack for each projection.

    Args:
        description: as `describe_model` returns it.
        modules: keys of `description.experts`.
        tensors: shape of each checkpoint tensor.
    """
    params, sources, linears = dict(description.params), dict(description.sources), dict(description.linears)
    parts, missing = dict(description.parts), list[str]()
    for module in modules:
        experts = description.experts[module]
        for projection in experts.projections:
            name = stack_name(module, projection.name)
            sizes = projection.out_features, projection.in_features
            linears[name] = Linear(name, *sizes, experts.bias, experts.transposed, experts.count)
            fused = f"{module}.{projection.parameter}"
            params[f"{name}.weight"] = Param(f"{name}.weight", (experts.count, *sizes), description.params[fused].dtype)
            own = tuple(s for s in _sources_of(description, experts, projection) if _inside(s, experts.count))
            if own:
                sources[f"{name}.weight"] = own
            lacking = set(range(experts.count)).difference(*(_experts_in(source, experts.count) for source in own))
            # A stack without any source is one missing weight. In others each lacking expert is named.
            numbers = [STAR] if len(lacking) == experts.count else sorted(lacking)
            numbers = [] if fused in description.unconverted else numbers
            missing += [f"{name}.weight".replace(STAR, str(number)) for number in numbers]
            if experts.bias:
                plain = description.params[f"{fused}_bias"]
                params[f"{name}.bias"] = Param(f"{name}.bias", plain.shape, plain.dtype)
                if f"{fused}_bias" in sources:
                    sources[f"{name}.bias"] = sources[f"{fused}_bias"]
                else:
                    missing.append(f"{name}.bias")
        for parameter in {projection.parameter for projection in experts.projections}:
            for fused in (f"{module}.{parameter}", f"{module}.{parameter}_bias"):
                for table in (params, sources, parts):
                    table.pop(fused, None)
    return replace(
        description,
        params=params,
        sources=sources,
        linears=linears,
        parts=parts,
        missing=(*(name for name in description.missing if name in params), *missing),
    )


def _sources_of(description: ModelDescription, experts: ExpertsDescription, projection: Projection) -> Iterable[Source]:
    """Yields the sources of one projection, from those of the parameter that holds it."""
    fused = f"{experts.name}.{projection.parameter}"
    sharers = [p.name for p in experts.projections if p.parameter == projection.parameter]
    first, last = projection.start, projection.start + projection.out_features
    for source in description.sources.get(fused, ()):
        if source.offset is not None:
            expert, row = source.offset[0], source.offset[1] if len(source.offset) > 1 else 0
            if first <= row < last:
                yield Source(source.tensor, source.component, (expert, row - first) if row > first else (expert,))
        elif len(sharers) == 1:
            yield source
        else:
            yield replace(source, take=(1, first, last))
    for part in description.parts.get(fused, ()):
        if sharers[min(part.index, len(sharers) - 1)] == projection.name:
            yield Source(part.tensor, part.component, (part.expert,))


def _experts_in(source: Source, count: int) -> Iterable[int]:
    """Returns the numbers of the experts that a source fills, fully or in part."""
    return range(count) if source.offset is None else (source.offset[0],)


def _inside(source: Source, count: int) -> bool:
    """Returns True if the model has the source's expert; `map_names` has reported those that it has not."""
    return source.offset is None or source.offset[0] < count


def sources_by_expert(
    sources: Iterable[Source], count: int, tensors: Mapping[str, tuple[int, ...]]
) -> list[tuple[Source, ...]]:
    """Returns the sources of each expert of a stack, placed in the expert's own weight.

    Args:
        sources: sources of the stack.
        count: number of experts.
        tensors: shape of each checkpoint tensor.
    """
    by_expert: list[list[Source]] = [[] for _ in range(count)]
    for source in sources:
        if source.offset is not None:
            expert, *rest = source.offset
            placed = (*rest, 0) if any(rest) else None
            by_expert[expert].append(Source(source.tensor, source.component, placed, source.take))
            continue
        for expert, own in enumerate(by_expert):
            take = (0, expert, expert + 1)
            if source.take is not None:  # rows of every expert: one range needs experts and rows as one dim
                rows, (_, start, stop) = tensors[source.tensor][1], source.take
                take = (ROWS, expert * rows + start, expert * rows + stop)
            own.append(Source(source.tensor, source.component, None, take))
    return [tuple(own) for own in by_expert]


def _described(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
