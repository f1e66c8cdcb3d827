"""Where this process puts each tensor: one device, or what a device map says, the disk included."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distquant.device_map import place_of


class Devices:
    """Places of tensors; keeps what goes to the disk until the model is dispatched."""

    def __init__(self, device: torch.device, device_map: Mapping[str, str] | None):
        self.device, self.device_map = device, device_map
        self.offloaded: dict[str, Any] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def place(self, name: str) -> str:
        """The device map's word for a tensor: its own entry, or that of the nearest parent."""
        if self.device_map is None:
            return str(self.device)
        place = place_of(self.device_map, name)
        assert place is not None, "the planner refuses incomplete device maps"
        return place

    def of(self, name: str) -> torch.device:
        """The device that a tensor is filled on."""
        place = self.place(name)
        return torch.device("cpu" if place == "disk" else place)

    def offload(self, name: str, value: Tensor) -> None:
        """Writes a finished tensor to the disk."""
        from accelerate.utils import offload_weight

        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="distquant-offload-")
        offload_weight(value, name, self._folder.name, self.offloaded)

    def dispatch(self, model: Any) -> None:
        """Installs accelerate's hooks, which move activations (and what is offloaded) between devices."""
        from accelerate import dispatch_model

        given = self.device_map or {}
        places = {k: int(v.removeprefix("cuda:")) if v.startswith("cuda:") else v for k, v in given.items()}
        if len(set(places.values())) > 1 or "disk" in places.values():
            folder = self._folder.name if self._folder else None
            index = self.offloaded or None
            main = next((place for place in places.values() if place not in ("cpu", "disk")), "cpu")
            dispatch_model(model, places, main_device=main, offload_dir=folder, offload_index=index, force_hooks=True)
            model._offload_folder = self._folder  # removed with the model
        model.hf_device_map = places
