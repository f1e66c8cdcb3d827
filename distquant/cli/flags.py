"""The flags of the command line that are options of `plan` and `load`: names, defaults and help are those of `options`.

This module holds only the command line's spelling of them.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from distquant.errors import InputError
from distquant.options import DECLARED, DISPATCH, FORWARDS, IO_MODES, KERNELS, PlanOptions, RunOptions, select


def at_least(least: float, kind: type = int) -> Callable[[str], Any]:
    """Returns a type for argparse: a number with a lower limit."""

    def number(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not value >= least:
            raise argparse.ArgumentTypeError(f"{text!r} is not {_KINDS[kind]} of at least {least}")
        return value

    return number


_KINDS = {int: "an integer", float: "a number"}

SPELLINGS: Mapping[str, dict[str, Any]] = {
    "quantization_config": {"flag": "--quant", "metavar": "NAME"},
    "mesh": {"metavar": "MESH"},
    "device_map": {"metavar": "MAP"},
    "max_memory": {"metavar": "SIZE"},
    "staging": {"metavar": "SIZE"},
    "ranks_per_node": {"metavar": "N", "type": at_least(1)},
    "dispatch": {"choices": tuple(DISPATCH)},
    "on_unsupported": {"metavar": "ACTION"},
    "capability": {"metavar": "X.Y"},
    "context": {"metavar": "N", "type": at_least(1)},
    "batch": {"metavar": "N", "type": at_least(1)},
    "trust_remote_code": {"action": "store_true"},
    "kernel": {"choices": KERNELS},
    "forward": {"choices": FORWARDS},
    "io": {"choices": IO_MODES},
    "trace": {"metavar": "FILE"},
    "timeout": {"metavar": "SECONDS", "type": at_least(0.1, float)},
}
"""Arguments of argparse by option; `flag` where it is not the option's name."""

JSON_EXAMPLES = {
    "device_map": '{"model.layers.0": 0, "lm_head": "cpu", ...}',
    "max_memory": '{"0": "24GiB", "cpu": "100GiB"}',
}
"""Options that may also be a JSON object, with an example of one."""


def add_flags(
    parser: argparse.ArgumentParser,
    kind: type[PlanOptions] | type[RunOptions],
    *,
    without: tuple[str, ...] = DECLARED,
    **changes: dict[str, Any],
) -> None:
    """Adds a flag for each option of `kind`.

    Args:
        parser: gets them.
        kind: `PlanOptions` or `RunOptions`.
        without: options that the command does not have.
        changes: arguments of argparse that differ for this command, by option.
    """
    documented = documentation(kind)
    for option in fields(kind):
        if option.name in without:
            continue
        how = {
            "dest": option.name,
            "default": option.default,
            "help": help_text(documented.get(option.name, "")),
            **SPELLINGS.get(option.name, {}),
            **changes.get(option.name, {}),
        }
        parser.add_argument(how.pop("flag", "--" + option.name.replace("_", "-")), **how)


def read_flags(arguments: argparse.Namespace, kind: type[PlanOptions] | type[RunOptions]) -> dict[str, Any]:
    """Returns the options of `kind` that a command has, as the Python API takes them.

    Raises:
        InputError: text that should be JSON or a version is not.
    """
    options = select(kind, vars(arguments))
    for name in JSON_EXAMPLES.keys() & options.keys():
        options[name] = _text_or_json(options[name], name)
    if options.get("capability") is not None:
        options["capability"] = _capability(options["capability"])
    return options


def _text_or_json(text: str | None, name: str) -> Any:
    """Returns the text as it is, or the JSON object that it spells."""
    if text is None or not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError.one(name, f"invalid JSON ({error})", f"Write it as {JSON_EXAMPLES[name]}") from error


def _capability(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)\.(\d+)", text)
    if not match:
        raise InputError.one("--capability", f"invalid compute capability {text!r}", "Write it as 9.0")
    return int(match.group(1)), int(match.group(2))


def documentation(kind: type[PlanOptions] | type[RunOptions]) -> dict[str, str]:
    """Returns the docstring under each field, read from the source; nothing where the source is not installed."""
    try:
        source = inspect.getsource(kind)
    except OSError:
        return {}
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    documented: dict[str, str] = {}
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            documented[statement.target.id] = inspect.cleandoc(str(following.value.value))
    return documented


def help_text(documented: str) -> str:
    """Returns the first paragraph of a field's docstring, in one line and without markup."""
    return " ".join(documented.partition("\n\n")[0].split()).replace("`", "")
