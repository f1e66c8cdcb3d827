"""Values that ranks send each other are read without running anything that the bytes name."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import distquant as dq
from distquant.checkpoint.faults import CheckpointError, HeaderFault
from distquant.errors import CheckFailed, InputError, LostPeerError, Problem, RankError
from distquant.loading.report import RankReport
from distquant.runtime.values import from_bytes, to_bytes

PLAIN = [None, True, 3, 2.5, "text", b"bytes", (1, "a"), [{"text": "?", "options": {"top_p": 0.5}}], {1, 2}]


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_plain_values_are_read(value: Any) -> None:
    assert from_bytes(to_bytes(value), 1) == value


def test_errors_and_reports_are_read() -> None:
    problem = Problem("here", "is wrong", "Mend it")
    broken = CheckpointError.one("model.safetensors", "is damaged", "Copy it again", next(iter(HeaderFault)))
    for error in (InputError([problem]), broken, RankError(1, "ended"), LostPeerError(0, "gone")):
        found = from_bytes(to_bytes(error), 1)
        assert (type(found), str(found)) == (type(error), str(error))
    assert str(from_bytes(to_bytes(CheckFailed("differs")), 1)) == "differs"
    report = RankReport(rank=3, seconds=1.5, kernel="cpu")
    assert from_bytes(to_bytes([report, problem]), 1) == [report, problem]


def test_a_real_report_and_plan_are_read(model_of: Any) -> None:
    model = dq.load(model_of("llama-gqa"), quantization_config="nf4")
    sent = [model.distquant.report, model.distquant.plan.to_json()]
    assert from_bytes(to_bytes(sent), 0) == sent


class Touch:
    """Read as a pickle, it makes a file."""

    def __init__(self, path: Path):
        self._path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self._path,)


HOSTILE = {
    "eval": b"cbuiltins\neval\n(S'1'\ntR.",
    "system": b"cposix\nsystem\n(S'true'\ntR.",
    "getattr": b"cbuiltins\ngetattr\n.",
    "a module through ours": b"\x80\x04\x8c\x10distquant.errors\x8c\x08re._sys\x93.",
    "a function of ours": b"cdistquant.loading.report\nwrite_report\n(S'x'\nS'/dev/null'\ntR.",
    "a module of ours that runs": b"cdistquant.__main__\nmain\n.",
    "no module": b"cdistquant.nowhere\nThing\n.",
    "an error with wrong arguments": b"cdistquant.errors\nRankError\n(tR.",
    "nothing": b"",
    "text": b"hello",
    "cut": pickle.dumps(["text", 1])[:-3],
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(RankError, match=r"^rank 2 failed: sent something that ranks do not send"):
        from_bytes(torch.tensor(list(data), dtype=torch.uint8), 2)


def test_nothing_is_run(tmp_path: Path) -> None:
    data = pickle.dumps([Touch(tmp_path / "made")])
    with pytest.raises(RankError, match="sent something that ranks do not send"):
        from_bytes(torch.tensor(list(data), dtype=torch.uint8), 2)
    assert not (tmp_path / "made").exists()
    pickle.loads(data)
    assert (tmp_path / "made").exists()
