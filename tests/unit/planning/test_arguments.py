"""Arguments as people spell them: each is read, or its error names the right spelling; both without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import distquant as dq
from distquant.config import CONFIG_CLASSES
from distquant.config.resolve import SPELLINGS
from distquant.errors import InputError
from distquant.planning import arguments
from distquant.planning.request import Request
from distquant.quantization import config_classes
from distquant.sharding.mesh import Mesh

MODEL = str(Path(__file__).parents[3] / "examples" / "models" / "kjv-tiny")


@pytest.fixture(autouse=True)
def nothing_logged_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "_logged", set())
    monkeypatch.delenv("RANK", raising=False)


def read(**given: Any) -> Request:
    """What `load` makes of its arguments."""
    own = {"model": MODEL, "quantization_config": None, "mesh": None, "device_map": None, "dtype": "auto"}
    options = {name: given.pop(name, default) for name, default in own.items()}
    options["max_memory"] = given.pop("max_memory", None)
    return arguments.read_arguments("load", {**options, "aliases": given})[0]


@pytest.mark.parametrize(
    ("given", "option", "value"),
    [
        ({"load_in_4bit": True}, "quantization_config", "nf4"),
        ({"load_in_8bit": True}, "quantization_config", "int8"),
        ({"load_in_4bit": False, "load_in_8bit": None}, "quantization_config", None),
        ({"load_in_4bit": False, "quantization_config": "int8"}, "quantization_config", "int8"),
        ({"torch_dtype": "bf16"}, "dtype", "bf16"),
        ({"torch_dtype": torch.float16, "dtype": "auto"}, "dtype", torch.float16),
        ({"tp": 2}, "mesh", "tp=2"),
        ({"tp": 2, "dp": 4, "ep": 3}, "mesh", "dp=4,ep=3,tp=2"),
        ({"tp": None}, "mesh", None),
        ({"mesh": 2}, "mesh", 2),
        ({"device": "cuda"}, "device_map", "cuda:0"),
        ({"device": 1}, "device_map", 1),
        ({"device": torch.device("cpu")}, "device_map", "cpu"),
    ],
    ids=str,
)
def test_aliases_are_options(given: dict[str, Any], option: str, value: Any) -> None:
    assert getattr(read(**given), option) == value


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"quant": "nf4"}, r"^quant: load has no argument of this name\. Write quantization_config"),
        ({"tensor_parallel_size": 2}, r"^tensor_parallel_size: .*\. Write tp"),
        ({"low_cpu_mem_usage": True}, r"\. Leave it out: weights never pass through more memory than `staging`"),
        ({"ranks_per_node": 2}, r"\. Leave it out: it is an argument of plan alone"),
        ({"quantisation_config": "nf4"}, r"\. Did you mean quantization_config\?"),
        ({"max_memroy": "1GiB"}, r"\. Did you mean max_memory\?"),
        ({"zzzz": 1}, r"^zzzz: load has no argument of this name\. It has model, quantization_config, mesh"),
        ({"load_in_4bit": True, "load_in_8bit": True}, r"^load_in_4bit: .* both given\. Give one of them"),
        ({"load_in_4bit": True, "quantization_config": "int8"}, r"'int8' is given, and load_in_4bit=True as well"),
        ({"torch_dtype": "fp16", "dtype": "bf16"}, r"^dtype: 'bf16' is given, and torch_dtype=fp16 as well"),
        ({"tp": 2, "mesh": "tp=2"}, r"^mesh: 'tp=2' is given, and tp=2 as well\. Give one of them"),
        ({"tp": 0}, r"^mesh: 'tp=0'"),
        ({"tp": "x"}, r"^mesh: 'tp=x'"),
        ({"device": "cuda", "tp": 2}, r"^device: 'cuda' is given with a mesh, whose ranks have a device each\."),
        ({"device": "cpu", "device_map": "auto"}, r"^device_map: 'auto' is given, and device=cpu as well"),
        ({"max_memory": 24}, r"^max_memory: 24 has no unit\. Write 24GiB, "),
        ({"dtype": "int7"}, r"^dtype: cannot load in 'int7'\. Use bfloat16"),
        ({"model": 7}, r"^model: 7 \(int\) is neither a path nor an id\. Give the folder"),
    ],
    ids=str,
)
def test_errors_name_the_right_spelling(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(**given)


def test_all_wrong_arguments_are_reported_together(kjv_tiny: str) -> None:
    with pytest.raises(InputError) as caught:
        dq.load(kjv_tiny, "nf5", mesh="pt=2", quant="nf4", tp=2, io="fast", kernel="cuda", staging="7")
    told = [problem.where for problem in caught.value.problems]
    assert told == ["quant", "mesh", "mesh", "staging", "quantization_config", "io", "kernel"]


def test_arguments_of_other_functions_are_explained(kjv_tiny: str) -> None:
    with pytest.raises(InputError, match=r"^kernel: plan has no .*\. Leave it out: it changes how a load runs"):
        dq.plan(kjv_tiny, kernel="cpu")  # type: ignore[call-arg]
    with pytest.raises(InputError, match=r"^device_map: ray\.load has no .*\. Leave it out: Ray workers hold one"):
        dq.ray.load(kjv_tiny, device_map="auto")
    with pytest.raises(InputError, match=r"^device: ray\.load has no .*\. Leave it out: Ray workers hold one"):
        dq.ray.load(kjv_tiny, device="cuda")


@pytest.mark.parametrize(
    ("given", "note"),
    [
        ({"quantization_config": "4bit"}, "'4bit' is read as quantization_config='nf4' (--quant nf4)"),
        ({"quantization_config": "BNB"}, "'BNB' is read as quantization_config='nf4' (--quant nf4)"),
        ({"load_in_8bit": True}, "load_in_8bit is read as quantization_config='int8' (--quant int8)"),
        ({"mesh": 2}, "'2' is read as mesh='tp=2' (--mesh tp=2)"),
        ({"max_memory": "24G"}, "max_memory='24G' is read as 24GB, a power of 1000; 24GiB is more"),
    ],
    ids=str,
)
def test_what_could_mean_something_else_is_logged_once(
    given: dict[str, Any], note: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    read(**given)
    read(**given)
    assert [(record.name, record.getMessage()) for record in caplog.records] == [("distquant", note)]
    caplog.clear()
    monkeypatch.setattr(arguments, "_logged", set())
    monkeypatch.setenv("RANK", "1")
    read(**given)
    assert caplog.records == []


@pytest.mark.parametrize("given", [{"quantization_config": "NF4"}, {"tp": 2}, {"mesh": "tp=2"}, {"max_memory": "24gb"}])
def test_what_is_clear_is_not_logged(given: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    read(**given)
    assert caplog.records == []


def test_spellings_stand_for_short_names() -> None:
    known = {name for cls in CONFIG_CLASSES for name in cls.short_names}
    assert set(SPELLINGS.values()) <= known
    assert not SPELLINGS.keys() & known


def test_configurations_stand_in_the_order_of_their_schemes() -> None:
    """Messages list names in one order, whether torch has been imported or not."""
    own = [cls for cls in config_classes() if cls.__module__.startswith("distquant.")]
    assert list(CONFIG_CLASSES) == own


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"quantization_config": "nf4"}, {"load_in_4bit": True}),
        ({"quantization_config": "nf4-dq"}, {"quantization_config": "NF4_DQ"}),
        ({"mesh": "tp=2"}, {"mesh": 2}),
        ({"mesh": "dp=2,tp=2"}, {"tp": 2, "dp": 2}),
        ({"dtype": "float16"}, {"torch_dtype": torch.float16}),
        ({"dtype": "bfloat16"}, {"dtype": "BF16"}),
    ],
    ids=str,
)
def test_plans_of_both_spellings_are_equal(kjv_tiny: str, one: dict[str, Any], other: dict[str, Any]) -> None:
    assert dq.plan(kjv_tiny, **one).digest == dq.plan(kjv_tiny, **other).digest


def test_quantization_is_the_second_argument(kjv_tiny: str) -> None:
    plan = dq.plan(kjv_tiny, "nf4", tp=2)
    assert (plan.quantization_config["bnb_4bit_quant_type"], plan.mesh) == ("nf4", Mesh(tp=2))


def run(code: str) -> Any:
    """What a Python of its own prints as JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


CALLS = """
import json, sys
import distquant as dq
told = []
for call in CALLS:
    try:
        eval(call)
    except dq.InputError as error:
        told.append([str(error), "torch" in sys.modules])
print(json.dumps(told))
"""


def test_python_reports_wrong_arguments_before_torch_is_imported(kjv_tiny: str) -> None:
    calls = [
        f"dq.load({kjv_tiny!r}, 'nf5')",
        f"dq.load({kjv_tiny!r}, 'nf4', mesh='tp=x')",
        f"dq.load({kjv_tiny!r}, 'nf4', max_memory=24)",
        f"dq.load({kjv_tiny!r}, 'nf4', mesh=2)",
        f"dq.load({kjv_tiny!r}, kernel='cuda', io='fast')",
        f"dq.plan({kjv_tiny!r}, quant='nf4')",
        "dq.plan(7)",
        "dq.plan('no/such-model', 'nf5')",
        "dq.doctor('nf5')",
        f"dq.verify({kjv_tiny!r}, 'nf5')",
        "dq.inspect('no/such-model')",
    ]
    told = run(f"CALLS = {calls!r}\n{CALLS}")
    assert len(told) == len(calls)
    assert [message for message, imported in told if imported] == []
    assert told[3][0].startswith("mesh: needs 2 ranks, and this process is alone. Start it with torchrun")
    assert "bitsandbytes" not in told[3][0]


COMMANDS = """
import contextlib, io, json, sys
from distquant.cli.main import main
told = []
for arguments in COMMANDS:
    error, out = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(out):
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code
    told.append([error.getvalue(), code, "torch" in sys.modules])
print(json.dumps(told))
"""


def test_commands_report_wrong_options_before_torch_is_imported(kjv_tiny: str) -> None:
    commands = [
        ["load", kjv_tiny, "--quant", "nf5"],
        ["load", kjv_tiny, "--mesh", "tp=x"],
        ["load", kjv_tiny, "--max-memory", "24"],
        ["plan", kjv_tiny, "--dtype", "int7"],
        ["load", kjv_tiny, "--tp", "2", "--mesh", "tp=2"],
        ["load", kjv_tiny, "--tp", "2", "--runtime", "local"],
        ["verify", kjv_tiny, "--tp", "1", "--mesh", "tp=x"],
        ["doctor", "--quant", "nf5"],
        ["load", kjv_tiny, "--quantt", "nf4"],
        ["load", "no/such-model", "-q", "nf5"],
    ]
    told = run(f"COMMANDS = {commands!r}\n{COMMANDS}")
    assert [code for _, code, _ in told] == [2] * len(commands)
    assert [message for message, _, imported in told if imported] == []
    assert "24 has no unit. Write 24GiB" in told[2][0]
    assert told[9][0].startswith("distquant: 2 problems:")
