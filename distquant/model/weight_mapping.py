"""From checkpoint names to model names, by transformers' own conversion mapping.

`transformers.core_model_loading` renames keys and, where a model's layout differs from the checkpoint's, runs
operations on the tensors. Here the same operations are followed on shapes alone, so that each checkpoint tensor gets
its place in the parameter: it can then be streamed there, and no merged copy is ever made.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from distquant.errors import Problems
from distquant.model.description import STAR, Part, Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shapes = Mapping[str, tuple[int, ...]]


def natural(key: str) -> list[tuple[int, Any]]:
    """Sort key that orders path parts that are numbers by value (the order in which transformers merges experts)."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in key.split(".")]


def split_component(name: str, suffixes: Mapping[str, str]) -> tuple[str, str]:
    """Checkpoint name -> (name of the weight, component); `suffixes` maps e.g. `weight.absmax` to `absmax`.

    A suffix that starts with a star is glued to the name of a parameter of fused experts, as `*_scales`.
    """
    for suffix, component in suffixes.items():
        if suffix.startswith(STAR):
            if name.endswith(suffix[1:]):
                return name[: 1 - len(suffix)], component
        elif name.endswith("." + suffix):
            return name[: -len(suffix)] + "weight", component
    return name, ""


def map_names(
    model: PreTrainedModel,
    params: Shapes,
    tensors: Shapes,
    suffixes: Mapping[str, str],
    problems: Problems,
) -> tuple[dict[str, tuple[Source, ...]], dict[str, tuple[Part, ...]], tuple[str, ...]]:
    """Places every checkpoint tensor in the model.

    Args:
        model: the model on `meta`.
        params: shape of each parameter, by model name.
        tensors: shape of each checkpoint tensor, by checkpoint name.
        suffixes: how the quantization method names the components that it stores beside a weight.
        problems: gets what cannot be placed (a conversion that is not known here).

    Returns:
        the sources of each parameter, the components of quantized weights that are merged into one, and the names that
        the model has no place for.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    rename = _Renamer(renamings, converters, model.base_model_prefix, params)

    placed: dict[str, list[Source]] = {}
    collected: dict[str, dict[str, list[str]]] = {}
    converter_of: dict[str, Any] = {}
    unexpected = []
    parts: dict[str, list[Part]] = {}
    for name in sorted(tensors):
        base, component = split_component(name, suffixes)
        target, pattern = rename(base)
        if target not in params and base in params:
            target, pattern = base, None
        if target not in params:
            unexpected.append(name)
        elif pattern is None:
            placed.setdefault(target, []).append(Source(name, component))
        elif component:
            index = by_pattern[pattern].source_patterns.index(pattern)
            parts.setdefault(target, []).append(Part(name, component, _last_number(base), index))
        else:
            collected.setdefault(target, {}).setdefault(pattern, []).append(name)
            converter_of[target] = by_pattern[pattern]
    for target, found in collected.items():
        groups = {pattern: sorted(names, key=natural) for pattern, names in found.items()}
        for param, sources in _follow(converter_of[target], target, groups, params, tensors, problems).items():
            _check_bounds(param, params[param], sources, tensors, problems)
            placed.setdefault(param, []).extend(sources)
    return (
        {name: tuple(sources) for name, sources in placed.items()},
        {name: tuple(found) for name, found in parts.items()},
        tuple(unexpected),
    )


class _Renamer:
    """transformers' `rename_source_key`, asked once for all names that differ in the numbers of their parts only.

    A checkpoint of many experts has tens of thousands of names, and each is tried against every pattern. Where a
    pattern has a number of its own, or a transform is of a kind that may keep a state, every name is asked for.
    """

    def __init__(self, renamings: list[Any], converters: list[Any], prefix: str, params: Shapes):
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self._given = (renamings, converters, prefix)
        transforms = [*renamings, *converters]
        patterns = [str(p) for t in transforms for p in (*t.source_patterns, *t.target_patterns)]
        plain = all(type(t) in (WeightRenaming, WeightConverter) for t in transforms)
        self.by_kind = plain and not any(re.search(r"(^|\.)\d", pattern) for pattern in patterns)
        self._known = dict.fromkeys((_numbers_out(name)[0] for name in params) if self.by_kind else params, True)
        self._found: dict[str, tuple[str, str | None]] = {}

    def __call__(self, name: str) -> tuple[str, str | None]:
        """The model's name for a checkpoint's, and the converter's pattern that it fits."""
        from transformers.core_model_loading import rename_source_key

        if not self.by_kind:
            found: tuple[str, str | None] = rename_source_key(name, *self._given, self._known)
            return found
        kind, numbers = _numbers_out(name)
        if kind not in self._found:
            self._found[kind] = rename_source_key(kind, *self._given, self._known)
        target, pattern = self._found[kind]
        for place, number in enumerate(numbers):
            target = target.replace(str(PLACE + place), number, 1)
        return target, pattern


PLACE = 900_000_000
"""Stands for the first number in a name, the next for the second, and so on: numbers that no layer or expert has."""


def _numbers_out(name: str) -> tuple[str, list[str]]:
    """A name with placeholders for those of its parts that are numbers, and the numbers."""
    parts = name.split(".")
    numbers: list[str] = []
    for at, part in enumerate(parts):
        if part.isdigit():
            parts[at] = str(PLACE + len(numbers))
            numbers.append(part)
    return ".".join(parts), numbers


def tell_parts(parts: Mapping[str, tuple[Part, ...]], problems: Problems) -> None:
    """Tells, once for each kind, the quantized weights that are merged into parameters and cannot be loaded so."""
    kinds: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for target, found in parts.items():
        for part in found:
            kinds.setdefault((part.component, re.sub(r"\d+", "*", target)), []).append((part.tensor, target))
    for (component, _), named in kinds.items():
        name, target = named[0]
        others = f" (and {len(named) - 1:,} more of its kind)" if len(named) > 1 else ""
        what = f"a quantized {component!r} of a weight that is converted into {target}{others}"
        fix = (
            "Quantized checkpoints of converted weights are supported for experts in transformers' common form only: "
            "load the unquantized checkpoint, or look at this one with on_unsupported='skip' (--on-unsupported skip)"
        )
        problems.add(name, what, fix)


def _last_number(name: str) -> int:
    """The last number among the parts of a path, an expert's; 0 where there is none."""
    return next((int(part) for part in reversed(name.split(".")) if part.isdigit()), 0)


def _follow(
    converter: Any,
    target: str,
    groups: dict[str, list[str]],
    params: Shapes,
    tensors: Shapes,
    problems: Problems,
) -> dict[str, list[Source]]:
    """Follows a converter's operations on shapes; returns the sources of each parameter that it fills."""
    steps = [type(op).__name__ for op in converter.operations]
    patterns = [p for p in converter.source_patterns if p in groups]
    if steps == ["MergeModulelist"] and converter.operations[0].dim == 0 and len(patterns) == 1:
        return {target: [Source(n, "", (i, *[0] * len(tensors[n]))) for i, n in _numbered(groups[patterns[0]])]}
    if steps == ["MergeModulelist", "Concatenate"] and converter.operations[0].dim == 0:
        dim = converter.operations[1].dim
        found, at = [], 0
        for pattern in patterns:
            for i, n in _numbered(groups[pattern]):
                offset = [i, *[0] * len(tensors[n])]
                offset[dim] = at
                found.append(Source(n, "", tuple(offset)))
            at += tensors[groups[pattern][0]][dim - 1]
        return {target: found}
    if steps == ["Concatenate"]:
        dim, found, at = converter.operations[0].dim, [], 0
        for n in (n for pattern in patterns for n in groups[pattern]):
            offset = [0] * len(tensors[n])
            offset[dim] = at
            found.append(Source(n, "", tuple(offset)))
            at += tensors[n][dim]
        return {target: found}
    if steps == ["Chunk"] and converter.operations[0].num_shards_attribute is None:
        return _chunk(converter, target, groups[patterns[0]][0], params, tensors)
    problems.add(
        target,
        f"the checkpoint stores it in a form that needs {' then '.join(steps)}",
        "Only merging, concatenating and chunking are known; convert the checkpoint with save_pretrained first",
    )
    return {}


def _numbered(names: list[str]) -> list[tuple[int, str]]:
    """Each name with its place in a merged list: its own number, so that one that is missing moves no other."""
    numbers = [_last_number(name) for name in names]
    return list(zip(numbers, names, strict=True)) if len(set(numbers)) == len(names) else list(enumerate(names))


def _check_bounds(
    param: str, shape: tuple[int, ...], sources: list[Source], tensors: Shapes, problems: Problems
) -> None:
    """A source that lies outside its parameter: the checkpoint has another number of parts (experts, say)."""
    for source in sources:
        if source.offset is None:
            continue
        extent = (1,) * (len(shape) - len(tensors[source.tensor])) + tensors[source.tensor]
        if any(at + size > limit for at, size, limit in zip(source.offset, extent, shape, strict=True)):
            what = f"{source.tensor} would lie at {list(source.offset)}, outside its shape {list(shape)}"
            problems.add(param, what, "The checkpoint has more parts than the model; check config.json")


def _chunk(converter: Any, target: str, name: str, params: Shapes, tensors: Shapes) -> dict[str, list[Source]]:
    """One checkpoint tensor that is cut into equal parts for several parameters."""
    first, dim = converter.target_patterns[0], converter.operations[0].dim
    targets = [target.replace(first, pattern, 1) for pattern in converter.target_patterns]
    size = tensors[name][dim]
    step = -(-size // len(targets))
    takes = [(dim, i * step, min((i + 1) * step, size)) for i in range(len(targets))]
    return {t: [Source(name, "", None, take)] for t, take in zip(targets, takes, strict=True) if t in params}


def ignorable(names: Iterable[str], patterns: Iterable[str] | None) -> tuple[set[str], list[str]]:
    """Splits names into those that the model class says to ignore and the rest."""
    regex = "|".join(f"({p})" for p in patterns or ())
    names, matches = list(names), re.compile(regex).search
    ignored = {n for n in names if matches(n)} if regex else set()
    return ignored, [n for n in names if n not in ignored]
