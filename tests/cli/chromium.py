"""Opens pages in a headless Chromium through its command line."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NO_BROWSER = "no Chromium is installed: apt-get install chromium"

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-extensions")
NO_NETWORK = ("--host-resolver-rules=MAP * ~NOTFOUND", "--proxy-server=127.0.0.1:9")

POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')


def browse(page: Path, *options: str) -> str:
    """Opens a page, and returns what the browser prints."""
    assert BROWSER is not None
    profile = page.parent / f"profile-{page.stem}"
    command = [BROWSER, *FLAGS, *NO_NETWORK, f"--user-data-dir={profile}", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def dom(page: Path) -> str:
    """Returns the page as it is after its scripts ran."""
    return browse(page, "--virtual-time-budget=2000", "--dump-dom")


def drive(page: Path, script: str) -> str:
    """Runs a test's script in a copy of a page, and returns what it gives to `answer(text)`.

    The page's own policy lets no other script run, so the copy goes without it.
    """
    text = page.read_text(encoding="utf-8")
    assert POLICY.search(text)
    helper = 'const answer = (text) => document.body.setAttribute("data-answer", text);'
    copy = page.with_name(f"{page.stem}-driven.html")
    copy.write_text(POLICY.sub("", text).replace("</body>", f"<script>{helper}{script}</script></body>"), "utf-8")
    found = re.search(r'data-answer="([^"]*)"', dom(copy))
    assert found, "the script gave no answer"
    return found.group(1)
