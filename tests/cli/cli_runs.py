"""What a command did: exit code, output, and whether it told one problem as it should."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest

COMMANDS = pytest.mark.parametrize("name", ["plan", "load"])


STATUS = re.compile(r"^(status|loading): [^\n]*\n", re.MULTILINE)
"""What a command says on standard error about work that takes more than two seconds, which it may here."""


@dataclass
class Run:
    """A finished command; `err` leaves out what it said while it worked."""

    code: int
    out: str
    err: str

    def __post_init__(self) -> None:
        self.err = STATUS.sub("", self.err)

    @property
    def message(self) -> str:
        """The one message on standard error, without `distquant: `; fails where there is anything else."""
        assert "Traceback" not in self.err and "Traceback" not in self.out
        assert self.err.startswith("distquant: "), self.err
        first, *rest = self.err.removeprefix("distquant: ").rstrip("\n").split("\n")
        if match := re.fullmatch(r"(\d+) problems:", first):
            assert len(rest) == int(match[1]), self.err
            assert all(line.startswith(f"  {i}. ") for i, line in enumerate(rest, 1)), self.err
        else:
            assert not rest, self.err
        return "\n".join([first, *rest])

    @property
    def problems(self) -> list[str]:
        """The problems that the message lists."""
        lines = self.message.split("\n")
        return [re.sub(r"^  \d+\. ", "", line) for line in lines[1:]] or lines


Command = Callable[..., Run]


def tells(run: Run, pattern: str) -> None:
    """The run was refused for one reason, told as `where: what. What to do`."""
    assert run.code == 2
    assert run.out == ""
    (problem,) = run.problems
    assert re.search(pattern, problem, re.DOTALL), problem
    assert re.fullmatch(r"[^:]+: .+\. \S.+", problem, re.DOTALL), f"lacks where, what or what to do: {problem}"
