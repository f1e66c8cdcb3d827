"""Places of tensors in this process: one device, or the places of a device map, the disk included."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distquant.accelerator.facts import resolved
from distquant.accelerator.names import device_number
from distquant.loading.offload import Offloaded, keep_plain_buffers, place_module, save_offloaded
from distquant.parallel.experts import LocalExperts
from distquant.sharding.device_map import is_offloaded, main_place, place_of


class Devices:
    """Places of tensors; keeps what goes to the disk until the model is dispatched."""

    def __init__(self, device: torch.device, device_map: Mapping[str, str] | None):
        self.device, self.device_map = resolved(device), device_map
        self.offloaded = Offloaded()

    def place(self, name: str) -> str:
        """Returns the device map's entry for a tensor: its own, or that of the nearest parent."""
        if self.device_map is None:
            return str(self.device)
        place = place_of(self.device_map, name)
        assert place is not None, "the planner completes device maps, or rejects them"
        return place

    def of(self, name: str) -> torch.device:
        """Returns the device that a tensor is filled on."""
        place = self.place(name)
        return resolved("cpu" if place == "disk" else place)

    def accelerators(self, names: Iterable[str]) -> list[torch.device]:
        """Returns the devices but the CPU that these tensors are filled on, by number."""
        used = {device for device in map(self.of, names) if device.type != "cpu"}
        return sorted(used, key=lambda device: device.index or 0)

    def is_offloaded(self, name: str) -> bool:
        """Returns True if a tensor is kept elsewhere than where it is used."""
        return self.device_map is not None and is_offloaded(self.device_map, self.place(name))

    def runs_on(self, name: str) -> torch.device:
        """Returns the device that a tensor is used on."""
        if self.device_map is not None and self.is_offloaded(name):
            return resolved(main_place(self.device_map))
        return self.of(name)

    def offload(self, name: str, value: Tensor) -> None:
        """Writes a finished tensor to the disk."""
        self.offloaded.write(name, value)

    def offload_module(self, owner: str, module: nn.Module) -> None:
        """Writes the tensors of a filled module to the disk."""
        place_module(owner, module, self.offloaded)

    def dispatch(self, model: Any, tied: Mapping[str, str]) -> None:
        """Installs accelerate's hooks, which move activations (and what is offloaded) between devices.

        Args:
            model: filled, and complete but for what is on the disk.
            tied: parameters that are another's -> that.
        """
        from accelerate import dispatch_model

        given = self.device_map or {}
        model.hf_device_map = {key: device_number(place) for key, place in given.items()}
        if len(set(given.values())) < 2 and "disk" not in given.values():
            return
        self._hold(model, tied)
        asked = model.hf_device_map
        dispatch_model(
            model,
            {name: device_number(place) for name, place in _flat(model, given).items()},
            main_device=device_number(main_place(given)),
            state_dict=self.offloaded,
            offload_dir=self.offloaded.folder.name if self.offloaded.folder else None,
            offload_index={},  # all there is stands in `state_dict`
            offload_buffers=True,
            preload_module_classes=[LocalExperts.__name__],  # it uses what its stacks hold
            force_hooks=True,
        )
        model.hf_device_map = asked
        keep_plain_buffers(model, self.offloaded)
        if "save_pretrained" not in model.__dict__:
            save_offloaded(model, self.offloaded)
        model._offload_folder = self.offloaded.folder  # removed with the model

    def _hold(self, model: Any, tied: Mapping[str, str]) -> None:
        """Keeps tensors that are offloaded and not on the disk, for the hooks."""
        self.offloaded.tied = tied
        every = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        for name, value in every:
            if not value.is_meta and self.is_offloaded(name):
                self.offloaded.hold(name, value)


def _flat(model: nn.Module, device_map: Mapping[str, str]) -> dict[str, str]:
    """Returns the map without nested entries: accelerate would move all modules to the place of the outer one."""
    outer = {name.rpartition(".")[0] for name in device_map if name}
    while more := {name.rpartition(".")[0] for name in outer if name} - outer:
        outer |= more
    found: dict[str, str] = {}

    def add(name: str, module: nn.Module) -> None:
        place = place_of(device_map, name)
        if name not in outer:
            found.update({name: place} if place is not None else {})
            return
        prefix = f"{name}." if name else ""
        for child, inner in module.named_children():
            add(prefix + child, inner)
        for leaf in (*module._parameters, *module._buffers):
            if (here := place_of(device_map, prefix + leaf)) is not None:
                found[prefix + leaf] = here

    add("", model)
    return found
