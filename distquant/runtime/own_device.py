"""The device that a rank takes, and the proof that no two ranks take the same.

NCCL refuses two ranks on one device, but only in the first collective, with an error that names no rank. Over gloo, or
where a group has other ranks only, nothing refuses: both fill the same memory.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import NamedTuple

import torch

from distquant.accelerator import facts
from distquant.errors import Problems

SHARED = "DISTQUANT_SHARE_DEVICES"
"""Environment variable: `1` lets several ranks take one device, and run its collectives over gloo. For tests."""

VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK", "ASCEND_RT_VISIBLE_DEVICES")
"""Environment variables by which vendors choose the devices that a process sees; an empty one hides all."""


class Place(NamedTuple):
    """A rank's host and device, in a form that other ranks can compare."""

    host: str
    device: str
    """`cpu`, or the device as this process numbers it."""
    identity: str | None = None
    """Of the device itself, whatever a process may call it; None where it has none, or where it is the CPU."""


def is_shared() -> bool:
    """Returns True if the user lets ranks share devices."""
    return os.environ.get(SHARED, "") == "1"


def hide_devices() -> None:
    """Hides all devices from this process, which must not have used any."""
    os.environ.update(dict.fromkeys(VISIBLE_DEVICES, ""))


def number_on_node(rank: int, nodes: Sequence[int]) -> int:
    """Returns a rank's number among the ranks of its node.

    That is `LOCAL_RANK`, as torchrun sets it; else `SLURM_LOCALID`, if each of Slurm's tasks is a rank; else its place
    among the ranks that are on the same node.

    Args:
        rank: this one.
        nodes: the node of every rank.
    """
    local = os.environ.get("LOCAL_RANK", "").strip()
    if local.isdigit():
        return int(local)
    local = os.environ.get("SLURM_LOCALID", "").strip()
    if local.isdigit() and os.environ.get("SLURM_STEP_NUM_TASKS", "").strip() == str(len(nodes)):
        return int(local)
    return nodes[:rank].count(nodes[rank])


def take_device(number: int) -> torch.device:
    """Returns the device for a rank's number on its node, and makes it the current one; the CPU where there is none.

    A launcher may show each rank one device only, or fewer than there are ranks: numbers start again at the first.
    Whether ranks then share a device is for `check_places` to say.
    """
    count = facts.device_count()
    return facts.select(number % count) if count else facts.CPU


def place_of(device: torch.device) -> Place:
    """Returns the place to tell the other ranks."""
    return Place(socket.gethostname(), str(device), _identity(device))


def _identity(device: torch.device) -> str | None:
    """Returns the device's UUID, or its place on the PCI bus; of a part of a GPU (MIG), the part's own."""
    if device.type == "cpu":
        return None
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if shown[0].startswith("MIG-"):  # a process sees one part only; the GPU's own names are the same for all parts
        return shown[0]
    properties = torch.get_device_module(device).get_device_properties(device.index)
    if (uuid := getattr(properties, "uuid", None)) is not None:
        return str(uuid)
    if not hasattr(properties, "pci_bus_id"):
        return None
    numbers = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}"
    return f"{socket.gethostname()} PCI {numbers}"  # other hosts have devices at the same place


def check_places(places: Sequence[Place]) -> None:
    """Checks that each rank has a device of its own, and that all are of one kind.

    Args:
        places: of all ranks, the same on every rank.

    Raises:
        InputError: names the ranks that share a device, and those without one.
    """
    problems, ranks = Problems(), dict[str, list[int]]()
    for rank, place in enumerate(places):
        if place.identity is not None:
            ranks.setdefault(place.identity, []).append(rank)
    if not is_shared():
        for identity, sharing in ranks.items():
            if len(sharing) > 1:
                host, device, _ = places[sharing[0]]
                fault = f"ranks {_listed(sharing)} all take {device} of {host} ({identity})"
                fix = (
                    "Start one rank for each device, and tell each its number on its node in LOCAL_RANK, as torchrun "
                    f"does; {SHARED}=1 lets ranks share a device, for tests"
                )
                problems.add("devices", fault, fix)
    kinds: dict[str, list[int]] = {}
    for rank, place in enumerate(places):
        kinds.setdefault(place.device.partition(":")[0], []).append(rank)
    if len(kinds) > 1:
        fault = "; ".join(
            f"{kind}: {'rank' if len(of) == 1 else 'ranks'} {_listed(of)} ({places[of[0]].host})"
            for kind, of in kinds.items()
        )
        fix = "Run `distquant doctor` on the hosts without a GPU, or hide all (CUDA_VISIBLE_DEVICES=) to use CPUs"
        problems.add("devices", f"ranks have devices of different kinds ({fault})", fix)
    problems.raise_if_any()


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks)) if len(ranks) <= 8 else f"{', '.join(map(str, ranks[:8]))}, ..."
