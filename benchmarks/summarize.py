"""Gathers the headline tables of `benchmarks/results/*.md` into `docs/benchmarks.md`.

    python benchmarks/summarize.py            # writes the page
    python benchmarks/summarize.py --check    # fails if the page is out of date

A page of results is named `WHAT_HARDWARE_DATE.md`. It has a line for the hardware before that for the versions, a line
`Command: ...`, and tables. The first tables are its headline.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks.md"

SECTIONS = {
    "load": "Loading a dense model",
    "experts": "Loading a mixture of experts",
    "methods": "Loading by method",
    "stream": "Streaming a large checkpoint",
    "plan": "Planning",
    "cpu-kernels": "CPU kernels",
    "gpu-kernels": "GPU kernels",
    "devices": "Loading over several devices, simulated",
}
"""Headings in order; pages of another kind come after them, under their own name."""

HEADLINES = {"load": 2}
"""Number of a page's tables that are its headline, if not one."""

HEAD = """# Benchmarks

The headline tables of every page in [benchmarks/results](../benchmarks/results), newest first. Each page has more:
ranges, memory, bytes read, versions, and how to read it. `python benchmarks/summarize.py` writes this file.

Figures hold for the machine that they were measured on. [Contributing](../CONTRIBUTING.md#benchmarks) says how to
measure.
"""


@dataclass(frozen=True)
class Result:
    """A page of results. `hardware` and `command` are quoted from the page."""

    path: Path
    kind: str
    subject: str
    machine: str
    date: str
    hardware: str
    command: str
    tables: tuple[str, ...]

    @property
    def link(self) -> str:
        return f"../{self.path.relative_to(ROOT).as_posix()}"


def read(path: Path) -> Result:
    """Parses a page; exits with a list of the parts that it lacks."""
    text = path.read_text(encoding="utf-8")
    name = re.fullmatch(r"(.+)_(.+)_(\d{4}-\d\d-\d\d)", path.stem)
    command = re.search(r"^Command\b[^:`]*: `([^`]+)`", text, re.M)
    tables = tuple(match.group().rstrip() for match in re.finditer(r"(?:^\|.*\n)+", text, re.M))
    required = {"a name WHAT_HARDWARE_DATE.md": name, "a line 'Command: `...`'": command, "a table": tables}
    missing = [subject for subject, there in required.items() if not there]
    if name is None or command is None or missing:
        sys.exit(f"{path.relative_to(ROOT)} lacks {', '.join(missing)}")
    subject, machine, date = name.groups()
    # The line before the versions names the machine; the load that it was under is a detail of the page.
    hardware = re.search(r"^(.+?)(?:; load average.*)?\.?\nPython \d", text, re.M)
    kinds = (known for known in SECTIONS if subject == known or subject.startswith(f"{known}-"))
    kind = max(kinds, key=len, default=subject)
    shown = tables[: HEADLINES.get(kind, 1)]
    described = hardware.group(1) if hardware else machine
    return Result(path, kind, subject, machine, date, described, command.group(1), shown)


def overview(results: list[Result]) -> str:
    lines = ["| measured | hardware | date |", "|---|---|---|"]
    lines += [f"| [{result.subject}]({result.link}) | {result.hardware} | {result.date} |" for result in results]
    return "\n".join(lines)


def section(result: Result) -> str:
    return "\n\n".join(
        [
            f"### {result.subject.removeprefix(f'{result.kind}-')} on {result.machine}, {result.date}",
            f"{result.hardware}. [All of the page]({result.link}).",
            f"```bash\n{result.command}\n```",
            *result.tables,
        ]
    )


def page(results: list[Result]) -> str:
    order = {kind: number for number, kind in enumerate(SECTIONS)}
    results = sorted(results, key=lambda result: (result.subject, result.machine))
    results.sort(key=lambda result: result.date, reverse=True)
    results.sort(key=lambda result: (order.get(result.kind, len(order)), result.kind))
    parts, kind = [HEAD.rstrip(), overview(results)], None
    for result in results:
        if result.kind != kind:
            kind = result.kind
            parts.append(f"## {SECTIONS.get(kind, kind)}")
        parts.append(section(result))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Gathers the headline tables of benchmarks/results into a page.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is out of date")
    options = parser.parse_args()
    text = page([read(path) for path in sorted(RESULTS.glob("*.md"))])
    if not options.check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        sys.exit(f"{PAGE.relative_to(ROOT)} is out of date: run `make format`, or python benchmarks/summarize.py")


if __name__ == "__main__":
    main()
