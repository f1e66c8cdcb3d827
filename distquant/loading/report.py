"""The report of a load: bytes that each rank read, sent and kept, and the time its stages were busy."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from distquant.loading.stream.stage_timer import STAGES
from distquant.planning.load_plan import LoadPlan

PINNED = "pinned"


@dataclass(kw_only=True)
class RankReport:
    """One rank's figures. Times in seconds (stages overlap, so they do not add up), sizes in bytes."""

    rank: int
    seconds: float = 0.0
    bytes_read: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    quantized_bytes: int = 0
    unquantized_bytes: int = 0
    staging_bytes: int = 0
    """Host memory that weights passed through."""
    direct_bytes: int = 0
    """Of the bytes read, those that were read past the page cache."""
    mapped_bytes: int = 0
    """Bytes of weights that are pages of the files, and were not read."""
    retries: int = 0
    """Reads that failed and were tried again."""
    peak_rss_bytes: int = 0
    peak_device_bytes: int = 0
    """The highest of the devices' peaks."""
    devices: list[dict[str, Any]] = field(default_factory=list)
    """For each accelerator that holds weights: `device`, its name, and `peak_bytes`, the most that tensors took there
    during the load; None where the backend does not count."""
    load_buffer: str = ""
    """`pinned`, or `not pinned` and the reason; empty where nothing is copied to a device."""
    kernel: str = ""
    """Kernels that quantized, and the reason for their choice."""
    forward: str = ""
    """Products that multiply the quantized weights."""
    limit: str = ""
    """Stage that limited the rank."""
    stages: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))


def load_notes(ranks: list[RankReport]) -> list[str]:
    """Returns what users should know of a load that went otherwise than it should, one line for each cause."""
    having: dict[str, list[int]] = {}
    for rank in ranks:
        if rank.load_buffer not in ("", PINNED):
            having.setdefault(rank.load_buffer, []).append(rank.rank)
    return [
        f"the load buffer of rank{'s' if len(of) > 1 else ''} {', '.join(map(str, of))} is {why}. The load is right, "
        "but each copy to the device was waited for"
        for why, of in having.items()
    ]


def make_report(plan: LoadPlan, runtime: str, ranks: list[RankReport], fingerprint: str | None) -> dict[str, Any]:
    """Returns the report as a JSON-ready dict."""
    return {
        "fingerprint": fingerprint,
        "plan_digest": plan.digest,
        "runtime": runtime,
        "mesh": str(plan.mesh),
        "quantization_config": plan.quantization_config,
        "world_size": plan.mesh.size,
        "seconds": max(rank.seconds for rank in ranks),
        "checkpoint_bytes": plan.checkpoint_bytes,
        "model_bytes": sum(rank.quantized_bytes + rank.unquantized_bytes for rank in ranks),
        "ranks": [dataclasses.asdict(rank) for rank in ranks],
    }


def report_text(report: dict[str, Any]) -> str:
    """Returns the JSON of a report, as `--report` writes it."""
    return json.dumps(report, indent=1) + "\n"
