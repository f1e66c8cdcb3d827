"""Errors list every problem, and survive the way home from a worker."""

from __future__ import annotations

import copy
import pickle

import pytest

from distquant.errors import CheckFailed, DistquantError, InputError, Problem, Problems, RankError, listed, one_line

FIRST = Problem("config.json", "'nf5' is not allowed", "Give 'nf4'")
SECOND = Problem("--mesh", "tp=3 does not fit", "Give tp=2")


def test_one_problem_is_one_line():
    error = InputError.one("config.json", "'nf5' is not allowed", "Give 'nf4'")
    assert str(error) == "config.json: 'nf5' is not allowed. Give 'nf4'"
    assert error.problems == (FIRST,)


def test_several_problems_are_numbered():
    error = InputError(iter([FIRST, SECOND]))
    assert str(error) == (
        "2 problems:\n  1. config.json: 'nf5' is not allowed. Give 'nf4'\n  2. --mesh: tp=3 does not fit. Give tp=2"
    )
    assert error.problems == (FIRST, SECOND)


def test_families():
    assert issubclass(InputError, ValueError)
    assert issubclass(RankError, RuntimeError)
    for kind in (InputError, CheckFailed, RankError):
        assert issubclass(kind, DistquantError)
    assert not issubclass(DistquantError, ValueError)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "error", [InputError([FIRST]), InputError([FIRST, SECOND]), RankError(3, "disk full"), CheckFailed("a != b")]
)
def test_pickling(error, protocol):
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert getattr(again, "problems", None) == getattr(error, "problems", None)
    assert vars(again) == vars(error)


class Subclass(InputError):
    pass


def test_subclasses_stay_themselves():
    again = pickle.loads(pickle.dumps(Subclass([FIRST, SECOND])))
    assert type(again) is Subclass
    assert again.problems == (FIRST, SECOND)
    assert copy.copy(RankError(1, "x")).rank == 1


def test_rank_error_names_the_rank():
    error = RankError(7, "no space left")
    assert (error.rank, error.message) == (7, "no space left")
    assert str(error) == "rank 7 failed: no space left"
    again = pickle.loads(pickle.dumps(error))
    assert (again.rank, again.message) == (7, "no space left")


def test_problems_collects_each_once_in_order():
    problems = Problems()
    assert not problems
    problems.raise_if_any()
    problems.add(SECOND.where, SECOND.what, SECOND.fix)
    problems.extend([FIRST, SECOND])
    assert problems
    assert list(problems) == [SECOND, FIRST]
    with pytest.raises(InputError, match=r"^2 problems:") as caught:
        problems.raise_if_any()
    assert caught.value.problems == (SECOND, FIRST)


OF_TWO_LINES = "Validation error for field 'heads':\n    TypeError: expected int, got str"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("no such file.", "no such file"),
        (OF_TWO_LINES, "Validation error for field 'heads': TypeError: expected int, got str"),
        ("", "ValueError"),
    ],
)
def test_an_error_of_another_library_is_one_line(text: str, line: str) -> None:
    assert one_line(ValueError(text)) == line


def test_a_long_error_of_another_library_is_shortened() -> None:
    assert one_line(ValueError("word " * 1000)).endswith("word ...")
    assert len(one_line(ValueError("word " * 1000))) <= 300


def test_entries_of_a_long_list_are_counted() -> None:
    many = [Problem("list", f"{number} matches nothing", "Remove it") for number in range(25)]
    found = list(listed([*many, Problem("other", "wrong", "Mend it")]))
    assert found[:10] == many[:10]
    assert [str(problem) for problem in found[10:]] == [
        "other: wrong. Mend it",
        "list: 15 more like the ones before. Correct or remove them all",
    ]
