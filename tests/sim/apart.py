"""A process in which the simulated device is registered: it lives through the session, and serves a call at a time."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PATIENCE = 120.0
"""Seconds that a call may take. One that hangs writes the stacks of all its threads, and ends its process."""


def _serve(pipe: Connection, library: Path) -> None:
    # Nothing compiles for this device: bitsandbytes' operators would only be traced, which takes half a minute.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    import simulated
    import torch

    torch.set_num_threads(1)
    controls = simulated.register(library)
    while True:
        try:
            function, arguments = pipe.recv()
        except (EOFError, OSError):
            os._exit(0)  # streams that hang would keep the interpreter from ending
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        controls.set_cost(50e9, 6e9, 8e-6)
        controls.hold(False)
        controls.set_jitter(0, 0.0)
        controls.fail_registrations(False)
        for device in range(controls.device_count()):
            controls.run_out_of_memory(device, -1)
        controls.reset_counts()
        try:
            result = (True, function(*arguments))
        except BaseException:
            result = (False, traceback.format_exc())
        faulthandler.cancel_dump_traceback_later()
        pipe.send(result)


class Apart:
    """Calls functions there, and fails with what they raise."""

    def __init__(self, library: Path):
        self._library = library
        self._process: Any = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._library), daemon=True)
        self._process.start()
        theirs.close()

    def __call__(self, function: Any, *arguments: Any) -> Any:
        if self._process is None:
            self._start()
        try:
            self._pipe.send((function, arguments))
            good, result = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            code, self._process = self._process.exitcode, None
            raise AssertionError(f"the process with the simulated device ended with {code}: see stderr") from None
        assert good, result
        return result

    def close(self) -> None:
        if self._process is not None:
            self._pipe.close()
            self._process.kill()
            self._process.join()
