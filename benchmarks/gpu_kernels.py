"""Bandwidth of the Triton kernels on a GPU, beside a copy on the same device and bitsandbytes' CUDA kernel.

    python benchmarks/gpu_kernels.py [--rows 8192] [--columns 8192] [--runs 30] [--out FILE]

Each contestant quantizes the same bfloat16 weight into existing outputs (bitsandbytes makes its own). They take turns
(A B C A B C ...), and the L2 cache is overwritten before each measurement. Times are those of CUDA events around one
call, and the table has medians. Bandwidth counts each byte of the weight as read once and each byte of codes and
statistics as written once, whatever a kernel really moves. Before anything is timed, results are compared with the
reference's. Without a GPU it exits with 2.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
COPY = "copy on the device"
FLUSH = 512 << 20
"""Bytes written before each measurement, more than any L2 cache has."""
PACKAGES = ("distquant", "torch", "triton", "bitsandbytes")


@dataclass(frozen=True)
class Contestant:
    """One row of the table: a call without arguments, and the least bytes that it must read and write."""

    name: str
    call: Callable[[], Any]
    nbytes: int


def size(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def contestants(weight: Tensor) -> list[Contestant]:
    """Returns all contestants after a first call each: compiled, and equal to the reference."""
    from distquant.kernels import gpu, reference

    contestants = []

    def add(name: str, function: str, *arguments: Any) -> None:
        results = getattr(gpu, function)(weight, *arguments)
        for ours, truth in zip(results, getattr(reference, function)(weight.cpu(), *arguments), strict=True):
            if ours is not None and not torch.equal(ours.cpu().view(torch.uint8), truth.view(torch.uint8)):
                sys.exit(f"{name}: the result is not the reference's")
        keys = ("codes", "absmax") if "4bit" in function or "int8" in function else ("codes", "scale", "zero")
        outputs = {key: result for key, result in zip(keys, results, strict=False) if result is not None}
        call = lambda: getattr(gpu, function)(weight, *arguments, **outputs)  # noqa: E731
        contestants.append(Contestant(name, call, size(weight, *results)))

    target = torch.empty_like(weight)
    contestants.append(Contestant(COPY, lambda: target.copy_(weight), 2 * size(weight)))
    add("nf4, blocks of 64", "quantize_4bit", 64, "nf4")
    add("fp4, blocks of 64", "quantize_4bit", 64, "fp4")
    add("fp8, 128 x 128", "quantize_fp8", (128, 128))
    add("fp8, rows", "quantize_fp8", (1, None))
    add("fp8, tensor", "quantize_fp8", (None, None))
    add("int8 rows", "quantize_int8_rows")
    add("mxfp4", "quantize_mxfp4")
    add("int4, groups of 128", "quantize_groups", 128, 4, True)
    if importlib.util.find_spec("bitsandbytes") is not None:
        from bitsandbytes import functional

        for kind in ("nf4", "fp4"):
            call = lambda kind=kind: functional.quantize_4bit(weight, blocksize=64, quant_type=kind)  # noqa: E731
            codes, state = call()
            name = f"bitsandbytes {kind}, blocks of 64"
            contestants.append(Contestant(name, call, size(weight, codes, state.absmax)))
    return contestants


def measure(wanted: list[Contestant], runs: int) -> dict[str, list[float]]:
    """Measures the seconds of each run of each contestant, in turns."""
    flush = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")
    seconds: dict[str, list[float]] = {contestant.name: [] for contestant in wanted}
    for _ in range(runs):
        for contestant in wanted:
            flush.zero_()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            contestant.call()
            stop.record()
            stop.synchronize()
            seconds[contestant.name].append(start.elapsed_time(stop) / 1e3)
    return seconds


def table(wanted: list[Contestant], seconds: dict[str, list[float]]) -> str:
    rates = {c.name: c.nbytes / statistics.median(seconds[c.name]) / 1e9 for c in wanted}
    lines = ["| what | median us | range us | GB/s | of the copy | of bitsandbytes |", "| --- |" + " ---: |" * 5]
    for contestant in wanted:
        times = seconds[contestant.name]
        peer = rates.get(f"bitsandbytes {contestant.name}")
        cells = [
            contestant.name,
            f"{statistics.median(times) * 1e6:.1f}",
            f"{min(times) * 1e6:.1f} - {max(times) * 1e6:.1f}",
            f"{rates[contestant.name]:.0f}",
            f"{rates[contestant.name] / rates[COPY]:.2f}",
            f"{rates[contestant.name] / peer:.2f}" if peer else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machine() -> str:
    installed = {name for name in PACKAGES if importlib.util.find_spec(name) is not None}
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES if name in installed)
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    properties = torch.cuda.get_device_properties(0)
    return (
        f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, {properties.multi_processor_count} "
        f"multiprocessors.\nPython {platform.python_version()}, {versions}, CUDA {torch.version.cuda} "
        f"(commit {revision.stdout.strip() or 'unknown'})."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Bandwidth of the Triton kernels on a GPU.")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=8192)
    parser.add_argument("--runs", type=int, default=30, help="measurements of each contestant")
    parser.add_argument("--out", help="file to write; default: benchmarks/results/gpu-kernels_HARDWARE_DATE.md")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: there is nothing to measure here", file=sys.stderr)
        sys.exit(2)
    if min(arguments.rows, arguments.columns, arguments.runs) < 1 or arguments.columns % 2:
        parser.error("--rows, --runs must be 1 or more, --columns an even number")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(arguments.rows, arguments.columns, generator=generator).mul_(0.02).bfloat16().cuda()
    wanted = contestants(weight)
    measure(wanted, 3)
    seconds = measure(wanted, arguments.runs)
    today = datetime.date.today().isoformat()
    options = f"--rows {arguments.rows} --columns {arguments.columns} --runs {arguments.runs}"
    text = "\n\n".join(
        [
            f"# GPU kernels, {today}",
            machine(),
            f"bfloat16 [{arguments.rows}, {arguments.columns}], {size(weight) / 1e6:.0f} MB.\n"
            f"Command: `python benchmarks/gpu_kernels.py {options}`; {arguments.runs} of each, in turns.",
            table(wanted, seconds),
            "Medians. GB/s: bytes of the weight, codes and statistics by the time of one call, each counted once; the\n"
            "cache overwritten before each call. Every result of ours was first found equal to the reference's, bit "
            "for bit.",
        ]
    )
    hardware = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")
    named = ROOT / "benchmarks" / "results" / f"gpu-kernels_{hardware}_{today}.md"
    target = Path(arguments.out) if arguments.out else named
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text + "\n")
    print(f"{text}\n\nwritten to {target}")


if __name__ == "__main__":
    main()
