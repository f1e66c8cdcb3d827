"""One process: one device, or several by device map."""

from __future__ import annotations

from typing import Any

import torch

from distquant.accelerator.facts import own_device
from distquant.garbage_collection import without_collector
from distquant.loading.loader import load_shard
from distquant.options import Progress, RunOptions
from distquant.parallel.comm import SoloComm
from distquant.planning import LoadPlan
from distquant.planning.planner import plan_and_open
from distquant.planning.request import Request
from distquant.progress import Viewer, alone, status
from distquant.runtime.measure import measure

NAME = "local"


def device() -> torch.device:
    """Returns the device that a process without others uses."""
    return own_device()


@without_collector()
def load(
    request: Request | LoadPlan,
    options: RunOptions | None = None,
    progress: Progress | None = None,
    viewer: Viewer | None = None,
) -> Any:
    """Plans, unless given a plan, and loads in this process. `viewer`, if given, shows the progress."""
    status("planning")
    own, prepared = device(), None
    if isinstance(request, LoadPlan):
        plan = request
    else:
        plan, prepared = plan_and_open(request, measure(own, request.rank_memory()))
    if viewer is not None:
        progress = alone(viewer)
    return load_shard(plan, SoloComm(), own, options, progress, prepared)
