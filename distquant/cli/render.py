"""Plans, reports, checkpoints and machines as text."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from distquant.checkpoint import Checkpoint
from distquant.config.vocabulary import columns
from distquant.errors import InputError
from distquant.tables import table
from distquant.units import format_bytes


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
