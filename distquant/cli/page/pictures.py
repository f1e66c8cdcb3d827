"""Draws a weight as a matrix, in proportion, with each rank's part in a colour of its own; and the mesh of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from distquant.cli.page.folding import ranges
from distquant.cli.page.markup import Html, join, tag
from distquant.planning import LoadPlan
from distquant.planning.load_plan import TensorPlan
from distquant.sharding.partition import Partition

COLOURS = 8
"""Colours in the style sheet, `c0` to `c7`. More ranks begin again with the first."""

WIDTH, HEIGHT, THINNEST = 138.0, 124.0, 16.0
"""Pixels: the most that a matrix takes, and the least of its shorter side."""
LEFT, RIGHT, TOP, STRIP = 20.0, 40.0, 20.0, 16.0
"""Pixels: around a matrix for its sizes and labels, and the height of the strip of experts."""
BACK = 8.0
"""Pixels by which further experts of a stack are drawn behind the first."""
THIN = 4.0
"""Pixels below which a part is drawn without an edge."""
LABEL_ROW, LABEL_COLUMN = 11.0, 15.0
"""Pixels that a label needs in a part that is a row, and in one that is a column."""
SHOWN_RANKS = 256
"""Ranks of the largest mesh that is drawn."""


@dataclass(frozen=True)
class Matrix:
    """A weight, or one expert's, as rows and columns.

    Attributes:
        rows, columns: its sizes, `out` and `in` of a linear weight.
        experts: the number of experts in a stack; 0 = not a stack.
        sharded: "rows", "columns", or "" if it is replicated over tp.
    """

    rows: int
    columns: int
    experts: int
    sharded: str

    @classmethod
    def of(cls, tensor: TensorPlan) -> Matrix | None:
        """Returns the matrix of a tensor; None for a vector. Dims before and after the sharded one are joined."""
        shape, dim, experts = tensor.shape, tensor.shard_dim, 0
        if tensor.experts is not None:
            experts, shape, dim = shape[0], shape[1:], None if dim is None else dim - 1
        if len(shape) < 2:
            return None
        split = max(1, dim or 0)
        sharded = "" if dim is None or tensor.partition is None else ("columns" if dim else "rows")
        return cls(math.prod(shape[:split]), math.prod(shape[split:]), experts, sharded)

    @property
    def is_in_proportion(self) -> bool:
        """False for a matrix so long that its shorter side is drawn wider than it is."""
        scale = self._scale
        return min(self.rows, self.columns) * scale >= THINNEST

    @property
    def _scale(self) -> float:
        return min(WIDTH / max(1, self.columns), HEIGHT / max(1, self.rows))

    @property
    def drawn(self) -> tuple[float, float]:
        """Width and height in pixels."""
        return max(THINNEST, self.columns * self._scale), max(THINNEST, self.rows * self._scale)


def owners(partition: Partition) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Yields `start, stop, positions` for each run of a dim whose elements are on the same positions of an axis."""
    begins: dict[int, list[int]] = {}
    ends: dict[int, list[int]] = {}
    for position, part in enumerate(partition.parts):
        for start, stop in part:
            begins.setdefault(start, []).append(position)
            ends.setdefault(stop, []).append(position)
    held: list[int] = []
    before = 0
    for edge in sorted(begins.keys() | ends.keys()):
        if held and edge > before:
            yield before, edge, tuple(sorted(set(held)))
        for position in ends.get(edge, ()):
            held.remove(position)
        held += begins.get(edge, ())
        before = edge


def weight_picture(plan: LoadPlan, tensor: TensorPlan, matrix: Matrix, description: str) -> Html:
    """Returns a weight as SVG: the matrix with its parts, its sizes, and for a stack the experts on each rank of ep."""
    width, height = matrix.drawn
    partition = plan.partitions[tensor.partition] if matrix.sharded and tensor.partition else None
    parts = [tag("title", description)]
    for back in (BACK, BACK / 2) if matrix.experts else ():
        parts.append(_rect(LEFT + back, TOP + BACK - back, width, height, "back"))
    top = TOP + BACK if matrix.experts else TOP
    parts.append(_rect(LEFT, top, width, height, "whole"))
    if partition is not None:
        parts += _parts(plan, partition, matrix, (LEFT, top, width, height))
    elif plan.mesh.size > 1:
        text = "every rank" if plan.mesh.ep == 1 or not matrix.experts else "every tp"
        if width > 54:
            parts.append(_label(text, LEFT + width / 2, top + height / 2, "on"))
        else:
            parts.append(_beside(text, LEFT + width + 6 + BACK * bool(matrix.experts), top + height / 2))
    parts += _sizes(matrix, top, width, height)
    bottom = top + height
    if matrix.experts and tensor.experts is not None:
        bottom += 30 if matrix.sharded == "columns" else 20
        parts += _strip(plan.partitions[tensor.experts], bottom)
        bottom += STRIP if plan.mesh.ep > 1 else -8
    box_width, box_height = LEFT + WIDTH + RIGHT, bottom + 16
    size = {"width": _short(box_width), "height": _short(box_height)}
    return tag("svg", *parts, viewBox=f"0 0 {_short(box_width)} {_short(box_height)}", role="img", **size)


def _parts(plan: LoadPlan, partition: Partition, matrix: Matrix, box: tuple[float, float, float, float]) -> list[Html]:
    """Returns the parts of a matrix. Elements on several ranks are drawn in stripes of their colours."""
    left, top, width, height = box
    by_rows = matrix.sharded == "rows"
    scale, needed = (height, LABEL_ROW) if by_rows else (width, LABEL_COLUMN)
    drawn: list[Html] = []
    labels = 0
    for start, stop, positions in owners(partition):
        a, b = scale * start / partition.size, scale * stop / partition.size
        where = (left, top + a, width, b - a) if by_rows else (left + a, top, b - a, height)
        name = tag("title", f"{_owners(plan, positions)}: {matrix.sharded} {start:,} to {stop - 1:,}")
        drawn += _striped(where, positions, by_rows, name)
        text = ranges(positions)
        if b - a >= (needed if by_rows else max(needed, 7.0 * len(text) + 4)):
            drawn.append(_label(text, where[0] + where[2] / 2, where[1] + where[3] / 2, "on"))
            labels += 1
    if not labels:
        drawn += _first_and_last(partition, box, by_rows, matrix)
    return drawn


def _first_and_last(
    partition: Partition, box: tuple[float, float, float, float], by_rows: bool, matrix: Matrix
) -> Iterator[Html]:
    """Yields the labels of the first and last part, outside the matrix, where parts are too thin for their labels."""
    left, top, width, height = box
    last = str(len(partition.parts) - 1)
    beside = left + width + 5 + BACK * bool(matrix.experts)
    if by_rows and height >= 2 * LABEL_ROW:
        yield _beside("0", beside, top + 5)
        yield _beside(last, beside, top + height - 5)
    elif by_rows or width < 40:
        yield _beside(f"0 - {last}", beside, top + height / 2)
    else:
        yield _label("0", left + 4, top + height + 8, "size")
        yield _label(last, left + width - 4, top + height + 8, "size")


def _striped(
    where: tuple[float, float, float, float], positions: Sequence[int], by_rows: bool, name: Html
) -> Iterator[Html]:
    """Yields a part in its colour; in as many stripes, across the part, as there are ranks that hold it."""
    left, top, width, height = where
    if len(positions) == 1:
        # Edges would hide the colours of thin parts.
        edge = "" if min(width, height) >= THIN else " s"
        yield _rect(left, top, width, height, f"c{positions[0] % COLOURS}{edge}", name)
        return
    stripes = 4 * len(positions)
    for stripe in range(stripes):
        colour = f"c{positions[stripe % len(positions)] % COLOURS} s"
        if by_rows:
            yield _rect(left + width * stripe / stripes, top, width / stripes, height, colour, name)
        else:
            yield _rect(left, top + height * stripe / stripes, width, height / stripes, colour, name)
    yield _rect(left, top, width, height, "edge", name)


def _owners(plan: LoadPlan, positions: Sequence[int]) -> str:
    """Names positions on tp, which are ranks if the mesh has no other axis."""
    if plan.mesh.size == plan.mesh.tp:
        return f"rank{'s' * (len(positions) > 1)} {ranges(positions)}"
    return f"tp {ranges(positions)}"


def _sizes(matrix: Matrix, top: float, width: float, height: float) -> Iterator[Html]:
    """Yields the numbers of rows and columns, beside the matrix and above it; both above, if it is low."""
    rows, columns = f"{matrix.rows:,}", f"{matrix.columns:,}"
    above, middle = top - (BACK if matrix.experts else 0) - 8, top + height / 2
    if height < 6.5 * len(rows):
        columns = f"{rows} × {columns}"
    else:
        turn = f"rotate(-90 {_short(LEFT - 9)} {_short(middle)})"
        yield tag("text", rows, class_="size m", x=_short(LEFT - 9), y=_short(middle), transform=turn)
    # A number that is longer than its side still begins inside of the picture.
    yield _label(columns, LEFT + max(width / 2, 3.4 * len(columns)), above, "size")


def _strip(partition: Partition, top: float) -> list[Html]:
    """Returns the number of experts; over several ranks of ep, also all experts in a row with the part of each."""
    size, last = partition.size, len(partition.parts) - 1
    text = f"{size} experts, ep 0-{last}" if last else f"{size} experts"
    drawn = [tag("text", text, class_="size", x=_short(LEFT), y=_short(top - 7))]
    for start, stop, positions in owners(partition) if last else ():
        left, width = LEFT + WIDTH * start / size, WIDTH * (stop - start) / size
        name = tag("title", f"ep {ranges(positions)}: experts {ranges(range(start, stop))}")
        drawn.append(_rect(left, top, width, STRIP, f"e{positions[0] % 2}", name))
        label = str(positions[0])
        if width >= 7.0 * len(label) + 4:
            drawn.append(_label(label, left + width / 2, top + STRIP / 2, "on"))
    return drawn


def mesh_picture(plan: LoadPlan) -> Html | None:
    """Returns the ranks as a grid, tp across and ep and dp down, in their colours; None for one rank or too many."""
    mesh = plan.mesh
    if not 1 < mesh.size <= SHOWN_RANKS:
        return None
    step, low = (34, 24) if mesh.tp <= 32 else (22, 20)
    left, top, parts = (4 if mesh.size == mesh.tp else 84 if mesh.dp > 1 and mesh.ep > 1 else 48), 22, []
    for tp in range(mesh.tp):
        parts.append(_label(f"tp {tp}" if mesh.tp <= 16 else str(tp), left + step * (tp + 0.5), 10, "size"))
    for rank in range(mesh.size):
        place = mesh.coordinates(rank)
        line = place["dp"] * mesh.ep + place["ep"]
        x, y = left + step * place["tp"], top + low * line + 6 * place["dp"]
        if place["tp"] == 0 and mesh.size > mesh.tp:
            names = [f"{axis} {place[axis]}" for axis in ("dp", "ep") if getattr(mesh, axis) > 1]
            parts.append(tag("text", ", ".join(names), class_="size", x=4, y=_short(y + low / 2)))
        where = ", ".join(f"{axis} {number}" for axis, number in place.items() if getattr(mesh, axis) > 1)
        name = tag("title", f"rank {rank}: {where}; node {plan.nodes[rank]}")
        parts.append(_rect(x, y, step - 3, low - 3, f"c{place['tp'] % COLOURS}", name))
        parts.append(_label(str(rank), x + (step - 3) / 2, y + (low - 3) / 2, "on"))
    width, height = left + step * mesh.tp + 4, top + low * mesh.dp * mesh.ep + 6 * mesh.dp
    label = f"{mesh.size} ranks as a grid of {mesh}"
    return tag("svg", *parts, viewBox=f"0 0 {width} {height}", width=width, height=height, role="img", aria_label=label)


def _rect(x: float, y: float, width: float, height: float, kind: str, name: Html | None = None) -> Html:
    sizes = {"x": _short(x), "y": _short(y), "width": _short(width), "height": _short(height)}
    return tag("rect", name or join(()), class_=kind, **sizes)


def _beside(text: str, x: float, y: float) -> Html:
    return tag("text", text, class_="size", x=_short(x), y=_short(y))


def _label(text: str, x: float, y: float, kind: str) -> Html:
    return tag("text", text, class_=f"{kind} m", x=_short(x), y=_short(y))


def _short(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")
