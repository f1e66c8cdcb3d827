"""Lets one thread at a time change state that belongs to the whole process.

Building a model changes much of it for a while. transformers sets torch's default dtype and replaces the functions of
`torch.nn.init`, `warnings.catch_warnings` replaces the list of filters, and some imported modules patch others. Two
threads that do so at once see each other's values, and restore the wrong ones.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOCK = threading.RLock()


@contextmanager
def changing_process_state() -> Iterator[None]:
    """Waits until no other thread is within; a thread may enter again.

    Do nothing within that waits for another rank: ranks that are threads of one process would wait forever.
    """
    with _LOCK:
        yield
