"""Ctrl-C and SIGTERM end a command with one line and a code of their own, whatever it is doing."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest


def ignore_nothing() -> None:
    """The tests' own processes may ignore Ctrl-C, and what they start would, too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def ended(number: signal.Signals, moment: float, *command: str) -> tuple[int, list[str]]:
    """Exit code, and lines on standard error that are no status, of a command that gets a signal so many seconds on."""
    arguments = [sys.executable, "-m", "distquant", *command]
    with subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=ignore_nothing
    ) as run:
        time.sleep(moment)
        run.send_signal(number)
        _, err = run.communicate()
    return run.returncode, [line for line in err.splitlines() if not line.startswith(("status: ", "loading: "))]


LINES = {signal.SIGINT: "distquant: ended by Ctrl-C", signal.SIGTERM: "distquant: ended by SIGTERM"}


@pytest.mark.parametrize("number", LINES, ids=str)
@pytest.mark.parametrize("moment", [0.2, 1.0])
def test_a_signal_while_libraries_are_imported(kjv_tiny, number, moment):
    assert ended(number, moment, "plan", kjv_tiny) == (128 + number, [LINES[number]])


@pytest.mark.wide
@pytest.mark.parametrize("number", LINES, ids=str)
@pytest.mark.parametrize("moment", [1.5, 3.0])
@pytest.mark.parametrize("runtime", ["local", "torchrun", "ray"])
def test_a_signal_at_work(kjv_tiny, number, moment, runtime):
    mesh = ["--mesh", "tp=2"] * (runtime != "local")
    answer = ["--prompt", "In the beginning", "--max-new-tokens", "900"]
    assert ended(number, moment, "load", kjv_tiny, "--runtime", runtime, *mesh, *answer) == (
        128 + number,
        [LINES[number]],
    )


def test_python_does_not_end_by_the_signal_itself():
    """It would, after an interrupt inside of `exec`, although the exception was caught."""
    code = """
from distquant.cli import signals
try:
    exec("raise KeyboardInterrupt")
except KeyboardInterrupt as error:
    raise SystemExit(signals.code_of(error))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "distquant: ended by Ctrl-C\n")
