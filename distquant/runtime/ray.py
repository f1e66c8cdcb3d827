"""Ray workers: a placement group with one actor a device, joined by NCCL or gloo.

The driver plans once without a device, so that most mistakes cost no worker. Then the actors measure their devices, the
driver plans with these facts, and every actor loads its shard. One rank's failure ends all of them with its message.
"""

from __future__ import annotations

import functools
import logging
import os
import queue
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import ray
from ray._private import ray_constants
from ray.util.placement_group import PlacementGroup

from distquant import activity
from distquant.environment import Environment, rank_threads
from distquant.errors import InputError, LostPeerError
from distquant.options import Aliases, LoadProgress, Model, RunOptions
from distquant.parallel.comm import DEFAULT_TIMEOUT
from distquant.planning import LoadPlan
from distquant.planning.arguments import read_arguments
from distquant.planning.planner import make_plan
from distquant.planning.request import Request
from distquant.planning.validation import check_supported
from distquant.progress import showing, status
from distquant.quiet import quiet_imports
from distquant.runtime.answer import Answer
from distquant.runtime.gathering import POLL, gather
from distquant.runtime.measure import check_rank_count, declared, numbered, weakest
from distquant.runtime.own_device import Place, check_places, hide_devices, place_of
from distquant.runtime.placement import Placement, Resources, check_started, place, remove_after
from distquant.runtime.query import Outcome, Query
from distquant.runtime.ray_model import Sharded, stop
from distquant.runtime.ray_watch import Sign, Watch
from distquant.runtime.tokens import Messages
from distquant.sharding.mesh import Mesh

if TYPE_CHECKING:
    from torch.distributed import TCPStore
    from typing_extensions import Unpack

NAME = "ray"

SCHEDULE_TIMEOUT = 60.0
"""Seconds that a placement group may take to be scheduled."""

Progress = Callable[[list[LoadProgress]], None]
"""Called with the progress of every rank."""


class Worker:
    """One rank: a Ray actor that runs one method at a time, and meanwhile answers `progress`."""

    def __init__(self, rank: int, world: int, threads: int, gpus: float):
        import torch

        if not gpus:
            hide_devices()  # Ray shows all to a worker that asks for none
        quiet_imports()
        torch.set_num_threads(threads)
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        self.rank, self.world, self.seen, self.model = rank, world, LoadProgress(), None
        self.store: TCPStore | None = None
        """On rank 0: the store at which ranks meet."""
        self.text: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        """On rank 0: pieces of answers that nobody has taken, each with its stream's number."""
        self.stopped = 0
        """The last stream that was ended early. Numbers only grow, so that an end cannot come too late or too soon."""

    def serve(self, alone: bool, interface: str | None) -> tuple[str, int]:
        """Opens rank 0's store and returns its address.

        That is the address of the interface if one is given. Else it is loopback if all ranks are `alone` on a machine,
        and otherwise the address at which Ray knows this node.
        """
        from distquant.runtime import addresses
        from distquant.runtime.meeting import serve

        address = addresses.LOOPBACK if alone else ray.util.get_node_ip_address()
        if interface is not None:
            address = addresses.address_of(interface)
        self.store = store = serve(address)
        return address, store.port

    def ray_node(self) -> str:
        return str(ray.get_runtime_context().get_node_id())

    def node(self) -> str:
        from distquant.runtime.measure import node_name

        return node_name()

    def place(self) -> Place:
        from distquant.runtime import local

        return place_of(local.device())

    def environment(self, max_memory: int | None, nodes: tuple[int, ...], mesh: Mesh) -> Environment:
        from distquant.runtime import local
        from distquant.runtime.measure import measure

        return measure(local.device(), max_memory, nodes, self.rank, mesh)

    def load(self, plan: str, address: tuple[str, int], options: RunOptions) -> None:
        from distquant.loading.loader import load_shard
        from distquant.runtime import addresses, local, process_group
        from distquant.runtime.meeting import Meeting, connect

        loaded = LoadPlan.from_json(plan)
        addresses.place_ranks(options.interface, address[0], alone=addresses.is_loopback(address[0]))
        with self._lost_peers_named():
            store = self.store or connect(*address)
            process_group.init(Meeting(store, self.rank, self.world), options.timeout)
            comm = process_group.GroupComm(loaded.mesh, options.timeout)
            self.model = load_shard(loaded, comm, local.device(), options, self._progress)

    def _progress(self, seen: LoadProgress) -> None:
        self.seen = seen

    @ray.method(concurrency_group="progress")
    def progress(self) -> LoadProgress:
        return self.seen

    def perform(self, query: Query) -> Outcome:
        from distquant.runtime.query import perform

        with self._lost_peers_named():
            return perform(self.model, query, NAME)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._lost_peers_named():
            return function(self.model, *args, **kwargs)

    def answer(self, stream: int, prompt: str | Messages, kwargs: dict[str, Any]) -> Answer:
        from distquant.runtime.answer import answer

        def on_text(piece: str) -> None:
            self.text.put((stream, piece))

        with self._lost_peers_named():
            return answer(
                self.model, prompt, on_text if self.rank == 0 else None, lambda: self.stopped >= stream, **kwargs
            )

    @ray.method(concurrency_group="alive")
    def alive(self) -> Sign:
        """Returns at once, as long as the worker lives."""
        return Sign(activity.current(), self.ray_node(), os.getpid())

    @ray.method(concurrency_group="progress")
    def pieces(self, stream: int, seconds: float) -> list[str]:
        """Returns the text that has come since; waits for some for a moment."""
        found = []
        try:
            found.append(self.text.get(timeout=seconds) if seconds else self.text.get_nowait())
            while True:
                found.append(self.text.get_nowait())
        except queue.Empty:
            return [piece for number, piece in found if number == stream]

    @ray.method(concurrency_group="progress")
    def stop(self, stream: int) -> None:
        """Ends an answer after the token that it is at."""
        self.stopped = stream

    @contextmanager
    def _lost_peers_named(self) -> Iterator[None]:
        """Gives a type to the error of a collective whose other ranks are gone: the driver sees types, not frames."""
        from distquant.runtime.collectives import is_lost_peer

        try:
            yield
        except RuntimeError as error:
            if not is_lost_peer(error):
                raise
            raise LostPeerError(self.rank, f"{type(error).__name__}: {error}") from error


def _absolute(path: Any) -> Any:
    """Returns the absolute path of a folder; anything else as it is."""
    return os.path.abspath(path) if isinstance(path, (str, os.PathLike)) and os.path.isdir(path) else path


def load(
    model: Model,
    quantization_config: Any = None,
    *,
    mesh: str | int | Mesh | None = None,
    max_memory: str | int | None = None,
    dtype: Any = "auto",
    attn_implementation: str | None = None,
    staging: str | int = "512MiB",
    dispatch: str = "all_reduce",
    on_unsupported: str = "error",
    trust_remote_code: bool = False,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    resources: Resources | None = None,
    placement_group: PlacementGroup | None = None,
    threads: int | None = None,
    schedule_timeout: float = SCHEDULE_TIMEOUT,
    kernel: str = "auto",
    forward: str = "auto",
    io: str = "auto",
    trace: str | os.PathLike[str] | None = None,
    timeout: float | None = None,
    interface: str | None = None,
    adapter: str | os.PathLike[str] | bool | None = None,
    progress: Progress | bool | None = None,
    **aliases: Unpack[Aliases],
) -> Sharded:
    """Loads a model onto Ray workers, one for each rank of the mesh.

    Joins the Ray that is running (or that RAY_ADDRESS names), and starts a local one without a dashboard otherwise.
    Arguments that are not described here are those of `distquant.plan` and `distquant.load`. The worker of rank 0
    writes the trace.

    Args:
        resources: What one worker asks for; None: one CPU, and one GPU where the cluster has any. Workers that ask for
            no GPU (`gpus=0`) see none.
        placement_group: A placement group of the caller's to put the workers in, which stays when the model is closed.
            Its last bundles with room for a worker are used: the first may hold the caller. Default: one made for them.
        threads: Torch threads of a worker. Default: on a Ray that is started here, OMP_NUM_THREADS or an equal part of
            the cores; else as many as the CPUs of a worker.
        schedule_timeout: Seconds until a placement group that cannot be scheduled is given up.
        progress: As in `distquant.load`; a function is called with the progress of every rank.

    Raises:
        InputError: with every problem; also if the cluster lacks resources that the mesh needs.
        RankError: a worker failed or died; the others have been ended.
    """
    arguments = {
        **locals(),
        # Workers run in folders of their own.
        "model": _absolute(model),
        "adapter": _absolute(adapter),
        "trace": None if trace is None else os.path.abspath(trace),
    }
    quiet_imports()
    request, options = read_arguments("ray.load", arguments)
    with showing(progress) as viewer:
        called = progress if callable(progress) else viewer
        find = functools.partial(place, resources=resources, given=placement_group, timeout=schedule_timeout)
        return _load(request, options, called, find, threads, schedule_timeout)


def _load(
    request: Request,
    options: RunOptions,
    progress: Callable[[list[LoadProgress]], None] | None,
    find: Callable[[int], Placement],
    threads: int | None,
    schedule_timeout: float,
) -> Sharded:
    """Plans, starts the workers and loads."""
    status("planning")
    first = make_plan(request, declared(request))
    check_supported(first)
    world = first.mesh.size
    status("starting Ray")
    started_ray = _start(world)
    workers: list[Any] = []
    group, watch = None, None
    try:
        status(f"starting {world} workers")
        placement = find(world)
        group = placement.own
        own_machine = started_ray and not os.environ.get("RAY_ADDRESS")
        threads = threads or (rank_threads(world) if own_machine else max(int(placement.resources.cpus), 1))
        load_id = uuid.uuid4().hex
        names = [f"distquant-{load_id}-{rank}" for rank in range(world)]
        workers = _workers(names, placement, threads)
        watch = Watch(workers, DEFAULT_TIMEOUT if options.timeout is None else options.timeout)
        remove_after(placement, names)
        check_started(placement, workers, schedule_timeout)
        check_places(gather([worker.place.remote() for worker in workers], watch=watch))
        plan = _plan(request, first.mesh, workers, watch)
        alone = len(set(gather([worker.ray_node.remote() for worker in workers], watch=watch))) == 1
        status("loading")
        (address,) = gather([workers[0].serve.remote(alone, options.interface)], watch=watch)
        text = plan.to_json()
        tick = (lambda: progress(_progress_of(workers))) if progress is not None else None
        gather([worker.load.remote(text, address, options) for worker in workers], tick, watch)
        return Sharded(plan, workers, group, started_ray, watch)
    except BaseException:
        stop(workers, group, started_ray, watch)
        raise


def _start(world: int) -> bool:
    """Starts a local Ray unless one runs or is named; returns True if it did."""
    if ray.is_initialized():
        return False
    local = not os.environ.get("RAY_ADDRESS")
    if local:
        check_rank_count(world)
    arguments: dict[str, Any] = {"include_dashboard": False, "num_cpus": world, **_temp_dir()} if local else {}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    with _on_loopback() if local else nullcontext(), _own_signals():
        ray.init(logging_level=logging.ERROR, log_to_driver=False, configure_logging=False, **arguments)
    return True


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keeps this process's handler of SIGTERM, if it has one: Ray's would exit with code 15."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if before not in (signal.SIG_DFL, signal.SIG_IGN, None):
        signal.signal(signal.SIGTERM, before)


SOCKET = "ray/session_2026-01-01_00-00-00_000000_{pid}/sockets/plasma_store"
"""The longest path of a socket in Ray's temporary folder."""

LONGEST = 107
"""Bytes of a socket's path, at most."""


def _temp_dir() -> dict[str, str]:
    """Returns the option for another temporary folder where Ray's own has too long a path for sockets.

    Raises:
        InputError: the user has named the folder for Ray, or there is no shorter one.
    """
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    folder, end = os.environ.get(name, ""), SOCKET.format(pid=os.getpid())
    if len(os.fsencode(os.path.join(folder, end))) <= LONGEST:
        return {}
    if name == "TMPDIR" and os.access("/tmp", os.W_OK | os.X_OK):
        return {"_temp_dir": "/tmp/ray"}
    fault = f"{folder!r} is too long: Ray's sockets are in it, and their paths have at most {LONGEST} bytes"
    raise InputError.one(name, fault, f"Set RAY_TMPDIR to a folder of at most {LONGEST - len(end) - 1} bytes")


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Makes a Ray that starts meanwhile listen on the loopback interface only; Ray has no public option for that.

    Ray uses this switch on Windows and macOS to give its node the address 127.0.0.1, and then listens nowhere else.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _workers(names: list[str], placement: Placement, threads: int) -> list[Any]:
    groups = {"progress": 1, "alive": 1}
    actor = ray.remote(concurrency_groups=groups)(Worker)  # type: ignore[call-overload]
    workers, resources = [], placement.resources
    for rank, name in enumerate(names):
        options = actor.options(
            name=name,
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            max_concurrency=1,
            scheduling_strategy=placement.strategy(rank),
        )
        workers.append(options.remote(rank, len(names), threads, resources.gpus or 0))
    return workers


def _plan(request: Request, mesh: Mesh, workers: list[Any], watch: Watch) -> LoadPlan:
    """Plans with what the workers measured."""
    nodes = numbered(gather([worker.node.remote() for worker in workers], watch=watch))
    measured = [worker.environment.remote(request.rank_memory(), nodes, mesh) for worker in workers]
    return make_plan(request, weakest(gather(measured, watch=watch)))


def _progress_of(workers: list[Any]) -> list[LoadProgress]:
    try:
        return ray.get([worker.progress.remote() for worker in workers], timeout=1)
    except (ray.exceptions.RayError, TimeoutError):
        time.sleep(POLL)
        return []
