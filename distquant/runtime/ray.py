"""Ray workers: a placement group with one actor a device, joined by NCCL or gloo. The only module that imports ray.

The driver plans once without a device (so that most mistakes cost no worker), lets the actors measure their devices,
plans with those facts, and has every actor load its shard. One rank's failure ends all of them with its message.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from distquant.api import Model, _rank_memory
from distquant.checks import refuse_unsupported
from distquant.coordinator import make_plan
from distquant.errors import DistquantError, InputError, RankError
from distquant.facts import Facts
from distquant.mesh import Mesh
from distquant.options import Options, Seen
from distquant.planning import LoadPlan
from distquant.quiet import quiet_imports
from distquant.request import DEFAULT_STAGING, Request
from distquant.runtime.job import Job, Outcome
from distquant.runtime.measure import numbered, packages, refuse_crowd

NAME = "ray"

SCHEDULE_TIMEOUT = 60.0
"""Seconds that a placement group may take to be scheduled."""

POLL = 0.2
"""Seconds between looks at the workers."""

GRACE = 5.0
"""Seconds in which the rank behind a broken connection is looked for."""

LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
"""How gloo and NCCL tell that another rank is gone."""

Progress = Callable[[list[Seen]], None]
"""Called with how far every rank is."""


@dataclass(frozen=True)
class Resources:
    """What one worker asks of Ray."""

    cpus: float = 1
    gpus: float = 0

    def bundle(self) -> dict[str, float]:
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})


class Worker:
    """One rank; runs as a Ray actor with two threads, so that progress can be asked for while it loads."""

    def __init__(self, rank: int, world: int, threads: int):
        import torch

        quiet_imports()
        torch.set_num_threads(threads)
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        self.rank, self.world, self.seen, self.model = rank, world, Seen(), None

    def address(self) -> str:
        """`tcp://` address at which rank 0 can be met."""
        ip = ray.util.get_node_ip_address()
        with socket.socket() as free:
            free.bind((ip, 0))
            return f"tcp://{ip}:{free.getsockname()[1]}"

    def node(self) -> str:
        from distquant.runtime.measure import node_name

        return node_name()

    def facts(self, max_memory: int | None, nodes: tuple[int, ...]) -> Facts:
        from distquant.runtime import local as one
        from distquant.runtime.measure import measure

        return measure(one.device(), max_memory, nodes, self.rank)

    def load(self, plan: str, url: str, options: Options) -> None:
        from distquant.loader import load_shard
        from distquant.runtime import local as one
        from distquant.runtime import process_group

        loaded = LoadPlan.from_json(plan)
        process_group.init(self.rank, self.world, url, options.timeout)
        comm = process_group.GroupComm(loaded.mesh, options.timeout)
        self.model = load_shard(loaded, comm, one.device(), options, self._progress)

    def _progress(self, seen: Seen) -> None:
        self.seen = seen

    def progress(self) -> Seen:
        return self.seen

    def perform(self, job: Job) -> Outcome:
        from distquant.runtime.job import perform

        return perform(self.model, job, NAME)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(self.model, *args, **kwargs)


class Sharded:
    """A model that lives on Ray workers. Use as a context manager, or `close` it."""

    def __init__(self, plan: LoadPlan, workers: list[Any], group: PlacementGroup, started_ray: bool):
        self.plan, self._workers, self._group, self._started_ray = plan, workers, group, started_ray

    def __enter__(self) -> Sharded:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def perform(self, job: Job) -> Outcome:
        """Does a job on all workers."""
        return self._everywhere("perform", job)[0]

    def generate(self, prompt: str, **kwargs: Any) -> str:
        """Prompt and continuation; keyword arguments go to `generate` of transformers.

        Raises:
            RankError: ranks did not agree on the tokens.
        """
        from distquant.runtime.job import generate

        answers = self.call(generate, prompt, **kwargs)
        for rank, answer in enumerate(answers):
            if answer != answers[0]:
                raise RankError(rank, f"generated {answer!r}, rank 0 {answers[0]!r}")
        return answers[0]

    def perplexity(self, text: str, window: int = 256) -> float:
        """Perplexity of `text`, see `distquant.perplexity`."""
        value = self.perform(Job(text=text, window=window, fingerprint=False)).perplexity
        assert value is not None
        return value

    def fingerprint(self) -> str:
        """The fingerprint of the whole model."""
        return self.report()["fingerprint"]

    def report(self) -> dict[str, Any]:
        """The JSON report of the load, fingerprint included."""
        return self.perform(Job()).report

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """`function(model, *args, **kwargs)` on every worker (a training step, say); results in rank order."""
        return self._everywhere("call", function, *args, **kwargs)

    def _everywhere(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        return gather([getattr(worker, method).remote(*args, **kwargs) for worker in self._workers])

    def close(self) -> None:
        """Ends the workers, gives back their resources, and stops Ray if this load started it."""
        stop(self._workers, self._group, self._started_ray)
        self._workers = []


def gather(futures: list[Any], tick: Callable[[], None] | None = None) -> list[Any]:
    """Results in rank order; a failure is raised at once, as the error of the rank that caused it.

    A rank that only lost its peer may be heard first, so the peer's own end is awaited for a moment.
    """
    pending = {future: rank for rank, future in enumerate(futures)}
    results: dict[int, Any] = {}
    lost: dict[int, DistquantError] = {}
    deadline = math.inf
    while pending and time.monotonic() < deadline:
        ready, _ = ray.wait(list(pending), timeout=POLL)
        for future in ready:
            rank = pending.pop(future)
            try:
                results[rank] = ray.get(future)
            except ray.exceptions.RayError as error:
                failure = _failure(rank, error)
                if not any(sign in str(failure) for sign in LOST_PEER):
                    raise failure from None
                lost[rank] = failure
                deadline = min(deadline, time.monotonic() + GRACE)
        if tick is not None:
            tick()
    if lost:
        raise lost[min(lost)]
    return [results[rank] for rank in range(len(futures))]


def _failure(rank: int, error: ray.exceptions.RayError) -> DistquantError:
    """What a worker's end is told as: its own message where it is one of ours."""
    if not isinstance(error, ray.exceptions.RayTaskError):
        return RankError(rank, str(error).strip().splitlines()[0])
    cause = error.cause
    return cause if isinstance(cause, DistquantError) else RankError(rank, f"{type(cause).__name__}: {cause}")


def stop(workers: list[Any], group: PlacementGroup | None, started_ray: bool) -> None:
    """Ends workers and placement group, and Ray itself where this process started it."""
    for worker in workers:
        ray.kill(worker)
    if group is not None and ray.is_initialized():
        remove_placement_group(group)
    if started_ray:
        ray.shutdown()


def load(
    model: Model,
    *,
    quantization_config: Any = None,
    mesh: str | Mesh | None = None,
    max_memory: str | int | None = None,
    dtype: Any = "auto",
    staging: str | int = DEFAULT_STAGING,
    dispatch: str = "all_reduce",
    on_unsupported: str = "error",
    trust_remote_code: bool = False,
    revision: str | None = None,
    resources: Resources | None = None,
    threads: int = 1,
    schedule_timeout: float = SCHEDULE_TIMEOUT,
    kernel: str = "auto",
    forward: str = "auto",
    io: str = "auto",
    trace: str | os.PathLike[str] | None = None,
    timeout: float | None = None,
    progress: Progress | None = None,
) -> Sharded:
    """Loads a model onto Ray workers, one for each rank of the mesh.

    Joins the Ray that is running (or that RAY_ADDRESS names), and starts a local one without a dashboard otherwise.

    Args:
        model: and the arguments up to `revision`: as in `distquant.plan`.
        resources: what one worker asks for; None: one CPU, and one GPU where the cluster has any.
        threads: torch threads of a worker.
        schedule_timeout: seconds until a placement group that cannot be scheduled is given up.
        kernel, forward, io, trace, timeout: as in `distquant.load`; the worker of rank 0 writes the trace.
        progress: called with how far every rank is.

    Raises:
        InputError: with every problem; also where the cluster lacks what the mesh needs.
        RankError: a worker failed or died; the others have been ended.
    """
    request = Request(
        model=os.path.abspath(model) if os.path.isdir(model) else model,
        quantization_config=quantization_config,
        mesh=mesh,
        max_memory=max_memory,
        dtype=dtype,
        staging=staging,
        dispatch=dispatch,
        on_unsupported=on_unsupported,
        trust_remote_code=trust_remote_code,
        revision=revision,
    )
    written = None if trace is None else os.path.abspath(trace)
    options = Options(kernel=kernel, forward=forward, io=io, trace=written, timeout=timeout)
    memory = _rank_memory(max_memory)
    source = "max_memory" if memory is not None else "unknown"
    first = make_plan(request, Facts(memory=memory, memory_source=source, packages=packages()))
    refuse_unsupported(first)
    world = first.mesh.size
    started_ray = _start(world)
    workers: list[Any] = []
    group = None
    try:
        resources = resources or Resources(gpus=1 if ray.cluster_resources().get("GPU") else 0)
        group = _reserve(world, resources, schedule_timeout)
        workers = _workers(world, resources, group, threads)
        plan = _plan(request, workers, memory)
        url = ray.get(workers[0].address.remote())
        text = plan.to_json()
        tick = (lambda: progress(_seen(workers))) if progress is not None else None
        gather([worker.load.remote(text, url, options) for worker in workers], tick)
        return Sharded(plan, workers, group, started_ray)
    except BaseException:
        stop(workers, group, started_ray)
        raise


def _start(world: int) -> bool:
    """Starts a local Ray unless one runs or is named; whether it did."""
    if ray.is_initialized():
        return False
    local = not os.environ.get("RAY_ADDRESS")
    if local:
        refuse_crowd(world)
    arguments: dict[str, Any] = {"include_dashboard": False, "num_cpus": world} if local else {}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(logging_level=logging.ERROR, log_to_driver=False, configure_logging=False, **arguments)
    return True


def _reserve(world: int, resources: Resources, timeout: float) -> PlacementGroup:
    group = placement_group([resources.bundle()] * world, strategy="PACK")
    if group.wait(timeout):
        return group
    have, need = ray.available_resources(), resources.bundle()
    remove_placement_group(group)
    short = [f"{name}: {amount * world:g} needed, {have.get(name, 0):g} free" for name, amount in need.items()]
    raise InputError.one(
        "ray",
        f"{world} workers of {need} could not be scheduled within {timeout:g} s ({'; '.join(short)})",
        "Free or add resources, use a smaller mesh, or ask for less per worker",
    )


def _workers(world: int, resources: Resources, group: PlacementGroup, threads: int) -> list[Any]:
    actor = ray.remote(Worker)
    made = []
    for rank in range(world):
        strategy = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=rank)
        options = actor.options(
            num_cpus=resources.cpus, num_gpus=resources.gpus, max_concurrency=2, scheduling_strategy=strategy
        )
        made.append(options.remote(rank, world, threads))
    return made


def _plan(request: Request, workers: list[Any], max_memory: int | None) -> LoadPlan:
    """The plan with what the workers measured; the weakest device counts."""
    nodes = numbered(gather([worker.node.remote() for worker in workers]))
    facts = gather([worker.facts.remote(max_memory, nodes) for worker in workers])
    weakest = min(facts, key=lambda f: (f.capability or (0, 0), f.memory or 0))
    return make_plan(request, weakest)


def _seen(workers: list[Any]) -> list[Seen]:
    try:
        return ray.get([worker.progress.remote() for worker in workers], timeout=1)
    except (ray.exceptions.RayError, TimeoutError):
        time.sleep(POLL)
        return []
