"""Reads device maps: path -> place, and the place of the nearest parent where a path has no entry of its own."""

from __future__ import annotations

from collections.abc import Mapping


def place_of(device_map: Mapping[str, str], name: str) -> str | None:
    """Returns where a device map puts a module or parameter; None where it has no entry."""
    while True:
        if name in device_map:
            return device_map[name]
        if not name:
            return None
        name = name.rpartition(".")[0]


def main_place(device_map: Mapping[str, str]) -> str:
    """Returns where offloaded weights are used: the first place that is a device with its own memory, else the CPU."""
    return next((place for place in device_map.values() if place not in ("cpu", "disk")), "cpu")


def is_offloaded(device_map: Mapping[str, str], place: str) -> bool:
    """Returns True if weights in a place are moved for each forward: on disk, or on the CPU beside other devices."""
    return place == "disk" or (place == "cpu" and main_place(device_map) != "cpu")
