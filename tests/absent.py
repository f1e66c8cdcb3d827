"""Runs an interpreter in which packages are really absent: a folder of links to all others takes their place."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def run_without(packages: tuple[str, ...], folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """`python -c code` with neither the modules nor the metadata of these packages."""
    folder.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if entry.name not in packages and not entry.name.startswith(tuple(f"{package}-" for package in packages)):
            (folder / entry.name).symlink_to(entry)
    command = [sys.executable, "-S", "-c", code]  # -S: site-packages itself is not seen
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{REPOSITORY}"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
