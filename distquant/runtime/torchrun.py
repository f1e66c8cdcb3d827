"""Ranks started by torchrun or any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from distquant.errors import InputError, RankError
from distquant.garbage_collection import without_collector
from distquant.loading.loader import load_shard
from distquant.options import Progress, RunOptions
from distquant.parallel.comm import DEFAULT_TIMEOUT
from distquant.planning import LoadPlan
from distquant.planning.arguments import check_world
from distquant.planning.planner import plan_and_open
from distquant.planning.prepared import Prepared, open_early
from distquant.planning.request import Request
from distquant.progress import Viewer, status
from distquant.runtime import heartbeat, process_group
from distquant.runtime.collectives import collect, share, silent_ranks_named
from distquant.runtime.measure import measure, node_name, numbered, weakest
from distquant.runtime.meeting import Meeting, meet
from distquant.runtime.own_device import Place, check_places, number_on_node, place_of, take_device
from distquant.runtime.shared_progress import SharedProgress
from distquant.sharding.mesh import Mesh

NAME = "torchrun"


@without_collector()
def load(
    request: Request | LoadPlan,
    options: RunOptions | None = None,
    progress: Progress | None = None,
    viewer: Viewer | None = None,
) -> Any:
    """Plans on rank 0, shares the plan or its problems, and loads this rank's part.

    Initializes the default process group unless it exists. A `viewer` of rank 0 shows the progress of all ranks.
    """
    status("waiting for the other ranks")
    options = options or RunOptions()
    timeout = options.timeout
    meeting = None if dist.is_initialized() else meet(timeout, options.interface)
    with heartbeat.beating(meeting, DEFAULT_TIMEOUT if timeout is None else timeout), silent_ranks_named():
        everyone = _join(meeting, timeout)
        nodes = numbered(collect(node_name(), everyone))
        own = take_device(number_on_node(dist.get_rank(), nodes))
        check_places([Place(*place) for place in collect(tuple(place_of(own)), everyone)])
        shared = SharedProgress(viewer)  # on every rank, so that ranks count their loads alike
        status("planning")
        plan, prepared = (request, None) if isinstance(request, LoadPlan) else agree(request, own, nodes, everyone)
        check_world(plan.mesh, dist.get_world_size())
        comm = process_group.GroupComm(plan.mesh, timeout, everyone)
        return load_shard(plan, comm, own, options, progress or shared, prepared)


def _join(meeting: Meeting | None, timeout: float | None) -> dist.ProcessGroup | None:
    """Joins the default group unless it exists; returns a group to use in its place if it is the caller's.

    None stands for the default group. The caller's may have another timeout, or no way for tensors of the CPU.

    Raises:
        InputError: ranks were given different timeouts.
    """
    if meeting is not None:
        process_group.init(meeting, timeout)
        return None
    everyone = process_group.for_host_tensors()
    given = collect(timeout, everyone)
    if any(one != given[0] for one in given):
        fault = f"ranks were given different values ({', '.join(str(one) for one in given)})"
        raise InputError.one("timeout", fault, "Give all ranks the same")
    return everyone if timeout is None else process_group.make_group(None, timeout)


def agree(
    request: Request, own: torch.device, nodes: tuple[int, ...], everyone: dist.ProcessGroup | None = None
) -> tuple[LoadPlan, Prepared | None]:
    """Returns rank 0's plan on every rank, or raises its error; also returns what this rank has already opened.

    Args:
        request: to plan.
        own: this rank's device.
        nodes: the node of each rank.
        everyone: a group of all ranks; None: the default group.
    """
    outcome: Any = None
    measured = collect(measure(own, request.rank_memory(), nodes, dist.get_rank(), _mesh(request)), everyone)
    if dist.get_rank() != 0:
        prepared = open_early(request)
    else:
        try:
            plan, prepared = plan_and_open(request, weakest(measured))
            outcome = plan.to_json()
        except InputError as error:
            outcome = error
        except Exception as error:  # the others must not wait for a plan that never comes
            share(RankError(0, f"{type(error).__name__}: {error}"), everyone)
            raise
    outcome = share(outcome, everyone)
    if isinstance(outcome, Exception):
        raise outcome
    plan = LoadPlan.from_json(outcome)
    return plan, prepared if prepared is not None and prepared.fits(plan, request) else None


def _mesh(request: Request) -> Mesh:
    """Returns the mesh that is asked for; one rank for one that the plan will refuse."""
    try:
        return Mesh.parse(request.mesh)
    except InputError:
        return Mesh()
