"""A plan as one self-contained HTML page."""

from __future__ import annotations

import html
from collections.abc import Sequence

from distquant.planning import LoadPlan
from distquant.planning.summary import heads_of
from distquant.units import format_bytes

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .3rem .8rem; text-align: left; vertical-align: top }
th { border-bottom: 2px solid #888 } td { border-bottom: 1px solid #ddd } td.number { text-align: right }
.bar { display: inline-block; height: .8rem; vertical-align: middle } .quantized { background: #2a6f97 }
.unquantized { background: #a9d6e5 } .staging { background: #e9c46a } code { background: #f3f3f3; padding: 0 .3rem }
"""


def plan_html(plan: LoadPlan) -> str:
    """Returns the plan as a page: memory per rank as bars, rules, notes, and tensors with their partitions."""
    rules = [(r.pattern, r.asked, r.became, str(r.modules), r.reason) for r in plan.rules]
    tensors = [
        (
            t.name,
            " x ".join(map(str, t.shape)),
            t.dtype,
            t.scheme,
            "" if t.shard_dim is None else f"dim {t.shard_dim}: {t.partition}",
        )
        for t in plan.tensors
    ]
    partitions = [
        (key, str(partition.size), ", ".join(map(str, partition.lengths))) for key, partition in plan.partitions.items()
    ]
    notes = [*plan.notes, *(f"checked at load: {item}" for item in plan.check_at_load)]
    title = html.escape(f"{plan.architecture}, {plan.quantization_config.get('quant_method')}, {plan.mesh}")
    return "\n".join(
        [
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
            f"<style>{STYLE}</style></head><body><h1>{title}</h1>",
            f"<p>{html.escape(plan.model)}<br>plan <code>{plan.digest}</code></p>",
            "<h2>Memory per rank</h2>",
            _memory(plan),
            "<ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in notes) + "</ul>",
            "<h2>Rules</h2>",
            _table(("rule", "asked", "became", "modules", "why"), rules),
            "<h2>Partitions</h2>",
            _table(("partition", "size", "per rank"), partitions),
            "<h2>Tensors</h2>",
            _table(("name", "shape", "dtype", "scheme", "partition"), tensors),
            "</body></html>\n",
        ]
    )


def _memory(plan: LoadPlan) -> str:
    widest = max(row.peak for row in plan.memory)
    lines = []
    for row in plan.memory:
        parts = (("quantized", row.quantized), ("unquantized", row.unquantized), ("staging", row.staging))
        bars = "".join(
            f'<span class="bar {kind}" style="width:{24 * size / widest:.2f}rem" title="{kind} {format_bytes(size)}">'
            "</span>"
            for kind, size in parts
        )
        sizes = "".join(f'<td class="number">{format_bytes(size)}</td>' for _, size in (*parts, ("", row.peak)))
        lines.append(
            f"<tr><td>{row.rank}</td>{sizes}<td>{bars}</td><td>{html.escape(heads_of(plan, row.rank))}</td></tr>"
        )
    names = ("rank", "quantized", "unquantized", "staging", "at most", "", "heads")
    header = "".join(f"<th>{name}</th>" for name in names)
    return f"<table><tr>{header}</tr>{''.join(lines)}</table>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
