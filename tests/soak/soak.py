"""`make soak`: everything of this folder that tries distquant from outside, one after the other, for about an hour.

Each part prints what ended badly and a table; a part's own file says how to try one input again.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent

PARTS = {
    "hostile.py": ["--every", "3"],
    "huge_numbers.py": [],
    "endless_patterns.py": [],
    "stored_values.py": [],
    "faults.py": [],
    "fuzz.py": ["--seconds", "600"],
    "kills.py": ["--count", "60"],
}
"""Script -> its arguments."""


def main(folder: Path) -> int:
    """Runs all parts; writes what each prints to a file of the folder, and returns 1 if one found something."""
    folder.mkdir(parents=True, exist_ok=True)
    codes = {}
    for script, arguments in PARTS.items():
        begun, path = time.monotonic(), folder / f"{Path(script).stem}.txt"
        with open(path, "w") as out:
            command = [sys.executable, str(HERE / script), *arguments]
            codes[script] = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT).returncode
        seconds = time.monotonic() - begun
        print(f"== {script}: exit code {codes[script]} after {seconds:.0f} s ({path})", flush=True)
        lines = path.read_text(errors="replace").splitlines()
        print(*[line for line in lines if line.startswith("|")], sep="\n", flush=True)
    return int(any(codes.values()))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
