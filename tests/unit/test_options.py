"""The dataclasses of options are the one source: public functions and the command line repeat them exactly."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Any

import pytest

import distquant as dq
from distquant.cli import flags
from distquant.cli.main import build_parser
from distquant.errors import InputError
from distquant.options import DECLARED, DISPATCH, FORWARDS, IO_MODES, KERNELS, Aliases, PlanOptions, RunOptions
from distquant.planning.request import Request

PLAN = {option.name: option for option in fields(PlanOptions)}
RUN = {option.name: option for option in fields(RunOptions)}
DOCUMENTED = {**flags.documentation(PlanOptions), **flags.documentation(RunOptions)}


def without(options: dict[str, Field[Any]], *names: str) -> dict[str, Field[Any]]:
    assert set(names) <= options.keys()
    return {name: option for name, option in options.items() if name not in names}


LOAD = without(PLAN, *DECLARED)
FUNCTIONS = {
    "plan": (lambda: dq.plan, PLAN, ()),
    "load": (lambda: dq.load, {**LOAD, **RUN}, ("progress",)),
    "ray.load": (
        lambda: dq.ray.load,
        {**without(LOAD, "device_map"), **RUN},
        ("resources", "placement_group", "threads", "schedule_timeout", "progress"),
    ),
}
"""The function, the options that it takes, and what else."""

NARROWER = {("ray.load", "max_memory"): "str | int | None"}
"""Types that differ: without a device map there is one size only."""


def entries(function: Callable[..., Any]) -> dict[str, str]:
    """Documentation of each argument under `Args:`, in one line."""
    section = inspect.cleandoc(function.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
    found = re.split(r"^    (\w+): ", section, flags=re.MULTILINE)[1:]
    return {name: " ".join(text.split()) for name, text in zip(found[::2], found[1::2], strict=True)}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_are_the_options(name: str) -> None:
    function, options, others = FUNCTIONS[name]
    first, *parameters, last = inspect.signature(function()).parameters.values()
    assert (first.name, parameters[0].name) == ("model", "quantization_config")
    assert parameters[0].kind is first.kind is first.POSITIONAL_OR_KEYWORD
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters[1:])
    assert (last.kind, last.annotation) == (last.VAR_KEYWORD, "Unpack[Aliases]")
    assert [parameter.name for parameter in parameters if parameter.name not in others] == list(options)
    assert {parameter.name for parameter in parameters} == {*options, *others}
    for parameter in parameters:
        if parameter.name in options:
            option = options[parameter.name]
            assert parameter.default == option.default, parameter.name
            assert parameter.annotation == NARROWER.get((name, parameter.name), option.type), parameter.name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_are_documented_as_the_options_are(name: str) -> None:
    function, options, others = FUNCTIONS[name]
    found = entries(function())
    expected = {key: " ".join(DOCUMENTED[key].split()) for key in options if key in found}
    assert {key: text for key, text in found.items() if key in options} == expected
    assert [key for key in found if key in options] == list(expected), "in the order of the options"
    assert found.keys() - options.keys() <= {"model", "aliases", *others}
    if name != "ray.load":  # which refers to the other two
        documented = options if name == "plan" else RUN
        assert documented.keys() <= found.keys()


def test_every_option_is_documented() -> None:
    assert DOCUMENTED.keys() == PLAN.keys() | RUN.keys()


COMMANDS = {
    "plan": PLAN,
    "load": {**LOAD, **RUN},
    "chat": {**LOAD, **RUN},
    "verify": {**without(LOAD, "device_map"), **RUN},
    "perplexity": {**LOAD, **RUN},
    "demo": without(LOAD, "device_map"),
}


def parser_of(command: str) -> argparse.ArgumentParser:
    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return commands.choices[command]


def actions(command: str) -> dict[str, argparse.Action]:
    """The first action of each name: `verify` has aliases of the mesh under the mesh's own."""
    return {action.dest: action for action in reversed(parser_of(command)._actions)}


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_are_the_options(command: str) -> None:
    found, options = actions(command), COMMANDS[command]
    assert found.keys() & (PLAN.keys() | RUN.keys()) == options.keys()
    for name, option in options.items():
        action = found[name]
        own = ["-q", "--quant"] if name == "quantization_config" else ["--" + name.replace("_", "-")]
        assert action.option_strings == own
        if (command, name) == ("verify", "mesh"):  # several
            continue
        assert action.default == option.default
        assert action.help and action.help == flags.help_text(DOCUMENTED[name])


@pytest.mark.parametrize("command", COMMANDS)
def test_aliases_are_flags(command: str) -> None:
    found = {string for action in actions(command).values() for string in action.option_strings}
    several = {string for action in parser_of(command)._actions for string in action.option_strings}
    wanted = {"--" + name.replace("_", "-") for name in Aliases.__annotations__}
    without = set() if "device_map" in COMMANDS[command] else {"--device"}
    assert wanted - without <= (several if command == "verify" else found)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_groups_and_an_example(command: str) -> None:
    text = parser_of(command).format_help()
    titles = re.findall(r"^(\w+):$", text, re.MULTILINE)
    groups = [title for title in titles if title in flags.GROUPS]
    assert groups == [title for title in flags.GROUPS if title in groups]
    assert {"model", "sharding", "memory"} <= set(groups)
    assert f"example:\n  distquant {command} " in text


def test_every_option_is_in_one_group() -> None:
    grouped = [option for options in flags.GROUPS.values() for option in options]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == PLAN.keys() | RUN.keys() | Aliases.__annotations__.keys()


def test_nothing_is_spelled_that_is_no_option() -> None:
    assert flags.SPELLINGS.keys() | flags.JSON_EXAMPLES.keys() <= PLAN.keys() | RUN.keys()


@pytest.mark.parametrize(
    ("name", "choices"), [("dispatch", DISPATCH), ("kernel", KERNELS), ("forward", FORWARDS), ("io", IO_MODES)]
)
def test_documentation_names_every_choice(name: str, choices: tuple[str, ...]) -> None:
    assert set(choices) <= set(re.findall(r"`(\w+)`", DOCUMENTED[name]))


def test_all_wrong_run_options_are_reported_together() -> None:
    with pytest.raises(InputError) as caught:
        RunOptions(forward="back", io="fast", trace="nowhere/at/all.json", timeout=-1)
    assert [problem.where for problem in caught.value.problems] == ["forward", "io", "trace", "timeout"]
    assert "unknown value 'back'. Choose one of: auto, dequantize" in str(caught.value)


def test_mappings_are_copied() -> None:
    given = {"": "cpu"}
    request = Request(model="m", device_map=given, max_memory={"cpu": "1GiB"})
    given["lm_head"] = "disk"
    assert request.device_map == {"": "cpu"}
    assert request.rank_memory() is None


@pytest.mark.parametrize(("size", "count"), [("1KiB", 1024), (1700, 1700), (None, None), ("many", None)])
def test_memory_of_a_rank(size: Any, count: int | None) -> None:
    assert PlanOptions(max_memory=size).rank_memory() == count
