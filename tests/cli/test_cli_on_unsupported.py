"""`--on-unsupported`: a checkpoint of a method without a scheme can be planned, and is never loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cli_runs import Command, tells
from quantized import fp8_like


@pytest.fixture
def fp8(copy_of: Callable[[str], Path]) -> Path:
    return fp8_like(copy_of("llama-gqa"))


@pytest.mark.parametrize("name", ["plan", "load"])
def test_without_the_option_the_method_is_an_error_that_names_it(name: str, fp8: Path, refused: Command) -> None:
    tells(
        refused(name, fp8), r"^quantization_config\.quant_method: 'eights' is not supported\. .*--on-unsupported skip"
    )


def test_skip_plans_and_says_so(fp8: Path, command: Command, workdir: Path) -> None:
    done = command("plan", fp8, "--mesh", "tp=2", "--on-unsupported", "skip", "--json", "plan.json")
    assert (done.code, done.err) == (0, "")
    assert "quantization eights as the checkpoint stores it" in done.out
    assert "note: SKIPPED: no scheme for the checkpoint's method 'eights'" in done.out
    assert "note: left out beside those weights: 14 weight_scale_inv" in done.out
    assert (workdir / "plan.json").is_file()


@pytest.mark.parametrize("mesh", ["tp=1", "tp=2"])
def test_what_is_skipped_is_not_loaded(mesh: str, fp8: Path, refused: Command) -> None:
    tells(
        refused("load", fp8, "--mesh", mesh, "--on-unsupported", "skip"), r"^on_unsupported: weights .* with 'eights'"
    )


def test_a_value_that_is_no_choice(kjv_tiny: str, refused: Command) -> None:
    tells(refused("plan", kjv_tiny, "--on-unsupported", "ignore"), r"^on_unsupported: unknown value 'ignore'")
