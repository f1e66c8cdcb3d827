"""Draws how cuts pass through each method's components, and writes their tables into `layouts.md`.

    python docs/draw_layouts.py

Nothing in a picture or a table is typed in: a small weight is laid out by the scheme's own `layout`, its cut falls on
its alignments, and the slices are those in which a load reads a checkpoint (`kinds_of`, by `Component.slice`).
Pictures are `layouts/<method>.svg`; tables stand in `layouts.md` between `<!-- table: METHOD -->` and `<!-- end -->`.
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
"""What is shown of each method, by its name in the registry."""


# -- what the schemes say ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A stored component under a partition: its stored shape, and the ranges of `shard_dim` that each rank reads.

    Without ranges, each rank reads all of it.

    `lines` are the stored elements between two drawn lines, per dim.
    """

    component: Component
    shape: tuple[int, ...]
    shard_dim: int | None = None
    parts: tuple[tuple[tuple[int, int], ...], ...] = ()
    lines: tuple[int, ...] = ()


@dataclass(frozen=True)
class Laid:
    """An example laid out: its cut of each dim (None = there is none), and the components under it."""

    scheme: Scheme
    shape: tuple[int, int]
    partitions: dict[int, Partition | None] = field(default_factory=dict)
    pieces: dict[int, list[Piece]] = field(default_factory=dict)

    @property
    def components(self) -> tuple[Component, ...]:
        return self.scheme.layout(NAME, self.shape, DTYPE).components

    def alignments(self, dim: int) -> tuple[int, ...]:
        return self.scheme.layout(NAME, self.shape, DTYPE).alignments(self.shape, dim)


def laid(example: Example) -> Laid:
    """What the scheme of an example declares, and what a load makes of it on two ranks."""
    config = parse(example.config, config_classes())
    assert config is not None, example
    found = Laid(scheme_for(config), example.shape)
    for dim in (OUT, IN):
        partitions = (even_partition(example.shape[dim], alignment, RANKS) for alignment in found.alignments(dim))
        found.partitions[dim] = partition = next((c for c in partitions if c is not None), None)
        found.pieces[dim] = list(_pieces(found, dim, partition)) if partition else []
    return found


def _pieces(found: Laid, dim: int, partition: Partition) -> Iterator[Piece]:
    """Yields each component as `kinds_of` shards it where a checkpoint stores it."""
    infos, sources = {}, []
    for at, component in enumerate(found.components):
        tensor = f"{at:02}"
        shape = component.shape(found.shape)
        size = component.nbytes(found.shape)
        infos[tensor] = TensorInfo(name=tensor, dtype="U8", shape=shape, file="file", offset=at, nbytes=size)
        sources.append(Source(tensor, component.name))
    name = found.scheme.name
    plan = TensorPlan(NAME, found.shape, DTYPE, name, tuple(sources), dim, "cut")
    for component, kind in zip(found.components, kinds_of(plan, partition, found.scheme, True, infos), strict=True):
        if kind.shard_dim is None or kind.partition is None:
            shape = component.shape(found.shape)
            yield Piece(component, shape, lines=_lines(component, len(shape)))
        else:
            yield Piece(component, kind.shape, kind.shard_dim, kind.partition.parts, _lines(component, 2))


def _lines(component: Component, dims: int) -> tuple[int, ...]:
    if dims == 1 or component.flat or not component.stored_per_block:
        return (1,) * dims
    steps = tuple(1 if s == ALL else w for s, w in zip(component.block_shape, component.stored_per_block, strict=True))
    return steps[::-1] if component.transposed else steps


# -- tables ------------------------------------------------------------------------------------------------------------


def label(component: Component) -> str:
    """What a reader calls a component."""
    return component.name or "weight"


def covers(component: Component) -> str:
    """What one stored element (or the elements of a span) stands for, out x in."""
    if component.flat:
        return f"{component.flat} of the weight" if component.replicated else f"a run of {component.flat}"
    words = component.stored_per_block or (1, 1)
    block_shape = ["all" if s == ALL else str(s) for s in component.block_shape]
    text = f"{block_shape[0]} x {block_shape[1]}"
    if math.prod(words) > 1:
        text += f", in {words[0]} x {words[1]} elements"
    return text


def table(method: str) -> str:
    """The markdown table of a method's examples."""
    rows = [
        "| component | dtype | an element covers | stored | unit of out | unit of in | cut by out | cut by in |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for example in EXAMPLES[method]:
        found = laid(example)
        out, into = found.shape
        rows.append(f"| *{example.caption}, [{out}, {into}]* | | | | {_told(found, OUT)} | {_told(found, IN)} | | |")
        for at, component in enumerate(found.components):
            stored = f"{list(component.shape(found.shape))}{', transposed' if component.transposed else ''}"
            alignments = [
                "any" if component.replicated else _steps(component.alignments(found.shape, d)) for d in (OUT, IN)
            ]
            ways = [_way(found.pieces[d], at) for d in (OUT, IN)]
            cells = (f"`{label(component)}`", component.dtype, covers(component), stored, *alignments, *ways)
            rows.append(f"| {' | '.join(cells)} |")
        rows += [f"| `{n}` | | no slices | | any | any | whole | whole |" for n in sorted(found.scheme.unsliced)]
    return "\n".join(rows)


def _told(found: Laid, dim: int) -> str:
    return f"**{_steps(found.alignments(dim))}**"


def _steps(alignments: tuple[int, ...]) -> str:
    return ", else ".join(map(str, alignments)) or "none"


def _way(pieces: list[Piece], at: int) -> str:
    return "-" if not pieces else "sliced" if pieces[at].parts else "whole"


def with_tables(page: str) -> str:
    """The page with every table as the schemes declare it now."""
    pattern = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda found: f"{found[1]}{table(found[2])}\n{found[3]}", page)


# -- pictures ----------------------------------------------------------------------------------------------------------

SIDE, CELL, PITCH, LEFT, LINE, MOST = 96, 14, 172, 20, 14, 24
"""Pixels: of a box's longest side, of its cells where they are few, between boxes, at the left; of a line of text.
`MOST` is how many cells of a dim are still drawn."""
COLOURS = ("#9cc8ee", "#f6b870")
INK, PAPER, FAINT = "#1b1f24", "#ffffff", "#5a626b"


def picture(method: str) -> str:
    """The SVG of a method."""
    parts, y, widest = [], 28, 4
    parts.append(_text(LEFT, y, method, size=16, bold=True))
    y += 8
    for example in EXAMPLES[method]:
        found = laid(example)
        y += 24
        parts.append(
            _text(LEFT, y, f"{example.caption}: weight [out {found.shape[0]}, in {found.shape[1]}]", bold=True)
        )
        for dim in (OUT, IN):
            y += 22
            parts.append(_text(LEFT, y, _heading(found, dim)))
            if found.partitions[dim] is None:
                continue
            y += 10
            boxes = list(_boxes(found, dim))
            widest = max(widest, len(boxes))
            for at, (lines, drawing) in enumerate(boxes):
                x = LEFT + at * PITCH
                parts.append(f'<g transform="translate({x} {y})">{drawing}</g>')
                for number, line in enumerate(lines):
                    parts.append(_text(x, y + SIDE + (number + 1) * LINE, line, size=10.5, bold=number == 0))
            y += SIDE + 4 * LINE
    y += 26
    parts += _legend(y)
    width, height = LEFT + widest * PITCH, y + 34
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="Helvetica, Arial, DejaVu Sans, sans-serif">\n<title>{escape(method)} under tp=2</title>\n'
        f'<defs><pattern id="both" width="8" height="8" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        f'<rect width="8" height="8" fill="{COLOURS[0]}"/><rect width="4" height="8" fill="{COLOURS[1]}"/>'
        f'</pattern></defs>\n<rect width="{width}" height="{height}" rx="8" fill="{PAPER}"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _heading(found: Laid, dim: int) -> str:
    partition, alignments = found.partitions[dim], found.alignments(dim)
    if partition is None:
        return f"{STYLES[dim]}: no exact cut, every rank holds everything"
    alignment = next(u for u in alignments if partition.legal(u))
    return f"{STYLES[dim]}: {DIMS[dim]} {' + '.join(map(str, partition.lengths))}, in units of {alignment}"


def _boxes(found: Laid, dim: int) -> Iterator[tuple[list[str], str]]:
    """The logical weight, then every component: lines of text, and the drawing."""
    partition = found.partitions[dim]
    assert partition is not None
    weight = Component(name="", dtype=DTYPE)
    logical = Piece(weight, found.shape, dim, partition.parts, found.shape)
    shares = [_range(logical, rank) for rank in range(RANKS)]
    yield ["logical weight", f"[{found.shape[0]}, {found.shape[1]}]", *shares], _drawing(logical)
    for piece in found.pieces[dim]:
        component = piece.component
        flat = f" as {list(piece.shape)}" if component.flat and piece.parts else ""
        title = [label(component), f"{component.dtype} {list(component.shape(found.shape))}{flat}"]
        if piece.parts:
            yield [*title, *(_range(piece, rank) for rank in range(RANKS))], _drawing(piece)
        else:
            yield [*title, "whole on both ranks"], _drawing(piece)
    if found.scheme.unsliced:
        box = f'<rect width="{SIDE}" height="{SIDE}" fill="url(#both)" stroke="{INK}"/>'
        told = ("as stored: no slices,", "whole to both ranks,", "which keep a part")
        yield [", ".join(sorted(found.scheme.unsliced)), *told], box


def _range(piece: Piece, rank: int) -> str:
    ranges = ", ".join(f"{a}:{b}" for a, b in piece.parts[rank])
    return f"rank {rank}: [{ranges}, :]" if piece.shard_dim == 0 else f"rank {rank}: [:, {ranges}]"


def _drawing(piece: Piece) -> str:
    """A stored component, dim 0 downwards, with what each rank reads of it."""
    shape = piece.shape if len(piece.shape) == 2 else (1, *piece.shape)
    lines = piece.lines if len(piece.lines) == 2 else (1, *piece.lines)
    cells = [-(-size // step) for size, step in zip(shape, lines, strict=True)]
    single = piece.lines == piece.shape and math.prod(shape) > 1  # the logical weight: one surface
    height, width = (SIDE if single else min(SIDE, CELL * count) for count in cells)
    along, found = (height, width)[piece.shard_dim or 0], []
    if not piece.parts:
        found.append(f'<rect width="{width}" height="{height}" fill="url(#both)"/>')
    for rank, segments in enumerate(piece.parts):
        for segment in segments:
            start, stop = (edge * along / shape[piece.shard_dim or 0] for edge in segment)
            box = f'x="0" y="{_pixels(start)}" width="{width}" height="{_pixels(stop - start)}"'
            if piece.shard_dim == 1:
                box = f'x="{_pixels(start)}" y="0" width="{_pixels(stop - start)}" height="{height}"'
            found.append(f'<rect {box} fill="{COLOURS[rank]}"/>')
    path = ""
    for dim, side in enumerate((height, width)):
        for at in range(1, cells[dim] if cells[dim] <= MOST else 0):
            edge = _pixels(at * lines[dim] * side / shape[dim])
            path += f"M{edge} 0V{height}" if dim else f"M0 {edge}H{width}"
    if path:
        found.append(f'<path d="{path}" stroke="{INK}" stroke-width="0.4" stroke-opacity="0.6" fill="none"/>')
    for segments in piece.parts[1:]:
        edge = _pixels(segments[0][0] * along / shape[piece.shard_dim or 0])
        line = f"M{edge} -5V{height + 5}" if piece.shard_dim else f"M-5 {edge}H{width + 5}"
        found.append(f'<path d="{line}" stroke="#c0202c" stroke-width="2" fill="none"/>')
    found.append(f'<rect width="{width}" height="{height}" fill="none" stroke="{INK}"/>')
    return "".join(found)


def _pixels(value: float) -> str:
    return f"{round(value, 2):g}"


def _legend(y: int) -> list[str]:
    found, x = [], LEFT
    told = ((COLOURS[0], "rank 0"), (COLOURS[1], "rank 1"), ("url(#both)", "both ranks"))
    for fill, text in told:
        found.append(f'<rect x="{x}" y="{y - 10}" width="12" height="12" fill="{fill}" stroke="{INK}"/>')
        found.append(_text(x + 17, y, text, size=10.5))
        x += 34 + 7 * len(text)
    text = "red: the cut; thin lines: stored elements, where they are few; dim 0 of what is stored goes down"
    return [*found, _text(LEFT, y + 18, text, size=10.5, ink=FAINT)]


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
