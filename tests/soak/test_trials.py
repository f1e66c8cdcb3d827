"""The harness tells each way to end from the others."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import trials
from trials import Outcome, attempt


def said(text: str, code: int) -> int:
    print(text, file=sys.stderr)
    return code


def grown() -> int:
    memory = bytearray(os.urandom(1)) * 3_000_000_000
    time.sleep(30)
    return len(memory) - len(memory)


ENDS: dict[Outcome, list[Callable[[], Any]]] = {
    Outcome.DONE: [lambda: 0, lambda: sys.exit()],
    Outcome.REFUSED: [
        lambda: said("status: planning\ndistquant: mesh: wrong. Mend it", 2),
        lambda: said("distquant: unequal", 1),
    ],
    Outcome.UNCLEAR: [
        lambda: 2,
        lambda: said("usage", 2),
        lambda: said("distquant: \x1b[2J", 2),
        lambda: said("distquant: x", 3),
    ],
    Outcome.TRACEBACK: [lambda: 1 // 0],
    Outcome.CRASH: [lambda: os.kill(os.getpid(), signal.SIGKILL)],
    Outcome.HANG: [lambda: time.sleep(60)],
    Outcome.MEMORY: [grown],
}


@pytest.mark.parametrize(("outcome", "number"), [(outcome, n) for outcome in ENDS for n in range(len(ENDS[outcome]))])
def test_an_end_is_named(outcome: Outcome, number: int) -> None:
    ended = attempt(ENDS[outcome][number], patience=2.0 if outcome is Outcome.HANG else 60.0)
    assert ended.outcome is outcome, ended


def test_work_without_end_is_a_hang_even_if_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "CPU_SECONDS", 0.2)

    def busy() -> int:
        until = time.process_time() + 0.5
        while time.process_time() < until:
            pass
        return 0

    assert attempt(busy).outcome is Outcome.HANG


def test_a_table_counts_what_was_tried() -> None:
    ended = attempt(lambda: 0)
    made = trials.table([trials.Trial("header", "a", ended), trials.Trial("header", "b", ended)])
    assert "| header | 2 | 2 | 0 |" in made
    assert "| all | 2 | 2 | 0 |" in made
