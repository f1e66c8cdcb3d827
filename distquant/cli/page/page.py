"""Puts the page of a plan together: the answer first, then memory, layers, weights, and the tables."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Iterator
from importlib import resources

from distquant.cli.page import tables
from distquant.cli.page.answer import answer_section, method_name, notes_section, short_name
from distquant.cli.page.folding import fold_layers, fold_ranks, fold_tensors, numbered
from distquant.cli.page.markup import Html, tag
from distquant.cli.page.memory import limit_of, memory_bars
from distquant.cli.page.pictures import mesh_picture
from distquant.cli.page.weights import layers_section, weights_section
from distquant.planning import LoadPlan
from distquant.planning.read_strategy import REASONS


def plan_html(plan: LoadPlan) -> str:
    """Returns the plan as one page.

    The page needs no network and may not use it: its policy allows the two parts that are in it, its style and its
    script, and nothing else. So no text of a checkpoint can run, even if it were not escaped.
    """
    groups = fold_tensors(plan)
    ranks, stacks = fold_ranks(plan), fold_layers(groups)
    limit = limit_of(plan)
    style, script = _asset("page.css"), _asset("page.js")
    policy = f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'"
    title = f"{short_name(plan)}: {method_name(plan)}, {plan.mesh}"
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", style),
    ]
    layers = layers_section(stacks)
    path = tag("p", tag("code", plan.model)) if plan.model != short_name(plan) else ""
    body = [
        tag("a", "Skip to the answer", href="#answer", class_="skip"),
        tag("header", tag("h1", short_name(plan)), path),
        tag(
            "main",
            answer_section(plan, limit),
            notes_section(plan),
            _part("memory", "Memory of each rank", memory_bars(plan, ranks, limit)),
            _part("mesh", "Mesh", tag("div", mesh_picture(plan) or "", _mesh_text(plan), class_="beside")),
            _part("layers", "Layers", layers) if layers else "",
            _part(
                "weights",
                "Weights",
                tag("p", WEIGHTS_TEXT if plan.mesh.size > 1 else WHOLE_TEXT, class_="dim"),
                weights_section(plan, groups),
            ),
            _part("tables", "Tables", *tables.all_tables(plan, groups)),
        ),
        tag("footer", "distquant plan ", tag("code", plan.digest)),
        tag("script", script),
    ]
    return f"<!doctype html>\n{tag('html', tag('head', *head), tag('body', *body), lang='en')}\n"


SHOWN_NODES = 8
"""Nodes whose ranks are listed above the tables."""
WEIGHTS_TEXT = (
    "Each kind of weight once: rows (out) downwards, columns (in) to the right, in proportion. "
    "A colour is a position on tp, as in the mesh above."
)
WHOLE_TEXT = "Each kind of weight once: rows (out) downwards, columns (in) to the right, in proportion."


def _asset(name: str) -> Html:
    return Html(resources.files(__package__).joinpath(name).read_text(encoding="utf-8"))


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _part(identity: str, title: str, *contents: object) -> Html:
    return tag("section", tag("h2", title), *(part for part in contents if part), id=identity)


def _mesh_text(plan: LoadPlan) -> Html:
    """Returns the axes in words, the ranks of each node, and the ways in which tensors are read."""
    mesh = plan.mesh
    axes = {
        "dp": f"dp={mesh.dp}: replicas of the whole model",
        "ep": f"ep={mesh.ep}: experts are distributed, and everything else is replicated",
        "tp": f"tp={mesh.tp}: every layer is divided",
    }
    lines: list[str] = [text for axis, text in axes.items() if getattr(mesh, axis) > 1]
    if not lines:
        return tag("p", "One rank holds the whole model.")
    lines.append(_nodes_text(plan))
    return tag("ul", *(tag("li", line) for line in (*lines, *_reading(plan))))


def _nodes_text(plan: LoadPlan) -> str:
    """Returns the ranks of each node; the table of ranks has them too, so many nodes are counted."""
    members: dict[int, list[int]] = {}
    for rank, node in enumerate(plan.nodes):
        members.setdefault(node, []).append(rank)
    if len(members) <= SHOWN_NODES:
        return "; ".join(f"node {node}: {numbered('ranks', ranks)}" for node, ranks in members.items())
    counts = sorted({len(ranks) for ranks in members.values()})
    return f"{len(members)} nodes of {' to '.join(map(str, (counts[0], counts[-1])[: len(counts)]))} ranks each"


def _reading(plan: LoadPlan) -> Iterator[str]:
    for way, count in Counter(tensor.reading for tensor in plan.tensors).items():
        yield f"{count:,} tensors {REASONS[way]}"
