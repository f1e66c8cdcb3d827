"""The record of this process's present work, in a few words: others that wait for it name it in their errors.

One text for the process: who waits needs a hint, and threads that load at the same time may overwrite each other's.
"""

from __future__ import annotations

_current = "starting"


def enter(text: str) -> str:
    """Records what is being done from now on, such as "reading model.safetensors"; returns what was before."""
    global _current
    before, _current = _current, text
    return before


def current() -> str:
    """Returns what was recorded last."""
    return _current
