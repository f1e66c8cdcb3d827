"""The old name of `distquant.sharding.layout`, for one release; `Component` takes its old keywords, too."""

from __future__ import annotations

from typing import Any

from distquant.old_names import warn_old_name
from distquant.sharding import layout

_UNCHANGED = ("ALL", "DTYPE_BYTES", "PLAIN_STEPS", "Layout", "plain")

KEYWORDS = {
    "spans": "block_shape",
    "words": "stored_per_block",
    "turned": "transposed",
    "cuts": "preferred_alignments",
    "gathered": "replicated",
}
"""Keywords of `Component` up to 0.1 -> their names now."""


def _component(**fields: Any) -> layout.Component:
    """Makes a component of old and new keywords."""
    for old in KEYWORDS.keys() & fields.keys():
        warn_old_name(f"Component({old}=...)", f"Component({KEYWORDS[old]}=...)")
    return layout.Component(**{KEYWORDS.get(name, name): value for name, value in fields.items()})


def __getattr__(name: str) -> Any:
    if name not in (*_UNCHANGED, "Component"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warn_old_name(f"distquant.layout.{name}", f"distquant.sharding.layout.{name}")
    return _component if name == "Component" else getattr(layout, name)
