"""Each input that once failed is refused: one error, no traceback. In this process, because a fork is not faster."""

from __future__ import annotations

from pathlib import Path

import pytest
from corpus import kept
from spoiled import Input, copied
from trials import Outcome, judge

from distquant.cli.main import main

CASES = list(kept())


def test_there_are_cases() -> None:
    assert CASES


@pytest.mark.parametrize("given", CASES, ids=[given.name for given in CASES])
def test_what_once_failed_is_refused(given: Input, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = copied(given.base, tmp_path / "copy")
    assert given.spoil is not None
    given.spoil(tmp_path / "copy")
    for argv in given.commands:
        if code := main([str(model) if word == "MODEL" else word for word in argv]):
            break
    out, err = capsys.readouterr()
    assert judge(code, out, err) is Outcome.REFUSED, err
