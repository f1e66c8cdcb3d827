"""Where bitsandbytes, ray and peft are missing: what needs them is refused, the rest works."""

from __future__ import annotations

import json
import re

import pytest
from absent import run_without
from cli_runs import COMMANDS, Command, Run, tells


@COMMANDS
@pytest.mark.parametrize("found", [{}, {"bitsandbytes": "0.40.0"}], ids=["missing", "too-old"])
def test_package_of_the_method_is_missing(
    found: dict[str, str], name: str, kjv_tiny: str, refused: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distquant.runtime.measure.packages", lambda: found)
    what = r"bitsandbytes 0\.40\.0" if found else "bitsandbytes is not installed"
    pattern = rf"^environment: {what}, bitsandbytes_4bit needs 0\.50 or newer\. Run: pip install 'bitsandbytes>="
    tells(refused(name, kjv_tiny, "--quant", "nf4"), pattern)


@pytest.fixture(scope="module")
def without_extras(kjv_tiny: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Commands, run by an interpreter that has neither bitsandbytes nor ray nor peft."""
    calls = {
        "plan": ["plan", kjv_tiny, "--quant", "nf4"],
        "load": ["load", kjv_tiny, "--quant", "int8"],
        "ray": ["load", kjv_tiny, "--runtime", "ray"],
        "doctor": ["doctor"],
        "none": ["load", kjv_tiny, "--quant", "none"],
    }
    code = f"""
import contextlib, io, json
from distquant.cli.main import main
done = {{}}
for name, arguments in {calls!r}.items():
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        done[name] = main(arguments), out, err
print(json.dumps({{name: [code, out.getvalue(), err.getvalue()] for name, (code, out, err) in done.items()}}))
"""
    folder = tmp_path_factory.mktemp("absent") / "packages"
    done = run_without(("bitsandbytes", "ray", "peft"), folder, code)
    assert done.returncode == 0, done.stderr
    return {name: Run(*found) for name, found in json.loads(done.stdout).items()}


@COMMANDS
def test_package_of_the_method_is_really_missing(name: str, without_extras: dict[str, Run]) -> None:
    pattern = r"^environment: bitsandbytes is not installed, bitsandbytes_[48]bit needs .*Run: pip install 'bits"
    tells(without_extras[name], pattern)


def test_ray_is_really_missing(without_extras: dict[str, Run]) -> None:
    tells(without_extras["ray"], r"^--runtime ray: ray cannot be imported .*\. Run: pip install 'distquant\[ray\]'")


def test_without_extras_none_loads(without_extras: dict[str, Run]) -> None:
    assert without_extras["none"].code == 0
    assert "fingerprint" in without_extras["none"].out


def test_without_extras_doctor_tells_what_is_missing(without_extras: dict[str, Run]) -> None:
    done = without_extras["doctor"]
    assert done.code == 0
    assert re.search(r"^bitsandbytes +missing$", done.out, re.MULTILINE)
    assert re.search(r"^bitsandbytes_4bit: bitsandbytes is not installed, .*pip install", done.out, re.MULTILINE)
    assert re.search(r"^none +none +no +yes +yes +yes +plain +adapters +ready$", done.out, re.MULTILINE)
    assert "without ray, --runtime ray is not available" in done.out
