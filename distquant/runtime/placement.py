"""Places Ray workers: in a placement group made for a load, or one that the caller has."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from distquant.errors import InputError

EVERY = 2.0
"""Seconds between two looks of a reaper."""


@dataclass(frozen=True)
class Resources:
    """Resources that one worker asks of Ray."""

    cpus: float = 1
    gpus: float | None = None
    """GPUs; None: one where the cluster (or the given placement group) has any. Workers without see none."""

    def bundle(self) -> dict[str, float]:
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})

    def with_gpus(self, automatic: float) -> Resources:
        """Returns the resources with a number of GPUs: the user's, if there is one."""
        return self if self.gpus is not None else replace(self, gpus=automatic)


@dataclass(frozen=True)
class Placement:
    """Bundles of a placement group, one for each rank.

    Attributes:
        group: the placement group.
        bundles: index of each rank's bundle; several ranks may share one.
        resources: of one worker.
        given: True if the caller made the group, and will remove it.
    """

    group: PlacementGroup
    bundles: tuple[int, ...]
    resources: Resources
    given: bool

    @property
    def own(self) -> PlacementGroup | None:
        """The group, if it ends with the model."""
        return None if self.given else self.group

    def strategy(self, rank: int) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=self.bundles[rank])


def place(world: int, resources: Resources | None, given: PlacementGroup | None, timeout: float) -> Placement:
    """Finds or makes bundles for `world` workers.

    Args:
        world: ranks.
        resources: of one worker; None: the default ones.
        given: the caller's group.
        timeout: seconds that a group may take to be scheduled.

    Raises:
        InputError: there are too few resources.
    """
    if given is not None:
        return _of_given(given, world, resources, timeout)
    resources = (resources or Resources()).with_gpus(1 if ray.cluster_resources().get("GPU") else 0)
    group = placement_group([resources.bundle()] * world, strategy="PACK")
    if group.wait(timeout):
        return Placement(group, tuple(range(world)), resources, given=False)
    have, need = ray.available_resources(), resources.bundle()
    remove_placement_group(group)
    fix = "Free or add resources, use a smaller mesh, or ask for less per worker"
    if ray.util.get_current_placement_group() is not None:
        fix += "; or use those of this task, with placement_group=ray.util.get_current_placement_group()"
    shortage = [f"{name}: {amount * world:g} needed, {have.get(name, 0):g} free" for name, amount in need.items()]
    raise InputError.one(
        "ray",
        f"{world} workers of {need} could not be scheduled within {timeout:g} s ({'; '.join(shortage)})",
        fix,
    )


def _of_given(group: PlacementGroup, world: int, resources: Resources | None, timeout: float) -> Placement:
    if not group.wait(timeout):
        fault = f"the given group was not scheduled within {timeout:g} s"
        raise InputError.one("placement_group", fault, "Wait until it is ready (pg.ready()), or add resources")
    gpus = 1 if any(bundle.get("GPU", 0) >= 1 for bundle in group.bundle_specs) else 0
    # Bundles are often of GPUs alone.
    own = [resources.with_gpus(gpus)] if resources is not None else []
    asked = own or [Resources(gpus=gpus), Resources(0, gpus)][: 1 + gpus]
    for each in asked:
        slots = list(_slots(group, each))
        if len(slots) >= world:
            # The last ones: the first may hold the caller, as it does in a replica of Serve.
            return Placement(group, tuple(slots[-world:]), each, given=True)
    fault = f"its bundles {group.bundle_specs} have room for {len(slots)} workers of {asked[-1].bundle()}"
    raise InputError.one("placement_group", f"{fault}, {world} are needed", "Give it a bundle for each rank")


def _slots(group: PlacementGroup, resources: Resources) -> Iterator[int]:
    """Yields the index of each bundle, as often as it has room for a worker."""
    for index, bundle in enumerate(group.bundle_specs):
        need = {name: amount for name, amount in resources.bundle().items() if amount}
        yield from [index] * min((int(bundle.get(name, 0) / amount) for name, amount in need.items()), default=0)


def check_started(placement: Placement, workers: list[Any], timeout: float) -> None:
    """Waits for workers in a given group, whose bundles others may use.

    Raises:
        InputError: some did not start within `timeout` seconds.
    """
    if not placement.given:
        return
    _, late = ray.wait([worker.node.remote() for worker in workers], num_returns=len(workers), timeout=timeout)
    if late:
        fault = f"{len(late)} of {len(workers)} workers did not start in its bundles within {timeout:g} s"
        raise InputError.one("placement_group", fault, "Give it bundles that nothing else uses, one for each rank")


def remove_after(placement: Placement, names: list[str]) -> None:
    """Removes a group of our own when its workers have ended, also if their owner is gone by then.

    Workers end with their owner. A placement group stays until the *job* ends, so in a task or an actor (a replica of
    Serve that restarts, say) its resources would be lost. A driver ends with its job, and needs nothing.

    Args:
        placement: of the workers.
        names: of the workers, as Ray knows them.
    """
    if placement.given or ray.get_runtime_context().worker.mode != ray.WORKER_MODE:
        return
    # `DEFAULT`: not in the caller's group, which may capture its children and has no room for them.
    options = {"num_cpus": 0, "lifetime": "detached", "max_restarts": -1, "scheduling_strategy": "DEFAULT"}
    reaper: Any = ray.remote(Reaper)
    reaper.options(**options).remote(placement.group, names)


class Reaper:
    """A Ray actor that removes a placement group when all workers in it have ended, and then ends itself."""

    def __init__(self, group: PlacementGroup, names: list[str]):
        self._group = group
        # Handles by name are weak. Any other would keep the workers, and so their owner, from ending.
        self._workers = []
        for name in names:
            with suppress(ValueError):  # it has ended already
                self._workers.append(ray.get_actor(name))
        threading.Thread(target=self._reap, daemon=True).start()

    def _reap(self) -> None:
        for worker in self._workers:
            with suppress(ray.exceptions.RayError):
                while True:
                    ray.get(worker.alive.remote())
                    time.sleep(EVERY)
        remove_placement_group(self._group)
        ray.kill(ray.get_runtime_context().current_actor)
