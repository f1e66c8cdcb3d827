"""The layers of a plan and a picture of each kind of weight, in sections that follow the modules of the model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from distquant.cli.page.folding import LayerKind, LayerStack, TensorGroup, numbered
from distquant.cli.page.markup import Html, join, table, tag
from distquant.cli.page.pictures import Matrix, weight_picture
from distquant.planning import LoadPlan
from distquant.planning.load_plan import TensorPlan
from distquant.sharding.device_map import place_of

OUTSIDE = "Outside the layers"
KINDS = 6
"""Colours of kinds of layers in the style sheet, `k0` to `k5`."""
NAMED = 6
"""Tensors by which a kind of layer differs that are named; more are counted."""


# -- layers ------------------------------------------------------------------------------------------------------------


def layers_section(stacks: Sequence[LayerStack]) -> Html:
    """Returns a strip for each stack of layers, coloured by kind, and a line for each kind."""
    shown = [stack for stack in stacks if sum(len(kind.layers) for kind in stack.kinds) > 1]
    return join(tag("div", _strip(stack), *_kinds(stack), class_="stack") for stack in shown)


def _strip(stack: LayerStack) -> Html:
    kinds = {layer: number for number, kind in enumerate(stack.kinds) for layer in kind.layers}
    step = 100 / len(kinds)
    cells = [
        tag(
            "rect",
            tag("title", f"{_word(stack)} {layer}"),
            class_=f"k{kinds[layer] % KINDS}",
            x=f"{position * step:.3f}%",
            width=f"{step:.3f}%",
            height=18,
        )
        for position, layer in enumerate(sorted(kinds))
    ]
    label = f"{len(kinds)} {_word(stack)}s in {len(stack.kinds)} kinds"
    return tag("svg", *cells, width="100%", height=18, role="img", aria_label=label)


def _word(stack: LayerStack) -> str:
    return stack.path.rstrip(".").rpartition(".")[2].removesuffix("s") or "layer"


def _kinds(stack: LayerStack) -> Iterator[Html]:
    """Yields a line for each kind: its layers, their size, and the tensors by which it differs from others."""
    common = stack.common
    for number, kind in enumerate(stack.kinds):
        tensors, elements = kind_size(kind)
        alike = ", all alike" if len(kind.layers) > 1 else ""
        size = f"{tensors:,} tensors and {elements / 1e6:,.1f} million parameters each"
        own = [_within(group, stack) for group in kind.groups if group not in common]
        named = join((tag("code", name) for name in own[:NAMED]), ", ")
        more = f" and {len(own) - NAMED} more" if len(own) > NAMED else ""
        named = Html("all tensors") if len(own) == len(kind.groups) else join([named, more])
        differs = join(["; differs from other layers in ", named]) if own else ""
        swatch = tag("svg", tag("rect", class_=f"k{number % KINDS}", width=14, height=14), class_="swatch")
        yield tag("p", swatch, tag("b", numbered(f"{_word(stack)}s", kind.layers)), alike, ": ", size, differs)


def kind_size(kind: LayerKind) -> tuple[int, int]:
    """Counts the tensors and the elements of one layer of a kind."""
    tensors = [group.count // len(group.numbers[0]) for group in kind.groups]
    elements = (count * math.prod(group.tensor.shape) for count, group in zip(tensors, kind.groups, strict=True))
    return sum(tensors), sum(elements)


def _within(group: TensorGroup, stack: LayerStack) -> str:
    """Returns the pattern of a group, less the path of its layer."""
    return group.pattern[len(stack.path) :].partition(".")[2].removesuffix(".weight") or group.pattern


# -- pictures ----------------------------------------------------------------------------------------------------------


def weights_section(plan: LoadPlan, groups: Sequence[TensorGroup]) -> Html:
    """Returns a card for each kind of weight, by the module that it is in, and a table of vectors."""
    sections: dict[str, list[TensorGroup]] = defaultdict(list)
    vectors = []
    for group in groups:
        if Matrix.of(group.tensor) is None:
            vectors.append(group)
        else:
            sections[_section(group)].append(group)
    order = sorted(sections, key=lambda name: name == OUTSIDE)
    pictures = tag("div", *(_cards(plan, name, sections[name]) for name in order if sections[name]), class_="modules")
    return join([pictures, _vectors(plan, vectors)])


def _section(group: TensorGroup) -> str:
    """Returns the path of the module that holds the modules of a group, with a star for its layer."""
    if not group.numbers:
        return OUTSIDE
    path = group.pieces[0].rstrip(".")
    inner = group.pattern[len(group.pieces[0]) :].partition(".")[2]
    return f"{path}.*.{_parent(inner)}".rstrip(".")


def _parent(name: str) -> str:
    """Returns the module that holds the module of a parameter."""
    return name.rpartition(".")[0].rpartition(".")[0]


def _cards(plan: LoadPlan, name: str, groups: Sequence[TensorGroup]) -> Html:
    """Returns the pictures of the weights in a module."""
    cards: dict[Any, list[TensorGroup]] = defaultdict(list)
    for group in groups:
        cards[_look(plan, group)].append(group)
    head = tag("h3", name if name == OUTSIDE else tag("code", name))
    return tag("section", head, tag("div", *(_card(plan, alike) for alike in cards.values()), class_="cards"))


def _vectors(plan: LoadPlan, groups: Sequence[TensorGroup]) -> Html:
    """Returns a table of what is not a matrix."""
    if not groups:
        return Html("")
    rows = [
        (
            tag("code", group.pattern),
            group.label,
            _shape(group.tensor),
            storage(plan, group.tensor),
            division(plan, group.tensor),
        )
        for group in groups
    ]
    head = tag("h3", "Vectors and single numbers")
    return tag(
        "section", head, table(("name", "where", "shape", "stored", "division"), rows, "vectors"), class_="vectors"
    )


def _look(plan: LoadPlan, group: TensorGroup) -> Any:
    """Returns all that a card shows but the name: weights that look alike share a card."""
    tensor = group.tensor
    return (
        group.numbers,
        _shape(tensor),
        tensor.shard_dim,
        tensor.partition,
        tensor.experts,
        storage(plan, tensor),
        place_of(plan.device_map or {}, tensor.name),
    )


def _card(plan: LoadPlan, groups: Sequence[TensorGroup]) -> Html:
    group, tensor = groups[0], groups[0].tensor
    matrix = Matrix.of(tensor)
    assert matrix is not None
    names = [_name(each) for each in groups]
    how = division(plan, tensor)
    description = f"{', '.join(names)}, {_shape(tensor)}: {how}"
    return tag(
        "figure",
        tag("figcaption", join((tag("code", name) for name in names), " "), tag("span", group.label, class_="dim")),
        weight_picture(plan, tensor, matrix, description),
        tag("p", how),
        tag("p", storage(plan, tensor), class_="dim"),
        "" if matrix.is_in_proportion else tag("p", "Its short side is drawn larger.", class_="dim"),
    )


def _name(group: TensorGroup) -> str:
    """Returns the name of a group's weight within its module."""
    whole = group.pattern.removesuffix(".weight")
    module = group.pattern.rpartition(".")[0] if whole == group.pattern else whole
    return whole if not group.numbers else group.pattern[len(module.rpartition(".")[0]) + 1 :].removesuffix(".weight")


def _shape(tensor: TensorPlan) -> str:
    return " × ".join(f"{size:,}" for size in tensor.shape) or "one number"


def storage(plan: LoadPlan, tensor: TensorPlan) -> str:
    """Describes the scheme and dtype of a tensor, and its device if there is a device map."""
    device = place_of(plan.device_map or {}, tensor.name)
    where = f", on {device}" if device else ""
    if tensor.scheme == "none":
        return f"not quantized, {tensor.dtype}{where}"
    if plan.dequantize:
        return f"{tensor.scheme}, dequantized to {tensor.dtype}{where}"
    origin = "as stored" if plan.prequantized else f"quantized from {tensor.dtype}"
    return f"{tensor.scheme}, {origin}{where}"


def division(plan: LoadPlan, tensor: TensorPlan) -> str:
    """Describes the parts of a tensor that ranks hold, in a sentence."""
    mesh, matrix = plan.mesh, Matrix.of(tensor)
    experts = ""
    if tensor.experts is not None:
        partition = plan.partitions[tensor.experts]
        if mesh.ep > 1:
            experts = f"{partition.size} experts over ep={mesh.ep}, {_each(partition.lengths)}; "
        else:
            experts = f"{partition.size} experts; "
    if tensor.partition is None or tensor.shard_dim is None:
        if mesh.size == 1:
            return f"{experts}whole"
        whole = f"replicated over tp={mesh.tp}" if mesh.tp > 1 else "each of them whole"
        return f"{experts}{whole}" if experts else f"replicated on all {mesh.size} ranks"
    partition = plan.partitions[tensor.partition]
    dim = f"dim {tensor.shard_dim}" if matrix is None else matrix.sharded
    inside = "in each, " if experts else ""
    repeated = f"; {partition.repeated:,} more {dim} because some are on several ranks" if partition.repeated else ""
    return f"{experts}{inside}{dim} divided over tp={mesh.tp}, {_each(partition.lengths)}{repeated}"


def _each(lengths: Sequence[int]) -> str:
    least, most = min(lengths), max(lengths)
    return f"{most:,} each" if least == most else f"{least:,} to {most:,} each"
