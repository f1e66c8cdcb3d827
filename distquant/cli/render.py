"""Plans, reports, checkpoints and machines as text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from distquant.checkpoint import Checkpoint
from distquant.config.vocabulary import columns
from distquant.errors import InputError
from distquant.planning import LoadPlan
from distquant.planning.read_strategy import REASONS
from distquant.runtime.answer import End
from distquant.runtime.query import Outcome
from distquant.units import format_bytes

SHOWN_RANKS = 16
"""Ranks that a table lists; of more, the first and last are shown."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns columns aligned by spaces; numbers to the right."""
    every = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in every) for i in range(len(header))]
    right = [all(row[i][:1].isdigit() for row in rows) if rows else False for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def plan_text(plan: LoadPlan) -> str:
    """Returns the plan as text: memory of each rank, reading, rules, device map and notes."""
    quantization = plan.quantization_config.get("quant_method", "none")
    stored = "as the checkpoint stores it" if plan.prequantized else f"from {plan.dtype}"
    ranks = "1 rank" if plan.mesh.size == 1 else f"{plan.mesh.size} ranks"
    parts = [
        f"{plan.architecture} from {plan.model}",
        f"quantization {quantization} {stored}, mesh {plan.mesh} ({ranks}), plan {plan.digest[:16]}",
        "",
        _memory_table(plan),
    ]
    if plan.mesh.size > 1:
        reading = Counter(tensor.reading for tensor in plan.tensors)
        parts += ["", *(f"{count:,} tensors {REASONS[way]}" for way, count in reading.items())]
    if plan.rules:
        rows = [(r.pattern, r.asked, r.became, str(r.modules), r.reason) for r in plan.rules]
        parts += ["", table(("rule", "asked", "became", "modules", "why"), rows)]
    if plan.device_map is not None:
        parts += ["", table(("module", "device"), [(k or "(everything)", v) for k, v in plan.device_map.items()])]
    notes = [f"note: {note}" for note in plan.notes]
    notes += [f"checked at load: {item}" for item in plan.check_at_load]
    return "\n".join([*parts, "", *notes] if notes else parts)


def _memory_table(plan: LoadPlan) -> str:
    rows: list[tuple[str, ...]] = [
        (
            f"{m.rank}",
            f"{m.parameters:,}",
            format_bytes(m.read),
            format_bytes(m.quantized),
            format_bytes(m.unquantized),
            format_bytes(m.staging),
            format_bytes(m.peak),
        )
        for m in plan.memory
    ]
    if len(rows) > SHOWN_RANKS:
        rows = [*rows[: SHOWN_RANKS // 2], ("...",) * 7, *rows[-SHOWN_RANKS // 2 :]]
    header = ("rank", "parameters", "to read", "quantized", "unquantized", "staging", "at most")
    heads = {m.rank: heads_of(plan, m.rank) for m in plan.memory[:SHOWN_RANKS]}
    lines = [f"rank {rank}: {text}" for rank, text in heads.items() if text]
    return "\n".join([table(header, rows), *(["", *lines] if lines else [])])


def heads_of(plan: LoadPlan, rank: int) -> str:
    """Returns the rank's attention heads in words, for each kind of attention."""
    tp = plan.mesh.coordinates(rank)["tp"]
    return "; ".join(heads.describe(tp) for heads in plan.heads.values())


def report_text(report: dict[str, Any]) -> str:
    """Returns a load's report as text."""
    rows = [
        (
            str(r["rank"]),
            f"{r['seconds']:.2f} s",
            format_bytes(r["bytes_read"]),
            format_bytes(r["quantized_bytes"]),
            format_bytes(r["unquantized_bytes"]),
            format_bytes(r["peak_rss_bytes"]),
            " ".join(f"{name} {seconds:.2f}" for name, seconds in r["stages"].items()),
        )
        for r in report["ranks"]
    ]
    header = ("rank", "loaded in", "read", "quantized", "unquantized", "peak memory", "busy (s)")
    choices = [
        f"{label} {'; '.join(values)}"
        for label, field in (("kernels", "kernel"), ("forward", "forward"))
        if (values := dict.fromkeys(r[field] for r in report["ranks"] if r[field]))
    ]
    summary = f"{report['runtime']}, mesh {report['mesh']}, fingerprint {report['fingerprint']}"
    limits = ", ".join(dict.fromkeys(r["limit"] for r in report["ranks"]))
    return "\n".join([table(header, rows), *choices, f"limited by {limits}", summary])


def answer_text(outcome: Outcome) -> str:
    """Returns the answer to a prompt, after a line that says how it was asked if a chat template was applied."""
    answer = outcome.answer or ""
    if not outcome.template:
        return answer
    limited = "; ended by --max-new-tokens" if outcome.end == End.LENGTH else ""
    return f"answer (the model's chat template was applied, --raw leaves it out{limited}):\n{answer}"


def inspect_text(checkpoint: Checkpoint) -> str:
    """Returns the contents of a checkpoint as text, by dtype and by file, and how it is quantized."""
    from distquant.config import detect

    config = checkpoint.config
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        sizes[info.dtype] += info.nbytes
        counts[info.dtype] += 1
    elements = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    quantization = detect(config)
    named = config.get("architectures")
    architectures = named if named and isinstance(named, list) else ["?"]
    lines = [
        f"{', '.join(map(str, architectures))} ({config.get('model_type', '?')}) in {checkpoint.path}",
        f"{len(checkpoint.tensors)} tensors, {elements:,} elements, {format_bytes(checkpoint.total_bytes)}, "
        f"{len(checkpoint.shards)} files",
        "",
        table(("dtype", "tensors", "bytes"), [(d, str(counts[d]), format_bytes(sizes[d])) for d in sorted(sizes)]),
        "",
        table(
            ("file", "tensors", "bytes", "header sha256"),
            [(s.name, str(len(s.tensors)), format_bytes(s.size), s.digest[:16]) for s in checkpoint.shards],
        ),
        "",
    ]
    if quantization is None:
        lines.append("not quantized")
    else:
        lines.append("quantized:")
        lines += [f"  {key} = {value!r}" for key, value in sorted(quantization.items())]
        lines += ["", _precision_text(quantization)]
    return "\n".join(lines)


def _precision_text(quantization: dict[str, Any]) -> str:
    """Returns a checkpoint's quantization in terms that all methods share: a row for each of its precisions."""
    from distquant.config import CONFIG_CLASSES, parse

    try:
        config = parse(quantization, CONFIG_CLASSES)
    except InputError as error:
        return f"not understood: {error}"
    header, rows = columns(config.vocabulary() if config else ())
    return table(header, rows) if rows else "unknown precisions"
