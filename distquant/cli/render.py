"""Plans, reports, checkpoints and machines as text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from distquant.checkpoint import Checkpoint
from distquant.cli.terminal import printable, table
from distquant.config import QuantizationConfig
from distquant.config.vocabulary import columns
from distquant.errors import InputError
from distquant.planning import LoadPlan
from distquant.planning.read_strategy import REASONS
from distquant.progress.snapshot import FEW, STAGE_WORDS, stage_word
from distquant.units import format_bytes

SHOWN_RANKS = 16
"""Ranks that a table lists; of more, the first and last are shown."""


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


def report_text(report: dict[str, Any], model: str | None = None, verbose: bool = False) -> str:
    """Returns a load's report as text, see `report_parts`."""
    return "\n".join(report_parts(report, model, verbose))


def report_parts(report: dict[str, Any], model: str | None = None, verbose: bool = False) -> list[str]:
    """Returns a load's report for people, in three lines: what and where, how fast, and the fingerprint.

    Args:
        report: of `make_report`.
        model: as the user named it.
        verbose: also return tables of ranks and their stages, kernels and modules.
    """
    ranks = report["ranks"]
    quantized, whole = sum(r["quantized_bytes"] for r in ranks), report["model_bytes"]
    largest = max(r["quantized_bytes"] + r["unquantized_bytes"] for r in ranks)
    weights = f"{format_bytes(whole)} of weights"
    if quantized:
        weights += f", {format_bytes(quantized)} of it quantized"
    where = f"{report['runtime']}, mesh {report['mesh']}"
    if len(ranks) > 1:
        where = f"at most {format_bytes(largest)} on each of {len(ranks)} ranks ({where})"
    read = sum(r["bytes_read"] for r in ranks)
    speed = f"read {format_bytes(read)}, {format_bytes(read / max(report['seconds'], 1e-3))}/s" if read else ""
    slowest = max(ranks, key=lambda r: r["seconds"])
    limit = f"limited by {stage_word(slowest['limit'])}" if slowest["limit"] else ""
    last = f"rank {slowest['rank']} was last" if len(ranks) > FEW else ""
    return [
        *([*_rank_tables(ranks), ""] if verbose else []),
        f"loaded {model or 'the model'} as {_method(report['quantization_config'])}: {weights}; {where}",
        "; ".join(filter(None, (f"took {report['seconds']:.2f} s", speed, limit, last))),
        f"fingerprint {report['fingerprint'] or 'none: transformers loaded it with its own quantizer'}",
    ]


def _method(config: dict[str, Any]) -> str:
    """Returns a quantization in a few words: the short name of its settings if they have one, else its method."""
    from distquant.config import parse
    from distquant.quantization import config_classes

    classes = config_classes()
    if config.get("quant_method") in (None, "none"):
        return "stored"
    try:
        own = parse(config, classes)
    except InputError:
        return str(config["quant_method"])
    assert own is not None
    for name, values in type(own).short_names.items():
        if _settings(type(own)(**values)) == _settings(own):
            return name
    return own.quant_method


def _settings(config: QuantizationConfig) -> dict[str, Any]:
    """Returns what differs from the defaults, without the modules that are left alone and the dtype of products."""
    differing = config.to_diff_dict(extras=True).items()
    return {key: value for key, value in differing if key != config.skip_field and not key.endswith("compute_dtype")}


def _rank_tables(ranks: Sequence[dict[str, Any]]) -> list[str]:
    """Returns figures of ranks and seconds of their stages; of many ranks, the first, the last and the slowest."""
    shown = list(ranks)
    if len(shown) > SHOWN_RANKS:
        ends = [*shown[: SHOWN_RANKS // 2], *shown[-SHOWN_RANKS // 2 :]]
        slowest = max(shown, key=lambda r: r["seconds"])
        shown = sorted([*ends, *([slowest] if slowest not in ends else [])], key=lambda r: r["rank"])
    header = ("rank", "loaded in", "read", "quantized", "unquantized", "load buffer", "peak memory")
    figures = [
        (
            str(r["rank"]),
            f"{r['seconds']:.2f} s",
            format_bytes(r["bytes_read"]),
            format_bytes(r["quantized_bytes"]),
            format_bytes(r["unquantized_bytes"]),
            format_bytes(r["staging_bytes"]),
            format_bytes(r["peak_rss_bytes"]),
        )
        for r in shown
    ]
    stages = tuple(STAGE_WORDS)
    seconds = [(str(r["rank"]), *(f"{r['stages'].get(stage, 0.0):.2f} s" for stage in stages)) for r in shown]
    choices = [
        f"{label} {'; '.join(values)}"
        for label, field in (("kernels", "kernel"), ("forward", "forward"))
        if (values := dict.fromkeys(r[field] for r in ranks if r[field]))
    ]
    return [
        table(header, figures),
        "",
        "time in each stage (stages overlap):",
        table(("rank", *STAGE_WORDS.values()), seconds),
        "",
        *choices,
    ]


def inspect_parts(checkpoint: Checkpoint) -> list[str]:
    """Returns the contents of a checkpoint as lines and tables: by dtype, by file, and how it is quantized."""
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
        printable(f"{', '.join(map(str, architectures))} ({config.get('model_type', '?')}) in {checkpoint.path}"),
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
        lines += [f"  {printable(key)} = {value!r}" for key, value in sorted(quantization.items())]
        lines += ["", _precision_text(quantization)]
    return lines


def _precision_text(quantization: dict[str, Any]) -> str:
    """Returns a checkpoint's quantization in terms that all methods share: a row for each of its precisions."""
    from distquant.config import CONFIG_CLASSES, parse

    try:
        config = parse(quantization, CONFIG_CLASSES)
    except InputError as error:
        return f"not understood: {error}"
    header, rows = columns(config.vocabulary() if config else ())
    return table(header, rows) if rows else "unknown precisions"
