"""Errors: one message that lists every problem, each with its place, its cause and what to do.

`InputError` is for what the user gave (arguments, configs, files, machines): the command line prints it without a
traceback and exits with 2. `CheckFailed` is for a comparison that came out unequal (exit 1). `RankError` carries one
rank's failure to all others. All can be pickled, because Ray and spawned processes send them to another process.
"""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from distquant.tables import printable


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that cannot work.

    Its texts may quote a hostile file or argument. They go to terminals, logs and pages, so that control characters,
    and what is not Unicode text at all, are spelled out here, for all of them.

    Attributes:
        where: module path, file, option or tensor that has the problem.
        what: the offending value and the limit that it breaks.
        fix: what the user can do about it.
    """

    where: str
    what: str
    fix: str

    def __post_init__(self) -> None:
        for name in ("where", "what", "fix"):
            object.__setattr__(self, name, printable(getattr(self, name)))

    def __str__(self) -> str:
        return f"{self.where}: {self.what}. {self.fix}"


class DistquantError(Exception):
    """Base of every error that distquant raises on purpose."""


class InputError(DistquantError, ValueError):
    """Input of the user that cannot work; `problems` lists every reason, before any weight is read."""

    def __init__(self, problems: Iterable[Problem]):
        self.problems = tuple(problems)
        lines = [str(problem) for problem in self.problems]
        if len(lines) > 1:
            lines = [f"{len(lines)} problems:"] + [f"  {i}. {line}" for i, line in enumerate(lines, 1)]
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type, tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)

    @classmethod
    def one(cls, where: str, what: str, fix: str) -> InputError:
        """Returns the error with a single problem."""
        return cls([Problem(where, what, fix)])


def one_line(error: object) -> str:
    """Returns the message of another library's error in one line, to be part of a sentence."""
    return textwrap.shorten(str(error).rstrip(".: \n"), 300, placeholder=" ...") or type(error).__name__


RAISED_BY_LIBRARIES = (
    ValueError, LookupError, OSError, ImportError, TypeError, AttributeError, ArithmeticError, RuntimeError,
    AssertionError, SyntaxError,
)  # fmt: skip
"""Errors that transformers, PEFT and others raise for files whose fields they do not check. Catch them around calls."""


class CheckFailed(DistquantError):
    """Two results that must be equal are not."""


class RankError(DistquantError, RuntimeError):
    """A rank failed; the others stop with its name and message."""

    def __init__(self, rank: int, message: str):
        self.rank = rank
        self.message = message
        super().__init__(f"rank {rank} failed: {message}")

    def __reduce__(self) -> tuple[type, tuple[int, str]]:
        return type(self), (self.rank, self.message)


class SilentRankError(RankError):
    """A rank gives no sign of life: its process is stopped, or its machine or network does not answer."""

    def __init__(self, rank: int, message: str):
        super().__init__(rank, message)
        self.args = (f"rank {rank} {message}",)

    @classmethod
    def of(cls, rank: int, seconds: float, activity: str, process: int | None = None) -> SilentRankError:
        """Returns the error for a rank of which nothing was heard for so long, and what it was doing before."""
        seen = f", last seen while {activity}" if activity else ""
        own = "its process" if process is None else f"its process {process}"
        fix = f"See whether {own} is stopped, or its disk or machine hangs"
        return cls(rank, f"has been silent for {seconds:.0f} s{seen}. {fix}")


class LostPeerError(RankError):
    """A collective of this rank failed because another rank ended or did not answer; that rank's error is the cause."""


FIRST = 3
"""Places that one message names where many have the same problem."""


def folded(problems: Iterable[Problem]) -> list[Problem]:
    """Returns problems with one entry for all places of one cause: texts may differ in the numbers of layers alone.

    >>> str(folded([Problem(name, "lacks scales", "Fix") for name in "abcdef"])[0])
    'a: lacks scales (and 5 more alike: b, c, ...). Fix'
    """
    causes: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        causes.setdefault((re.sub(r"(?<=\.)\d+(?=\.)", "#", problem.what), problem.fix), []).append(problem)
    return [_folded(alike) for alike in causes.values()]


def _folded(alike: list[Problem]) -> Problem:
    first, *others = alike
    places = [where for where in dict.fromkeys(other.where for other in others) if where != first.where]
    if not places:
        return first
    named = ", ".join(places[: FIRST - 1]) + (", ..." if len(places) >= FIRST else "")
    return Problem(first.where, f"{first.what} (and {len(places)} more alike: {named})", first.fix)


LISTED = 10
"""Entries of one list that are each reported, where many may be wrong."""


def listed(problems: Iterable[Problem]) -> Iterator[Problem]:
    """Yields the first problems of each place, and how many more there are."""
    counts: Counter[str] = Counter()
    for problem in problems:
        counts[problem.where] += 1
        if counts[problem.where] <= LISTED:
            yield problem
    for where, count in counts.items():
        if count > LISTED:
            yield Problem(where, f"{count - LISTED} more like the ones before", "Correct or remove them all")


class Problems:
    """Collects problems, each once and in order, so that all are reported together."""

    def __init__(self) -> None:
        self._problems: dict[Problem, None] = {}  # in place of an ordered set

    def add(self, where: str, what: str, fix: str) -> None:
        self._problems.setdefault(Problem(where, what, fix))

    def extend(self, problems: Iterable[Problem]) -> None:
        for problem in problems:
            self.add(problem.where, problem.what, problem.fix)

    def __bool__(self) -> bool:
        return bool(self._problems)

    def __iter__(self) -> Iterator[Problem]:
        return iter(self._problems)

    def raise_if_any(self) -> None:
        """Raises `InputError` with everything collected so far, if anything."""
        if self._problems:
            raise InputError(self._problems)
