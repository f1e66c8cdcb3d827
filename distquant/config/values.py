"""Values of config fields: read from the spellings in use, checked by type hints, which messages describe in words.

Fields hold plain data, so dtypes are strings (`"bfloat16"`); `torch.bfloat16`, `"torch.bfloat16"` and enum members are
accepted on input. Nothing here imports torch, except `torch_dtype` when it is called.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from distquant.config.frozen import FrozenDict, freeze
from distquant.config.plain import plain
from distquant.errors import InputError
from distquant.files import CONFIG_BYTES, read_file
from distquant.strict_json import parse_json

if TYPE_CHECKING:
    import torch

_SIMPLE = {bool: "true or false", int: "an integer", float: "a number", str: "a string", type(None): "null"}
_MAPPINGS = (dict, Mapping)


_hints: dict[type, dict[str, Any]] = {}


def hints_of(cls: type) -> dict[str, Any]:
    """Returns the declared types of a class's fields; they are text, which is evaluated once."""
    if cls not in _hints:
        _hints[cls] = get_type_hints(cls)
    return _hints[cls]


def coerce(value: Any, hint: Any) -> Any:
    """Converts `value` to a type hint: lists to tuples, dicts to `FrozenDict`, integers to floats if it asks for them.

    Supported hints: bool, int, float, str, None, Any (plain data), Literal, tuple, Mapping and dict with string keys,
    and unions of these.

    Raises:
        ValueError: the hint does not allow the value.
    """
    value, origin, arguments = plain(value), get_origin(hint), get_args(hint)
    if hint is Any:
        return freeze(value) if isinstance(value, (list, tuple, Mapping)) else value
    if origin in (Union, types.UnionType):
        return _first_of(value, arguments)
    if origin is Literal:
        choice = value.removeprefix("torch.") if isinstance(value, str) else value
        if any(type(choice) is type(allowed) and choice == allowed for allowed in arguments):
            return choice
    elif origin is tuple and isinstance(value, (list, tuple)):
        hints = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(hints) == len(value):
            return tuple(coerce(item, of) for item, of in zip(value, hints, strict=True))
    elif origin in _MAPPINGS and isinstance(value, Mapping):
        return FrozenDict({plain(key): coerce(item, arguments[1]) for key, item in value.items()})
    elif hint is float and type(value) is int:
        return float(value)
    elif origin is None:
        assert hint in _SIMPLE, f"config fields of type {hint} are not supported"
        if type(value) is hint:
            return value
    raise ValueError(f"{value!r} is not {describe(hint)}")


def _first_of(value: Any, hints: Iterable[Any]) -> Any:
    for hint in hints:
        try:
            return coerce(value, hint)
        except ValueError:
            continue
    raise ValueError(f"{value!r} fits none of its types")


def describe(hint: Any) -> str:
    """Describes in words what a type hint allows: `"one of 'fp4', 'nf4'"`, `"a list (each a string) or null"`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(one) for one in arguments)
    if origin is Literal:
        return "one of " + ", ".join(repr(one) for one in arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"a list (each {describe(arguments[0])})"
        return "a list of " + ", ".join(describe(one) for one in arguments)
    if origin in _MAPPINGS:
        return "an object" if arguments[1] is Any else f"an object (each {describe(arguments[1])})"
    return "plain data" if hint is Any else _SIMPLE.get(hint, str(hint))


def did_you_mean(word: Any, known: Iterable[str]) -> str:
    """Returns `"Did you mean 'nf4'?"`, or the empty string if nothing known is near."""
    by_folded = {name.lower(): name for name in sorted(known)}
    near = difflib.get_close_matches(str(word).lower(), by_folded, n=3, cutoff=0.6)
    return f"Did you mean {' or '.join(repr(by_folded[name]) for name in near)}?" if near else ""


def is_json_source(given: Any) -> bool:
    """Returns True for a JSON file or JSON text: a `Path`, a string that ends in `.json` or starts with `{`."""
    return isinstance(given, Path) or (
        isinstance(given, str) and (given.endswith(".json") or given.lstrip().startswith("{"))
    )


def read_json(source: str | Path) -> dict[str, Any]:
    """Reads the object in a JSON file or in JSON text; raises `InputError` if there is none."""
    is_text = isinstance(source, str) and source.lstrip().startswith("{")
    place = "quantization_config" if is_text else str(source)
    try:
        document = parse_json(str(source) if is_text else read_file(source, CONFIG_BYTES))
    except OSError as error:
        raise InputError.one(place, f"cannot be read ({error.strerror})", "Give the path of a JSON file.") from error
    except ValueError as error:
        raise InputError.one(
            place, f"is not JSON ({error})", "Give one JSON object of configuration fields."
        ) from error
    if not isinstance(document, Mapping):
        raise InputError.one(
            place, f"holds a JSON {type(document).__name__}", "Give one JSON object of configuration fields."
        )
    return dict(document)


def torch_dtype(name: str) -> torch.dtype:
    """Returns the torch dtype of a field's spelling, `"bfloat16"` or `"torch.bfloat16"`. Imports torch."""
    import torch

    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        known = [key for key in dir(torch) if isinstance(getattr(torch, key), torch.dtype)]
        raise InputError.one("dtype", f"unknown torch dtype {name!r}", did_you_mean(name, known) or "Try 'bfloat16'.")
    return dtype
