"""Ranks that the command line starts on this machine: processes that meet at a store on loopback.

The launchers of torch listen on all interfaces, and keep the main thread until the ranks have ended. One machine needs
neither: the number of ranks is known, and the main thread, which owns the terminal, stays free to talk with them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress

from distquant.cli import signals
from distquant.errors import DistquantError, InputError, SilentRankError
from distquant.left_behind import guard_process

STARTED_HERE = "DISTQUANT_STARTED_HERE"
"""Environment variable of ranks that the command line has started: the folder in which they leave their errors."""

POLL = 0.05
"""Seconds between looks at the ranks."""

MERCY = 3.0
"""Seconds that a rank gets to end after SIGTERM."""

LOOK = 1.0
"""Seconds between looks for ranks that are stopped."""

LATER = 2.0
"""Seconds after which this process names a rank that is stopped, if no other rank has: all may be."""


class Handled(DistquantError):
    """A rank has already reported the error; `code` is the exit code."""

    def __init__(self, code: int):
        self.code = code
        super().__init__(f"exit code {code}")


class Ranks:
    """Ranks that run a command; `started` makes them and ends them."""

    def __init__(self, timeout: float):
        self._processes: list[subprocess.Popen[bytes]] = []
        self._timeout, self._looked = timeout, time.monotonic()
        self._stopped: dict[int, float] = {}
        """Seconds for which each rank has been stopped, as far as this process was awake to see it."""

    def add(self, process: subprocess.Popen[bytes]) -> None:
        """Takes the process of the next rank."""
        self._processes.append(process)
        guard_process(process.pid)

    def ended(self) -> bool:
        """Returns True if all ranks have ended well. Does not wait.

        Raises:
            Handled: a rank has failed, and has reported why.
            InputError: a rank was ended otherwise.
        """
        codes = [process.poll() for process in self._processes]
        for rank, code in enumerate(codes):
            if code:
                raise _failure(rank, code)
        self._look_for_stopped()
        return None not in codes

    def _look_for_stopped(self) -> None:
        """Raises the error of a rank that is stopped for longer than the others, which know more, wait for it."""
        now = time.monotonic()
        if now - self._looked < LOOK:
            return
        step, self._looked = min(now - self._looked, 2 * LOOK), now
        for rank, process in enumerate(self._processes):
            stopped = process.poll() is None and _is_stopped(process.pid)
            self._stopped[rank] = self._stopped.get(rank, 0.0) + step if stopped else 0.0
            if self._stopped[rank] > self._timeout + LATER:
                raise SilentRankError.of(rank, self._stopped[rank], "", process.pid)

    def wait(self) -> None:
        """Returns when all ranks have ended well; raises as `ended` does."""
        while not self.ended():
            time.sleep(POLL)

    def end(self) -> None:
        """Ends the ranks that still run."""
        for process in self._running():
            process.terminate()
            process.send_signal(signal.SIGCONT)  # one that is stopped would not end
        deadline = time.monotonic() + MERCY
        while self._running() and time.monotonic() < deadline:
            time.sleep(POLL)
        for process in self._running():
            process.kill()
            with suppress(subprocess.TimeoutExpired):  # the kernel may wait for a disk on its behalf
                process.wait(MERCY)

    def _running(self) -> list[subprocess.Popen[bytes]]:
        return [process for process in self._processes if process.poll() is None]


@contextmanager
def started(
    arguments: Iterable[str], size: int, environment: Mapping[str, str], timeout: float | None = None
) -> Iterator[Ranks]:
    """Starts ranks that run `distquant ARGUMENTS`; none is left afterwards, whatever ends this process meanwhile.

    Args:
        arguments: of the command line, the same for every rank.
        size: the number of ranks.
        environment: variables that they get beside this process's own.
        timeout: seconds for which a rank may be stopped; None: the default of a load.
    """
    from distquant.parallel.comm import DEFAULT_TIMEOUT
    from distquant.runtime import addresses
    from distquant.runtime.meeting import serve

    addresses.stay_on_this_machine()
    store = serve(addresses.LOOPBACK)
    command = [sys.executable, "-m", "distquant", *arguments]
    ranks = Ranks(DEFAULT_TIMEOUT if timeout is None else timeout)
    with signals.as_exits():
        try:
            for rank in range(size):
                own = _variables(rank, size, addresses.LOOPBACK, store.port)
                ranks.add(
                    subprocess.Popen(
                        command,
                        env={**os.environ, **environment, **own},
                        stdin=subprocess.DEVNULL,
                        start_new_session=True,  # Ctrl-C is for this process, which then decides about them
                    )
                )
            yield ranks
        finally:
            ranks.end()


def _is_stopped(process: int) -> bool:
    """Returns True if a process is stopped by a signal or a debugger; False where the system does not show it."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
    except OSError:
        return False


def _variables(rank: int, size: int, address: str, port: int) -> dict[str, str]:
    """Returns the variables by which torch joins ranks at a store that another process serves."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def _failure(rank: int, code: int) -> DistquantError:
    if code in (1, 2):
        return Handled(code)
    how, fix = f"ended with exit code {code}", "See its output above"
    if code < 0:
        how, fix = f"was killed by signal {-code}", "If memory ran out (signal 9), use more ranks"
    return InputError.one(f"rank {rank}", f"{how}, and the other ranks were stopped", fix)
