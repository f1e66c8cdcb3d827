"""Folds what is equal in a plan: tensors over their numbers, layers into kinds, and ranks into groups.

Folding hides nothing. Each tensor is in exactly one group, and so is each rank. A group of tensors is all combinations
of its numbers, so its label names every one of them. A tensor that differs in anything but these stays apart.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product, zip_longest
from typing import Any

from distquant.model.description import Source
from distquant.planning import LoadPlan
from distquant.planning.load_plan import RankMemory, TensorPlan
from distquant.sharding.device_map import place_of

NUMBER = re.compile(r"(?:(?<=\.)|^)(0|[1-9][0-9]{0,8})(?=\.|$)")
"""A whole part of a name that is a number, in the one way to write it: `007` is another name than `7`."""


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that differ in the numbers of their names only.

    Attributes:
        pieces: the text of the name around the numbers, one more than there are numbers.
        numbers: for each place in the name, the numbers that occur there. The group has all their combinations.
        tensor: the first of them.
    """

    pieces: tuple[str, ...]
    numbers: tuple[tuple[int, ...], ...]
    tensor: TensorPlan

    @property
    def pattern(self) -> str:
        """The name, with a star wherever the group has more than one number."""
        places = [str(each[0]) if len(each) == 1 else "*" for each in self.numbers]
        return "".join(text for pair in zip_longest(self.pieces, places, fillvalue="") for text in pair)

    @property
    def label(self) -> str:
        """The numbers in words, such as `layers 0-79`; empty for a name without numbers."""
        words = [piece.rstrip(".").rpartition(".")[2] for piece in self.pieces]
        return ", ".join(numbered(word, each) for word, each in zip(words, self.numbers, strict=False))

    @property
    def count(self) -> int:
        """The number of tensors."""
        count = 1
        for each in self.numbers:
            count *= len(each)
        return count

    def names(self) -> Iterator[str]:
        """Yields the name of every tensor."""
        for numbers in product(*self.numbers):
            yield "".join(f"{a}{b}" for a, b in zip_longest(self.pieces, numbers, fillvalue=""))


@dataclass(frozen=True)
class LayerKind:
    """Layers that hold equal tensors: members of the same groups."""

    layers: tuple[int, ...]
    groups: tuple[TensorGroup, ...]


@dataclass(frozen=True)
class LayerStack:
    """The layers under one path, and their kinds in the order of their first layers."""

    path: str
    kinds: tuple[LayerKind, ...]

    @property
    def common(self) -> tuple[TensorGroup, ...]:
        """The groups that all layers have."""
        return tuple(group for group in self.kinds[0].groups if all(group in kind.groups for kind in self.kinds[1:]))


@dataclass(frozen=True)
class RankGroup:
    """Ranks that keep equally much: equal bytes, equal numbers of rows and columns of each weight, equal heads."""

    ranks: tuple[int, ...]
    rows: tuple[RankMemory, ...]
    """Their memory; they may differ in the bytes that they read."""

    @property
    def memory(self) -> RankMemory:
        return self.rows[0]


def ranges(numbers: Iterable[int]) -> str:
    """Writes numbers with runs joined.

    >>> ranges([0, 1, 2, 5, 7, 8])
    '0-2, 5, 7-8'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def numbered(word: str, numbers: Sequence[int]) -> str:
    """Writes `layers 0-79`, or `layer 5` for one number."""
    singular = word[:-1] if len(numbers) == 1 and word.endswith("s") else word
    return f"{singular} {ranges(numbers)}".strip()


def fold_tensors(plan: LoadPlan) -> tuple[TensorGroup, ...]:
    """Returns the groups of a plan's tensors, in the order of their first ones."""
    order = {tensor.name: position for position, tensor in enumerate(plan.tensors)}
    alike: dict[Any, dict[tuple[int, ...], TensorPlan]] = defaultdict(dict)
    for pieces, numbers, facts, tensor in _described(plan):
        alike[pieces, facts][numbers] = tensor
    groups = [
        TensorGroup(pieces, box, min((tensors[one] for one in product(*box)), key=lambda tensor: order[tensor.name]))
        for (pieces, _), tensors in alike.items()
        for box in _boxes(tensors)
    ]
    return tuple(sorted(groups, key=lambda group: order[group.tensor.name]))


def _described(plan: LoadPlan) -> Iterator[tuple[tuple[str, ...], tuple[int, ...], Any, TensorPlan]]:
    """Yields each tensor, with the pieces and numbers of its name, and all else that the plan has about it."""
    partitions = {key: number for number, key in _first_equal(plan.partitions).items()}
    heads = {key: number for number, key in _first_equal(plan.heads).items()}
    partition_of = {key: partitions[value] for key, value in plan.partitions.items()}
    heads_of = {key: heads[value] for key, value in plan.heads.items()}
    converted, tied = set(plan.converted), defaultdict(list)
    for name, source in plan.tied.items():
        tied[source].append(name)
    for tensor in plan.tensors:
        pieces, numbers = _split(tensor.name)
        module = tensor.name.rpartition(".")[0]
        style, attention = plan.modules.get(module), plan.attentions.get(module.rpartition(".")[0])
        facts = (
            tensor.shape,
            tensor.dtype,
            tensor.scheme,
            tuple(_relative(source, numbers) for source in tensor.sources),
            tensor.shard_dim,
            partition_of.get(tensor.partition or ""),
            tensor.transposed,
            tensor.reading,
            partition_of.get(tensor.experts or ""),
            module in converted,
            style and style.style,
            attention and (heads_of.get(attention.heads), attention.head_dim),
            tuple(_relative(Source(name), numbers) for name in tied[tensor.name]),
            place_of(plan.device_map or {}, tensor.name),
        )
        yield pieces, numbers, facts, tensor


def _first_equal(values: dict[str, Any]) -> dict[int, Any]:
    """Returns the different values of a dict, numbered."""
    return dict(enumerate(dict.fromkeys(values.values())))


def _split(name: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Returns the text around the numbers of a name, and the numbers."""
    parts = NUMBER.split(name)
    return tuple(parts[::2]), tuple(map(int, parts[1::2]))


def _relative(source: Source, numbers: tuple[int, ...]) -> Any:
    """Returns a source, less those numbers in its name that the tensor's name has at the same count."""
    pieces, own = _split(source.tensor)
    rest = tuple(None if number == mine else number for number, mine in zip_longest(own, numbers[: len(own)]))
    return pieces, rest, source.component, source.offset, source.take


def _boxes(alike: Iterable[tuple[int, ...]]) -> list[tuple[tuple[int, ...], ...]]:
    """Joins tuples of numbers into products of sets, one place after the other.

    Two boxes are joined only if they are equal in all places but one, so no combination is added or lost.
    """
    boxes: list[tuple[tuple[int, ...], ...]] = [tuple((number,) for number in numbers) for numbers in alike]
    for place in range(len(boxes[0])):
        joined: dict[Any, list[int]] = defaultdict(list)
        for box in boxes:
            joined[box[:place], box[place + 1 :]] += box[place]
        boxes = [(*before, tuple(sorted(numbers)), *after) for (before, after), numbers in joined.items()]
    return boxes


def fold_layers(groups: Sequence[TensorGroup]) -> tuple[LayerStack, ...]:
    """Returns the stacks of layers (names with the same text before their first number), with equal layers joined."""
    members: dict[str, dict[int, list[TensorGroup]]] = defaultdict(lambda: defaultdict(list))
    for group in groups:
        for layer in group.numbers[0] if group.numbers else ():
            members[group.pieces[0]][layer].append(group)
    stacks = []
    for path, layers in members.items():
        kinds: dict[tuple[int, ...], tuple[list[int], list[TensorGroup]]] = {}
        for layer in sorted(layers):
            same = tuple(map(id, layers[layer]))
            kinds.setdefault(same, ([], layers[layer]))[0].append(layer)
        stacks.append(LayerStack(path, tuple(LayerKind(tuple(each), tuple(own)) for each, own in kinds.values())))
    return tuple(stacks)


def fold_ranks(plan: LoadPlan) -> tuple[RankGroup, ...]:
    """Returns the groups of equal ranks, in the order of their first ranks."""
    over_ep = {tensor.experts for tensor in plan.tensors if tensor.experts}
    over_tp = {tensor.partition for tensor in plan.tensors if tensor.partition}
    lengths = {key: plan.partitions[key].lengths for key in sorted(over_ep | over_tp)}
    heads = [(each.query.lengths, each.kv.lengths, each.groups) for each in plan.heads.values()]
    alike: dict[Any, list[RankMemory]] = defaultdict(list)
    for row in plan.memory:
        place = plan.mesh.coordinates(row.rank)
        same = (
            *(row.parameters, row.quantized, row.unquantized, row.staging),
            tuple(lengths[key][place["ep"]] for key in sorted(over_ep)),
            tuple(lengths[key][place["tp"]] for key in sorted(over_tp)),
            tuple(each[place["tp"]] for attention in heads for each in attention),
        )
        alike[same].append(row)
    return tuple(RankGroup(tuple(row.rank for row in rows), tuple(rows)) for rows in alike.values())
