"""Draws the pictures of `plan --html` for the page `planning.md`: `assets/plan-*.png`.

    python docs/draw_page.py

It plans checkpoints of real shapes, which `benchmarks/shapes.py` writes as sparse files, and photographs the pages in a
headless Chromium (`apt-get install chromium`). Another version of Chromium or other fonts give other pixels, so no test
compares these pictures.
"""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import distquant as dq
from distquant.cli.page import plan_html

DOCS = Path(__file__).resolve().parent
SHAPES = DOCS.parent / "benchmarks" / "shapes.py"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, SCALE = 1240, 0.7
"""Pixels of the window's width, and of the picture for each of them: the page that shows it is narrower."""
LARGEST = 200_000
"""Bytes of a picture: it is part of the repository."""


@dataclass(frozen=True)
class Picture:
    """A shape of `benchmarks/shapes.py`, the options of its plan, and the height of the window in pixels."""

    shape: str
    options: dict[str, Any]
    height: int


PICTURES = (
    Picture("llama-70b", {"quantization_config": "nf4-dq", "mesh": "tp=8", "max_memory": "24GiB"}, 1500),
    Picture("deepseek-v3", {"mesh": "ep=8,tp=2", "max_memory": "80GiB"}, 1970),
)


def draw(browser: str, picture: Picture, folder: Path) -> None:
    """Writes one picture."""
    checkpoint, page = folder / picture.shape, folder / f"{picture.shape}.html"
    subprocess.run([sys.executable, str(SHAPES), picture.shape, str(checkpoint)], check=True)
    plan = dq.plan(checkpoint, **picture.options)
    # The folder is a temporary one, and its path would be another in each picture.
    page.write_text(plan_html(dataclasses.replace(plan, model=picture.shape)), "utf-8")
    target = DOCS / "assets" / f"plan-{picture.shape}.png"
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--force-device-scale-factor={SCALE}")
    window = f"--window-size={WIDTH},{picture.height}"
    command = [browser, *flags, f"--user-data-dir={folder / 'profile'}", window, f"--screenshot={target}"]
    subprocess.run([*command, page.as_uri()], check=True, capture_output=True, timeout=300)
    size = target.stat().st_size
    if size > LARGEST:
        sys.exit(f"{target} has {size:,} bytes, and {LARGEST:,} are the limit: make the window smaller")
    print(f"{target}: {size:,} bytes")


def main() -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit("no Chromium is installed: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        for picture in PICTURES:
            draw(browser, picture, Path(folder))


if __name__ == "__main__":
    main()
