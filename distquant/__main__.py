"""`python -m distquant`. A signal that comes while the command line is imported finds nothing to end, and one line."""

import os
import signal
from types import FrameType

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, f"distquant: ended by {_NAMES[signal.Signals(number)]}\n".encode())
    os._exit(128 + number)


def run() -> int:
    """Runs the command line; returns its exit code."""
    early = "RANK" not in os.environ and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    before = {number: signal.signal(number, _end) for number in _NAMES} if early else {}
    from distquant.cli.main import main

    for number, handler in before.items():
        signal.signal(number, handler)
    return main()


if __name__ == "__main__":
    raise SystemExit(run())
