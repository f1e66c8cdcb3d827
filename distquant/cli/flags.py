"""The flags of the command line that are options of `plan` and `load`: names, defaults and help are those of `options`.

This module holds only the command line's spelling of them, and needs no torch.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from distquant.config import parse
from distquant.errors import InputError, Problems
from distquant.options import DECLARED, DISPATCH, FORWARDS, IO_MODES, KERNELS, PlanOptions, RunOptions, select
from distquant.patterns import shortened
from distquant.planning.arguments import ALIASES, check_early, check_world, early_classes, fold
from distquant.planning.request import collected
from distquant.sharding.mesh import AXES, Mesh
from distquant.strict_json import parse_json

MOST_THREADS = 1024
"""OpenMP makes room for as many at once, and ends the process where there is none."""

MOST_TOKENS = 10_000_000
"""Of an answer; no model has a longer context."""

MOST = 10**9
"""Largest number of an option that counts something or is a number of seconds: 31 years."""


def at_least(least: float, kind: type = int, most: float = MOST) -> Callable[[str], Any]:
    """Returns a type for argparse: a number with a lower and an upper limit."""

    def number(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value:
            raise argparse.ArgumentTypeError(f"{shortened(text)} is not {_KINDS[kind]} of at least {least}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{shortened(text)} is more than {most}")
        return value

    return number


_KINDS = {int: "an integer", float: "a number"}

SPELLINGS: Mapping[str, dict[str, Any]] = {
    "quantization_config": {"flags": ("-q", "--quant"), "metavar": "NAME"},
    "mesh": {"metavar": "MESH"},
    "device_map": {"metavar": "MAP"},
    "max_memory": {"metavar": "SIZE"},
    "staging": {"metavar": "SIZE"},
    "ranks_per_node": {"metavar": "N", "type": at_least(1)},
    "dispatch": {"choices": tuple(DISPATCH)},
    "on_unsupported": {"metavar": "ACTION"},
    "capability": {"metavar": "X.Y"},
    "attn_implementation": {"metavar": "NAME"},
    "cache_dir": {"metavar": "FOLDER"},
    "context": {"metavar": "N", "type": at_least(1)},
    "batch": {"metavar": "N", "type": at_least(1)},
    "trust_remote_code": {"action": "store_true"},
    "kernel": {"choices": KERNELS},
    "forward": {"choices": FORWARDS},
    "io": {"choices": IO_MODES},
    "trace": {"metavar": "FILE"},
    "timeout": {"metavar": "SECONDS", "type": at_least(0.1, float)},
    "interface": {"metavar": "NAME"},
    "adapter": {"metavar": "FOLDER"},
}
"""Arguments of argparse by option; `flags` where they are not the option's name."""

GROUPS: Mapping[str, tuple[str, ...]] = {
    "model": (
        "quantization_config", "load_in_4bit", "load_in_8bit", "dtype", "torch_dtype", "attn_implementation",
        "on_unsupported", "adapter", "trust_remote_code", "revision", "cache_dir",
    ),
    "sharding": ("mesh", *AXES, "device_map", "device", "ranks_per_node", "dispatch"),
    "memory": ("max_memory", "staging", "context", "batch"),
    "running": ("kernel", "forward", "io", "timeout", "interface", "capability"),
    "output": ("trace",),
}  # fmt: skip
"""Groups in the help of a command, in this order, and the options in each."""

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
        how: dict[str, Any] = {
            "dest": option.name,
            "default": option.default,
            "help": help_text(documented.get(option.name, "")),
            **SPELLINGS.get(option.name, {}),
            **changes.get(option.name, {}),
        }
        flags = how.pop("flags", ("--" + option.name.replace("_", "-"),))
        group(parser, _title(option.name)).add_argument(*flags, **how)
        if option.name == "adapter":
            text = "load the model alone, where its folder has an adapter as well"
            how = {"dest": "adapter", "action": "store_const", "const": False, "help": text}
            group(parser, _title("adapter")).add_argument("--no-adapter", **how)
    if kind is PlanOptions:
        _add_aliases(parser, without, several=changes.get("mesh", {}).get("action") == "append")


def group(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    """Returns a group of a command's help, one of `GROUPS`."""
    if not any(known.title == title for known in parser._action_groups):
        for each in GROUPS:  # all of them at once, so that they stand in one order
            parser.add_argument_group(each)
    return next(known for known in parser._action_groups if known.title == title)


def _title(option: str) -> str:
    return next(title for title, options in GROUPS.items() if option in options)


def _add_aliases(parser: argparse.ArgumentParser, without: tuple[str, ...], several: bool) -> None:
    """Adds the flags that are other spellings of options; where several meshes are compared, each is one more."""
    for name in ALIASES:
        how: dict[str, Any] = {"dest": name, "default": None, "help": ALIAS_HELP[name]}
        if name in AXES:
            how |= {"metavar": "N", "type": at_least(1)}
            if several:
                how |= {"dest": "mesh", "action": "append", "type": _one_axis(name)}
        elif name in ("load_in_4bit", "load_in_8bit"):
            how |= {"action": "store_true", "default": False}
        elif name == "device":
            if "device_map" in without:
                continue
            how["metavar"] = "DEVICE"
        else:
            how |= {"metavar": "DTYPE"}
        group(parser, _title(name)).add_argument("--" + name.replace("_", "-"), **how)


def _one_axis(axis: str) -> Callable[[str], str]:
    """Returns a type for argparse: the mesh with this axis alone."""

    def mesh(text: str) -> str:
        return f"{axis}={at_least(1)(text)}"

    return mesh


ALIAS_HELP = {
    "tp": "ranks over which every layer is divided: --tp 2 is --mesh tp=2",
    "dp": "replicas of the model: --dp 2 --tp 4 is --mesh dp=2,tp=4",
    "ep": "ranks over which experts are distributed",
    "load_in_4bit": "the same as --quant nf4",
    "load_in_8bit": "the same as --quant int8",
    "torch_dtype": "the same as --dtype",
    "device": "one device, such as cuda or cpu; the same as --device-map",
}
"""Help of aliases."""


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


def prepare(arguments: argparse.Namespace) -> list[str]:
    """Reads the aliases among the flags of a command into its options, and checks all that needs no torch.

    Returns:
        Notes on spellings, for the user.

    Raises:
        InputError: with every problem found.
    """
    options, problems = vars(arguments), Problems()
    if "staging" not in options:  # a command without options of a plan
        if options.get("quant") is not None:
            parse(options["quant"], early_classes())
        return []
    notes = fold(options, {name: options.pop(name) for name in ALIASES if name in options}, problems)
    default = options.pop("default_mesh", None)
    if options["mesh"] is None:
        options["mesh"] = default
    plan: dict[str, Any] = {}
    with collected(problems):
        plan = read_flags(arguments, PlanOptions)
    meshes = options["mesh"] if isinstance(options["mesh"], list) else [options["mesh"]]
    for mesh in meshes:
        with collected(problems):
            if "runtime" in options:
                _check_runtime(options["runtime"], mesh)
    requests = [{**plan, "mesh": mesh} for mesh in meshes]
    check_early(arguments.model, requests, read_flags(arguments, RunOptions), problems)
    return notes


def _check_runtime(runtime: str | None, given: str | None) -> None:
    mesh = Mesh.parse(given)
    if runtime == "local" and mesh.size > 1:
        fault = f"{given} needs {mesh.size} ranks, and the runtime 'local' is one process"
        raise InputError.one("mesh", fault, "Use --runtime torchrun or --runtime ray")
    if runtime in (None, "torchrun") and "RANK" in os.environ and os.environ.get("WORLD_SIZE", "").isdigit():
        check_world(mesh, int(os.environ["WORLD_SIZE"]))


def _text_or_json(text: str | None, name: str) -> Any:
    """Returns the text as it is, or the JSON object that it spells."""
    if text is None or not text.lstrip().startswith("{"):
        return text
    try:
        return parse_json(text)
    except ValueError as error:
        raise InputError.one(name, f"invalid JSON ({error})", f"Write it as {JSON_EXAMPLES[name]}") from error


def _capability(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,3})\.([0-9]{1,3})", text)
    if not match:
        raise InputError.one("--capability", f"invalid compute capability {shortened(text)}", "Write it as 9.0")
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
