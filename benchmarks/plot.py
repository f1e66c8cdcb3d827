"""Draws traces of loads and results of benchmarks. Needs matplotlib, which distquant itself does not.

python benchmarks/plot.py stages TRACE.json OUT.png    the work of every stage of every rank (`load --trace`)
python benchmarks/plot.py peers RESULTS.json OUT.png   seconds of distquant, its peers and floors (`load.py`)
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Span = tuple[float, float]
"""Start and end in seconds."""

COLOURS = {"read": "#4477aa", "copy": "#66ccee", "quantize": "#228833", "exchange": "#ccbb44", "place": "#aa3377"}
DISTQUANT, PEER, FLOOR = "#4477aa", "#bbbbbb", "#ccbb44"
INK, GRID = "#222222", "#dddddd"
STYLE = {
    "font.size": 11,
    "font.family": "DejaVu Sans",
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 150,
}
GROUPS = (("nf4-dq", "NF4, double quantization"), ("int8", "int8 (LLM.int8)"), ("none", "bf16, unquantized"))
COLD = "NF4, files not in memory"


class Unreadable(Exception):
    """Raised if a file does not fit the command."""


# -- stages ------------------------------------------------------------------------------------------------------------


def merged(block_shape: Sequence[Span], gap: float) -> list[Span]:
    """Returns the union of spans, in order; those closer than `gap` become one."""
    union: list[Span] = []
    for start, stop in sorted(block_shape):
        if union and start - union[-1][1] <= gap:
            union[-1] = (union[-1][0], max(union[-1][1], stop))
        else:
            union.append((start, stop))
    return union


def stage_rows(trace: Any) -> dict[tuple[int, str], list[Span]]:
    """Returns the spans of every active stage of every rank: ranks in order, stages in the order of work."""
    rows: dict[tuple[int, str], list[Span]] = {}
    try:
        events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
        for rank in sorted({int(event["pid"]) for event in events}):
            for stage in COLOURS:
                mine = [e for e in events if e["pid"] == rank and e["cat"] == stage]
                if mine:
                    rows[rank, stage] = [(e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6) for e in mine]
    except (KeyError, TypeError) as error:
        raise Unreadable("is not a trace of a load: write one with `distquant load ... --trace FILE`") from error
    if not rows:
        raise Unreadable("is a trace without any work of a load")
    return rows


def draw_stages(trace: Any, out: str) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    rows = stage_rows(trace)
    ranks = sorted({rank for rank, _ in rows})
    first = min(start for block_shape in rows.values() for start, _ in block_shape)
    last = max(stop for block_shape in rows.values() for _, stop in block_shape)
    least = (last - first) / 3000  # spans closer than a pixel are drawn as one
    height, places = 0.72, {}
    for key in rows:
        places[key] = len(places) + 0.6 * ranks.index(key[0])  # a gap between ranks
    figure, axes = plt.subplots(figsize=(11, 1.5 + 0.34 * (max(places.values()) + 1)), layout="constrained")
    for (rank, stage), block_shape in rows.items():
        row = places[rank, stage]
        bars = [(start, max(stop - start, least)) for start, stop in merged(block_shape, least)]
        axes.broken_barh(bars, (row - height / 2, height), color=COLOURS[stage], linewidth=0)
        busy = sum(stop - start for start, stop in merged(block_shape, 0)) / (last - first)
        axes.text(1.01, row, f"{busy:.0%}", transform=axes.get_yaxis_transform(), va="center", fontsize=10)
    axes.text(1.01, -0.9, "busy", transform=axes.get_yaxis_transform(), va="center", fontsize=10, color="#666666")
    axes.set_yticks(list(places.values()), [f"rank {rank}  {stage}" for rank, stage in rows])
    axes.set_ylim(max(places.values()) + 0.7, -1.3)
    axes.set_xlim(min(first, 0), last + (last - first) * 0.01)
    axes.set_xlabel("seconds since the ranks' common start")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    stages = [stage for stage in COLOURS if any(stage == name for _, name in rows)]
    handles = [Patch(color=COLOURS[stage], label=stage) for stage in stages]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=10)
    figure.savefig(out)


# -- peers -------------------------------------------------------------------------------------------------------------


def peer_groups(results: Any) -> list[tuple[str, list[dict[str, Any]]]]:
    """Groups contestants by the weights that they load; those that only vary an option of distquant are left out."""
    try:
        every = [c for c in results["contestants"] if not c["staging"] and not c["once"]]
        cold = [c for c in every if c["cold"]]
        groups = [(title, [c for c in every if c["quant"] == quant and not c["cold"]]) for quant, title in GROUPS]
        titled = [(title, members) for title, members in (*groups, (COLD, cold)) if members]
        for _, members in titled:
            members.sort(key=lambda c: (c["system"] in ("floor", "read"), -float(c["seconds"])))
    except (KeyError, TypeError, ValueError) as error:
        raise Unreadable("holds no results of benchmarks/load.py") from error
    if not titled:
        raise Unreadable("holds no contestant that can be compared")
    return titled


def draw_peers(results: Any, out: str) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    groups = peer_groups(results)
    counts = [len(members) for _, members in groups]
    figure, every = plt.subplots(
        len(groups),
        figsize=(10, 1.5 + 0.36 * sum(counts) + 0.62 * len(groups)),
        height_ratios=[count + 0.4 for count in counts],
        layout="constrained",
        squeeze=False,
    )
    figure.get_layout_engine().set(hspace=0.08)
    for axes, (title, members) in zip(every[:, 0], groups, strict=True):
        draw_group(axes, title, members)
    every[-1, 0].set_xlabel("seconds (median; whiskers: fastest and slowest run); each panel has its own scale")
    handles = [Patch(color=DISTQUANT, label="distquant"), Patch(color=PEER, label="peer"),
               Patch(color=FLOOR, label="floor: the same work with nothing in between")]  # fmt: skip
    heading = (
        f"Loading {results.get('model', '?')} ({results.get('bytes', 0) / 1e9:.2f} GB) on {results.get('cpu', '?')}"
    )
    figure.suptitle(heading, fontsize=13, fontweight="bold", x=0.01, ha="left")
    figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False, fontsize=10)
    figure.savefig(out)


def draw_group(axes: Any, title: str, members: list[dict[str, Any]]) -> None:
    """Draws one panel: a bar for each contestant, with its seconds and their ratio to distquant's first."""
    colours = {"distquant": DISTQUANT, "floor": FLOOR, "read": FLOOR}
    reference = min((c["seconds"] for c in members if c["system"] == "distquant"), default=None)
    widest = max(spread(c)[1] for c in members)
    for row, contestant in enumerate(members):
        seconds, (fastest, slowest) = contestant["seconds"], spread(contestant)
        axes.barh(row, seconds, height=0.68, color=colours.get(contestant["system"], PEER))
        if slowest > fastest:
            axes.plot([fastest, slowest], [row, row], color=INK, linewidth=1.2)
        label = f"{seconds:.2f} s"
        if reference and contestant["system"] == "transformers":
            times = seconds / reference
            label += f"  ({times:.{1 if times >= 1 else 2}f}x distquant's best)"
        axes.text(max(seconds, slowest) + widest * 0.012, row, label, va="center", fontsize=10)
    axes.set_yticks(range(len(members)), [c["name"] for c in members])
    axes.set_ylim(len(members) - 0.4, -0.6)
    axes.set_xlim(0, widest * 1.5)  # room for the longest label
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def spread(contestant: dict[str, Any]) -> Span:
    """Returns the seconds of the fastest and of the slowest run."""
    seconds = [max(rank["seconds"] for rank in ranks) for ranks in contestant["runs"]]
    return min(seconds), max(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws traces and results as PNG or SVG.")
    parser.add_argument("what", choices=("stages", "peers"))
    parser.add_argument("file", help="a trace of `distquant load --trace`, or results of benchmarks/load.py")
    parser.add_argument("out", help="picture to write")
    arguments = parser.parse_args()
    try:
        import matplotlib
    except ImportError:
        print("this needs matplotlib, which is not a dependency of distquant: pip install matplotlib", file=sys.stderr)
        sys.exit(2)
    if Path(arguments.out).suffix not in (".png", ".svg"):
        parser.error(f"{arguments.out!r} must end in .png or .svg")
    try:
        content = json.loads(Path(arguments.file).read_text())
    except (OSError, ValueError) as error:
        parser.error(f"{arguments.file} cannot be read as JSON: {error}")
    matplotlib.use("agg")
    matplotlib.rcParams.update(STYLE)
    try:
        {"stages": draw_stages, "peers": draw_peers}[arguments.what](content, arguments.out)
    except Unreadable as error:
        parser.error(f"{arguments.file} {error}")
    except OSError as error:
        parser.error(f"{arguments.out} cannot be written: {error}")


if __name__ == "__main__":
    main()
