"""Plans, reports, checkpoints and machines as text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from distquant.checkpoint import Checkpoint
from distquant.config import QuantizationConfig
from distquant.config.vocabulary import columns
from distquant.errors import InputError
from distquant.progress.snapshot import FEW, STAGE_WORDS, stage_word
from distquant.runtime.answer import End
from distquant.runtime.query import Outcome
from distquant.tables import printable, table
from distquant.units import format_bytes

SHOWN_RANKS = 16
"""Ranks that a table lists; of more, the first and last are shown."""


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


def answer_text(outcome: Outcome) -> str:
    """Returns the answer to a prompt, after a line that says how it was asked if a chat template was applied."""
    answer = outcome.answer or ""
    if not outcome.template:
        return answer
    limited = "; ended by --max-new-tokens" if outcome.end == End.LENGTH else ""
    return f"answer (the model's chat template was applied, --raw leaves it out{limited}):\n{answer}"


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
