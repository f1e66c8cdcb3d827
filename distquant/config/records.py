"""Dataclasses inside a configuration: read from nested objects as strictly as the configuration itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from distquant.config.values import coerce, describe, did_you_mean, hints_of
from distquant.errors import Problems

Record = TypeVar("Record")


def read_record(cls: type[Record], given: Any, path: str, problems: Problems) -> Record | None:
    """Reads a dataclass from an object; returns None after adding to `problems`, under the name `path`."""
    if not isinstance(given, Mapping):
        problems.add(path, f"{given!r} is not allowed", "Give an object.")
        return None
    declared = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    hints, before, values = hints_of(cls), len(list(problems)), {}
    for key, value in given.items():
        if key not in declared:
            fix = did_you_mean(key, declared) or f"It knows {', '.join(declared)}."
            problems.add(f"{path}.{key}", f"is unknown (given {value!r})", fix)
            continue
        try:
            values[key] = coerce(value, hints[key])
        except ValueError:
            problems.add(f"{path}.{key}", f"{value!r} is not allowed", f"Give {describe(hints[key])}.")
    for name, field in declared.items():
        if name not in given and field.default is MISSING and field.default_factory is MISSING:
            problems.add(f"{path}.{name}", "is missing", f"Give {describe(hints[name])}.")
    return cls(**values) if len(list(problems)) == before else None
