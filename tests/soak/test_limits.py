"""A part of the trials of `huge_numbers` and `endless_patterns`: each is refused or done, and soon."""

from __future__ import annotations

import endless_patterns
import huge_numbers
import pytest
import trials


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    trials.warm(huge_numbers.MODEL)


@pytest.mark.wide
@pytest.mark.parametrize(
    ("cases", "every"), [(huge_numbers.cases, 23), (endless_patterns.cases, 11)], ids=["numbers", "patterns"]
)
def test_a_part_of_the_trials_ends_well(cases: object, every: int) -> None:
    assert callable(cases)
    ended = list(huge_numbers.tried(list(cases())[::every]))
    assert len(ended) > 15
    assert not list(trials.failures(ended))
