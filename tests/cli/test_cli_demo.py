"""The demo measures the model beside it, by the same text as `distquant perplexity`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cli_runs import Command


@pytest.mark.wide
def test_the_demo_measures_what_the_command_measures(kjv_tiny: str, command: Command) -> None:
    shown = command("demo", kjv_tiny, "--max-new-tokens", "5")
    assert shown.code == 0, shown.err
    measured = command("perplexity", kjv_tiny, "--text", Path(kjv_tiny) / "validation.txt")
    (expected,) = re.findall(r"^perplexity ([\d.]+)", measured.out, re.M)
    assert re.findall(r"^bfloat16 +tp=1 +([\d.]+)$", shown.out, re.M) == [f"{float(expected):.3f}"]
    assert "equal: the sharded model has the same bits" in shown.out
