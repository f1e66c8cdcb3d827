"""Draws the journey of one weight through a load, `architecture.svg`, for the page `architecture.md`.

    python docs/draw_journey.py            # writes the picture
    python docs/draw_journey.py --check    # fails if the picture is out of date

The numbers in the picture are those of the small model in `examples`: its plan, the headers of its files, the layout of
the method, and the fingerprint of a load.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

import distquant as dq
from distquant.checkpoint import TensorInfo, open_checkpoint
from distquant.config.resolve import parse
from distquant.planning import LoadPlan
from distquant.planning.load_plan import TensorPlan
from distquant.quantization.registry import config_classes, scheme_for
from distquant.quantization.scheme import Scheme
from distquant.sharding.layout import Component
from distquant.sharding.partition import Partition
from distquant.sharding.shard import Shard

DOCS = Path(__file__).resolve().parent
PICTURE = DOCS / "architecture.svg"
MODEL = DOCS.parent / "examples" / "models" / "kjv-tiny"
WEIGHT, QUANT, MESH = "model.layers.0.mlp.down_proj.weight", "nf4-dq", "tp=2"

COLUMNS, PITCH, ROW = 3, 300, 122
LEFT, TOP = 20, 78
"""Pixels: between steps, and around them."""
BOX_WIDTH, BOX_HEIGHT, TEXT = 84, 56, 100
"""Pixels: of a step's drawing, and from its left edge to the text beside it."""
COLOURS, INK, PAPER, FAINT = ("#9cc8ee", "#f6b870"), "#1b1f24", "#ffffff", "#5a626b"
STAGING, EDGE = "#d9dee4", "#c0202c"


@dataclass(frozen=True)
class Facts:
    """The weight of the journey, as the plan and the headers have it."""

    plan: LoadPlan
    tensor: TensorPlan
    partition: Partition
    info: TensorInfo
    file_bytes: int
    scheme: Scheme
    fingerprint: str

    @property
    def shape(self) -> tuple[int, int]:
        return self.tensor.shape[0], self.tensor.shape[1]

    @property
    def shard(self) -> Shard:
        """The shard of rank 0."""
        return Shard(WEIGHT, self.shape, self.tensor.dtype, self.tensor.shard_dim, self.partition, 0)

    @property
    def block(self) -> int:
        """Elements of the weight that share an absmax."""
        return next(component.flat for component in self.encoded if component.name == "absmax")

    @property
    def encoded(self) -> tuple[Component, ...]:
        return self.scheme.encoded_components(WEIGHT, self.shape, self.tensor.dtype)


def facts() -> Facts:
    """Plans the small model, and loads it on one rank for its fingerprint."""
    plan = dq.plan(MODEL, quantization_config=QUANT, mesh=MESH)
    tensor = next(tensor for tensor in plan.tensors if tensor.name == WEIGHT)
    assert tensor.partition is not None and tensor.reading == "scatter"
    info = open_checkpoint(MODEL).tensors[WEIGHT]
    config = parse(QUANT, config_classes())
    assert config is not None
    return Facts(
        plan=plan,
        tensor=tensor,
        partition=plan.partitions[tensor.partition],
        info=info,
        file_bytes=(MODEL / info.file).stat().st_size,
        scheme=scheme_for(config),
        fingerprint=dq.fingerprint(dq.load(MODEL, quantization_config=QUANT)),
    )


@dataclass(frozen=True)
class Step:
    """One step: its title, the file that does it, lines of text, and the drawing beside them."""

    title: str
    file: str
    lines: tuple[str, ...]
    drawing: str


def planning_steps(found: Facts) -> Iterator[Step]:
    """Yields the steps of the process that decides."""
    rows, columns = found.shape
    rule = next(rule for rule in found.plan.rules if rule.pattern.endswith("mlp.down_proj"))
    alignment = found.scheme.layout(WEIGHT, found.shape, found.tensor.dtype).alignments(found.shape, 1)[0]
    components = found.scheme.layout(WEIGHT, found.shape, found.tensor.dtype).components
    yield Step(
        "configuration",
        "config/resolve.py",
        ("the request, merged with", "config.json; a scheme", "comes from the registry"),
        _label(QUANT),
    )
    yield Step(
        "headers",
        "checkpoint/headers.py",
        (found.info.file, f"bytes {found.info.offset:,} to", f"{found.info.offset + found.info.nbytes:,}"),
        _file(found),
    )
    yield Step(
        "description",
        "model/build.py",
        (f"{found.tensor.dtype} [{rows}, {columns}]", "a model without weights;", f"its own plan: {rule.asked}"),
        _matrix(found, fills=(PAPER,)),
    )
    names = ", ".join(component.name or "codes" for component in components)
    yield Step(
        "layout",
        "sharding/layout.py",
        (f"{names}:", f"blocks of {found.block},", f"alignment {alignment}"),
        _matrix(found, (PAPER,), True),
    )
    lengths = " + ".join(map(str, found.partition.lengths))
    yield Step(
        "partition",
        "planning/tensor_parallel.py",
        (f"{columns} = {lengths}", "as gate_proj and up_proj,", "which feed these columns"),
        _matrix(found, COLOURS, True, True),
    )
    yield Step(
        "read assignment",
        "planning/read_assignment.py",
        ("each node reads a byte once;", f"{found.info.nbytes:,} bytes are few:", "one rank reads all rows"),
        _matrix(found, (STAGING,)),
    )


def loading_steps(found: Facts) -> Iterator[Step]:
    """Yields the steps of the ranks."""
    nbytes = {component.name: component.nbytes(found.shape) for component in found.encoded}
    local_rows, local_columns = found.shard.local_shape
    yield Step(
        "read",
        "loading/stream/reader.py",
        ("a thread fills a slot of the", "load buffer:", f"{found.info.nbytes:,} bytes"),
        _slots(written=True),
    )
    yield Step(
        "encode",
        "kernels/choice.py",
        (f"codes: {nbytes['']:,} bytes", f"absmax: {nbytes['absmax']:,} bytes", "whole rows, so exact"),
        _encoded(STAGING, STAGING),
    )
    yield Step(
        "hand over",
        "loading/stream/peers.py",
        ("the components are in shared", "memory; a message of 40 bytes", "says where"),
        _slots(written=False),
    )
    yield Step(
        "fill",
        "loading/shard_buffer.py",
        ("each rank copies its columns", "of the codes, and all absmax:", "the mean goes over all of them"),
        _encoded(*COLOURS),
    )
    yield Step(
        "load encoded",
        "quantization/methods/bitsandbytes_4bit.py",
        (
            f"Linear4bit({local_columns}, {local_rows}) on each",
            f"rank: {found.scheme.shard_nbytes(found.shard):,} bytes",
        ),
        _modules("", ""),
    )
    yield Step(
        "forward",
        "parallel/tensor_parallel.py",
        ("each rank multiplies its columns;", "a hook adds up the products", "over tp"),
        _modules("y₀", "y₁"),
    )
    digits = found.fingerprint
    yield Step(
        "fingerprint",
        "verification/fingerprint.py",
        ("sums over codes and scales", "add up to those of one rank:", digits),
        _label("Σ"),
    )


# -- drawings ----------------------------------------------------------------------------------------------------------


def _rect(x: float, y: float, width: float, height: float, fill: str, stroke: str = INK) -> str:
    box = f'x="{_pixels(x)}" y="{_pixels(y)}" width="{_pixels(width)}" height="{_pixels(height)}"'
    return f'<rect {box} fill="{fill}" stroke="{stroke}"/>'


def _label(text: str) -> str:
    return _rect(0, 0, BOX_WIDTH, BOX_HEIGHT, PAPER) + _text(
        BOX_WIDTH / 2, BOX_HEIGHT / 2 + 5, text, 13, anchor="middle"
    )


def _file(found: Facts) -> str:
    """Draws the file as a bar, with the weight's bytes at their place."""
    start, size = (BOX_WIDTH * count / found.file_bytes for count in (found.info.offset, found.info.nbytes))
    return _rect(0, 16, BOX_WIDTH, 24, PAPER) + _rect(start, 16, size, 24, STAGING)


def _matrix(found: Facts, fills: tuple[str, ...], blocks: bool = False, boundary: bool = False) -> str:
    """Draws the weight, `[out, in]`: a fill for each part of its columns, lines between blocks, a boundary."""
    columns = found.shape[1]
    ranges = [part[0] for part in found.partition.parts] if len(fills) > 1 else [(0, columns)]
    drawn = ""
    for fill, (start, stop) in zip(fills, ranges, strict=True):
        drawn += _rect(BOX_WIDTH * start / columns, 0, BOX_WIDTH * (stop - start) / columns, BOX_HEIGHT, fill, "none")
    if blocks:
        for column in range(found.block, columns, found.block):
            x = _pixels(BOX_WIDTH * column / columns)
            drawn += f'<path d="M{x} 0V{BOX_HEIGHT}" stroke="{INK}" stroke-width="0.5"/>'
    if boundary:
        x = _pixels(BOX_WIDTH * ranges[1][0] / columns)
        drawn += f'<path d="M{x} -5V{BOX_HEIGHT + 5}" stroke="{EDGE}" stroke-width="2"/>'
    return drawn + _rect(0, 0, BOX_WIDTH, BOX_HEIGHT, "none")


def _slots(written: bool) -> str:
    """Draws the slots of the load buffer: one is written from a file, or read by both ranks."""
    drawn = "".join(_rect(x, 0, 18, 22, STAGING if x == 22 else PAPER) for x in (0, 22, 44, 66))
    if written:
        drawn += f'<path d="M31 42V26" stroke="{INK}" marker-end="url(#arrow)"/>'
        return drawn + _rect(0, 42, BOX_WIDTH, 14, PAPER) + _rect(26, 42, 10, 14, STAGING)
    drawn += "".join(f'<path d="M31 24L{x} 44" stroke="{INK}" marker-end="url(#arrow)"/>' for x in (15, 60))
    return drawn + _text(0, BOX_HEIGHT, "rank 0", 10) + _text(48, BOX_HEIGHT, "rank 1", 10)


def _encoded(left: str, right: str) -> str:
    """Draws codes in two halves, and the absmax of all columns beside each if the halves are those of two ranks."""
    apart = 0 if left == right else 14
    width = (BOX_WIDTH - 2 * 10 - 14) / 2
    absmax = STAGING if left == right else "url(#both)"
    drawn = _rect(0, 0, width, BOX_HEIGHT, left)
    if apart:
        drawn += _rect(width, 0, 10, BOX_HEIGHT, absmax)
        return (
            drawn
            + _rect(width + 10 + apart, 0, width, BOX_HEIGHT, right)
            + _rect(2 * width + 10 + apart, 0, 10, BOX_HEIGHT, absmax)
        )
    return _rect(0, 0, 2 * width, BOX_HEIGHT, left) + _rect(2 * width + 8, 0, 10, BOX_HEIGHT, absmax)


def _modules(*outputs: str) -> str:
    """Draws a module on each rank; with outputs, their sum."""
    drawn = _rect(0, 0, 36, 30, COLOURS[0]) + _rect(48, 0, 36, 30, COLOURS[1])
    if not any(outputs):
        return drawn + _text(18, 44, "rank 0", 10, anchor="middle") + _text(66, 44, "rank 1", 10, anchor="middle")
    first, second = outputs
    drawn += _text(18, 19, first, 12, anchor="middle") + _text(66, 19, second, 12, anchor="middle")
    drawn += f'<path d="M18 30L36 44M66 30L48 44" stroke="{INK}"/>'
    return drawn + _text(42, 54, f"{first} + {second}", 12, anchor="middle")


def _pixels(value: float) -> str:
    return f"{round(value, 2):g}"


def _text(
    x: float, y: float, text: str, size: float = 11, bold: bool = False, ink: str = INK, anchor: str = "start"
) -> str:
    style = ' font-weight="bold"' if bold else ""
    style += f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{_pixels(x)}" y="{_pixels(y)}" font-size="{size:g}"{style} fill="{ink}">{escape(text)}</text>'


# -- the page ----------------------------------------------------------------------------------------------------------


def band(title: str, steps: list[Step], first: int, y: int) -> tuple[list[str], int]:
    """Returns the elements of a titled band of steps that starts at `y`, and where it ends."""
    rows = math.ceil(len(steps) / COLUMNS)
    height = 34 + rows * ROW
    width = LEFT + COLUMNS * PITCH - 20
    elements = [f'<rect x="10" y="{y}" width="{width}" height="{height}" rx="6" fill="none" stroke="#c3cad2"/>']
    elements.append(_text(LEFT + 4, y + 22, title, 12, bold=True, ink=FAINT))
    for number, step in enumerate(steps):
        x, top = LEFT + 4 + number % COLUMNS * PITCH, y + 50 + number // COLUMNS * ROW
        elements.append(_text(x, top, f"{first + number}  {step.title}", 13, bold=True))
        elements.append(f'<g transform="translate({x} {top + 14})">{step.drawing}</g>')
        lines = list(step.lines)
        elements += [_text(x + TEXT, top + 26 + 15 * at, line) for at, line in enumerate(lines)]
        elements.append(_text(x, top + 90, step.file, 10.5, ink=FAINT))
    return elements, y + height


def picture(found: Facts) -> str:
    """Returns the SVG."""
    planning, loading = list(planning_steps(found)), list(loading_steps(found))
    elements = [_text(LEFT, 28, f"The journey of {WEIGHT}", 16, bold=True)]
    elements.append(
        _text(LEFT, 48, f"{MODEL.name}, {QUANT}, {MESH}: read on one rank, quantized once, kept on two", 12, ink=FAINT)
    )
    drawn, y = band("one process decides, from configurations and headers", planning, 1, TOP - 14)
    elements += drawn
    elements.append(f'<path d="M{PITCH * COLUMNS // 2} {y + 2}V{y + 16}" stroke="{INK}" marker-end="url(#arrow)"/>')
    elements.append(_text(PITCH * COLUMNS // 2 + 12, y + 15, "LoadPlan: frozen, the same on every rank", 11, ink=FAINT))
    drawn, y = band("every rank executes", loading, len(planning) + 1, y + 24)
    elements += drawn
    width, height = LEFT + COLUMNS * PITCH + 10, y + 44
    elements.append(_legend(y + 26))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="Helvetica, Arial, DejaVu Sans, sans-serif">\n'
        f"<title>The journey of {escape(WEIGHT)}</title>\n<defs>"
        '<pattern id="both" width="8" height="8" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        f'<rect width="8" height="8" fill="{COLOURS[0]}"/><rect width="4" height="8" fill="{COLOURS[1]}"/></pattern>'
        '<marker id="arrow" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{INK}"/></marker></defs>\n'
        f'<rect width="{width}" height="{height}" rx="8" fill="{PAPER}"/>\n' + "\n".join(elements) + "\n</svg>\n"
    )


def _legend(y: int) -> str:
    entries = (
        (COLOURS[0], "rank 0"),
        (COLOURS[1], "rank 1"),
        ("url(#both)", "replicated on both"),
        (STAGING, "on its way"),
    )
    drawn, x = "", LEFT
    for fill, text in entries:
        drawn += _rect(x, y - 10, 12, 12, fill) + _text(x + 18, y, text)
        x += 44 + 7 * len(text)
    return drawn + _text(x, y, "red: the boundary between ranks", ink=FAINT)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws the journey of one weight.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the picture is out of date")
    options = parser.parse_args()
    drawn = picture(facts())
    if not options.check:
        PICTURE.write_text(drawn, encoding="utf-8")
    elif not PICTURE.exists() or PICTURE.read_text(encoding="utf-8") != drawn:
        sys.exit(f"{PICTURE.name} is out of date: run python docs/draw_journey.py")


if __name__ == "__main__":
    main()
