"""A few kills and stops of real processes; `python tests/soak/kills.py` makes sixty."""

from __future__ import annotations

import signal

import pytest
from kills import kill, undisturbed

KILLS = [
    ("1", signal.SIGSTOP, 0.6),
    ("launcher", signal.SIGKILL, 0.8),
    ("launcher", signal.SIGINT, 0.2),
    ("launcher", signal.SIGTERM, 0.7),
]


@pytest.mark.wide
def test_whatever_is_killed_is_named_and_leaves_nothing() -> None:
    usual = undisturbed("distquant")
    for number, (victim, what, moment) in enumerate(KILLS, 1):
        trial = kill("distquant", victim, what, moment, usual, load_again=number == len(KILLS))
        assert trial.good, trial
