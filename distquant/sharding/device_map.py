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


def main_place(device_map: Mapping[str, str]) -> str:
    """Where what is offloaded is used: the first place that is a device with memory of its own, else the CPU."""
    return next((place for place in device_map.values() if place not in ("cpu", "disk")), "cpu")


def is_offloaded(device_map: Mapping[str, str], place: str) -> bool:
    """Whether what lies in a place is moved for each forward: on the disk, or on the CPU beside other devices."""
    return place == "disk" or (place == "cpu" and main_place(device_map) != "cpu")
