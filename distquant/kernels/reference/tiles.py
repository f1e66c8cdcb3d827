"""Sizes of the tiles that the reference works on at once: the best one depends on the device."""

from __future__ import annotations

import torch

TILE = 1 << 18
"""Elements on a CPU: a tile and what is computed of it stay in the cache."""

DEVICE_TILE = 1 << 22
"""Elements on other devices: enough to fill one with every operation, and 16 MiB for each float32 in between."""


def at_once(device: torch.device) -> int:
    """Returns the number of elements of a tile on `device`."""
    return TILE if device.type == "cpu" else DEVICE_TILE
