"""Draws how partitions divide each method's components, and writes their tables into `layouts.md`.

    python docs/draw_layouts.py

Nothing in a picture or a table is typed in: a small weight is laid out by the scheme's own `layout`, its partition
falls on its alignments, and the slices are those that a load reads from a checkpoint (`kinds_of`, by
`Component.slice`). Pictures are `layouts/<method>.svg`; tables stand in `layouts.md` between
`<!-- table: METHOD -->` and `<!-- end -->`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from distquant.checkpoint import TensorInfo
from distquant.config.resolve import parse
from distquant.model.description import Source
from distquant.planning.load_plan import TensorPlan
from distquant.planning.transfers import kinds_of
from distquant.quantization.registry import config_classes, scheme_for
from distquant.quantization.scheme import Scheme
from distquant.sharding.layout import ALL, Component
from distquant.sharding.partition import Partition, even_partition

DOCS = Path(__file__).resolve().parent
NAME, DTYPE, RANKS = "layers.0.proj.weight", "bfloat16", 2
OUT, IN = 0, 1
STYLES = {OUT: "column-parallel", IN: "row-parallel"}
DIMS = {OUT: "out", IN: "in"}


@dataclass(frozen=True)
class Example:
    """A configuration of a method, and the weight `[out, in]` that shows it."""

    caption: str
    config: str | Mapping[str, Any]
    shape: tuple[int, int] = (48, 160)


def _compressed(kind: str, format: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"type": kind, "symmetric": True, **weights}}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}}


def _torchao(name: str, **data: Any) -> dict[str, Any]:
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": name, "_version": 2, "_data": data}}}


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32}
_PER_GROUP = {"_type": "PerGroup", "_version": 1, "_data": {"group_size": 32}}
_INT4 = {"_type": "torch.dtype", "_data": "int4"}

EXAMPLES: Mapping[str, tuple[Example, ...]] = {
    "none": (Example("unquantized", "none"),),
    "bitsandbytes_4bit": (
        Example("nf4, rows of whole blocks", "nf4", (48, 192)),
        Example("nf4, rows that straddle blocks", "nf4", (48, 160)),
        Example("nf4 with double quantization", "nf4-dq", (48, 192)),
    ),
    "bitsandbytes_8bit": (Example("int8", "int8"),),
    "gptq": (
        Example("4 bits, groups of 32", _GPTQ, (40, 160)),
        Example("4 bits, groups of 32, desc_act", {**_GPTQ, "desc_act": True}, (40, 160)),
        Example("3 bits, one group", {**_GPTQ, "bits": 3, "group_size": -1}, (96, 160)),
    ),
    "awq": (Example("groups of 32", {"quant_method": "awq", "bits": 4, "group_size": 32}),),
    "auto-round": (
        Example("auto_round:auto_gptq", {**_ROUND, "packing_format": "auto_round:auto_gptq"}, (40, 160)),
        Example("auto_round:auto_awq", {**_ROUND, "packing_format": "auto_round:auto_awq"}),
    ),
    "compressed-tensors": (
        Example(
            "pack-quantized, asymmetric int4, groups of 32",
            _compressed("int", "pack-quantized", num_bits=4, symmetric=False, strategy="group", group_size=32),
            (40, 160),
        ),
        Example("float-quantized, channel", _compressed("float", "float-quantized", num_bits=8, strategy="channel")),
        Example("int-quantized, tensor", _compressed("int", "int-quantized", num_bits=8, strategy="tensor")),
    ),
    "fp8": (
        Example("tiles of 128 x 128", "fp8", (320, 384)),
        Example("one scale", "fp8-tensor"),
    ),
    "mxfp8": (Example("runs of 32", "mxfp8"),),
    "mxfp4": (Example("runs of 32", "mxfp4"),),
    "fbgemm_fp8": (Example("rows", "fbgemm_fp8"),),
    "torchao": (
        Example("Int8WeightOnlyConfig, rows", "torchao-int8"),
        Example(
            "IntxWeightOnlyConfig, groups of 32",
            _torchao("IntxWeightOnlyConfig", weight_dtype=_INT4, granularity=_PER_GROUP),
        ),
    ),
    "quanto": (
        Example("int8", {"quant_method": "quanto", "weights": "int8"}),
        Example("int4", {"quant_method": "quanto", "weights": "int4"}),
    ),
    "hqq": (
        Example("4 bits, groups of 64 along the inputs", {"quant_method": "hqq", "nbits": 4}, (48, 192)),
        Example(
            "4 bits, groups of 16 along the outputs (axis 0)",
            {"quant_method": "hqq", "nbits": 4, "group_size": 16, "axis": 0},
            (48, 192),
        ),
    ),
    "gguf": (
        Example("Q8_0", {"quant_method": "gguf", "types": {NAME: "Q8_0"}}),
        Example(
            "Q8_0, rows of heads of 16 interleaved",
            {"quant_method": "gguf", "types": {NAME: "Q8_0"}, "interleaved": {NAME: 16}},
        ),
    ),
}
"""Examples by the method's name in the registry."""


# -- the declarations of the schemes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class DividedComponent:
    """A stored component under a partition.

    Attributes:
        component: as the layout declares it.
        shape: as it is stored.
        shard_dim: the stored dim that is divided; None = replicated.
        ranges: of that dim, the ranges that each rank reads; () = replicated.
        grid: stored elements between two drawn lines, per dim.
    """

    component: Component
    shape: tuple[int, ...]
    shard_dim: int | None = None
    ranges: tuple[tuple[tuple[int, int], ...], ...] = ()
    grid: tuple[int, ...] = ()


@dataclass(frozen=True)
class LaidOut:
    """An example laid out: a partition of each dim (None = none is exact), and the components under it."""

    scheme: Scheme
    shape: tuple[int, int]
    partitions: dict[int, Partition | None] = field(default_factory=dict)
    divided: dict[int, list[DividedComponent]] = field(default_factory=dict)

    @property
    def components(self) -> tuple[Component, ...]:
        return self.scheme.layout(NAME, self.shape, DTYPE).components

    def alignments(self, dim: int) -> tuple[int, ...]:
        return self.scheme.layout(NAME, self.shape, DTYPE).alignments(self.shape, dim)


def lay_out(example: Example) -> LaidOut:
    """Lays out an example by its scheme, and divides it over two ranks as a load does."""
    config = parse(example.config, config_classes())
    assert config is not None, example
    example_layout = LaidOut(scheme_for(config), example.shape)
    for dim in (OUT, IN):
        alignments = example_layout.alignments(dim)
        partitions = (even_partition(example.shape[dim], alignment, RANKS) for alignment in alignments)
        example_layout.partitions[dim] = partition = next((c for c in partitions if c is not None), None)
        example_layout.divided[dim] = list(_divide(example_layout, dim, partition)) if partition else []
    return example_layout


def _divide(laid_out: LaidOut, dim: int, partition: Partition) -> Iterator[DividedComponent]:
    """Yields each component as `kinds_of` divides it where a checkpoint stores it."""
    infos, sources = {}, []
    for number, component in enumerate(laid_out.components):
        tensor = f"{number:02}"
        shape = component.shape(laid_out.shape)
        size = component.nbytes(laid_out.shape)
        infos[tensor] = TensorInfo(name=tensor, dtype="U8", shape=shape, file="file", offset=number, nbytes=size)
        sources.append(Source(tensor, component.name))
    scheme = laid_out.scheme
    plan = TensorPlan(NAME, laid_out.shape, DTYPE, scheme.name, tuple(sources), dim, "partition")
    kinds = kinds_of(plan, partition, scheme, True, infos)
    for component, kind in zip(laid_out.components, kinds, strict=True):
        if kind.shard_dim is None or kind.partition is None:
            shape = component.shape(laid_out.shape)
            yield DividedComponent(component, shape, grid=_grid(component, len(shape)))
        else:
            ranges = kind.partition.parts
            yield DividedComponent(component, kind.shape, kind.shard_dim, ranges, _grid(component, 2))


def _grid(component: Component, dims: int) -> tuple[int, ...]:
    if dims == 1 or component.flat or not component.stored_per_block:
        return (1,) * dims
    steps = tuple(1 if s == ALL else n for s, n in zip(component.block_shape, component.stored_per_block, strict=True))
    return steps[::-1] if component.transposed else steps


# -- tables ------------------------------------------------------------------------------------------------------------


HEADINGS = (
    *("component", "dtype", "an element covers", "stored"),
    *("alignment of out", "alignment of in", "column-parallel", "row-parallel"),
)


def label(component: Component) -> str:
    """Returns a component's name for readers."""
    return component.name or "weight"


def covers(component: Component) -> str:
    """Names the logical elements, out x in, one stored element (or the elements of a block) covers."""
    if component.flat:
        return f"{component.flat} of the weight" if component.replicated else f"a run of {component.flat}"
    per_block = component.stored_per_block or (1, 1)
    block_shape = ["all" if size == ALL else str(size) for size in component.block_shape]
    text = f"{block_shape[0]} x {block_shape[1]}"
    if math.prod(per_block) > 1:
        text += f", in {per_block[0]} x {per_block[1]} elements"
    return text


def table(method: str) -> str:
    """Returns the markdown table of a method's examples."""
    rows = [
        f"| {' | '.join(HEADINGS)} |",
        f"|{'---|' * len(HEADINGS)}",
    ]
    for example in EXAMPLES[method]:
        laid_out = lay_out(example)
        out_dim, in_dim = laid_out.shape
        of_layout = (f"**{_steps(laid_out.alignments(dim))}**" for dim in (OUT, IN))
        rows.append(f"| *{example.caption}, [{out_dim}, {in_dim}]* | | | | {' | '.join(of_layout)} | | |")
        for number, component in enumerate(laid_out.components):
            stored = f"{list(component.shape(laid_out.shape))}{', transposed' if component.transposed else ''}"
            alignments = [_alignments(component, laid_out.shape, dim) for dim in (OUT, IN)]
            shares = [_share(laid_out.divided[dim], number) for dim in (OUT, IN)]
            cells = (f"`{label(component)}`", component.dtype, covers(component), stored, *alignments, *shares)
            rows.append(f"| {' | '.join(cells)} |")
        unsliced = sorted(laid_out.scheme.unsliced)
        rows += [f"| `{name}` | | no slices | | any | any | replicated | replicated |" for name in unsliced]
    return "\n".join(rows)


def _alignments(component: Component, shape: tuple[int, int], dim: int) -> str:
    return "any" if component.replicated else _steps(component.alignments(shape, dim))


def _steps(alignments: tuple[int, ...]) -> str:
    return ", else ".join(map(str, alignments)) or "none"


def _share(divided: list[DividedComponent], number: int) -> str:
    return "-" if not divided else "sliced" if divided[number].ranges else "replicated"


def with_tables(page: str) -> str:
    """Returns the page with every table as the schemes declare it now."""
    pattern = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda match: f"{match[1]}{table(match[2])}\n{match[3]}", page)


# -- pictures ----------------------------------------------------------------------------------------------------------

SIDE, CELL, PITCH, LEFT, LINE, MOST = 96, 14, 172, 20, 14, 24
"""Pixels: of a box's longest side, of its cells where they are few, between boxes, at the left; of a line of text.
`MOST` is how many cells of a dim are still drawn."""
COLOURS = ("#9cc8ee", "#f6b870")
INK, PAPER, FAINT = "#1b1f24", "#ffffff", "#5a626b"


def picture(method: str) -> str:
    """Returns the SVG of a method."""
    elements, y, widest = [], 28, 4
    elements.append(_text(LEFT, y, method, size=16, bold=True))
    y += 8
    for example in EXAMPLES[method]:
        laid_out = lay_out(example)
        y += 24
        caption = f"{example.caption}: weight [out {laid_out.shape[0]}, in {laid_out.shape[1]}]"
        elements.append(_text(LEFT, y, caption, bold=True))
        for dim in (OUT, IN):
            y += 22
            elements.append(_text(LEFT, y, _heading(laid_out, dim)))
            if laid_out.partitions[dim] is None:
                continue
            y += 10
            boxes = list(_boxes(laid_out, dim))
            widest = max(widest, len(boxes))
            for column, (lines, drawing) in enumerate(boxes):
                x = LEFT + column * PITCH
                elements.append(f'<g transform="translate({x} {y})">{drawing}</g>')
                for number, line in enumerate(lines):
                    elements.append(_text(x, y + SIDE + (number + 1) * LINE, line, size=10.5, bold=number == 0))
            y += SIDE + 4 * LINE
    y += 26
    elements += _legend(y)
    width, height = LEFT + widest * PITCH, y + 34
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="Helvetica, Arial, DejaVu Sans, sans-serif">\n<title>{escape(method)} under tp=2</title>\n'
        f'<defs><pattern id="both" width="8" height="8" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        f'<rect width="8" height="8" fill="{COLOURS[0]}"/><rect width="4" height="8" fill="{COLOURS[1]}"/>'
        f'</pattern></defs>\n<rect width="{width}" height="{height}" rx="8" fill="{PAPER}"/>\n'
        + "\n".join(elements)
        + "\n</svg>\n"
    )


def _heading(laid_out: LaidOut, dim: int) -> str:
    partition, alignments = laid_out.partitions[dim], laid_out.alignments(dim)
    if partition is None:
        return f"{STYLES[dim]}: no exact partition, replicated on every rank"
    alignment = next(each for each in alignments if partition.legal(each))
    return f"{STYLES[dim]}: {DIMS[dim]} {' + '.join(map(str, partition.lengths))}, alignment {alignment}"


def _boxes(laid_out: LaidOut, dim: int) -> Iterator[tuple[list[str], str]]:
    """Yields the logical weight, then every component: lines of text, and the drawing."""
    partition = laid_out.partitions[dim]
    assert partition is not None
    weight = Component(name="", dtype=DTYPE)
    logical = DividedComponent(weight, laid_out.shape, dim, partition.parts, laid_out.shape)
    shares = [_range(logical, rank) for rank in range(RANKS)]
    yield ["logical weight", f"[{laid_out.shape[0]}, {laid_out.shape[1]}]", *shares], _drawing(logical)
    for divided in laid_out.divided[dim]:
        component = divided.component
        flat = f" as {list(divided.shape)}" if component.flat and divided.ranges else ""
        title = [label(component), f"{component.dtype} {list(component.shape(laid_out.shape))}{flat}"]
        if divided.ranges:
            yield [*title, *(_range(divided, rank) for rank in range(RANKS))], _drawing(divided)
        else:
            yield [*title, "replicated on both ranks"], _drawing(divided)
    if laid_out.scheme.unsliced:
        box = f'<rect width="{SIDE}" height="{SIDE}" fill="url(#both)" stroke="{INK}"/>'
        lines = ("as stored: no slices,", "both ranks read all", "and keep a part")
        yield [", ".join(sorted(laid_out.scheme.unsliced)), *lines], box


def _range(divided: DividedComponent, rank: int) -> str:
    ranges = ", ".join(f"{start}:{stop}" for start, stop in divided.ranges[rank])
    return f"rank {rank}: [{ranges}, :]" if divided.shard_dim == 0 else f"rank {rank}: [:, {ranges}]"


def _drawing(divided: DividedComponent) -> str:
    """Draws a stored component, dim 0 downwards, with the ranges that each rank reads."""
    shape = divided.shape if len(divided.shape) == 2 else (1, *divided.shape)
    grid = divided.grid if len(divided.grid) == 2 else (1, *divided.grid)
    cells = [-(-size // step) for size, step in zip(shape, grid, strict=True)]
    single = divided.grid == divided.shape and math.prod(shape) > 1  # the logical weight: one surface
    height, width = (SIDE if single else min(SIDE, CELL * count) for count in cells)
    shard_dim = divided.shard_dim or 0
    side = (height, width)[shard_dim]
    elements = []
    if not divided.ranges:
        elements.append(f'<rect width="{width}" height="{height}" fill="url(#both)"/>')
    for rank, ranges in enumerate(divided.ranges):
        for each in ranges:
            start, stop = (edge * side / shape[shard_dim] for edge in each)
            box = f'x="0" y="{_pixels(start)}" width="{width}" height="{_pixels(stop - start)}"'
            if shard_dim == 1:
                box = f'x="{_pixels(start)}" y="0" width="{_pixels(stop - start)}" height="{height}"'
            elements.append(f'<rect {box} fill="{COLOURS[rank]}"/>')
    path = ""
    for dim, length in enumerate((height, width)):
        for number in range(1, cells[dim] if cells[dim] <= MOST else 0):
            edge = _pixels(number * grid[dim] * length / shape[dim])
            path += f"M{edge} 0V{height}" if dim else f"M0 {edge}H{width}"
    if path:
        elements.append(f'<path d="{path}" stroke="{INK}" stroke-width="0.4" stroke-opacity="0.6" fill="none"/>')
    for ranges in divided.ranges[1:]:
        edge = _pixels(ranges[0][0] * side / shape[shard_dim])
        line = f"M{edge} -5V{height + 5}" if shard_dim else f"M-5 {edge}H{width + 5}"
        elements.append(f'<path d="{line}" stroke="#c0202c" stroke-width="2" fill="none"/>')
    elements.append(f'<rect width="{width}" height="{height}" fill="none" stroke="{INK}"/>')
    return "".join(elements)


def _pixels(value: float) -> str:
    return f"{round(value, 2):g}"


def _legend(y: int) -> list[str]:
    elements, x = [], LEFT
    entries = ((COLOURS[0], "rank 0"), (COLOURS[1], "rank 1"), ("url(#both)", "both ranks"))
    for fill, text in entries:
        elements.append(f'<rect x="{x}" y="{y - 10}" width="12" height="12" fill="{fill}" stroke="{INK}"/>')
        elements.append(_text(x + 17, y, text, size=10.5))
        x += 34 + 7 * len(text)
    text = "red: the boundary between ranks; thin lines: stored elements, where they are few; stored dim 0 goes down"
    return [*elements, _text(LEFT, y + 18, text, size=10.5, ink=FAINT)]


def _text(x: float, y: float, text: str, size: float = 12, bold: bool = False, ink: str = INK) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}" font-size="{size:g}"{weight} fill="{ink}">{escape(text)}</text>'


def main() -> None:
    (DOCS / "layouts").mkdir(exist_ok=True)
    for method in EXAMPLES:
        (DOCS / "layouts" / f"{method}.svg").write_text(picture(method), encoding="utf-8")
    page = DOCS / "layouts.md"
    page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
