"""Runs everything that only a GPU can tell, within a time limit, and prints one table.

Each step runs in a process of its own, so that one that crashes or hangs takes no other with it, and prints its rows as
it goes, so that those of a step that is cut off are kept. A step that cannot run here is a row that says why. Exit
code: 1 if anything is wrong or was cut off, else 0.

What each step prints besides goes to a file of `--out`, and the traces of the loads go there, too.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from first_light_load import SLOWER

HERE = Path(__file__).resolve().parent

LIMITS = {"machine": 60, "load": 120, "methods": 120, "ranks": 60, "kernels": 90, "tests": 120, "bandwidth": 60}
"""Steps in order, with the seconds that each may take. What tells most comes first."""

HEADER = ("step", "what", "result", "figures")


def run(name: str, seconds: float, arguments: list[str], log: Path) -> list[list[str]]:
    """Runs a step, and returns its rows; the last says so if it was cut off or failed as a whole."""
    command = [sys.executable, str(HERE / "first_light_steps.py"), name, *arguments]
    rows: list[list[str]] = []
    with open(log, "w") as out:
        # In a session of its own: the step's own processes end with it.
        step = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=out, text=True, start_new_session=True)
        late = threading.Timer(seconds, os.killpg, (step.pid, signal.SIGKILL))
        late.start()
        assert step.stdout is not None
        code = None
        try:
            for line in step.stdout:
                if line.startswith("ROW "):
                    rows.append([name, *json.loads(line[4:])])
                    print("|", " | ".join(rows[-1]), "|", flush=True)
                else:
                    out.write(line)
                    out.flush()
            cut_off = not late.is_alive()
            code = step.wait()
        finally:
            late.cancel()
            if code is None:
                os.killpg(step.pid, signal.SIGKILL)
    if code != 0:
        reason = f"cut off after {seconds:.0f} s" if cut_off else f"exit code {code}"
        tail = log.read_text(errors="replace").strip().splitlines()[-1:]
        rows.append([name, "the step", "FAILED", f"{reason}: {' '.join(tail)[:160]} ({log.name})"])
    return rows


def table(rows: list[list[str]]) -> str:
    """Returns the rows in Markdown."""
    cells = [[cell.replace("|", "/").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in (HEADER, ["---"] * len(HEADER), *cells))


def options(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The first minutes on a GPU.")
    parser.add_argument("--dry-run", action="store_true", help="on the simulated device, with small sizes")
    parser.add_argument("--out", type=Path, help="folder for logs and traces (default: $OUT, or a temporary one)")
    parser.add_argument("--seconds", type=float, default=480.0, help="for everything")
    parser.add_argument("--gigabytes", type=float, default=8.0, help="of the checkpoint that is written and loaded")
    parser.add_argument("--steps", nargs="+", choices=list(LIMITS), default=list(LIMITS), help="only these")
    parser.add_argument("--methods", nargs="*", default=[], help="only these, in the step of that name")
    return parser.parse_args(given)


def main(given: list[str]) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the step ends, too
    asked = options(given)
    begun = time.monotonic()
    out = asked.out or Path(os.environ.get("OUT") or tempfile.mkdtemp(prefix="first-light-"))
    out.mkdir(parents=True, exist_ok=True)
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory(prefix="first-light-") as scratch:
        arguments: list[Any] = ["--out", out, "--scratch", scratch, "--gigabytes", asked.gigabytes]
        arguments += [*(["--dry-run"] if asked.dry_run else []), "--methods", *asked.methods]
        for name in asked.steps:
            left = asked.seconds - (time.monotonic() - begun)
            if left < 5:
                rows.append([name, "the step", "LEFT OUT", f"the {asked.seconds:.0f} s were over"])
                continue
            at = time.monotonic()
            limit = LIMITS[name] * (SLOWER if asked.dry_run else 1)
            found = run(name, min(left, limit), list(map(str, arguments)), out / f"{name}.txt")
            rows += found
            print(f"-- {name}: {time.monotonic() - at:.0f} s", flush=True)
    kind = "on the simulated device: figures mean nothing" if asked.dry_run else "on a GPU"
    text = f"# First light, {kind}, {time.monotonic() - begun:.0f} s\n\n{table(rows)}\n"
    (out / "first-light.md").write_text(text)
    print(f"\n{text}\nlogs and traces: {out}")
    return int(any(row[2] in ("FAILED", "LEFT OUT") for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
