"""Waits for collectives look at the other ranks now and then, and neither lose nor invent an error meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distquant.runtime.collectives import finish


class Work:
    """A collective of which each wait ends as it is told; torch's own cannot be made to end between two calls."""

    def __init__(self, *ends: RuntimeError | None, completed: bool):
        self.ends, self.completed = list(ends), completed

    def wait(self, *_: Any) -> None:
        if (end := self.ends.pop(0)) is not None:
            raise end

    def is_completed(self) -> bool:
        return self.completed


def waited(work: Work) -> Work:
    finish(work, torch.zeros(1))  # type: ignore[arg-type]
    return work


def test_a_collective_that_is_done_just_after_a_look_is_done() -> None:
    assert waited(Work(RuntimeError("Operation timed out!"), None, completed=True)).ends == []


def test_a_look_is_followed_by_another() -> None:
    late = RuntimeError("Operation timed out!")
    assert waited(Work(late, late, None, completed=False)).ends == []


def test_the_error_of_a_collective_is_its_own() -> None:
    failed = RuntimeError("Connection closed by peer")
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        waited(Work(RuntimeError("Operation timed out!"), failed, completed=True))
