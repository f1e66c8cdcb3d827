"""How a device map is read: path -> place, and the nearest parent's where a path has no entry of its own."""

from __future__ import annotations

from collections.abc import Mapping


def place_of(device_map: Mapping[str, str], name: str) -> str | None:
    """Where a device map puts a module or parameter; None where it says nothing."""
    while True:
        if name in device_map:
            return device_map[name]
        if not name:
            return None
        name = name.rpartition(".")[0]
