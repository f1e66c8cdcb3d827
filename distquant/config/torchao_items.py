"""The types inside a serialized torchao configuration: objects with `_type`, `_version` and `_data`, in one another.

Written by torchao's `config_to_dict`. Each field that is read later is checked here, wherever it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from distquant.errors import Problem


def _name(value: Any) -> bool:
    """Returns True for a name, or a serialized enum member or dtype."""
    return isinstance(value.get("_data") if isinstance(value, Mapping) else value, str)


def _integer(value: Any) -> bool:
    return type(value) is int


def _integers(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_integer, value))


def _granularity(value: Any) -> bool:
    parts = value if isinstance(value, tuple) else (value,)
    return bool(parts) and all(isinstance(part, Mapping) and isinstance(part.get("_type"), str) for part in parts)


_Rule = tuple[Callable[[Any], bool], str]
_NAME: _Rule = (_name, "a name, or an object with one under _data")
_GRANULARITY: _Rule = (_granularity, "an object with _type and _data, or a list of such")

FIELDS: Mapping[str, _Rule] = {
    **dict.fromkeys(("group_size", "axis", "dim"), (_integer, "an integer")),
    "block_size": (_integers, "two integers"),
    **dict.fromkeys(
        (
            *("weight_dtype", "activation_dtype", "scale_dtype", "mapping_type", "weight_mapping_type"),
            *("act_mapping_type", "intx_choose_qparams_algorithm", "intx_packing_format"),
        ),
        _NAME,
    ),
    **dict.fromkeys(("granularity", "weight_granularity", "act_granularity"), _GRANULARITY),
    "_type": (lambda value: isinstance(value, str), "the name of a class"),
    "_version": (_integer, "an integer"),
}
"""Field -> a test of its value, and what it takes in words."""

NEEDED = {"PerGroup": "group_size", "PerBlock": "block_size"}
"""Granularity -> the field that it cannot do without."""

OF_MODULES = ("fqn_to_config", "module_fqn_to_config")
"""Fields that map modules to configurations."""


def item_problems(value: Any, path: str) -> Iterator[Problem]:
    """Yields the fields of wrong types in frozen data; `path` is the place of `value`."""
    if isinstance(value, tuple):
        for number, part in enumerate(value):
            yield from item_problems(part, f"{path}[{number}]")
    if not isinstance(value, Mapping):
        return
    needed = NEEDED.get(value["_type"]) if isinstance(value.get("_type"), str) else None
    fields = value.get("_data")
    if needed and not (isinstance(fields, Mapping) and needed in fields):
        yield Problem(path, f"{value['_type']} has no {needed}", f"Give it {FIELDS[needed][1]}.")
    for key, part in value.items():
        test, words = FIELDS.get(key, (lambda _: True, ""))
        if part is not None and not test(part):
            yield Problem(f"{path}.{key}", f"{part!r} is not allowed", f"Give {words}.")
        elif key in OF_MODULES:
            yield from _of_modules(part, f"{path}.{key}")
        else:
            yield from item_problems(part, f"{path}.{key}")


def _of_modules(value: Any, path: str) -> Iterator[Problem]:
    """Yields the problems of a map of modules to configurations, of which null leaves a module as it is."""
    if not isinstance(value, Mapping):
        yield Problem(path, f"{value!r} is not allowed", "Give an object: a configuration for each module.")
        return
    for name, own in value.items():
        if own is None:
            continue
        if not isinstance(own, Mapping) or "_type" not in own or not isinstance(own.get("_data", {}), Mapping):
            fix = "Give an object with _type, _version and _data."
            yield Problem(f"{path}.{name}", f"{own!r} is not a serialized torchao configuration", fix)
        else:
            yield from item_problems(own, f"{path}.{name}")
