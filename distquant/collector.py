"""Python's garbage collector, at rest while much is made that stays."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collector() -> Iterator[None]:
    """Lets the collector rest.

    What is made of headers, plans and modules stays, and the collector would walk all of it (and all of torch) time and
    again: a third of the time of planning for 90,000 tensors.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
