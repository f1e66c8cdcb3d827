"""Draws the memory of ranks against the limit: one bar for each group of equal ranks."""

from __future__ import annotations

from dataclasses import dataclass

from distquant.cli.page.folding import RankGroup, numbered
from distquant.cli.page.markup import Html, join, tag
from distquant.config.resolve import is_known, parse
from distquant.planning import LoadPlan
from distquant.planning.load_plan import RankMemory
from distquant.quantization import config_classes
from distquant.quantization.registry import scheme_for
from distquant.units import format_bytes

SHOWN_GROUPS = 12
"""Bars that are shown at once; more are behind a line that opens."""


@dataclass(frozen=True)
class Limit:
    """Bytes that a rank has, and those that may be filled: bitsandbytes methods leave a tenth free."""

    memory: int
    usable: int
    source: str


def limit_of(plan: LoadPlan) -> Limit | None:
    """Returns the limit of every rank; None if it is not known, or if a device map has a limit for each device."""
    memory = plan.environment.memory
    if memory is None or plan.device_map is not None:
        return None
    usable = memory
    # A skipped method has no scheme that could ask for anything.
    if is_known(plan.quantization_config, config_classes()):
        config = parse(plan.quantization_config, config_classes())
        usable = scheme_for(config).adjust_max_memory(memory) if config is not None else memory
    return Limit(memory, usable, plan.environment.memory_source)


def answer(plan: LoadPlan, limit: Limit | None) -> tuple[str, str, str]:
    """Returns the answer to "does it fit": a kind (`yes`, `no`, `unknown`), the answer, and its numbers."""
    worst = max(plan.memory, key=lambda row: row.peak)
    least, most = format_bytes(min(row.peak for row in plan.memory)), format_bytes(worst.peak)
    between = most if least == most else f"{least} to {most}"
    needs = f"{'The rank' if plan.mesh.size == 1 else 'Each rank'} needs {between}"
    if limit is None:
        asked = "A device map has limits of its own." if plan.device_map else "Declare its memory with max_memory."
        return "unknown", "Memory to compare with is not known", f"{needs}. {asked}"
    short = sum(row.peak > limit.usable for row in plan.memory)
    available = f"{format_bytes(limit.usable)} of {format_bytes(limit.memory)} ({limit.source}) may be used"
    if short:
        lacking = format_bytes(worst.peak - limit.usable)
        return "no", "It does not fit", f"{needs}, and {available}: {short} ranks lack up to {lacking}."
    return "yes", "It fits", f"{needs}; {available}."


def parts_of(row: RankMemory) -> tuple[tuple[str, str, int], ...]:
    """Returns the class, name and bytes of each part of a rank's memory."""
    return (
        ("quantized", "quantized weights", row.quantized),
        ("unquantized", "unquantized weights", row.unquantized),
        ("buffer", "load buffer", row.staging),
    )


def memory_bars(groups: tuple[RankGroup, ...], limit: Limit | None) -> Html:
    """Returns the bars of all groups, on one scale, and what their colours mean."""
    scale = max([group.memory.peak for group in groups] + ([limit.memory] if limit else []))
    bars = [_bar(group, limit, scale) for group in groups]
    more = bars[SHOWN_GROUPS:]
    rest = tag("details", tag("summary", f"{len(more)} more groups of ranks"), *more) if more else Html("")
    names = [(kind, name) for kind, name, _ in parts_of(groups[0].memory)]
    if limit is not None:
        names.append(("free", "free"))
        if limit.usable < limit.memory:
            names.append(("reserved", "kept free while quantizing"))
    key = [
        tag("li", tag("svg", tag("rect", class_=kind, width=14, height=14), class_="swatch"), name)
        for kind, name in names
    ]
    return join([tag("ul", *key, class_="key"), *bars[:SHOWN_GROUPS], rest])


def _bar(group: RankGroup, limit: Limit | None, scale: int) -> Html:
    row, parts, edge = group.memory, [], 0.0
    pieces = list(parts_of(row))
    if limit is not None:
        pieces.append(("free", "free", max(0, limit.usable - row.peak)))
        pieces.append(("reserved", "kept free", limit.memory - max(limit.usable, min(row.peak, limit.memory))))
    for kind, name, size in pieces:
        width = 100 * size / scale if scale else 0
        if width:
            title = tag("title", f"{name}: {format_bytes(size)}")
            parts.append(tag("rect", title, class_=kind, x=f"{edge:.3f}%", width=f"{width:.3f}%", y=4, height=26))
            if width > 9:
                middle = f"{edge + width / 2:.3f}%"
                text = f"{format_bytes(size)} free" if kind == "free" else format_bytes(size)
                parts.append(tag("text", text, class_=f"m in-{kind}", x=middle, y=17.5))
        edge += width
    if limit is not None:
        mark = f"{100 * limit.usable / scale:.3f}%"
        parts.append(tag("line", class_="limit", x1=mark, x2=mark, y1=0, y2=34))
    is_short = limit is not None and row.peak > limit.usable
    ranks = numbered("ranks", group.ranks)
    count = f"{len(group.ranks)} equal ranks" if len(group.ranks) > 1 else "1 rank"
    of = f" of {format_bytes(limit.usable)}" if limit else ""
    numbers = ", ".join(f"{name} {format_bytes(size)}" for _, name, size in pieces)
    head = tag(
        "p",
        tag("b", ranks),
        tag("span", count, class_="dim") if len(group.ranks) > 1 else "",
        tag("span", f"{format_bytes(row.peak)}{of}", class_="short n" if is_short else "n"),
        class_="line",
    )
    picture = tag("svg", *parts, width="100%", height=34, role="img", aria_label=f"{ranks}: {numbers}")
    sizes = (tag("span", f"{name} ", tag("b", format_bytes(size))) for _, name, size in pieces if size)
    return tag("div", head, picture, tag("p", *sizes, class_="sizes"), class_="bar")
