"""A part of the faults: each is refused in clear words, or the bits are the right ones."""

from __future__ import annotations

import pytest
import trials
from faults import MODEL, faults, judged
from trials import Ended, Outcome, attempt, warm


@pytest.mark.wide
def test_faults_of_files_and_machines() -> None:
    warm(MODEL)
    tried = faults(seed=21, share=0.15)
    print(trials.table(tried))
    assert len(tried) > 20
    assert not list(trials.failures(tried))


def test_other_bits_are_seen() -> None:
    ended = Ended(Outcome.DONE, 0, f"fingerprint {'0' * 32}\n", "", 0.0, 0.0, 0)
    assert judged(ended, "0" * 32).outcome is Outcome.DONE
    assert judged(ended, "1" * 32).outcome is Outcome.UNCHECKED


def test_a_fork_whose_output_fails_ends(tmp_path) -> None:
    """It must not go on as a second process of the one that tries."""

    def limited() -> int:
        import resource

        print("something")
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        return 0

    mark = tmp_path / "mark"
    try:
        attempt(limited)
    finally:
        with open(mark, "a") as file:
            file.write("x")
    assert mark.read_text() == "x"
