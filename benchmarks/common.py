"""Shared code of the benchmarks: a description of this machine, fresh processes, tables, and pages of results."""

from __future__ import annotations

import datetime
import importlib.metadata
import multiprocessing
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SMALL = ROOT / "examples" / "models" / "kjv-tiny"
TIMEOUT = 1800
"""Seconds until a measurement is abandoned."""


def fresh(function: Callable[..., Any], *arguments: Any) -> Any:
    """Runs a function of a benchmark in its own process and returns its result; a failure ends the benchmark."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, function, *arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        answer = ours.recv() if ours.poll(TIMEOUT) else f"no answer within {TIMEOUT} s"
    except EOFError:
        answer = "the process died"
    process.join(0 if isinstance(answer, str) else 30)
    process.kill()
    if isinstance(answer, str):
        sys.exit(f"{function.__name__}{arguments}: {answer}")
    return answer


def _answer(pipe: Any, function: Callable[..., Any], *arguments: Any) -> None:
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        pipe.send(function(*arguments))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


def memory(key: str) -> int:
    """Reads a field of this process's `/proc` status in bytes: `VmRSS` is resident now, `VmHWM` the peak."""
    line = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert line is not None
    return int(line.group(1)) * 1024


def table(header: list[str], rows: list[list[str]]) -> str:
    """Formats a table in Markdown; the first column is text, the others are numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine(load: float, packages: tuple[str, ...]) -> str:
    """Describes hardware, versions and commit; `load` is the load average before the benchmark."""
    with open("/proc/meminfo") as file:
        size = int(file.readline().split()[1]) * 1024
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return (
        f"{cpu()}, {os.cpu_count()} cores, {size / 1e9:.0f} GB, no GPU used; load average before: {load:.2f}.\n"
        f"Python {platform.python_version()}, {versions} (commit {revision.stdout.strip() or 'unknown'})."
    )


def cpu() -> str:
    names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    return names[0].strip() if names else platform.machine()


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def write(text: str, subject: str, out: str | None) -> None:
    """Prints a page of results and writes it to `out`, or to `results/WHAT_HARDWARE_DATE.md`."""
    name = f"{subject}_{slug(cpu())}-{os.cpu_count()}c_{datetime.date.today().isoformat()}.md"
    target = Path(out) if out else ROOT / "benchmarks" / "results" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    print(f"\n{text}\nwritten to {target}")
