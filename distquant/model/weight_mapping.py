"""From checkpoint names to model names, by transformers' own conversion mapping.

`transformers.core_model_loading` renames keys and, if a model's layout differs from the checkpoint's, runs operations
on the tensors. Here the same operations are followed on shapes alone, so that each checkpoint tensor gets its place in
the parameter: it is then streamed there, and a merged copy is never made.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from distquant.errors import Problems
from distquant.model.description import STAR, MergedComponent, Source
from distquant.whole_numbers import whole_number

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shapes = Mapping[str, tuple[int, ...]]


def natural(key: str) -> list[tuple[int, Any]]:
    """Returns a sort key that orders numbers in a path by value, as transformers orders experts to merge."""
    # Asked for by the hundred thousand: most parts spell no number.
    return [
        (1, part) if not part.isdigit() or (number := whole_number(part)) is None else (0, number)
        for part in key.split(".")
    ]


def split_component(name: str, suffixes: Mapping[str, str]) -> tuple[str, str]:
    """Splits a checkpoint name into (name of the weight, component); `suffixes` maps `weight.absmax` to `absmax`.

    A suffix that starts with a star, as `*_scales`, follows the name of a parameter of fused experts without a dot.
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
) -> tuple[dict[str, tuple[Source, ...]], dict[str, tuple[MergedComponent, ...]], tuple[str, ...]]:
    """Places every checkpoint tensor in the model.

    Args:
        model: the model on `meta`.
        params: shape of each parameter, by model name.
        tensors: shape of each checkpoint tensor, by checkpoint name.
        suffixes: suffix of a checkpoint name -> component that the quantization method stores beside a weight.
        problems: collects the tensors that cannot be placed (an unknown conversion).

    Returns:
        the sources of each parameter (none where a conversion is unknown), the components of quantized weights that
        are merged into one parameter, and the checkpoint names without a place in the model.
    """
    rename = _Renamer(model, params)
    placed: dict[str, list[Source]] = {}
    merged: dict[str, list[MergedComponent]] = {}
    unexpected = []
    # A converter needs all tensors of a parameter at once, by the pattern that they match.
    collected: dict[str, dict[str, list[str]]] = {}
    converter_of: dict[str, Any] = {}
    for name in sorted(tensors):
        base, component = split_component(name, suffixes)
        target, pattern = rename(base)
        if target not in params and base in params:
            target, pattern = base, None  # a rule for old checkpoints matched a name that is already the model's
        if target not in params:
            unexpected.append(name)
        elif pattern is None:
            placed.setdefault(target, []).append(Source(name, component))
        elif component:
            # Operations on the weight's shape do not fit its components, so these are placed by expert instead.
            index = rename.converters[pattern].source_patterns.index(pattern)
            merged.setdefault(target, []).append(MergedComponent(name, component, _last_number(base), index))
        else:
            collected.setdefault(target, {}).setdefault(pattern, []).append(name)
            converter_of[target] = rename.converters[pattern]
    unsupported: dict[tuple[str, str], list[str]] = {}
    for target, names_of in collected.items():
        groups = {pattern: sorted(names, key=natural) for pattern, names in names_of.items()}
        followed = _follow(converter_of[target], target, groups, params, tensors)
        if followed is None:
            steps = " then ".join(type(op).__name__ for op in converter_of[target].operations)
            unsupported.setdefault((steps, re.sub(r"\d+", STAR, target)), []).append(target)
            followed = {param: [] for param in _targets(converter_of[target], target) if param in params}
        for param, sources in followed.items():
            _check_bounds(param, params[param], sources, tensors, problems)
            placed.setdefault(param, []).extend(sources)
    _report_unsupported(unsupported, problems)
    return _tuples(placed), _tuples(merged), tuple(unexpected)


Item = TypeVar("Item")


def _tuples(lists: Mapping[str, list[Item]]) -> dict[str, tuple[Item, ...]]:
    return {name: tuple(items) for name, items in lists.items()}


class Placer:
    """Places a checkpoint tensor by its name alone.

    Args:
        model: the model on `meta`.
        params: its parameters.
        suffixes: suffix of a checkpoint name -> component, as the quantization method stores them.
    """

    def __init__(self, model: PreTrainedModel, params: Iterable[str], suffixes: Mapping[str, str]):
        self._params, self._suffixes = dict.fromkeys(params, ()), suffixes
        self._rename = _Renamer(model, self._params)

    def __call__(self, name: str) -> str:
        """Returns the parameter that a tensor of this name fills; another name where it fills none."""
        base, _ = split_component(name, self._suffixes)
        target, _ = self._rename(base)
        return base if target not in self._params and base in self._params else target


class _Renamer:
    """Calls transformers' `rename_source_key`, once for all names that differ only in numbers.

    A checkpoint of many experts has tens of thousands of names, and each call tries every pattern. If a pattern has a
    number, or a transform may keep a state, every name is renamed by a call of its own.
    """

    def __init__(self, model: PreTrainedModel, params: Shapes):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        transforms = get_model_conversion_mapping(model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self.converters = {pattern: c for c in converters for pattern in c.source_patterns}
        self._given = (renamings, converters, model.base_model_prefix)
        patterns = [str(p) for t in (*renamings, *converters) for p in (*t.source_patterns, *t.target_patterns)]
        plain = all(type(t) in (WeightRenaming, WeightConverter) for t in (*renamings, *converters))
        self.by_kind = plain and not any(re.search(r"(^|\.)\d", pattern) for pattern in patterns)
        self._known = dict.fromkeys((_numbers_out(name)[0] for name in params) if self.by_kind else params, True)
        self._renamed: dict[str, tuple[str, str | None]] = {}

    def __call__(self, name: str) -> tuple[str, str | None]:
        """Returns the model's name for a checkpoint's, and the converter's pattern that it matches."""
        from transformers.core_model_loading import rename_source_key

        if not self.by_kind:
            renamed: tuple[str, str | None] = rename_source_key(name, *self._given, self._known)
            return renamed
        kind, numbers = _numbers_out(name)
        if kind not in self._renamed:
            self._renamed[kind] = rename_source_key(kind, *self._given, self._known)
        target, pattern = self._renamed[kind]
        for place, number in enumerate(numbers):
            target = target.replace(str(PLACE + place), number, 1)
        return target, pattern


PLACE = 900_000_000
"""Placeholder of the first number in a name; the second gets the next, and so on. No layer or expert has such numbers.
"""


def _numbers_out(name: str) -> tuple[str, list[str]]:
    """Returns a name with placeholders for the parts that are numbers, and the numbers."""
    parts = name.split(".")
    numbers: list[str] = []
    for index, part in enumerate(parts):
        if part.isdigit():
            parts[index] = str(PLACE + len(numbers))
            numbers.append(part)
    return ".".join(parts), numbers


def check_merged_components(parts: Mapping[str, tuple[MergedComponent, ...]], problems: Problems) -> None:
    """Adds a problem for each kind of quantized weights that are merged into parameters and cannot be loaded."""
    kinds: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for target, components in parts.items():
        for part in components:
            kinds.setdefault((part.component, re.sub(r"\d+", "*", target)), []).append((part.tensor, target))
    for (component, _), named in kinds.items():
        name, target = named[0]
        others = f" (and {len(named) - 1:,} more of its kind)" if len(named) > 1 else ""
        reason = f"a quantized {component!r} of a weight that is converted into {target}{others}"
        fix = (
            "Quantized checkpoints of converted weights are supported for experts in transformers' common form only: "
            "load the unquantized checkpoint, or look at this one with on_unsupported='skip' (--on-unsupported skip)"
        )
        problems.add(name, reason, fix)


def _last_number(name: str) -> int:
    """Returns the last number among the parts of a path, an expert's; 0 if there is none."""
    for part in reversed(name.split(".")):
        if part.isdigit() and (number := whole_number(part)) is not None:
            return number
    return 0


def _follow(
    converter: Any,
    target: str,
    groups: dict[str, list[str]],
    params: Shapes,
    tensors: Shapes,
) -> dict[str, list[Source]] | None:
    """Follows a converter's operations on shapes; returns the sources of each parameter that it fills.

    None for operations that place elements in another way than side by side.
    """
    steps = [type(op).__name__ for op in converter.operations]
    # The order of the patterns is the order in which the converter concatenates: gate before up, q before k before v.
    patterns = [p for p in converter.source_patterns if p in groups]
    if steps == ["MergeModulelist"] and converter.operations[0].dim == 0 and len(patterns) == 1:
        return {target: [Source(n, "", (i, *[0] * len(tensors[n]))) for i, n in _numbered(groups[patterns[0]])]}
    if steps == ["MergeModulelist", "Concatenate"] and converter.operations[0].dim == 0:
        # Merging adds the experts as the first dim, so `dim` of the merged tensor is `dim - 1` of a checkpoint tensor.
        dim = converter.operations[1].dim
        sources, start = [], 0
        for pattern in patterns:
            for i, n in _numbered(groups[pattern]):
                offset = [i, *[0] * len(tensors[n])]
                offset[dim] = start
                sources.append(Source(n, "", tuple(offset)))
            # All experts of a pattern have one shape, so the first gives the size of the pattern's part.
            start += tensors[groups[pattern][0]][dim - 1]
        return {target: sources}
    if steps == ["Concatenate"]:
        dim, sources, start = converter.operations[0].dim, [], 0
        for n in (n for pattern in patterns for n in groups[pattern]):
            offset = [0] * len(tensors[n])
            offset[dim] = start
            sources.append(Source(n, "", tuple(offset)))
            start += tensors[n][dim]
        return {target: sources}
    if steps == ["Chunk"] and converter.operations[0].num_shards_attribute is None:
        return _chunk(converter, target, groups[patterns[0]][0], params, tensors)
    if steps == ["Split"]:
        return _split(converter, target, groups[patterns[0]][0], params, tensors)
    if steps == ["Inkling2UnpadVocab"]:  # the rows after the vocabulary only fill the checkpoint's tensor up
        (name,) = groups[patterns[0]]
        return {target: [Source(name, "", None, (0, 0, min(params[target][0], tensors[name][0])))]}
    return None


def _report_unsupported(kinds: Mapping[tuple[str, str], list[str]], problems: Problems) -> None:
    """Adds a problem for each kind of parameters that operations lead to which are not followed here."""
    for (steps, _), targets in kinds.items():
        others = f" (and {len(targets) - 1:,} more of its kind)" if len(targets) > 1 else ""
        fix = (
            "Only merging, concatenating, splitting and chunking are supported: load the checkpoint with transformers, "
            "and save it with save_pretrained(..., save_original_format=False)"
        )
        problems.add(targets[0], f"unsupported conversion from the checkpoint's form: {steps}{others}", fix)


def _numbered(names: list[str]) -> list[tuple[int, str]]:
    """Returns each name with its place in a merged list: its own number, so that a missing one shifts no other."""
    numbers = [_last_number(name) for name in names]
    return list(zip(numbers, names, strict=True)) if len(set(numbers)) == len(names) else list(enumerate(names))


def _check_bounds(
    param: str, shape: tuple[int, ...], sources: list[Source], tensors: Shapes, problems: Problems
) -> None:
    """Adds a problem for a source outside its parameter: the checkpoint has more parts (such as experts)."""
    for source in sources:
        if source.offset is None:
            continue
        extent = (1,) * (len(shape) - len(tensors[source.tensor])) + tensors[source.tensor]
        if any(start + size > limit for start, size, limit in zip(source.offset, extent, shape, strict=True)):
            reason = f"{source.tensor} would start at {list(source.offset)}, outside its shape {list(shape)}"
            problems.add(param, reason, "The checkpoint has more parts than the model; check config.json")


def _chunk(converter: Any, target: str, name: str, params: Shapes, tensors: Shapes) -> dict[str, list[Source]]:
    """Splits one checkpoint tensor into equal parts for several parameters."""
    dim, targets = converter.operations[0].dim, _targets(converter, target)
    size = tensors[name][dim]
    step = -(-size // len(targets))  # rounded up, as torch.chunk does: the last part may be smaller
    takes = [(dim, i * step, min((i + 1) * step, size)) for i in range(len(targets))]
    return {t: [Source(name, "", None, take)] for t, take in zip(targets, takes, strict=True) if t in params}


def _split(converter: Any, target: str, name: str, params: Shapes, tensors: Shapes) -> dict[str, list[Source]] | None:
    """Splits one checkpoint tensor into parts of the sizes of several parameters; None if the model lacks one."""
    dim, sources, start = converter.operations[0].dim, dict[str, list[Source]](), 0
    targets = _targets(converter, target)
    if not all(param in params for param in targets):
        return None
    for param in targets:
        # Of a tensor that is too short, the last parts are short; the check of shapes reports them.
        stop = min(start + params[param][dim], tensors[name][dim])
        sources[param] = [Source(name, "", None, (dim, start, stop))]
        start = stop
    return sources


def _targets(converter: Any, target: str) -> list[str]:
    """Returns all parameters that a converter fills, from the first one's name."""
    first, *_ = converter.target_patterns
    return [target.replace(first, pattern, 1) for pattern in converter.target_patterns]


def ignorable(names: Iterable[str], patterns: Iterable[str] | None) -> tuple[set[str], list[str]]:
    """Splits names into those that the model class ignores and the rest."""
    regex = "|".join(f"({p})" for p in patterns or ())
    names, matches = list(names), re.compile(regex).search
    ignored = {n for n in names if matches(n)} if regex else set()
    return ignored, [n for n in names if n not in ignored]
