"""Regular expressions from outside: a checkpoint or a user gives them, so matching them may never end.

`(a|aa)+$` takes twice as long for each further `a`. Patterns of the field take microseconds, and there may be 90,000
names. So a pattern whose text bounds its steps is matched by `re`, which is fast; any other one by the package `regex`,
which can stop after a time. Both give the same answers (`tests/unit/test_patterns.py`). `limited_matching` also bounds
the time of all patterns together.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Literal

from distquant.errors import InputError

LONGEST = 10_000
"""Characters of a pattern at most; the longest ones in use list a few hundred modules."""

MOST_PATTERNS = 2000
"""Patterns of one list at most, beside plain names: compiling them takes a second."""

MOST_ITEMS = 1_000_000
"""Characters at most of a pattern that has `{count}` written out, as `regex` does: a quarter of a second's work."""

ONE_SECONDS = 1.0
"""Seconds of work for one pattern on one name."""

ALL_SECONDS = 3.0
"""Seconds for all patterns on all names while a load is planned; those of 90,000 modules take a few tenths."""

FAST_NAME = 128
"""Characters of a name at most that `re` matches without a limit of time; those of modules have about 60."""

FAST_STEPS = 10_000_000
"""Steps at most that `re` may need on such a name: a tenth of a second, if there ever were such a pattern."""

FIX = "Write module names, or a pattern without a repetition inside of a repetition"

_PLAIN, _BETWEEN = re.compile(r"(?:[\w-]|\\?[.-])*\$?"), re.compile(r"[.\\$]+")
"""The name of a module as a pattern, and what stands between its pieces. Each piece is in any name that it matches, so
that most names need no regular expression; a list may have thousands of names."""

_ESCAPE_OR_SET = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_OTHERWISE_IN_REGEX = re.compile(r"(\\.)|\{(?!\d*,?\d*\})|(?<=\[):", re.DOTALL)
"""Syntax of `regex` alone: `{e<=1}` after an item (fuzzy matching), and `[:alpha:]`."""


class InvalidPattern(ValueError):
    """Raised for text that is not a regular expression; says why."""


@dataclass
class _Budget:
    """The time that patterns have taken, and the function that says where one stands."""

    place: Callable[[str], str]
    spent: float = 0.0
    begun: float = field(default_factory=time.thread_time)


_budget: ContextVar[_Budget | None] = ContextVar("pattern budget", default=None)


@contextmanager
def limited_matching(place: Callable[[str], str]) -> Iterator[None]:
    """Bounds the time of all patterns that are matched within, by this thread, to `ALL_SECONDS`.

    Args:
        place: says where a pattern stands, for messages.
    """
    token = _budget.set(_Budget(place))
    try:
        yield
    finally:
        _budget.reset(token)


class Pattern:
    """A regular expression from outside.

    Args:
        text: of the expression, in the syntax of `re`.
        given: the pattern as it was given, for messages.

    Raises:
        InvalidPattern: the text is not a regular expression, or too long for one.
    """

    def __init__(self, text: str, given: str):
        if len(given) > LONGEST:
            raise InvalidPattern(f"{len(given)} characters, and at most {LONGEST} are read")
        begun = time.perf_counter()
        self.given, self._text = given, text
        self._pieces = tuple(filter(None, _BETWEEN.split(given))) if _PLAIN.fullmatch(given) else ()
        if not self._pieces:
            self._compile()
            self._spend(begun)

    def _compile(self) -> None:
        text = self._text
        try:
            self._fast = re.compile(text)
        except (re.error, ValueError, OverflowError) as error:  # also of flags, and of numbers with too many digits
            raise InvalidPattern(str(error).partition(";")[0]) from error
        except RecursionError as error:
            raise InvalidPattern("nested too deeply") from error
        if (items := len(text) * _repetitions(text)) > MOST_ITEMS:
            raise InvalidPattern(f"its repetitions make {items} characters of it, and at most {MOST_ITEMS} are read")
        self._is_fast = not self._fast.flags & re.VERBOSE and most_steps(self.given) <= FAST_STEPS
        if not self._is_fast:
            self._bounded  # noqa: B018 - compiled here, where errors are reported

    @cached_property
    def _bounded(self) -> Any:
        """The same expression for the package `regex`, which takes long to import and is rarely needed."""
        import regex

        try:
            return regex.compile(_OTHERWISE_IN_REGEX.sub(_escaped, self._fast.pattern), regex.VERSION0)
        except regex.error as error:
            raise InvalidPattern(str(error)) from error

    def match(self, name: str) -> bool:
        """Returns True if the beginning of a name matches; raises `InputError` after too long a time."""
        return self._run("match", name)

    def search(self, name: str) -> bool:
        """Returns True if any part of a name matches; raises `InputError` after too long a time."""
        return self._run("search", name)

    def _run(self, method: Literal["match", "search"], name: str) -> bool:
        # Most names end here. Two looks at the clock would cost more than these few steps, so they are not counted.
        if self._pieces and not all(map(name.__contains__, self._pieces)):
            return False
        begun = time.perf_counter()
        if self._pieces:
            self._compile()
            self._pieces = ()
        try:
            if self._is_fast and len(name) <= FAST_NAME:
                result = getattr(self._fast, method)(name)
            else:
                # The time is that of the processor: a busy machine does not change it.
                result = getattr(self._bounded, method)(name, timeout=ONE_SECONDS)
        except TimeoutError as error:
            fault = f"{shortened(self.given)} takes more than {ONE_SECONDS:g} s to match {shortened(name)}"
            raise InputError.one(self._place(), fault, FIX) from error
        self._spend(begun)
        return result is not None

    def _spend(self, begun: float) -> None:
        """Counts the time since then; raises `InputError` if all patterns together have taken too long."""
        budget = _budget.get()
        if budget is not None:
            # One look at the clock is cheap, and counts a pause of the machine, too: as one name's time at most.
            budget.spent += min(time.perf_counter() - begun, ONE_SECONDS)
            if budget.spent > ALL_SECONDS:
                budget.spent = min(budget.spent, time.thread_time() - budget.begun)  # not that of others
            if budget.spent > ALL_SECONDS:
                fault = f"the patterns take more than {ALL_SECONDS:g} s to match this model's modules"
                fix = f"Give fewer or simpler patterns; the last one tried is {shortened(self.given)}"
                raise InputError.one(self._place(), fault, fix)

    def _place(self) -> str:
        budget = _budget.get()
        return "pattern" if budget is None else budget.place(self.given)


@lru_cache(maxsize=1 << 17)
def compiled(text: str, given: str | None = None) -> Pattern:
    """Returns a pattern, which is compiled once; raises `InvalidPattern` if it is none.

    Args:
        text: of the expression.
        given: the pattern as it was given, if the text has more than it.
    """
    return Pattern(text, text if given is None else given)


def too_many(texts: Iterable[str]) -> str | None:
    """Returns the reason why a list has too many patterns; None where it has not. Plain names do not count."""
    count = sum(1 for text in texts if not _PLAIN.fullmatch(text))
    return None if count <= MOST_PATTERNS else f"{count} patterns, and at most {MOST_PATTERNS} beside plain names"


def pattern_error(text: str) -> str | None:
    """Returns the reason why a text is not a regular expression; None where it is one."""
    try:
        compiled(text)
    except InvalidPattern as error:
        return str(error)
    return None


def _repetitions(text: str) -> int:
    """Returns a bound of how often the counts of a valid pattern repeat a part of it: their product."""
    counts = re.findall(r"\{(\d*),?(\d*)\}", _ESCAPE_OR_SET.sub("x", text))
    return math.prod(max(int(count or 1) for count in pair) or 1 for pair in counts)


def most_steps(text: str) -> float:
    """Returns a bound of the steps that `re` takes for a valid pattern on a name of `FAST_NAME` characters.

    A repetition takes up at most all of a name, so each multiplies the ways to match by its characters. An optional
    item doubles them. Of alternatives one is taken, in each group. The bound only holds where no repetition is inside
    of another one, and nothing refers back: else it is infinite.
    """
    bare = _ESCAPE_OR_SET.sub("x", text)
    if re.search(r"\)[*+{]", bare) or re.search(r"\\[1-9]|\(\?(?:P=|\(|#)", text):
        return float("inf")
    repetitions = sum(map(bare.count, "*+{"))
    optional = bare.count("?") - bare.count("(?")
    groups = bare.count("(") + 1
    if repetitions + optional + groups > 100:  # a float could not hold the product
        return float("inf")
    return float(FAST_NAME) ** repetitions * 2.0**optional * (bare.count("|") / groups + 1) ** groups


def _escaped(part: re.Match[str]) -> str:
    return part[0] if part[1] else "\\" + part[0]


def shortened(text: str) -> str:
    """Returns a text from outside in quotes, at most its first 77 characters."""
    return repr(text if len(text) <= 80 else text[:77] + "...")
