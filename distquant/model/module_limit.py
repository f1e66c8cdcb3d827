"""Ends the building of a model that has too many modules for its checkpoint, whatever field asks for them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ALLOWED = 200_000
"""Modules that any checkpoint may have: an old one with a module for each of 60 * 256 experts has 63,000."""


class TooManyModules(RuntimeError):
    """Raised within transformers, and caught where a model is built, as its own errors are."""


@contextmanager
def module_limit(tensors: int) -> Iterator[None]:
    """Raises `TooManyModules` as soon as this thread has made too many modules.

    Args:
        tensors: of the checkpoint; each may need a few modules.
    """
    from torch.nn.modules.module import register_module_module_registration_hook

    most, made, thread = ALLOWED + 10 * tensors, 0, threading.get_ident()

    def count(module: Any, name: str, submodule: Any) -> None:
        nonlocal made
        if threading.get_ident() != thread:  # hooks are those of the whole process
            return
        made += 1
        if made > most:
            raise TooManyModules(f"it has more than {most} modules, and the checkpoint {tensors} tensors")

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()
