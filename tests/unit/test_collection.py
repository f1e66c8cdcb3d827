"""Holds the tests to two rules: every folder of them is run, and none asserts how long something takes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
from hypothesis import settings

TESTS = Path(__file__).parents[1]

CLOCKS = {
    name + alignment
    for name in ("monotonic", "perf_counter", "process_time", "thread_time", "time")
    for alignment in ("", "_ns")
} | {"clock_gettime", "default_timer", "getrusage", "times", "repeat", "timeit"}
"""Functions that tell the time, of `time`, `timeit`, `os` and `resource`."""

MODULES = {"time", "timeit", "os", "resource"}

LENGTHS = {"seconds", "elapsed", "duration", "took"}
"""Names of a length of time."""


def test_no_folder_of_tests_is_passed_over(request: pytest.FixtureRequest) -> None:
    """By default pytest passes over folders of some names, `dist` among them."""
    passed_over = request.config.getini("norecursedirs")
    folders = {path.parent.name for path in Path(__file__).parents[1].rglob("test_*.py")}
    assert "dist" in folders
    assert not [name for name in folders for pattern in passed_over if fnmatch(name, pattern)]


def is_clock(node: ast.AST) -> bool:
    """Finds a call such as `time.monotonic()` or `monotonic()`."""
    if not isinstance(node, ast.Call):
        return False
    function = node.func
    if isinstance(function, ast.Attribute):
        return function.attr in CLOCKS and isinstance(function.value, ast.Name) and function.value.id in MODULES
    return isinstance(function, ast.Name) and function.id in CLOCKS - {"time", "times", "repeat"}


def names_of(node: ast.AST) -> Iterator[str]:
    """Names, attributes and keys within an expression; of a call also what is called."""
    for each in ast.walk(node):
        if isinstance(each, ast.Name):
            yield each.id
        elif isinstance(each, ast.Attribute):
            yield each.attr
        elif isinstance(each, ast.Subscript) and isinstance(each.slice, ast.Constant):
            yield str(each.slice.value)


def timed_assertions(text: str) -> list[int]:
    """Lines of assertions that compare a value that comes from a clock, or that bound one named as a length of time."""
    tree = ast.parse(text)
    timed: set[str] = set()
    assignments = [node for node in ast.walk(tree) if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign)]
    while True:
        before = len(timed)
        for node in assignments:
            value = node.value
            if value is not None and (any(map(is_clock, ast.walk(value))) or timed.intersection(names_of(value))):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                timed.update(last_name(each) for target in targets for each in parts(target))
        if len(timed) == before:
            break
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assert):
            continue
        for part in ast.walk(node.test):
            if isinstance(part, ast.Compare) and compares_time(part, timed):
                found.append(node.lineno)
    return sorted(set(found))


def parts(target: ast.expr) -> list[ast.expr]:
    return list(target.elts) if isinstance(target, ast.Tuple | ast.List) else [target]


def last_name(target: ast.expr) -> str:
    return next(names_of(target), "")


def compares_time(node: ast.Compare, timed: set[str]) -> bool:
    sides = [node.left, *node.comparators]
    if any(map(is_clock, ast.walk(node))) or any(timed.intersection(names_of(side)) for side in sides):
        return True
    for left, operator, right in zip(sides, node.ops, sides[1:], strict=False):
        less = {ast.Lt: left, ast.LtE: left, ast.Gt: right, ast.GtE: right}.get(type(operator))
        if less is not None and LENGTHS.intersection(names_of(less)):
            return True
    return False


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_no_test_asserts_how_long_something_takes(path: Path) -> None:
    """A slower or busier machine fails such a test: count work instead, and time it in a benchmark."""
    assert timed_assertions(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "began = time.process_time()\nrun()\nseconds = time.process_time() - began\nassert seconds < 3",
        "a = perf_counter()\nb = perf_counter() - a\nassert run() and b <= limit",
        "start = time.monotonic()\nassert time.monotonic() - start < 5",
        "outcome.x = time.monotonic_ns()\nassert 5 > outcome.x",
        "done, seconds = run()\nassert seconds < 60",
        "assert report['seconds'] < 2 * other",
        "a = resource.getrusage(resource.RUSAGE_SELF).ru_utime\nassert a == 0",
    ],
)
def test_such_an_assertion_is_found(text: str) -> None:
    assert timed_assertions(text)


@pytest.mark.parametrize(
    "text",
    [
        "assert report['seconds'] > 0",
        "give_up = time.monotonic() + 9\nwhile not done and time.monotonic() < give_up: pass\nassert done",
        "assert done.times == 3",
    ],
)
def test_others_may_be(text: str) -> None:
    assert not timed_assertions(text)


def test_no_example_of_a_property_has_a_deadline() -> None:
    assert settings.default is not None and settings.default.deadline is None
