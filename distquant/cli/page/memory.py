"""Draws the memory of ranks against the limit: one bar for each group of equal ranks."""

from __future__ import annotations

from dataclasses import dataclass

from distquant.cli.page.folding import RankGroup, numbered
from distquant.cli.page.markup import Html, join, tag
from distquant.config.resolve import is_known, parse
from distquant.planning import LoadPlan
from distquant.planning.generation_memory import DeviceMemory
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


@dataclass(frozen=True)
class Needed:
    """Bytes that a rank takes: to load and to generate, and the parts that the larger of both consists of."""

    loading: int
    generating: int
    parts: tuple[tuple[str, str, int], ...]
    """Class, name and bytes of each part."""

    @property
    def most(self) -> int:
        return max(self.loading, self.generating)

    def fits(self, limit: Limit) -> bool:
        return self.loading <= limit.usable and self.generating <= limit.memory


def needed(plan: LoadPlan) -> list[Needed]:
    """Returns the needs of each rank. A plan that was read from JSON knows nothing of generation."""
    devices = plan.estimates.memory() if plan.estimates is not None else ()
    of_rank = {rank: device for device in devices for rank in device.ranks}
    return [_of(row, of_rank.get(row.rank)) for row in plan.memory]


def _of(row: RankMemory, device: DeviceMemory | None) -> Needed:
    weights = (
        ("quantized", "quantized weights", row.quantized),
        ("unquantized", "unquantized weights", row.unquantized),
    )
    if device is None:
        return Needed(row.peak, 0, (*weights, ("buffer", "load buffer", row.staging)))
    # The load buffer is given back before the first token: it counts as far as it takes more than generation does.
    beyond = max(0, device.loading - device.generating)
    name = "load buffer" if device.generating == device.weights else "load buffer, beyond generation"
    generation = (("cache", "KV cache", device.cache), ("activations", "activations", device.activations))
    return Needed(device.loading, device.generating, (*weights, *generation, ("buffer", name, beyond)))


def answer(plan: LoadPlan, limit: Limit | None) -> tuple[str, str, str]:
    """Returns the answer to "does it fit": a kind (`yes`, `no`, `unknown`), the answer, and its numbers."""
    ranks = needed(plan)
    sizes = [rank.most for rank in ranks]
    least, most = format_bytes(min(sizes)), format_bytes(max(sizes))
    between = most if least == most else f"{least} to {most}"
    needs = f"{'The rank' if plan.mesh.size == 1 else 'Each rank'} needs {between}"
    if plan.estimates is not None and plan.estimates.decoded:
        needs += f" (context {plan.estimates.context:,}, batch {plan.estimates.batch})"
    if limit is None:
        asked = "A device map has limits of its own." if plan.device_map else "Declare its memory with max_memory."
        return "unknown", "Memory to compare with is not known", f"{needs}. {asked}"
    short = [rank for rank in ranks if not rank.fits(limit)]
    available = f"{format_bytes(limit.usable)} of {format_bytes(limit.memory)} ({limit.source}) may be used"
    if short:
        lacking = max(max(rank.loading - limit.usable, rank.generating - limit.memory) for rank in short)
        fault = f"{needs}, and {available}: {len(short)} ranks lack up to {format_bytes(lacking)}."
        return "no", "It does not fit", fault
    return "yes", "It fits", f"{needs}; {available}."


def memory_bars(plan: LoadPlan, groups: tuple[RankGroup, ...], limit: Limit | None) -> Html:
    """Returns the bars of all groups, on one scale, and what their colours mean."""
    ranks = needed(plan)
    scale = max([rank.most for rank in ranks] + ([limit.memory] if limit else []))
    bars = [_bar(group, ranks[group.ranks[0]], limit, scale) for group in groups]
    more = bars[SHOWN_GROUPS:]
    rest = tag("details", tag("summary", f"{len(more)} more groups of ranks"), *more) if more else Html("")
    names = list(dict.fromkeys((kind, name) for rank in ranks for kind, name, size in rank.parts if size))
    if limit is not None:
        names.append(("free", "free"))
        if limit.usable < limit.memory:
            names.append(("reserved", "kept free while quantizing"))
    key = [
        tag("li", tag("svg", tag("rect", class_=kind, width=14, height=14), class_="swatch"), name)
        for kind, name in names
    ]
    return join([tag("ul", *key, class_="key"), *bars[:SHOWN_GROUPS], rest])


def _bar(group: RankGroup, rank: Needed, limit: Limit | None, scale: int) -> Html:
    parts, edge = [], 0.0
    pieces = list(rank.parts)
    if limit is not None:
        pieces.append(("free", "free", max(0, limit.usable - rank.most)))
        pieces.append(("reserved", "kept free", limit.memory - max(limit.usable, min(rank.most, limit.memory))))
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
    is_short = limit is not None and not rank.fits(limit)
    ranks = numbered("ranks", group.ranks)
    count = f"{len(group.ranks)} equal ranks" if len(group.ranks) > 1 else "1 rank"
    of = f" of {format_bytes(limit.usable)}" if limit else ""
    numbers = ", ".join(f"{name} {format_bytes(size)}" for _, name, size in pieces)
    head = tag(
        "p",
        tag("b", ranks),
        tag("span", count, class_="dim") if len(group.ranks) > 1 else "",
        tag("span", f"{format_bytes(rank.most)}{of}", class_="short n" if is_short else "n"),
        class_="line",
    )
    picture = tag("svg", *parts, width="100%", height=34, role="img", aria_label=f"{ranks}: {numbers}")
    sizes = (tag("span", f"{name} ", tag("b", format_bytes(size))) for _, name, size in pieces if size)
    return tag("div", head, picture, tag("p", *sizes, class_="sizes"), class_="bar")
